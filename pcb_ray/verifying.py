"""`verify`: a merged directory against its receipt and its inputs."""

from __future__ import annotations

import os

from pcb_ray.claims import (
    FIX,
    SAMPLE,
    check_facts,
    planned,
    sizes_of,
    wrong_files,
    wrong_inputs,
    wrong_outputs,
    wrong_parts,
    wrong_tensors,
)
from pcb_ray.errors import RequestError
from pcb_ray.files.store import is_remote
from pcb_ray.files.stores import open_store
from pcb_ray.local import LocalOwners
from pcb_ray.output.companions import RECIPE
from pcb_ray.output.place import folder_of
from pcb_ray.questions import DigestParts, shown_digest, sum_of
from pcb_ray.receipt import Receipt, Verified, read_small
from pcb_ray.recipe import Recipe
from pcb_ray.session import Session
from pcb_ray.steps import ARITHMETIC


def verify(out: str | os.PathLike[str], *, sample: int = SAMPLE, quiet: bool = False) -> Verified:
    """Check a merge against its receipt: every file's digest, and `sample` parts recomputed from the inputs. `out` is a directory,
    or a prefix in an object store.

    Raises RequestError if OUT or its inputs can't be read at all.
    """
    out, store = os.fspath(out), open_store()
    if not is_remote(out) or out.startswith("file://"):
        out = str(folder_of(out))
    receipt = Receipt.of(out, store)
    if receipt.arithmetic != ARITHMETIC:
        raise RequestError(
            f"{out}: wanted a merge with arithmetic {ARITHMETIC}, found {receipt.arithmetic}. "
            f"Fix: verify it with pcb_ray {receipt.versions.get('pcb_ray', 'of its time')}."
        )
    if problems := wrong_files(store, out, receipt):
        return Verified(tuple(problems))
    recipe = Recipe.from_yaml(read_small(out, RECIPE, store), "." if is_remote(out) else out)
    found_code = None if recipe.code is None else recipe.code.sha256
    if found_code != receipt.code_sha256:
        return Verified(
            (
                f"{recipe.merge_method}: wanted the code that merged, with sha256 {receipt.code_sha256}, found {found_code}. "
                "Fix: put that code back, or merge again.",
            )
        )
    _, plan = planned(recipe, receipt, sizes_of(receipt, out))
    check_facts(plan, receipt, out)
    if problems := wrong_inputs(plan, receipt) or wrong_tensors(plan, receipt, out) or wrong_outputs(plan, receipt, out):
        return Verified(tuple(problems))
    store = open_store(plan.stamps, recipe.storage)
    session = Session(plan, lambda plan: LocalOwners(plan, store), quiet=quiet)
    digest = 0
    for _, answer in session.ask_parts("read the output", DigestParts(out), range(len(plan.parts)), plan.part_bytes):
        digest = sum_of((digest, *answer.values()))
    if shown_digest(digest) != receipt.output_digest:
        problems.append(
            f"{out}: wanted tensors of digest {receipt.output_digest}, found {shown_digest(digest)}: they were changed after the "
            f"merge. {FIX}"
        )
    return Verified((*problems, *wrong_parts(session, receipt, out, sample)))
