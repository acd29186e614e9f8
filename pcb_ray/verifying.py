"""`verify`: a merged directory against its receipt and its inputs."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from pathlib import Path

from pcb_ray.errors import RequestError, RunError, with_place
from pcb_ray.files.checkpoint import read_header
from pcb_ray.files.store import Store
from pcb_ray.files.stores import open_store
from pcb_ray.local import LocalOwners
from pcb_ray.methods import Ranks
from pcb_ray.output.companions import RECIPE
from pcb_ray.planning import Plan, Sizes, fetched, open_inputs, plan_of
from pcb_ray.questions import CompareParts, DigestParts, shown_digest, sum_of
from pcb_ray.receipt import Receipt, Verified, inputs_of_receipt
from pcb_ray.recipe import Recipe
from pcb_ray.session import Session
from pcb_ray.steps import ARITHMETIC, versions

FIX = "Fix: get it again from where it is whole, or merge again."


def verify(out: str | os.PathLike[str], *, sample: int = 8, quiet: bool = False) -> Verified:
    """Check a merged directory against its receipt: every file's digest, and `sample` parts recomputed from the inputs.

    Raises RequestError if OUT or its inputs can't be read at all.
    """
    out = Path(out)
    receipt = Receipt.of(out)
    if receipt.arithmetic != ARITHMETIC:
        raise RequestError(
            f"{out}: wanted a merge with arithmetic {ARITHMETIC}, found {receipt.arithmetic}. "
            f"Fix: verify it with pcb_ray {receipt.versions.get('pcb_ray', 'of its time')}."
        )
    store = open_store()
    if problems := _wrong_files(store, out, receipt):
        return Verified(tuple(problems))
    recipe = Recipe.from_file(out / RECIPE)
    found_code = None if recipe.code is None else recipe.code.sha256
    if found_code != receipt.code_sha256:
        return Verified(
            (
                f"{recipe.merge_method}: wanted the code that merged, with sha256 {receipt.code_sha256}, found {found_code}. "
                "Fix: put that code back, or merge again.",
            )
        )
    inputs = open_inputs(recipe)
    if inputs.on_hub:
        inputs = fetched(recipe, inputs)
    inputs = dataclasses.replace(inputs, apart=frozenset(receipt.apart))
    plan = plan_of(recipe, inputs, max_shard_bytes=receipt.max_shard_bytes, sizes=_sizes(receipt, out))
    _check_facts(plan, receipt, out)
    if problems := _wrong_inputs(plan, receipt) or _wrong_tensors(plan, receipt, out) or _wrong_outputs(plan, receipt, out):
        return Verified(tuple(problems))
    store = open_store(plan.stamps, recipe.storage)
    session = Session(plan, lambda plan: LocalOwners(plan, store), quiet=quiet)
    parts, digest = range(len(plan.parts)), 0
    for _, answer in session.ask_parts("read the output", DigestParts(str(out)), parts, plan.part_bytes):
        digest = sum_of((digest, *answer.values()))
    if shown_digest(digest) != receipt.output_digest:
        problems.append(
            f"{out}: wanted tensors of digest {receipt.output_digest}, found {shown_digest(digest)}: they were changed after the "
            f"merge. {FIX}"
        )
    chosen = sorted({round(k * (len(parts) - 1) / max(1, sample - 1)) for k in range(sample)})
    compare = CompareParts(receipt.thresholds, str(out))
    try:
        answers = list(session.ask_parts("recompute a sample", compare, chosen))
    except (ArithmeticError, IndexError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, RequestError | RunError):
            raise
        # How many numbers a method needs under a name, it alone knows.
        raise RequestError(
            f"{out}: thresholds: wanted what {plan.method.full_name} has found of these models, found what it can't merge with: "
            f"{with_place(error)}. Fix: merge again."
        ) from error
    for _, differences in answers:
        problems += [f"{out / place}: wanted what its inputs give, found something else. {FIX}" for place in differences.values()]
    return Verified(tuple(problems))


def _wrong_files(store: Store, out: Path, receipt: Receipt) -> list[str]:
    problems = []
    for name, sha256 in receipt.files_sha256.items():
        found = store.sha256(str(out / name)) if (out / name).is_file() else "no file"
        if found != sha256:
            problems.append(f"{out / name}: wanted sha256 {sha256}, as in the receipt, found {found}. {FIX}")
    for file in receipt.outputs:
        path = out / file.name
        if not path.is_file() or path.stat().st_size != file.bytes:
            found = f"{path.stat().st_size}" if path.is_file() else "no file"
            problems.append(f"{path}: wanted {file.bytes} bytes, as in the receipt, found {found}. {FIX}")
            continue
        try:
            header = read_header(path)[2]
        except RequestError:  # a header that can't be read is not the one that was written either
            header = b""
        if hashlib.sha256(header).hexdigest() != file.header_sha256:
            problems.append(f"{path}: wanted the header that was written, found another. {FIX}")
    return problems


def _sizes(receipt: Receipt, out: Path) -> Sizes:
    names = [field.name for field in dataclasses.fields(Sizes)]
    found = dict(receipt.sizes)
    # So many chunks and pieces no plan has; to list them would take for ever.
    right = sorted(found) == sorted(names) and all(size > 0 for size in found.values())
    if (
        not right
        or found["chunk_elements"] << 20 < receipt.D
        or max((f.bytes for f in receipt.outputs), default=0) > found["copy_bytes"] << 20
    ):
        raise RequestError(f"{out}: sizes: wanted those of a plan ({', '.join(names)}), found {found}. Fix: merge again.")
    return Sizes(**found)


def _check_facts(plan: Plan, receipt: Receipt, out: Path) -> None:
    """A receipt that belongs to another recipe can't be used at all. Raises RequestError."""
    wanted: dict[str, object] = {"method": plan.method.full_name, "N": plan.N, "D": plan.D}
    wanted["thresholds"] = sorted(name for one in plan.method.passes for name in one.gives)
    found: dict[str, object] = {"method": receipt.method, "N": receipt.N, "D": receipt.D, "thresholds": sorted(receipt.thresholds)}
    problems = [
        f"{out}: {key}: wanted {wanted[key]}, which the recipe beside the receipt gives, found {found[key]}. Fix: merge again."
        for key in wanted
        if wanted[key] != found[key]
    ]
    of_ranks = [name for one in plan.method.passes if isinstance(one, Ranks) for name in one.gives]
    problems += [
        f"{out}: thresholds: {name}: wanted {plan.N} numbers, one for each model, found {len(numbers)}. Fix: merge again."
        for name, numbers in receipt.thresholds.items()
        if name in of_ranks and len(numbers) != plan.N
    ]
    if problems:
        raise RequestError(problems)


