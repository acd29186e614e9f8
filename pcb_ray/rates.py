"""How fast a core of this machine is in each sweep of a merge: a small synthetic model is merged, by the code that workers run.

The model has the plan's method, parameters, number of models and dtypes, and lies in memory; a few processes merge it at once, as
workers share a machine. What is measured is the time that cores spend, so that other programs here matter little: on reading
cached files, digests, the kernel and all of Python, but on no disk and no network."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import shutil
import statistics
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from threading import BrokenBarrierError
from typing import Any

from pcb_ray.budget import CPU_BLOCK
from pcb_ray.errors import RunError
from pcb_ray.files.checkpoint import DTYPE_BYTES, Checkpoint, Tensor
from pcb_ray.files.room import MEMORY
from pcb_ray.files.store import LocalStore
from pcb_ray.planning import Inputs, Plan, Sizes, plan_of
from pcb_ray.recipe import Recipe

AT_ONCE = 8  # processes: enough to share caches and memory as workers do, and still a second's work to start
MEASURED_S = 1.0
MODEL_BYTES = 64 << 20  # of base and models together, so that no sweep is over before it has begun
MIN_BLOCKS = 4
ROW = 1 << 10
TALLY_ENTRIES = 1 << 15  # a small model's bracket holds no larger share of its keys than a large one's
START_S = 120.0


@dataclass(frozen=True)
class _Model:
    """What is measured."""

    recipe: Recipe
    dtypes: tuple[str | None, ...]
    """Of the base (None: it is not read) and the models: the one that most elements have."""
    block_elements: int
    sample_stride: int

    @property
    def elements(self) -> int:
        each = sum(DTYPE_BYTES[dtype] for dtype in self.dtypes if dtype)
        rows = max(MODEL_BYTES // each, MIN_BLOCKS * self.block_elements) // ROW
        return rows * ROW


def measured_rates(plan: Plan, block_elements: int) -> dict[str, float]:
    """Elements per second and core of each sweep of this plan with blocks of this size, by the names that sweeps have in a receipt;
    of a sample, the elements that are looked at. Takes some seconds, half of them to import torch.

    Raises what the method raises, and RunError if the processes can't be started."""
    dtypes = []
    for source in range(plan.N + 1):
        elements = Counter[str]()
        for tensor in plan.tensors:
            if (one := tensor.sources[source]) is not None:
                elements[one.dtype] += one.numel
        dtypes.append(elements.most_common(1)[0][0] if elements else None)
    block = min(block_elements, CPU_BLOCK)  # more only where a block is a whole tensor
    model = _Model(plan.recipe, tuple(dtypes), block, plan.sizes.sample_stride)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    at_once = min(cores, AT_ONCE)
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(at_once, context, initializer=_meet_at, initargs=(context.Barrier(at_once),)) as pool:
            found = list(pool.map(_measure, [model] * at_once))
    except (BrokenExecutor, BrokenBarrierError, OSError) as error:
        raise RunError(
            f"--cluster: wanted to measure how fast {at_once} processes merge here, found {type(error).__name__} in one of them. "
            "Fix: look after memory and /dev/shm on this machine."
        ) from error
    return {name: statistics.fmean(one[name] for one in found) for name in found[0]}


# --- in a process of its own ------------------------------------------------------------------------------------------------------

_barrier: Any = None


def _meet_at(barrier: Any) -> None:
    global _barrier
    _barrier = barrier


def _measure(model: _Model) -> dict[str, float]:
    from pcb_ray.analysis import analyse
    from pcb_ray.local import LocalOwners
    from pcb_ray.session import Session
    from pcb_ray.steps import write

    class Timed(LocalOwners):
        """They note what time of a core each sweep takes."""

        core_s: list[float]

        def fold(self, *arguments: Any) -> Any:
            start_s = time.process_time()
            total = super().fold(*arguments)
            self.core_s.append(time.process_time() - start_s)
            return total

        def store(self, *arguments: Any, **options: Any) -> Iterator[Any]:
            start_s = time.process_time()
            yield from super().store(*arguments, **options)
            self.core_s.append(time.process_time() - start_s)

    in_memory = os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free > 3 * AT_ONCE * MODEL_BYTES  # containers have less
    with tempfile.TemporaryDirectory(prefix="pcb-ray-", dir=MEMORY if in_memory else None) as folder:
        plan, store = _synthetic(model, Path(folder)), LocalStore()
        owners = Timed(plan, store, threads=1, block_elements=model.block_elements)
        elements, core_s = defaultdict[str, float](float), defaultdict[str, float](float)
        _barrier.wait(START_S)
        until, is_first = time.monotonic() + MEASURED_S, True
        while is_first or not core_s or time.monotonic() < until:
            session, owners.core_s = Session(plan, lambda _plan: owners, relate=True), []
            write(session, store, analyse(session), folder)
            for file in plan.files:
                os.unlink(f"{folder}/{file.name}")
            for sweep, seconds in zip(session.sweeps, owners.core_s, strict=True):
                if not is_first:  # then buffers are made
                    elements[sweep.name] += plan.D * sweep.bytes / plan.sweep_bytes
                    core_s[sweep.name] += seconds
            is_first = False
        return {name: elements[name] / core_s[name] for name in core_s}


def _synthetic(model: _Model, folder: Path) -> Plan:
    """A plan for models that are written here: a base, and steps from it of which its dtype swallows many, as in fine-tuning."""
    import torch

    from pcb_ray.sources import DTYPES

    elements, generator = model.elements, torch.Generator().manual_seed(0)
    tensors = -(-elements // model.block_elements)  # none is larger than a block
    cuts = [elements // ROW * k // tensors for k in range(tensors + 1)]
    base_D = torch.randn(elements, generator=generator).mul_(0.02)
    opened = []
    for k, dtype in enumerate(model.dtypes):
        values_D = base_D if k == 0 else base_D + torch.randn(elements, generator=generator).mul_(1e-4)
        file, kind = folder / f"{k}", dtype or "BF16"
        file.write_bytes(values_D.to(DTYPES[kind]).view(torch.uint8).numpy().data)
        size = ROW * DTYPE_BYTES[kind]
        of_file = {
            (name := f"model.layers.{at}.weight"): Tensor(name, kind, (stop - first, ROW), str(file), first * size)
            for at, (first, stop) in enumerate(itertools.pairwise(cuts))
        }
        opened.append(Checkpoint(f"{k}", None, of_file, {}, (), None, None))
    recipe = replace(
        model.recipe,
        base_model="0",
        models=tuple(replace(one, source=f"{k + 1}") for k, one in enumerate(model.recipe.models)),
        exclude=(),
        tokenizer_source="base",
        chat_template=None,
        search=None,
        sweep=None,
        storage={},
    )
    sizes = Sizes(elements, sample_stride=model.sample_stride, tally_entries=TALLY_ENTRIES)
    return plan_of(recipe, Inputs(opened[0], tuple(opened[1:]), opened[0]), max_shard_bytes=1 << 62, sizes=sizes)
