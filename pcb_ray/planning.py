"""What a merge will do, known from headers alone: a pure function of the recipe and the files, comparable with ==.

`plan(recipe)` opens every checkpoint (headers only), matches the tensors, and lays out the output; whatever is wrong with any of them is raised
at once. Owners, the driver and `verify` then only execute the plan.

The merged elements of the whole model are numbered 0..D-1: tensors in the order of their names, elements in C order. A *chunk* is a run of
`chunk_elements` of these numbers: the unit of progress, retry and resume, and fixed by the plan alone.
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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from pcb_ray.errors import RequestError
from pcb_ray.files.checkpoint import DTYPE_BYTES, FLOAT_DTYPES, Checkpoint, File, Tensor, open_checkpoint, safetensors_header
from pcb_ray.recipe import DTYPES, Recipe
from pcb_ray.selection import TALLY_BYTES

# Chunks: large enough that asking for one costs nothing beside computing it, small enough to share work evenly and to redo little.
MIN_CHUNK_ELEMENTS, MAX_CHUNK_ELEMENTS, CHUNKS_WANTED = 1 << 16, 1 << 22, 256
# Larger ones where they would become too many: three bases of a search are mapped, a file per chunk, and Linux lets a process have 65,530 maps.
MOST_CHUNKS = 1 << 14
COPY_BYTES = 32 << 20  # a copied tensor is copied in pieces of this size
DEFAULT_SHARD_BYTES = 5 * 10**9  # as save_pretrained users expect

# The sample: runs of this many elements at pseudo-random places, about this many over the model.
SAMPLE_RUN, SAMPLE_RUNS = 1 << 10, 1 << 12

# Elements of a block: on a CPU what hides the cost of Python and system calls, on a GPU that of launching kernels.
CPU_BLOCK, CUDA_BLOCK, MIN_BLOCK = 1 << 18, 1 << 23, 1 << 12
# Anonymous memory of a worker that has Python, torch and Ray loaded and no work yet.
PROCESS_BYTES = 450 << 20

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

# Clip fractions c of the two clipped variants (DESIGN section 2).
CLIP = {"pcb-released": 1e-4, "pcb-pairwise": 1e-2}


@dataclasses.dataclass(frozen=True, slots=True)
class Slot:
    """Where a tensor goes: the index of its output file, the byte offset in it, the dtype."""

    file: int
    start: int
    dtype: str


@dataclasses.dataclass(frozen=True, slots=True)
class MergedTensor:
    """A tensor of the merge: elements first..first+numel-1 of the model. `sources` are the base (None for `linear`) and the models."""

    name: str
    first: int
    numel: int
    sources: tuple[Tensor | None, ...]
    slot: Slot
    lambdas: tuple[float, ...]

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


@dataclasses.dataclass(frozen=True)
class Plan:
    recipe: Recipe
    method: str  # pcb-released, pcb-pairwise, pcb-paper, ties, task_arithmetic, linear
    inputs: tuple[Input, ...]  # the base (`linear` takes only layout and copied tensors from it), then the models
    N: int
    D: int
    tensors: tuple[MergedTensor, ...]
    copies: tuple[CopiedTensor, ...]
    tied: tuple[tuple[str, str], ...]  # (name left out, name that is written)
    twins: tuple[tuple[int, Tensor, Tensor], ...]  # stored copies of tied tensors: input, copy, original; they must be equal
    dropped: tuple[str, ...]  # excluded tensors that only models have
    files: tuple[OutputFile, ...]
    chunk_elements: int
    notes: tuple[str, ...] = dataclasses.field(compare=False, default=())

    @property
    def chunks(self) -> int:
        return -(-self.D // self.chunk_elements)

    @property
    def densities(self) -> tuple[float, ...]:
        return tuple(self.recipe.density_of(i) for i in range(self.N))

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

    @property
    def sample_stride(self) -> int:
        """One sample run lies in each stretch of so many elements: a sixteenth of a small model is read for a sample, of a large one
        1/128, so that the keys which a bracket leaves to be collected stay few enough for a tally."""
        return min(max(16 * SAMPLE_RUN, self.D // SAMPLE_RUNS // SAMPLE_RUN * SAMPLE_RUN), 128 * SAMPLE_RUN)

    def dtypes_of(self, source: int) -> set[str]:
        """The dtypes that merged tensors have in the base (0) or a model (1..N); none for a base that is not read."""
        return {t.dtype for tensor in self.tensors if (t := tensor.sources[source]) is not None}

    @property
    def sweeps(self) -> int:
        """Full sweeps over the inputs in the usual case, the writing one included."""
        return {"pcb-released": 3, "pcb-pairwise": 3, "pcb-paper": 4, "ties": 2}.get(self.method, 1)

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

    @property
    def _firsts(self) -> list[int]:
        # Cached by hand: a frozen dataclass has no cached_property, and owners ask for segments all the time.
        cached: list[int] | None = self.__dict__.get("_firsts_cache")
        if cached is None:
            cached = self.__dict__["_firsts_cache"] = [t.first for t in self.tensors]
        return cached

    def copy_pieces(self) -> list[tuple[int, int, int]]:
        """(index in `copies`, first byte, last byte + 1) of all there is to copy."""
        return [
            (index, start, min(start + COPY_BYTES, copy.source.nbytes))
            for index, copy in enumerate(self.copies)
            for start in range(0, copy.source.nbytes, COPY_BYTES)
        ]

    def fingerprint(self) -> dict[str, Any]:
        """All that decides the output's bytes, as JSON values: what a resumed run must share with the run it continues."""
        return {
            "recipe": self.recipe.to_yaml(),
            "inputs": [dataclasses.asdict(i) for i in self.inputs],
            "output": [[f.name, f.size, hashlib.sha256(f.header).hexdigest()] for f in self.files],
            "chunk_elements": self.chunk_elements,
        }

    def summary(self) -> dict[str, Any]:
        """The plan as JSON values, for `pcb-ray plan --json`."""
        why: dict[str, int] = {}
        for copy in self.copies:
            why[copy.why] = why.get(copy.why, 0) + 1
        return {
            "method": self.method,
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
            "densities": list(self.densities) if self.method.startswith(("pcb", "ties")) else None,
            "sweeps": self.sweeps,
            "bytes_per_sweep": self.sweep_bytes,
            "bytes_read": self.sweeps * self.sweep_bytes + self.copied_bytes,
            "bytes_written": self.written_bytes,
            "output_files": [{"name": f.name, "bytes": f.size} for f in self.files],
            "chunks": self.chunks,
            "notes": list(self.notes),
        }


