"""The bytes of models are read and written in this one way: local files and arrays in memory here, object stores in `remote`.

The interface asks for no more than an object store can give. An object is written front to back by one writer, as the parts of one
upload; it can't be renamed, and no single byte of it can be changed. So nothing here writes at a place of the caller's choice: a
file is made at its full size, it is divided into parts, and each part is written from its first to its last byte by one writer at a
time. How a finished output gets its name is not decided here: a folder is renamed, while in an object store the object that is
written last says that the others are whole.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import resource
import secrets
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol
from urllib.parse import unquote

import numpy as np
from numpy.typing import NDArray

from pcb_ray.errors import InputError, RunError

MAX_OPEN = 128
_HASHED_AT_ONCE = 1 << 20


class Stamp(NamedTuple):
    """It tells whether a file is still the one that was seen."""

    size: int
    modified_ns: int
    """When its content was last written, as far as nobody has set this time."""
    changed_ns: int
    """When anything of it was last changed, its mode and its names too: nobody can set this time."""
    tag: str = ""
    """What an object store calls this content (ETag)."""

    @property
    def content(self) -> tuple[int, int, str]:
        """What is another where the content is another."""
        return self.size, 0 if self.tag else self.modified_ns, self.tag


class Range(NamedTuple):
    """Bytes start..stop-1 of a file."""

    file: str
    start: int
    stop: int


class Traffic(NamedTuple):
    """What came over a network so far: bytes, and requests that were made again; and what this machine keeps of it at most."""

    fetched: int = 0
    retries: int = 0
    room: int = 0


class PartWriter(Protocol):
    """Takes the bytes of one part of a file, from the first to the last."""

    def write(self, data: bytes | memoryview | NDArray[Any]) -> None:
        """Append the bytes of `data`, which lie in one piece."""
        ...


class Store(Protocol):
    """Reads and writes files by name. Any number of threads may use one store at once.

    What the system refuses raises OSError, with the file's name. A file that is no longer what it was raises InputError where it is
    read, RunError where it is written. To give a part too few or too many bytes is a mistake of the caller, and raises ValueError.
    """

    def stamp(self, file: str) -> Stamp:
        """Return the size and times of a file."""
        ...

    def read(self, file: str, start: int, out: memoryview) -> None:
        """Fill the whole of `out`, which is made of bytes, with those of `file` from `start` on."""
        ...

    def view(self, file: str, start: int, stop: int) -> NDArray[np.uint8] | None:
        """Show bytes `start` to `stop`, read-only and without a copy, if they lie in memory; if None, they are to be read."""
        ...

    def sha256(self, file: str) -> str:
        """Return the digest of a whole file."""
        ...

    def expect(self, ranges: Iterable[Range], *, exact: bool = False) -> None:
        """These will be read next, by whichever thread; what an earlier call has announced and this one does not is given up.

        A store that is far away fetches them meanwhile: large stretches that hold them, or (`exact`) just them, for samples."""
        ...

    @property
    def traffic(self) -> Traffic:
        """What reading took of the network."""
        ...

    def create(self, file: str, size: int) -> None:
        """Make a file of this size, and its folder, to write its parts. One that is there is brought to the size and keeps what it
        holds."""
        ...

    def part(self, file: str, start: int, stop: int) -> AbstractContextManager[PartWriter]:
        """Write bytes `start` to `stop` of a file that was created; leaving the block checks that all were given.

        A part belongs to one writer at a time. Parts of one file may be written in any order, at once, and anew after a failure. An
        object has one part, the whole of it, and is durable when the block is left.
        """
        ...

    def whole(self, file: str, at_most: int) -> AbstractContextManager[PartWriter]:
        """Write a file front to back whose size, at most this, is not known before. It is there, durably, when the block ends, and
        until then there is what was there before.

        Raises CutOff where an upload was lost on its way and may be begun anew."""
        ...

    def sync(self) -> None:
        """Make durable all that was created, and all parts that were finished, before this call by whichever thread.

        After a failure no later sync of this store succeeds either, since nobody can tell what was lost.
        """
        ...

    def close(self) -> None:
        """Let go of what is open. What was not made durable by `sync` may be lost in a power cut."""
        ...


Pins = Mapping[str, Stamp]
"""What files must be while they are read, by name: as they were found. Times of change don't count."""


def is_remote(file: str) -> bool:
    """Whether a file is named by a URI, so that it lies in a store of its own."""
    return "://" in file


def as_path(name: str) -> str:
    """The path that a `file://` URI names; any other name as it is."""
    start = next((start for start in ("file:///", "file://localhost/") if name.startswith(start)), "")
    return unquote(name[len(start) - 1 :]) if start else name


# ---------------------------------------------------------------------------------------------------- local files


