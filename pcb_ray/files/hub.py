"""Models on the Hugging Face Hub are asked for through `huggingface_hub`: which files, ranges of their bytes, a download.

`org/name` is the model in the Hub's cache: it is planned by ranges (HubModel), then downloaded. `hf://org/name` is the model in a
store, whose files are read in place (HubFiles) by their URIs `hf://org/name@commit/file`.

Whatever fails is told in our own words: a text of the library or of its transport could quote the token, or a signed address.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import glob
import logging
import os
import re
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urljoin, urlsplit

from pcb_ray.errors import RequestError
from pcb_ray.files import objects
from pcb_ray.files.foreign import mismatch, show
from pcb_ray.files.objects import HUB_SCHEME, MAX_RENEWALS, Busy, Changed, ObjectModel, Passing, Retries
from pcb_ray.files.store import Stamp

_TIMEOUT_S = 10
_MAX_REDIRECTS = 5
_IN_FLIGHT = threading.BoundedSemaphore(20)
"""Of ranges, in this process: the library's session keeps so many connections for the next request."""


def hub_id(source: str) -> str:
    """`org/name` of a source, which may have a scheme before it and a revision after it."""
    return source.removeprefix(HUB_SCHEME).partition("@")[0]


class Snapshot(NamedTuple):
    """A model that lies in the Hub's cache, whole or not, while there is a problem with the Hub itself."""

    folder: Path
    problem: str


@dataclass(frozen=True)
class HubModel:
    """A model is given by its commit. For the messages, `source` is what the user wrote, and at `path` there is no such folder; of
    `hf://` there can be none."""

    source: str
    path: Path | None
    host: str
    repo: str
    commit: str
    sizes: Mapping[str, int]
    """Of its files, by name."""

    @property
    def where(self) -> str:
        return f"hub://{self.repo}@{self.commit}"

    def in_place(self) -> ObjectModel:
        """The same as a model in a store."""
        files = HubFiles(patience_s=objects.LOOKING_PATIENCE_S)
        return ObjectModel(f"{HUB_SCHEME}{self.repo}@{self.commit}", self.sizes, files, self.commit)

    def read(self, name: str, start: int, stop: int) -> tuple[bytes, int]:
        """Fetch bytes `start` to `stop` of a file, or up to its end if that comes first, and its size; nothing is stored."""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status  # type: ignore[attr-defined]

        count = stop - start
        try:
            url = hf_hub_url(self.repo, name, revision=self.commit)
            headers = {**build_hf_headers(), "Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
            with get_session().stream("GET", url, headers=headers, timeout=_TIMEOUT_S) as response:
                if response.status_code == 416 and start == 0:  # An empty file has no first byte.
                    return b"", 0
                if response.status_code >= 400:
                    response.read()
                    hf_raise_for_status(response)
                partial = response.status_code == 206
                told = response.headers.get("Content-Range" if partial else "Content-Length", "").rpartition("/")[2]
                data = bytearray()
                if partial or start == 0:  # A server that ignores the range is left after `count` bytes.
                    for piece in response.iter_bytes(1 << 16):
                        data += piece
                        if len(data) >= count:
                            break
                    return bytes(data[:count]), int(told) if told.isdecimal() else len(data)
        except _failures() as error:
            problem = _problem(self.source, self.path, self.host, error, f" while fetching {show(name)}")
            raise RequestError(problem) from None
        found = f"that {self.host} sends whole files only, {told or 'unknown'} bytes"
        fix = f"fetch the model with `hf download {self.repo} --revision {self.commit}`, and name the folder that this prints"
        raise RequestError(f"{self.where}/{name}: {mismatch(f'its bytes {start} to {stop}', found, fix)}")

    def download(self, names: Sequence[str], revision: str | None) -> Path:
        """Put these files into the Hub's cache; `revision` is noted there."""
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(self.repo, revision=revision, allow_patterns=[glob.escape(name) for name in names]))
        except _failures() as error:
            raise RequestError(_problem(self.source, self.path, self.host, error, " while downloading")) from None
        if folder.name != self.commit:
            found = f"{folder.name}, to which it moved just now"
            raise RequestError(f"model {self.source}: {mismatch(f'commit {self.commit}', found, 'run again, or name a commit')}")
        return folder


