"""What a receipt claims, held against the output that it lies in, the inputs and the recipe.

`verify` asks whether an output is what its receipt says, `merge --resume` whether it is what a recipe asks for."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools

from pcb_ray.errors import RequestError, RunError, with_place
from pcb_ray.files.hub_commit import Branch
from pcb_ray.files.objects import HUB_SCHEME, unreadable
from pcb_ray.files.store import Store, is_remote
from pcb_ray.files.stores import size_of_file
from pcb_ray.local import LocalOwners
from pcb_ray.methods import Ranks
from pcb_ray.output.companions import CARD, RECIPE, sha256_of, side_files
from pcb_ray.planning import Inputs, Plan, Sizes, fetched, open_inputs, plan_of
from pcb_ray.questions import CompareParts
from pcb_ray.receipt import RECEIPT, Receipt, inputs_of_receipt, read_small
from pcb_ray.recipe import Recipe
from pcb_ray.session import Session
from pcb_ray.steps import ARITHMETIC, versions

FIX = "Fix: get it again from where it is whole, or merge again."
SAMPLE = 8
"""Parts of an output that are recomputed, if nobody says how many."""
MAX_HEADER_BYTES = 1 << 30


def differences(recipe: Recipe, out: str, receipt: Receipt, max_shard_bytes: int, store: Store) -> list[str]:
    """Why the merge that lies in `out` is not the one that is asked for, or not whole; nothing if a merge of the recipe would write
    the same. Its tensors are looked at in a sample, all else whole.

    Raises RequestError if the recipe can't be merged at all."""
    asked = {
        "arithmetic": ARITHMETIC,
        "max_shard_bytes": max_shard_bytes,
        "method": recipe.method.full_name,
        "N": len(recipe.models),
    }
    asked["code_sha256"] = None if recipe.code is None else recipe.code.sha256
    found = {key: getattr(receipt, key) for key in asked}
    if found != asked:
        return [
            f"{out}: {key}: wanted {asked[key]}, found {found[key]}. Fix: ask for the same merge."
            for key in asked
            if found[key] != asked[key]
        ]
    if problems := wrong_files(store, out, receipt):
        return problems
    inputs, plan = planned(recipe, receipt, None)
    try:
        check_facts(plan, receipt, out)
    except RequestError as error:
        return list(error.problems)
    if dict(receipt.sizes) != dataclasses.asdict(plan.sizes):
        return [f"{out}: sizes: wanted {dataclasses.asdict(plan.sizes)}, found {dict(receipt.sizes)}. {FIX}"]
    problems = wrong_inputs(plan, receipt) or wrong_tensors(plan, receipt, out) or wrong_outputs(plan, receipt, out)
    if problems := problems or _other_side_files(plan, inputs, receipt, out, store) or _newer(plan, receipt, out, store):
        return problems
    session = Session(plan, lambda plan: LocalOwners(plan, store))
    try:
        return wrong_parts(session, receipt, out, SAMPLE)
    except RequestError as error:
        return list(error.problems)


def planned(recipe: Recipe, receipt: Receipt, sizes: Sizes | None) -> tuple[Inputs, Plan]:
    """The inputs as they are now, and the plan of the merge that the receipt tells of."""
    inputs = open_inputs(recipe)
    if inputs.on_hub:
        inputs = fetched(recipe, inputs)
    inputs = dataclasses.replace(inputs, apart=frozenset(receipt.apart))
    return inputs, plan_of(recipe, inputs, max_shard_bytes=receipt.max_shard_bytes, sizes=sizes)


def _other_side_files(plan: Plan, inputs: Inputs, receipt: Receipt, out: str, store: Store) -> list[str]:
    """Files beside the tensors that would not be what they are."""
    asked = side_files(plan.recipe, plan, inputs.base, inputs.tokenizer)
    recipe = asked[RECIPE]
    if isinstance(recipe, bytes) and (was := read_small(out, RECIPE, store)) != recipe:
        pairs = itertools.zip_longest(was.decode(errors="replace").splitlines(), recipe.decode().splitlines(), fillvalue="")
        merged, wanted = next(((a, b) for a, b in pairs if a != b), ("", ""))
        return [
            f"{out}/{RECIPE}: wanted the recipe that is asked for, found another: {merged.strip()[:200]!r} was merged, "
            f"{wanted.strip()[:200]!r} is asked for. Fix: ask for the same merge."
        ]
    now = {name: sha256_of(content, store) for name, content in asked.items()}
    before = {name: sha256 for name, sha256 in receipt.files_sha256.items() if name != CARD}
    return [
        f"{out}/{name}: wanted what a merge would put there now, found something else: the file was changed among the inputs after "
        "the merge. Fix: merge again."
        for name in sorted({*before, *now})
        if before.get(name) != now.get(name)
    ]


