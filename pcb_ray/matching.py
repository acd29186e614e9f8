"""Which tensors of the inputs belong together: by name, or by the name that another way of saving gives them.

What has no counterpart is told of with its likeliest reason, and never by advice that would leave nothing to merge.
"""

from __future__ import annotations

import fnmatch
import glob
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from pcb_ray.conversions import Conversions, conversions_of
from pcb_ray.errors import RequestError
from pcb_ray.files.checkpoint import DTYPE_BYTES, FLOAT_DTYPES, Checkpoint, Tensor
from pcb_ray.files.foreign import mismatch, some
from pcb_ray.tied import HEADS, SCALED_IF_TIED, Apart, Finder, Samples, Ties, embedding_of, tie, ties_word_embeddings

Tensors = Mapping[str, Tensor]
_NUMBERS = re.compile(r"\d+")


@dataclass(frozen=True)
class Matched:
    """The tensors of the base and of each model under the base's names, each tied one once, and what becomes of them."""

    tensors: tuple[Tensors, ...]
    merged: tuple[str, ...]
    """Sorted."""
    copied: dict[str, str]
    """Tensors of the base that are written as they are, and why."""
    averaged: dict[str, tuple[Tensor, ...]]
    """Statistics, of which the mean over the models is written; those of the models that have one."""
    dropped: tuple[str, ...]
    """Excluded tensors that only models have."""
    ties: Ties
    parts: dict[str, Part]
    """Of tensors that the base has packed in larger ones, in which the output has them too."""


@dataclass(frozen=True)
class Part:
    """A tensor is part of one that the base stores, from this element on."""

    of: str
    first: int


def match(
    inputs: Sequence[Checkpoint], exclude: Sequence[str], samples: Samples, apart: Collection[Apart], notes: list[str]
) -> Matched:
    """Match the tensors of the models (from the second input on) with those of the base. Raises RequestError with all that has no
    counterpart."""
    sources = [one.source for one in inputs]
    by_pattern = _matcher(exclude)
    stored, parts = _aligned(inputs, by_pattern, notes)

    def excluded(name: str) -> bool:
        return by_pattern(parts[name].of if name in parts else name)

    if broken := _without_elements(stored, sources, excluded):
        raise RequestError(broken)
    ties = tie(Finder(inputs, stored, _counts, excluded, samples, apart), stored, excluded, notes)
    names = {name for one in (*stored, *map(_stored, inputs)) for name in one}
    unused = [pattern for pattern in exclude if not any(fnmatch.fnmatchcase(name, pattern) for name in names)]
    notes += [f"exclude: {pattern!r} matches no tensor" for pattern in unused]
    return _matched(ties, inputs, stored, parts, excluded)


