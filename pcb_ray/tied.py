"""Which names of a model are one tensor: by their storage, by what config.json says, and by their values.

A merge counts such a tensor once, and the output holds it as often as the base does. How often it is stored is decided by whoever
saves a model, so inputs need not agree in that; but a model that has trained a copy apart has two tensors, and so has the merge.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pcb_ray.conversions import tied_weights_of
from pcb_ray.errors import RequestError
from pcb_ray.files.checkpoint import DTYPE_BYTES, FLOAT_DTYPES, Checkpoint, Tensor
from pcb_ray.files.foreign import some
from pcb_ray.files.objects import unreadable
from pcb_ray.files.store import Range, Store

Tensors = Mapping[str, Tensor]

# Output heads that share the weights of the input embedding in models with `tie_word_embeddings`.
HEADS = (
    "lm_head.weight",
    "embed_out.weight",
    "cls.predictions.decoder.weight",
    "lm_head.decoder.weight",
    "output_projection.weight",
    "proj_out.weight",
)
EMBEDDINGS = (
    *("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight", "tok_embeddings.weight"),
    *("shared.weight", "embeddings.weight", "embedding.weight"),
)
SCALED_IF_TIED = ("t5", "umt5", "mt5", "longt5", "switch_transformers", "udop", "pop2piano")
"""Models of transformers in which `tie_word_embeddings` also decides whether logits are scaled."""
MOST_MISSING, MOST_ALIKE = 64, 8
"""So many names that only some inputs store are looked at, and so many of the same shape; models that differ in more are hardly of
one base."""


def ties_word_embeddings(config: Mapping[str, Any] | None) -> bool | None:
    """What config.json says about tied embeddings; None if it is silent."""
    if config and config.get("model_type") in SCALED_IF_TIED and config.get("scale_decoder_outputs") is False:
        return False  # transformers 5 writes that they are tied for all of these
    for part in (config or {}), (config or {}).get("text_config"):
        if isinstance(part, Mapping) and isinstance(part.get("tie_word_embeddings"), bool):
            return bool(part["tie_word_embeddings"])
    return None


# --- equal or not -----------------------------------------------------------------------------------------------------------------


class Samples:
    """Compares stored tensors of an input by 16 ranges of 64 KiB at fixed places, or (`whole`) by all bytes; each pair once."""

    RANGES, RANGE_BYTES = 16, 64 << 10

    def __init__(self, store: Store, *, whole: bool = False) -> None:
        self._store, self._whole = store, whole
        self._equal: dict[object, bool] = {}
        self._constant: dict[tuple[str, int], bool] = {}

    def are_equal(self, one: Tensor, other: Tensor) -> bool | None:
        """Whether two tensors have the same bytes, as far as the sample tells; None if they can't be read yet."""
        if (one.dtype, one.shape) != (other.dtype, other.shape):
            return False
        if (one.file, one.start) == (other.file, other.start):
            return True
        if not (_is_here(one) and _is_here(other)):
            return None
        key = tuple(sorted(((one.file, one.start), (other.file, other.start))))
        if key not in self._equal:
            self._expect(one, other)
            self._equal[key] = all(self._read(one, at) == self._read(other, at) for at in self._places(one))
        return self._equal[key]

    def is_constant(self, tensor: Tensor) -> bool | None:
        """Whether all its elements are one number, as far as the sample tells; None if it can't be read yet."""
        if not _is_here(tensor):
            return None
        key = (tensor.file, tensor.start)
        if key not in self._constant:
            self._expect(tensor)
            first = bytes(self._read(tensor, 0)[: DTYPE_BYTES[tensor.dtype]])
            pieces = (self._read(tensor, at) for at in self._places(tensor))
            self._constant[key] = all(piece == first * (len(piece) // len(first)) for piece in pieces)
        return self._constant[key]

    def _places(self, tensor: Tensor) -> list[int]:
        """Where the ranges begin: at equal steps, the first at the beginning and the last at the end."""
        if self._whole:
            return list(range(0, tensor.nbytes, self.RANGE_BYTES))
        itemsize, last = DTYPE_BYTES[tensor.dtype], max(0, tensor.nbytes - self.RANGE_BYTES)
        places = (k * last // (self.RANGES - 1) for k in range(self.RANGES))
        return list(dict.fromkeys(place // itemsize * itemsize for place in places))

    def _expect(self, *tensors: Tensor) -> None:
        if not self._whole:
            ends = ((t, t.start + at, min(t.start + at + self.RANGE_BYTES, t.stop)) for t in tensors for at in self._places(t))
            self._store.expect((Range(t.file, start, stop) for t, start, stop in ends), exact=True)

    def _read(self, tensor: Tensor, at: int) -> memoryview:
        data = memoryview(bytearray(min(self.RANGE_BYTES, tensor.nbytes - at)))
        try:
            self._store.read(tensor.file, tensor.start + at, data)
        except OSError as error:
            raise RequestError(unreadable(tensor.file, error)) from None
        return data


def _is_here(tensor: Tensor) -> bool:
    """Whether it can be read: a model of the Hub is not, before it is downloaded."""
    return not tensor.file.startswith("hub://")


@dataclass(frozen=True, slots=True)
class Twin:
    """Two stored tensors of an input that count as one; `declared` if its config says so."""

    input: int
    copy: Tensor
    original: Tensor
    declared: bool

    def complaint(self, source: str) -> str:
        """What to say if they differ."""
        return (
            f"{source}: wanted {self.copy.name} equal to {self.original.name}, which config.json ties it to, found stored copies "
            'that differ. Fix: set "tie_word_embeddings": false in its config if they are meant to differ, or remove the copy that '
            "is wrong."
        )


@dataclass(frozen=True, order=True, slots=True)
class Apart:
    """A copy of an input that differs from its original, although the sample finds them equal."""

    input: int
    copy: str
    original: str


# --- what is one tensor -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ties:
    """The tensors of the inputs with each tied one once."""

    tensors: tuple[dict[str, Tensor], ...]
    order: tuple[str, ...]
    """The names of the output, in the order of the base's files."""
    left_out: dict[str, str]
    """Names of the base that the output does not have, by the name that stands for it."""
    copies: dict[str, str]
    """Names of the base under which the output has a merged tensor once more."""
    excluded: frozenset[str]
    """Copies of excluded tensors."""
    untied: tuple[str, ...]
    """Heads that are merged apart from the embedding to which the base ties them."""
    twins: tuple[Twin, ...]
    """What the sample found to be equal, and is to be compared whole."""


def tie(finder: Finder, stored: Sequence[Tensors], excluded: Callable[[str], bool], notes: list[str]) -> Ties:
    """Find the ties of the inputs (base first), of which the finder knows. Raises RequestError for copies that differ where the
    config says that they are one."""
    if finder.problems:
        raise RequestError(finder.problems)
    by_class = finder.asked_of_the_class()
    tensors = [dict(of_one) for of_one in stored]
    left_out: dict[str, str] = {}
    copies: dict[str, str] = {}
    merged_as: dict[str, str] = {}
    following: set[str] = set()
    untied: list[str] = []
    twins = list(finder.declared_twins)
    for group in finder.groups():
        classes = finder.split(group)
        if problems := finder.unfit_to_untie(classes):
            raise RequestError(problems)
        for names in classes:
            kept = names[0]
            merged_as |= dict.fromkeys(names, kept)
            has_base = finder.stands_for(0, names, group) is not None
            for k in range(len(stored)):
                for name in names:
                    tensors[k].pop(name, None)
                found = finder.stands_for(k, names, group if has_base else ())
                if found is not None:
                    tensors[k][kept] = replace(found, name=kept)
                    twins += finder.twins_of(k, names, found)
            for name in names[1:]:
                if name not in stored[0]:
                    continue
                if finder.is_left_out(name, kept):
                    left_out[name] = kept
                elif excluded(kept):
                    tensors[0][name] = stored[0][name]
                    following.add(name)
                else:
                    copies[name] = kept
        untied += finder.untied(classes)
        notes += finder.notes(classes)
    # Nothing ties them any more when the output is loaded.
    pairs = [pair for name, original in by_class.items() for pair in ((name, original), (original, name))] if untied else []
    for name, other in pairs:
        left_out.pop(name, None)
        kept = merged_as.get(name) or merged_as.get(other, other)
        if name in tensors[0] or name in copies or kept not in tensors[0]:
            continue
        if excluded(kept) or kept in following:
            tensors[0][name] = replace(tensors[0][kept], name=name)
            following.add(name)
        else:
            copies[name] = kept
    order = [name for name in dict.fromkeys((*stored[0], *tensors[0], *copies)) if name not in left_out]
    return Ties(tuple(tensors), tuple(order), left_out, copies, frozenset(following), tuple(untied), tuple(twins))


class Finder:
    """What is known of the inputs (base first), and what that says about names that may be one tensor. Their stored tensors have
    the base's names; only those that `counts` are looked at."""

    def __init__(
        self,
        inputs: Sequence[Checkpoint],
        stored: Sequence[Tensors],
        counts: Callable[[Tensor], bool],
        excluded: Callable[[str], bool],
        samples: Samples,
        apart: Collection[Apart],
    ) -> None:
        self._sources = [one.source for one in inputs]
        self._declared = [ties_word_embeddings(one.config) for one in inputs]
        self._has_config = inputs[0].library == "transformers"
        self._model_type = (inputs[0].config or {}).get("model_type")
        self._leaves_copies_out = inputs[0].library == "transformers" or not inputs[0].files  # a state dict shares its storage
        self._excluded, self._samples, self._apart = excluded, samples, apart
        self._stored = [
            {name: t for name, t in of_one.items() if t.dtype in FLOAT_DTYPES and t.numel and counts(t)} for of_one in stored
        ]
        self._place = {name: at for at, name in enumerate(stored[0])}
        self._by_class: dict[str, str] = {}
        self._config = inputs[0].config
        self.declared_twins: list[Twin] = []
        self.problems: list[str] = []
        for k, declared in enumerate(self._declared):
            for head, embedding in self._heads(k) if declared else ():
                twin = Twin(k, self._stored[k][head], self._stored[k][embedding], declared=True)
                if excluded(head):
                    continue
                if self._samples.are_equal(twin.copy, twin.original) is False:
                    self.problems.append(twin.complaint(self._sources[k]))
                self.declared_twins.append(twin)

    def groups(self) -> list[list[str]]:
        """Names that are one tensor in some input."""
        group_of: dict[str, list[str]] = {}

        def join(one: str, other: str) -> None:
            first, second = group_of.get(one, [one]), group_of.get(other, [other])
            if first is not second:
                first += second
                group_of.update(dict.fromkeys(first, first))

        base = self._stored[0]
        for name, first in self._of_one_storage():
            join(first, name)
        for k, declared in enumerate(self._declared):
            for head, embedding in self._heads(k) if declared else ():
                join(embedding, head)
        for names in _by_kind(base.values()).values():
            first, *others = names
            is_candidate = others and len(base[first].shape) >= 2 and self._samples.is_constant(base[first]) is False
            if is_candidate and all(self._samples.are_equal(base[first], base[name]) for name in others):
                for name in others:
                    join(first, name)
        for k in range(1, len(self._stored)):
            model = self._stored[k]
            missing = [name for name in base if name not in model and not self._excluded(name)]
            extra = [name for name in model if name not in base and not self._excluded(name)]
            for name in missing[:MOST_MISSING]:
                if (original := self._like(base, name, model) or self._tied_to(k, base[name])) is not None:
                    join(original, name)
            for name in extra[:MOST_MISSING]:
                if (original := self._like(model, name, base) or self._tied_to(0, model[name])) is not None:
                    join(original, name)
        for name, original in self._by_class.items():
            if any(name in model for model in self._stored) and any(original in model for model in self._stored):
                join(original, name)
        found = {id(group): group for group in group_of.values()}
        return [sorted(group, key=self._rank) for group in found.values()]

    def asked_of_the_class(self) -> dict[str, str]:
        """What the base's class ties, by name: asked only where something that it may tie was trained apart, since that takes
        seconds. Raises RequestError where that must be known, and can't be."""
        if not self._has_config or self._declared[0] is False:
            return {}
        classes = [self.split(group) for group in self.groups()]
        is_split = any(len(of_group) > 1 and not self._is_apart_in_base(of_group) for of_group in classes)
        known = {name for of_group in classes for names in of_group for name in names}.union(self._stored[0])
        extra = {name for model in self._stored[1:] for name in model if name not in known and not self._excluded(name)}
        if not is_split and not 0 < len(extra) <= MOST_MISSING:
            return {}
        found = tied_weights_of(self._config)
        if found is None and (heads := [name for of_group in classes for name in self.untied(of_group)]):
            raise RequestError(
                f"{heads[0]}: wanted it tied in all models or in none, or transformers to tell what else {self._sources[0]} ties, "
                "found it trained apart in some, and no answer. Fix: install transformers (`pip install 'pcb-ray[search]'`), or "
                f'keep it tied with `exclude: ["{heads[0]}"]`, which loses what was trained there.'
            )
        self._by_class = found or {}
        return self._by_class

    def _is_apart_in_base(self, classes: Sequence[Sequence[str]]) -> bool:
        return all(not self._is_one_of(0, names[0], classes[0]) for names in classes[1:])

    def split(self, group: Sequence[str]) -> list[list[str]]:
        """The group's names by what is one tensor in all inputs that store both; in each, the name under which it is merged is the
        first. An excluded copy says nothing against that."""
        classes: list[list[str]] = [[group[0]]]
        for name in group[1:]:
            follows = self._excluded(name) and (name not in self._stored[0] or self._are_one(0, name, group[0]))
            fitting = (c for c in classes if all(self._is_one_of(k, name, c) for k in range(len(self._stored))))
            home = classes[0] if follows else next(fitting, None)
            if home is None:
                classes.append([name])
            else:
                home.append(name)
        return classes

    def stands_for(self, k: int, names: Sequence[str], group: Sequence[str]) -> Tensor | None:
        """What an input has for the names of one tensor: a stored one, or what it ties them to."""
        model = self._stored[k]
        own = [name for name in names if name in model and (name == names[0] or not self._excluded(name))]
        if not own and self._may_stand_in(k, names, group):
            own = [name for name in group if name in model and not self._excluded(name)]
        return model[own[0]] if own else None

    def twins_of(self, k: int, names: Sequence[str], original: Tensor) -> list[Twin]:
        """What of an input is to be compared whole, since the merge takes it for one."""
        model = self._stored[k]
        known = {(twin.copy.name, twin.original.name) for twin in self.declared_twins if twin.input == k}
        found = [
            model[name]
            for name in names
            if name in model and (k == 0 or not self._excluded(name)) and not {(name, original.name), (original.name, name)} & known
        ]
        return [Twin(k, copy, original, declared=False) for copy in found if _place_of(copy) != _place_of(original)]

    def is_left_out(self, name: str, kept: str) -> bool:
        """Whether the output needs no copy, since its loader ties them."""
        base, declared = self._stored[0], self._declared[0]
        is_one = kept in base and _place_of(base[name]) == _place_of(base[kept]) and declared is not False
        return self._leaves_copies_out and (is_one or (declared is True and name.endswith(HEADS)))

    def untied(self, classes: Sequence[Sequence[str]]) -> list[str]:
        """The heads that are apart, and that the base ties."""
        return [names[0] for names in classes[1:] if self._is_untied(names[0], classes[0])]

    def unfit_to_untie(self, classes: Sequence[Sequence[str]]) -> list[str]:
        """Heads that can't be apart from the embedding, since that would change what the model computes elsewhere."""
        return [
            f"{name}: wanted it tied to {classes[0][0]} in all models or in none, since {self._model_type} scales what it feeds "
            f'to a tied head alone, found it trained apart in some. Fix: keep it tied with `exclude: ["{name}"]`, which loses what '
            "was trained there, or leave those models out."
            for name in self.untied(classes)
            if self._model_type in SCALED_IF_TIED and "scale_decoder_outputs" not in (self._config or {})
        ]

    def _is_untied(self, head: str, others: Sequence[str]) -> bool:
        is_tied = self._is_tied_by_class(head, others) if self._by_class else head.endswith(HEADS)
        return is_tied and self._declared[0] is not False and self._is_one_of(0, head, others)

    def _is_tied_by_class(self, name: str, others: Sequence[str]) -> bool:
        return any(self._by_class.get(name, name) == self._by_class.get(one, one) for one in others)

    def notes(self, classes: Sequence[Sequence[str]]) -> list[str]:
        """What inputs store otherwise than the base, and what becomes of it."""
        found = []
        for names in classes:
            original, copies = names[0], [name for name in names[1:] if not self._excluded(name)]
            for k, model in enumerate(self._stored[1:], 1):
                if self._declared[k] or not any(name in model for name in names):
                    continue
                others = [name for name in (original, *copies) if (name in model) != (name in self._stored[0])]
                rest = [name for name in names if name not in others]
                if others and rest:
                    what = "stores" if others[0] in model else "does not store"
                    found.append(f"{self._sources[k]}: {what} {some(others)}, which is one tensor with {some(rest)}")
            found += [
                f"{name} is excluded, and follows {original}, of which it is a copy"
                for name in names[1:]
                if self._excluded(name) and not self._excluded(original) and name in self._stored[0]
            ]
            if self._excluded(original) and copies:
                found.append(f"{original} is excluded, and so are its copies, {some(copies)}")
        for names in classes[1:]:
            name, first = names[0], classes[0][0]
            having = [k for k, model in enumerate(self._stored) if name in model]
            group = [one for of_class in classes for one in of_class]
            lacking = [k for k in range(len(self._stored)) if k not in having]
            without = dict.fromkeys(self._sources[k] for k in lacking if self.stands_for(k, names, group) is not None)
            is_untied = self._is_untied(name, classes[0])
            if not without and not is_untied:
                continue
            differing = dict.fromkeys(self._sources[k] for k in having if not self._is_one_of(k, name, classes[0]))
            note = f"{', '.join(differing)}: {name} was trained apart from {first}, to which others tie it: they are merged apart"
            note += f", {first} standing for {name} in {', '.join(without)}" if without else ""
            note += ', and the output\'s config.json says "tie_word_embeddings": false' if is_untied and self._has_config else ""
            if self._is_one_of(0, name, classes[0]):
                note += f'. `exclude: ["{name}"]` keeps them tied, and loses what was trained there'
            found.append(note)
        return found

    # --- the parts ----------------------------------------------------------------------------------------------------------------

    def _rank(self, name: str) -> tuple[object, ...]:
        """The name under which a tied tensor is merged comes first: one of the base, no head, that most inputs store."""
        base = self._stored[0]
        stored = sum(name in model for model in self._stored)
        return name not in base, name.endswith(HEADS), -stored, self._place.get(name, len(self._place)), name

    def _is_one_of(self, k: int, name: str, others: Sequence[str]) -> bool:
        return all(self._are_one(k, name, one) for one in others)

    def _are_one(self, k: int, one: str, other: str) -> bool:
        """Whether nothing in an input says that two names are two tensors."""
        model = self._stored[k]
        if one not in model or other not in model:
            return True
        known_apart = not {Apart(k, one, other), Apart(k, other, one)}.isdisjoint(self._apart)
        return not known_apart and self._samples.are_equal(model[one], model[other]) is not False

    def _may_stand_in(self, k: int, names: Sequence[str], group: Sequence[str]) -> bool:
        """Whether a tied tensor may stand for one that an input does not store: the base, or its class, must say so, a model must
        not deny it."""
        if k or self._declared[0]:
            return self._declared[k] is not False
        return any(self._is_tied_by_class(name, [one for one in group if one not in names]) for name in names)

    def _like(self, within: Tensors, name: str, elsewhere: Tensors) -> str | None:
        """The name that `elsewhere` has too of a tensor that equals this one, if there is one; of those that can't be read yet, the
        first of this shape."""
        tensor = within[name]
        alike = [one for one in within.values() if one.name != name and one.shape == tensor.shape and one.dtype == tensor.dtype]
        alike = [one for one in alike if one.name in elsewhere]
        for one in alike[:MOST_ALIKE]:
            equal = self._samples.are_equal(tensor, one)
            if equal is None or (equal and not self._samples.is_constant(tensor)):  # after a download the plan is made anew
                return one.name
        return None

    def _tied_to(self, k: int, head: Tensor) -> str | None:
        """The embedding to which the config of an input ties a head that it does not store."""
        return embedding_of(self._stored[k], head) if self._declared[k] and head.name.endswith(HEADS) else None

    def _heads(self, k: int) -> list[tuple[str, str]]:
        """The heads of an input, each with the embedding of its shape."""
        model = self._stored[k]
        pairs = ((name, embedding_of(model, tensor)) for name, tensor in model.items() if name.endswith(HEADS))
        return [(head, embedding) for head, embedding in pairs if embedding is not None]

    def _of_one_storage(self) -> list[tuple[str, str]]:
        """(name, first name with the same bytes) of the base."""
        seen: dict[object, str] = {}
        firsts = ((name, seen.setdefault((_place_of(t), t.shape, t.dtype), name)) for name, t in self._stored[0].items())
        return [(name, first) for name, first in firsts if name != first]


def _place_of(tensor: Tensor) -> tuple[str, int]:
    return tensor.file, tensor.start


def embedding_of(model: Tensors, head: Tensor) -> str | None:
    """The embedding that a head of this shape would be tied to."""
    fitting = [t.name for t in model.values() if t.name.endswith(EMBEDDINGS) and t.name != head.name and t.shape == head.shape]
    return min(fitting, key=lambda name: (next(k for k, e in enumerate(EMBEDDINGS) if name.endswith(e)), name), default=None)


def _by_kind(tensors: Collection[Tensor]) -> dict[tuple[str, tuple[int, ...]], list[str]]:
    found: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for tensor in tensors:
        found.setdefault((tensor.dtype, tensor.shape), []).append(tensor.name)
    return found
