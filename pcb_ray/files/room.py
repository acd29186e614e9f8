"""Where a machine keeps what it fetched, so that each byte of an input crosses the network once: memory that is free first (files
in /dev/shm), then a folder on a disk (`--scratch`).

All workers of a run on one machine share it. Each holds a lock on it while it lives, which ends with its process however that ends:
a room that nobody holds was left by a crash, and whoever comes next removes it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import math
import os
import re
import secrets
import shutil
import struct
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pcb_ray.checks import without_secrets
from pcb_ray.errors import RequestError
from pcb_ray.files.foreign import mismatch
from pcb_ray.files.store import as_path, is_remote

MEMORY = Path("/dev/shm")
SHARE_OF_MEMORY, SHARE_OF_DISK = 0.5, 0.9
"""Of what is free when the run begins, where no size is asked for."""
CLAIM_S, CLAIM_POLL_S = 30.0, 0.01
_CLAIMS = 251


@dataclass(frozen=True)
class Room:
    """What a run may take of each machine. It is made by the driver, and the same for all."""

    run: str
    """Tells this run from others on the same machine."""
    memory: int | None = None
    """Bytes; None: half of what is free."""
    scratch: str = ""
    """A folder on a disk of each machine; empty: none."""
    scratch_bytes: int | None = None
    """None: nine tenths of what is free there."""

    @classmethod
    def for_a_run(cls, memory: int | None, scratch: str, scratch_bytes: int | None) -> Room:
        """Raises RequestError for a scratch that is no folder of a machine."""
        if is_remote(folder := as_path(scratch)):
            fix = "name a path on a disk of each node, or leave it out"
            raise RequestError(f"--scratch {without_secrets(scratch)}: {mismatch('a folder', 'a URI', fix)}")
        return cls(secrets.token_hex(8), memory, folder, scratch_bytes)


class KeptHere:
    """The room of a run on this machine, opened. Any number of threads and processes may use it at once.

    Raises RequestError if the folder of scratch can't be used."""

    def __init__(self, room: Room) -> None:
        self._tiers = [tier for tier in (_in_memory(room), _on_disk(room)) if tier is not None]

    @property
    def bytes(self) -> int:
        """What may be kept in all; less once a disk has proved to be full."""
        return sum(tier.limit for tier in self._tiers)

    def has(self, key: str) -> bool:
        return any(os.path.exists(tier.path(key)) for tier in self._tiers)

    def read(self, key: str, start: int, out: memoryview) -> bool:
        """Fill `out` with what is kept under the key, from byte `start` on; False if it is not kept."""
        for tier in self._tiers:
            try:
                file = os.open(tier.path(key), os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                continue
            try:
                got = 0
                while got < len(out) and (count := os.preadv(file, [out[got:]], start + got)):
                    got += count
                return got == len(out)
            finally:
                os.close(file)
        return False

    def put(self, key: str, data: memoryview) -> bool:
        """Keep this under the key, if there is room for it."""
        return any(tier.put(key, data) for tier in self._tiers)

    @contextlib.contextmanager
    def workplace(self) -> Iterator[Path]:
        """A folder for small files of one process, which goes when the block ends: on the disk, if there is one."""
        root = self._tiers[-1].folder if self._tiers else None
        with tempfile.TemporaryDirectory(prefix="work-", dir=root, ignore_cleanup_errors=True) as folder:
            yield Path(folder)

    @contextlib.contextmanager
    def staged(self, size: int) -> Iterator[Path | None]:
        """The name of a file of this size that goes when the block ends: on the disk, if there is one. None if it fits nowhere."""
        fits = (tier.folder for tier in reversed(self._tiers) if shutil.disk_usage(tier.folder).free > size)
        if (folder := next(fits, None)) is None:
            yield None
            return
        path = folder / f"staged-{secrets.token_hex(8)}"
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)

    def whole(self, key: str, size: int, make: Callable[[Path], None]) -> str | None:
        """The path of what is kept under the key: a file or a folder of this size, made under the name that `make` is given by one
        process of this machine, while others wait. None if there is no room for it.

        Raises what `make` raises."""
        while True:
            if (there := next(filter(os.path.exists, (tier.path(key) for tier in self._tiers)), None)) is not None:
                return there
            with self.claim(key, patience_s=math.inf):
                if not self.has(key):
                    made = (tier.make(key, size, make) for tier in self._tiers)
                    return next((path for path in made if path is not None), None)

    @contextlib.contextmanager
    def claim(self, key: str, *, patience_s: float = CLAIM_S) -> Iterator[None]:
        """In here no other process fetches the same, as long as this one is not stuck."""
        if not self._tiers:
            yield
            return
        number = int(hashlib.sha256(key.encode()).hexdigest()[:8], 16) % _CLAIMS
        try:
            file = os.open(self._tiers[0].folder / f"claim-{number}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError:  # the disk is full: at worst the same is fetched twice
            yield
            return
        try:
            until = time.monotonic() + patience_s
            while not _locked(file, fcntl.LOCK_EX) and time.monotonic() < until:
                time.sleep(CLAIM_POLL_S)
            yield
        finally:
            os.close(file)

    def close(self, patience_s: float = 0.0) -> None:
        """Leave the room; the last one to leave removes it. With patience others are waited for, who are about to end."""
        until = time.monotonic() + patience_s
        for tier in self._tiers:
            tier.close()
            while tier.folder.exists() and time.monotonic() < until:
                time.sleep(CLAIM_POLL_S)
                _remove_if_free(tier.folder)
        self._tiers = []


class _Tier:
    """A folder of files by key, of so many bytes at most."""

    def __init__(self, root: Path, run: str, limit: int) -> None:
        """`limit` counts if this is the first process here."""
        home = root / f"pcb-ray-{os.getuid()}"
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        if home.is_symlink() or home.stat().st_uid != os.getuid():
            raise PermissionError(f"{home} belongs to another user")
        remove_abandoned(home)
        self.folder = home / run
        self._lock = _hold(self.folder)
        self._full = False
        self._booking = threading.Lock()
        try:
            self._book = _opened_book(self.folder / "book", limit)
            self.limit, _ = self._booked()
        except BaseException:
            self._leave()
            raise

    def path(self, key: str) -> str:
        return f"{self.folder}/{hashlib.sha256(key.encode()).hexdigest()[:40]}"

    def put(self, key: str, data: memoryview) -> bool:
        size, path = len(data), self.path(key)
        if self._full or not self._take(size):
            return False
        aside = f"{path}.{secrets.token_hex(4)}"
        try:
            with open(aside, "xb", buffering=0) as file:
                while data:
                    data = data[file.write(data) :]
            os.replace(aside, path)
            return True
        except OSError:  # others fill the disk too: what is not kept is fetched again
            self._full = True
            with contextlib.suppress(OSError):
                os.unlink(aside)
            self._take(-size)
            self.limit = min(self.limit, self._booked()[1])
            return False

    def make(self, key: str, size: int, make: Callable[[Path], None]) -> str | None:
        """The path of what `make` has made, which takes this name when it is whole; None if there is no room."""
        if self._full or not self._take(size):
            return None
        path = self.path(key)
        aside = Path(f"{path}.{secrets.token_hex(4)}")
        try:
            make(aside)
            os.replace(aside, path)
        except BaseException as error:
            _remove(aside)
            self._take(-size)
            if not (isinstance(error, OSError) and error.errno in _FULL):
                raise
            return None
        return path

    def _take(self, size: int) -> bool:
        with self._booking:  # a lock on a file excludes no thread that uses the same descriptor
            try:
                fcntl.flock(self._book, fcntl.LOCK_EX)
                limit, taken = self._booked()
                if taken + size > limit:
                    return False
                os.pwrite(self._book, _BOOK.pack(limit, taken + size), 0)
                return True
            except OSError:  # a disk that takes no entry takes no piece
                return False
            finally:
                fcntl.flock(self._book, fcntl.LOCK_UN)

    def _booked(self) -> tuple[int, int]:
        limit, taken = _BOOK.unpack(os.pread(self._book, _BOOK.size, 0))
        return limit, taken

    def close(self) -> None:
        os.close(self._book)
        self._leave()

    def _leave(self) -> None:
        os.close(self._lock)  # first: of several that leave at once, each would find the others still here
        _remove_if_free(self.folder)


_FULL = (errno.ENOSPC, errno.EDQUOT)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


_BOOK = struct.Struct("qq")
"""What may be kept in all, and what is taken of it."""


def _opened_book(path: Path, limit: int) -> int:
    """The file in which the processes here book what they keep; the first one has set the limit."""
    if not path.exists():
        aside = path.with_name(f"book-{secrets.token_hex(4)}")
        try:
            aside.write_bytes(_BOOK.pack(limit, 0))
            with contextlib.suppress(FileExistsError):
                os.link(aside, path)
        finally:
            aside.unlink(missing_ok=True)
    return os.open(path, os.O_RDWR | os.O_CLOEXEC)


def _tier(root: Path, run: str, limit: int) -> _Tier | None:
    """None where not even its first files find a place."""
    try:
        return _Tier(root, run, limit)
    except OSError as error:
        if error.errno not in _FULL:
            raise
        return None


def _in_memory(room: Room) -> _Tier | None:
    limit = int(SHARE_OF_MEMORY * free_memory()) if room.memory is None else room.memory
    if limit <= 0 or not os.access(MEMORY, os.W_OK):
        return None
    return _tier(MEMORY, room.run, min(limit, shutil.disk_usage(MEMORY).free))


def _on_disk(room: Room) -> _Tier | None:
    if not room.scratch:
        return None
    try:
        Path(room.scratch).mkdir(parents=True, exist_ok=True)
        free = int(SHARE_OF_DISK * shutil.disk_usage(room.scratch).free)
        return _tier(Path(room.scratch), room.run, free if room.scratch_bytes is None else min(free, room.scratch_bytes))
    except OSError as error:
        raise RequestError(
            f"--scratch {room.scratch}: wanted a folder on each machine that can be written, found: {error.strerror or error}. "
            "Fix: name another one, or leave it out."
        ) from None


# ---------------------------------------------------------------------------------------------------- whose it is


def _hold(folder: Path) -> int:
    """Make the folder and hold it, together with others; its lock."""
    while True:
        folder.mkdir(mode=0o700, exist_ok=True)
        try:
            lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:
            continue
        fcntl.flock(lock, fcntl.LOCK_SH)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock), os.stat(folder / "lock")):
                return lock
        os.close(lock)  # another has removed it meanwhile


