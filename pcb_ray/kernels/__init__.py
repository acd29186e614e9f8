"""The arithmetic of a block: in torch on any device (`reference`, the specification), or in C on CPUs (`native`), the same bits
from both."""

from __future__ import annotations

import torch

from pcb_ray.kernels.native import NativeKernel, load_native
from pcb_ray.kernels.reference import TorchKernel
from pcb_ray.methods import Method, Settings


def choose_kernel(method: Method, settings: Settings, device: torch.device) -> TorchKernel:
    """The fastest kernel for this device: native on a CPU where it was built, torch otherwise or if PCB_RAY_KERNEL=torch."""
    able = device.type == "cpu" and (method.native is None or method.native.most_models >= settings.N)
    return (NativeKernel if able and load_native() is not None else TorchKernel)(method, settings, device)