def _newer(plan: Plan, receipt: Receipt, out: str, store: Store) -> list[str]:
    """Files of the inputs that were changed after the merge, and other objects than were merged: they may hold other values. What a
    commit names stays what it is."""
    on_hub = out.startswith(HUB_SCHEME)
    written = Branch.of(out).committed_ns() if on_hub else store.stamp(f"{out}/{RECEIPT}").modified_ns
    files = [file.path for one in plan.inputs if one.commit is None for file in one.files if not is_remote(file.path)]
    now = inputs_of_receipt(plan, [one.digest for one in receipt.inputs])
    objects = [
        f"{one.source}/{file.name}: wanted the object that was merged ({was.tag or 'a file on a disk'}), found another "
        f"({file.tag}). Fix: merge again."
        for one, before, after in zip(plan.inputs, receipt.inputs, now, strict=True)
        for was, file in zip(before.files, after.files, strict=True)
        if one.commit is None and file.tag and file.tag != was.tag
    ]
    return objects + [
        f"{path}: wanted a file that nobody has changed since it was merged, found one that was changed after the receipt was "
        f"written. Fix: see with `pcb-ray verify {out}` whether it still gives this output, or merge again."
        for path in files
        if max((stamp := store.stamp(path)).modified_ns, stamp.changed_ns) > written
    ]


def wrong_parts(session: Session, receipt: Receipt, out: str, sample: int) -> list[str]:
    """Parts of the output, of a sample of so many, that are not what the inputs give. Raises RequestError if nothing can be merged
    with the receipt's thresholds."""
    plan = session.plan
    chosen = sorted({round(k * (len(plan.parts) - 1) / max(1, sample - 1)) for k in range(sample)})
    try:
        answers = list(session.ask_parts("recompute a sample", CompareParts(receipt.thresholds, out), chosen))
    except (ArithmeticError, IndexError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, RequestError | RunError):
            raise
        # How many numbers a method needs under a name, it alone knows.
        raise RequestError(
            f"{out}: thresholds: wanted what {plan.method.full_name} has found of these models, found what it can't merge with: "
            f"{with_place(error)}. Fix: merge again."
        ) from error
    return [
        f"{out}/{place}: wanted what its inputs give, found something else. {FIX}"
        for _, differing in answers
        for place in differing.values()
    ]


def wrong_files(store: Store, out: str, receipt: Receipt) -> list[str]:
    """Files that are not what the receipt says, by their digests, and those of tensors by size and header. Raises RequestError if a
    store can't be read."""
    problems = []
    try:
        for name, sha256 in receipt.files_sha256.items():
            path = f"{out}/{name}"
            found = "no file" if size_of_file(store, path) is None else store.sha256(path)
            if found != sha256:
                problems.append(f"{path}: wanted sha256 {sha256}, as in the receipt, found {found}. {FIX}")
        for file in receipt.outputs:
            path = f"{out}/{file.name}"
            if (size := size_of_file(store, path)) != file.bytes:
                found = "no file" if size is None else f"{size}"
                problems.append(f"{path}: wanted {file.bytes} bytes, as in the receipt, found {found}. {FIX}")
            elif hashlib.sha256(_header(store, path, file.bytes)).hexdigest() != file.header_sha256:
                problems.append(f"{path}: wanted the header that was written, found another. {FIX}")
    except OSError as error:
        raise RequestError(unreadable(error.filename or out, error)) from None
    return problems


def _header(store: Store, file: str, size: int) -> bytes:
    """The bytes before the tensors; nothing if there can be none."""
    length = bytearray(min(8, size))
    store.read(file, 0, memoryview(length))
    header = bytearray(min(8 + int.from_bytes(length, "little"), size, MAX_HEADER_BYTES))
    store.read(file, 0, memoryview(header))
    return bytes(header)


def sizes_of(receipt: Receipt, out: str) -> Sizes:
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


def check_facts(plan: Plan, receipt: Receipt, out: str) -> None:
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


def wrong_inputs(plan: Plan, receipt: Receipt) -> list[str]:
    now = inputs_of_receipt(plan, [one.digest for one in receipt.inputs])
    return [
        f"{one.source}: wanted the files that were merged, {[(f.name, f.size, f.header_sha256) for f in before.files]}, "
        f"found {[(f.name, f.size, f.header_sha256) for f in after.files]}. Fix: put those files back, or merge again."
        for one, before, after in zip(plan.inputs, receipt.inputs, now, strict=True)
        if before.files != after.files
    ]


def wrong_tensors(plan: Plan, receipt: Receipt, out: str) -> list[str]:
    """Files of the same headers may be matched otherwise: by values, or by the tables of transformers."""
    if plan.tensors_sha256 == receipt.tensors_sha256:
        return []
    before, now = receipt.versions.get("transformers", "none"), versions().get("transformers", "none")
    return [
        f"{out}: wanted the tensors that were merged (sha256 {receipt.tensors_sha256[:12]}...), found others in files of the same "
        f"headers ({plan.tensors_sha256[:12]}...): copies are not equal any more, or transformers {now} packs otherwise than "
        f"{before}. Fix: verify with transformers {before}, or merge again."
    ]


def wrong_outputs(plan: Plan, receipt: Receipt, out: str) -> list[str]:
    wanted, found = [(f.name, f.size) for f in plan.files], [(f.name, f.bytes) for f in receipt.outputs]
    return [] if wanted == found else [f"{out}: outputs: wanted {wanted}, which the inputs give, found {found}. {FIX}"]
