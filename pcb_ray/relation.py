"""Are the models fine-tunes of this base? A sample of their weights tells, before anything is computed.

Merging models over another base than theirs (the plain one for tunes of its -Instruct sibling, another version of equal shapes, an
unrelated model) works without an error and gives garbage."""

from __future__ import annotations

import bisect
import itertools
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from pcb_ray.errors import RequestError
from pcb_ray.files.checkpoint import DTYPE_BYTES, Checkpoint, Tensor
from pcb_ray.files.foreign import show
from pcb_ray.files.objects import unreadable
from pcb_ray.files.store import Range, Store
from pcb_ray.recipe import read_yaml

if TYPE_CHECKING:
    from pcb_ray.planning import MergedTensor, Plan
    from pcb_ray.questions import Gram

RUNS, RUN_ELEMENTS = 64, 4096
"""The sample: so many runs of elements, at places that depend on the shapes of the matrices alone."""
LEAST_ELEMENTS = RUN_ELEMENTS
"""Of fewer nothing is concluded: they are an example, and no model."""
UNRELATED_BELOW = 0.3
"""Weights of unrelated models have a cosine near 0 (their difference is the square root of 2 as long as they are), those of a
fine-tune and its base one near 1."""
ALIKE_ABOVE = 0.8
"""Task vectors of independent tasks have a cosine near 0; a part that all share brings it up."""


@dataclass(frozen=True)
class Relation:
    """How the models stand to the base: in a plan on the sample, in a receipt over all merged elements."""

    elements: int
    """That were looked at."""
    change: tuple[float, ...]
    """||tau_i|| / ||theta_pre||; on a sample the median over the runs."""
    cosine_to_base: tuple[float, ...]
    """cos(theta_i, theta_pre), likewise."""
    untouched: tuple[float, ...]
    """The share of tau_i that is 0."""
    cosines: tuple[tuple[float, ...], ...]
    """cos(tau_i, tau_j), row by row; 0 for one that is 0."""

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """From what `dataclasses.asdict` has made of one, with lists in the place of tuples."""
        lists = {name: tuple(content[name]) for name in ("change", "cosine_to_base", "untouched")}
        return cls(elements=content["elements"], cosines=tuple(map(tuple, content["cosines"])), **lists)


def relation_of(plan: Plan, store: Store) -> Relation | None:
    """Compare the models with the base on a sample of their matrices; None where there is no base, or nothing to compare."""
    n = plan.N
    changes: list[list[float]] = [[] for _ in range(n)]
    to_base: list[list[float]] = [[] for _ in range(n)]
    zeros, dots, seen = np.zeros(n), np.zeros((n, n)), 0
    store.expect(
        (
            Range(t.file, t.start + start * DTYPE_BYTES[t.dtype], t.start + stop * DTYPE_BYTES[t.dtype])
            for tensor, start, stop in _runs(plan)
            for t in tensor.sources
            if t is not None
        ),
        exact=True,
    )
    for tensor, start, stop in _runs(plan):
        theta_B, *models = (_values(store, source, start, stop) for source in tensor.sources if source is not None)
        length = float(np.linalg.norm(theta_B))
        if length == 0 or not all(np.isfinite(values).all() for values in (theta_B, *models)):
            continue  # what is not finite is told by whoever reads all of it
        tau_NB = np.stack([model - theta_B for model in models])
        seen += stop - start
        zeros += (tau_NB == 0).sum(axis=1)
        dots += tau_NB @ tau_NB.T
        for i, model in enumerate(models):
            changes[i].append(float(np.linalg.norm(tau_NB[i])) / length)
            own = float(np.linalg.norm(model))
            to_base[i].append(float(model @ theta_B) / (own * length) if own else 0.0)
    store.expect(())
    if not seen:
        return None
    lengths = np.sqrt(np.diag(dots))
    return Relation(
        seen,
        tuple(map(statistics.median, changes)),
        tuple(map(statistics.median, to_base)),
        tuple(float(count) / seen for count in zeros),
        tuple(tuple(float(dots[i, j] / (lengths[i] * lengths[j] or math.inf)) for j in range(n)) for i in range(n)),
    )


def relation_from(elements: int, gram: Gram) -> Relation | None:
    """The same over all elements: from sums over them, and with ratios of whole lengths in the place of medians."""
    n = len(gram.zeros)
    products = np.zeros((n + 1, n + 1))
    products[np.triu_indices(n + 1)] = gram.products
    of_base, with_base, of_taus = float(products[0, 0]), products[0, 1:], products[1:, 1:]
    squares = np.diag(of_taus)
    of_models = np.maximum(of_base + 2 * with_base + squares, 0.0)
    if not of_base or not np.isfinite(products).all():
        return None
    lengths = np.sqrt(np.outer(squares, squares))
    cosines = (of_taus + np.triu(of_taus, 1).T) / np.where(lengths == 0, np.inf, lengths)
    to_base = (of_base + with_base) / np.where(of_models == 0, np.inf, np.sqrt(of_models * of_base))

    def rounded(values: NDArray[np.float64]) -> tuple[float, ...]:  # beyond that they tell in which order was added
        return tuple(float(f"{value:.6g}") for value in values)

    return Relation(
        elements,
        rounded(np.sqrt(squares / of_base)),
        rounded(to_base),
        tuple(zeros / elements for zeros in gram.zeros),
        tuple(map(rounded, cosines)),
    )


