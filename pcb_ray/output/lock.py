"""The lock on the state of one output: one process at a time, also on a file system that knows no flock.

Where flock works, the kernel holds the lock and frees it when the process ends. Elsewhere the holder's name stands in a file that
only one process can have made. The name of a dead process stays behind: whoever sees that it is dead takes the lock over.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import errno
import fcntl
import json
import os
import socket
from pathlib import Path

from pcb_ray.errors import RequestError
from pcb_ray.files.store import write_atomically

LOCK, HOLDER = "lock", "holder"
_NO_FLOCK = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)
_TRIES = 100


@dataclasses.dataclass(frozen=True)
class Holder:
    """A process, told apart from all others that ever were: pids are used again, and mean nothing on another machine or in another
    container."""

    host: str
    pid: int
    started: int
    """In clock ticks since the machine was started."""
    system: str
    """This start of the machine, and the namespace that the pid belongs to; empty where there is no /proc to tell them."""
    since: str

    @classmethod
    def this_process(cls) -> Holder:
        try:
            system = f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
        except OSError:
            system = ""
        since = datetime.datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
        return cls(socket.gethostname(), os.getpid(), _start_of(os.getpid()) or 0, system, since)

    @classmethod
    def of(cls, text: str) -> Holder | None:
        """The holder that a file names; None if it names none, as it does for a moment while it is made."""
        try:
            holder = cls(**json.loads(text))
        except (ValueError, TypeError):
            return None
        return holder if isinstance(holder.pid, int) and isinstance(holder.started, int) else None

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    def is_dead(self) -> bool:
        """Whether it has surely ended: only a process of this machine and container can be looked for."""
        return bool(self.system) and self.system == Holder.this_process().system and _start_of(self.pid) != self.started

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.since}"


def _start_of(pid: int) -> int | None:
    """When a process was started; None if there is none that could still write."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else int(fields[18])


class FolderLock:
    """Makes a folder and holds it until `release`. Raises RequestError if another process holds it; `out` is for the message."""

    def __init__(self, folder: Path, out: Path) -> None:
        self.folder, self.out = folder, out
        self._me = Holder.this_process()
        self._file = -1  # the locked file; none on a file system without flock
        self._held = False
        for _ in range(_TRIES):
            if self._try():
                self._held = True
                return
        raise RequestError(
            f"{out}: wanted to lock {folder}, found it replaced {_TRIES} times meanwhile. "
            "Fix: see what makes and removes it, or choose another name."
        )

    def _try(self) -> bool:
        """Lock it; False if the folder or the file in it was replaced meanwhile."""
        path = self.folder / LOCK
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not _is_at(file, path):  # another process removed it before it was locked: the lock would exclude nobody
                os.close(file)
                return False
        except OSError as error:
            text = os.pread(file, 4096, 0).decode(errors="replace")
            os.close(file)
            if error.errno in _NO_FLOCK:
                return self._try_without_flock(self.folder / HOLDER)
            if isinstance(error, BlockingIOError):
                raise self._refusal(Holder.of(text), "wait for it, or choose another name") from None
            raise RequestError(
                f"{self.out}: wanted to lock {path}, found: {error.strerror}. Fix: write to a folder on another file system."
            ) from None
        os.ftruncate(file, 0)
        os.pwrite(file, self._me.to_json().encode(), 0)  # for the message of one that finds it locked
        self._file = file
        return True

    def _try_without_flock(self, path: Path) -> bool:
        try:
            with path.open("x") as file:
                file.write(self._me.to_json())
            return True
        except FileExistsError:
            return self._take_over(path)
        except FileNotFoundError:
            return False

    def _take_over(self, path: Path) -> bool:
        try:
            text = path.read_text(errors="replace")
        except FileNotFoundError:
            return False
        wait = "wait for it, or choose another name"
        holder = Holder.of(text)
        if holder is None or not holder.is_dead():
            raise self._refusal(holder, f"{wait}; if it is known to be dead, remove {path}")
        # Of several that see the same dead holder, only the one that makes this file may put its name there. The file goes when the
        # dead one's name is gone for good, so that one that comes late finds another name.
        claim = path.with_name(f"{HOLDER}-{holder.pid}-{holder.started}")
        try:
            claim.open("x").close()
        except FileExistsError:
            raise self._refusal(
                holder, f"{wait}; that one is dead, and if no process is taking its place now, remove {path} and {claim}"
            ) from None
        except FileNotFoundError:
            return False
        try:
            with contextlib.suppress(FileNotFoundError):
                if path.read_text(errors="replace") == text:
                    write_atomically(path, self._me.to_json().encode())
                    return True
            return False
        finally:
            claim.unlink(missing_ok=True)

    def _refusal(self, holder: Holder | None, fix: str) -> RequestError:
        by = f"by {holder}" if holder else "by a process that left no name"
        return RequestError(
            f"{self.out}: another merge is writing it now: wanted {self.folder} for this one, found it locked {by}. Fix: {fix}."
        )

    def release(self) -> None:
        """Let others have the folder, which goes if it holds nothing; a second time this does nothing."""
        if not self._held:
            return
        self._held = False
        # The files of the lock go last, and the folder by rmdir, which leaves one that the next process already uses.
        lock, name = self.folder / LOCK, self.folder / HOLDER
        with contextlib.suppress(OSError):
            if self._file >= 0 and _is_at(self._file, lock):
                lock.unlink()
            elif self._file < 0 and name.read_text(errors="replace") == self._me.to_json():
                lock.unlink(missing_ok=True)
                name.unlink()
        if self._file >= 0:
            os.close(self._file)
        with contextlib.suppress(OSError):
            self.folder.rmdir()


def _is_at(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False
