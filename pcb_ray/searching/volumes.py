"""The files of a basis: which chunks lie in which, and what they take. The driver uses this module: it needs no torch.

A basis has at most `MOST_VOLUMES` files, however large the model is. One owner writes a volume, from its first byte to its last; it
is the unit of retry and of resume.
"""

from __future__ import annotations

from pcb_ray.files.objects import upload_bytes
from pcb_ray.files.store import is_remote
from pcb_ray.methods import Method
from pcb_ray.planning import Plan

MOST_VOLUMES = 256
_BOOKKEEPING = 256  # bytes of a segment's index, padding and all


def volumes_of(plan: Plan) -> int:
    """How many volumes a basis of the plan has."""
    return min(plan.chunks, MOST_VOLUMES)


def chunks_of_volume(plan: Plan, volume: int) -> range:
    """The chunks that lie in a volume, a contiguous run."""
    count = volumes_of(plan)
    return range(volume * plan.chunks // count, (volume + 1) * plan.chunks // count)


def volume_file(folder: str, volume: int) -> str:
    return f"{folder}/{volume:03d}.basis"


# --- what it takes ----------------------------------------------------------------------------------------------------------------


def writer_bytes(plan: Plan, scored: bool, folder: str = "") -> int:
    """The most memory that a worker takes beside, to gather the basis of one chunk, all of whose elements may be kept, and to write
    it to this folder, or below this prefix of a store."""
    score = _score_bytes(plan.method, scored)
    per_element = max(1 + 4 + score, 4 + 2 * score, 4 + 4 + score) + 0.25  # parts; scores, then values, in their parts and joined
    sent = upload_bytes(volume_bytes(plan, scored)) if is_remote(folder) else 0
    return int(plan.N * _chunk_elements(plan) * per_element) + 2 * _histogram_bytes(plan, scored) + (8 << 20) + sent


def volume_bytes(plan: Plan, scored: bool) -> int:
    """The most that one volume can take, if all elements are kept."""
    chunks = -(-plan.chunks // volumes_of(plan))
    entries = int(plan.N * _chunk_elements(plan) * (4 + _score_bytes(plan.method, scored) + 0.125))
    return chunks * (entries + _histogram_bytes(plan, scored) + _BOOKKEEPING * (1 + len(plan.tensors)) * (1 + plan.N))


def basis_bytes(plan: Plan, scored: bool) -> int:
    """What a basis takes on disk at most, but for its index: the entries, the masks, and the histograms of a scored one."""
    score, kept = _score_bytes(plan.method, scored), [1.0] * plan.N
    if plan.method.scored is not None:
        kept = list(plan.settings.each(plan.method.scored.share))
    return int(sum((4 + score) * r + 0.125 for r in kept) * plan.D) + plan.chunks * _histogram_bytes(plan, scored)


def _score_bytes(method: Method, scored: bool) -> int:
    return method.scored.scores.bits // 8 if scored and method.scored is not None else 0


def _histogram_bytes(plan: Plan, scored: bool) -> int:
    """The bytes of a chunk's histogram: a row of three integers for each value that the upper bits of its scores' keys take.

    In practice the keys span some binary orders of magnitude, of 256 values each."""
    return 24 * plan.N * min(32 * 256, _chunk_elements(plan)) * scored


def _chunk_elements(plan: Plan) -> int:
    return max(stop - start for start, stop in zip(plan.bounds, plan.bounds[1:], strict=False))