def _stored(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Its tensors under all their names."""
    tensors = checkpoint.tensors
    return {**tensors, **{name: replace(tensors[first], name=name) for name, first in checkpoint.aliases.items()}}


# --- the same tensors under other names -------------------------------------------------------------------------------------------

# What wraps a module puts these into the names of what it wraps, at the beginning or in the middle.
_WRAPPERS = re.compile(r"(?:^module\.)+|_orig_mod\.|_fsdp_wrapped_module\.|_checkpoint_wrapped_module\.|^base_model\.model\.")
# A model of text and pictures as it is saved on the Hub, and as its modules are nested; the first is what the second becomes here.
_NESTED = (
    (re.compile(r"^model\.language_model\."), "language_model.model."),
    (re.compile(r"^language_model\.lm_head\."), "lm_head."),
    (re.compile(r"^model\.(visual|vision_tower|vision_model|multi_modal_projector|connector|audio_tower|image_newline)\b"), r"\1"),
)


def _unwrapped(name: str) -> str:
    return _WRAPPERS.sub("", name)


def _as_norms_are_called(name: str) -> str:
    """Old checkpoints have gamma and beta for what is weight and bias of a normalisation."""
    return re.sub(r"\.beta$", ".bias", re.sub(r"\.gamma$", ".weight", _unwrapped(name)))


def _as_on_the_hub(name: str) -> str:
    name = _as_norms_are_called(name)
    for pattern, instead in _NESTED:
        name = pattern.sub(instead, name)
    return name


_FORMS: tuple[Callable[[str], str], ...] = (str, _unwrapped, _as_norms_are_called, _as_on_the_hub)
"""Ways to write names so that the same tensor has one name, the least change first."""


def _aligned(
    inputs: Sequence[Checkpoint], is_excluded: Callable[[str], bool], notes: list[str]
) -> tuple[list[Mapping[str, Tensor]], dict[str, Part]]:
    """The tensors of all inputs under the base's names, packed ones in their parts where an input has those apart; and what is part
    of a packed tensor of the base."""
    stored: list[Mapping[str, Tensor]] = [_stored(one) for one in inputs]
    sources = [one.source for one in inputs]
    found, told = _renamed(stored, sources, _FORMS, is_excluded)
    is_unlike = any(_lacks(found[0], model) and _lacks(model, found[0]) for model in found[1:])
    conversions = _conversions_of(inputs) if is_unlike else []  # to ask transformers takes seconds
    if not conversions:
        notes += told
        return found, {}
    saved_as = {name: saved for one in conversions for name, saved in one.saved_as.items()}
    unpacked, parts = _unpacked(stored, sources, conversions, is_excluded, notes)
    forms = (*_FORMS, lambda name: saved_as.get(_unwrapped(name), _unwrapped(name)))
    found, told = _renamed(unpacked, sources, forms, is_excluded)
    notes += told
    return found, parts


def _lacks(one: Tensors, other: Tensors) -> bool:
    """Whether one has not all weights of the other."""
    return any(name not in one and not _is_buffer(tensor) for name, tensor in other.items())


def _conversions_of(inputs: Sequence[Checkpoint]) -> list[Conversions]:
    """Of each input, by its own class or else that of another; nothing if none is known."""
    found = [conversions_of(one.config) for one in inputs]
    known = [one for one in found if one is not None]
    return [one or known[0] for one in found] if known else []


def _unpacked(
    stored: Sequence[Tensors],
    sources: Sequence[str],
    conversions: Sequence[Conversions],
    is_excluded: Callable[[str], bool],
    notes: list[str],
) -> tuple[list[Mapping[str, Tensor]], dict[str, Part]]:
    """The inputs with packed tensors in their parts, where another input has these apart."""
    names = [{_unwrapped(name): name for name in of_one} for of_one in stored]
    parts: dict[str, Part] = {}
    found = [dict(of_one) for of_one in stored]
    taken: list[list[str]] = [[] for _ in stored]
    some_have_parts = any(
        piece in own for own, one in zip(names, conversions, strict=True) for pieces in one.pieces.values() for piece in pieces
    )
    for k, own in enumerate(names) if some_have_parts else ():
        for packed, pieces in conversions[k].pieces.items():
            if packed not in own:
                continue
            tensor = stored[k][own[packed]]
            if k == 0:
                parts |= {name: Part(tensor.name, piece.first) for name, piece in pieces.items()}
                if is_excluded(tensor.name):  # it is copied as it is
                    continue
            if tensor.numel == sum(math.prod(piece.shape) for piece in pieces.values()):
                itemsize = DTYPE_BYTES[tensor.dtype]
                del found[k][tensor.name]
                found[k] |= {
                    name: Tensor(name, tensor.dtype, piece.shape, tensor.file, tensor.start + piece.first * itemsize)
                    for name, piece in pieces.items()
                }
                taken[k].append(tensor.name)
    for source, packed_names in zip(sources, taken, strict=True):
        if packed_names:
            notes.append(f"{source}: {len(packed_names)} packed tensors are taken in their parts, as {packed_names[0]}")
    return list(found), parts


def _renamed(
    stored: Sequence[Tensors],
    sources: Sequence[str],
    forms: Sequence[Callable[[str], str]],
    is_excluded: Callable[[str], bool],
) -> tuple[list[Mapping[str, Tensor]], list[str]]:
    """The inputs with the models' tensors under the base's names, and notes on it."""
    notes: list[str] = []
    base, *models = stored
    found = [
        _under_names_of(base, model, source, forms, is_excluded, notes) for model, source in zip(models, sources[1:], strict=True)
    ]
    return [base, *found], notes


def _under_names_of(
    base: Tensors,
    model: Tensors,
    source: str,
    forms: Sequence[Callable[[str], str]],
    is_excluded: Callable[[str], bool],
    notes: list[str],
) -> dict[str, Tensor]:
    """The model's tensors under the base's names, if one renaming gives more of them a counterpart of the same shape than theirs
    do."""
    best: dict[str, str] = {}
    fitting = sum(name in base and base[name].shape == tensor.shape for name, tensor in model.items())
    for form in forms:
        ours, theirs = _by_form(base, form), _by_form(model, form)
        if ours is None or theirs is None:
            continue
        for prefixed in _prefixes(ours, theirs, is_excluded):
            names = {name: ours[prefixed(formed)] for formed, name in theirs.items() if prefixed(formed) in ours}
            count = sum(base[new].shape == model[name].shape for name, new in names.items())
            if count > fitting and len({names.get(name, name) for name in model}) == len(model):  # none takes another's place
                best, fitting = names, count
    if changed := sorted((name, new) for name, new in best.items() if name != new):
        name, new = changed[0]
        notes.append(f"{source}: {len(changed)} tensors are taken under the base's names, as {name} for {new}")
    return {best.get(name, name): replace(tensor, name=best.get(name, name)) for name, tensor in model.items()}


def _by_form(tensors: Tensors, form: Callable[[str], str]) -> dict[str, str] | None:
    """By the form of their names, the names; None if two would be one."""
    found = {form(name): name for name in tensors}
    return found if len(found) == len(tensors) else None


def _prefixes(
    ours: Mapping[str, str], theirs: Mapping[str, str], is_excluded: Callable[[str], bool]
) -> Iterator[Callable[[str], str]]:
    """Ways to come from their names to ours: as they are, and with a prefix less or more, those first that most names speak for."""
    yield str
    lost = {name: None for name in theirs if name not in ours}
    free = {name: None for name, stored in ours.items() if name not in theirs and not is_excluded(stored)}
    votes: Counter[tuple[str, bool]] = Counter()
    for long_names, short_names, is_less in ((lost, free, True), (free, lost, False)):
        for name in long_names:
            parts = name.split(".")
            votes.update(
                (".".join(parts[:count]) + ".", is_less) for count in range(1, len(parts)) if ".".join(parts[count:]) in short_names
            )
    for (prefix, is_less), _ in votes.most_common(3):
        yield _changer(prefix, is_less, frozenset(ours))


def _changer(prefix: str, is_less: bool, ours: Collection[str]) -> Callable[[str], str]:
    if is_less:
        return lambda name: name.removeprefix(prefix)
    return lambda name: prefix + name if prefix + name in ours else name


# --- what belongs together --------------------------------------------------------------------------------------------------------

_BUFFERS = re.compile(r"(?:^|\.)(?:attn|attention|self_attention)\.(?:bias|masked_bias)$|(?:^|\.)(?:inv_freq|position_ids)$")

_STATISTICS = re.compile(r"(?:^|\.)(?:running_(?:mean|var|std)|moving_(?:mean|var|variance))$")
"""What a normalisation has counted of its data: no weight, and a variance that is extrapolated may fall below 0."""


def _is_buffer(tensor: Tensor) -> bool:
    """Whether it is a mask or a table that a model makes by itself, which only some ways of saving write."""
    return _BUFFERS.search(tensor.name) is not None and (len(tensor.shape) in (0, 4) or not tensor.name.endswith("bias"))


def _counts(tensor: Tensor) -> bool:
    """Whether it may be one that is merged."""
    return not _is_buffer(tensor) and _STATISTICS.search(tensor.name) is None


def _matched(
    ties: Ties,
    inputs: Sequence[Checkpoint],
    stored: Sequence[Tensors],
    parts: dict[str, Part],
    excluded: Callable[[str], bool],
) -> Matched:
    """What becomes of each tensor of the base; the inputs have others (`stored`) than count (`ties`)."""
    sources = [one.source for one in inputs]
    base, models = ties.tensors[0], list(zip(ties.tensors[1:], sources[1:], strict=True))
    merged: list[str] = []
    copied: dict[str, str] = {}
    averaged: dict[str, tuple[Tensor, ...]] = {}
    dropped: set[str] = set()
    wrong: set[str] = set()
    problems: list[str] = []
    for name, tensor in sorted(base.items()):
        if excluded(name) or name in ties.excluded:
            copied[name] = "excluded"
        elif tensor.dtype not in FLOAT_DTYPES:
            copied[name] = "integer"
        elif _is_buffer(tensor) and not all(name in other and other[name].shape == tensor.shape for other, _ in models):
            copied[name] = "buffer"
        elif _STATISTICS.search(name) and all(name not in other or _is_like(other[name], tensor) for other, _ in models):
            having = tuple(other[name] for other, _ in models if name in other)
            averaged |= {name: having} if having else {}
            copied |= {} if having else {name: "buffer"}
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
        extra = sorted(name for name in set(other) - set(base) if not _is_buffer(other[name]) and not _STATISTICS.search(name))
        for name in extra:
            if not excluded(name) and other[name].dtype in FLOAT_DTYPES:
                problems.append(f"{name}: is in {source} with shape {list(other[name].shape)} but not in {sources[0]}")
                wrong.add(name)
    if problems:
        more = [f"... and {len(problems) - 18} more mismatches"] if len(problems) > 18 else []
        raise RequestError([*problems[:18], *more, _fix(ties.tensors, inputs, merged, wrong)])  # 20 are shown
    if sum(base[name].numel for name in merged) == 0:
        excluded_count = sum(why == "excluded" for why in copied.values())
        found = f"{len(copied)} tensors, of which {excluded_count} excluded and the rest of integer type"
        raise RequestError(f"{sources[0]}: wanted floating-point tensors to merge, found {found}. Fix: exclude fewer tensors.")
    dropped.update(name for other in stored[1:] for name in other if excluded(name) and name not in base and name not in stored[0])
    return Matched(ties.tensors, tuple(merged), copied, averaged, tuple(sorted(dropped)), ties, parts)


def _is_like(tensor: Tensor, other: Tensor) -> bool:
    return tensor.shape == other.shape and tensor.dtype in FLOAT_DTYPES


_EXPERTS = re.compile(r"(?:^|\.)experts\.(?:\d+\.|(?:gate_up|down|up)_proj$)")


def _fix(tensors: Sequence[Tensors], inputs: Sequence[Checkpoint], merged: Sequence[str], wrong: set[str]) -> str:
    """What to do about these mismatches. To exclude them is no advice where that would leave no matrix to merge."""
    base, models, sources = tensors[0], tensors[1:], [one.source for one in inputs]
    alike = "Fix: use models of one base, saved in one way"
    heads = sorted(name for name in wrong if name.endswith(HEADS) and name not in base)
    config = inputs[0].config or {}
    if heads and ties_word_embeddings(config) is None and config.get("model_type") not in SCALED_IF_TIED:
        (source, head), *_ = ((one, t) for of_one, one in zip(models, sources[1:], strict=True) if (t := of_one.get(heads[0])))
        if (embedding := embedding_of(base, head)) is not None:
            return (
                f"Fix: {source} has trained {head.name} apart. If {sources[0]} ties it to {embedding}, say so in its config.json "
                f'("tie_word_embeddings": true), and they are merged apart; to exclude it loses what {source} has trained there.'
            )
    experts = [name for name in sorted(wrong) if _EXPERTS.search(name)]
    packed = [name for name in experts if name.endswith("_proj")]
    if packed and len(packed) < len(experts):
        apart = next(name for name in experts if name not in packed)
        return (
            f"{alike}: some have their experts packed ({packed[0]}) and some one by one ({apart}). Save them again with "
            "transformers (from_pretrained, save_pretrained), all by one class, which stores them one by one; with transformers "
            "installed here (`pip install 'pcb-ray[search]'`) they are taken apart, where nothing else differs."
        )
    if not any(len(base[name].shape) >= 2 and base[name].numel for name in merged if name not in wrong):
        common = [set(base) & set(model) for model in models]
        if not all(common):
            source = sources[1 + common.index(set())]
            return f"{alike}: {source} and {sources[0]} have no tensor name in common. Is it of the same architecture?"
        return f"{alike}: hardly a matrix has the same name and shape in all. Are they of the same architecture and size?"
    lines = "\n".join(f"  - {json.dumps(line)}" for line in _exclude_lines(wrong, {name for of_one in tensors for name in of_one}))
    return (
        f"{alike}; or keep the base's own tensors, lose what a model has trained in these, and leave out what the base lacks, "
        f"with\nexclude:\n{lines}"
    )


def _without_elements(tensors: Sequence[Tensors], sources: Sequence[str], excluded: Callable[[str], bool]) -> list[str]:
    """Inputs whose tensors were saved without their elements: of shape [0], as DeepSpeed's ZeRO-3 leaves what it holds elsewhere,
    or with none where another input has some."""
    full = {t.name for of_one in tensors for t in of_one.values() if t.numel}
    problems = []
    for of_one, source in zip(tensors, sources, strict=True):
        empty = [
            t.name for t in of_one.values()
            if not t.numel and (t.shape == (0,) or t.name in full) and t.dtype in FLOAT_DTYPES and not excluded(t.name)
        ]  # fmt: skip
        if empty:
            found = f"{len(empty)} of {len(of_one)} without elements ({some(sorted(empty))}): it is broken"
            fix = "gather its weights and save it again (after ZeRO-3: zero_to_fp32.py, from the training's checkpoint)"
            problems.append(f"model {source}: {mismatch('whole tensors', found, fix)}")
    return list(dict.fromkeys(problems))


def _matcher(patterns: Iterable[str]) -> Callable[[str], bool]:
    expressions = [re.compile(fnmatch.translate(p)) for p in patterns]
    return lambda name: any(e.match(name) is not None for e in expressions)


def _exclude_lines(wrong: set[str], names: set[str]) -> list[str]:
    """A few patterns that match these names and no others: layer numbers become `*` where that is safe."""
    of_kind: dict[str, set[str]] = {}
    for name in names | wrong:
        of_kind.setdefault(_NUMBERS.sub("*", glob.escape(name)), set()).add(name)
    # Patterns hold no digits, so one name of a kind stands for all others of it.
    right = [next(iter(alike - wrong)) for alike in of_kind.values() if not alike <= wrong]
    lines: set[str] = set()
    for pattern, alike in of_kind.items():
        if concerned := alike & wrong:
            is_safe = concerned == alike and not any(fnmatch.fnmatchcase(name, pattern) for name in right)
            lines |= {pattern} if is_safe else {glob.escape(name) for name in concerned}
    return sorted(lines)