@dataclass
class _Opened:
    descriptor: int
    users: int = 0


class LocalStore:
    """Files by their paths on this machine.

    A model may have any number of files, and all threads of a process may read each of them. So the store keeps open at most
    `max_open` files that it reads, at most as many that it has written, and the parts that are being written. It keeps to a quarter
    of the process's own limit, too. A file that is replaced is read on as it was while it is open: its stamp tells.
    """

    def __init__(self, max_open: int = MAX_OPEN, *, pins: Pins | None = None) -> None:
        self._pins = pins or {}
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self.max_open = max_open if limit == resource.RLIM_INFINITY else max(1, min(max_open, limit // 4))
        self._released = threading.Condition()  # It guards all that follows, but `_syncing`.
        self._waiting = 0
        self._readers: OrderedDict[str, _Opened] = OrderedDict()  # The one whose use is longest past comes first.
        self._written: dict[tuple[int, int], tuple[str, int]] = {}  # They are not yet durable, by inode.
        self._folders: set[str] = set()  # Their entries are not yet durable.
        self._failure: OSError | None = None
        self._syncing = threading.Lock()

    def stamp(self, file: str) -> Stamp:
        return _stamp_of(os.stat(file))

    def read(self, file: str, start: int, out: memoryview) -> None:
        reader, got = self._hold(file), 0
        pin = self._pins.get(file)
        try:
            if pin is not None and (now := _stamp_of(os.fstat(reader.descriptor))).content != pin.content:
                raise changed(file, pin, now)
            while got < len(out):
                count = os.preadv(reader.descriptor, [out[got:]], start + got)
                if count == 0:
                    raise _cut_short(file, start + len(out), start + got)
                got += count
        except OSError as error:
            raise _named(error, file) from None
        finally:
            self._let_go(reader)

    def view(self, file: str, start: int, stop: int) -> NDArray[np.uint8] | None:  # noqa: ARG002
        return None  # A mapped file that is cut short ends the process that looks at it.

    def sha256(self, file: str) -> str:
        digest, at = hashlib.sha256(), 0
        reader = self._hold(file)
        try:
            while data := os.pread(reader.descriptor, _HASHED_AT_ONCE, at):
                digest.update(data)
                at += len(data)
        except OSError as error:
            raise _named(error, file) from None
        finally:
            self._let_go(reader)
        return digest.hexdigest()

    def expect(self, ranges: Iterable[Range], *, exact: bool = False) -> None:
        pass  # The system reads ahead by itself.

    @property
    def traffic(self) -> Traffic:
        return Traffic()

    def create(self, file: str, size: int) -> None:
        os.makedirs(os.path.dirname(os.path.abspath(file)), exist_ok=True)
        with self._writing(file, os.O_CREAT) as descriptor:
            try:
                os.ftruncate(descriptor, size)
            except OSError as error:
                raise _named(error, file) from None
        with self._released:
            self._folders.add(os.path.dirname(os.path.abspath(file)))

    @contextmanager
    def part(self, file: str, start: int, stop: int) -> Iterator[PartWriter]:
        with self._writing(file) as descriptor:
            size = os.fstat(descriptor).st_size
            if not 0 <= start <= stop <= size:
                raise RunError(
                    f"{file}: wanted bytes {start} to {stop}, found a file of {size} bytes: it was changed during the run. "
                    "Fix: let nothing else write there, and start afresh with --overwrite."
                )
            writer = _LocalPart(file, descriptor, start, stop)
            yield writer
            writer.check()

    @contextmanager
    def whole(self, file: str, at_most: int) -> Iterator[PartWriter]:  # noqa: ARG002
        with written_aside(Path(file)) as target:
            yield _Aside(file, target)

    def sync(self) -> None:
        # Linux reports a failed write-back to the descriptors that were open when it failed, to each once. A descriptor that is
        # opened later hears of it only while the inode stays in memory, and closing a file reports nothing on a local disk. So a
        # descriptor through which a file was written stays open until it is synced; to sync the path later would not be enough.
        # After a failure the pages count as clean, and the next fsync would succeed without them: hence no later sync succeeds.
        with self._syncing:  # Who comes second waits, since what the first one syncs may be the second's, too.
            with self._released:
                written, self._written = self._written, {}
                folders, self._folders = self._folders, set()
            failure = self._failure
            self._failure = failure or OSError(errno.EINTR, "the sync was interrupted")  # It stands if Ctrl-C ends this block.
            for file, descriptor in written.values():
                try:
                    os.fsync(descriptor)
                except OSError as error:
                    failure = failure or _named(error, file)
                finally:
                    os.close(descriptor)
            for folder in sorted(folders):
                try:
                    fsync_folder(Path(folder))
                except OSError as error:
                    failure = failure or _named(error, folder)
            self._failure = failure
        if failure is not None:
            raise _named(failure, failure.filename)

    def close(self) -> None:
        with self._released:
            opened = [
                *(reader.descriptor for reader in self._readers.values()),
                *(written for _, written in self._written.values()),
            ]
            self._readers, self._written = OrderedDict(), {}
        for descriptor in opened:
            os.close(descriptor)

    def __del__(self) -> None:
        if hasattr(self, "_syncing"):  # The constructor came to its end.
            self.close()

    def _hold(self, file: str) -> _Opened:
        """Give a descriptor to read `file`, which stays open until it is let go.

        A thread holds one at most, and none while it waits for one, so whoever waits gets one in the end.
        """
        with self._released:
            while (reader := self._readers.get(file)) is None:
                if len(self._readers) < self.max_open and (opened := _open(file, os.O_RDONLY)) is not None:
                    self._readers[file] = _Opened(opened)
                else:
                    self._make_room(file)
            reader.users += 1
            self._readers.move_to_end(file)
        return reader

    def _let_go(self, reader: _Opened) -> None:
        with self._released:
            reader.users -= 1
            if self._waiting:
                self._released.notify_all()  # One alone might fail to open what it wants, and tell nobody.

    @contextmanager
    def _writing(self, file: str, flags: int = 0) -> Iterator[int]:
        """Give a descriptor to write `file`. If the block is left as it should be, the file is noted for the next sync."""
        with self._released:
            # It can't read: a network file system would fetch whole pages to complete those that are written in part, and then
            # write them back over what another machine has written beside.
            while (descriptor := _open(file, os.O_WRONLY | flags)) is None:
                self._make_room(file)
        try:
            yield descriptor
        except BaseException:
            os.close(descriptor)
            raise
        found = os.fstat(descriptor)
        with self._released:
            _, kept = self._written.setdefault((found.st_dev, found.st_ino), (file, descriptor))
            full = len(self._written) >= self.max_open
        if kept != descriptor:
            os.close(descriptor)  # The other one was open all the time, and hears of a failure as well.
        if full:
            with contextlib.suppress(OSError):  # Who asks for the next sync is told.
                self.sync()

    def _make_room(self, file: str) -> None:
        """Close the reader whose use is longest past, or else wait until one is no longer used."""
        idle = next((name for name, reader in self._readers.items() if reader.users == 0), None)
        if idle is not None:
            os.close(self._readers.pop(idle).descriptor)
        elif self._readers:
            self._waiting += 1
            try:
                self._released.wait()
            finally:
                self._waiting -= 1
        else:
            limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
            raise RunError(f"{file}: wanted one more open file, found all {limit} taken. Fix: raise the limit (ulimit -n).")


def _open(file: str, flags: int) -> int | None:
    """Return a descriptor, or None if this process has no more, since the rest of it has used up the limit."""
    try:
        return os.open(file, flags | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno != errno.EMFILE:
            raise
        return None


class _LocalPart:
    def __init__(self, file: str, descriptor: int, start: int, stop: int) -> None:
        self._file, self._descriptor = file, descriptor
        self._start, self._at, self._stop = start, start, stop

    def write(self, data: bytes | memoryview | NDArray[Any]) -> None:
        left = as_bytes(data)
        if self._at + len(left) > self._stop:
            raise wrong_count(self._file, self._start, self._stop, self._at + len(left))
        while left:
            try:
                count = os.pwrite(self._descriptor, left, self._at)
            except OSError as error:
                raise _named(error, self._file) from None
            self._at, left = self._at + count, left[count:]

    def check(self) -> None:
        if self._at != self._stop:
            raise wrong_count(self._file, self._start, self._stop, self._at)


class _Aside:
    def __init__(self, file: str, target: BinaryIO) -> None:
        self._file, self._target = file, target

    def write(self, data: bytes | memoryview | NDArray[Any]) -> None:
        try:
            self._target.write(as_bytes(data))
        except OSError as error:
            raise _named(error, self._file) from None


# ---------------------------------------------------------------------------------------------------- arrays in memory


class MemoryStore:
    """Files that are arrays of bytes in `arrays`, by name; nothing is durable."""

    def __init__(self, arrays: dict[str, NDArray[np.uint8]]) -> None:
        self.arrays = arrays

    def stamp(self, file: str) -> Stamp:
        return Stamp(self._array(file).nbytes, 0, 0)

    def read(self, file: str, start: int, out: memoryview) -> None:
        out[:] = self._range(file, start, start + len(out)).data

    def view(self, file: str, start: int, stop: int) -> NDArray[np.uint8] | None:
        return self._range(file, start, stop)

    def sha256(self, file: str) -> str:
        return hashlib.sha256(self._array(file).data).hexdigest()

    def expect(self, ranges: Iterable[Range], *, exact: bool = False) -> None:
        pass

    @property
    def traffic(self) -> Traffic:
        return Traffic()

    def create(self, file: str, size: int) -> None:
        there = self.arrays.get(file)
        if there is None or there.nbytes != size:
            made = np.zeros(size, dtype=np.uint8)
            if there is not None:
                made[: there.nbytes] = there[:size]
            self.arrays[file] = made

    @contextmanager
    def part(self, file: str, start: int, stop: int) -> Iterator[PartWriter]:
        size = self._array(file).nbytes
        if not 0 <= start <= stop <= size:
            raise RunError(
                f"{file}: wanted bytes {start} to {stop}, found an array of {size} bytes. Fix: create it at its full size."
            )
        writer = _MemoryPart(file, self.arrays[file], start, stop)
        yield writer
        writer.check()

    @contextmanager
    def whole(self, file: str, at_most: int) -> Iterator[PartWriter]:
        writer = _MemoryPart(file, np.zeros(at_most, dtype=np.uint8), 0, at_most)
        yield writer
        self.arrays[file] = writer.written

    def sync(self) -> None:
        pass

    def close(self) -> None:
        pass

    def _array(self, file: str) -> NDArray[np.uint8]:
        try:
            return self.arrays[file]
        except KeyError:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), file) from None

    def _range(self, file: str, start: int, stop: int) -> NDArray[np.uint8]:
        found = self._array(file)[start:stop]
        if len(found) < stop - start:
            raise _cut_short(file, stop, start + len(found))
        return found


class _MemoryPart:
    def __init__(self, file: str, array: NDArray[np.uint8], start: int, stop: int) -> None:
        self._file, self._array = file, array
        self._start, self._at, self._stop = start, start, stop

    def write(self, data: bytes | memoryview | NDArray[Any]) -> None:
        given = as_bytes(data)
        if self._at + len(given) > self._stop:
            raise wrong_count(self._file, self._start, self._stop, self._at + len(given))
        self._array.data[self._at : self._at + len(given)] = given
        self._at += len(given)

    @property
    def written(self) -> NDArray[np.uint8]:
        return self._array[self._start : self._at]

    def check(self) -> None:
        if self._at != self._stop:
            raise wrong_count(self._file, self._start, self._stop, self._at)


# ---------------------------------------------------------------------------------------------------- what both need


def _stamp_of(found: os.stat_result) -> Stamp:
    return Stamp(found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def changed(file: str, wanted: object, found: object) -> InputError:
    """What to say of an input that is no longer what it was."""
    return InputError(
        f"{file}: wanted the file as it was when the run began ({wanted}), found {found}: it was changed during the run. "
        "Fix: let nothing write to the models while they are merged, and start afresh."
    )


def as_bytes(data: bytes | memoryview | NDArray[Any]) -> memoryview:
    """A view of what is to be written."""
    seen = data.data if isinstance(data, np.ndarray) else memoryview(data)
    return seen.cast("B") if seen.nbytes else memoryview(b"")  # An empty shape can't be cast.


def _cut_short(file: str, wanted: int, found: int) -> InputError:
    return InputError(
        f"{file}: wanted data up to byte {wanted}, found its end at byte {found}: it was changed during the run. "
        "Fix: restore the file, let nothing write to it meanwhile, and start afresh."
    )


def wrong_count(file: str, start: int, stop: int, at: int) -> ValueError:
    """What to say of a part that got too few or too many bytes."""
    return ValueError(f"{file}: wanted the {stop - start} bytes of the part from byte {start} on, found {at - start}")


def _named(error: OSError, file: str) -> OSError:
    """Make the same error with the file's name, which a call that knows a descriptor only can't give."""
    return OSError(error.errno, error.strerror, file)


# ---------------------------------------------------------------------------------------------------- small files, and durability


def write_atomically(path: Path, data: bytes) -> None:
    """After this, `path` holds `data`, also after a power cut; until then it holds what it held before.

    Raises OSError, leaving nothing behind.
    """
    with written_aside(path) as file:
        file.write(data)


@contextmanager
def written_aside(path: Path) -> Iterator[BinaryIO]:
    """A new file that takes the name `path`, durably, when the block ends; until then `path` holds what it held before.

    Raises OSError. Whatever the block raises, nothing is left behind.
    """
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(aside, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


def fsync_file(path: Path) -> None:
    """Make durable what a file holds."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_folder(path: Path) -> None:
    """Make the folder's entries (files made, renamed, removed) durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # Some file systems can't sync folders.
            raise
    finally:
        os.close(descriptor)
