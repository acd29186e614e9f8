"""`verify`: a merged directory against its receipt and its inputs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from pcb_ray.checks import shown
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
from pcb_ray.files.store import Store, as_path, is_remote
from pcb_ray.files.stores import open_store
from pcb_ray.local import LocalOwners
from pcb_ray.output.companions import RECIPE
from pcb_ray.output.place import reads_of
from pcb_ray.questions import DigestParts, shown_digest, sum_of
from pcb_ray.receipt import Receipt, Verified, read_small
from pcb_ray.recipe import Recipe, read_yaml
from pcb_ray.session import Session
from pcb_ray.steps import ARITHMETIC
from pcb_ray.user_code import names_code, read_code


def verify(
    out: str | os.PathLike[str], *, method: str | os.PathLike[str] | None = None, sample: int = SAMPLE, quiet: bool = False
) -> Verified:
    """Check a merge against its receipt: every file's digest, and `sample` parts recomputed from the inputs. `out` is a directory,
    a prefix in an object store, or a repository on the Hub.

    No code is run that OUT holds or names. For a merge by a method of one's own, `method` names the same code again: its file, or
    `file.py:object` or `module:object` as a recipe in this folder would.

    Raises RequestError if OUT or its inputs can't be read at all, or `method` is missing or another one.
    """
    out, store = reads_of(out), open_store()
    receipt = Receipt.of(out, store)
    if receipt.arithmetic != ARITHMETIC:
        raise RequestError(
            f"{out}: wanted a merge with arithmetic {ARITHMETIC}, found {receipt.arithmetic}. "
            f"Fix: verify it with pcb_ray {receipt.versions.get('pcb_ray', 'of its time')}."
        )
    if problems := wrong_files(store, out, receipt):
        return Verified(tuple(problems))
    recipe = _recipe_in(out, receipt, store, None if method is None else os.fspath(method))
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


def _recipe_in(out: str, receipt: Receipt, store: Store, method: str | None) -> Recipe:
    """The recipe that was merged. Code of the user's own that it names is taken from `method`, and run only if it is what the
    receipt tells of. Raises RequestError."""
    mapping, folder = read_yaml(read_small(out, RECIPE, store)), "." if is_remote(out) else out
    named = mapping.get("merge_method") if isinstance(mapping, Mapping) else None
    wanted = receipt.code_sha256
    if not names_code(named):
        if wanted is not None:
            raise RequestError(
                f"{out}: merge_method: wanted code with sha256 {wanted}, as in the receipt, found {shown(named)}. Fix: merge again."
            )
        if method is not None:
            raise RequestError(f"--method: wanted none, since {out} was merged by {shown(named)}, found {method}. Fix: remove it.")
        return Recipe.from_dict(mapping, folder)
    if method is None:
        raise RequestError(
            f"{out}: wanted the code of {named}, by which it was merged, found none given: what an output holds or names is "
            f"not run. Fix: give the file with sha256 {wanted} by --method FILE (method=FILE in Python)."
        )
    source, _, name = method.rpartition(":")
    if not source or name.startswith("//"):  # the end of a URI
        source, name = method, named.rpartition(":")[2]
    place = Path(as_path(source)).absolute()  # what it imports is found beside it, as it was beside the recipe
    code = read_code(f"{source if is_remote(as_path(source)) else place.name}:{name}", place.parent, "--method", allow_code=True)
    if code.sha256 != wanted:
        raise RequestError(
            f"--method {method}: wanted the code that merged {out}, with sha256 {wanted}, found {code.sha256}. "
            "Fix: give that code, or merge again."
        )
    return Recipe.from_dict({**mapping, "merge_method": code.name}, folder, code=code)