def _locked(file: int, how: int) -> bool:
    try:
        fcntl.flock(file, how | fcntl.LOCK_NB)
        return True
    except OSError:
        return False


def _remove_if_free(folder: Path) -> None:
    """Remove the folder if nobody holds it."""
    with contextlib.suppress(OSError):
        lock = os.open(folder / "lock", os.O_RDWR | os.O_CLOEXEC)
        try:
            if _locked(lock, fcntl.LOCK_EX):
                shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(lock)


def remove_abandoned(home: Path) -> None:
    """Remove rooms whose processes have all ended."""
    for folder in home.iterdir():
        _remove_if_free(folder)


# ---------------------------------------------------------------------------------------------------- what is free


def free_memory() -> int:
    """Bytes that this machine, or the container that this is, can give without swapping; 0 where nobody tells."""
    found = [_available(), *(_left(*files) for files in _OF_CONTAINERS)]
    known = [size for size in found if size is not None]
    return max(0, min(known, default=0))


_OF_CONTAINERS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def _available() -> int | None:
    try:
        found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        return None
    return None if found is None else 1024 * int(found[1])


def _left(limit: str, used: str) -> int | None:
    try:
        return int(Path(limit).read_text()) - int(Path(used).read_text())
    except (OSError, ValueError):  # there is no container, or no limit (`max`)
        return None
