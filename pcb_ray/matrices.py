"""Which tensors are matrices, and which way round they lie: what methods on whole matrices, and the calibration of singular values,
go by.

Rows are outputs and columns inputs. How a tensor is stored follows from the class of its layer, which transformers knows from the
config; where nobody knows, two dimensions are taken for a linear layer. A stack of experts is a matrix for each expert, a
convolution its output channels by all else. Embeddings, heads, vectors and what is no layer's weight are the *rest*."""

from __future__ import annotations

import fnmatch
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

Layer = Literal["rows", "columns", "row stack", "column stack", "none"]
"""What outputs are in a tensor. rows: [outputs, inputs, ...]; columns: [inputs, outputs, ...]; a stack: the same of
each expert; none: it is no matrix."""

REST = ("*embed*", "*wte*", "*wpe*", "*lm_head*", "*shared.weight", "*position*", "*relative_attention_bias*", "*token_type*")
"""What is of the rest, by name, where the class is not known."""


class View(NamedTuple):
    """A matrix in a tensor: element (i, j) is the tensor's element first + i * down + j * along."""

    first: int
    rows: int
    columns: int
    down: int
    along: int

    @property
    def stop(self) -> int:
        return self.first + (self.rows - 1) * self.down + (self.columns - 1) * self.along + 1

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows, self.columns


def views_of(shape: Sequence[int], layer: Layer, split: Sequence[int] = ()) -> tuple[View, ...]:
    """The matrices of a tensor of this shape; none for what is of the rest. `split` are the numbers of outputs of the layers that
    are packed in it, one after another; they add up to its outputs, or one number divides these."""
    if layer == "none" or len(shape) < 2 or not math.prod(shape):
        return ()
    if layer in ("row stack", "column stack"):
        if len(shape) < 3:
            return ()
        size = math.prod(shape[1:])
        of_one = views_of(shape[1:], "rows" if layer == "row stack" else "columns", split)
        return tuple(view._replace(first=view.first + k * size) for k in range(shape[0]) for view in of_one)
    rows, columns = shape[0], math.prod(shape[1:])
    whole = View(0, columns, rows, 1, columns) if layer == "columns" else View(0, rows, columns, columns, 1)
    sizes = [split[0]] * (whole.rows // split[0]) if len(split) == 1 else list(split) or [whole.rows]
    firsts = [0, *itertools.accumulate(sizes)]
    return tuple(whole._replace(first=first * whole.down, rows=size) for first, size in zip(firsts, sizes, strict=False))


def together(views: Sequence[View]) -> list[list[View]]:
    """Views of a tensor whose elements lie between each other's, by groups; each view apart where none do."""
    found: list[list[View]] = []
    stop = 0
    for view in sorted(views):
        if found and view.first < stop:
            found[-1].append(view)
        else:
            found.append([view])
        stop = max(stop, view.stop)
    return found


TURNED: Mapping[Layer, Layer] = {
    "rows": "columns",
    "columns": "rows",
    "row stack": "column stack",
    "column stack": "row stack",
    "none": "columns",
}
"""The other way round."""


def split_problem(shape: Sequence[int], layer: Layer, split: Sequence[int]) -> str:
    """What is wrong with the sizes of what is packed in a tensor; empty if nothing is."""
    of_one = shape[1:] if layer in ("row stack", "column stack") else shape
    outputs = math.prod(of_one[1:]) if layer in ("columns", "column stack") else of_one[0]
    if (len(split) == 1 and outputs % split[0]) or (len(split) > 1 and sum(split) != outputs):
        wanted = f"a number that divides its {outputs} outputs, or several that add up to them"
        return f"wanted {wanted}, found {', '.join(map(str, split))}. Fix: write the outputs of each layer that is packed in it."
    return ""


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether one of these patterns (fnmatch) is this name's."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def layer_of(name: str, shape: Sequence[int], known: Mapping[str, Layer] | None) -> Layer:
    """How a tensor is stored, by the classes of its model (None: nobody knows them)."""
    if known is not None and name in known:
        return known[name]
    if matches(name, REST) or len(shape) < 2 or name.endswith("bias"):
        return "none"
    return "rows" if len(shape) in (2, 4, 5) else "none"
