"""The command line without Ray: help that teaches, plans, and wrong requests that end at once with exit code 2 and all that is
wrong."""

from __future__ import annotations

import argparse
import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from families import Family

from pcb_ray import Recipe, RequestError
from pcb_ray.budget import choose_block, worker_bytes
from pcb_ray.cli import count, main, size
from pcb_ray.cluster import check_cluster
from pcb_ray.methods import METHODS
from pcb_ray.planning import plan

MODULE = [sys.executable, "-m", "pcb_ray"]
SCRIPT = [str(Path(sys.executable).parent / "pcb-ray")]


@pytest.fixture(autouse=True)
def same_signals() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def run(command: list[str], cwd: Path, *, limit_s: float = 60) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=limit_s)


def everything(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*")}


# --- help -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["--help"], ["plan", "--help"], ["merge", "--help"]])
def test_help_shows_a_recipe_that_is_one(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 0
    text = capsys.readouterr().out
    shown = text[text.index("  merge_method: pcb") :]
    recipe = Recipe.from_yaml("\n".join(line[2:] for line in shown.splitlines() if line.startswith("  ")))
    assert recipe.method.full_name == METHODS[0].full_name
    assert len(recipe.models) == 2


def test_help_names_the_commands_and_what_they_promise(capsys):
    for arguments, words in (
        ([], ("plan", "merge", "verify", "recipe", "same bytes")),
        (["merge"], ("--workers", "--memory", "--resume", "--overwrite", "--max-shard-size", "--address", "ray job submit")),
        (["plan"], ("--json", "headers and samples")),
        (["verify"], ("--sample", "digest")),
    ):
        with pytest.raises(SystemExit):
            main([*arguments, "--help"])
        text = capsys.readouterr().out
        assert all(word in text for word in words), (arguments, words)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["fly"],
        ["plan"],
        ["merge", "recipe.yaml"],
        ["merge", "r", "o", "--workers", "0"],
        ["merge", "r", "o", "--memory", "much"],
    ],
)
def test_a_wrong_command_line_ends_with_code_2_and_the_usage(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "usage: pcb-ray" in capsys.readouterr().err


# --- sizes ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2GB", 2 * 10**9),
        ("2gb", 2 * 10**9),
        ("1.5 GiB", 3 << 29),
        ("500MB", 5 * 10**8),
        ("64KiB", 1 << 16),
        ("123", 123),
        (" 7 B ", 7),
        ("1TB", 10**12),
    ],
)
def test_sizes_are_read(text, value):
    assert size(text) == value


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "2 giga", "1e9", "0", "0.1B", "1,5GB", "nan", "9" * 400 + "TB"])
def test_what_is_no_size_is_told(text):
    with pytest.raises(argparse.ArgumentTypeError, match="is not a size such as 500MB"):
        size(text)


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "", "x"])
def test_what_is_no_count_is_told(text):
    with pytest.raises(argparse.ArgumentTypeError):
        count(text)


# --- plan -------------------------------------------------------------------------------------------------------------------------


def test_a_plan_is_json_on_request(family, capsys):
    one = family(2)
    path = one.recipe_file()
    before = everything(one.folder)
    assert main(["plan", str(path), "--json", "--memory", "2GB", "--max-shard-size", "10kB"]) == 0
    facts = json.loads(capsys.readouterr().out)
    made = plan(Recipe.from_file(path), max_shard_bytes=10_000)
    assert facts | made.summary() == facts
    assert facts["worker_bytes"] == worker_bytes(made, choose_block(made, "cpu", 2 * 10**9))
    assert facts["disk_free_here"] > 0
    assert len(facts["output_files"]) > 3
    assert everything(one.folder) == before, "a plan writes nothing"


def test_a_plan_tells_people_what_is_merged_copied_tied_and_noted(family, capsys):
    one = family(2)
    one.base |= {"ids": torch.arange(3), "rope.inv_freq": torch.ones(3)}
    one = Family(one.folder, one.base, one.models)
    recipe = one.recipe_file(exclude=["*.inv_freq", "nothing.*"], parameters={"density": 0.25})
    assert main(["plan", str(recipe)]) == 0
    text = capsys.readouterr().out
    for words in (
        "pcb-pairwise: 2 models, D = 19,552 merged elements",
        str(one.folder / "model1"),
        "density    0.25",
        "1 integer",
        "1 excluded",
        "rope.inv_freq: excluded",
        "3 sweeps",
        "in 1 file;",
        "per worker",
        "note: exclude: 'nothing.*' matches no tensor",
    ):
        assert words in text, words


