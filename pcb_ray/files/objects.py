"""Objects in stores over a network, by their URIs: `s3://bucket/key`, `gs://bucket/key`, `az://container/key`, and `abfs(s)://` as
Azure writes it, through obstore.

Every request has a time limit. One that fails for a reason that may pass (the server is busy, a connection breaks, a body is cut
short) is made again, with growing pauses, until its patience is spent; how often is counted. What is told of a failure is in our
own words: a server's answer, or an address, may carry a credential.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import hashlib
import itertools
import json
import os
import posixpath
import queue
import random
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol, TypeVar
from urllib.parse import urlsplit

from pcb_ray.errors import RequestError, RunError
from pcb_ray.files.foreign import mismatch, os_problem
from pcb_ray.files.store import Stamp, is_remote

SCHEMES = {"s3": "s3", "gs": "gs", "az": "az", "abfs": "az", "abfss": "az"}
"""By the scheme of a URI, the kind of its store: what `storage` names."""
HUB_SCHEME = "hf://"
"""What the URIs of models on the Hub begin with, and of their files."""

CONNECT_S, SILENCE_S, REQUEST_S = 10, 20, 120
"""Limits of one request: to connect, between two pieces of its answer, and in all (16 MB need 0.14 MB/s)."""
PATIENCE_S = 300.0
"""How long a request is made again before it has failed."""
LOOKING_PATIENCE_S = 30.0
"""The same while somebody waits for a plan."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 5.0
MAX_RENEWALS = 3
"""How often an address that is refused is asked for anew, for one request."""

_T = TypeVar("_T")


@dataclass(frozen=True)
class Access:
    """How stores of one kind are reached. What is empty is taken from the usual variables and files of their own tools."""

    endpoint: str = ""
    """An address such as http://minio:9000."""
    region: str = ""
    anonymous: bool = False
    """Whether requests are not signed."""


Storage = Mapping[str, Access]
"""By the kind of the store: s3, gs, az."""


class Version(NamedTuple):
    """What an object is changed by only as it was seen; stores tell it by the one or the other."""

    e_tag: str | None
    version: str | None


class Fence(NamedTuple):
    """An object, and the run that it names as long as that run may write beside it."""

    uri: str
    run: str


class Busy(OSError):
    """A store gave no answer within the patience."""


class CutOff(OSError):
    """An upload came to nothing, and may be begun anew."""


def lost_place(where: str) -> RunError:
    """What to say where another run has taken an output over."""
    return RunError(
        f"{where}: wanted to write it for this run, found that another run has taken the output over. Fix: let one of them go on; "
        "--resume waits for the other to end."
    )


class Changed(Exception):
    """An object is no longer what it was."""


class Exists(Exception):
    """There is an object where none was wanted, or another than was wanted."""


class Passing(Exception):
    """A request failed for a reason that may pass, which the text tells; it shows nothing of the request."""


class Retries:
    """Makes requests again that failed for a reason that may pass, and counts that. Any number of threads may use it at once."""

    def __init__(self, patience_s: float) -> None:
        self.patience_s, self._lock = patience_s, threading.Lock()
        self._random = random.Random()  # not the one of the module, which a user may have seeded
        self._ended = threading.Event()
        self.count = 0

    def ask(self, uri: str, attempt: Callable[[], _T]) -> _T:
        """What the attempt gives in the end. Raises Busy if it raised Passing for too long; whatever else it raises is for good."""
        begin, pause = time.monotonic(), FIRST_PAUSE_S
        longest = min(LONGEST_PAUSE_S, self.patience_s / 30)  # so that also a short patience is for many tries
        while True:
            try:
                return attempt()
            except Passing as failure:
                left = self.patience_s - (time.monotonic() - begin)
                if left <= 0 or self._ended.is_set():
                    raise Busy(errno.ETIMEDOUT, f"no answer in {self.patience_s:.0f} s ({failure})", uri) from None
                self.note()
                self._ended.wait(min(left, pause * self._random.uniform(0.5, 1.0)))
                pause = min(2 * pause, longest)

    def end(self) -> None:
        """Make no request again any more: nobody waits for the answer."""
        self._ended.set()

    def note(self) -> None:
        """Count one that is made again otherwise."""
        with self._lock:
            self.count += 1


