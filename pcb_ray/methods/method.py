"""What a merge method is: a record of data and functions that the rest of the code reads, and never a name that it knows.

Shapes:
    N    tasks (fine-tuned models)
    B    elements of one block
    D    merged elements of the whole model
    _NB  tensor [N, B], _B tensor [B]

This module needs no torch: the driver reads records, the owners call their functions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from pcb_ray import checks
from pcb_ray.lazy import LazyModule

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = LazyModule("torch")

Known = Mapping[str, tuple[float, ...]]
"""What the passes have found of the whole model, by the names that the method gave; mostly a number for each model."""


SHARED_PARAMETERS = ("weight", "int8_mask", "normalize", "calibrate")
"""What a recipe may have below `parameters` for any method."""
ARGUMENTS = ("variant", "base", "models", "method", "weights", "dtype", "exclude", "lambda_")
"""What a call of `merge_state_dicts` has for something else. None of either can be a method's own."""


@dataclasses.dataclass(frozen=True)
class Parameter:
    """A parameter of the method's own, as it stands below `parameters` in a recipe. `weight` (lambda_i) is no such parameter: all
    methods have it."""

    default: Any
    check: Callable[[object, str, list[str]], Any]
    """(raw value, its place, problems) -> the value in one form, or anything after a complaint in `problems`. It gives the same
    value again for one that it has given: a recipe is written with it, and read."""
    help: str
    per_model: bool = False
    """Whether an entry of `models` may have one of its own."""
    searched: Literal["", "scale", "share"] = ""
    """How a search varies it without reading a model again. scale: it multiplies all that the merge adds to the base. share: it
    says how much the method's `scored` basis keeps. Empty: not at all."""
    range: tuple[float, float] = (0.0, 0.0)
    """Between which values it is searched unless a recipe says otherwise."""
    unasked: str = ""
    """What to say where a recipe does not give it, since its default elsewhere is another."""


number = checks.number
fraction = partial(checks.number, is_fraction=True)


def share_of_model(raw: object, where: str, problems: list[str]) -> float:
    """A fraction of the whole model: by layer or by name, as mergekit has it too, it would have no meaning."""
    if isinstance(raw, (list, tuple, Mapping)):
        fix = "write one number: the threshold is one over the whole model, and leaves to each tensor what is large in it"
        problems.append(checks.wrong(where, "a number in (0, 1]", raw, fix))
        return 1.0
    return fraction(raw, where, problems)


def lambda_parameter(default: float = 1.0) -> Parameter:
    """`lambda`, for methods in which it multiplies the merged task vector."""
    return Parameter(default, number, "scales the merged task vector", searched="scale", range=(0.0, 2.0 * default))


@dataclasses.dataclass(frozen=True)
class Settings:
    """The method's parameters for one merge, and the two counts that every formula may use."""

    N: int
    D: int
    tensors: int
    """How many tensors are merged."""
    parameters: Mapping[str, Any]
    """Of the recipe, by name."""
    of_model: tuple[Mapping[str, Any], ...]
    """The same for each model, with what it has of its own."""

    def __getitem__(self, name: str) -> Any:
        return self.parameters[name]

    def each(self, name: str) -> tuple[Any, ...]:
        """A parameter's value for each model."""
        return tuple(own[name] for own in self.of_model)

    @property
    def lambda_(self) -> float:
        """What multiplies the merged task vector: 1 for a method that has no such parameter."""
        return float(self.parameters.get("lambda", 1.0))


@dataclasses.dataclass(frozen=True)
class TensorPlace:
    """Where a block lies in its tensor."""

    name: str
    shape: tuple[int, ...]
    index: int
    """The tensor's number among those that are merged."""
    start: int
    """The block's first element, counted within the tensor."""


@dataclasses.dataclass(frozen=True)
class Block:
    """A run of parameters of the base and of all models, in float32: what a method's functions see."""

    theta: Tensor
    """[B], the base; zeros for a method without one."""
    tau: Tensor
    """[N, B], the task vectors; the models themselves for a method without a base."""
    weights: tuple[float, ...] = ()
    """lambda_i, N of them; only where blocks are merged."""
    first: int = -1
    """The number, among the D of the model, of the block's first element; -1 where the block gathers elements from several places.
    """
    tensor: TensorPlace | None = None
    """None for `unit="element"`, whose blocks may hold elements of several tensors."""

    def of_tensor(self, values: Sequence[float], settings: Settings) -> tuple[float, ...]:
        """Of the values that a `Sums(per="tensor")` found, those of the block's tensor."""
        if self.tensor is None:
            raise ValueError('only blocks of a method with `unit="block"` or `unit="tensor"` know their tensor')
        count = len(values) // settings.tensors
        return tuple(values[self.tensor.index * count : (self.tensor.index + 1) * count])


