"""What a merge will do, known from headers, small files and samples: a function of the recipe and the inputs, comparable with ==.

`open_inputs` opens every checkpoint (headers only), `plan_of` matches the tensors and lays out the output; whatever is wrong with
any of them is raised at once. Owners, the driver and `verify` then only execute the plan.

The merged elements of the whole model are numbered 0..D-1: tensors in the order of their names, elements in C order. The plan cuts
them, and the output's bytes, into pieces that depend on nothing else:

    chunk    a run of these numbers: what an analysis sweep asks an owner about
    cell     the elements of one tensor in one chunk: what input digests are taken of, so that sweeps in any order can be compared
    part     a run of bytes of one output file, whole cells and copied tensors: what one owner writes, from its first byte to its
    last
"""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any

from pcb_ray.conversions import layers_of
from pcb_ray.errors import RequestError
from pcb_ray.files.beside import (
    CONFIG,
    GENERATION_CONFIG,
    LEADS_NOWHERE,
    LEADS_OUT,
    WEIGHT_SUFFIXES,
    Beside,
    has_tokenizer,
    is_of_tokenizer,
)
from pcb_ray.files.checkpoint import (
    DTYPE_BYTES,
    SHARDED,
    Checkpoint,
    File,
    Tensor,
    open_checkpoint,
    safetensors_header,
)
from pcb_ray.files.foreign import some
from pcb_ray.files.store import Range, Stamp, Store, is_remote
from pcb_ray.files.stores import open_store
from pcb_ray.files.vocabulary import check_vocabularies
from pcb_ray.matching import match
from pcb_ray.matrices import TURNED, View, layer_of, matches, split_problem, views_of
from pcb_ray.methods import Method, Ranks, Settings
from pcb_ray.recipe import DTYPES, Recipe, depths_of
from pcb_ray.relation import Relation, notes_on, other_bases, relation_of
from pcb_ray.tied import Apart, Samples, Twin