def is_object(uri: str) -> bool:
    """Whether a URI names an object in one of these stores."""
    return uri.partition("://")[0] in SCHEMES


def container_of(uri: str) -> str:
    """What an object is in that has credentials of its own: a bucket, or a model on the Hub."""
    return "/".join(uri.split("/")[: 4 if uri.startswith(HUB_SCHEME) else 3])


def uri_problem(uri: str) -> str | None:
    """What is wrong with a URI of an object or of a folder of them, in the form `wanted ..., found ...`; it shows no secret."""
    try:
        address = urlsplit(uri)
        has_secret = bool(
            address.query or address.fragment or address.password or (address.scheme in ("s3", "hf") and address.username)
        )
    except ValueError:
        return _NO_URI
    if has_secret:
        fix = "write it without, and give credentials to each node by its role, its environment or its files"
        return mismatch("a URI without credentials", "one with a query, a fragment, or a user", fix)
    parts = address.path.split("/")[1:]
    has_place = address.netloc or address.scheme not in (*SCHEMES, "hf")  # that of hdfs:///data is in its own settings
    return _NO_URI if not has_place or any(part in (".", "..") for part in parts) or "" in parts[:-1] else None


_NO_URI = mismatch("SCHEME://BUCKET/NAME", "something else", "write the bucket, and a plain path in it")


def without_credentials(uri: str) -> str:
    """The URI as it may be shown."""
    return (
        re.sub(r"//[^/@]*@", "//", uri.partition("?")[0]) if not uri.startswith(("abfs://", "abfss://")) else uri.partition("?")[0]
    )


