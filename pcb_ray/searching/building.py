"""What owners are asked when a basis is built. Torch is imported only where an owner answers, since the driver uses this module."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import xxhash

from pcb_ray.methods import Known
from pcb_ray.questions import Digest, Written
from pcb_ray.searching.volumes import chunks_of_volume, volume_file

if TYPE_CHECKING:
    from pcb_ray.owner import Owner

READ_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class BuildVolumes:
    """Build these volumes of the basis in `folder`, or below a prefix of a store, with scores if it is to serve several densities.

    The volumes are durable when they are answered."""

    known: Known
    folder: str
    scored: bool

    def answer(self, owner: Owner, items: Sequence[int]) -> dict[int, Written]:
        from pcb_ray.searching.basis import build_volume  # and torch

        scored = owner.plan.method.scored if self.scored else None
        then, built = owner.then or (), dict[int, Written]()
        for k, volume in enumerate(items):
            owner.then = [chunk for later in (*items[k + 1 :], *then) for chunk in chunks_of_volume(owner.plan, later)]
            built[volume] = build_volume(owner, volume, self.known, scored, volume_file(self.folder, volume))
        owner.note_memory()
        return built


@dataclass(frozen=True)
class DigestVolumes:
    """The digests of those of these volumes that are there, in a folder."""

    folder: str

    def answer(self, owner: Owner, items: Sequence[int]) -> dict[int, Digest]:  # noqa: ARG002 - it tells of files alone
        found = {}
        for volume in items:
            path = volume_file(self.folder, volume)
            if os.path.isfile(path):
                digest = xxhash.xxh3_128()
                with open(path, "rb") as file:
                    while data := file.read(READ_AT_ONCE):
                        digest.update(data)
                found[volume] = digest.intdigest()
        return found


@dataclass(frozen=True)
class CheckLinear:
    """How far merges of the first blocks of these chunks are from what a basis makes of them, which is linear in lambda_i, as a
    share of the largest change. With scores, what a scored basis makes counts too."""

    known: Known
    scored: bool

    def answer(self, owner: Owner, items: Sequence[int]) -> float:
        firsts = [next(owner.blocks(chunk)) for chunk in items]
        scored = owner.plan.method.scored if self.scored else None
        return max(owner.kernel.departure_from_linear(owner.load(block), self.known, scored) for block in firsts)