def test_a_relative_path_in_a_recipe_is_relative_to_the_recipe(family, tmp_path):
    one = family(1)
    one.recipe_file(base_model="base", models=[{"model": "model0"}])
    (tmp_path / "elsewhere").mkdir()
    done = run([*MODULE, "plan", str(one.folder / "recipe.yaml"), "--json"], tmp_path / "elsewhere")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["N"] == 1


def test_the_module_is_the_script(family):
    one = family(1)
    path = str(one.recipe_file())
    told = [json.loads(run([*program, "plan", path, "--json"], one.folder).stdout) for program in (MODULE, SCRIPT)]
    for facts in told:
        facts.pop("disk_free_here")  # changes by itself
    assert told[0] == told[1]
    assert run([*MODULE, "--help"], one.folder).stdout == run([*SCRIPT, "--help"], one.folder).stdout


def test_a_plan_needs_neither_torch_nor_ray(family):
    one = family(1)
    loaded = "[m for m in ('torch', 'ray', 'transformers') if m in sys.modules]"
    program = f"import sys; from pcb_ray.cli import main; main(sys.argv[1:]); print({loaded})"
    (one.folder / "mine.py").touch()
    search = {"evaluator": "mine.py:Mine", "metric": "m", "space": {"density": {}}}
    for recipe in one.recipe_file(), one.recipe_file("searched.yaml", search=search):
        done = run([sys.executable, "-c", program, "plan", str(recipe)], one.folder)
        assert done.stdout.splitlines()[-1] == "[]"


