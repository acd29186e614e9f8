"""The state of an unfinished output.

Beside OUT lies `.OUT.pcb-ray/`: `state.json` (what was asked and found so far), `journal.jsonl` (what was written, with digests),
`out/` (the files to be), and `replaced/` while an old OUT is being replaced. It survives crashes and Ctrl-C for `--resume`, and
goes when OUT is committed.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pcb_ray.errors import InputError, RequestError, RunError
from pcb_ray.files.store import Stamp, write_atomically
from pcb_ray.output.lock import HOLDER, LOCK, FolderLock
from pcb_ray.output.publish import REPLACED, kind_of, publish, restore
from pcb_ray.planning import Plan
from pcb_ray.questions import Written

STATE, JOURNAL, STAGING = "state.json", "journal.jsonl", "out"


def asked_of(plan: Plan, arithmetic: str, stamps: Mapping[str, Stamp]) -> dict[str, Any]:
    """What decides the bytes of a merge."""
    modified = {file: stamp.modified_ns for file, stamp in stamps.items()}
    return {**plan.fingerprint(), "arithmetic": arithmetic, "modified": modified}


def state_folder(out: Path) -> Path:
    out = out.resolve()  # a link to a folder stays, and what it leads to is replaced
    return out.parent / f".{out.name}.pcb-ray"


def is_unfinished(out: Path) -> bool:
    """Whether a run to OUT was begun and can be resumed."""
    return (state_folder(out) / STATE).exists()


def is_left_over(out: Path) -> bool:
    """Whether the run that was begun gave OUT its name, and was killed before its state could go."""
    return is_unfinished(out) and not (state_folder(out) / STAGING).exists() and os.path.lexists(out)


class State:
    """The state of one merge (or search) on disk. `with State(...)` holds its lock: two to one OUT can't run at once.

    `asked` is what an unfinished one must share with the one that resumes it, as JSON values. `stamps` are those of the inputs; the
    state keeps them as they were when it was begun. `overwrite` lets `commit` replace an
    OUT that is there. Raises RequestError if another process holds the state, if OUT is there and may not be replaced, or if
    another run was begun."""

    def __init__(
        self,
        out: Path,
        asked: Mapping[str, Any],
        stamps: Mapping[str, Stamp],
        *,
        resume: bool = False,
        overwrite: bool = False,
    ) -> None:
        self.out = out.resolve()
        self.folder = state_folder(out)
        self.staging = self.folder / STAGING
        self.stamps = dict(stamps)
        self.found: dict[str, Any] = {}
        self.journal: dict[str, str] = {}
        self._asked = json.loads(json.dumps(asked))
        self._overwrite = overwrite
        self.resumed = False
        self._whole = False
        self._lock = FolderLock(self.folder, out)
        try:
            unfinished = (self.folder / STATE).exists()
            if unfinished:
                restore(self.out, self.folder / REPLACED)
            if os.path.lexists(self.out) and not overwrite:
                raise RequestError(
                    f"{out}: exists: wanted a free name, found {kind_of(self.out)}. Fix: move it away, or replace it with "
                    f"{'--resume --overwrite; the unfinished run goes on' if resume and unfinished else '--overwrite'}."
                )
            if resume and unfinished:
                self._load()
            else:
                self._clear(REPLACED)
                self.save()
            self.staging.mkdir(exist_ok=True)
        except BaseException:
            self.close()
            raise

    def _load(self) -> None:
        path = self.folder / STATE
        try:
            saved = json.loads(path.read_text())
            asked, self.found = saved["asked"], dict(saved["found"])
            self.stamps = {file: Stamp(*stamp) for file, stamp in saved["stamps"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise RequestError(
                f"{path}: can't be read as it was written: wanted the state of a run, found {error!r}. "
                "Fix: start afresh with --overwrite."
            ) from None
        self.resumed = True
        differences = list(_differences(asked, self._asked))
        if differences:
            raise RequestError(
                [f"--resume: this is not the merge that was begun: {d}" for d in differences]
                + ["Fix: ask for the same merge, or start afresh with --overwrite"]
            )
        with contextlib.suppress(FileNotFoundError):
            for line in (self.folder / JOURNAL).read_text().splitlines():
                with contextlib.suppress(ValueError):  # the last line may be cut off
                    self.journal.update(json.loads(line))

    def _clear(self, *spared: str) -> None:
        """Remove all of the state but the lock, and what is to be spared."""
        for path in self.folder.iterdir():
            if path.name in (LOCK, HOLDER, *spared):
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)

    def save(self) -> None:
        """Make `found` durable."""
        content = {"asked": self._asked, "stamps": self.stamps, "found": self.found}
        write_atomically(self.folder / STATE, json.dumps(content).encode())

    def wrote(self, entries: Mapping[str, str]) -> None:
        """Note pieces of the output that were written, with their digests."""
        self.journal.update(entries)
        with (self.folder / JOURNAL).open("a") as journal:
            journal.write(f"\n{json.dumps(entries)}\n")  # on a line of its own, also after one that was cut off

    def claimed(self, names: Mapping[int, str]) -> dict[int, Written]:
        """What the journal says of the pieces with these names. Whether the files hold it is yet to be seen."""
        claimed = {}
        for number, name in names.items():
            with contextlib.suppress(KeyError, ValueError):
                claimed[number] = Written.from_text(self.journal[name])
        return claimed

    def commit(self) -> None:
        """Make everything durable and give it its name. Raises RunError, keeping all work, if an OUT appeared that may not go."""
        self._whole = True
        publish(self.staging, self.out, overwrite=self._overwrite)
        # From here on there is nothing to resume, even if an old output takes long to remove.
        (self.folder / STATE).unlink(missing_ok=True)
        self._clear()
        self.close()

    def discard(self) -> None:
        """Forget this merge: there is nothing in it to go on with."""
        self._clear(REPLACED)
        self.close()

    def close(self) -> None:
        self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        unused = isinstance(error, RequestError | RunError) and not (self.found or self.journal or self._whole)
        if unused or isinstance(error, InputError):
            # A wrong request showed itself late, or no cluster came: there is nothing to resume, and the next try is a new merge.
            self.discard()
        self.close()


def _differences(old: Any, new: Any, where: str = "") -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted({*old, *new}):
            yield from _differences(old.get(key), new.get(key), f"{where}.{key}" if where else key)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for index, (a, b) in enumerate(zip(old, new, strict=True)):
            yield from _differences(a, b, f"{where}[{index}]")
    elif isinstance(old, str) and isinstance(new, str) and "\n" in old + new and old != new:
        changed = [(a, b) for a, b in zip(old.splitlines(), new.splitlines(), strict=False) if a != b] or [("", "")]
        yield f"{where} was {changed[0][0].strip()!r}, now {changed[0][1].strip()!r}"
    elif old != new:
        yield f"{where} was {str(old)[:80]!r}, now {str(new)[:80]!r}"