def worker_bytes(plan: Plan, block_elements: int) -> int:
    """The most anonymous memory a worker takes with blocks of this size: what `--memory` bounds and the plan announces."""
    n = plan.N
    pairs = n * (n + 1) // 2
    scores = 8 * (6 * n + 2 * pairs) if plan.method == "pcb-paper" else 4 * (8 * n + 8)  # with temporaries, of the torch kernel
    raw = sum(max((DTYPE_BYTES[dtype] for dtype in plan.dtypes_of(source)), default=0) for source in range(n + 1))
    per_element = raw + 4 + 8 * n + scores + 16  # as read, theta, tau, scores, output
    # Two ranks of each task, in the total of a sweep and in the answer that is added to it.
    tallies = 2 * 2 * n * TALLY_BYTES if plan.sweeps > 1 else 0
    return PROCESS_BYTES + block_elements * per_element + tallies


def writer_bytes(plan: Plan, scored: bool) -> int:
    """The most memory that a worker takes beside, to gather the basis of a search for one chunk, all of whose elements may be kept."""
    score = (8 if plan.method == "pcb-paper" else 4) * scored
    per_element = max(1 + 4 + score, 4 + 2 * score, 4 + 4 + score) + 0.25  # parts; scores, then values, in their parts and joined
    return int(plan.N * plan.chunk_elements * per_element) + 2 * _histogram_bytes(plan, scored) + (8 << 20)


def basis_bytes(plan: Plan, scored: bool) -> int:
    """What the basis of a search takes on disk at most, but for headers: the entries, the masks, and the histograms of a scored one."""
    score = (8 if plan.method == "pcb-paper" else 4) * scored
    kept = plan.densities if plan.method.startswith(("pcb", "ties")) else [1.0] * plan.N
    return int(sum((4 + score) * r + 0.125 for r in kept) * plan.D) + plan.chunks * _histogram_bytes(plan, scored)


def _histogram_bytes(plan: Plan, scored: bool) -> int:
    """Of a chunk: a row of three integers for each value that the upper bits of its scores' keys take. In practice these span some binary orders of
    magnitude, of 256 values each."""
    return 24 * plan.N * min(32 * 256, plan.chunk_elements) * scored


def choose_block(plan: Plan, device: str, memory: int | None, beside: int = 0) -> int:
    """Elements of a block: the most, up to what suits the device, with which a worker that takes `beside` more stays under `memory` bytes."""
    block = CUDA_BLOCK if device == "cuda" else CPU_BLOCK
    while memory is not None and worker_bytes(plan, block) + beside > memory and block > MIN_BLOCK:
        block //= 2
    if memory is not None and worker_bytes(plan, block) + beside > memory:
        least = worker_bytes(plan, MIN_BLOCK) + beside
        raise RequestError(
            f"--memory {memory:,}: a worker for {plan.N} models needs at least {least:,} bytes; give it that, or merge fewer models at once"
        )
    return block


