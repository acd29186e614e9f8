"""A finished folder gets its name: whole, at once, and never in the place of what nobody gave up.

Renames decide by themselves whether there is something in the way, so nothing can come between a look and a deed: a folder can't be
renamed to the name of a file, a link, or a folder that holds something. An empty folder gives way; there is nothing in it to lose.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from pathlib import Path

from pcb_ray.errors import RunError
from pcb_ray.files.store import fsync_file, fsync_folder

REPLACED = "replaced"
_NOT_MOVABLE = (errno.EXDEV, errno.EBUSY)  # a layer of a container's file system, a mount point
_IN_THE_WAY = (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR, errno.EISDIR)


def publish(staging: Path, out: Path, *, overwrite: bool) -> None:
    """Make `staging` durable and rename it to `out`; with `overwrite` a folder that is there is first moved beside `staging`.

    Raises RunError, with all work kept, if something else is there."""
    for path in sorted(p for p in staging.rglob("*") if p.is_file()):
        fsync_file(path)
    for folder in (*(p for p in staging.rglob("*") if p.is_dir()), staging):
        fsync_folder(folder)
    try:
        if overwrite:
            _set_aside(out, staging.parent / REPLACED)
        staging.rename(out)
    except OSError as error:
        restore(out, staging.parent / REPLACED)
        if error.errno in _NOT_MOVABLE:
            raise RunError(
                f"{out}: wanted to move what is there aside and give its name to what is finished now, found: {error.strerror}. "
                f"The work is kept in {staging.parent}. Fix: move {out} away by hand, and finish with --resume."
            ) from None
        if error.errno not in _IN_THE_WAY or not os.path.lexists(out):
            raise
        replace = ", or replace it with --resume --overwrite" if kind_of(out) == "a folder" else ""
        raise RunError(
            f"{out}: wanted a free name for what is finished now, found {kind_of(out)} that appeared during the run. Nothing of it "
            f"was touched, and the work is kept in {staging.parent}. Fix: move it away and finish with --resume{replace}."
        ) from None
    fsync_folder(out.parent)


def _set_aside(out: Path, replaced: Path) -> None:
    if replaced.exists():
        shutil.rmtree(replaced)
    replaced.mkdir()  # only a folder can be renamed to the name of an empty one: no file or link is taken for the old output
    with contextlib.suppress(FileNotFoundError):
        out.rename(replaced)


def restore(out: Path, replaced: Path) -> None:
    """Give back its name to what a crash left between the two renames of `publish`."""
    with contextlib.suppress(OSError):
        replaced.rmdir()  # nothing was set aside yet
    if replaced.exists() and not os.path.lexists(out):
        replaced.rename(out)


def kind_of(path: Path) -> str:
    """What lies there, for messages."""
    return "a link" if path.is_symlink() else "a folder" if path.is_dir() else "a file"
