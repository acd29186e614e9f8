"""The state of an unfinished output: what was asked and found so far (`state.json`), and what was written, with digests
(`journal.jsonl`). Where it is kept, and how the output comes to its name, is the place's affair."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Generic, Protocol, Self, TypeVar

from pcb_ray.errors import InputError, RequestError, RunError
from pcb_ray.files.objects import Fence
from pcb_ray.files.store import Stamp
from pcb_ray.output.folder import JOURNAL, STATE
from pcb_ray.planning import Plan
from pcb_ray.questions import Written


class Place(Protocol):
    """Where an output is made, and the notes of an unfinished run to it are kept. One run at a time has it."""

    @property
    def out(self) -> str:
        """The output's name, as the user gave it: a path or a URI."""
        ...

    @property
    def reads(self) -> str:
        """Where the files of an output that is there are read."""
        ...

    @property
    def files(self) -> str:
        """The folder, or the prefix of a store, where owners write the output's tensors."""
        ...

    @property
    def beside(self) -> str:
        """Where the files beside the tensors are written."""
        ...

    @property
    def notes(self) -> str:
        """The folder, or the prefix, of the notes."""
        ...

    @property
    def tried(self) -> str:
        """Where each machine must be able to write."""
        ...

    @property
    def fence(self) -> Fence | None:
        """What tells writers that the place is still this run's; a folder needs none."""
        ...

    @property
    def is_there(self) -> bool:
        """Whether anything has the output's name."""
        ...

    @property
    def is_unfinished(self) -> bool:
        """Whether a run was begun and can be resumed."""
        ...

    @property
    def is_left_over(self) -> bool:
        """Whether the run that was begun has finished the output, and was killed before its notes could go."""
        ...

    def check(self, plan: Plan, *, resume: bool) -> None:
        """Raises RequestError with all that is in the way of the output, before anything is computed."""
        ...

    def open(self, files: Sequence[str], *, resume: bool) -> bool:
        """Take the place, until `close`; whether an unfinished run is gone on with. `files` will be written to it.

        Raises RequestError if another process has it, or if something has the output's name that may not be replaced."""
        ...

    def read(self, name: str) -> bytes | None:
        """What a note holds, if there is one."""
        ...

    def write(self, name: str, data: bytes) -> None:
        """Let a note hold this, durably."""
        ...

    def append(self, name: str, line: bytes) -> None:
        """Add a line to a note."""
        ...

    def holds(self, name: str, size: int, tag: str) -> bool:
        """Whether a file that was written whole is still there, and what it was."""
        ...

    def publish(self, tags: Mapping[str, str]) -> None:
        """The output is whole: it gets its name, and the notes go. `tags` are those of files that were written whole. Raises
        RunError, with all work kept."""
        ...

    def tidy(self) -> None:
        """Remove the notes that are left over, unless another process does. Raises RequestError."""
        ...

    def discard(self) -> None:
        """Forget the run: there is nothing in it to go on with."""
        ...

    def close(self) -> None:
        """Let others have the place; a second time this does nothing."""
        ...


PlaceT = TypeVar("PlaceT", bound=Place, covariant=True)


def asked_of(plan: Plan, arithmetic: str, stamps: Mapping[str, Stamp]) -> dict[str, Any]:
    """What decides the bytes of a merge."""
    modified = {file: stamp.tag or stamp.modified_ns for file, stamp in stamps.items()}
    return {**plan.fingerprint(), "arithmetic": arithmetic, "modified": modified}