def plan(
    recipe: Recipe | Mapping[str, Any] | str | os.PathLike[str],
    *,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    download: bool = False,
) -> Plan:
    """The plan of a recipe (or of its file, or of the dictionary that such a file holds), from headers alone.

    With `download`, models of the Hub are fetched first.

    Raises RequestError with everything that is wrong with the inputs.
    """
    recipe = Recipe.of(recipe)
    opened: list[Checkpoint] = []
    problems: list[str] = []
    for source in (recipe.base_model or recipe.models[0].source, *(m.source for m in recipe.models)):
        try:
            opened.append(open_checkpoint(source, recipe.folder, download=download))
        except RequestError as error:
            problems += error.problems
    if problems:
        raise RequestError(problems)
    return plan_of(recipe, opened, max_shard_bytes=max_shard_bytes)


def plan_of(recipe: Recipe, checkpoints: Sequence[Checkpoint], *, max_shard_bytes: int = DEFAULT_SHARD_BYTES) -> Plan:
    """The plan for checkpoints that are open: the base (`linear` may use its first model as such), then the models."""
    linear = recipe.merge_method == "linear"
    n = len(recipe.models)
    assert len(checkpoints) == n + 1
    notes = list(recipe.notes)
    unused = [key for key in ("search", "sweep") if getattr(recipe, key) is not None]
    notes += [f"`{key}` has no effect on a merge: it is for `pcb-ray {key}`." for key in unused]

    stored = [_untie(c) for c in checkpoints]
    merged_names, copied, dropped = _match(recipe, [tensors for tensors, _, _ in stored], [c.source for c in checkpoints], notes)
    twins = tuple((index, copy, original) for index, (_, _, pairs) in enumerate(stored) for copy, original in pairs)
    base_tensors, tied, _ = stored[0]

    D = sum(base_tensors[name].numel for name in merged_names)
    _check_densities(recipe, n, D)

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
        sources = tuple(None if linear and k == 0 else tensors_of[name] for k, (tensors_of, _, _) in enumerate(stored))
        lambdas = tuple(recipe.weight(i, name) for i in range(n))
        tensors.append(MergedTensor(name, first, base.numel, sources, slots[name], lambdas))
        first += base.numel
    if linear:
        _check_linear_weights(tensors)
    if any(t.dtype == "F64" for tensor in tensors for t in tensor.sources if t is not None):
        notes.append("float64 tensors are read as float32, and written as float32 unless `dtype` says otherwise")
    chunk = min(max(1 << max(0, (D // CHUNKS_WANTED).bit_length() - 1), MIN_CHUNK_ELEMENTS), MAX_CHUNK_ELEMENTS)
    chunk = max(chunk, 1 << (D // MOST_CHUNKS).bit_length())
    return Plan(
        recipe=recipe,
        method=method_of(recipe),
        inputs=tuple(Input(c.source, c.commit, c.files) for c in checkpoints),
        N=n,
        D=D,
        tensors=tuple(tensors),
        copies=tuple(CopiedTensor(base_tensors[name], slots[name], why) for name, why in copied.items()),
        tied=tuple(tied.items()),
        twins=twins,
        dropped=tuple(dropped),
        files=files,
        chunk_elements=chunk,
        notes=tuple(notes),
    )


def method_of(recipe: Recipe) -> str:
    return f"pcb-{recipe.variant}" if recipe.merge_method == "pcb" else recipe.merge_method


def ties_word_embeddings(config: Mapping[str, Any] | None) -> bool | None:
    """What config.json says about tied embeddings; None if it is silent."""
    for part in (config or {}), (config or {}).get("text_config"):
        if isinstance(part, Mapping) and isinstance(part.get("tie_word_embeddings"), bool):
            return bool(part["tie_word_embeddings"])
    return None


def _untie(checkpoint: Checkpoint) -> tuple[dict[str, Tensor], dict[str, str], list[tuple[Tensor, Tensor]]]:
    """The tensors that count, each tied one once; {name left out: name that stands for it}; stored copies that must equal their original."""
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
        found = f"{len(copied)} tensors, of which {sum(why == 'excluded' for why in copied.values())} excluded and the rest of integer type"
        raise RequestError(f"{sources[0]}: there is nothing to merge: found {found}; a merge needs floating-point tensors")
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


def _check_densities(recipe: Recipe, n: int, D: int) -> None:
    problems = []
    if recipe.merge_method == "pcb":
        for i in range(n):
            r = recipe.density_of(i)
            if int(D * (1 - r)) >= D:
                problems.append(
                    f"{recipe.models[i].source}: density {r} of {D} merged elements keeps nothing; the smallest that keeps one is about {1 / D:.3g}"
                )
    if problems:
        raise RequestError(problems)


def _check_linear_weights(tensors: Sequence[MergedTensor]) -> None:
    problems = [
        f"{t.name}: linear divides by the sum of the weights, which is 0 here: {list(t.lambdas)}; change a weight"
        for t in tensors
        if sum(t.lambdas) == 0
    ]
    if problems:
        raise RequestError(problems)


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
