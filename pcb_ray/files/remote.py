"""Files that lie over a network, read in large pieces that are fetched ahead, and kept on this machine where there is room.

A file is cut into pieces of 8 MiB. A worker says which stretches it will read next, and the pieces that hold them are fetched while
it computes, several at once. What is read without being announced is fetched as it is: headers, and samples.

Each file is held to what it was: by its pin, or by what the first answer about it said. Every answer is checked against that.
"""

from __future__ import annotations

import errno
import hashlib
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from pcb_ray.errors import InputError
from pcb_ray.files.arrow import ArrowFiles, is_arrow
from pcb_ray.files.hub import HubFiles
from pcb_ray.files.hub_commit import Branch
from pcb_ray.files.objects import HUB_SCHEME, LOOKING_PATIENCE_S, PATIENCE_S, Changed, Fence, Objects, Requests, Storage
from pcb_ray.files.room import KeptHere, Room
from pcb_ray.files.store import PartWriter, Pins, Range, Stamp, Traffic, as_bytes, changed, wrong_count

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

PIECE = 8 << 20
"""Large enough for a store's full rate with some in flight, small enough to bound what a worker holds."""
FETCHES = 32
"""In flight at once, for one worker; of pieces there are as many as were announced."""


class RemoteStore:
    """Objects, and files of models on the Hub, by their URIs, as a Store."""

    def __init__(self, pins: Pins, storage: Storage | None, room: Room | None, fence: Fence | None = None) -> None:
        patience_s = PATIENCE_S if pins else LOOKING_PATIENCE_S
        self._objects, self._hub = Objects(storage, patience_s=patience_s), HubFiles(patience_s=patience_s)
        self._others = ArrowFiles()
        self._pins = dict(pins)
        self._fence = fence
        self._sent: dict[str, Stamp] = {}  # files for the Hub, which no commit names yet
        self._kept = None if room is None else KeptHere(room)
        self._pool = ThreadPoolExecutor(FETCHES, thread_name_prefix="fetch")
        self._lock = threading.Lock()
        self._expected: dict[int, set[Range]] = {}  # by thread
        self._coming: dict[Range, Future[memoryview | None]] = {}
        self._fetched = 0

    @property
    def traffic(self) -> Traffic:
        return Traffic(self._fetched, self._objects.retries + self._hub.retries, 0 if self._kept is None else self._kept.bytes)

    def stamp(self, file: str) -> Stamp:
        return self._sent.get(file) or self._requests(file).head(file)

    def view(self, file: str, start: int, stop: int) -> NDArray[np.uint8] | None:  # noqa: ARG002
        return None

    def read(self, file: str, start: int, out: memoryview) -> None:
        stop = start + len(out)
        if (data := self._announced(Range(file, start, stop))) is not None:
            out[:] = data
            return
        while start < stop:
            piece = self._piece(file, start)
            end = min(stop, piece.stop)
            if not self._read_piece(piece, start, out[: end - start]):
                out[: end - start] = self._fetch(Range(file, start, end))
            out, start = out[end - start :], end

    def sha256(self, file: str) -> str:
        digest, size = hashlib.sha256(), self._pin(file).size
        pieces = [self._piece(file, start) for start in range(0, size, PIECE)]
        for k, piece in enumerate(pieces):
            self.expect(pieces[k : k + 4])
            data = memoryview(bytearray(piece.stop - piece.start))
            self.read(file, piece.start, data)
            digest.update(data)
        self.expect(())
        return digest.hexdigest()

    def expect(self, ranges: Iterable[Range], *, exact: bool = False) -> None:
        if exact:
            wanted = dict.fromkeys(ranges)
        else:
            wanted = dict.fromkeys(
                self._piece(one.file, at) for one in ranges for at in range(one.start // PIECE * PIECE, one.stop, PIECE)
            )
        with self._lock:
            self._expected[threading.get_ident()] = set(wanted)
            still = set[Range]().union(*self._expected.values())
            for one in [one for one in self._coming if one not in still]:
                self._coming.pop(one).cancel()
            for one in wanted:
                if one not in self._coming and not (self._kept is not None and not exact and self._kept.has(self._key(one))):
                    self._coming[one] = self._pool.submit(self._fetch if exact else self._fetch_piece, one)

    def create(self, file: str, size: int) -> None:
        pass  # An object is made when its only part is whole.

    @contextmanager
    def part(self, file: str, start: int, stop: int) -> Iterator[PartWriter]:
        """A part is the whole file."""
        if start:
            raise ValueError(f"{file}: an object is written whole, found a part from byte {start} on")
        with self._sent_ahead(file, stop) if file.startswith(HUB_SCHEME) else self._objects.upload(file, stop, self._fence) as take:
            part = _Part(file, stop, take)
            yield part
            part.check()
        with self._lock:
            self._pins.pop(file, None)  # it is another object now

    @contextmanager
    def whole(self, file: str, at_most: int) -> Iterator[PartWriter]:
        with self._objects.upload(file, at_most, self._fence) as take:
            yield _Part(file, at_most, take)
        with self._lock:
            self._pins.pop(file, None)

    @contextmanager
    def _sent_ahead(self, file: str, size: int) -> Iterator[Callable[[memoryview], object]]:
        """A file for the Hub lies on this machine until it is whole and sent: its digest is asked for first."""
        at, _, name = file.removeprefix(HUB_SCHEME).partition("@")
        branch, _, name = name.partition("/")
        with nullcontext(None) if self._kept is None else self._kept.staged(size) as path:
            if path is None:
                raise OSError(errno.ENOSPC, f"no room for its {size:,} bytes in memory or --scratch", file)
            with path.open("wb") as staged:
                yield staged.write
            sent = Branch.of(f"{HUB_SCHEME}{at}@{branch}").send(name, path)
        self._sent[file] = Stamp(sent.size, 0, 0, sent.to_text())

    def sync(self) -> None:
        pass

    def close(self) -> None:
        self._objects.close()
        self._hub.close()
        self._pool.shutdown(wait=False, cancel_futures=True)
        if self._kept is not None:
            self._kept.close()

    def _requests(self, file: str) -> Requests:
        return self._others if is_arrow(file) else self._hub if file.startswith(HUB_SCHEME) else self._objects

    # --- pieces -------------------------------------------------------------------------------------------------------------------

    def _piece(self, file: str, at: int) -> Range:
        """The piece that holds byte `at`."""
        start = at // PIECE * PIECE
        return Range(file, start, max(at + 1, min(start + PIECE, self._pin(file).size)))

    def _key(self, piece: Range) -> str:
        return f"{piece.file}\n{self._pin(piece.file).tag}\n{piece.start}"

    def _announced(self, one: Range) -> memoryview | None:
        """What was announced, as soon as it is here; None if it was not, or is kept here."""
        with self._lock:
            future = self._coming.get(one)
        try:
            return None if future is None else future.result()
        except CancelledError:  # another thread had announced it, and goes on
            return None

    def _read_piece(self, piece: Range, start: int, out: memoryview) -> bool:
        """Fill `out` from a piece that was announced, or is kept here."""
        if (data := self._announced(piece)) is not None:
            out[:] = data[start - piece.start : start - piece.start + len(out)]
            return True
        return self._kept is not None and self._kept.read(self._key(piece), start - piece.start, out)

    def _fetch_piece(self, piece: Range) -> memoryview | None:
        """Fetch a piece and keep it; None if another process has done so meanwhile."""
        if self._kept is None:
            return self._fetch(piece)
        key = self._key(piece)
        with self._kept.claim(key):
            if self._kept.has(key):
                return None
            data = self._fetch(piece)
            self._kept.put(key, data)
            return data

    def _fetch(self, one: Range) -> memoryview:
        pin = self._pins.get(one.file)
        try:
            data, now = self._requests(one.file).get(one.file, one.start, one.stop, "" if pin is None else pin.tag)
        except Changed:
            now = self._requests(one.file).head(one.file)
            raise changed(one.file, pin, now) from None
        with self._lock:
            pin = self._pins.setdefault(one.file, now)
            self._fetched += len(data)
        if now.content != pin.content:
            raise changed(one.file, pin, now)
        if len(data) != one.stop - one.start:
            raise InputError(
                f"{one.file}: wanted data up to byte {one.stop}, found its end at byte {one.start + len(data)}. "
                "Fix: restore the file, and start afresh."
            )
        return data

    def _pin(self, file: str) -> Stamp:
        if (pin := self._pins.get(file)) is None:
            pin = self._pins.setdefault(file, self.stamp(file))
        return pin


class _Part:
    def __init__(self, file: str, size: int, take: Callable[[memoryview], object]) -> None:
        self._file, self._size, self._at, self._take = file, size, 0, take

    def write(self, data: bytes | memoryview | NDArray[Any]) -> None:
        given = as_bytes(data)
        self._at += len(given)
        if self._at > self._size:
            raise wrong_count(self._file, 0, self._size, self._at)
        self._take(given)

    def check(self) -> None:
        if self._at != self._size:
            raise wrong_count(self._file, 0, self._size, self._at)