class Objects:
    """Requests to these stores. Any number of threads may use it at once."""

    def __init__(self, storage: Storage | None = None, *, patience_s: float = PATIENCE_S) -> None:
        self._storage, self._retries = storage or {}, Retries(patience_s)
        self._stores: dict[tuple[str, bool], Any] = {}
        self._untold: set[str] = set()  # containers whose tags tell nothing of the content
        self._lock = threading.Lock()

    @property
    def retries(self) -> int:
        """Requests that were made again."""
        return self._retries.count

    def close(self) -> None:
        """Make no request again any more."""
        self._retries.end()

    def head(self, uri: str) -> Stamp:
        """What an object is. Raises OSError."""
        import obstore

        def attempt(store: Any, key: str) -> Stamp:
            try:
                return _stamp(obstore.head(store, key))
            except obstore.exceptions.BaseError as error:
                if re.search(r"status code: 40[013]\b", str(error)) is None:
                    raise
            return _stamp(obstore.get(store, key, options={"range": (0, 1)}).meta)  # the answer to a HEAD can't say why

        return self._patiently(uri, attempt)

    def get(self, uri: str, start: int, stop: int, tag: str = "") -> tuple[memoryview, Stamp]:
        """Bytes start..stop-1 of an object, or up to its end if that comes first; and what it is.

        Raises Changed if it has another tag than this one (if one is given), OSError."""
        import obstore

        def attempt(store: Any, key: str) -> tuple[memoryview, Stamp]:
            found = obstore.get(store, key, options={"range": (start, stop), **({"if_match": tag} if tag else {})})
            stamp = _stamp(found.meta)
            data = memoryview(found.bytes())
            if len(data) < min(stop, stamp.size) - start:
                raise obstore.exceptions.GenericError("the body was cut short")
            return data, stamp

        data, stamp = self._patiently(uri, attempt)
        if tag and stamp.tag != tag:  # from a server that knows no If-Match
            raise Changed
        return data, stamp

    def sizes(self, uri: str, *, all_of_them: bool = True) -> dict[str, int]:
        """The objects below a prefix that ends with `/`, or some of them, by their names from there. Raises OSError."""
        import obstore

        def attempt(store: Any, key: str) -> dict[str, int]:
            batches = iter(obstore.list(store, prefix=key))
            found = (one for batch in (batches if all_of_them else itertools.islice(batches, 1)) for one in batch)
            names = {one["path"]: one["size"] for one in found}
            within = f"{key}/" if key else ""
            return {name.removeprefix(within): size for name, size in names.items() if name.startswith(within)}

        return self._patiently(uri.removesuffix("/"), attempt)

    def look(self, uri: str) -> tuple[bytes, Version]:
        """A small object whole, and its version. Raises OSError."""
        import obstore

        def attempt(store: Any, key: str) -> tuple[bytes, Version]:
            found = obstore.get(store, key)
            return bytes(found.bytes()), Version(found.meta.get("e_tag"), found.meta.get("version"))

        return self._patiently(uri, attempt)

    def put(self, uri: str, data: bytes | bytearray, *, only: Literal["", "new"] | Version = "") -> Version:
        """Write a small object at once; `only` if there is none yet, or if it still is this version.

        Raises Exists if that is not so, OSError."""
        import obstore

        mode: Any = "overwrite" if only == "" else "create" if only == "new" else {k: v for k, v in only._asdict().items() if v}

        def attempt(store: Any, key: str) -> Version:
            made = obstore.put(store, key, data, mode=mode, use_multipart=False)
            return Version(made["e_tag"], made["version"])

        try:
            return self._patiently(uri, attempt)
        except Changed:
            raise Exists from None

    def delete(self, uri: str) -> None:
        """Remove an object, if there is one. Raises OSError."""
        import obstore

        with contextlib.suppress(FileNotFoundError):
            self._patiently(uri, lambda store, key: obstore.delete(store, key))

    def holds(self, fence: Fence) -> bool:
        """Whether the run that the fence names still has the right to write. Raises OSError."""
        try:
            content = json.loads(self.look(fence.uri)[0])
        except (FileNotFoundError, ValueError):
            return False
        return isinstance(content, dict) and content.get("run") == fence.run

    @contextlib.contextmanager
    def upload(self, uri: str, size: int, fence: Fence | None) -> Iterator[Callable[[memoryview], object]]:
        """Write an object of this size: the block is given what takes the bytes, front to back. The object is there when the block
        has ended, and not before; not if the block raises, and not if the fence names another run by then. It is held against the
        digest of what was sent, where the store tells one.

        Raises CutOff if the upload was lost or spoilt on the way and may be begun anew, RunError for a run that has lost the right
        to write, OSError."""
        if size <= UPLOAD_PIECE:
            whole = bytearray()
            yield whole.extend
            for _ in range(UPLOAD_TRIES):
                self._check(fence, uri)
                if self._arrived(uri, self.put(uri, whole).e_tag, [_md5(whole)], UPLOAD_PIECE, len(whole)):
                    return
                self._retries.note()
            raise OSError(errno.EIO, _SPOILT, uri)
        self._check(fence, uri)  # which also waits for credentials, where the last try has met expired ones
        store, key = self.store_of(uri, patient=True)
        upload = _Upload(store, key, uri, size)
        try:
            yield upload.write
            upload.flush()
            self._check(fence, uri)
            tag = upload.finish()
            if not self._arrived(uri, tag, upload.digests, upload.piece, upload.written):
                raise CutOff(errno.EIO, _SPOILT, uri)
        except BaseException as error:
            upload.abort(error)
            if isinstance(error, CutOff):
                self._retries.note()
                self._forget(uri)  # its credentials may have expired
            raise

    def _arrived(self, uri: str, tag: str | None, digests: Sequence[bytes], piece: int, size: int) -> bool:
        """Whether an object is what was sent, in pieces of these digests, as far as its tag tells; what is not is removed."""
        tag = (tag or "").strip('"').lower()
        if not size:
            return True
        wanted = digests[0].hex() if "-" not in tag else f"{_md5(b''.join(digests)).hex()}-{len(digests)}"
        if tag == wanted or not re.fullmatch(r"[0-9a-f]{32}(-\d+)?", tag) or container_of(uri) in self._untold:
            return True
        # A store that encrypts by a key of the user's own (KMS) has tags of this form that are no digests: what lies there decides.
        ranges = [(start, min(start + piece, size)) for start in range(0, size, piece)]
        try:
            if all(_md5(self.get(uri, *one)[0]) == digest for one, digest in zip(ranges, digests, strict=True)):
                self._untold.add(container_of(uri))
                return True
        except FileNotFoundError:
            return False
        self.delete(uri)
        return False

    def _check(self, fence: Fence | None, uri: str) -> None:
        if fence is not None and not self.holds(fence):
            raise lost_place(uri)

    def store_of(self, uri: str, *, patient: bool = False) -> tuple[Any, str]:
        """The store of obstore, and the object's key in it. A `patient` one makes requests again by itself, uncounted: an upload
        has no other way."""
        scheme, _, rest = uri.partition("://")
        bucket, _, key = rest.partition("/")
        where = f"{scheme}://{bucket}"
        with self._lock:
            if (where, patient) not in self._stores:
                access = self._storage.get(SCHEMES[scheme], Access())
                self._stores[where, patient] = _opened(where, access, self._retries.patience_s, again=patient)
            return self._stores[where, patient], key

    def _patiently(self, uri: str, attempt: Callable[[Any, str], _T]) -> _T:
        expired = False

        def once() -> _T:
            nonlocal expired
            store, key = self.store_of(uri)
            try:
                return attempt(store, key)
            except Exception as error:
                if (told := _for_good(error, uri)) is not None:
                    raise told from None
                if expired := _is_expired(error):
                    self._forget(uri)  # there may be new ones by now
                raise Passing(reason(error)) from None

        try:
            return self._retries.ask(uri, once)
        except Busy:
            if expired:
                raise PermissionError(errno.EACCES, "its credentials have expired", uri) from None
            raise

    def _forget(self, uri: str) -> None:
        """Open the store anew when it is asked next: with the credentials that there are then."""
        with self._lock:
            for patient in (False, True):
                self._stores.pop((container_of(uri), patient), None)