def find_model(source: str, path: Path | None, repo: str, revision: str | None) -> HubModel | Snapshot:
    """Find the model as the Hub has it now; or as the cache has it, if the Hub can't be asked. One of `hf://`, which has no path,
    is asked for patiently, and found in the cache only where HF_HUB_OFFLINE forbids to ask. Raises RequestError."""
    host = _hub_host()  # With a wrong HF_ENDPOINT the library fails to load.

    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    def ask() -> HubModel:
        info = HfApi().model_info(repo, revision=revision, timeout=_TIMEOUT_S, files_metadata=True)
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
        return HubModel(source, path, host, repo, str(info.sha), sizes)

    def ask_patiently() -> HubModel:
        try:
            return ask()
        except _failures() as error:
            if why := _may_pass(error):
                raise Passing(why) from None
            raise

    try:
        return ask() if path is not None else Retries(objects.LOOKING_PATIENCE_S).ask(source, ask_patiently)
    except _failures() as error:
        problem = _problem(source, path, host, error)
        if isinstance(error, HfHubHTTPError) and error.response.status_code < 500:
            raise RequestError(problem) from None
        if path is None and not isinstance(error, OfflineModeIsEnabled):
            raise RequestError(problem) from None
    try:  # The pattern asks for no file that must be there: opening the folder tells what is missing.
        folder = snapshot_download(repo, revision=revision, local_files_only=True, allow_patterns="config.json")
    except _failures():
        raise RequestError(problem) from None
    return Snapshot(Path(folder), problem)


# ---------------------------------------------------------------------------------------------------- files in place


class _Link(NamedTuple):
    """Where the Hub says that a file is, and what it is."""

    url: str
    is_signed: bool
    """By the Hub, for another host: it gets no token, and is not shown. Else it is the Hub's own."""
    stamp: Stamp
    """Of size -1 if the Hub doesn't say it."""


class HubFiles:
    """Requests for files of models on the Hub, as `Objects` for those of object stores. Any number of threads may use it at once.

    The Hub is asked once where a file is. For a large one it names another host, and signs that for a while: ranges are fetched
    there until that host refuses them, then the Hub is asked anew. What a file is, its commit says; the Hub's digest is its tag."""

    def __init__(self, *, patience_s: float) -> None:
        self._retries = Retries(patience_s)
        self._links: dict[str, _Link] = {}
        self._asking: dict[str, threading.Lock] = {}
        self._lock = threading.Lock()
        _keep_queries_out_of_logs()

    @property
    def retries(self) -> int:
        """Requests that were made again."""
        return self._retries.count

    def close(self) -> None:
        """Make no request again any more."""
        self._retries.end()

    def head(self, uri: str) -> Stamp:
        """What a file is. Raises OSError."""
        stamp = self._retries.ask(uri, lambda: self._link(uri)).stamp
        return stamp if stamp.size >= 0 else self.get(uri, 0, 1)[1]

    def get(self, uri: str, start: int, stop: int, tag: str = "") -> tuple[memoryview, Stamp]:
        """Bytes start..stop-1 of a file, or up to its end if that comes first; and what it is.

        Raises Changed if it has another tag than this one (if one is given), OSError."""
        refused: list[_Link] = []

        def attempt() -> tuple[memoryview, Stamp]:
            link = self._link(uri, refused[-1] if refused else None)
            if tag and link.stamp.tag != tag:
                raise Changed
            with _IN_FLIGHT, in_our_words(uri), _asked("GET", link.url, not link.is_signed, start, stop) as response:
                if link.is_signed and 400 <= response.status_code < 500 and response.status_code not in (408, 416, 429):
                    found = f"that the host to which {_hub_host()} sends refuses access (HTTP {response.status_code})"
                    if len(refused) == MAX_RENEWALS:
                        raise PermissionError(errno.EACCES, found, uri)
                    refused.append(link)
                    raise Passing(found)
                data, size = _body_of(response, uri, start, stop)
            return data, link.stamp._replace(size=size)

        return self._retries.ask(uri, attempt)

    def _link(self, uri: str, refused: _Link | None = None) -> _Link:
        """Where a file is; as the Hub says now, if this was refused. Raises Passing, OSError."""
        with self._lock:
            asking = self._asking.setdefault(uri, threading.Lock())
        with asking:  # the others wait for the answer
            found = self._links.get(uri)
            if found is None or found is refused:
                with in_our_words(uri):
                    found = self._links[uri] = _located(uri)
            return found


