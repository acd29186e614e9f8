"""The three things to do with a recipe or models: `merge`, `verify`, `merge_state_dicts`; and the receipt."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pcb_ray import runtime
from pcb_ray.analysis import Run, Sweep, check_twins, digest_of, digests_of_inputs, thresholds_of, warnings_of
from pcb_ray.answers import Thresholds
from pcb_ray.errors import RequestError
from pcb_ray.files.checkpoint import Checkpoint, Tensor, open_checkpoint, read_header
from pcb_ray.output import companions as beside
from pcb_ray.output.place import check_out, check_place
from pcb_ray.output.state import State, asked_of
from pcb_ray.planning import DEFAULT_SHARD_BYTES, Plan, choose_block, plan_of
from pcb_ray.planning import plan as make_plan
from pcb_ray.planning import worker_bytes as announced_bytes
from pcb_ray.progress import readable_bytes
from pcb_ray.receipt import RECEIPT
from pcb_ray.recipe import Model, Recipe

if TYPE_CHECKING:
    import torch

log = logging.getLogger("pcb_ray")

# The arithmetic of pcb.py: receipts name it, and a resumed or verified merge must have been made with the same one.
ARITHMETIC = "ieee-2"
WRITE = "write"  # the name of the last sweep


# --- merge ------------------------------------------------------------------------------------------------------------------------


def merge(
    recipe: Recipe | Mapping[str, Any] | str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    workers: int | None = None,
    device: str = "cpu",
    address: str | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    memory: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Merge the recipe's models into the directory `out` on Ray, and return the receipt (also in `out`/pcb_receipt.json).

    The output's bytes are a function of the inputs and the recipe: neither `workers`, `memory` (bytes of anonymous memory per worker), `device`
    nor a lost worker shows in them. `out` appears only when whole. A run that was killed goes on with `resume=True`.

    Raises RequestError if the request or an input is wrong (before anything is written), RunError if the run can't be finished.
    """
    start = time.monotonic()
    recipe = Recipe.of(recipe)
    out = Path(out)
    check_place(out)
    plan = fetched_plan(recipe, max_shard_bytes)
    check_out(out, plan, overwrite=overwrite, resume=resume)
    base, tokenizer = companions(recipe)
    files = beside.side_files(recipe, plan, base, tokenizer)
    if memory is not None:
        choose_block(plan, "cpu", memory)  # a wrong bound is told before a cluster starts
    for note in () if resume else plan.notes:  # told when it began
        log.warning("note: %s", note)

    with contextlib.ExitStack() as stack:
        state = stack.enter_context(State(out, asked_of(plan, ARITHMETIC), resume=resume, overwrite=overwrite))
        stack.enter_context(runtime.cluster(address))
        device = runtime.choose_device(device)
        block = choose_block(plan, device, memory)
        worker_bytes = announced_bytes(plan, block)
        workers = runtime.choose_workers(workers, device, worker_bytes, plan.chunks)
        log.info(
            "%d workers on %s, at most %s each; blocks of %d elements, %d chunks",
            workers,
            device,
            readable_bytes(worker_bytes),
            block,
            plan.chunks,
        )
        owners = runtime.RayOwners(
            plan, str(state.staging), workers=workers, device=device, worker_bytes=worker_bytes, block_elements=block
        )
        stack.callback(owners.close)
        owners.wait_until_ready()
        startup_s = time.monotonic() - start
        run = Run(plan, owners, quiet=quiet)
        earlier = state.found.get("spent", {})
        thresholds, written = _execute(run, state, lambda: _spent(earlier, owners, start))
        warnings = warnings_of(plan, thresholds)
        receipt = {
            "versions": versions(),
            "arithmetic": ARITHMETIC,
            "method": plan.method,
            "N": plan.N,
            "D": plan.D,
            "thresholds": thresholds.to_json(),
            "warnings": warnings,
            "sweeps": [asdict(s) for s in run.sweeps],
            "full_sweeps": 1 + sum(s.bytes >= plan.sweep_bytes for s in run.sweeps if s.name != WRITE),  # the write may be in parts
            "bytes_written": plan.written_bytes,
            "workers": workers,
            "announced_worker_bytes": worker_bytes,
            "chunk_elements": plan.chunk_elements,
            "max_shard_bytes": max_shard_bytes,
            "inputs": _receipt_of_inputs(plan, run.inputs),
            "outputs": [
                {"name": f.name, "bytes": f.size, "header_sha256": hashlib.sha256(f.header).hexdigest()} for f in plan.files
            ],
            "output_digest": written,
            "resumed": resume,
            "startup_s": round(startup_s, 3),
            **_spent(earlier, owners, start),
        }
        files[beside.CARD] = beside.model_card(plan, versions()["pcb_ray"])
        receipt["files_sha256"] = beside.write_side_files(state.staging, files)
        (state.staging / RECEIPT).write_text(json.dumps(receipt, indent=2) + "\n")
        state.commit()
    for warning in warnings:
        log.warning("warning: %s", warning)
    return receipt