_ENDPOINTS = {
    "s3": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"),
    "gs": ("GOOGLE_BASE_URL", "STORAGE_EMULATOR_HOST"),
    "az": ("AZURE_STORAGE_ENDPOINT",),
}
"""The variables that name another address than the provider's, as its own tools read them."""


def _opened(where: str, access: Access, patience_s: float, *, again: bool) -> Any:
    """A store of obstore; `again`: it makes requests again by itself, within the patience."""
    from obstore.store import from_url

    kind = SCHEMES[where.partition("://")[0]]
    config: Any = {}
    options: dict[str, Any] = {}
    endpoint = access.endpoint or next((os.environ[name] for name in _ENDPOINTS[kind] if os.environ.get(name)), "")
    if endpoint:
        config["base_url" if kind == "gs" else "endpoint"] = endpoint
    if kind == "s3":
        region = access.region or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
        if region or endpoint:
            config["region"] = region or "us-east-1"
        if not access.anonymous and (provider := _of_boto3()) is not None:
            options["credential_provider"] = provider
    if access.anonymous:
        config["skip_signature"] = True
    client: Any = {
        "connect_timeout": f"{CONNECT_S}s",
        "read_timeout": f"{min(SILENCE_S, max(5, int(patience_s / 3)))}s",  # so that patience is for more than one silence
        "timeout": f"{REQUEST_S}s",
        **({"allow_http": True} if endpoint.startswith("http://") else {}),
    }
    retries: Any = {"max_retries": 0}  # ours are counted
    if again:
        pauses = {"init_backoff": _seconds(FIRST_PAUSE_S), "max_backoff": _seconds(LONGEST_PAUSE_S), "base": 2}
        retries = {"max_retries": 10_000, "retry_timeout": _seconds(patience_s), "backoff": pauses}
    try:
        return from_url(where, config=config, client_options=client, retry_config=retries, **options)
    except Exception as error:
        raise RequestError(
            f"{where}: wanted a store that can be opened, found: {reason(error)}. Fix: check the bucket, and `storage` or the "
            "variables that say how it is reached."
        ) from None


