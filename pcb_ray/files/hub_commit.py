"""Files for a repository on the Hub: sent ahead one by one, where nobody sees them, and named by one commit.

`Branch` is where the commit goes. Whoever sends a file may be another process than the one that commits: what it must know of the
file is a text (`Sent`).
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar
from urllib.parse import quote, unquote

from pcb_ray.errors import RequestError, RunError
from pcb_ray.files import objects
from pcb_ray.files.foreign import mismatch
from pcb_ray.files.hub import in_our_words
from pcb_ray.files.objects import HUB_SCHEME, Changed, Retries, uri_problem, without_credentials

_T = TypeVar("_T")


class Sent(NamedTuple):
    """A file that lies at the Hub, and in no commit yet."""

    sha256: str
    size: int
    sample: bytes
    """Its first bytes, by which the Hub decides how it is kept."""

    def to_text(self) -> str:
        return f"{self.sha256}:{self.size}:{base64.urlsafe_b64encode(self.sample).decode()}"

    @classmethod
    def from_text(cls, text: str) -> Self:
        sha256, size, sample = text.split(":")
        return cls(sha256, int(size), base64.urlsafe_b64decode(sample))


@dataclass(frozen=True)
class Branch:
    """A branch of a model's repository."""

    repo: str
    name: str

    @classmethod
    def of(cls, uri: str) -> Branch:
        """The branch that `hf://org/name@branch` names; `main`, if it names none. Raises RequestError."""
        if (problem := uri_problem(uri)) is not None:
            raise RequestError(f"{without_credentials(uri)}: {problem}")
        repo, _, name = uri.removeprefix(HUB_SCHEME).rstrip("/").partition("@")
        if repo.count("/") != 1 or not all(repo.split("/")):
            raise RequestError(f"{uri}: {mismatch('hf://org/name', 'something else', 'name a model of the Hub')}")
        return cls(repo, unquote(name) or "main")

    @property
    def uri(self) -> str:
        """As files of it are named while they are sent: one part of a path, whatever the branch is called."""
        return f"{HUB_SCHEME}{self.repo}@{quote(self.name, safe='')}"

    def head(self) -> tuple[str, frozenset[str]]:
        """The commit at its end, and the names of its files. Raises OSError."""
        from huggingface_hub import HfApi

        def ask() -> tuple[str, frozenset[str]]:
            info = HfApi().model_info(self.repo, revision=self.name, timeout=objects.REQUEST_S)
            return str(info.sha), frozenset(file.rfilename for file in info.siblings or ())

        return self._patiently(ask, objects.LOOKING_PATIENCE_S)

    def send(self, name: str, file: Path) -> Sent:
        """Send a file ahead. Raises OSError."""
        from huggingface_hub import CommitOperationAdd, HfApi

        def ask() -> Sent:
            addition = CommitOperationAdd(name, file)
            addition._upload_mode, addition._should_ignore = "lfs", False  # tensors are never text
            HfApi().preupload_lfs_files(self.repo, [addition], revision=self.name, free_memory=False)
            info = addition.upload_info
            return Sent(info.sha256.hex(), info.size, info.sample)

        return self._patiently(ask)

    def has(self, sent: Sent) -> bool:
        """Whether the Hub still has a file that was sent ahead: what no commit names goes after a while. Raises OSError."""
        from huggingface_hub.lfs import UploadInfo, post_lfs_batch_info

        def ask() -> bool:
            info = UploadInfo(sha256=bytes.fromhex(sent.sha256), size=sent.size, sample=sent.sample)
            actions, errors, _ = post_lfs_batch_info([info], None, "model", self.repo, revision=self.name)
            return not errors and not any("upload" in one.get("actions", {}) for one in actions)

        return self._patiently(ask)

    def may_write(self) -> None:
        """Raises OSError if this machine's token may not write there."""
        self.has(Sent(hashlib.sha256(b"pcb_ray").hexdigest(), 1, b"p"))  # to ask where it would go takes the right to write

    def commit(self, parent: str, sent: Mapping[str, Sent], files: Mapping[str, Path], *, message: str, pull_request: bool) -> str:
        """One commit on this parent, of files that were sent ahead and of small ones; its address. Raises RunError, OSError."""
        from huggingface_hub import CommitOperationAdd, HfApi
        from huggingface_hub.errors import HfHubHTTPError

        def ask() -> str:
            operations = [_as_operation(name, one) for name, one in sent.items()]
            operations += [CommitOperationAdd(name, file) for name, file in files.items()]
            try:
                made = HfApi().create_commit(
                    self.repo,
                    operations,
                    commit_message=message,
                    revision=self.name,
                    parent_commit=parent,
                    create_pr=pull_request,
                )
            except HfHubHTTPError as error:
                raise Changed if error.response.status_code == 412 else error from None
            return str(made.pr_url or made.commit_url)

        try:
            return self._patiently(ask)
        except Changed:
            raise RunError(
                f"{self.uri}: wanted to commit on {parent[:12]}, which was the end of the branch when the run began, found that "
                "somebody has committed meanwhile. What was sent is kept. Fix: see what was committed, then --resume."
            ) from None

    def committed_ns(self) -> int:
        """When its last commit was made. Raises OSError."""
        from huggingface_hub import HfApi

        made = self._patiently(lambda: HfApi().list_repo_commits(self.repo, revision=self.name)[0].created_at)
        return int(made.timestamp() * 1000) * 10**6

    def _patiently(self, ask: Callable[[], _T], patience_s: float = objects.PATIENCE_S) -> _T:
        def attempt() -> _T:
            with in_our_words(self.uri), _without_bars():
                try:
                    return ask()
                except RuntimeError as error:  # of an upload it says no more than that it failed
                    raise (error.__cause__ or error) from None

        return Retries(patience_s).ask(self.uri, attempt)


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """The library's own bars would stand between ours."""
    from huggingface_hub import utils

    before = utils.are_progress_bars_disabled()  # type: ignore[attr-defined]
    utils.disable_progress_bars()  # type: ignore[attr-defined]
    try:
        yield
    finally:
        if not before:
            utils.enable_progress_bars()  # type: ignore[attr-defined]


def _as_operation(name: str, sent: Sent) -> Any:
    """A file that another process may have sent: the library knows only those that it has sent by itself."""
    from huggingface_hub import CommitOperationAdd
    from huggingface_hub.lfs import UploadInfo

    addition = CommitOperationAdd(name, b"")
    addition.upload_info = UploadInfo(sha256=bytes.fromhex(sent.sha256), size=sent.size, sample=sent.sample)
    addition._upload_mode, addition._should_ignore, addition._is_uploaded = "lfs", False, True
    return addition


def files_below(folder: Path) -> dict[str, Path]:
    """The files of a folder by their names in it."""
    return {os.path.relpath(path, folder): path for path in sorted(folder.rglob("*")) if path.is_file()}