def _located(uri: str) -> _Link:
    """Ask the Hub where a file is. Raises what the library and its transport raise, and OSError."""
    from huggingface_hub import hf_hub_url

    repo, commit, name = _parts_of(uri)
    at = own = hf_hub_url(repo, name, revision=commit)
    for _ in range(_MAX_REDIRECTS):
        with _asked("HEAD", at, True) as response:
            _raise_for_status(response)
            linked = response.headers.get("X-Linked-Size", "")
            tag = response.headers.get("X-Linked-Etag", "").removeprefix("W/").strip('"')
            if not response.has_redirect_location:
                size = linked or response.headers.get("Content-Length", "")
                return _Link(at, False, Stamp(int(size) if size.isdecimal() else -1, 0, 0, tag))
            there = urljoin(at, response.headers["Location"])
            if _origin(there) != _origin(own):
                return _Link(there, True, Stamp(int(linked) if linked.isdecimal() else -1, 0, 0, tag))
            at = there
    raise OSError(errno.ELOOP, "that it leads from one address to the next", uri)


@contextlib.contextmanager
def _asked(method: str, url: str, with_token: bool, start: int = 0, stop: int = 0) -> Iterator[Any]:
    """The answer to one request, whose body is yet to be read; redirects are not followed."""
    from huggingface_hub.utils import build_hf_headers, get_session  # type: ignore[attr-defined]

    headers = {**build_hf_headers(token=None if with_token else False), "Accept-Encoding": "identity"}
    headers |= {"Range": f"bytes={start}-{stop - 1}"} if stop else {}
    limits = objects.CONNECT_S, objects.SILENCE_S, objects.SILENCE_S, None  # to connect, read, write, and wait for a connection
    with get_session().stream(method, url, headers=headers, timeout=limits, follow_redirects=False) as response:
        yield response


def _body_of(response: Any, uri: str, start: int, stop: int) -> tuple[memoryview, int]:
    """The bytes that were asked for, and the size of the file. Raises what the transport raises, Passing, OSError."""
    _raise_for_status(response)
    told = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+)", response.headers.get("Content-Range", ""))
    length = response.headers.get("Content-Length", "")
    if response.status_code == 416 and told is not None:
        return memoryview(b""), int(told[2])
    if response.status_code == 206 and told is not None and told[1] == str(start):
        size = int(told[2])
    elif response.status_code == 200 and start == 0 and length.isdecimal():  # the whole file; it is left when there is enough of it
        size = int(length)
    else:
        raise OSError(errno.EIO, "that no ranges are sent, but whole files or other bytes", uri)
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise OSError(errno.EIO, "that files are sent in another encoding than was asked for", uri)
    data, got = memoryview(bytearray(min(stop, size) - start)), 0
    until = time.monotonic() + objects.REQUEST_S
    for piece in response.iter_raw():
        taken = piece[: len(data) - got]
        data[got : got + len(taken)] = taken
        got += len(taken)
        if got == len(data) and response.status_code == 200:
            break  # else it is heard to its end, so that the connection can be used again
        if time.monotonic() > until:
            raise Passing("no answer in time")
    if got < len(data):
        raise Passing("an answer that was cut short")
    return data, size


def _raise_for_status(response: Any) -> None:
    """Raises HfHubHTTPError for what is not an answer to the request."""
    from huggingface_hub.utils import hf_raise_for_status  # type: ignore[attr-defined]

    if response.status_code >= 400 and response.status_code != 416:
        response.read()
        hf_raise_for_status(response)


def _parts_of(uri: str) -> tuple[str, str, str]:
    """Repository, commit and name of a file."""
    repo, _, rest = uri.removeprefix(HUB_SCHEME).partition("@")
    commit, _, name = rest.partition("/")
    return repo, commit, name


def _origin(url: str) -> tuple[str, str | None, int | None]:
    address = urlsplit(url)
    return address.scheme, address.hostname, address.port or {"http": 80, "https": 443}.get(address.scheme)


@functools.cache
def _keep_queries_out_of_logs() -> None:
    """The transport logs addresses, and headers that hold some: one may have a signature in its query, or a password."""

    def without(record: logging.LogRecord) -> bool:
        record.msg, record.args = re.sub(r"\?[^\s\"'>]+|(?<=://)[^\s/@]+@", "", record.getMessage()), ()
        return True

    parts = ("connection", "http11", "http2", "proxy", "socks")
    of_transport = [f"{core}.{part}" for core in ("httpcore", "httpcore2") for part in parts]
    for name in ("httpx", "httpx2", "huggingface_hub.utils._http", *of_transport):
        logging.getLogger(name).addFilter(without)


# ---------------------------------------------------------------------------------------------------- failures


def _failures() -> tuple[type[Exception], ...]:
    """Transport errors are HTTPError; the library's own are HTTPError, OSError or ValueError; an answer that is not the
    Hub's fails as one of the rest."""
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    return (HTTPError, OSError, ValueError, TypeError, KeyError, AttributeError)


