"""Where an output is to go, by how it is named: a path or a URI."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path

from pcb_ray.errors import RequestError
from pcb_ray.files.hub_commit import Branch
from pcb_ray.files.objects import HUB_SCHEME, Storage, is_object, without_credentials
from pcb_ray.files.store import as_path, is_remote
from pcb_ray.output.folder import Folder
from pcb_ray.output.prefix import Prefix
from pcb_ray.output.repository import Repository
from pcb_ray.output.state import Place

log = logging.getLogger("pcb_ray")


def place_of(
    out: str | os.PathLike[str],
    storage: Storage | None = None,
    *,
    overwrite: bool = False,
    state: str = "",
    beside: str | os.PathLike[str] = ".",
    pull_request: bool = False,
) -> Place:
    """The place of a merge's output. `storage` says how stores are reached; with `overwrite` a folder that is there is replaced.
    `state` is a folder or a prefix for the notes of a run to the Hub (or else they lie `beside`, in another one), which with
    `pull_request` ends with one.

    Raises RequestError for a URI where no output can be written, and for a relative path inside a Ray job."""
    name = os.fspath(out)
    if name.startswith(HUB_SCHEME):
        branch = Branch.of(name)
        if not state and not is_remote(os.fspath(beside)) and "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:
            log.warning(
                "note: %s: the state of this run lies in the job's folder, which goes with the job: without --state DIR (or "
                "s3://bucket/states) what it has done can't be resumed",
                name,
            )
        notes = place_of(inside(state or beside, re.sub(r"[^\w.-]", "-", f"hf-{branch.repo}-{branch.name}")), storage)
        return Repository(branch, notes, pull_request=pull_request, overwrite=overwrite)
    if state or pull_request:
        raise RequestError(
            f"{name}: wanted hf://org/name for --state and --pull-request, found another output, whose state lies beside it. "
            "Fix: leave them out."
        )
    if is_object(name):
        return Prefix(name, storage, overwrite=overwrite)
    return Folder(folder_of(name), overwrite=overwrite)


def place_of_search(out: str | os.PathLike[str], storage: Storage | None, mark: str, *, overwrite: bool = False) -> Folder | Prefix:
    """The place of what a search finds, whole in a store when the object `mark` is there. Raises RequestError."""
    name = os.fspath(out)
    if name.startswith(HUB_SCHEME):
        raise RequestError(
            f"{without_credentials(name)}: wanted a folder or a prefix of an object store for what a search finds, found a "
            "repository on the Hub. Fix: search to such as s3://bucket/found, and merge the best_recipe.yaml of that to the Hub."
        )
    if is_object(name):
        return Prefix(name, storage, overwrite=overwrite, mark=mark)
    return Folder(folder_of(name), overwrite=overwrite)


def check_into(into: str) -> None:
    """Raises RequestError if no outputs can be written below this name."""
    place_of(inside(into, "any"))


def folder_of(out: str | os.PathLike[str]) -> Path:
    """The path of an output that must be a folder. Raises RequestError."""
    path = _path_of(out)
    if not path.is_absolute() and "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:
        raise RequestError(
            f"{path}: wanted an absolute path, found a relative output inside a Ray job, which would be written to the job's "
            "temporary folder and lost. Fix: give an absolute path on storage that lasts."
        )
    return path


def reads_of(out: str | os.PathLike[str]) -> str:
    """Where an output that is there is read: what is written, and by whom, does not matter. Raises RequestError."""
    name = os.fspath(out)
    if name.startswith(HUB_SCHEME):
        return Repository(Branch.of(name), Folder(".")).reads
    return Prefix(name, None).reads if is_object(name) else str(_path_of(name))


def _path_of(out: str | os.PathLike[str]) -> Path:
    name = as_path(os.fspath(out))
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*:/", name):
        raise RequestError(
            f"{without_credentials(name)}: wanted a folder, or s3://, gs://, az:// or (for a merge) hf://, found another URI. Fix: "
            "name a folder that all nodes see, and copy it when it is whole."
        )
    return Path(name)


def inside(out: str | os.PathLike[str], name: str) -> str:
    """An output of this name in a folder, or below a prefix."""
    return f"{os.fspath(out).rstrip('/')}/{name}"
