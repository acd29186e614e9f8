"""What a merge will do, known from headers alone: a pure function of the recipe and the files, comparable with ==.

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
import dataclasses
import fnmatch
import glob
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

from pcb_ray.errors import RequestError
from pcb_ray.files.checkpoint import DTYPE_BYTES, FLOAT_DTYPES, Checkpoint, File, Tensor, open_checkpoint, safetensors_header
from pcb_ray.methods import Method, Ranks, Settings
from pcb_ray.recipe import DTYPES, Recipe

DEFAULT_SHARD_BYTES = 5 * 10**9  # as save_pretrained users expect


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


# Output heads that share the weights of the input embedding in models with `tie_word_embeddings`.
HEADS = (
    "lm_head.weight",
    "embed_out.weight",
    "cls.predictions.decoder.weight",
    "lm_head.decoder.weight",
    "output_projection.weight",
)
EMBEDDINGS = (
    *("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight", "tok_embeddings.weight"),
    *("shared.weight", "embeddings.weight", "embedding.weight"),
)


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

    @property
    def shape(self) -> tuple[int, ...]:
        return next(source.shape for source in self.sources if source is not None)


@dataclasses.dataclass(frozen=True, slots=True)
class CopiedTensor:
    """A tensor of the base that is written as it is, and why."""

    source: Tensor
    slot: Slot
    why: str


@dataclasses.dataclass(frozen=True, slots=True)
class OutputFile:
    name: str
    header: bytes
    size: int


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


@dataclasses.dataclass(frozen=True, slots=True)
class Copied:
    """Bytes start..stop-1 of one copied tensor."""

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
    twins: tuple[tuple[int, Tensor, Tensor], ...]  # stored copies of tied tensors: input, copy, original; they must be equal
    dropped: tuple[str, ...]  # excluded tensors that only models have
    files: tuple[OutputFile, ...]
    sizes: Sizes
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
    def sweep_bytes(self) -> int:
        """Bytes of one full sweep over the inputs."""
        return sum(t.nbytes for tensor in self.tensors for t in tensor.sources if t is not None)

    @property
    def copied_bytes(self) -> int:
        return sum(c.source.nbytes for c in self.copies)

    @property
    def written_bytes(self) -> int:
        return sum(f.size for f in self.files)

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
        if self.method.unit != "tensor":
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

    def cell_of(self, segment: Segment) -> int:
        """The number of the first element of the cell that holds this segment."""
        tensor = self.tensors[segment.tensor]
        chunk = bisect.bisect_right(self.bounds, tensor.first + segment.start) - 1
        return max(tensor.first, self.bounds[chunk])

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
            for start in range(0, copy.source.nbytes, self.sizes.copy_bytes):
                stop = min(start + self.sizes.copy_bytes, copy.source.nbytes)
                pieces[copy.slot.file].append((copy.slot.start + start, stop - start, Copied(index, start, stop)))
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

    def part_bytes(self, number: int) -> int:
        """What a part of the output takes."""
        return self.parts[number].stop - self.parts[number].start

    def _cells_of_tensor(self, index: int) -> Iterator[Segment]:
        tensor = self.tensors[index]
        chunk, at = bisect.bisect_right(self.bounds, tensor.first) - 1, 0
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

    def fingerprint(self) -> dict[str, Any]:
        """All that decides the output's bytes, as JSON values: what a resumed run must share with the run it continues."""
        code = self.recipe.code
        return {
            "recipe": self.recipe.to_yaml(),
            "code_sha256": None if code is None else code.sha256,
            "inputs": [dataclasses.asdict(i) for i in self.inputs],
            "output": [[f.name, f.size, hashlib.sha256(f.header).hexdigest()] for f in self.files],
            "sizes": dataclasses.asdict(self.sizes),
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
            | {name: self.settings[name] for name, p in method.parameters.items() if not p.per_model},
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
            "dropped": list(self.dropped),
            "sweeps": method.sweeps,
            "bytes_per_sweep": self.sweep_bytes,
            "bytes_read": method.sweeps * self.sweep_bytes + self.copied_bytes,
            "bytes_written": self.written_bytes,
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

    @property
    def on_hub(self) -> bool:
        """Whether some are models of the Hub, which `fetched` downloads."""
        return any(one.commit is not None for one in (self.base, *self.models, self.tokenizer))


def open_inputs(recipe: Recipe) -> Inputs:
    """All checkpoints of the recipe, by their headers; each is looked up once. Raises RequestError with all that is wrong with any
    of them."""
    return _opened(recipe, lambda source: open_checkpoint(source, recipe.folder))


def fetched(recipe: Recipe, inputs: Inputs) -> Inputs:
    """The same with models of the Hub in its cache, each at the commit that was found when it was opened. Raises RequestError."""
    at = {c.source: c for c in (inputs.base, *inputs.models, inputs.tokenizer)}

    def fetch(source: str) -> Checkpoint:
        before = at[source]
        if before.commit is None:
            return before
        found = open_checkpoint(source, recipe.folder, download=True)
        if found.commit != before.commit:  # the branch has moved meanwhile
            pinned = f"{source.split('@')[0]}@{before.commit}"
            found = dataclasses.replace(open_checkpoint(pinned, recipe.folder, download=True), source=source)
        at[source] = found
        return found

    _opened(recipe, fetch)
    # A download may take hours, in which a local model may become another one.
    return _opened(recipe, lambda source: open_checkpoint(source, recipe.folder) if at[source].commit is None else at[source])


def _opened(recipe: Recipe, opened: Callable[[str], Checkpoint]) -> Inputs:
    base = recipe.base_model or recipe.models[0].source
    tokenizer = base if recipe.tokenizer_source == "base" else recipe.tokenizer_source
    found: dict[str, Checkpoint] = {}
    problems: list[str] = []
    for source in dict.fromkeys((base, *(m.source for m in recipe.models), tokenizer)):
        try:
            found[source] = opened(source)
        except RequestError as error:
            problems += error.problems
    if problems:
        raise RequestError(problems)
    return Inputs(found[base], tuple(found[m.source] for m in recipe.models), found[tokenizer])


def plan(recipe: Recipe | Mapping[str, Any] | str | os.PathLike[str], *, max_shard_bytes: int = DEFAULT_SHARD_BYTES) -> Plan:
    """The plan of a recipe (or of its file, or of the dictionary that such a file holds), from headers alone.

    Raises RequestError with everything that is wrong with the inputs.
    """
    recipe = Recipe.of(recipe)
    return plan_of(recipe, open_inputs(recipe), max_shard_bytes=max_shard_bytes)


def plan_of(recipe: Recipe, inputs: Inputs, *, max_shard_bytes: int = DEFAULT_SHARD_BYTES, sizes: Sizes | None = None) -> Plan:
    """The plan for inputs that are open; pure. `sizes` are those that suit the model, unless given. Raises RequestError."""
    method, n = recipe.method, len(recipe.models)
    checkpoints = (inputs.base, *inputs.models)
    notes = list(recipe.notes)
    unused = [key for key in ("search", "sweep") if getattr(recipe, key) is not None]
    notes += [f"`{key}` has no effect on a merge: it is for `pcb-ray {key}`." for key in unused]

    stored = [_untie(c) for c in checkpoints]
    merged_names, copied, dropped = _match(recipe, [tensors for tensors, _, _ in stored], [c.source for c in checkpoints], notes)
    twins = tuple((index, copy, original) for index, (_, _, pairs) in enumerate(stored) for copy, original in pairs)
    base_tensors, tied, _ = stored[0]

    D = sum(base_tensors[name].numel for name in merged_names)
    # Output: the tensors in the base's order, cut into files at the wanted size.
    keep = set(merged_names) | set(copied)
    dtypes = {name: base_tensors[name].dtype if name in copied else _output_dtype(recipe, base_tensors[name]) for name in keep}
    copied |= {name: "empty" for name in merged_names if base_tensors[name].numel == 0}  # nothing to merge, but the output has it
    order = [name for name in base_tensors if name in keep]
    files, slots = _lay_out(order, base_tensors, dtypes, max_shard_bytes)

    tensors, first = [], 0
    for name in merged_names:
        base = base_tensors[name]
        if name in copied:
            continue
        sources = tuple(None if k == 0 and not method.has_base else tensors_of[name] for k, (tensors_of, _, _) in enumerate(stored))
        weights = tuple(recipe.weight(i, name) for i in range(n))
        tensors.append(MergedTensor(name, first, base.numel, sources, slots[name], weights))
        first += base.numel
    if any(t.dtype == "F64" for tensor in tensors for t in tensor.sources if t is not None):
        notes.append("float64 tensors are read as float32, and written as float32 unless `dtype` says otherwise")
    made = Plan(
        recipe=recipe,
        inputs=tuple(Input(c.source, c.commit, c.files) for c in checkpoints),
        D=D,
        tensors=tuple(tensors),
        copies=tuple(CopiedTensor(base_tensors[name], slots[name], why) for name, why in copied.items()),
        tied=tuple(tied.items()),
        twins=twins,
        dropped=tuple(dropped),
        files=files,
        sizes=sizes or Sizes.of(D),
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


def ties_word_embeddings(config: Mapping[str, Any] | None) -> bool | None:
    """What config.json says about tied embeddings; None if it is silent."""
    for part in (config or {}), (config or {}).get("text_config"):
        if isinstance(part, Mapping) and isinstance(part.get("tie_word_embeddings"), bool):
            return bool(part["tie_word_embeddings"])
    return None


def _untie(checkpoint: Checkpoint) -> tuple[dict[str, Tensor], dict[str, str], list[tuple[Tensor, Tensor]]]:
    """The tensors that count, each tied one once; {name left out: name that stands for it}; stored copies that must equal their
    original."""
    tensors = dict(checkpoint.tensors)
    tied: dict[str, str] = {}
    twins: list[tuple[Tensor, Tensor]] = []
    for name, original in checkpoint.aliases.items():
        kept = tied.get(original, original)
        if ties_word_embeddings(checkpoint.config) is False:
            tensors[name] = dataclasses.replace(tensors[original], name=name)  # one storage, but the model expects both
        elif name.endswith(EMBEDDINGS) and kept.endswith(HEADS):  # the embedding is the name that loaders look for
            tensors[name] = dataclasses.replace(tensors.pop(kept), name=name)
            tied = {other: name if first == kept else first for other, first in tied.items()} | {kept: name}
        else:
            tied[name] = kept
    if ties_word_embeddings(checkpoint.config):
        for head in [name for name in tensors if name.endswith(HEADS)]:
            same = [
                t for t in tensors.values() if t.name.endswith(EMBEDDINGS) and t.name != head and t.shape == tensors[head].shape
            ]
            if same:
                original_tensor = min(
                    same, key=lambda t: (EMBEDDINGS.index(next(e for e in EMBEDDINGS if t.name.endswith(e))), t.name)
                )
                twins.append((tensors.pop(head), original_tensor))
                tied[head] = original_tensor.name
    return tensors, tied, twins


def _match(
    recipe: Recipe, tensors: Sequence[Mapping[str, Tensor]], sources: Sequence[str], notes: list[str]
) -> tuple[list[str], dict[str, str], list[str]]:
    """The names to merge (sorted), those to copy from the base and why, and those of models that are left out."""
    base, models = tensors[0], list(zip(tensors[1:], sources[1:], strict=True))
    excluded = _matcher(recipe.exclude)
    merged: list[str] = []
    copied: dict[str, str] = {}
    dropped: set[str] = set()
    wrong: set[str] = set()
    problems: list[str] = []
    for name, tensor in sorted(base.items()):
        if excluded(name):
            copied[name] = "excluded"
        elif tensor.dtype not in FLOAT_DTYPES:
            copied[name] = "integer"
        else:
            merged.append(name)
            for other, source in models:
                if name not in other:
                    problems.append(f"{name}: is in {sources[0]} with shape {list(tensor.shape)} but not in {source}")
                elif other[name].shape != tensor.shape:
                    problems.append(f"{name}: shape {list(tensor.shape)} in {sources[0]} but {list(other[name].shape)} in {source}")
                elif other[name].dtype not in FLOAT_DTYPES:
                    problems.append(f"{name}: dtype {tensor.dtype} in {sources[0]} but {other[name].dtype} in {source}")
                else:
                    continue
                wrong.add(name)
    for other, source in models:
        extra = sorted(set(other) - set(base))
        dropped.update(name for name in extra if excluded(name))
        for name in extra:
            if not excluded(name) and other[name].dtype in FLOAT_DTYPES:
                problems.append(f"{name}: is in {source} with shape {list(other[name].shape)} but not in {sources[0]}")
                wrong.add(name)
    if problems:
        lines = _exclude_lines(wrong, set(base) | {name for other, _ in models for name in other})
        fix = (
            "Fix: use models of one base, or keep the base's own tensors (and leave out what the base lacks) with\nexclude:\n"
            + "\n".join(f"  - {json.dumps(line)}" for line in lines)
        )
        raise RequestError(
            [
                *problems[:18],
                *([f"... and {len(problems) - 18} more mismatches"] if len(problems) > 18 else []),
                fix,
            ]  # 20 are shown
        )
    unused = [
        pattern for pattern in recipe.exclude if not any(fnmatch.fnmatchcase(name, pattern) for other in tensors for name in other)
    ]
    notes += [f"exclude: {pattern!r} matches no tensor" for pattern in unused]
    if sum(base[name].numel for name in merged) == 0:
        excluded_count = sum(why == "excluded" for why in copied.values())
        found = f"{len(copied)} tensors, of which {excluded_count} excluded and the rest of integer type"
        raise RequestError(f"{sources[0]}: wanted floating-point tensors to merge, found {found}. Fix: exclude fewer tensors.")
    return merged, copied, sorted(dropped)


def _matcher(patterns: Iterable[str]) -> Any:
    expressions = [re.compile(fnmatch.translate(p)) for p in patterns]
    return lambda name: any(e.match(name) for e in expressions)


def _exclude_lines(wrong: set[str], names: set[str]) -> list[str]:
    """A few patterns that match these names and no others: layer numbers become `*` where that is safe."""
    lines = set()
    for name in wrong:
        literal = glob.escape(name)
        pattern = re.sub(r"\d+", "*", literal)
        lines.add(pattern if {n for n in names if fnmatch.fnmatchcase(n, pattern)} <= wrong else literal)
    return sorted(lines)


def _output_dtype(recipe: Recipe, tensor: Tensor) -> str:
    if recipe.dtype is not None:
        return DTYPES[recipe.dtype]
    return "F32" if tensor.dtype == "F64" else tensor.dtype


def _lay_out(
    order: Sequence[str], tensors: Mapping[str, Tensor], dtypes: Mapping[str, str], max_shard_bytes: int
) -> tuple[tuple[OutputFile, ...], dict[str, Slot]]:
    """Output files of at most this size (a larger tensor has a file of its own) and each tensor's place."""

    def nbytes(name: str) -> int:
        return tensors[name].numel * DTYPE_BYTES[dtypes[name]]

    shards: list[list[str]] = [[]]
    size = 0
    for name in order:
        if shards[-1] and size + nbytes(name) > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += nbytes(name)
    files, slots = [], {}
    for index, names in enumerate(shards):
        # Wide types first: then every tensor lies aligned to its type, as readers like it.
        names.sort(key=lambda name: -DTYPE_BYTES[dtypes[name]])
        header = safetensors_header([(name, dtypes[name], tensors[name].shape) for name in names], {"format": "pt"})
        at = len(header)
        for name in names:
            slots[name] = Slot(index, at, dtypes[name])
            at += nbytes(name)
        file = "model.safetensors" if len(shards) == 1 else f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        files.append(OutputFile(file, header, at))
    return tuple(files), slots
