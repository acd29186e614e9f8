"""Models on the Hugging Face Hub are asked for through `huggingface_hub`: which files, ranges of their bytes, a download.

Whatever fails is told in our own words: a text of the library or of its transport could quote the token.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from pcb_ray.errors import RequestError
from pcb_ray.files.foreign import mismatch, show

_TIMEOUT_S = 10
HUB_SCHEME = "hf://"
"""It may stand before a Hub id, which then can't be taken for a path."""


def hub_id(source: str) -> str:
    """`org/name` of a source, which may have a scheme before it and a revision after it."""
    return source.removeprefix(HUB_SCHEME).partition("@")[0]


class Snapshot(NamedTuple):
    """A model that lies in the Hub's cache, whole or not, while there is a problem with the Hub itself."""

    folder: Path
    problem: str


@dataclass(frozen=True)
class HubModel:
    """A model is given by its commit. For the messages, `source` is what the user wrote, and at `path` there is no such folder."""

    source: str
    path: Path
    host: str
    repo: str
    commit: str
    sizes: Mapping[str, int]
    """Of its files, by name."""

    @property
    def where(self) -> str:
        return f"hub://{self.repo}@{self.commit}"

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


def find_model(source: str, path: Path, repo: str, revision: str | None) -> HubModel | Snapshot:
    """Find the model as the Hub has it now, or as the cache has it if the Hub can't be asked. Raises RequestError."""
    host = _host(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")  # With a wrong one the library fails to load.

    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        info = HfApi().model_info(repo, revision=revision, timeout=_TIMEOUT_S, files_metadata=True)
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
        return HubModel(source, path, host, repo, str(info.sha), sizes)
    except _failures() as error:
        problem = _problem(source, path, host, error)
        if isinstance(error, HfHubHTTPError) and error.response.status_code < 500:
            raise RequestError(problem) from None
    try:  # The pattern asks for no file that must be there: opening the folder tells what is missing.
        folder = snapshot_download(repo, revision=revision, local_files_only=True, allow_patterns="config.json")
    except _failures():
        raise RequestError(problem) from None
    return Snapshot(Path(folder), problem)


def _failures() -> tuple[type[Exception], ...]:
    """Transport errors are HTTPError; the library's own are HTTPError, OSError or ValueError; an answer that is not the
    Hub's fails as one of the rest."""
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    return (HTTPError, OSError, ValueError, TypeError, KeyError, AttributeError)


def _problem(source: str, path: Path, host: str, error: Exception, when: str = "") -> str:
    from huggingface_hub import errors

    status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else None
    if isinstance(error, errors.GatedRepoError):
        found, fix = f"it gated on {host}", "accept its terms there, and set HF_TOKEN to a token of that account"
    elif isinstance(error, errors.RevisionNotFoundError):
        found, fix = f"no such revision of it on {host}", "check what follows the @"
    elif isinstance(error, errors.RepositoryNotFoundError) or status == 404:
        found, fix = f"no folder {path}, and no such model on {host} (or a private one)", "check the name, or set HF_TOKEN"
    elif status in (401, 403):
        found, fix = f"that {host} refuses access (HTTP {status})", "check that HF_TOKEN is valid and may read this model"
    elif status is not None:
        found, fix = f"that {host} answers with HTTP {status}", "try again later"
    elif isinstance(error, errors.HFValidationError):
        found, fix = f"no folder {path}, and not a valid Hub id", "check the name"
    elif isinstance(error, errors.OfflineModeIsEnabled):
        found = "it not whole in the Hub's cache, and HF_HUB_OFFLINE set, which forbids to fetch it"
        fix = "unset HF_HUB_OFFLINE, or give a folder"
    elif isinstance(error, UnicodeError):
        found, fix = "that HF_TOKEN is not plain ASCII", "set it anew"
    elif isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError):
        found = f"that it cannot be stored in the Hub's cache ({os.strerror(error.errno)})"
        fix = "check HF_HOME and its disk"
    elif isinstance(error, (errors.HTTPError, OSError)):  # type: ignore[attr-defined]
        reason = f"{host} cannot be reached ({type(error).__name__})"
        found = f"no folder {path}, that {reason}, and it not whole in the Hub's cache"
        fix = "check the network and HF_ENDPOINT, or give a folder"
    else:
        found = f"that {host} does not answer as a Hub does ({type(error).__name__})"
        fix = "check HF_ENDPOINT and HF_TOKEN"
    return f"model {source}: {mismatch('a model', f'{found}{when}', fix)}"


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