def fetched_plan(recipe: Recipe, max_shard_bytes: int = DEFAULT_SHARD_BYTES) -> Plan:
    """The plan; if it is sound, with the models of the Hub fetched."""
    plan = make_plan(recipe, max_shard_bytes=max_shard_bytes)
    hub = any(i.commit is not None for i in plan.inputs)
    return make_plan(recipe, max_shard_bytes=max_shard_bytes, download=True) if hub else plan


def companions(recipe: Recipe) -> tuple[Checkpoint, Checkpoint]:
    """The checkpoints that config and tokenizer are taken from."""
    base = open_checkpoint(recipe.base_model or recipe.models[0].source, recipe.folder, download=True)
    if recipe.tokenizer_source in ("base", recipe.base_model):
        return base, base
    return base, open_checkpoint(recipe.tokenizer_source, recipe.folder, download=True)


def _spent(earlier: Mapping[str, Any], owners: runtime.Owners, start: float) -> dict[str, Any]:
    """What all runs of this merge took; of one that was killed, what it took up to its last finished sweep."""
    stats = owners.stats.values()
    return {
        "kernels": sorted({*earlier.get("kernels", ()), *(s["kernel"] + " on " + s["device"].split(":")[0] for s in stats)}),
        "bytes_read": earlier.get("bytes_read", 0) + sum(s["bytes_read"] for s in stats),
        "workers_lost": earlier.get("workers_lost", 0) + owners.deaths,
        "peak_worker_bytes": max([earlier.get("peak_worker_bytes", 0), *(s["peak_bytes"] for s in stats)]),
        "elapsed_s": round(earlier.get("elapsed_s", 0.0) + time.monotonic() - start, 3),
    }


def _execute(run: Run, state: State, spent: Callable[[], dict[str, Any]]) -> tuple[Thresholds, str]:
    """Analyse and write what is not yet done; the thresholds and the digest of the whole output."""
    plan, found = run.plan, state.found
    before = [Sweep(**sweep) for sweep in found.get("sweeps", [])]
    run.inputs = found.get("inputs", [])

    def keep(thresholds: Thresholds) -> None:
        sweeps = [asdict(s) for s in before + run.sweeps]
        found.update(thresholds=thresholds.to_json(), inputs=run.inputs, sweeps=sweeps, spent=spent())
        state.save()

    if not before:
        check_twins(run)
    thresholds = thresholds_of(run, Thresholds.from_json(found.get("thresholds", {})), keep)

    state.make_files(plan)
    single = plan.sweeps == 1
    for _, answer in run.sweep(WRITE, "write", thresholds, single, chunks=_unwritten(run, state), how="store"):
        state.wrote({str(chunk): _journal_entry(*digests) for chunk, digests in answer.items()})
    pieces = [p for p in plan.copy_pieces() if _piece_name(p) not in state.journal]
    for batch, digests in run.owners.store("copy", pieces):
        state.wrote({_piece_name(p): d.hex() for p, d in zip(batch, digests, strict=True)})
    run.sweeps = before + run.sweeps
    entries = [state.journal[str(chunk)].split() for chunk in range(plan.chunks)]
    if single:
        run.inputs = digests_of_inputs(
            plan, {chunk: tuple(bytes.fromhex(d) for d in entry[1:]) for chunk, entry in enumerate(entries)}
        )
    return thresholds, digest_of([entry[0] for entry in entries] + [state.journal[_piece_name(p)] for p in plan.copy_pieces()])


def _journal_entry(written: bytes, inputs: Sequence[bytes]) -> str:
    return " ".join(d.hex() for d in (written, *inputs))


def _piece_name(piece: tuple[int, int, int]) -> str:
    return f"copy {piece[0]} {piece[1]}"


def _unwritten(run: Run, state: State) -> list[int]:
    """The chunks still to write. What the journal of an earlier run names is believed only if the files hold just those bytes."""
    plan = run.plan
    claimed = [chunk for chunk in range(plan.chunks) if str(chunk) in state.journal]
    good: set[int] = set()
    if claimed:
        log.info("%d of %d chunks were written before; checking them", len(claimed), plan.chunks)
        for _, digests in run.owners.ask("written_digests", claimed):
            good.update(chunk for chunk, digest in digests.items() if state.journal[str(chunk)].split()[0] == digest.hex())
    pieces = [p for p in plan.copy_pieces() if _piece_name(p) in state.journal]
    for batch, found in run.owners.ask("copied_digests", pieces):
        for piece, digest in zip(batch, found, strict=True):
            if state.journal[_piece_name(piece)] != digest.hex():
                del state.journal[_piece_name(piece)]
    return [chunk for chunk in range(plan.chunks) if chunk not in good]


