"""An output below a prefix of an object store: written in place, since nothing there can be renamed, and whole when its receipt is
there, which is written last.

Beside `s3://bucket/a/OUT` lie the objects of `s3://bucket/a/.OUT.pcb-ray/`: the lease, and the notes of the run (`state.json`,
`journal.jsonl`). They survive crashes for `--resume` from any machine, and go when OUT is whole.
"""

from __future__ import annotations

import collections
import contextlib
import logging
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NoReturn

from pcb_ray.errors import RequestError, RunError
from pcb_ray.files.foreign import mismatch
from pcb_ray.files.objects import (
    LOOKING_PATIENCE_S,
    Fence,
    Objects,
    Storage,
    abandon_uploads,
    object_problem,
    uri_problem,
    without_credentials,
)
from pcb_ray.files.store import is_remote
from pcb_ray.output.folder import STATE
from pcb_ray.output.lease import Lease
from pcb_ray.planning import Plan
from pcb_ray.receipt import RECEIPT

log = logging.getLogger("pcb_ray")

LEASE = "lease.json"
AT_ONCE = 16


class Prefix:
    """A Place (see `state`) in an object store, whole when the object `mark` is there. Raises RequestError for what is no URI of
    one."""

    def __init__(self, out: str, storage: Storage | None, *, overwrite: bool = False, mark: str = RECEIPT) -> None:
        self.out = out.rstrip("/")
        if (problem := uri_problem(self.out)) is not None:
            raise RequestError(f"{without_credentials(self.out)}: {problem}")
        head, _, name = self.out.rpartition("/")
        if head.count("/") < 2 or not name:
            raise RequestError(
                f"{self.out}: {mismatch('a prefix in a bucket', 'the bucket itself', f'write to {self.out}/merged or the like')}"
            )
        self.notes = f"{head}/.{name}.pcb-ray"
        self._storage, self._overwrite, self._mark = storage, overwrite, mark
        self._looking, self._objects = Objects(storage, patience_s=LOOKING_PATIENCE_S), Objects(storage)
        self._texts: dict[str, bytes] = {}
        self._files: tuple[str, ...] = ()
        self._lease: Lease | None = None

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
        return self.out

    @property
    def fence(self) -> Fence | None:
        return None if self._lease is None else self._lease.fence

    @property
    def is_there(self) -> bool:
        try:
            return bool(self._looking.sizes(f"{self.out}/", all_of_them=False))
        except OSError as error:
            self._refuse(error)

    @property
    def is_unfinished(self) -> bool:
        return self._has(f"{self.notes}/{STATE}")

    @property
    def is_left_over(self) -> bool:
        return self._has(f"{self.out}/{self._mark}") and self.is_unfinished

    def _has(self, uri: str) -> bool:
        try:
            self._looking.head(uri)
        except FileNotFoundError:
            return False
        except OSError as error:
            self._refuse(error)
        return True

    def _refuse(self, error: OSError) -> NoReturn:
        raise RequestError(object_problem(self.out, error)) from None

    def check(self, plan: Plan, *, resume: bool, model: bool = True, beside: int = 0) -> None:  # noqa: ARG002 - it never is full
        """Raises RequestError with all that is in the way of the output."""
        problems = self._taken(resume=resume)
        for one in plan.inputs:
            source = one.source.rstrip("/")
            if is_remote(source) and f"{source}/".startswith(f"{self.out}/") | f"{self.out}/".startswith(f"{source}/"):
                problems.append(
                    f"{self.out}: wanted a prefix apart from the inputs, found it inside or around the input {source}. "
                    "Fix: choose another prefix."
                )
        if problems:
            raise RequestError(problems)

    def _taken(self, *, resume: bool) -> list[str]:
        """A problem for what lies there. Nothing is replaced in a store: it could not be done at once, and not be taken back."""
        problems = []
        if self._overwrite:
            problems.append(
                f"{self.out}: wanted a new prefix, since nothing can be replaced at once in an object store, found --overwrite. "
                "Fix: write to another prefix, and remove the old one when nobody reads it any more."
            )
        if not self.is_unfinished:
            if self.is_there:
                problems.append(
                    f"{self.out}: exists: wanted a prefix without objects, found some"
                    f"{', and there is nothing to resume' if resume else ''}. Fix: choose another prefix."
                )
        elif not resume:
            problems.append(
                f"{self.notes}: wanted none, found an unfinished run to {self.out}. Fix: go on with --resume, or choose another "
                "prefix."
            )
        return problems

    # --- the notes of a run -------------------------------------------------------------------------------------------------------

    def open(self, files: Sequence[str], *, resume: bool) -> bool:
        self._files = tuple(files)
        try:
            self._lease = Lease(f"{self.notes}/{LEASE}", self.out, self._storage)
            if problems := self._taken(resume=resume):  # what came since, of a run that has ended
                raise RequestError(problems)
            goes_on = self.read(STATE) is not None
            self._abandon(goes_on)
        except OSError as error:
            self.close()
            raise RequestError(object_problem(self.notes, error, "write")) from None
        except BaseException:
            self.close()
            raise
        return goes_on

    def _abandon(self, goes_on: bool) -> None:
        """Let go of uploads that a killed worker has begun: they cost, and nobody sees them."""
        counts = [abandon_uploads(f"{where}/", self._storage) for where in (self.out, self.notes)]
        found = None if None in counts else sum(filter(None, counts))
        if found:
            log.warning("%s: %d unfinished uploads of killed workers were aborted", self.out, found)
        elif found is None and goes_on:
            log.warning(
                "note: %s: the run that was cut off may have left unfinished uploads, which cost and can't be looked for here "
                "(that needs S3, boto3: pip install 'pcb-ray[s3]', and the right to list them); let a rule of the bucket abort "
                "them after some days",
                self.out,
            )

    def read(self, name: str) -> bytes | None:
        try:
            self._texts[name] = self._objects.look(f"{self.notes}/{name}")[0]
        except FileNotFoundError:
            return None
        return self._texts[name]

    def write(self, name: str, data: bytes) -> None:
        if self._lease is not None:
            self._lease.check()
        try:
            self._objects.put(f"{self.notes}/{name}", data)
        except OSError as error:
            raise RunError(
                f"{self.notes}/{name}: wanted to write it, found: {error.strerror}. Fix: mend that, then --resume."
            ) from None
        self._texts[name] = data

    def append(self, name: str, line: bytes) -> None:
        self.write(name, self._texts.get(name, b"") + line + b"\n")  # objects are written whole

    # --- what else lies there -----------------------------------------------------------------------------------------------------

    def take_along(self, folder: Path, *, but: str) -> None:
        """Let a folder of small files be part of the output, under its own name, `but` for files whose names end so."""
        paths = [path for path in folder.rglob("*") if path.is_file() and not path.name.endswith(but)]

        def put(path: Path) -> None:
            self._objects.put(f"{self.out}/{folder.name}/{path.relative_to(folder).as_posix()}", path.read_bytes())

        if self._lease is not None:
            self._lease.check()
        try:
            with ThreadPoolExecutor(AT_ONCE) as pool:
                collections.deque(pool.map(put, paths), maxlen=0)
        except OSError as error:
            raise RunError(
                f"{self.out}/{folder.name}: wanted to write it, found: {error.strerror}. Fix: mend that, then --resume."
            ) from None

    def start_over(self) -> None:
        """Remove what was written of the output so far."""
        self._delete(f"{self.out}/")

    def _delete(self, prefix: str, *, but: Collection[str] = ()) -> None:
        uris = [f"{prefix}{name}" for name in self._objects.sizes(prefix) if name not in but]
        with ThreadPoolExecutor(AT_ONCE) as pool:
            collections.deque(pool.map(self._objects.delete, uris), maxlen=0)

    # --- the end ------------------------------------------------------------------------------------------------------------------

    def holds(self, name: str, size: int, tag: str) -> bool:
        try:
            found = self._objects.head(f"{self.out}/{name}")
        except FileNotFoundError:
            return False
        return (found.size, found.tag) == (size, tag)

    def publish(self, tags: Mapping[str, str]) -> None:  # noqa: ARG002 - its files are where they belong
        """The receipt has said that OUT is whole: nothing stays beside it."""
        try:
            self._abandon(False)
        except OSError as error:
            log.warning("%s: is whole; %s", self.out, error.strerror)
        self._forget()

    def tidy(self) -> None:
        try:
            with contextlib.suppress(RequestError):  # another run has it
                self._lease = Lease(f"{self.notes}/{LEASE}", self.out, self._storage)
                self.publish({})
        except OSError as error:
            self._refuse(error)
        finally:
            self.close()

    def discard(self) -> None:
        """Remove what this run has written: all objects of these names, where there were none when it began."""
        for name in self._files if self.is_there else ():
            self._objects.delete(f"{self.out}/{name}")
        self._forget()

    def _forget(self) -> None:
        self._objects.delete(f"{self.notes}/{STATE}")  # first: what says that the run is unfinished
        self._delete(f"{self.notes}/", but=(LEASE,))  # which goes last, with `close`

    def close(self) -> None:
        if self._lease is not None:
            self._lease.release()
            self._lease = None
