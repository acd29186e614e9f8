"""exp and tanh in operations that IEEE 754 rounds correctly, each rounded on its own: the same bits on every device, at any length.

Library functions round differently from one device, vector width or version to the next. These are minimax polynomials of our own
fit (Remez, relative error): exp(r) = 1 + r + r^2 q(r) on |r| <= ln(2)/2, within 0.05 (float32) and 0.001 (float64) of half an ulp
before rounding; tanh(x) = x + x^3 q(x^2) on [0, 1], 0.08. All float32 constants are exact in float32. The native kernel repeats
these lines in C."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pcb_ray.lazy import LazyModule

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = LazyModule("torch")

EXP32 = ("0x1.fffffcp-2", "0x1.555492p-3", "0x1.5558f2p-5", "0x1.123a20p-7", "0x1.6a23d0p-10")
EXP64 = (
    "0x1.0000000000000p-1",
    "0x1.555555555555bp-3",
    "0x1.5555555555503p-5",
    "0x1.111111110ec3fp-7",
    "0x1.6c16c16c305ddp-10",
    "0x1.a01a01b38a16dp-13",
    "0x1.a01a01364e078p-16",
    "0x1.71ddf00282b2ap-19",
    "0x1.27e5b493405efp-22",
    "0x1.af6c1db77d1aap-26",
    "0x1.1e3d06ff62840p-29",
)
TANH32 = (
    "-0x1.55553cp-2",
    "0x1.110be2p-3",
    "-0x1.b96222p-5",
    "0x1.600994p-6",
    "-0x1.0460c8p-7",
    "0x1.2da504p-9",
    "-0x1.77dd4ep-12",
)
# By the bytes of an element. ln 2 has two parts, the first with enough trailing zeros that k * LN2_HIGH is exact.
EXP = {4: EXP32, 8: EXP64}
LN2 = {4: ("0x1.62e000p-1", "0x1.0bfbe8p-15"), 8: ("0x1.62e42fefa0000p-1", "0x1.cf79abc9e3b3ap-40")}
LOG2_E = {4: "0x1.715476p+0", 8: "0x1.71547652b82fep+0"}
# Below this exp is 0 (float32: half the smallest subnormal is e^-103.97); the bound keeps the exponent arithmetic in range.
EXP_MIN = {4: -104.0, 8: -746.0}


def _horner(x: Tensor, coefficients: Sequence[str]) -> Tensor:
    result = torch.full_like(x, float.fromhex(coefficients[-1]))
    for c in reversed(coefficients[:-1]):
        result.mul_(x).add_(float.fromhex(c))
    return result


def _power_of_two(k: Tensor, bytes_per_element: int) -> Tensor:
    """2^k for an integer tensor k in the range of normal numbers, put together from its bits."""
    if bytes_per_element == 4:
        return ((k + 127) << 23).view(torch.float32)
    return ((k.to(torch.int64) + 1023) << 52).view(torch.float64)


def exp(x: Tensor) -> Tensor:
    """e^x for x <= 20 in float32 or float64, within 1 ulp, the same bits on every device."""
    size = x.element_size()
    high, low = (float.fromhex(part) for part in LN2[size])
    x = x.clamp(min=EXP_MIN[size])
    k = (x * float.fromhex(LOG2_E[size])).round_()
    r = (x - k * high).sub_(k * low)
    q = _horner(r, EXP[size])
    result = (r * r).mul_(q).add_(r).add_(1.0)
    # There are two factors, since 2^k itself may lie below the normal numbers.
    k = k.to(torch.int32)
    half = k >> 1
    return result.mul_(_power_of_two(half, size)).mul_(_power_of_two(k - half, size))


def tanh_unit(x: Tensor) -> Tensor:
    """tanh for |x| <= 1, float32, within 1.2 ulp, the same bits on every device."""
    square = x * x
    return _horner(square, TANH32).mul_(square).mul_(x).add_(x)


def tanh(x: Tensor) -> Tensor:
    """tanh of any float32 x, within 2 ulp, the same bits on every device."""
    size = x.abs()
    tail = 1.0 - 2.0 / (exp(size.clamp(max=10.0).mul_(2.0)).add_(1.0))
    return torch.where(size <= 1.0, tanh_unit(x.clamp(-1.0, 1.0)), tail.copysign_(x))


def sum_over_tasks(x_NB: Tensor) -> Tensor:
    """sum_i x_i [B], one task after another: torch's own sum over a dimension adds in an order that depends on the block's
    width."""
    total_B = x_NB[0].clone()
    for x_B in x_NB[1:]:
        total_B.add_(x_B)
    return total_B
