"""The documents hold what they promise: links lead somewhere, commands and recipes are accepted, examples call what exists."""

from __future__ import annotations

import ast
import inspect
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import pytest

import pcb_ray
from pcb_ray import cli
from pcb_ray.grid import points_of
from pcb_ray.recipe import Recipe, read_yaml
from pcb_ray.searching.request import Search

ROOT = Path(__file__).parent.parent
READABLE = ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md")), *sorted(ROOT.glob("*/README.md"))
DOCUMENTS = *READABLE, *sorted((ROOT / "tests" / "benchmarks" / "results").glob("*.md"))
MOST_LINES, LONGEST_LINE = 160, 150

each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
each_readable = pytest.mark.parametrize("document", READABLE, ids=lambda path: str(path.relative_to(ROOT)))


def blocks(document: Path, language: str) -> Iterator[str]:
    """The fenced blocks of a language ("" for those without one), without their indentation."""
    for found in re.finditer(r"^( *)```(\w*)\n(.*?)^ *```$", document.read_text(), flags=re.MULTILINE | re.DOTALL):
        if found[2] == language:
            yield re.sub(f"^{found[1]}", "", found[3], flags=re.MULTILINE)


def prose(document: Path) -> str:
    """The text without its fenced blocks and comments."""
    text = re.sub(r"^ *```.*?^ *```$", "", document.read_text(), flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)


def anchors(document: Path) -> set[str]:
    """The names that a site such as GitHub gives to the headings."""
    titles = re.findall(r"^#+ +(.+)$", prose(document), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def commands(document: Path) -> Iterator[str]:
    """What follows `pcb-ray` wherever a document says what to type: in blocks, and in the text where more than a command or option
    is named."""
    lines = [
        line.partition("#")[0] for language in ("bash", "") for block in blocks(document, language) for line in block.splitlines()
    ]
    for line in (*lines, *re.findall(r"`([^`]*)`", prose(document).replace("\n", " "))):
        if found := re.search(r"(?:^|\s)pcb-ray (\w+ (?!-|\|)\S.*|\w+ --help)", line):
            yield found[1]


@each_document
def test_links_lead_to_what_exists(document):
    dead = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(document)):
        if re.match(r"\w+:", target):  # of another site
            continue
        path, _, anchor = unquote(target).partition("#")
        place = (document.parent / path).resolve() if path else document
        if not place.exists() or (anchor and anchor not in anchors(place)):
            dead.append(target)
    assert not dead


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= MOST_LINES


@each_readable
def test_lines_can_be_read_in_an_editor(document):
    lines = enumerate(document.read_text().splitlines(), 1)
    assert not [number for number, line in lines if len(line) > LONGEST_LINE and not line.startswith("|")]


@each_readable
def test_commands_are_accepted_by_the_command_line(document, capsys):
    for command in commands(document):
        try:
            cli.parser().parse_args(shlex.split(command))
        except SystemExit as end:
            if end.code != 0:  # that of --help
                pytest.fail(f"pcb-ray {command}: {capsys.readouterr().err}")


def test_scripts_that_the_documents_run_exist():
    for document in READABLE:
        for script in re.findall(r"\bbash (\S+\.sh)\b", document.read_text()):
            assert (ROOT / script).is_file(), f"{document}: {script}"


def test_the_two_commands_of_the_readme_come_first():
    first, *_ = blocks(ROOT / "README.md", "bash")
    assert [line.split()[:2] for line in first.splitlines()] == [["bash", "examples/quickstart.sh"], ["bash", "tests/run.sh"]]


@each_readable
def test_recipes_and_their_searches_are_accepted(document):
    whole = "merge_method: pcb\nbase_model: base\nmodels: [math, code]\n"
    for block in blocks(document, "yaml"):
        for recipe in points_of(read_yaml(block if "models:" in block else whole + block)).values():
            assert isinstance(recipe, Recipe), recipe
            if recipe.search is not None:
                Search.of(recipe, has_evaluator=False)


@each_readable
def test_python_examples_are_python(document):
    for block in blocks(document, "python"):
        ast.parse(block)


def test_python_examples_call_what_exists():
    for document in READABLE:
        for block in blocks(document, "python"):
            for call in ast.walk(ast.parse(block)):
                if isinstance(call, ast.Call) and ast.unparse(call.func).startswith("pcb_ray."):
                    function = getattr(pcb_ray, ast.unparse(call.func).removeprefix("pcb_ray."))
                    inspect.signature(function).bind(*call.args, **{k.arg: k.value for k in call.keywords if k.arg})
