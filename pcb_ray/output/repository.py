"""An output that is a repository on the Hub: files are sent ahead, each as soon as it is merged, and one commit names them all.

Until then nobody sees any of it. The commit is made on the one that was the end of the branch when the run began, so that of two
runs the second is refused. The notes of the run lie elsewhere: in a folder, or below a prefix of an object store.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from pcb_ray.errors import RequestError, RunError
from pcb_ray.files.foreign import some
from pcb_ray.files.hub_commit import Branch, Sent, files_below
from pcb_ray.files.objects import Fence, object_problem
from pcb_ray.output.state import Place
from pcb_ray.planning import Plan
from pcb_ray.receipt import RECEIPT

log = logging.getLogger("pcb_ray")

OF_THE_HUB = frozenset({".gitattributes", "LICENSE"})
"""What may lie in a repository that holds no model yet."""


class Repository:
    """A Place (see `state`) on the Hub; its notes are those of `notes`, which is no output."""

    def __init__(self, branch: Branch, notes: Place, *, pull_request: bool = False, overwrite: bool = False) -> None:
        self._branch, self._notes = branch, notes
        self._pull_request, self._overwrite = pull_request, overwrite
        self._parent, self._beside = "", ""

    @property
    def out(self) -> str:
        return self._branch.uri

    @property
    def reads(self) -> str:
        return f"{self.out.partition('@')[0]}@{self._head()[0]}"

    @property
    def files(self) -> str:
        return self._branch.uri

    @property
    def beside(self) -> str:
        return self._beside

    @property
    def notes(self) -> str:
        return self._notes.notes

    @property
    def tried(self) -> str:
        return self._branch.uri

    @property
    def fence(self) -> Fence | None:
        return self._notes.fence

    @property
    def is_there(self) -> bool:
        return bool(self._head()[1] - OF_THE_HUB)

    @property
    def is_unfinished(self) -> bool:
        return self._notes.is_unfinished

    @property
    def is_left_over(self) -> bool:
        return self.is_unfinished and RECEIPT in self._head()[1]

    def _head(self) -> tuple[str, frozenset[str]]:
        try:
            return self._branch.head()
        except FileNotFoundError:
            raise RequestError(
                f"{self.out}: wanted a repository with this branch, to which this token may write, found none. Fix: make it "
                f"(`hf repo create {self._branch.repo}`, with --private if nobody is to see it; `hf repo branch create`), or set "
                "HF_TOKEN."
            ) from None
        except OSError as error:
            raise RequestError(object_problem(self.out, error, "write")) from None

    def check(self, plan: Plan, *, resume: bool) -> None:  # noqa: ARG002 - it can't overlap with anything
        """Raises RequestError with all that is in the way of the output."""
        problems = self._taken()
        if self.is_unfinished and not resume:
            problems.append(
                f"{self.notes}: wanted none, found an unfinished run to {self.out}. Fix: go on with --resume, or name another "
                "place for its state by --state."
            )
        if problems:
            raise RequestError(problems)

    def _taken(self) -> list[str]:
        problems = []
        if self._overwrite:
            problems.append(
                f"{self.out}: wanted a branch without a model, found --overwrite, which nothing on the Hub is replaced by. Fix: "
                "write to another repository or branch."
            )
        if found := self._head()[1] - OF_THE_HUB:
            problems.append(
                f"{self.out}: exists: wanted a repository or branch without a model, found {some(sorted(found))}. Fix: name "
                "another one, or a branch (hf://org/name@branch) that holds nothing yet."
            )
        return problems

    # --- the notes of a run -------------------------------------------------------------------------------------------------------

    def open(self, files: Sequence[str], *, resume: bool) -> bool:  # noqa: ARG002 - nobody sees them
        if problems := self._taken():
            raise RequestError(problems)
        self._parent, self._beside = self._head()[0], tempfile.mkdtemp(prefix="pcb-ray-")
        try:
            return self._notes.open((), resume=resume)
        except BaseException:
            self.close()
            raise

    def read(self, name: str) -> bytes | None:
        return self._notes.read(name)

    def write(self, name: str, data: bytes) -> None:
        self._notes.write(name, data)

    def append(self, name: str, line: bytes) -> None:
        self._notes.append(name, line)

    def holds(self, name: str, size: int, tag: str) -> bool:  # noqa: ARG002 - the Hub knows it by its digest
        sent = Sent.from_text(tag)
        return sent.size == size and self._branch.has(sent)

    # --- the end ------------------------------------------------------------------------------------------------------------------

    def publish(self, tags: Mapping[str, str]) -> None:
        sent = {name: Sent.from_text(tag) for name, tag in tags.items()}
        try:
            where = self._branch.commit(
                self._parent,
                sent,
                files_below(Path(self.beside)),
                message="Merge by pcb_ray",
                pull_request=self._pull_request,
            )
        except OSError as error:
            raise RunError(
                f"{self.out}: wanted to commit what was sent, found: {error.strerror}. It is kept. Fix: mend that, then --resume."
            ) from None
        log.warning("%s: %s", self.out, where)
        self._notes.discard()

    def tidy(self) -> None:
        self._notes.tidy()

    def discard(self) -> None:
        self._notes.discard()

    def close(self) -> None:
        self._notes.close()
        if self._beside:
            shutil.rmtree(self._beside, ignore_errors=True)