def _may_pass(error: Exception) -> str:
    """Why a request failed, if that may pass, in words that carry nothing of the request; else nothing."""
    from huggingface_hub import errors

    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
        return f"HTTP {status}" if status in (408, 429) or status >= 500 else ""
    name = type(error).__name__
    if isinstance(error, RuntimeError) and "closed" in str(error):  # another thread has closed the library's session
        return "a connection that broke"
    if not isinstance(error, errors.HTTPError) or name in ("LocalProtocolError", "UnsupportedProtocol"):  # type: ignore[attr-defined]
        return ""
    if "Timeout" in name:
        return "no answer in time"
    return {"ConnectError": "no connection", "RemoteProtocolError": "an answer that was cut short"}.get(
        name, "a connection that broke"
    )


@contextlib.contextmanager
def in_our_words(uri: str) -> Iterator[None]:
    """Raises Passing for what may pass, else OSError, that show nothing of the request."""
    try:
        yield
    except (Passing, Changed):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.filename == uri:  # it is ours
            raise
        if why := _may_pass(error):
            raise Passing(why) from None
        raise OSError(_errno_of(error), _found(error, _hub_host(), None)[0], uri) from None


def _errno_of(error: Exception) -> int:
    """What kind of OSError a failure is."""
    from huggingface_hub import errors

    status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else None
    if isinstance(error, errors.RepositoryNotFoundError) or status == 404:  # private ones too, and it answers with 401 then
        return errno.ENOENT
    return errno.EACCES if status in (401, 403) or isinstance(error, UnicodeError) else errno.EIO


def _problem(source: str, path: Path | None, host: str, error: Exception, when: str = "") -> str:
    found, fix = _found(error, host, path)
    return f"model {source}: {mismatch('a model', f'{found}{when}', fix)}"


def _found(error: Exception, host: str, path: Path | None) -> tuple[str, str]:
    """What was found instead of a model, or of a file of one, and how that is mended."""
    from huggingface_hub import errors

    no_folder = "" if path is None else f"no folder {path}, and "
    status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else None
    if isinstance(error, errors.GatedRepoError):
        return f"it gated on {host}", "accept its terms there, and set HF_TOKEN to a token of that account"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"no such revision of it on {host}", "check what follows the @"
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return f"no such file on {host}", "check its name"
    if isinstance(error, errors.RepositoryNotFoundError) or status == 404:
        return f"{no_folder}no such model on {host} (or a private one)", "check the name, or set HF_TOKEN"
    if status in (401, 403):
        return f"that {host} refuses access (HTTP {status})", "check that HF_TOKEN is valid and may read this model"
    if status is not None:
        return f"that {host} answers with HTTP {status}", "try again later"
    if isinstance(error, errors.HFValidationError):
        return f"{no_folder}not a valid Hub id", "check the name"
    if isinstance(error, errors.OfflineModeIsEnabled):
        fix = "unset HF_HUB_OFFLINE, or give a folder"
        return "it not whole in the Hub's cache, and HF_HUB_OFFLINE set, which forbids to fetch it", fix
    if isinstance(error, UnicodeError):
        return "that HF_TOKEN is not plain ASCII", "set it anew"
    if isinstance(error, Busy):
        return f"{error.strerror} from {host}", "check the network and HF_ENDPOINT, or try again later"
    if isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError):
        return f"that it cannot be stored in the Hub's cache ({os.strerror(error.errno)})", "check HF_HOME and its disk"
    if isinstance(error, (errors.HTTPError, OSError)):  # type: ignore[attr-defined]
        fix = "check the network and HF_ENDPOINT, or give a folder"
        if path is None:
            return f"that {host} cannot be reached ({type(error).__name__})", fix
        return f"no folder {path}, that {host} cannot be reached ({type(error).__name__}), and it not whole in the Hub's cache", fix
    return f"that {host} does not answer as a Hub does ({type(error).__name__})", "check HF_ENDPOINT and HF_TOKEN"


def _hub_host() -> str:
    """The host that models are asked for at. Raises RequestError if HF_ENDPOINT is wrong."""
    return _host(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")


def _host(endpoint: str) -> str:
    """Return the host of HF_ENDPOINT, without a user or password that the address may carry."""
    try:
        address = urlsplit(endpoint)
        name = f"{address.hostname}:{address.port}" if address.port else address.hostname
    except ValueError:
        name = None
    if not name or address.scheme not in ("http", "https"):
        wanted, fix = "an http or https address", "set it to one such as https://huggingface.co"
        raise RequestError(f"HF_ENDPOINT: {mismatch(wanted, 'something else', fix)}")
    return name