def _wrong_inputs(plan: Plan, receipt: Receipt) -> list[str]:
    now = inputs_of_receipt(plan, [one.digest for one in receipt.inputs])
    return [
        f"{one.source}: wanted the files that were merged, {[(f.name, f.size, f.header_sha256) for f in before.files]}, "
        f"found {[(f.name, f.size, f.header_sha256) for f in after.files]}. Fix: put those files back, or merge again."
        for one, before, after in zip(plan.inputs, receipt.inputs, now, strict=True)
        if before.files != after.files
    ]


def _wrong_tensors(plan: Plan, receipt: Receipt, out: Path) -> list[str]:
    """Files of the same headers may be matched otherwise: by values, or by the tables of transformers."""
    if plan.tensors_sha256 == receipt.tensors_sha256:
        return []
    before, now = receipt.versions.get("transformers", "none"), versions().get("transformers", "none")
    return [
        f"{out}: wanted the tensors that were merged (sha256 {receipt.tensors_sha256[:12]}...), found others in files of the same "
        f"headers ({plan.tensors_sha256[:12]}...): copies are not equal any more, or transformers {now} packs otherwise than "
        f"{before}. Fix: verify with transformers {before}, or merge again."
    ]


def _wrong_outputs(plan: Plan, receipt: Receipt, out: Path) -> list[str]:
    wanted, found = [(f.name, f.size) for f in plan.files], [(f.name, f.bytes) for f in receipt.outputs]
    return [] if wanted == found else [f"{out}: outputs: wanted {wanted}, which the inputs give, found {found}. {FIX}"]
