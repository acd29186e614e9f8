"""Objects of the user's own that a recipe names: `file.py:object`, found beside the recipe, or `module:object`."""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import socket
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from pcb_ray.errors import RequestError, with_place


class UserCode(NamedTuple):
    """The code behind a name, as it was read: workers run this text, whatever the file on their machine holds."""

    name: str
    file: str
    """The file's path; where it lies on another machine does not matter."""
    text: str
    """Empty for a module, which each machine imports by itself."""
    sha256: str

    @property
    def is_file(self) -> bool:
        return self.name.rpartition(":")[0].endswith(".py")


def names_code(name: object) -> bool:
    """Whether a name in a recipe is that of an object in the user's code."""
    return isinstance(name, str) and ":" in name


def read_code(name: str, folder: Path, where: str) -> UserCode:
    """The code that defines `name`, not run yet; `where` is the place in the recipe. Raises RequestError."""
    source = name.rpartition(":")[0]
    try:
        if source.endswith(".py"):
            path = (folder / Path(source).expanduser()).absolute()
            text = path.read_text(encoding="utf-8")
            return UserCode(name, str(path), text, hashlib.sha256(text.encode()).hexdigest())
        _find_beside(folder)
        found = importlib.util.find_spec(source)
        if found is None or found.origin is None:
            raise ModuleNotFoundError(f"no module named {source!r}")
        return UserCode(name, found.origin, "", hashlib.sha256(Path(found.origin).read_bytes()).hexdigest())
    except Exception as error:
        # To find a module Python runs the packages around it, which may raise anything.
        reason = f"{error.strerror} ({error.filename})" if isinstance(error, OSError) else with_place(error)
        fix = "write file.py:object with a path relative to the recipe, or module:object of a module that can be imported"
        raise RequestError(f"{where}: wanted code that can be read, found {name}: {reason}. Fix: {fix}.") from None


def load_object(code: UserCode, folder: Path, where: str) -> Any:
    """Run the code, once in this process, and return the object that it names. Raises RequestError with what it raised and
    where."""
    attribute = code.name.rpartition(":")[2]
    try:
        _find_beside(folder)
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


def _find_beside(folder: Path) -> None:
    """What lies beside the recipe can be imported, as what lies in the folder that `python` runs in."""
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


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