def _receipt_of_inputs(plan: Plan, digests: Sequence[str]) -> list[dict[str, Any]]:
    return [
        {"source": one.source, "commit": one.commit, "digest": digest, "files": [f._asdict() for f in one.files]}
        for one, digest in zip(plan.inputs, digests, strict=True)
    ]


def versions() -> dict[str, str]:
    """What made an output: for the receipt."""
    names = {"pcb_ray": "pcb-ray", "torch": "torch", "ray": "ray", "numpy": "numpy"}
    return {key: importlib.metadata.version(name) for key, name in names.items()} | {
        "python": platform.python_version(),
        "machine": platform.machine(),
    }


# --- verify -----------------------------------------------------------------------------------------------------------------------


def verify(out: str | os.PathLike[str], *, sample: int = 8, quiet: bool = False) -> list[str]:
    """Check a merged directory against its receipt: every file's digest, and `sample` chunks recomputed from the inputs.

    Returns what is wrong, nothing if all is well. Raises RequestError if OUT or its inputs can't be read at all.
    """
    out = Path(out)
    try:
        receipt = json.loads((out / RECEIPT).read_text())
    except (OSError, ValueError) as error:
        raise RequestError(f"{out / RECEIPT}: can't be read ({error}); verify takes a directory that pcb-ray merge wrote") from None
    needed = {"arithmetic", "versions", "files_sha256", "outputs", "inputs", "thresholds", "output_digest", "max_shard_bytes"}
    if not isinstance(receipt, dict) or not needed <= receipt.keys():
        raise RequestError(f"{out / RECEIPT}: is not a receipt; verify takes a directory that pcb-ray merge wrote")
    if receipt["arithmetic"] != ARITHMETIC:
        raise RequestError(
            f"{out}: was merged with arithmetic {receipt['arithmetic']}, this is {ARITHMETIC}; "
            f"verify it with pcb_ray {receipt['versions']['pcb_ray']}"
        )
    problems = []
    for name, sha256 in receipt["files_sha256"].items():
        found = hashlib.sha256((out / name).read_bytes()).hexdigest() if (out / name).is_file() else "missing"
        if found != sha256:
            problems.append(f"{out / name}: sha256 {found}, the receipt says {sha256}")
    for file in receipt["outputs"]:
        path = out / file["name"]
        if not path.is_file() or path.stat().st_size != file["bytes"]:
            problems.append(
                f"{path}: {path.stat().st_size if path.is_file() else 'missing'}, the receipt says {file['bytes']} bytes"
            )
            continue
        header = b""
        with contextlib.suppress(RequestError):  # a header that can't be read is not the one that was written either
            header = read_header(path)[2]
        if hashlib.sha256(header).hexdigest() != file["header_sha256"]:
            problems.append(f"{path}: its header is not the one that was written")
    if problems:
        return problems
    recipe = Recipe.from_yaml((out / beside.RECIPE).read_text(), out.parent)
    plan = make_plan(recipe, max_shard_bytes=receipt["max_shard_bytes"], download=True)
    for then, now in zip(receipt["inputs"], plan.inputs, strict=True):
        place = os.path.basename if now.commit is not None else str  # models of the Hub: wherever this machine keeps them
        before = [(place(f["path"]), f["size"], f["header_sha256"]) for f in then["files"]]
        after = [(place(f.path), f.size, f.header_sha256) for f in now.files]
        if before != after:
            problems.append(f"{now.source}: its files are not those that were merged: {before} then, {after} now")
    if problems:
        return problems
    owners = runtime.LocalOwners(plan, str(out))
    run = Run(plan, owners, quiet=quiet)
    digests: dict[int, str] = {}
    for _, answer in run.sweep("read the output", "written_digests", share=plan.written_bytes / plan.sweep_bytes):
        digests.update((chunk, digest.hex()) for chunk, digest in answer.items())
    pieces = plan.copy_pieces()
    copied = {p: d.hex() for batch, part in owners.ask("copied_digests", pieces) for p, d in zip(batch, part, strict=True)}
    if digest_of([digests[chunk] for chunk in range(plan.chunks)] + [copied[p] for p in pieces]) != receipt["output_digest"]:
        problems.append(
            f"{out}: the tensors' digest is not the receipt's {receipt['output_digest']}: the data were changed after the merge"
        )
    chosen = sorted({round(k * (plan.chunks - 1) / max(1, sample - 1)) for k in range(sample)})
    thresholds = Thresholds.from_json(receipt["thresholds"])
    for _, answer in run.sweep("recompute a sample", "merged_digests", thresholds, chunks=chosen):
        for chunk, digest in answer.items():
            if digest.hex() != digests[chunk]:
                first = next(plan.segments(chunk * plan.chunk_elements, chunk * plan.chunk_elements + 1))
                problems.append(
                    f"{out}: chunk {chunk} (from {plan.tensors[first.tensor].name} on) differs from what its inputs give"
                )
    return problems


