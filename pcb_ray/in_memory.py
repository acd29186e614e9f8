"""`merge_state_dicts`: models that are in memory, without Ray and without files."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pcb_ray.analysis import analyse
from pcb_ray.checks import nearest, wrong
from pcb_ray.errors import RequestError
from pcb_ray.files.checkpoint import Checkpoint, Tensor
from pcb_ray.files.foreign import show
from pcb_ray.files.safetensors import OF_TORCH, dtype_problems, name_problem
from pcb_ray.files.store import MemoryStore
from pcb_ray.local import LocalOwners
from pcb_ray.methods import METHODS, Method
from pcb_ray.output.companions import slots_of
from pcb_ray.planning import Inputs, plan_of
from pcb_ray.recipe import Model, Recipe
from pcb_ray.session import Session
from pcb_ray.steps import write
from pcb_ray.tied import Samples

if TYPE_CHECKING:
    import torch

log = logging.getLogger("pcb_ray")

# What other methods have, and has no effect here.
ELSEWHERE = {"variant", *(name for method in METHODS for name in method.parameters)}
FIXES = {"weight": "give `weights=`, one for each model", "merge_method": "give `method=`", "out_dtype": "give `dtype=`"}


def merge_state_dicts(
    base: Mapping[str, torch.Tensor],
    models: Sequence[Mapping[str, torch.Tensor]],
    *,
    method: str = Recipe.merge_method,
    weights: Sequence[float] | None = None,
    dtype: str | None = None,
    exclude: Sequence[str] = (),
    **parameters: Any,
) -> dict[str, torch.Tensor]:
    """Merge models that are in memory: no Ray, no files, the same bytes as `merge` of the same models on disk.

    `base` and `models` map names to CPU tensors; tensors of the base that share storage count once and share it in the result,
    unless a model has them apart. `weights` are the lambda_i (1 by default). `parameters` are the method's, such as density=0.1 or
    lambda_=1.0; one that each model may have for itself may be a list, one for each, and a list for lambda_ is over the layers, as
    in a recipe. Returns a new state dict in the base's dtypes, or in `dtype`. Raises RequestError."""
    import torch

    sources = tuple(Model(f"models[{i}]") for i in range(len(models)))
    shared, own, problems = _parameters(parameters, len(models), Recipe(sources, "base", method).method)
    given = [1.0] * len(models) if weights is None else list(weights)
    if len(given) != len(models):
        problems.append(f"weights: wanted one for each of {len(models)} models, found {len(given)}. Fix: give one each.")
    if problems:
        raise RequestError(problems)
    recipe = Recipe(
        models=tuple(Model(f"models[{i}]", weight=((None, given[i]),), parameters=own[i]) for i in range(len(models))),
        base_model="base",
        merge_method=method,
        parameters=shared,
        dtype=dtype,
        exclude=tuple(exclude),
    )
    arrays: dict[str, NDArray[np.uint8]] = {}
    named = [("base", base), *((model.source, state) for model, state in zip(recipe.models, models, strict=True))]
    opened = [_opened(name, state, arrays) for name, state in named]
    store = MemoryStore(arrays)
    inputs = Inputs(opened[0], tuple(opened[1:]), opened[0], Samples(store, whole=True))
    plan = plan_of(recipe, inputs, max_shard_bytes=1 << 62)
    session = Session(plan, lambda plan: LocalOwners(plan, store))
    known = analyse(session)
    write(session, store, known, "")
    for warning in plan.method.warnings(known, plan.settings, plan.names):
        log.warning("warning: %s", warning)
    written: dict[str, torch.Tensor] = {}
    (file,) = plan.files
    flat = torch.from_numpy(arrays[file.name])
    kinds = {short: getattr(torch, name) for name, short in OF_TORCH.items() if hasattr(torch, name)}
    for name, slot in slots_of(plan).items():
        kind, shape = kinds[slot.dtype], base[name].shape
        written[name] = flat[slot.start : slot.start + shape.numel() * kind.itemsize].clone().view(kind).view(shape)
    tied = dict(plan.tied)
    return {name: written[tied.get(name, name)] for name in base}


def _parameters(given: Mapping[str, Any], n: int, method: Method) -> tuple[dict[str, Any], list[dict[str, Any]], list[str]]:
    """What all models share, what each has of its own, and what is wrong."""
    shared: dict[str, Any] = {}
    own: list[dict[str, Any]] = [{} for _ in range(n)]
    problems = []
    for key, value in given.items():
        name = "lambda" if key == "lambda_" else key  # a keyword of Python
        if name not in method.parameters and name not in ELSEWHERE:
            able = [*method.parameters, *(["variant"] if method.variant else [])]
            fix = FIXES.get(name) or nearest(name, able, otherwise=f"give one of {', '.join(able)}" if able else "leave it out")
            problems.append(wrong(key, f"a parameter of {method.name}", value, fix))
        elif name not in method.parameters or not method.parameters[name].per_model or not isinstance(value, list | tuple):
            shared[name] = value
        elif len(value) != n:
            problems.append(f"{key}: wanted one for each of {n} models, found {len(value)}. Fix: give one number, or one each.")
        else:
            for of_model, one in zip(own, value, strict=True):
                of_model[name] = one
    return shared, own, problems


def _opened(source: str, state: Mapping[str, torch.Tensor], arrays: dict[str, NDArray[np.uint8]]) -> Checkpoint:
    """A state dict as a checkpoint whose files are arrays. Raises RequestError for dtypes that can't be merged."""
    import torch

    kinds = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in state.items()}
    dtypes = {name: OF_TORCH.get(kind, kind) for name, kind in kinds.items()}
    problems = [f"{source}: tensor {show(name)}: {problem}" for name in state if (problem := name_problem(name))]
    problems += dtype_problems(source, dtypes)
    if problems:
        raise RequestError(problems)
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    seen: dict[tuple[Any, ...], str] = {}
    for name, tensor in state.items():
        key = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and key in seen:
            aliases[name] = seen[key]
            continue
        seen[key] = name
        file = f"{source}/{name}"
        arrays[file] = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        tensors[name] = Tensor(name, dtypes[name], tuple(tensor.shape), file, 0)
    return Checkpoint(source=source, folder=None, tensors=tensors, aliases=aliases, files=(), config=None, commit=None)
