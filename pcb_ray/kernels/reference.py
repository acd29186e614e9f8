"""The kernel in torch: the methods' own functions on whole blocks, on any device. It is what the native kernel is held to.

A block comes as it was read: one tensor [B] of the file's dtype for the base (None: zeros, for a method without one) and for each
model. A kernel is chosen per owner by what its machine offers. Since all round alike, a cluster may mix them; receipts name what
was used."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pcb_ray.errors import InputError
from pcb_ray.methods import METHODS, Block, Extrema, Known, Method, Quantity, Settings, Sums
from pcb_ray.methods.method import Scored, TensorPlace
from pcb_ray.selection import Bracket

# For one bracket the counts (< lo, <= lo, < hi, <= hi) and the keys strictly between.
Counts = tuple[tuple[int, int, int, int], NDArray[Any]]


GRAM_RUN = 1 << 12
"""Products are summed over so many elements in single precision."""


class Loaded(NamedTuple):
    """A block as its files hold it, and where it lies, as far as its method may know."""

    sources: Sequence[Tensor | None]
    first: int = -1
    tensor: TensorPlace | None = None


def keys(x: Tensor, magnitude: bool) -> Tensor:
    """Integers that sort like x (or |x|); -0 and +0 are one key."""
    bits = x.view(torch.int32 if x.dtype == torch.float32 else torch.int64)
    size = bits & (0x7FFFFFFF if x.dtype == torch.float32 else 0x7FFFFFFFFFFFFFFF)
    return size if magnitude else torch.where(bits >= 0, size, -size)


class TorchKernel:
    name = "torch"

    def __init__(self, method: Method, settings: Settings, device: torch.device) -> None:
        self.method, self.settings, self.device = method, settings, device
        self._is_own = not any(method is known for known in METHODS)  # of the user's: what its functions return is looked at
        self._row_counts: dict[str, int] = {}  # by title, of the passes of such a method

    def load(self, loaded: Loaded, weights: Sequence[float] = ()) -> Block:
        """theta [B] and tau [N, B], float32; for a method without a base 0 and the models themselves."""
        base, *models = loaded.sources
        tau_NB = torch.stack([x.float() for x in models if x is not None])
        theta_B = torch.zeros_like(tau_NB[0]) if base is None else base.float()
        return Block(theta_B, tau_NB.sub_(theta_B), tuple(weights), loaded.first, loaded.tensor)

    def are_finite(self, loaded: Loaded) -> bool:
        """Whether all task vectors of the block are."""
        return bool(torch.isfinite(self.load(loaded).tau).all())

    def gram(self, loaded: Loaded) -> tuple[NDArray[np.float64], list[int]]:
        """The products of theta and the tau_i with each other, summed over the block: each with itself and those after it, row by
        row; and how many elements of each tau_i are 0. They are told to people and decide no byte."""
        block = self.load(loaded)
        rows_KB = torch.cat([block.theta[None], block.tau])
        runs_KRE = torch.nn.functional.pad(rows_KB, (0, -rows_KB.shape[1] % GRAM_RUN)).view(len(rows_KB), -1, GRAM_RUN)
        products_KK = torch.bmm(runs_KRE.permute(1, 0, 2), runs_KRE.permute(1, 2, 0)).double().sum(dim=0)
        rows, columns = torch.triu_indices(len(rows_KB), len(rows_KB))
        return products_KK[rows, columns].cpu().numpy(), (block.tau == 0).sum(dim=1).tolist()

    # --- passes -------------------------------------------------------------------------------------------------------------------

    def values(self, loaded: Loaded, quantity: Quantity, known: Known) -> Tensor:
        """The quantity's values [N, B]."""
        return self._ranked(quantity, self.load(loaded), known)

    def count(
        self, loaded: Loaded, quantity: Quantity, known: Known, brackets: Sequence[Sequence[Bracket]]
    ) -> tuple[list[int], list[list[Counts]]]:
        """For each model the largest key of the quantity, and its counts against each of the model's brackets."""
        largest, result = [], []
        for x_B, of_model in zip(self.values(loaded, quantity, known), brackets, strict=True):
            k_B = keys(x_B, quantity.magnitude)
            largest.append(int(k_B.max()))
            result.append([self._count(k_B, bracket) for bracket in of_model])
        return largest, result

    def _count(self, k_B: Tensor, bracket: Bracket) -> Counts:
        below_hi_B, above_lo_B = k_B < bracket.hi, k_B > bracket.lo
        counts = ((k_B < bracket.lo).sum(), len(k_B) - above_lo_B.sum(), below_hi_B.sum(), (k_B <= bracket.hi).sum())
        below_lo, upto_lo, below_hi, upto_hi = torch.stack([torch.as_tensor(c, device=k_B.device) for c in counts]).tolist()
        inside = k_B[above_lo_B & below_hi_B] if below_hi > upto_lo else k_B[:0]
        return (below_lo, upto_lo, below_hi, upto_hi), inside.cpu().numpy()

    def extremes(self, loaded: Loaded, wanted: Extrema, known: Known, smallest: list[float], largest: list[float]) -> bool:
        """Widen the lists, one entry per row, to hold all values of this block; empty ones get their rows.

        Returns whether the block's task vectors are finite."""
        block = self.load(loaded)
        low, high = torch.aminmax(self._rows(wanted, block, known), dim=1)
        for of_rows, found, better in ((smallest, low.tolist(), min), (largest, high.tolist(), max)):
            of_rows[:] = [better(pair) for pair in zip(of_rows, found, strict=True)] if of_rows else found
        return bool(torch.isfinite(block.tau).all())

    def rows(self, loaded: Loaded, wanted: Sums, known: Known) -> Tensor:
        """The rows that are to be added up, [any number, B] in float64."""
        return self._rows(wanted, self.load(loaded), known)

    # --- merging ------------------------------------------------------------------------------------------------------------------

    def merge(
        self, loaded: Loaded, known: Known, weights: Sequence[float], lambda_: float, dtype: torch.dtype
    ) -> tuple[Tensor, bool]:
        """The merged block [B] by these lambda_i and lambda, rounded once to dtype (nearest, ties to even), and whether all of it
        is finite."""
        merged_B = self._merged(self.load(loaded, weights), known, self._scaled_by(lambda_))
        rounded_B = merged_B.to(dtype)
        return rounded_B, bool(torch.isfinite(rounded_B).all())

    def delta(self, loaded: Loaded, known: Known, weights: Sequence[float]) -> Tensor:
        """What the merge adds to the base at lambda = 1 [B], float32."""
        block, plain = self.load(loaded, weights), self._scaled_by(1.0)
        if self._is_own and not self.method.linear:  # it may look at the base
            return self._merged(block, known, plain) - block.theta
        return self._merged(dataclasses.replace(block, theta=torch.zeros_like(block.theta)), known, plain)

    def basis(self, loaded: Loaded, known: Known) -> tuple[Tensor, bool]:
        """C [N, B], float32, of a linear method: row i is what the merge with the i-th unit vector adds to the base; and whether
        all are finite."""
        block = self.load(loaded)
        block = dataclasses.replace(block, theta=torch.zeros_like(block.theta))
        if self.method.basis is not None:
            C_NB = self.method.basis(block, known, self.settings)
        else:
            plain = self._scaled_by(1.0)
            units = (dataclasses.replace(block, weights=tuple(unit)) for unit in np.eye(self.settings.N).tolist())
            C_NB = torch.stack([self._merged(unit, known, plain) for unit in units])
        return C_NB, bool(torch.isfinite(C_NB).all())

    def scored(self, loaded: Loaded, wanted: Scored, known: Known) -> tuple[Tensor, Tensor, Tensor]:
        """What is merged of each task [N, B], its scores [N, B], and where they are kept."""
        values_NB = wanted.values(self._given(self.load(loaded)), known, self.settings)
        scores_NB = self.values(loaded, wanted.scores, known)
        kept_NB = wanted.kept(scores_NB, known)
        if self._is_own:
            for name, found, dtype in (("values", values_NB, torch.float32), ("kept", kept_NB, torch.bool)):
                self._check(f"scored.{name}", found, scores_NB.shape, dtype, "one for each model and element [N, B]")
        return values_NB, scores_NB, kept_NB

    def departure_from_linear(self, loaded: Loaded, known: Known, scored: Scored | None = None) -> float:
        """How far the merge of a block is from theta + lambda sum_i(lambda_i C_i), and from what `scored` makes of the same, as a
        share of the largest change: rounding aside 0 for a method that is linear, as its record says."""
        C_NB, _ = self.basis(loaded, known)
        weights = [0.25 + 0.5 * i for i in range(self.settings.N)]
        block = self.load(loaded, weights)
        factor = 0.5 if self.method.scale else 1.0
        change_B = sum((C_B * (w * factor) for C_B, w in zip(C_NB, weights, strict=True)), torch.zeros_like(block.theta))
        found_B = self._merged(block, known, self._scaled_by(0.5))
        largest = max(float(change_B.abs().max()), float((found_B - block.theta).abs().max()))
        rounding = float(block.theta.abs().max()) * 2.0**-22  # of adding a change to theta
        off = float((found_B - block.theta - change_B).abs().max())
        if scored is not None:
            values_NB, scores_NB, kept_NB = self.scored(loaded, scored, known)
            values_NB, scores_NB = torch.where(kept_NB, values_NB, 0.0), torch.where(kept_NB, scores_NB, -math.inf)
            made_B = scored.combine(block.theta.clone(), values_NB, scores_NB, known, weights, factor)
            self._check("scored.combine", made_B, block.theta.shape, torch.float32, "the merged elements [B]")
            off = max(off, float((found_B - made_B).abs().max()))
        return max(0.0, off - rounding) / largest if largest else 0.0

    def _scaled_by(self, scale: float) -> Settings:
        """The settings with this for what multiplies all that the merge adds to the base, if the method has such a parameter."""
        changes = {self.method.scale: scale} if self.method.scale else {}
        of_model = tuple({**own, **changes} for own in self.settings.of_model)
        return dataclasses.replace(self.settings, parameters={**self.settings.parameters, **changes}, of_model=of_model)

    # --- functions of the method --------------------------------------------------------------------------------------------------

    def _merged(self, block: Block, known: Known, settings: Settings) -> Tensor:
        merged_B = self.method.merge(self._given(block), known, settings)
        if self._is_own:
            self._check("merge", merged_B, block.theta.shape, torch.float32, "the merged elements [B]")
            # What is made of inputs that are not finite is no number, whatever the method says: the output is refused there.
            merged_B = torch.where(torch.isfinite(block.tau).all(dim=0), merged_B, math.nan)
        return merged_B

    def _ranked(self, quantity: Quantity, block: Block, known: Known) -> Tensor:
        x_NB = quantity.of(self._given(block), known, self.settings)
        if self._is_own:
            dtype = torch.float32 if quantity.bits == 32 else torch.float64
            self._check(quantity.name, x_NB, block.tau.shape, dtype, "a value for each model and element [N, B]")
            # Where tau itself is not finite, the inputs are to blame.
            sound_NB = torch.isfinite(block.tau)
            if bool((sound_NB & torch.isnan(x_NB)).any()):
                raise InputError(self._complaint(quantity.name, "numbers", "NaN", "a NaN has no rank: give such elements 0"))
            # Infinity has the largest key, which whoever counts refuses, and says which input or tensor it is.
            x_NB = torch.where(sound_NB & torch.isfinite(x_NB), x_NB, math.inf)
        return x_NB

    def _rows(self, wanted: Extrema | Sums, block: Block, known: Known) -> Tensor:
        x_KB = wanted.of(self._given(block), known, self.settings)
        if self._is_own:
            rows = x_KB.shape[0] if isinstance(x_KB, Tensor) and x_KB.ndim == 2 else 0
            self._check(wanted.title, x_KB, torch.Size([rows, block.tau.shape[1]]), torch.float64, "rows of values [any number, B]")
            if rows != (before := self._row_counts.setdefault(wanted.title, rows)):
                fix = "return the same rows for every block"
                raise InputError(self._complaint(wanted.title, f"{before} rows, as of the block before", str(rows), fix))
            # Where tau itself is not finite, the inputs are to blame, and whoever asked says so.
            if bool(torch.isfinite(block.tau).all()) and not bool(torch.isfinite(x_KB).all()):
                found = "NaN" if bool(torch.isnan(x_KB).any()) else "an infinite one"
                raise InputError(self._complaint(wanted.title, "finite values", found, "mend the method"))
        return x_KB

    def _given(self, block: Block) -> Block:
        """What a function of the method gets. One of the user's gets copies, since theta may be the input itself, in the caller's
        memory: a function that writes into what it is given spoils nothing."""
        return dataclasses.replace(block, theta=block.theta.clone(), tau=block.tau.clone()) if self._is_own else block

    def _check(self, name: str, found: object, shape: torch.Size, dtype: torch.dtype, what: str) -> None:
        if not isinstance(found, Tensor):
            shown = f"a {type(found).__name__}"
        elif found.shape != shape or found.dtype != dtype:
            shown = f"{list(found.shape)} of {found.dtype}"
        else:
            return
        wanted = f"{what}, here {list(shape)} of {dtype}"
        raise InputError(self._complaint(name, wanted, shown, "return a tensor of that shape and dtype"))

    def _complaint(self, name: str, wanted: str, found: str, fix: str) -> str:
        return f"merge_method: {name} of {self.method.name}: wanted {wanted}, found {found}. Fix: {fix}."
