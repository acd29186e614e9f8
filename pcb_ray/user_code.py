"""Objects of the user's own that a recipe names: `file.py:object`, found beside the recipe, or `module:object`."""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import os
import socket
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, NoReturn, TypeGuard

from pcb_ray.checks import shown
from pcb_ray.errors import RequestError, with_place
from pcb_ray.files.objects import uri_problem, without_credentials
from pcb_ray.files.store import as_path, is_remote
from pcb_ray.files.stores import small_file

MAX_CODE_BYTES = 1 << 20
"""Of a file in a store."""


class UserCode(NamedTuple):
    """The code behind a name, as it was read: workers run this text, whatever the file on their machine holds."""

    name: str
    file: str
    """The file's path or URI; where it lies on another machine does not matter."""
    text: str
    """Empty for a module, which each machine imports by itself."""
    sha256: str
    folder: str
    """Of the recipe: what lies there can be imported. Empty where the code lies in a store."""

    @property
    def told(self) -> str:
        return f"code of {self.file} (sha256 {self.sha256})"

    @property
    def is_file(self) -> bool:
        return self.name.rpartition(":")[0].endswith(".py")


def names_code(name: object) -> TypeGuard[str]:
    """Whether a name in a recipe is that of an object in the user's code."""
    return isinstance(name, str) and ":" in name


def check_allowed(name: str, folder: Path, where: str) -> None:
    """Raises RequestError for code that is no file in or below the folder. A module is none, since it may lie anywhere."""
    source = name.rpartition(":")[0]
    if source.endswith(".py"):
        check_below(source, folder, where)
    else:
        _refuse(f"the module {shown(source)}", folder, where)


def check_below(path: str, folder: Path, where: str) -> None:
    """Raises RequestError for a path that leads out of the folder, by links too."""
    if is_remote(path):
        _refuse(path, folder, where)
    found = os.path.realpath(folder / os.path.expanduser(path))
    if not Path(found).is_relative_to(os.path.realpath(folder)):
        _refuse(found, folder, where)


def _refuse(found: str, folder: Path, where: str) -> NoReturn:
    raise RequestError(
        f"{where}: wanted code in a file in or below the recipe's folder {folder.absolute()}, which is run without asking, found "
        f"{found}. Fix: read that code, and if it is to be run, give --allow-code (allow_code=True in Python)."
    )


def read_code(name: str, folder: Path, where: str, *, allow_code: bool) -> UserCode:
    """The code that defines `name`, not run yet; `where` is the place in the recipe, whose folder is `folder`.

    Unless `allow_code`, it must be a file in or below that folder. Raises RequestError."""
    source = as_path(name.rpartition(":")[0])
    beside = str(folder.absolute())
    try:
        if not allow_code:
            check_allowed(f"{source}:", folder, where)
        if is_remote(source):
            return _read_far(name, source, where)
        if source.endswith(".py"):
            path = (folder / Path(source).expanduser()).absolute()
            content = path.read_bytes()
            return UserCode(name, str(path), content.decode("utf-8"), hashlib.sha256(content).hexdigest(), beside)
        _find_beside(beside)
        found = importlib.util.find_spec(source)
        if found is None or found.origin is None:
            raise ModuleNotFoundError(f"no module named {source!r}")
        return UserCode(name, found.origin, "", hashlib.sha256(Path(found.origin).read_bytes()).hexdigest(), beside)
    except RequestError:
        raise
    except Exception as error:
        # To find a module Python runs the packages around it, which may raise anything.
        reason = f"{error.strerror} ({error.filename})" if isinstance(error, OSError) else with_place(error)
        fix = f"write file.py:object with a path relative to {beside}, or module:object of a module that can be imported"
        raise RequestError(f"{where}: wanted code that can be read, found {name}: {reason}. Fix: {fix}.") from None


def _read_far(name: str, uri: str, where: str) -> UserCode:
    """The code in a file that lies in a store. Raises RequestError, OSError."""
    if (problem := uri_problem(uri)) is not None:
        raise RequestError(f"{where} {shown(without_credentials(uri))}: {problem}")
    content = small_file(uri, MAX_CODE_BYTES)
    if len(content) > MAX_CODE_BYTES:
        raise RequestError(f"{where}: {uri}: wanted at most {MAX_CODE_BYTES:,} bytes of code, found more. Fix: check the name.")
    return UserCode(name, uri, content.decode("utf-8"), hashlib.sha256(content).hexdigest(), "")


def load_object(code: UserCode, where: str) -> Any:
    """Run the code, once in this process, and return the object that it names. Raises RequestError with what it raised and
    where."""
    attribute = code.name.rpartition(":")[2]
    try:
        _find_beside(code.folder)
        found: Any = _module_of(code) if code.is_file else _imported(code, where)
    except RequestError:
        raise
    except (Exception, SystemExit) as error:
        # Whatever the user's code raises is theirs, and is told as it is.
        fix = "install what the file imports" if isinstance(error, ImportError) else "mend the file"
        raise RequestError(
            f"{where}: {code.name}: wanted code that can be run, found that it raises {with_place(error)}. Fix: {fix}."
        ) from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise RequestError(f"{where}: {code.name}: wanted {part!r} in it, found no such name. Fix: check the name.")
        found = getattr(found, part)
    return found


_imports: dict[str, str] = {}
"""The digests of the modules that were imported here, as they were then."""


def _find_beside(folder: str) -> None:
    """What lies beside the recipe can be imported, as what lies in the folder that `python` runs in."""
    if folder and folder not in sys.path:
        sys.path.insert(0, folder)


def _imported(code: UserCode, where: str) -> ModuleType:
    """The module as this machine has it. Raises RequestError if it is another one than that which was read."""
    module = importlib.import_module(code.name.rpartition(":")[0])
    file = Path(module.__file__ or "")
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    # Python runs a module once in a process, whatever becomes of its file.
    if (ran := _imports.setdefault(module.__name__, found)) != found:
        raise RequestError(
            f"{where}: {code.name}: wanted the module as this process has imported it, with sha256 {ran}, found {found} in {file}, "
            "which was edited since. Fix: start Python anew."
        )
    if found != code.sha256:
        raise RequestError(
            f"{where}: {code.name}: wanted a module with sha256 {code.sha256}, as it was when the recipe was read, found {found} "
            f"in {file} on node {socket.gethostname()}. Fix: install the same on all nodes."
        )
    return module


@functools.cache
def _module_of(code: UserCode) -> ModuleType:
    name = f"pcb_ray_user_{Path(code.file).stem}_{code.sha256[:12]}"
    module = ModuleType(name)
    module.__file__ = code.file
    sys.modules[name] = module  # dataclasses and pickle look it up there
    try:
        exec(compile(code.text, code.file, "exec"), module.__dict__)
    except BaseException:
        del sys.modules[name]
        raise
    return module