AHEAD_ELEMENTS = 1 << 22
OPENED_AT_ONCE = 16
DEFAULT_SHARD_BYTES = 5 * 10**9  # as save_pretrained users expect
OPERATIONS, SLOWEST_CORE, UNHURRIED = 30, 2e9, 50e6
"""What a method on matrices takes for each model, times rows, columns and the smaller of both; what a slow core does of that in a
second, and how many bytes it merges. Nothing but when a worker is late depends on them."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How the work is cut. None of it decides which elements are kept; `chunk_elements` shows in the last bit of `paper`'s sums."""

    chunk_elements: int
    """Large enough that asking for a chunk costs nothing beside computing it, small enough to share work evenly and to redo little.
    """
    copy_bytes: int = 32 << 20
    """A copied tensor is a segment of a part for each so many bytes."""
    sample_run: int = 1 << 10
    """The sample consists of runs of so many elements, at places that depend on the plan alone."""
    sample_stride: int = 1 << 14
    """One sample run lies in each stretch of so many elements."""
    tally_entries: int = 1 << 19
    """Of a table of counts (selection.Tally); beyond it keys lose precision and another sweep settles the rest."""

    @classmethod
    def of(cls, D: int) -> Sizes:
        """What suits a model of D merged elements.

        A sixteenth of a small model is read for a sample, of a large one 1/128, so that the keys which a bracket leaves to be
        collected stay few enough for a tally."""
        chunk = min(max(1 << max(0, (D // 256).bit_length() - 1), 1 << 16), 1 << 22)
        run, runs = cls.sample_run, 1 << 12
        return cls(chunk, sample_stride=min(max(16 * run, D // runs // run * run), 128 * run))


@dataclasses.dataclass(frozen=True, slots=True)
class Slot:
    """Where a tensor goes: the index of its output file, the byte offset in it, the dtype."""

    file: int
    start: int
    dtype: str


@dataclasses.dataclass(frozen=True, slots=True)
class MergedTensor:
    """A tensor of the merge: elements first..first+numel-1 of the model. `sources` are the base (None for a method without one) and
    the models."""

    name: str
    first: int
    numel: int
    sources: tuple[Tensor | None, ...]
    slot: Slot
    weights: tuple[float, ...]
    """lambda_i."""
    lambda_: float
    part_of: str = ""
    """The packed tensor of the output that it is a part of; empty if it is one of its own."""

    @property
    def shape(self) -> tuple[int, ...]:
        return next(source.shape for source in self.sources if source is not None)


MEAN = "statistics, the mean over the models"


@dataclasses.dataclass(frozen=True, slots=True)
class CopiedTensor:
    """A tensor of the base that is written as it is, and why; or statistics (`models`), of which the mean over these is written: in
    float32, added in the order of the recipe, whatever lambda and lambda_i."""

    source: Tensor
    slot: Slot
    why: str
    models: tuple[Tensor, ...] = ()

    @property
    def written_bytes(self) -> int:
        return self.source.numel * DTYPE_BYTES[self.slot.dtype]

    @property
    def read_bytes(self) -> int:
        return sum(t.nbytes for t in self.models or (self.source,))


@dataclasses.dataclass(frozen=True, slots=True)
class WrittenAgain:
    """A copy of a merged tensor, which the output holds under this name too: its index, and where it goes."""

    name: str
    tensor: int
    slot: Slot


@dataclasses.dataclass(frozen=True, slots=True)
class OutputFile:
    name: str
    header: bytes
    size: int


@dataclasses.dataclass(frozen=True, slots=True)
class Along:
    """A file beside the tensors that goes along into the output: the base's, or the tokenizer's from where that is taken."""

    name: str
    size: int
    of_tokenizer: bool


@dataclasses.dataclass(frozen=True, slots=True)
class Input:
    """A checkpoint of the merge as it was found. Inputs are the same if these are equal."""

    source: str
    commit: str | None
    files: tuple[File, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Segment:
    """Elements start..stop-1 of one merged tensor."""

    tensor: int
    start: int
    stop: int
    again: int = -1
    """They are written once more, as the copy of this number in `Plan.again`."""


@dataclasses.dataclass(frozen=True, slots=True)
class Copied:
    """Bytes start..stop-1 of one copied tensor, or of a mean of statistics as it is written."""

    copy: int
    start: int
    stop: int


@dataclasses.dataclass(frozen=True, slots=True)
class Part:
    """Bytes start..stop-1 of an output file: its header, if it is the file's first part, then these segments one after another."""

    file: int
    start: int
    stop: int
    segments: tuple[Segment | Copied, ...]


@dataclasses.dataclass(frozen=True)
class Plan:
    recipe: Recipe
    inputs: tuple[Input, ...]  # the base (a method without one takes only layout and copied tensors from it), then the models
    D: int
    tensors: tuple[MergedTensor, ...]
    copies: tuple[CopiedTensor, ...]
    tied: tuple[tuple[str, str], ...]  # (name left out, name that is written)
    again: tuple[WrittenAgain, ...]
    untied: tuple[str, ...]  # heads that are merged apart from the embedding that the base ties them to
    twins: tuple[Twin, ...]  # stored copies of tied tensors: they must be equal
    apart: tuple[Apart, ...]  # copies that are not, although the sample finds them equal
    packed: tuple[tuple[str, Slot], ...]  # tensors of the output that consist of merged ones
    dropped: tuple[str, ...]  # excluded tensors that only models have
    files: tuple[OutputFile, ...]
    sizes: Sizes
    library: str = "transformers"
    """Whose loader reads the output; empty if nobody says so."""
    along: tuple[Along, ...] = ()
    left_out: tuple[Beside, ...] = ()
    """Files beside the tensors that stay behind, and why."""
    relation: Relation | None = dataclasses.field(compare=False, default=None)
    """How the models stand to the base, on a sample; None until it was looked at."""
    views: tuple[tuple[View, ...], ...] = ()
    """The matrices of each merged tensor (none: it is of the rest), where they are merged or calibrated whole; else empty."""
    notes: tuple[str, ...] = dataclasses.field(compare=False, default=())

    @property
    def N(self) -> int:
        return len(self.recipe.models)

    @property
    def method(self) -> Method:
        return self.recipe.method

    @cached_property
    def settings(self) -> Settings:
        """The method's parameters, as its functions take them."""
        shared = self.recipe.parameters
        return Settings(self.N, self.D, len(self.tensors), shared, tuple({**shared, **m.parameters} for m in self.recipe.models))

    @property
    def names(self) -> tuple[str, ...]:
        """Of the models, for messages."""
        return tuple(model.source for model in self.recipe.models)

    @property
    def stamps(self) -> dict[str, Stamp]:
        """What each file of the inputs was when it was opened, and must stay."""
        return {file.path: file.stamp for one in self.inputs for file in one.files if file.stamp is not None}

    @property
    def ahead(self) -> int:
        """How many chunks or parts beyond the one at hand are fetched, where inputs come over a network: more of small ones."""
        return max(1, AHEAD_ELEMENTS // self.sizes.chunk_elements)

    @property
    def is_remote(self) -> bool:
        """Whether inputs are read over a network, and not from a file system."""
        # What is yet to be downloaded has no stamp.
        return any(is_remote(file.path) and file.stamp is not None for one in self.inputs for file in one.files)

    @property
    def sweep_bytes(self) -> int:
        """Bytes of one full sweep over the inputs."""
        return sum(t.nbytes for tensor in self.tensors for t in tensor.sources if t is not None)

    @property
    def copied_bytes(self) -> int:
        return sum(c.read_bytes for c in self.copies)

    @property
    def reads(self) -> object:
        """Plans of which this is equal share what is found out about the models, and what was fetched of them."""
        return self.inputs, [(tensor.first, tensor.sources) for tensor in self.tensors], self.bounds

    @property
    def repeated_bytes(self) -> int:
        """What is read once more: for copies in the output, and to compare the stored copies of the inputs whole."""
        again = sum(t.nbytes for one in self.again for t in self.tensors[one.tensor].sources if t is not None)
        return again + sum(2 * twin.copy.nbytes for twin in self.twins)

    @property
    def written_bytes(self) -> int:
        return sum(f.size for f in self.files)

    def has_matrices(self, segment: Segment) -> bool:
        """Whether its tensor is merged, or calibrated, by whole matrices."""
        return bool(self.views and self.views[segment.tensor])

    def dtypes_of(self, source: int) -> set[str]:
        """The dtypes that merged tensors have in the base (0) or a model (1..N); none for a base that is not read."""
        return {t.dtype for tensor in self.tensors if (t := tensor.sources[source]) is not None}

    def places(self, wanted: Ranks) -> list[dict[str, int]]:
        """For each model the ranks that a pass looks for, by name."""
        return [{name: place(self.D, own) for name, place in wanted.places.items()} for own in self.settings.of_model]

    # --- pieces -----------------------------------------------------------------------------------------------------------------

    @cached_property
    def bounds(self) -> Sequence[int]:
        """Where chunks begin, and D: chunk k has elements bounds[k]..bounds[k + 1] - 1. For a method that must see whole tensors,
        none is cut."""
        size = self.sizes.chunk_elements
        if self.method.unit != "tensor" and not self.views:
            return [*range(0, self.D, size), self.D]
        found = [0]
        for tensor in self.tensors:
            if tensor.first - found[-1] >= size:
                found.append(tensor.first)
        return [*found, self.D]

    @property
    def chunks(self) -> int:
        return len(self.bounds) - 1

    def cells_of(self, chunk: int) -> list[Segment]:
        """The segments of a chunk, one for each of its tensors."""
        return list(self.segments(self.bounds[chunk], self.bounds[chunk + 1]))

    def chunks_of_file(self, number: int) -> Iterator[int]:
        """The same of a whole file."""
        for part in self.parts_of(number):
            yield from self.chunks_of_part(part)

    def chunks_of_part(self, number: int) -> Iterator[int]:
        """The chunks that a part of the output is made from, one for each of its cells."""
        for segment in self.parts[number].segments:
            if isinstance(segment, Segment):
                yield self._chunk_at(self.tensors[segment.tensor].first + segment.start)

    def cell_of(self, segment: Segment) -> int:
        """The number of the first element of the cell that holds this segment."""
        tensor = self.tensors[segment.tensor]
        return max(tensor.first, self.bounds[self._chunk_at(tensor.first + segment.start)])

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        """The output in pieces that are about as large as a chunk, file by file."""
        found: list[Part] = []
        pieces: list[list[tuple[int, int, Segment | Copied]]] = [[] for _ in self.files]  # (first byte, bytes, segment) by file
        for index, tensor in enumerate(self.tensors):
            itemsize = DTYPE_BYTES[tensor.slot.dtype]
            for cell in self._cells_of_tensor(index):
                size = (cell.stop - cell.start) * itemsize
                pieces[tensor.slot.file].append((tensor.slot.start + cell.start * itemsize, size, cell))
        for index, copy in enumerate(self.copies):
            for start in range(0, copy.written_bytes, self.sizes.copy_bytes):
                stop = min(start + self.sizes.copy_bytes, copy.written_bytes)
                pieces[copy.slot.file].append((copy.slot.start + start, stop - start, Copied(index, start, stop)))
        for index, copied in enumerate(self.again):
            itemsize = DTYPE_BYTES[copied.slot.dtype]
            for cell in self._cells_of_tensor(copied.tensor):
                piece = dataclasses.replace(cell, again=index)
                size = (cell.stop - cell.start) * itemsize
                pieces[copied.slot.file].append((copied.slot.start + cell.start * itemsize, size, piece))
        for number, (file, of_file) in enumerate(zip(self.files, pieces, strict=True)):
            start, stop, segments = 0, len(file.header), list[Segment | Copied]()
            for first, size, segment in sorted(of_file, key=lambda piece: piece[0]):
                if first != stop:
                    raise AssertionError(f"{file.name}: byte {stop} belongs to no tensor")
                if segments and stop - start >= 2 * self.sizes.chunk_elements:
                    found.append(Part(number, start, stop, tuple(segments)))
                    start, segments = stop, []
                segments.append(segment)
                stop = first + size
            found.append(Part(number, start, stop, tuple(segments)))
        return tuple(found)

    def parts_of(self, file: int) -> Sequence[int]:
        """The parts of one output file, from its first byte to its last."""
        return range(
            bisect.bisect_left(self.parts, file, key=lambda part: part.file),
            bisect.bisect_right(self.parts, file, key=lambda part: part.file),
        )

    def part_bytes(self, number: int) -> int:
        """What a part of the output takes."""
        return self.parts[number].stop - self.parts[number].start

    def expected_s(self, number: int) -> float:
        """How many seconds a core may take for a part of the output with matrices: by their operations, and by its bytes."""
        operations = sum(
            view.rows * view.columns * min(view.shape)
            for one in self.parts[number].segments
            if isinstance(one, Segment) and self.has_matrices(one)
            for view in self.views[one.tensor]
        )
        return OPERATIONS * self.N * operations / SLOWEST_CORE + self.part_bytes(number) / UNHURRIED

    def ranges_of(self, segments: Iterable[Segment | Copied]) -> Iterator[Range]:
        """The bytes of the inputs that these segments are made from."""
        for one in segments:
            if isinstance(one, Copied):
                copy = self.copies[one.copy]
                for source in copy.models or (copy.source,):
                    share = source.numel * DTYPE_BYTES[source.dtype] / copy.written_bytes  # a mean may be written in another dtype
                    yield Range(source.file, source.start + int(one.start * share), source.start + int(one.stop * share))
                continue
            for merged in self.tensors[one.tensor].sources:
                if merged is not None and one.start < one.stop:
                    itemsize = DTYPE_BYTES[merged.dtype]
                    yield Range(merged.file, merged.start + one.start * itemsize, merged.start + one.stop * itemsize)

    def _chunk_at(self, element: int) -> int:
        """The chunk that holds this element of the model."""
        return bisect.bisect_right(self.bounds, element) - 1

    def _cells_of_tensor(self, index: int) -> Iterator[Segment]:
        tensor = self.tensors[index]
        chunk, at = self._chunk_at(tensor.first), 0
        while at < tensor.numel:
            stop = min(self.bounds[chunk + 1] - tensor.first, tensor.numel)
            yield Segment(index, at, stop)
            chunk, at = chunk + 1, stop

    def segments(self, first: int, stop: int) -> Iterator[Segment]:
        """The pieces of tensors that make up elements first..stop-1 of the model."""
        at = bisect.bisect_right(self._firsts, first) - 1
        while first < stop:
            tensor = self.tensors[at]
            end = min(stop, tensor.first + tensor.numel)
            if end > first:
                yield Segment(at, first - tensor.first, end - tensor.first)
                first = end
            at += 1

    @cached_property
    def _firsts(self) -> list[int]:
        return [t.first for t in self.tensors]

    # --- as JSON ----------------------------------------------------------------------------------------------------------------

    @property
    def tensors_sha256(self) -> str:
        """What is merged with what, and where it lies in the files: it follows from headers, but also from values (of copies) and
        from the tables of transformers (of what is packed)."""
        told = hashlib.sha256()
        for tensor in self.tensors:
            places = [None if t is None else (os.path.basename(t.file), t.start, t.dtype) for t in tensor.sources]
            told.update(repr((tensor.name, tensor.first, tensor.numel, places)).encode())
        if self.views:
            told.update(repr(self.views).encode())
        return told.hexdigest()

    def _matrices(self) -> list[dict[str, Any]]:
        return [
            {"tensor": tensor.name, "matrices": [list(view.shape) for view in views], "turned": any(v.down == 1 for v in views)}
            for tensor, views in zip(self.tensors, self.views, strict=False)
        ]

    def fingerprint(self) -> dict[str, Any]:
        """All that decides the output's bytes, as JSON values: what a resumed run must share with the run it continues."""
        code = self.recipe.code
        return {
            "recipe": dataclasses.replace(self.recipe, storage={}).to_yaml(),  # another cluster may reach stores otherwise
            "code_sha256": None if code is None else code.sha256,
            "inputs": [
                {"source": i.source, "commit": i.commit, "files": [[f.path, f.size, f.header_sha256] for f in i.files]}
                for i in self.inputs
            ],
            "output": [[f.name, f.size, hashlib.sha256(f.header).hexdigest()] for f in self.files],
            "sizes": dataclasses.asdict(self.sizes),
            "tensors": self.tensors_sha256,
        }

    def summary(self) -> dict[str, Any]:
        """The plan as JSON values, for `pcb-ray plan --json`."""
        why: dict[str, int] = {}
        for copy in self.copies:
            why[copy.why] = why.get(copy.why, 0) + 1
        method = self.method
        return {
            "method": method.full_name,
            "parameters": {name: list(self.settings.each(name)) for name, p in method.parameters.items() if p.per_model}
            | {name: self.settings[name] for name, p in method.parameters.items() if not p.per_model}
            | ({method.scale: sorted({t.lambda_ for t in self.tensors})} if self.recipe.lambda_by_tensor else {}),
            "N": self.N,
            "D": self.D,
            "inputs": [
                {"source": i.source, "commit": i.commit, "files": len(i.files), "bytes": sum(f.size for f in i.files)}
                for i in self.inputs
            ],
            "tensors_merged": len(self.tensors),
            "tensors_copied": why,
            "copied": [{"name": c.source.name, "why": c.why, "bytes": c.source.nbytes} for c in self.copies],
            "tied": dict(self.tied),
            "copies": {one.name: self.tensors[one.tensor].name for one in self.again},
            "untied": list(self.untied),
            "dropped": list(self.dropped),
            "sweeps": method.sweeps,
            "bytes_per_sweep": self.sweep_bytes,
            "bytes_read": method.sweeps * self.sweep_bytes + self.copied_bytes + self.repeated_bytes,
            "bytes_written": self.written_bytes,
            "relation": None if self.relation is None else json.loads(json.dumps(dataclasses.asdict(self.relation))),
            "files_along": [{"name": f.name, "bytes": f.size} for f in self.along],
            "files_left_out": [{"name": f.name, "bytes": f.size, "why": f.left_out} for f in self.left_out],
            "matrices": self._matrices(),
            "output_files": [{"name": f.name, "bytes": f.size} for f in self.files],
            "chunks": self.chunks,
            "parts": len(self.parts),
            "notes": list(self.notes),
        }


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The checkpoints of a recipe, opened once."""

    base: Checkpoint
    """The base; for a method without one, whose layout, config and tokenizer the output gets."""
    models: tuple[Checkpoint, ...]
    tokenizer: Checkpoint
    """Where the tokenizer is taken from: one of the others."""
    samples: Samples = dataclasses.field(default_factory=lambda: Samples(open_store()), compare=False)
    """Compares tensors that may be copies of each other."""
    apart: frozenset[Apart] = frozenset()
    """Those that are known to differ, although the sample finds them equal."""
    notes: tuple[str, ...] = ()
    """What the files beside the tensors tell: of vocabularies, and of the base that a model was tuned from."""
    problems: tuple[str, ...] = ()
    """What is wrong with the tokenizer that the output would have."""

    @property
    def on_hub(self) -> bool:
        """Whether some are models of the Hub that `fetched` downloads: those that are not read where they are."""
        return any(_is_of_cache(one) for one in (self.base, *self.models, self.tokenizer))


def open_inputs(recipe: Recipe) -> Inputs:
    """All checkpoints of the recipe, by their headers; each is looked up once. Raises RequestError with all that is wrong with any
    of them."""
    return _opened(recipe, lambda source: open_checkpoint(source, recipe.folder, storage=recipe.storage))


def fetched(recipe: Recipe, inputs: Inputs) -> Inputs:
    """The same with models of the Hub in its cache, each at the commit that was found when it was opened. Raises RequestError."""
    at = {c.source: c for c in (inputs.base, *inputs.models, inputs.tokenizer)}

    def fetch(source: str) -> Checkpoint:
        before = at[source]
        if not _is_of_cache(before):
            return before
        found = open_checkpoint(source, recipe.folder, download=True)
        if found.commit != before.commit:  # the branch has moved meanwhile
            pinned = f"{source.partition('@')[0]}@{before.commit}"
            found = dataclasses.replace(open_checkpoint(pinned, recipe.folder, download=True), source=source)
        at[source] = found
        return found

    def open_again(source: str) -> Checkpoint:
        return open_checkpoint(source, recipe.folder, storage=recipe.storage)

    _opened(recipe, fetch)
    # A download may take hours, in which a local model may become another one.
    return _opened(recipe, lambda source: open_again(source) if at[source].commit is None else at[source])


def _is_of_cache(one: Checkpoint) -> bool:
    """Whether it is a model of the Hub that is read in the Hub's cache."""
    return one.commit is not None and one.prefix is None


def _opened(recipe: Recipe, opened: Callable[[str], Checkpoint]) -> Inputs:
    base = recipe.base_model or recipe.models[0].source
    tokenizer = base if recipe.tokenizer_source == "base" else recipe.tokenizer_source
    found: dict[str, Checkpoint] = {}
    problems: list[str] = []
    sources = list(dict.fromkeys((base, *(m.source for m in recipe.models), tokenizer)))
    at_once = OPENED_AT_ONCE if any(map(is_remote, sources)) else 1  # on a disk there is nothing to wait for
    with ThreadPoolExecutor(at_once) as pool:
        for source, opening in [(source, pool.submit(opened, source)) for source in sources]:
            try:
                found[source] = opening.result()
            except RequestError as error:
                problems += error.problems
    if problems:
        raise RequestError(problems)
    samples = Samples(open_store(storage=recipe.storage))
    inputs = Inputs(found[base], tuple(found[m.source] for m in recipe.models), found[tokenizer], samples)
    notes: list[str] = []
    wrong = check_vocabularies(inputs.base, inputs.models, inputs.tokenizer, notes)
    if recipe.method.has_base:
        notes += other_bases(inputs.base, inputs.models)
    return dataclasses.replace(inputs, notes=tuple(notes), problems=tuple(wrong))


def plan(
    recipe: Recipe | Mapping[str, Any] | str | os.PathLike[str],
    *,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    allow_code: bool = False,
) -> Plan:
    """The plan of a recipe (or of its file, or of the dictionary that such a file holds), from headers, and a sample of models that
    lie on disk. `allow_code` is as in `merge`.

    Raises RequestError with everything that is wrong with the inputs.
    """
    recipe = Recipe.of(recipe, allow_code=allow_code)
    inputs = open_inputs(recipe)
    made = plan_of(recipe, inputs, max_shard_bytes=max_shard_bytes)
    if inputs.on_hub:
        return made
    with contextlib.closing(open_store(storage=recipe.storage)) as store:
        return related(made, store)


def related(plan: Plan, store: Store) -> Plan:
    """The plan with how its models stand to the base, from a sample of inputs that lie on disk. Raises RequestError for models that
    are no fine-tunes of the base, unless the recipe allows them."""
    relation = relation_of(plan, store)
    if relation is None:
        return plan
    return dataclasses.replace(plan, relation=relation, notes=(*plan.notes, *notes_on(plan, relation)))


def plan_of(recipe: Recipe, inputs: Inputs, *, max_shard_bytes: int = DEFAULT_SHARD_BYTES, sizes: Sizes | None = None) -> Plan:
    """The plan for inputs that are open; of their tensors, only samples of those that may be copies are read for it. `sizes` are
    those that suit the model, unless given. Raises RequestError."""
    method, n = recipe.method, len(recipe.models)
    checkpoints = (inputs.base, *inputs.models)
    notes = list(dict.fromkeys([*recipe.notes, *(note for c in (*checkpoints, inputs.tokenizer) for note in c.notes)]))
    unused = [key for key in ("search", "sweep") if getattr(recipe, key) is not None]
    notes += [f"`{key}` has no effect on a merge: it is for `pcb-ray {key}`." for key in unused]

    try:
        matched = match(checkpoints, recipe.exclude, inputs.samples, inputs.apart, notes)
    except RequestError as error:
        raise RequestError([*error.problems, *inputs.problems]) from None
    merged_names, copied = matched.merged, matched.copied
    base_tensors = matched.tensors[0]

    D = sum(base_tensors[name].numel for name in merged_names)
    # Output: the tensors in the base's order, cut into files at the wanted size.
    keep = {*merged_names, *copied, *matched.averaged}
    dtypes = {name: base_tensors[name].dtype if name in copied else _output_dtype(recipe, base_tensors[name]) for name in keep}
    copied |= {name: "empty" for name in merged_names if base_tensors[name].numel == 0}  # nothing to merge, but the output has it
    again = {name: original for name, original in matched.ties.copies.items() if original in keep}
    dtypes |= {name: dtypes[original] for name, original in again.items()}
    shapes = {name: base_tensors[again.get(name, name)].shape for name in dtypes}
    parts = {name: part for name, part in matched.parts.items() if name in dtypes}
    for part in parts.values():
        packed = inputs.base.tensors[part.of]
        dtypes[part.of], shapes[part.of] = _output_dtype(recipe, packed), packed.shape
    order = list(dict.fromkeys(parts[name].of if name in parts else name for name in matched.ties.order if name in dtypes))
    files, slots = _lay_out(order, shapes, dtypes, max_shard_bytes, inputs.base)
    for name, part in parts.items():
        whole = slots[part.of]
        slots[name] = Slot(whole.file, whole.start + part.first * DTYPE_BYTES[whole.dtype], whole.dtype)

    depths = depths_of((*inputs.base.tensors, *merged_names))  # a layer that is excluded counts
    tensors, first = [], 0
    for name in merged_names:
        base = base_tensors[name]
        if name in copied:
            continue
        sources = tuple(None if k == 0 and not method.has_base else of_one[name] for k, of_one in enumerate(matched.tensors))
        part_of = parts[name].of if name in parts else ""
        shown = part_of or name
        weights = tuple(recipe.weight(i, shown, depths[shown]) for i in range(n))
        lambda_ = recipe.lambda_(shown, depths[shown])
        tensors.append(MergedTensor(name, first, base.numel, sources, slots[name], weights, lambda_, part_of))
        first += base.numel
    if any(t.dtype == "F64" for tensor in tensors for t in tensor.sources if t is not None):
        notes.append("float64 tensors are read as float32, and written as float32 unless `dtype` says otherwise")
    index = {tensor.name: k for k, tensor in enumerate(tensors)}
    along, left_out = _beside(recipe, inputs, notes)
    notes += inputs.notes
    if inputs.problems:
        raise RequestError(inputs.problems)
    views = _views(recipe, inputs.base, tensors, notes)
    made = Plan(
        recipe=recipe,
        inputs=tuple(Input(c.source, c.commit, c.files) for c in checkpoints),
        D=D,
        tensors=tuple(tensors),
        copies=(
            *(CopiedTensor(base_tensors[name], slots[name], why) for name, why in copied.items()),
            *(CopiedTensor(base_tensors[name], slots[name], MEAN, models) for name, models in matched.averaged.items()),
        ),
        tied=tuple(matched.ties.left_out.items()),
        again=tuple(WrittenAgain(name, index[original], slots[name]) for name, original in again.items()),
        untied=matched.ties.untied,
        twins=matched.ties.twins,
        apart=tuple(sorted(inputs.apart)),
        packed=tuple((name, slots[name]) for name in dict.fromkeys(part.of for part in parts.values())),
        dropped=matched.dropped,
        files=files,
        sizes=sizes or Sizes.of(D),
        library=inputs.base.library,
        along=along,
        left_out=left_out,
        views=views,
        notes=tuple(notes),
    )
    problems = [
        f"{t.name}: {problem}: {list(t.weights)}. Fix: change a weight."
        for t in tensors
        if (problem := method.wrong_weights(t.weights))
    ]
    problems += method.impossible(made.settings, made.names)
    if not problems:  # what is impossible may have no ranks either
        problems += _wrong_ranks(made)
    if problems:
        raise RequestError(problems)
    return made


def _views(recipe: Recipe, base: Checkpoint, tensors: Sequence[MergedTensor], notes: list[str]) -> tuple[tuple[View, ...], ...]:
    """The matrices of each tensor, where the recipe has use for them. Raises RequestError for a split that does not add up."""
    method, n = recipe.method, len(recipe.models)
    if method.of_matrix is None and not recipe.calibrate:
        return ()
    known = layers_of(base.config)
    found, too_small, problems = list[tuple[View, ...]](), [], []
    for tensor in tensors:
        layer = layer_of(tensor.name, tensor.shape, known)
        if matches(tensor.name, recipe.rest_tensors):
            layer = "none"
        elif matches(tensor.name, recipe.transpose):
            layer = TURNED[layer]
        split = next((sizes for pattern, sizes in recipe.split if matches(tensor.name, (pattern,))), ())
        views = views_of(tensor.shape, layer, split)
        if split and views and (problem := split_problem(tensor.shape, layer, split)):
            problems.append(f"split: {tensor.name}: {problem}")
        if not all(method.fits(view.shape, n) for view in views):
            too_small.append(tensor.name)
            views = ()
        found.append(views)
    if problems:
        raise RequestError(problems)
    if known is None:
        notes.append(
            "which tensors are matrices, and that their rows are outputs, is taken from names and shapes, since transformers does "
            "not know the model's class; `pcb-ray plan` lists them, `transpose` and `rest_tensors` change it"
        )
    if too_small:
        notes.append(f"{some(too_small)}: too small for {method.full_name} of {n} models, and merged as what is no matrix is")
    return tuple(found)


def _beside(recipe: Recipe, inputs: Inputs, notes: list[str]) -> tuple[tuple[Along, ...], tuple[Beside, ...]]:
    """The files beside the tensors that go along, and those that stay behind. Raises RequestError if the tokenizer is nowhere."""
    base, tokenizer = inputs.base, inputs.tokenizer
    listed = [(one, False) for one in base.beside]

    def of_tokenizer(name: str) -> bool:
        return name.startswith(base.inner) and is_of_tokenizer(name.removeprefix(base.inner))

    if tokenizer is not base:
        theirs = [dataclasses.replace(one, name=base.inner + one.name) for one in tokenizer.own if is_of_tokenizer(one.name)]
        names = {one.name for one in theirs}
        if not any(has_tokenizer(one.name) for one in tokenizer.own if not one.left_out):
            raise RequestError(
                f"tokenizer_source: wanted a model with a tokenizer beside it, found no file of one in {tokenizer.source}. "
                "Fix: name another model, or write `tokenizer_source: base`."
            )
        # What it has of generation settings is taken with it; where it has none the base's stay.
        own_settings = base.inner + GENERATION_CONFIG
        replaced = [of_tokenizer(one.name) and (one.name != own_settings or one.name in names) for one in base.beside]
        why = f"the tokenizer is taken from {tokenizer.source}"
        listed = [(_left_out(one, why) if gone else one, False) for one, gone in zip(base.beside, replaced, strict=True)]
        listed += [(one, True) for one in theirs]
    if recipe.chat_template is not None:  # loaders would prefer the older form
        older = base.inner + "chat_template.json"
        listed = [(_left_out(one, "the recipe has another") if one.name == older else one, k) for one, k in listed]
    needed = [
        f"{(tokenizer if theirs else base).source}/{one.name}: wanted a file that can go along into the output, which can't be "
        f"loaded without it, found {one.left_out}. Fix: put the file itself there (`cp -rL` follows links)."
        for one, theirs in listed
        if one.left_out in (LEADS_OUT, LEADS_NOWHERE) and (one.is_needed or _loaders_need(one.name, base))
    ]
    if needed:
        raise RequestError(needed)
    along = tuple(Along(one.name, one.size, theirs) for one, theirs in listed if not one.left_out)
    left_out = tuple(one for one, _ in listed if one.left_out)
    notes += [f"{one.name} does not go along: {one.left_out}" for one in left_out if one.is_surprising]
    notes += _kept_parts(inputs, [one.name for one in along if one.name.endswith(WEIGHT_SUFFIXES)])
    if not any(has_tokenizer(one.name.removeprefix(base.inner)) for one in along):
        others = [c.source for c in inputs.models if any(has_tokenizer(one.name) for one in c.own)]
        if others:
            notes.append(f"the output has no tokenizer, since the base has none; `tokenizer_source: {others[0]}` takes that one's")
    return along, left_out


def _kept_parts(inputs: Inputs, names: Sequence[str]) -> list[str]:
    """Notes on weights that go along as the base has them, and on models that have others there: what they trained is lost."""
    notes = [f"{name} goes along as the base has it: it is not merged" for name in names]
    sizes = {one.name: one.size for one in inputs.base.beside}
    for model in inputs.models:
        theirs = {one.name: one.size for one in model.beside}
        differing = [
            name
            for name in names
            if name in theirs and (theirs[name] != sizes[name] or not _are_alike(inputs, model, name, sizes[name]))
        ]
        if differing:
            notes.append(f"{model.source}: has another {some(differing)}, which is not merged: what it trained there is lost")
    return notes


def _are_alike(inputs: Inputs, model: Checkpoint, name: str, size: int) -> bool:
    """Whether a file of a model and the base's are the same, as far as a sample tells and both are here."""
    if inputs.base.folder is None or model.folder is None:
        return True
    ours, theirs = (Tensor(name, "U8", (size,), str(one.folder / name), 0) for one in (inputs.base, model) if one.folder)
    return inputs.samples.are_equal(ours, theirs) is not False


def _loaders_need(name: str, base: Checkpoint) -> bool:
    """Whether loaders of the output look for the file: a tokenizer's, code, a config that is not written anew."""
    name = name.removeprefix(base.inner)
    return has_tokenizer(name) or name.endswith(".py") or (name == CONFIG and base.library != "transformers")


def _left_out(one: Beside, why: str) -> Beside:
    return one if one.left_out else dataclasses.replace(one, left_out=why)


def _wrong_ranks(plan: Plan) -> list[str]:
    """Ranks that no element can have."""
    return [
        f"merge_method: the rank of {name} of {plan.method.full_name}: wanted a whole number from 0 to {plan.D - 1}, found "
        f"{rank!r} for {source}. Fix: mend the method's `places`."
        for wanted in plan.method.passes
        if isinstance(wanted, Ranks)
        for source, of_model in zip(plan.names, plan.places(wanted), strict=True)
        for name, rank in of_model.items()
        if type(rank) is not int or not 0 <= rank < plan.D
    ]


def _output_dtype(recipe: Recipe, tensor: Tensor) -> str:
    if recipe.dtype is not None:
        return DTYPES[recipe.dtype]
    return "F32" if tensor.dtype == "F64" else tensor.dtype


def _lay_out(
    order: Sequence[str], shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, str], max_shard_bytes: int, base: Checkpoint
) -> tuple[tuple[OutputFile, ...], dict[str, Slot]]:
    """Output files of at most this size (a larger tensor has a file of its own) and each tensor's place. There is one file if the
    base's loader looks for no other."""

    def nbytes(name: str) -> int:
        return math.prod(shapes[name]) * DTYPE_BYTES[dtypes[name]]

    shards: list[list[str]] = [[]]
    size = 0
    for name in order:
        if shards[-1] and size + nbytes(name) > max_shard_bytes and base.stem in SHARDED:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += nbytes(name)
    files, slots, stem = [], {}, base.inner + base.stem
    for index, names in enumerate(shards):
        # Wide types first: then every tensor lies aligned to its type, as readers like it.
        names.sort(key=lambda name: -DTYPE_BYTES[dtypes[name]])
        header = safetensors_header([(name, dtypes[name], shapes[name]) for name in names], {"format": "pt"})
        at = len(header)
        for name in names:
            slots[name] = Slot(index, at, dtypes[name])
            at += nbytes(name)
        file = f"{stem}.safetensors" if len(shards) == 1 else f"{stem}-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        files.append(OutputFile(file, header, at))
    return tuple(files), slots