def test_a_plan_announces_the_search_of_its_recipe(family, capsys):
    one = family(2)
    space = {"weight": {"lower": 1.5, "upper": 2.0}, "density": {"lower": 0.1, "upper": 0.5}, "variant": ["paper", "pairwise"]}
    search = {"evaluator": {"command": {"run": "eval {model}"}}, "metric": "m", "space": space, "budget": 40}
    recipe = one.recipe_file(search=search)
    assert main(["plan", str(recipe)]) == 0
    text = capsys.readouterr().out
    for words in (
        "search     40 candidates by CMA, 8 asked at a time; 4 coefficients: weight.model0, weight.model1, density, variant",
        "at most",
        "each trial is given 78.2 kB",
        "note: the recipe's weight.model0, weight.model1 lies outside its range",
    ):
        assert words in text, words
    assert main(["plan", str(recipe), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["search"]
    entries = 2 * 19_552 * 0.5
    assert found["basis_bytes"] > entries * 12 + entries * 8, "of `paper` and `pairwise`, at the largest density"
    wrong = one.recipe_file("wrong.yaml", search=search | {"evaluator": "none.py:X", "budget": 40})
    assert main(["plan", str(wrong)]) == 2
    assert "search.evaluator: wanted code that can be read, found none.py:X: No such file" in capsys.readouterr().err


def test_a_plan_refuses_a_search_by_a_method_that_does_not_say_it_is_linear(family, capsys):
    one = family(2)
    (one.folder / "own.py").write_text(
        "from pcb_ray.methods import Method\nown = Method(name='own', merge=lambda block, _known, _settings: block.theta)\n"
    )
    search = {"evaluator": {"command": {"run": "eval {model}"}}, "metric": "m"}
    assert main(["plan", str(one.recipe_file(merge_method="own.py:own"))]) == 0
    capsys.readouterr()
    assert main(["plan", str(one.recipe_file(merge_method="own.py:own", search=search))]) == 2
    told = capsys.readouterr().err
    assert "merge_method: wanted a method with a base that says it is linear in the weights, found own.py:own. Fix:" in told
    assert "set `linear=True` in its record" in told


# --- wrong requests ---------------------------------------------------------------------------------------------------------------


def wrong_recipe(folder: Path) -> Path:
    path = folder / "wrong.yaml"
    path.write_text("merge_method: pbc\nbase_model: base\nmodels: []\nparameters: {density: 3}\nslices: []\n")
    return path


@pytest.mark.parametrize("command", ["plan", "merge"])
def test_a_wrong_recipe_ends_in_seconds_with_all_that_is_wrong_and_nothing_written(family, command):
    one = family(1)
    path = wrong_recipe(one.folder)
    before = everything(one.folder)
    start = time.monotonic()
    done = run([*MODULE, command, str(path), *(["out"] if command == "merge" else [])], one.folder)
    assert time.monotonic() - start < 5
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("pcb-ray: ")
    for word in ("pbc", "models", "density", "slices"):
        assert word in done.stderr
    assert "Traceback" not in done.stderr
    assert everything(one.folder) == before


@pytest.mark.parametrize("command", ["plan", "merge"])
def test_missing_inputs_are_all_named(family, command, capsys):
    one = family(3)
    path = one.recipe_file()
    for k in (0, 2):
        (one.folder / f"model{k}" / "model.safetensors").unlink()
    before = everything(one.folder)
    assert main([command, str(path), *([str(one.folder / "out")] if command == "merge" else [])]) == 2
    text = capsys.readouterr().err
    assert "model0" in text
    assert "model2" in text
    assert everything(one.folder) == before


def test_a_recipe_that_is_not_there_is_named(tmp_path, capsys):
    for wrong in (tmp_path / "none.yaml", tmp_path):
        assert main(["plan", str(wrong)]) == 2
        text = capsys.readouterr().err
        assert str(wrong)[:40] in text
        assert "Fix: name the YAML file" in text


def test_a_merge_that_cannot_begin_is_refused_before_anything_is_started(family):
    """An existing OUT, one inside an input, too little memory: code 2, no state, no Ray."""
    one = family(1)
    path = one.recipe_file()
    (one.folder / "there").mkdir()
    before = everything(one.folder)
    program = "import sys; from pcb_ray.cli import main; code = main(sys.argv[1:]); print(code, 'ray' in sys.modules)"
    for arguments, words in (
        (["there"], ["there: exists", "--overwrite"]),
        (["base/out"], ["inside or around the input"]),
        (["out", "--memory", "1MB"], ["--memory: wanted at least", "found 1,000,000"]),
    ):
        done = run([sys.executable, "-c", program, "merge", str(path), *arguments], one.folder)
        assert done.stdout.split() == ["2", "False"], done.stderr
        assert all(word in done.stderr for word in words), done.stderr
        assert everything(one.folder) == before


def test_a_relative_output_inside_a_ray_job_is_refused(family, capsys, monkeypatch):
    one = family(1)
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert main(["merge", str(one.recipe_file()), "out"]) == 2
    assert "absolute path" in capsys.readouterr().err


def test_verify_of_a_folder_that_no_merge_wrote_is_a_wrong_request(family, capsys):
    one = family(1)
    assert main(["verify", str(one.folder / "base")]) == 2
    assert "pcb_receipt.json" in capsys.readouterr().err
    (one.folder / "base" / "pcb_receipt.json").write_text("{}")
    assert main(["verify", str(one.folder / "base")]) == 2
    assert "pcb_receipt.json" in capsys.readouterr().err


def test_a_failed_run_in_a_terminal_shows_no_traceback(family):
    one = family(1)
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [*MODULE, "merge", str(wrong_recipe(one.folder)), "out"], cwd=one.folder, stdout=theirs, stderr=theirs
    ) as process:
        os.close(theirs)
        shown = b""
        while True:
            try:
                part = os.read(ours, 4096)
            except OSError:
                break
            if not part:
                break
            shown += part
    os.close(ours)
    assert process.returncode == 2
    assert b"pcb-ray: " in shown
    assert b"Traceback" not in shown


def test_a_temporary_folder_where_ray_can_put_no_socket_is_told(monkeypatch, tmp_path):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    for folder, part in (("/x" * 30, "wanted a path of at most"), ("/proc/self", "wanted a folder that can be written")):
        monkeypatch.setenv("TMPDIR", folder)
        with pytest.raises(RequestError, match=rf"^TMPDIR: {part}.*Fix: set RAY_TMPDIR"):
            check_cluster(None)
        check_cluster("head:6379")  # whose folders are elsewhere
        monkeypatch.setenv("RAY_TMPDIR", str(tmp_path)[:20])
        check_cluster(None)
        monkeypatch.delenv("RAY_TMPDIR")
    monkeypatch.setenv("RAY_TMPDIR", "/x" * 30)
    with pytest.raises(RequestError, match=r"^RAY_TMPDIR: wanted a path of at most"):
        check_cluster("local")


def test_a_reader_that_has_seen_enough_is_no_fault_of_the_disk(tmp_path):
    from families import fine_tuned

    shapes = {f"layer.{k}.weight": (4, 4) for k in range(3000)}  # more than a pipe holds
    recipe = Family(tmp_path, *fine_tuned(1, shapes=shapes)).recipe_file(exclude=["*1*"])
    command = f"{sys.executable} -m pcb_ray plan --json {recipe} | head -1"
    done = subprocess.run(["bash", "-c", f"{command}; exit ${{PIPESTATUS[0]}}"], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr, done.returncode) == ("{\n", "", 128 + signal.SIGPIPE)