Function = Callable[[Block, Known, Settings], "Tensor"]


@dataclasses.dataclass(frozen=True)
class Matrix:
    """A matrix of the model, m rows (outputs) and n columns (inputs): what `Method.of_matrix` sees."""

    name: str
    """Of its tensor."""
    shape: tuple[int, int]
    N: int
    tasks: Callable[[], Iterator[NDArray[np.float32]]]
    """T_i = lambda_i tau_i, [m, n], one model after another, as often as asked: only one is in memory at a time."""


def column(values: Sequence[float], like: Tensor) -> Tensor:
    """One number for each model as a tensor [N, 1] of the device and dtype of `like`."""
    # It is a tensor and no Python number: a GPU divides by a number by multiplying with its reciprocal, which rounds differently.
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]


def _check(where: str, found: object, known: Sequence[object]) -> None:
    if found not in known:
        raise ValueError(f"{where}: wanted one of {', '.join(map(repr, known))}, found {found!r}")


# --- passes over the model --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Quantity:
    """Something that elements of the model are ranked by."""

    name: str
    """For people."""
    of: Function
    """Its value for each model and element of a block: [N, B], float32 or float64."""
    bits: Literal[32, 64] = 32
    magnitude: bool = False
    """Whether it is ranked by its absolute value."""
    parameters: tuple[str, ...] | None = None
    """Those of the method's parameters that its value depends on; None: it may be any. Merges that share them share the pass."""
    native: int | None = None
    """Its number in `_native.c`, where it is written there too."""

    def __post_init__(self) -> None:
        _check("bits", self.bits, (32, 64))


MAGNITUDE = Quantity("|tau|", lambda block, _known, _settings: block.tau, magnitude=True, parameters=(), native=0)
"""The size of the task vectors."""


@dataclasses.dataclass(frozen=True)
class Ranks:
    """A pass that finds, for each model, the values that a quantity has at given ranks over the whole model, exactly."""

    quantity: Quantity
    places: Mapping[str, Callable[[int, Mapping[str, Any]], int]]
    """By the name under which the value will be known: its rank, from 0 (the smallest) to D - 1, from D and the model's parameters.
    """
    largest: str = ""
    """The name under which the largest value will be known, if it is wanted."""

    def __post_init__(self) -> None:
        if not self.places:
            raise ValueError(f"{self.title}: wanted at least one place, found none; the largest value comes beside it")

    @property
    def title(self) -> str:
        return f"ranks of {self.quantity.name}"

    @property
    def parameters(self) -> tuple[str, ...] | None:
        """The parameters that what it finds depends on, apart from the places; None: it may be any."""
        return self.quantity.parameters

    @property
    def gives(self) -> tuple[str, ...]:
        """The names of what it finds."""
        return (*self.places, *([self.largest] if self.largest else []))


@dataclasses.dataclass(frozen=True)
class Extrema:
    """A pass that finds the smallest and the largest value of each row of `of`, [any number of rows, B] in float64, over the whole
    model."""

    title: str
    of: Function
    smallest: str
    largest: str
    parameters: tuple[str, ...] | None = None
    native: str = ""
    """The function of `_native.c` that does the same."""

    @property
    def gives(self) -> tuple[str, ...]:
        return (self.smallest, self.largest)


@dataclasses.dataclass(frozen=True)
class Sums:
    """A pass that adds up each row of `of`, [any number of rows, B] in float64, over the whole model or over each tensor.

    Elements are added in a fixed order within runs, and the runs' sums exactly: the result does not depend on who computed what."""

    title: str
    of: Function
    names: Mapping[str, Callable[[int], slice]]
    """By the name under which they will be known: which of the rows, from N. With per="tensor", these rows of the first tensor,
    then of the next."""
    per: Literal["model", "tensor"] = "model"
    parameters: tuple[str, ...] | None = None
    native: str = ""

    def __post_init__(self) -> None:
        _check("per", self.per, ("model", "tensor"))

    @property
    def gives(self) -> tuple[str, ...]:
        return tuple(self.names)