# --- models in memory -------------------------------------------------------------------------------------------------------------


def merge_state_dicts(
    base: Mapping[str, torch.Tensor],
    models: Sequence[Mapping[str, torch.Tensor]],
    *,
    method: str = "pcb",
    mask_ratio: float | Sequence[float] = 0.1,
    variant: str = "pairwise",
    weights: Sequence[float] | None = None,
    lambda_: float = 1.0,
    dtype: str | None = None,
    exclude: Sequence[str] = (),
) -> dict[str, torch.Tensor]:
    """Merge models that are in memory: no Ray, no files, the same bytes as `merge` of the same models on disk.

    `base` and `models` map names to CPU tensors; tensors of the base that share storage count once and share it in the result. mask_ratio is one
    number or one per model; `weights` are the lambda_i (1 by default). Returns a new state dict in the base's dtypes, or in `dtype`.
    """
    import torch

    ratios = [mask_ratio] * len(models) if isinstance(mask_ratio, int | float) else list(mask_ratio)
    weights = [1.0] * len(models) if weights is None else list(weights)
    problems = [
        f"{name}: {len(given)} given for {len(models)} models; give one each"
        for name, given in (("mask_ratio", ratios), ("weights", weights))
        if len(given) != len(models)
    ]
    if problems:
        raise RequestError(problems)
    recipe = Recipe(
        models=tuple(Model(f"models[{i}]", weight=((None, weights[i]),), density=ratios[i]) for i in range(len(models))),
        base_model="base",
        merge_method=method,
        density=ratios[0] if ratios else 0.1,
        lambda_=lambda_,
        variant=variant,
        dtype=dtype,
        exclude=tuple(exclude),
    )
    memory: dict[str, np.ndarray[Any, np.dtype[np.uint8]]] = {}
    named = [("base", base), *((f"models[{i}]", m) for i, m in enumerate(models))]
    checkpoints = [_in_memory(name, state_dict, memory) for name, state_dict in named]
    plan = plan_of(recipe, checkpoints, max_shard_bytes=1 << 62)
    (file,) = plan.files
    memory[file.name] = np.empty(file.size, dtype=np.uint8)
    owners = runtime.LocalOwners(plan, memory=memory)
    run = Run(plan, owners, quiet=True)
    thresholds = thresholds_of(run)
    for _ in run.sweep(WRITE, "write", thresholds, False):
        pass
    for _ in owners.ask("copy", plan.copy_pieces()):
        pass
    for warning in warnings_of(plan, thresholds):
        log.warning("warning: %s", warning)
    written: dict[str, torch.Tensor] = {}
    flat, kinds = torch.from_numpy(memory[file.name]), _torch_dtypes()
    for name, slot in beside.slots_of(plan).items():
        kind, shape = kinds[slot.dtype], base[name].shape
        written[name] = flat[slot.start : slot.start + shape.numel() * kind.itemsize].clone().view(kind).view(shape)
    tied = dict(plan.tied)
    return {name: written[tied.get(name, name)] for name in base}


def _torch_dtypes() -> dict[str, torch.dtype]:
    from safetensors.torch import _TYPES

    return {name: kind for name, kind in _TYPES.items() if kind is not None}


def _in_memory(
    source: str, state_dict: Mapping[str, torch.Tensor], memory: dict[str, np.ndarray[Any, np.dtype[np.uint8]]]
) -> Checkpoint:
    """A state dict as a checkpoint whose files are arrays in `memory`."""
    import torch

    names = {kind: name for name, kind in _torch_dtypes().items()}
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    seen: dict[tuple[Any, ...], str] = {}
    for name, tensor in state_dict.items():
        key = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and key in seen:
            aliases[name] = seen[key]
            continue
        seen[key] = name
        file = f"memory:{source}/{name}"
        memory[file] = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        tensors[name] = Tensor(name, names[tensor.dtype], tuple(tensor.shape), file, 0)
    return Checkpoint(source=source, folder=None, tensors=tensors, aliases=aliases, files=(), config=None, commit=None)