def _runs(plan: Plan) -> Iterator[tuple[MergedTensor, int, int]]:
    """The runs of the sample: a tensor, and the first and last of its elements, at equal steps over all matrices."""
    matrices = [tensor for tensor in plan.tensors if len(tensor.shape) >= 2 and tensor.sources[0] is not None]
    ends = list(itertools.accumulate(tensor.numel for tensor in matrices))
    total = ends[-1] if ends else 0
    count = min(RUNS, -(-total // RUN_ELEMENTS))
    for run in range(count):
        at = run * total // count
        index = bisect.bisect_right(ends, at)
        start = at - (ends[index] - matrices[index].numel)
        yield matrices[index], start, min(start + RUN_ELEMENTS, matrices[index].numel)


def notes_on(plan: Plan, relation: Relation) -> list[str]:
    """What is odd about models that hardly were meant. Raises RequestError for those that are no fine-tunes of the base, unless the
    recipe allows them."""
    if relation.elements < LEAST_ELEMENTS:
        return []
    base, *models = (one.source for one in plan.inputs)
    far = [k for k, cosine in enumerate(relation.cosine_to_base) if not cosine > UNRELATED_BELOW]
    if far and not plan.recipe.allow_unrelated:
        raise RequestError(
            [
                f"{models[k]}: wanted a fine-tune of {base}, found weights that have nothing to do with it: a cosine of "
                f"{relation.cosine_to_base[k]:.2f}, and a difference {relation.change[k]:.2f} times as long as the base's weights "
                f"(unrelated models: {math.sqrt(2):.2f}). Fix: name the base that it was tuned from, or write "
                "`allow_unrelated: true`."
                for k in far
            ]
        )
    notes = []
    pairs = [cosine for i, row in enumerate(relation.cosines) for cosine in row[:i]]
    if pairs and min(pairs) > ALIKE_ABOVE:
        least = min(pairs)
        notes.append(
            f"all task vectors point the same way (cosines of {least:.2f} and more): the models share an ancestor later than "
            f"{base}, which should be `base_model`"
        )
    return notes


# --- what they say of themselves --------------------------------------------------------------------------------------------------

CARD = "README.md"
MAX_CARD_BYTES, LONGEST_NAME = 1 << 20, 200


def other_bases(base: Checkpoint, models: Sequence[Checkpoint]) -> list[str]:
    """Notes on models whose card or config names another model as the one that they were tuned from."""
    own_names = _names_of(base)
    if isinstance(own := (base.config or {}).get("_name_or_path"), str):
        own_names.add(_last_part(own))
    by_name: dict[str, list[str]] = {}
    for model in models:
        for name in _named_bases(model):
            if _last_part(name) not in (*own_names, *_names_of(model)):  # some name themselves
                by_name.setdefault(name, []).append(model.source)
    return [
        f"{', '.join(sources)}: card or config says that it was tuned from {show(name)}: is that {base.source}?"
        for name, sources in by_name.items()
    ]


def _names_of(one: Checkpoint) -> set[str]:
    """What a model may be called, by the last part of its names: where it lies, and on the Hub."""
    names = {_last_part(one.source.split("@")[0])}
    if one.folder is not None:
        folder = one.folder.resolve()
        names.add(_last_part(folder.name))
        names |= {_last_part(part.replace("--", "/")) for part in folder.parts if part.startswith("models--")}
    return names


def _named_bases(model: Checkpoint) -> list[str]:
    named = (model.config or {}).get("_name_or_path")  # as transformers before 5 wrote it: what was loaded
    in_config = [named] if isinstance(named, str) and named.strip("./") and len(named) < LONGEST_NAME else []
    return _bases_on_card(model) or in_config


def _bases_on_card(model: Checkpoint) -> list[str]:
    """`base_model` in the metadata of a model's card; nothing where there is none that can be read: it is a hint and no more."""
    if not any(one.name == CARD and one.size <= MAX_CARD_BYTES for one in model.own):
        return []
    try:
        text = model.read(CARD).decode()
        begin, front, _ = text.split("---\n", 2)
        metadata = read_yaml(front) if not begin.strip() else None
    except (RequestError, ValueError):
        return []
    named = metadata.get("base_model") if isinstance(metadata, dict) else None
    listed = named if isinstance(named, list) else [named]
    return [one for one in listed if isinstance(one, str) and one.strip() and len(one) < LONGEST_NAME]


def _last_part(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2].lower()


def _values(store: Store, tensor: Tensor, start: int, stop: int) -> NDArray[np.float64]:
    """Elements of a tensor in float64."""
    itemsize = DTYPE_BYTES[tensor.dtype]
    raw = np.empty((stop - start) * itemsize, dtype=np.uint8)
    try:
        store.read(tensor.file, tensor.start + start * itemsize, raw.data)
    except OSError as error:
        raise RequestError(unreadable(tensor.file, error)) from None
    if tensor.dtype == "BF16":
        return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return raw.view({"F64": np.float64, "F32": np.float32, "F16": np.float16}[tensor.dtype]).astype(np.float64)