Pass = Ranks | Extrema | Sums

# --- the method -------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Scored:
    """What a basis keeps of a method that drops elements by a threshold on scores, so that a search can vary the share that is
    kept."""

    values: Function
    """[N, B] float32: what is merged of each task."""
    scores: Quantity
    kept: Callable[[Tensor, Known], Tensor]
    """(scores [N, B], known) -> where they are kept, bool [N, B]. It must be so that what is dropped has no part in the merge."""
    threshold: str
    """The name of the threshold among what is known."""
    share: str
    """The parameter that decides its rank."""
    combine: Callable[[Tensor, Tensor, Tensor, Known, Sequence[float], float], Tensor]
    """(theta [B], values [N, B], scores [N, B], known, lambda_i, lambda) -> the merge [B]."""


@dataclasses.dataclass(frozen=True)
class Native:
    """How `_native.c` merges by this method."""

    question: int
    """The method's number there."""
    arrays: Callable[[Known, Settings], Mapping[str, NDArray[Any]]] = lambda _known, _settings: {}
    """The fields of its `struct Thresholds` that the method uses."""
    factor: Callable[[Sequence[float], float], float] = lambda _weights, lambda_: lambda_
    """From lambda_i and lambda what it multiplies (or divides) the sum by."""
    floor: float = 0.0
    """The least denominator."""
    most_models: int = 1 << 30


@dataclasses.dataclass(frozen=True)
class Normalize:
    """What mergekit's `normalize` means for a method: the value that asks for what the method does anyway, if one does; the
    variants that do what the others ask for; and where there is none, the way to have it."""

    harmless: bool | None = False
    fix: str = "remove it, and scale the weights by hand"
    variants: Mapping[bool, str] = dataclasses.field(default_factory=dict)
    unasked: str = ""
    """What to say where a recipe asks for neither, and has other weights than 1."""


