"""A tensor of an input, of whatever kind it is, and the one way to get a block of it.

There is one kind today: `Tensor`, stored as it is. Others (a base plus a low-rank update, scaled 8-bit numbers) join it here: each
says what dtype its blocks have, and `Reader.block` gives them; nothing else knows how an input is stored."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import xxhash

from pcb_ray.files.checkpoint import DTYPE_BYTES, Tensor
from pcb_ray.files.store import Store
from pcb_ray.questions import Digest, sum_of

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Wanted(NamedTuple):
    """Elements start..stop-1 of a tensor, which belong to one cell."""

    tensor: Tensor
    start: int
    stop: int
    cell: int


class CellDigests:
    """The sum of the digests of the cells that were read from one input. The bytes of a cell come in order, and no other cell's
    between them."""

    def __init__(self) -> None:
        self._total, self._cell, self._state = 0, -1, xxhash.xxh3_128()

    def update(self, cell: int, data: memoryview) -> None:
        if cell != self._cell:
            self._close()
            self._cell, self._state = cell, xxhash.xxh3_128(seed=cell)
        self._state.update(data)

    def total(self) -> Digest:
        self._close()
        return self._total

    def _close(self) -> None:
        if self._cell >= 0:
            self._total = sum_of((self._total, self._state.intdigest()))
        self._cell = -1


class _Extent(NamedTuple):
    """Bytes start..stop-1 of a file, elements of one dtype, and where in them each cell's bytes begin."""

    file: str
    dtype: str
    start: int
    stop: int
    cells: tuple[tuple[int, int], ...]


class Reader:
    """Gives the blocks of one input, of at most so many elements, in the dtype of its files."""

    def __init__(self, store: Store, elements: int, dtypes: set[str], device: torch.device) -> None:
        self._store, self._device = store, device
        self.bytes_read = 0
        # The buffer is made once: the system hands out and takes back memory of this size page by page.
        widest = max(DTYPE_BYTES[dtype] for dtype in dtypes)
        raw = torch.empty(elements * widest, dtype=torch.uint8, pin_memory=device.type == "cuda")
        self._bytes = raw.numpy().data
        self._typed = {dtype: raw.view(DTYPES[dtype]) for dtype in dtypes}

    def block(self, wanted: Sequence[Wanted], digests: CellDigests | None = None) -> torch.Tensor:
        """These elements one after another, [B]; in float32 where their dtypes differ. It is valid until the next call."""
        extents = list(_extents(wanted))
        self.bytes_read += sum(extent.stop - extent.start for extent in extents)
        if len(extents) == 1 and (seen := self._store.view(extents[0].file, extents[0].start, extents[0].stop)) is not None:
            _digest(extents[0], seen.data, digests)
            return torch.from_numpy(seen).view(DTYPES[extents[0].dtype]).to(self._device)
        mixed = any(extent.dtype != extents[0].dtype for extent in extents)
        converted, at = [], 0
        for extent in extents:
            size = extent.stop - extent.start
            view = self._bytes[at : at + size]
            self._store.read(extent.file, extent.start, view)
            _digest(extent, view, digests)
            if mixed:  # the next extent takes the same bytes of the buffer
                typed = self._typed[extent.dtype][: size // DTYPE_BYTES[extent.dtype]]
                converted.append(typed.to(self._device, torch.float32, copy=True))
            else:
                at += size
        if mixed:
            return torch.cat(converted)
        # To a GPU the copy is synchronous, so that the buffer is free again; on a CPU there is none.
        return self._typed[extents[0].dtype][: at // DTYPE_BYTES[extents[0].dtype]].to(self._device)


def _extents(wanted: Sequence[Wanted]) -> Iterator[_Extent]:
    """Neighbours in a file are read at once."""
    extent: _Extent | None = None
    for tensor, first, last, cell in wanted:
        itemsize = DTYPE_BYTES[tensor.dtype]
        start, stop = tensor.start + first * itemsize, tensor.start + last * itemsize
        if extent is not None and (tensor.file, tensor.dtype, start) == (extent.file, extent.dtype, extent.stop):
            extent = extent._replace(stop=stop, cells=(*extent.cells, (cell, start - extent.start)))
            continue
        if extent is not None:
            yield extent
        extent = _Extent(tensor.file, tensor.dtype, start, stop, ((cell, 0),))
    if extent is not None:
        yield extent


def _digest(extent: _Extent, data: memoryview, digests: CellDigests | None) -> None:
    if digests is not None:
        stops = [at for _, at in extent.cells[1:]] + [len(data)]
        for (cell, at), stop in zip(extent.cells, stops, strict=True):
            digests.update(cell, data[at:stop])
