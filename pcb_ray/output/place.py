"""Whether an output can be written where it is wanted, told before anything is computed."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from pcb_ray.errors import RequestError
from pcb_ray.files.store import is_remote
from pcb_ray.output.publish import kind_of
from pcb_ray.output.state import is_unfinished, state_folder
from pcb_ray.planning import Input, Plan

MAX_NAME_BYTES = 255
"""Of a file or folder, on all file systems of Linux."""


def check_place(out: Path) -> None:
    """A URI is a wrong request, and so is a relative OUT inside a Ray job."""
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*:/", str(out)):
        raise RequestError(
            f"{out}: wanted a folder, found a URI, where no output is written as yet. Fix: name a folder that all nodes see, and "
            "copy it when it is whole."
        )
    if not out.is_absolute() and "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:
        raise RequestError(
            f"{out}: wanted an absolute path, found a relative output inside a Ray job, which would be written to the job's "
            "temporary folder and lost. Fix: give an absolute path on storage that lasts."
        )


def check_out(out: Path, plan: Plan, *, overwrite: bool, resume: bool, model: bool = True, beside: int = 0) -> None:
    """Whether OUT can be written, before anything is computed: the merged `model`, and so many bytes `beside` it until it is done.

    Raises RequestError with all that is in the way."""
    problems = []
    state = state_folder(out)
    if (size := len(os.fsencode(state.name))) > MAX_NAME_BYTES:  # nothing can be asked about such a path
        raise RequestError(
            f"{out}: wanted a name so short that `.NAME.pcb-ray`, where the run keeps its state, has at most {MAX_NAME_BYTES} "
            f"bytes, found {size}. Fix: choose a shorter name."
        )
    unfinished = is_unfinished(out)
    if os.path.lexists(out) and not overwrite:
        problems.append(_exists(out, resume=resume, unfinished=unfinished))
    if os.path.lexists(out) and overwrite and not out.is_dir():
        problems.append(
            f"{out}: wanted a directory to replace, found {kind_of(out)} that is not a directory. "
            "Fix: move it away, or choose another name."
        )
    if os.path.ismount(out.resolve()):
        problems.append(
            f"{out}: wanted a name that a finished folder can be given, found a mount point, which stays where it is. "
            f"Fix: name a folder below it, such as {out / 'merged'}."
        )
    problems += _overlaps(out, plan)
    parent = existing_parent(out.resolve())
    if not os.access(parent, os.W_OK):
        problems.append(
            f"{out}: wanted to write to {parent}, found that this run can't write there. Fix: choose a folder where you may write."
        )
    else:
        there = sum(f.lstat().st_blocks * 512 for f in state.rglob("*")) if resume or overwrite else 0
        needed, free = plan.written_bytes * model + sum(one.size for one in plan.along) + beside, shutil.disk_usage(parent).free
        if free + there < needed:
            what = f" ({beside:,} of them for the basis, until it is done)" if beside else ""
            narrower = "a smaller density" if beside else "a narrower `dtype`"
            problems.append(
                f"{out}: the run needs {needed:,} bytes{what}, found {free:,} free in {parent}. "
                f"Fix: free some, write elsewhere, or ask for {narrower}."
            )
        if not resume and not overwrite and unfinished:
            problems.append(
                f"{state}: wanted none, found an unfinished run to {out}. "
                "Fix: go on with --resume, or start afresh with --overwrite."
            )
    if problems:
        raise RequestError(problems)


def _exists(out: Path, *, resume: bool, unfinished: bool) -> str:
    found = f"{out}: exists: wanted a free name, found {kind_of(out)}"
    replaceable = out.is_dir()
    if resume and unfinished:
        replace = ", or replace it with --resume --overwrite" if replaceable else ""
        return f"{found}. Fix: move it away{replace}; the unfinished run goes on."
    nothing = ", and there is nothing to resume" if resume else ""
    fix = "choose another name, or replace it with --overwrite" if replaceable else "move it away, or choose another name"
    return f"{found}{nothing}. Fix: {fix}."


def _overlaps(out: Path, plan: Plan) -> list[str]:
    """A problem for each input that OUT would lie inside or around."""
    problems, target = [], out.resolve()
    for one in plan.inputs:
        if all(is_remote(file.path) for file in one.files):
            continue
        for place in _claimed_by(one, plan.recipe.folder):
            if place == target or place in target.parents or target in place.parents:
                problems.append(
                    f"{out}: wanted a folder apart from the inputs, found it inside or around the input {one.source} ({place}). "
                    "Fix: choose another folder."
                )
                break
    return problems


def _claimed_by(one: Input, relative_to: Path) -> list[Path]:
    """The folder of an input, whose files may lie anywhere below it, and the files, which may be links; a model that is one file
    has no folder."""
    files = [Path(file.path) for file in one.files]
    if one.commit is None:
        folders = [relative_to / Path(one.source).expanduser()]
    else:  # the snapshot of a model of the Hub is named after its commit
        folders = [folder for folder in files[0].parents if folder.name == one.commit]
    return [path.resolve() for path in (*folders, *files)]


def existing_parent(path: Path) -> Path:
    """The nearest folder above `path` that exists."""
    for parent in path.parents:
        if parent.is_dir():
            return parent
    return Path("/")
