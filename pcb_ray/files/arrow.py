"""Files by URIs of schemes that obstore doesn't know, through pyarrow's filesystems: `hdfs://`, and as `fsspec+NAME://` what fsspec
opens. They are read only, and told apart from what they may become by their size and time of writing."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Iterator
from typing import Any

from pcb_ray.checks import without_secrets
from pcb_ray.files.store import Stamp


def is_arrow(uri: str) -> bool:
    """Whether pyarrow is asked for what a URI names."""
    return uri.partition("://")[0] in ("hdfs", "viewfs") or uri.startswith("fsspec+")


class ArrowFiles:
    """Requests to them; limits and repetitions are those of the filesystems. Any number of threads may use it at once."""

    retries = 0

    def __init__(self) -> None:
        self._opened: dict[str, tuple[Any, str]] = {}
        self._lock = threading.Lock()

    def head(self, uri: str) -> Stamp:
        """What a file is. Raises OSError."""
        with self._file(uri) as (files, path):
            found = files.get_file_info(path)
        if not found.is_file:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), uri)
        return Stamp(found.size, found.mtime_ns or 0, 0)

    def get(self, uri: str, start: int, stop: int, tag: str = "") -> tuple[memoryview, Stamp]:  # noqa: ARG002 - there are none
        """Bytes start..stop-1 of a file, or up to its end if that comes first; and what it was after they were read. Raises
        OSError."""
        with self._file(uri) as (files, path), files.open_input_file(path) as file:
            data = memoryview(file.read_at(stop - start, start))
        return data, self.head(uri)

    def sizes(self, uri: str, *, all_of_them: bool = True) -> dict[str, int]:  # noqa: ARG002 - there are no pages of it
        """The files below a folder that ends with `/`, by their names from there. Raises OSError."""
        with self._file(uri.rstrip("/")) as (files, path):
            from pyarrow.fs import FileSelector, FileType

            is_folder = files.get_file_info(path).type == FileType.Directory
            found = files.get_file_info(FileSelector(path, recursive=True)) if is_folder else []
        within = f"{path.rstrip('/')}/"
        return {one.path.removeprefix(within): one.size for one in found if one.is_file}

    @contextlib.contextmanager
    def _file(self, uri: str) -> Iterator[tuple[Any, str]]:
        """The file system, and the path in it; what fails in the block is told as OSError."""
        try:
            with self._lock:
                if uri not in self._opened:
                    from pyarrow.fs import FileSystem

                    self._opened[uri] = FileSystem.from_uri(uri)
            yield self._opened[uri]
        except (FileNotFoundError, NotADirectoryError):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), uri) from None
        except PermissionError:
            raise PermissionError(errno.EACCES, "access refused", uri) from None
        except Exception as error:  # of fsspec's filesystems, which raise what they like
            told = without_secrets(str(error)).partition("\n")[0][:200]
            raise OSError(errno.EIO, told or type(error).__name__, uri) from None