@dataclasses.dataclass(frozen=True)
class Method:
    """A merge method. Its functions must be pure: a function of the block, of what is known of the whole model, and of the
    settings."""

    name: str
    merge: Function
    """The merge of a block: [B], float32."""
    formula: str = ""
    """One line for tables."""
    source: str = ""
    """Where it was published."""
    variant: str = ""
    """Methods of one name are told apart by the recipe's `variant`; the first in the table is the default."""
    parameters: Mapping[str, Parameter] = dataclasses.field(default_factory=dict)
    passes: tuple[Pass, ...] = ()
    unit: Literal["element", "block", "tensor"] = "block"
    """What a function must see at once. element: each element is merged by itself, and a block may hold elements of several
    tensors. block: a run of one tensor, and it is told which. tensor: always a whole tensor, whatever memory that takes."""
    has_base: bool = True
    """Whether it merges task vectors, differences to a base; else it merges the models themselves."""
    tolerance: float = 0.0
    """0: the same bits on every machine. Else `verify` allows recomputed values to differ by this share of the tensor's largest
    value."""
    element_bytes: Callable[[int], int] = lambda n: 4 * (8 * n + 8)
    """Memory of temporaries for each element of a block, from N."""
    linear: bool = False
    """Whether what the merge adds to the base is lambda sum_i(lambda_i C_i), with C_i free of lambda, of lambda_i and of the base:
    then it can be searched."""
    basis: Function | None = None
    """C [N, B] of a linear method, where that is had in a better way than by merging with each unit vector."""
    scored: Scored | None = None
    native: Native | None = None
    of_matrix: Callable[[Matrix, Settings], NDArray[Any]] | None = None
    """Delta [m, n], float32 or float64, of a whole matrix, which becomes theta + lambda Delta. `merge` is then for all else."""
    fits: Callable[[tuple[int, int], int], bool] = lambda _shape, _n: True
    """Whether a matrix of this shape can be merged of so many models; else it is merged as what is no matrix."""
    matrix_bytes: Callable[[int, int, int], int] = lambda _m, _n, _models: 0
    """Memory of `of_matrix` beside one task vector and the result in float32, from m, n and N."""
    is_flat: bool = False
    """Whether all singular values of what it adds are equal: then there is nothing to calibrate."""
    refuse: Callable[[Known, Settings, Sequence[str]], list[str]] = lambda _known, _settings, _names: []
    """What is wrong with the inputs, as far as is known; asked after each pass. `names` are the models'."""
    warnings: Callable[[Known, Settings, Sequence[str]], list[str]] = lambda _known, _settings, _names: []
    """What the passes say about inputs that were hardly meant."""
    impossible: Callable[[Settings, Sequence[str]], list[str]] = lambda _settings, _names: []
    """What is wrong with the request, told before any pass: parameters that do not go with D."""
    nearest_to: tuple[str, ...] = ()
    """Methods of mergekit that are not here and that this one comes nearest to."""
    normalize: Normalize = Normalize()
    hub_tag: str = ""
    """If it is not the name."""
    wrong_weights: Callable[[Sequence[float]], str] = lambda _weights: ""
    """What is wrong with the lambda_i of a tensor; empty if nothing is."""

    def __post_init__(self) -> None:
        """Raises ValueError for what a type checker would find, or what would be taken for something else without a word."""
        _check("unit", self.unit, ("element", "block", "tensor"))
        given = [name for wanted in self.passes for name in wanted.gives]
        if twice := sorted({name for name in given if given.count(name) > 1}):
            raise ValueError(f"passes: wanted a name of its own for each value, found {', '.join(twice)} twice")
        for wanted in self.passes:
            for name in wanted.parameters or ():
                _check(f"parameters of the pass `{wanted.title}`", name, tuple(self.parameters))
        for name, parameter in self.parameters.items():
            if name in (*SHARED_PARAMETERS, *ARGUMENTS):
                raise ValueError(f"parameters: wanted a name that recipes and calls have no other use for, found {name!r}")
            _check(f"parameters: searched of {name}", parameter.searched, ("", "scale", "share"))
            if parameter.searched == "scale" and name != "lambda":
                raise ValueError(f'{self.name}: wanted at most one parameter with `searched="scale"`, lambda, found {name!r}')
        if self._searched_as("share") != ([] if self.scored is None else [self.scored.share]):
            raise ValueError(
                f'{self.name}: wanted at most one parameter with `searched="share"`, the one that `scored` names as its share, '
                f"found {self._searched_as('share')}"
            )

    def _searched_as(self, kind: str) -> list[str]:
        return [name for name, parameter in self.parameters.items() if parameter.searched == kind]

    @property
    def scale(self) -> str:
        """The parameter that multiplies all that the merge adds to the base; empty if there is none."""
        return next(iter(self._searched_as("scale")), "")

    @property
    def share(self) -> str:
        """The parameter that says how much the `scored` basis keeps; empty if there is none."""
        return next(iter(self._searched_as("share")), "")

    @property
    def moved_by_scale(self) -> list[str]:
        """The passes that may find something else with another value of that parameter."""
        scale = self.scale
        return [one.title for one in self.passes if scale and (one.parameters is None or scale in one.parameters)]

    @property
    def full_name(self) -> str:
        """The name, with the variant where there are several."""
        return f"{self.name}-{self.variant}" if self.variant else self.name

    @property
    def tag(self) -> str:
        """What the Hub finds merges by this method by."""
        return self.hub_tag or self.name.replace("_", "-")

    @property
    def sweeps(self) -> int:
        """Full sweeps over the inputs in the usual case, the writing one included."""
        return len(self.passes) + 1

    @property
    def passes_over_inputs(self) -> int:
        """The same with the passes that only sample, as a store sees them: whoever fetches reads large pieces."""
        return self.sweeps + sum(isinstance(one, Ranks) for one in self.passes)

    @property
    def ranks(self) -> int:
        """How many ranks of each task are looked for in one pass at most; each takes a tally."""
        return max((len(p.places) for p in self.passes if isinstance(p, Ranks)), default=0)


def spans_of(low: Sequence[float], high: Sequence[float]) -> NDArray[np.float32]:
    """high - low in float32, the precision of what is divided by it; infinite, which makes every quotient 0, where high = low."""
    first, last = np.array(low, dtype=np.float32), np.array(high, dtype=np.float32)
    return np.where(last > first, last - first, np.float32(np.inf))
