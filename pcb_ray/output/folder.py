"""An output that is a folder: made beside its place, and renamed when it is whole.

Beside OUT lies `.OUT.pcb-ray/`: the notes of the run (`state.json`, `journal.jsonl`), `out/` (the files to be), and `replaced/`
while an old OUT is being replaced. It survives crashes and Ctrl-C for `--resume`, and goes when OUT is committed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from pcb_ray.errors import RequestError
from pcb_ray.files.store import is_remote, write_atomically
from pcb_ray.output.lock import HOLDER, LOCK, FolderLock
from pcb_ray.output.publish import REPLACED, kind_of, publish, restore
from pcb_ray.planning import Input, Plan

STATE, JOURNAL, STAGING = "state.json", "journal.jsonl", "out"
MAX_NAME_BYTES = 255
"""Of a file or folder, on all file systems of Linux."""


def state_folder(out: Path) -> Path:
    out = out.resolve()  # a link to a folder stays, and what it leads to is replaced
    return out.parent / f".{out.name}.pcb-ray"


class Folder:
    """A Place (see `state`) on a file system that all nodes see. `overwrite` lets `publish` replace what is there."""

    fence = None

    def __init__(self, out: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        self._given = Path(out)  # as messages call it
        self._out = self._given.resolve()
        self._overwrite = overwrite
        self.folder = state_folder(self._given)
        self.staging = self.folder / STAGING
        self._lock: FolderLock | None = None

    @property
    def out(self) -> str:
        return str(self._given)

    @property
    def notes(self) -> str:
        return str(self.folder)

    @property
    def tried(self) -> str:
        return self.notes

    @property
    def reads(self) -> str:
        return self.out

    @property
    def beside(self) -> str:
        return self.files

    @property
    def files(self) -> str:
        return str(self.staging)

    @property
    def is_there(self) -> bool:
        return os.path.lexists(self._given)

    @property
    def is_unfinished(self) -> bool:
        return (self.folder / STATE).exists()

    @property
    def is_left_over(self) -> bool:
        return self.is_unfinished and not self.staging.exists() and self.is_there

    # --- before anything is computed ----------------------------------------------------------------------------------------------

    def check(self, plan: Plan, *, resume: bool, model: bool = True, beside: int = 0) -> None:
        """Raises RequestError with all that is in the way of writing the merged `model` there, and so many bytes `beside` it until
        it is done."""
        out, problems = self._given, []
        if (size := len(os.fsencode(self.folder.name))) > MAX_NAME_BYTES:  # nothing can be asked about such a path
            raise RequestError(
                f"{out}: wanted a name so short that `.NAME.pcb-ray`, where the run keeps its state, has at most {MAX_NAME_BYTES} "
                f"bytes, found {size}. Fix: choose a shorter name."
            )
        if self.is_there and not self._overwrite:
            problems.append(self._exists(resume=resume))
        if self.is_there and self._overwrite and not out.is_dir():
            problems.append(
                f"{out}: wanted a directory to replace, found {kind_of(out)} that is not a directory. "
                "Fix: move it away, or choose another name."
            )
        if os.path.ismount(self._out):
            problems.append(
                f"{out}: wanted a name that a finished folder can be given, found a mount point, which stays where it is. "
                f"Fix: name a folder below it, such as {out / 'merged'}."
            )
        problems += self._overlaps(plan)
        parent = existing_parent(self._out)
        if not os.access(parent, os.W_OK):
            problems.append(
                f"{out}: wanted to write to {parent}, found that this run can't write there. Fix: choose a folder where you may "
                "write."
            )
        else:
            there = self.bytes_there if resume or self._overwrite else 0
            needed, free = plan.written_bytes * model + sum(one.size for one in plan.along) + beside, shutil.disk_usage(parent).free
            if free + there < needed:
                what = f" ({beside:,} of them for the basis, until it is done)" if beside else ""
                narrower = "a smaller density" if beside else "a narrower `dtype`"
                problems.append(
                    f"{out}: the run needs {needed:,} bytes{what}, found {free:,} free in {parent}. "
                    f"Fix: free some, write elsewhere, or ask for {narrower}."
                )
            if not resume and not self._overwrite and self.is_unfinished:
                problems.append(
                    f"{self.folder}: wanted none, found an unfinished run to {out}. "
                    "Fix: go on with --resume, or start afresh with --overwrite."
                )
        if problems:
            raise RequestError(problems)

    @property
    def bytes_there(self) -> int:
        """What an unfinished run takes of the disk."""
        return sum(f.lstat().st_blocks * 512 for f in self.folder.rglob("*"))

    def _exists(self, *, resume: bool) -> str:
        found = f"{self._given}: exists: wanted a free name, found {kind_of(self._given)}"
        replaceable = self._given.is_dir()
        if resume and self.is_unfinished:
            replace = ", or replace it with --resume --overwrite" if replaceable else ""
            return f"{found}. Fix: move it away{replace}; the unfinished run goes on."
        nothing = ", and there is nothing to resume" if resume else ""
        fix = "choose another name, or replace it with --overwrite" if replaceable else "move it away, or choose another name"
        return f"{found}{nothing}. Fix: {fix}."

    def _overlaps(self, plan: Plan) -> list[str]:
        """A problem for each input that OUT would lie inside or around."""
        problems, target = [], self._out
        for one in plan.inputs:
            for place in _claimed_by(one, plan.recipe.folder):
                if place == target or place in target.parents or target in place.parents:
                    problems.append(
                        f"{self._given}: wanted a folder apart from the inputs, found it inside or around the input {one.source} "
                        f"({place}). Fix: choose another folder."
                    )
                    break
        return problems

    # --- the notes of a run -------------------------------------------------------------------------------------------------------

    def open(self, files: Sequence[str], *, resume: bool) -> bool:  # noqa: ARG002 - they are made aside
        self._lock = FolderLock(self.folder, self._given)
        try:
            unfinished = self.is_unfinished
            if unfinished:
                restore(self._out, self.folder / REPLACED)
            if os.path.lexists(self._out) and not self._overwrite:
                raise RequestError(
                    f"{self._given}: exists: wanted a free name, found {kind_of(self._out)}. Fix: move it away, or replace it with "
                    f"{'--resume --overwrite; the unfinished run goes on' if resume and unfinished else '--overwrite'}."
                )
            goes_on = resume and unfinished
            if not goes_on:
                self._clear(REPLACED)
            self.staging.mkdir(exist_ok=True)
        except BaseException:
            self.close()
            raise
        return goes_on

    def read(self, name: str) -> bytes | None:
        try:
            return (self.folder / name).read_bytes()
        except FileNotFoundError:
            return None

    def write(self, name: str, data: bytes) -> None:
        write_atomically(self.folder / name, data)

    def append(self, name: str, line: bytes) -> None:
        with (self.folder / name).open("ab") as file:
            file.write(b"\n" + line + b"\n")  # on a line of its own, also after one that was cut off

    def _clear(self, *spared: str) -> None:
        """Remove all of the state but the lock, and what is to be spared."""
        for path in self.folder.iterdir():
            if path.name in (LOCK, HOLDER, *spared):
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)

    # --- what else lies there -----------------------------------------------------------------------------------------------------

    def take_along(self, folder: Path, *, but: str) -> None:
        """Let a folder of the notes be part of the output, under its own name, `but` for files whose names end so."""
        target = self.staging / folder.name
        shutil.rmtree(target, ignore_errors=True)  # of an earlier run that could not be committed
        for path in folder.rglob(f"*{but}"):
            path.unlink()
        folder.rename(target)

    def start_over(self) -> None:
        """Remove what was written of the output so far."""
        shutil.rmtree(self.staging)
        self.staging.mkdir()

    # --- the end ------------------------------------------------------------------------------------------------------------------

    def holds(self, name: str, size: int, tag: str) -> bool:  # noqa: ARG002 - it has no tags, and is written in parts
        return False

    def publish(self, tags: Mapping[str, str]) -> None:  # noqa: ARG002
        """Make everything durable and give it its name. Raises RunError, keeping all work, if an OUT appeared that may not go."""
        publish(self.staging, self._out, overwrite=self._overwrite)
        # From here on there is nothing to resume, even if an old output takes long to remove.
        (self.folder / STATE).unlink(missing_ok=True)
        self._clear()

    def tidy(self) -> None:
        with contextlib.suppress(RequestError):  # another process has it
            self._lock = FolderLock(self.folder, self._given)
            self._clear()
            self.close()

    def discard(self) -> None:
        self._clear(REPLACED)

    def close(self) -> None:
        if self._lock is not None:
            self._lock.release()


def _claimed_by(one: Input, relative_to: Path) -> list[Path]:
    """The folder of an input, whose files may lie anywhere below it, and the files, which may be links; a model that is one file
    has no folder."""
    if is_remote(one.source):
        return []
    files = [Path(file.path) for file in one.files]
    if one.commit is None:
        folders = [relative_to / Path(one.source).expanduser()]
    else:  # the snapshot of a model of the Hub is named after its commit
        folders = [folder for folder in files[0].parents if folder.name == one.commit]
    return [path.resolve() for path in (*folders, *files)]


def existing_parent(path: Path) -> Path:
    """The nearest folder above `path` that exists."""
    for parent in path.parents:
        if parent.is_dir():
            return parent
    return Path("/")
