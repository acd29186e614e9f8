"""Where an output is to go, by how it is named: a path or a URI."""

from __future__ import annotations

import os
import re
from pathlib import Path

from pcb_ray.errors import RequestError
from pcb_ray.files.objects import Storage, is_object, without_credentials
from pcb_ray.output.folder import Folder
from pcb_ray.output.prefix import Prefix

_FILE = "file://"


def place_of(out: str | os.PathLike[str], storage: Storage | None = None, *, overwrite: bool = False) -> Folder | Prefix:
    """The place of an output. `storage` says how stores are reached; with `overwrite` a folder that is there is replaced.

    Raises RequestError for a URI where no output can be written, and for a relative path inside a Ray job."""
    name = os.fspath(out)
    if is_object(name):
        return Prefix(name, storage, overwrite=overwrite)
    return Folder(folder_of(name), overwrite=overwrite)


def check_into(into: str) -> None:
    """Raises RequestError if no outputs can be written below this name."""
    place_of(inside(into, "any"))


def folder_of(out: str | os.PathLike[str]) -> Path:
    """The path of an output that must be a folder. Raises RequestError."""
    name = os.fspath(out).removeprefix(_FILE)
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*:/", name):
        raise RequestError(
            f"{without_credentials(name)}: wanted a folder{'' if is_object(name) else ', or s3://, gs:// or az://'}, found a URI "
            "where this output can't be written as yet. Fix: name a folder that all nodes see, and copy it when it is whole."
        )
    if not os.path.isabs(name) and "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:
        raise RequestError(
            f"{name}: wanted an absolute path, found a relative output inside a Ray job, which would be written to the job's "
            "temporary folder and lost. Fix: give an absolute path on storage that lasts."
        )
    return Path(name)


def inside(out: str | os.PathLike[str], name: str) -> str:
    """An output of this name in a folder, or below a prefix."""
    return f"{os.fspath(out).rstrip('/')}/{name}"