def _seconds(seconds: float) -> datetime.timedelta:
    return datetime.timedelta(seconds=seconds)


def _of_boto3() -> Any:
    """Credentials as Amazon's own tools find them (profiles, single sign-on), where boto3 is installed and no variable gives them;
    obstore by itself knows variables and the roles of machines and pods."""
    names = (
        "AWS_ACCESS_KEY_ID",
        "AWS_WEB_IDENTITY_TOKEN_FILE",
        "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
        "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    )
    files = (
        os.environ.get("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials"),
        os.environ.get("AWS_CONFIG_FILE", "~/.aws/config"),
    )
    if any(os.environ.get(name) for name in names) or not any(os.path.exists(os.path.expanduser(file)) for file in files):
        return None
    try:
        from obstore.auth.boto3 import Boto3CredentialProvider

        return Boto3CredentialProvider()
    except ImportError:
        return None


def _stamp(meta: Mapping[str, Any]) -> Stamp:
    """What tells an object from what it may become: its ETag, or where a store has none its version or time."""
    modified = meta["last_modified"]
    # In whole seconds: what was written in the same one counts as older.
    return Stamp(
        meta["size"], int(modified.timestamp() + 1) * 10**9 - 1, 0, meta.get("e_tag") or meta.get("version") or str(modified)
    )


# ---------------------------------------------------------------------------------------------------- uploads


UPLOAD_PIECE = 8 << 20
"""What is sent at once: a store wants at least 5 MiB, and at most 10,000 of them, so that those of very large files are larger."""
UPLOADS = 4
"""Pieces of one object under way at once."""
MAX_PIECES = 10_000
UPLOAD_TRIES = 3
"""How often a file is sent in all that does not arrive as it is."""
_SPOILT = "that what arrived is not what was sent"


def _md5(data: bytes | bytearray | memoryview) -> bytes:
    """Not against forgery: it is what tags of stores are made of."""
    return hashlib.md5(data, usedforsecurity=False).digest()


def upload_bytes(largest: int) -> int:
    """The most memory that the upload of a file takes, of `largest` bytes: pieces under way, one that waits, and one that fills."""
    return min(largest, (UPLOADS + 2) * _piece_of(largest))


def _piece_of(size: int) -> int:
    return max(UPLOAD_PIECE, -(-size // MAX_PIECES // (1 << 20)) * (1 << 20))


class _Upload:
    """An object on its way, written front to back. obstore sends it from a thread of its own, which keeps what it is given."""

    def __init__(self, store: Any, key: str, uri: str, size: int) -> None:
        self._store, self._key, self._uri, self._size = store, key, uri, size
        self.piece, self.digests = _piece_of(size), list[bytes]()
        self._filling = bytearray(min(self.piece, size))
        self._filled, self.written = 0, 0
        self._queue: queue.Queue[bytearray | BaseException | None] = queue.Queue(maxsize=1)
        self._made: Future[str | None] = Future()
        self._thread = threading.Thread(target=self._send, daemon=True)
        self._thread.start()

    def write(self, data: memoryview) -> None:
        """Append these bytes. Raises CutOff, OSError."""
        while data:
            taken = data[: len(self._filling) - self._filled]
            self._filling[self._filled : self._filled + len(taken)] = taken
            self._filled, self.written, data = self._filled + len(taken), self.written + len(taken), data[len(taken) :]
            if self._filled == len(self._filling):
                self._hand_over(self._filling)
                self._filling, self._filled = bytearray(min(self.piece, max(1, self._size - self.written))), 0

    def flush(self) -> None:
        """Hand over what is left."""
        if self._filled:
            self._hand_over(self._filling[: self._filled])
            self._filled = 0

    def finish(self) -> str | None:
        """Make the object of it; its tag. Raises CutOff, OSError."""
        self._hand_over(None)
        return self._made.result()

    def abort(self, error: BaseException) -> None:
        """Let nothing of it stay."""
        while not self._made.done():
            with contextlib.suppress(queue.Full):
                self._queue.put(error, timeout=_LOOK_S)
                break
        self._thread.join()

    def _hand_over(self, piece: bytearray | None) -> None:
        while True:
            if self._made.done():
                self._made.result()  # it has failed
            with contextlib.suppress(queue.Full):
                self._queue.put(piece, timeout=_LOOK_S)
                return

    def _pieces(self) -> Iterator[bytearray]:
        while (piece := self._queue.get()) is not None:
            if isinstance(piece, BaseException):
                raise _Aborted
            self.digests.append(_md5(piece))
            yield piece

    def _send(self) -> None:
        import obstore

        try:
            made = obstore.put(
                self._store, self._key, self._pieces(), chunk_size=self.piece, max_concurrency=UPLOADS, use_multipart=True
            )
        except BaseException as error:
            for_good = _for_good(error, self._uri) if isinstance(error, Exception) else error
            refused = isinstance(for_good, PermissionError | _Aborted) or not isinstance(for_good, OSError | None)
            told = f"the upload was cut off ({reason(error)})" if isinstance(error, Exception) else "interrupted"
            self._made.set_exception(for_good if refused and for_good else CutOff(errno.EIO, told, self._uri))
        else:
            self._made.set_result(made["e_tag"])


_LOOK_S = 0.2  # how often a writer that waits looks whether its upload has failed


class _Aborted(Exception):
    """The writer gave up."""


def abandon_uploads(uri: str, storage: Storage | None) -> int | None:
    """Abort the uploads below a prefix that nobody goes on with; how many there were. None where they can't be asked for: in other
    stores than S3, without boto3, and without the right to list them. Raises OSError."""
    if SCHEMES[uri.partition("://")[0]] != "s3":
        return None
    try:
        import boto3
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError, ClientError
    except ImportError:
        return None
    access = (storage or {}).get("s3", Access())
    address = urlsplit(uri)
    limits = Config(connect_timeout=CONNECT_S, read_timeout=SILENCE_S, retries={"max_attempts": 5, "mode": "standard"})
    try:
        region = access.region or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
        # A session of its own: the one that boto3 keeps holds credentials that may have expired meanwhile.
        client = boto3.Session().client("s3", endpoint_url=access.endpoint or None, region_name=region, config=limits)
        found = 0
        for page in client.get_paginator("list_multipart_uploads").paginate(Bucket=address.netloc, Prefix=address.path[1:]):
            for one in page.get("Uploads", ()):
                with contextlib.suppress(client.exceptions.NoSuchUpload):
                    client.abort_multipart_upload(Bucket=address.netloc, Key=one["Key"], UploadId=one["UploadId"])
                found += 1
        return found
    except (BotoCoreError, ClientError) as error:
        code = error.response.get("Error", {}).get("Code") if isinstance(error, ClientError) else type(error).__name__
        if code == "AccessDenied":
            return None
        raise OSError(errno.EIO, f"unfinished uploads can't be looked for ({code})", uri) from None


# ---------------------------------------------------------------------------------------------------- models


class Requests(Protocol):
    """What a model that lies in a store is read by."""

    def head(self, uri: str) -> Stamp: ...

    def get(self, uri: str, start: int, stop: int, tag: str = "") -> tuple[memoryview, Stamp]: ...


class Listed(Requests, Protocol):
    """Where models are found, too."""

    def sizes(self, uri: str, *, all_of_them: bool = True) -> dict[str, int]: ...


@dataclass(frozen=True)
class ObjectModel:
    """The objects below a prefix. It is told apart from what it may become by what the first answer about each said."""

    where: str
    """Its URI, without a `/` at the end."""
    sizes: Mapping[str, int]
    """Of its files, by their names in it."""
    objects: Requests = field(repr=False)
    commit: str | None = None
    """Of a model on the Hub."""
    stamps: dict[str, Stamp] = field(default_factory=dict, repr=False)

    def read(self, name: str, start: int, stop: int) -> tuple[bytes, int]:
        """Fetch bytes `start` to `stop` of a file, or up to its end if that comes first, and its size. Raises RequestError."""
        uri = f"{self.where}/{name}"
        before = self.stamps.get(name)
        try:
            if self.sizes[name] == 0 and (stamp := self.objects.head(uri)).size == 0:  # there is no range of it
                self.stamps[name] = stamp
                return b"", 0
            data, stamp = self.objects.get(uri, start, stop, before.tag if before else "")
            if before is not None and before.content != stamp.content:
                raise Changed
        except Changed:
            found = "another: it was changed meanwhile"
            raise RequestError(f"{uri}: {mismatch('the object as it was first seen', found, 'run again')}") from None
        except OSError as error:
            raise RequestError(object_problem(uri, error)) from None
        self.stamps[name] = stamp
        return bytes(data), stamp.size


def find_objects(where: str, storage: Storage | None, objects: Listed | None = None) -> ObjectModel:
    """List what lies below a prefix, or the object that lies there, by what is asked for it. Raises RequestError."""
    objects = objects or Objects(storage, patience_s=LOOKING_PATIENCE_S)
    where = where.rstrip("/")
    if (problem := uri_problem(where)) is not None:
        raise RequestError(f"model {without_credentials(where)}: {problem}")
    try:
        sizes = objects.sizes(f"{where}/")
        if not sizes and (folder := where.rpartition("/")[0]).count("/") > 2:  # else there is no object but the bucket
            name = where.removeprefix(f"{folder}/")
            return ObjectModel(folder, {name: objects.head(where).size}, objects)
    except FileNotFoundError:
        found, fix = "no object whose name begins so", "check it; a model is named by the prefix that its files share"
        raise RequestError(f"model {where}: {mismatch('a model', found, fix)}") from None
    except OSError as error:
        raise RequestError(object_problem(where, error)) from None
    return ObjectModel(where, sizes, objects)


def lies_there(uri: str, storage: Storage | None) -> bool:
    """Whether there is an object of this name, or one below it, as far as this machine may know. Raises RequestError."""
    objects = Objects(storage, patience_s=LOOKING_PATIENCE_S)
    try:
        return bool(objects.sizes(f"{uri}/", all_of_them=False)) or objects.head(uri).size >= 0
    except (FileNotFoundError, PermissionError):
        return False
    except OSError as error:
        raise RequestError(object_problem(uri, error)) from None


def uri_beside(prefix: str, name: str) -> str:
    """The URI of what a path names that is relative to a prefix, and can't lead out of its bucket."""
    scheme, _, rest = prefix.partition("://")
    bucket, _, key = rest.partition("/")
    return f"{scheme}://{bucket}{posixpath.normpath(posixpath.join('/', key, name))}"


def object_problem(uri: str, error: OSError, verb: str = "read") -> str:
    """What to say of an object, or of the prefix of many, that can't be read or written."""
    found = f"{error.strerror or type(error).__name__}"
    if uri.startswith(HUB_SCHEME):
        fix = "check HF_ENDPOINT, HF_HUB_OFFLINE and the network of this machine, and run again"
        if isinstance(error, FileNotFoundError | PermissionError):
            fix = (
                "give this machine a token that may read the model (HF_TOKEN, or `hf auth login`), and accept its terms on the Hub"
            )
    elif isinstance(error, FileNotFoundError):
        found, fix = "none", "check the name"
    elif not is_object(uri):
        fix = (
            "check its address, and that FileSystem.from_uri of pyarrow.fs opens it in Python on this machine (pip install pyarrow)"
        )
        if uri.startswith(("hdfs:", "viewfs:")):
            fix += "; it takes a Java runtime and Hadoop's client: JAVA_HOME, HADOOP_HOME, `hadoop classpath --glob` as CLASSPATH"
    elif isinstance(error, PermissionError):
        fix = f"give this machine a role or credentials that may {verb} there"
        fix += ", or write `storage: {s3: {anonymous: true}}` (or gs, az)" if verb == "read" else ""
    else:
        fix = "check the endpoint (AWS_ENDPOINT_URL and the like, or `storage`) and the network, and run again"
    return f"{uri}: {mismatch(f'to {verb} it', found, fix)}"


def unreadable(file: str, error: OSError) -> str:
    """What to say of a file, wherever it lies, that can't be read."""
    return object_problem(file, error) if is_remote(file) else os_problem(file, error)


# ---------------------------------------------------------------------------------------------------- failures


def _for_good(error: Exception, uri: str) -> Exception | None:
    """What to raise at once for what no further try would mend; None for what may pass."""
    from obstore import exceptions

    if isinstance(error, FileNotFoundError):
        return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), uri)
    if isinstance(error, exceptions.AlreadyExistsError):
        return Exists()
    if isinstance(error, exceptions.PreconditionError):
        return Changed()
    if not isinstance(error, exceptions.BaseError):
        return error
    text, told = str(error), reason(error)
    if _is_expired(error):
        return None
    if "NotImplemented" in text or "status code: 501" in text or isinstance(error, NotImplementedError):
        return OSError(errno.EOPNOTSUPP, "this store can't do that", uri)
    if "NoSuchBucket" in text or "ContainerNotFound" in text:
        return FileNotFoundError(errno.ENOENT, "no such bucket", uri)
    if isinstance(error, exceptions.PermissionDeniedError | exceptions.UnauthenticatedError):
        return PermissionError(errno.EACCES, f"access refused ({told})", uri)
    if told == _NO_CREDENTIALS:
        return PermissionError(errno.EACCES, told, uri)
    status = re.search(r"status code: (4\d\d)", text)
    if status is not None and status[1] in ("401", "403"):  # of a list it says no more
        return PermissionError(errno.EACCES, f"access refused ({told})", uri)
    if status is not None and status[1] not in ("408", "429") and re.search(_PASSING, text) is None:
        return OSError(errno.EIO, told, uri)
    hopeless = (exceptions.InvalidPathError, exceptions.NotSupportedError, exceptions.UnknownConfigurationKeyError)
    return OSError(errno.EINVAL, told, uri) if isinstance(error, hopeless) else None


def _is_expired(error: Exception) -> bool:
    return re.search(r"ExpiredToken|TokenExpired|RequestExpired|token has expired", str(error)) is not None


_PASSING = r"RequestTimeout|BadDigest|(?:SHA256|Checksum|Md5|Crc64)Mismatch"
"""Codes of answers to a request that did not arrive as it was sent, or not at all."""
_NO_CREDENTIALS = "no credentials"
_REASONS = (
    (r"<Code>(\w+)</Code>", "{}"),
    (r"status code: (\d{3})", "HTTP {}"),
    (r"kind: Timeout|TimedOut|timed out", "no answer in time"),
    (r"dns error|failed to lookup", "no such host"),
    (r"ConnectionRefused|Connection refused", "connection refused"),
    (r"UnexpectedEof|cut short|IncompleteBody", "an answer that was cut short"),
    (r"kind: (?:Interrupted|Connect|Request)|ConnectionReset|IncompleteMessage", "a connection that broke"),
    (r"Missing(?:AccessKeyId|SecretAccessKey|Credential)|metadata|[Cc]redential|[Tt]oken", _NO_CREDENTIALS),
    (r"certificate", "a certificate that is not trusted"),
)
"""From what obstore says to what may be shown, the first that matches."""


def reason(error: Exception) -> str:
    """What happened, in words that carry nothing of the request."""
    text = str(error)
    for pattern, words in _REASONS:
        if (found := re.search(pattern, text)) is not None:
            return words.format(*found.groups())
    return type(error).__name__