class State(Generic[PlaceT]):
    """The state of one merge (or search) to a place. `with State(...)` holds the place: two to one OUT can't run at once.

    `asked` is what an unfinished one must share with the one that resumes it, as JSON values. `stamps` are those of the inputs; the
    state keeps them as they were when it was begun. `files` are those that will be written. Raises RequestError if the place can't
    be had, or if another run was begun there."""

    def __init__(
        self,
        place: PlaceT,
        asked: Mapping[str, Any],
        stamps: Mapping[str, Stamp],
        files: Sequence[str] = (),
        *,
        resume: bool = False,
    ) -> None:
        self.place = place
        self.stamps = dict(stamps)
        self.found: dict[str, Any] = {}
        self.journal: dict[str, str] = {}
        self._asked = json.loads(json.dumps(asked))
        self._whole = False
        self.resumed = place.open(files, resume=resume)
        try:
            if self.resumed:
                self._load()
            else:
                self.save()
        except BaseException:
            self.close()
            raise

    def _load(self) -> None:
        try:
            saved = json.loads(self.place.read(STATE) or b"")
            asked, self.found = saved["asked"], dict(saved["found"])
            self.stamps = {file: Stamp(*stamp) for file, stamp in saved["stamps"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise RequestError(
                f"{self.place.notes}/{STATE}: can't be read as it was written: wanted the state of a run, found {error!r}. "
                f"Fix: start afresh{self._afresh}."
            ) from None
        differences = list(differences_of(asked, self._asked))
        if differences:
            raise RequestError(
                [f"--resume: this is not the merge that was begun: {d}" for d in differences]
                + [f"Fix: ask for the same merge, or start afresh{self._afresh}"]
            )
        for line in (self.place.read(JOURNAL) or b"").decode(errors="replace").splitlines():
            with contextlib.suppress(ValueError):  # the last line may be cut off
                self.journal.update(json.loads(line))

    @property
    def _afresh(self) -> str:
        return " with --overwrite" if self.place.fence is None else " at another prefix"

    def save(self) -> None:
        """Make `found` durable."""
        content = {"asked": self._asked, "stamps": self.stamps, "found": self.found}
        self.place.write(STATE, json.dumps(content).encode())

    def wrote(self, entries: Mapping[str, str]) -> None:
        """Note pieces of the output that were written, with their digests."""
        self.journal.update(entries)
        self.place.append(JOURNAL, json.dumps(entries).encode())

    def claimed(self, names: Mapping[int, str]) -> dict[int, Written]:
        """What the journal says of the pieces with these names. Whether the files hold it is yet to be seen."""
        claimed = {}
        for number, name in names.items():
            with contextlib.suppress(KeyError, ValueError):
                claimed[number] = Written.from_text(self.journal[name])
        return claimed

    def commit(self, tags: Mapping[str, str] | None = None) -> None:
        """The output is whole, and gets its name. `tags` are what the store calls its files. Raises RunError, keeping all work, if
        that can't be."""
        self._whole = True
        self.place.publish(tags or {})
        self.close()

    def discard(self) -> None:
        """Forget this merge: there is nothing in it to go on with."""
        self.place.discard()
        self.close()

    def close(self) -> None:
        self.place.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        unused = isinstance(error, RequestError | RunError) and not (self.found or self.journal or self._whole)
        if unused or isinstance(error, InputError):
            # A wrong request showed itself late, or no cluster came: there is nothing to resume, and the next try is a new merge.
            self.discard()
        self.close()


def differences_of(old: Any, new: Any, where: str = "") -> Iterator[str]:
    """Where two JSON values differ, for people."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted({*old, *new}):
            yield from differences_of(old.get(key), new.get(key), f"{where}.{key}" if where else key)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for index, (a, b) in enumerate(zip(old, new, strict=True)):
            yield from differences_of(a, b, f"{where}[{index}]")
    elif isinstance(old, str) and isinstance(new, str) and "\n" in old + new and old != new:
        changed = [(a, b) for a, b in zip(old.splitlines(), new.splitlines(), strict=False) if a != b] or [("", "")]
        yield f"{where} was {changed[0][0].strip()!r}, now {changed[0][1].strip()!r}"
    elif old != new:
        yield f"{where} was {str(old)[:80]!r}, now {str(new)[:80]!r}"
