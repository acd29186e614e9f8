"""The code against docs/architecture.md: imports go down its table of layers, the driver has no torch, libraries have their
places."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "pcb_ray"
DOCUMENT = PACKAGE.parent / "docs" / "architecture.md"


def modules() -> dict[str, Path]:
    """By dotted name below pcb_ray; a package by its own."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(part for part in parts if part != "__init__")
        if name not in ("", "__main__"):
            found[name] = path
    return found


def nodes(path: Path) -> list[ast.AST]:
    """All of a module but what only a type checker sees."""
    found: list[ast.AST] = []
    left: list[ast.AST] = [ast.parse(path.read_text())]
    while left:
        node = left.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            left += node.orelse
            continue
        found.append(node)
        left += ast.iter_child_nodes(node)
    return found


def imports(path: Path) -> set[str]:
    """The dotted names of all modules that are imported, also within functions."""
    names: set[str] = set()
    for node in nodes(path):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


MODULES = modules()
OURS = {name: {i.removeprefix("pcb_ray.") for i in imports(path)} & set(MODULES) - {name} for name, path in MODULES.items()}


def layers() -> list[list[str]]:
    """The lines of the table, the lowest last."""
    table = DOCUMENT.read_text().split("| layer | modules |")[1].split("\n\n")[0]
    return [re.findall(r"`([\w/]+)`", row) for row in table.splitlines() if "`" in row]


def layer_of(name: str) -> int:
    first = name.split(".")[0]
    (line,) = [k for k, row in enumerate(layers()) if first in row or f"{first}/" in row]
    return line


def test_every_module_has_one_layer() -> None:
    for name in MODULES:
        layer_of(name)


def test_imports_go_down_the_layers() -> None:
    up = [f"{name} imports {other}" for name, others in OURS.items() for other in others if layer_of(other) < layer_of(name)]
    assert not up, up


def test_imports_have_no_circle() -> None:
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, f"a circle: {' -> '.join((*above, name))}"
        if name not in done:
            for other in OURS[name]:
                visit(other, (*above, name))
            done.add(name)

    for name in MODULES:
        visit(name, ())


def test_every_module_is_in_the_tree_of_the_document() -> None:
    tree = DOCUMENT.read_text().split("## What is where")[1].split("```")[1]
    missing = [name for name, path in MODULES.items() if path.name != "__init__.py" and path.name not in tree]
    assert not missing, missing
    named = set(re.findall(r"\b(\w+\.py)\b", tree)) - {path.name for path in MODULES.values()}
    assert named <= {"oracle.py", "__init__.py"}, named


def test_the_driver_has_no_torch() -> None:
    code = "import sys, pcb_ray, pcb_ray.cli; assert 'torch' not in sys.modules and 'ray' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("library", "homes"),
    [
        ("ray", ("runtime", "cluster", "nodes", "submitting", "searching")),
        ("nevergrad", ("searching.tune",)),
        ("matplotlib", ("searching.plots",)),
    ],
)
def test_libraries_have_their_places(library: str, homes: tuple[str, ...]) -> None:
    users = {name for name, path in MODULES.items() if any(i.split(".")[0] == library for i in imports(path))}
    assert users
    assert all(name.startswith(homes) for name in users), users


def test_no_assert_holds_what_must_hold_under_optimisation() -> None:
    """Asserts only tell a type checker that something is there, where the next line would fail anyway."""
    kept = [(name, node) for name, path in MODULES.items() for node in nodes(path) if isinstance(node, ast.Assert)]
    others = [f"{name}:{node.lineno}" for name, node in kept if not ast.unparse(node.test).endswith(" is not None")]
    assert not others, others
