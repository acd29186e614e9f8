"""The store that a file lies in, told by how it is named: a path on this machine, or a URI."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pcb_ray.files.objects import Fence, Storage
from pcb_ray.files.room import Room
from pcb_ray.files.store import LocalStore, PartWriter, Pins, Range, Stamp, Store, Traffic, is_remote

if TYPE_CHECKING:
    from pcb_ray.files.remote import RemoteStore


def open_store(
    pins: Pins | None = None, storage: Storage | None = None, room: Room | None = None, fence: Fence | None = None
) -> Store:
    """Return the store that merges read and write by: local files by their paths, objects by their URIs.

    Files with a pin are read only while they are what it says: a read of another raises InputError. `storage` says how stores are
    reached; `room` is where this machine may keep what was fetched. Objects are written only while the `fence` stands."""
    return _Stores(pins or {}, storage, room, fence)


def size_of_file(store: Store, file: str) -> int | None:
    """How large a file is; None if there is none of this name. Raises OSError if that can't be told."""
    if not is_remote(file):
        return os.path.getsize(file) if os.path.isfile(file) else None
    try:
        return store.stamp(file).size
    except FileNotFoundError:
        return None


def small_file(file: str, most: int, storage: Storage | None = None) -> bytes:
    """What a file holds, wherever it lies; of a larger one than that the first `most` bytes and one more. Raises OSError."""
    with contextlib.closing(open_store(storage=storage)) as store:
        data = bytearray(min(store.stamp(file).size, most + 1))
        if data:
            store.read(file, 0, memoryview(data))
    return bytes(data)


class _Stores:
    """Hands each call on by how its file is named."""

    def __init__(self, pins: Pins, storage: Storage | None, room: Room | None, fence: Fence | None) -> None:
        self._local = LocalStore(pins=pins)
        self._arguments = pins, storage, room, fence
        self._opened: RemoteStore | None = None
        self._opening = threading.Lock()

    def stamp(self, file: str) -> Stamp:
        return self._of(file).stamp(file)

    def read(self, file: str, start: int, out: memoryview) -> None:
        self._of(file).read(file, start, out)

    def view(self, file: str, start: int, stop: int) -> NDArray[np.uint8] | None:
        return self._of(file).view(file, start, stop)

    def sha256(self, file: str) -> str:
        return self._of(file).sha256(file)

    def expect(self, ranges: Iterable[Range], *, exact: bool = False) -> None:
        remote = [one for one in ranges if is_remote(one.file)]
        if remote or self._opened is not None:
            self._remote.expect(remote, exact=exact)

    @property
    def traffic(self) -> Traffic:
        return Traffic() if self._opened is None else self._opened.traffic

    def create(self, file: str, size: int) -> None:
        self._of(file).create(file, size)

    def part(self, file: str, start: int, stop: int) -> AbstractContextManager[PartWriter]:
        return self._of(file).part(file, start, stop)

    def whole(self, file: str, at_most: int) -> AbstractContextManager[PartWriter]:
        return self._of(file).whole(file, at_most)

    def sync(self) -> None:
        self._local.sync()
        if self._opened is not None:
            self._opened.sync()

    def close(self) -> None:
        self._local.close()
        if self._opened is not None:
            self._opened.close()

    def _of(self, file: str) -> Store:
        return self._remote if is_remote(file) else self._local

    @property
    def _remote(self) -> RemoteStore:
        with self._opening:
            if self._opened is None:
                from pcb_ray.files.remote import RemoteStore  # and the libraries of object stores

                self._opened = RemoteStore(*self._arguments)
            return self._opened
