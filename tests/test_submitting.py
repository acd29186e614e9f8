"""What `pcb-ray submit` sends and asks for, told without a cluster."""

from __future__ import annotations

import io
import os
import shlex
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import pytest

from pcb_ray import cli, submitting
from pcb_ray.errors import RequestError
from pcb_ray.submitting import command_line, gather

RECIPE = "merge_method: pcb\nbase_model: /shared/base\nmodels: [/shared/math, org/code@main]\n"


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_JOB_HEADERS"):
        monkeypatch.delenv(name, raising=False)


def written(path: Path, text: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def with_evaluator(folder: Path, evaluator: str) -> Path:
    return written(folder / "recipe.yaml", RECIPE + f"search: {{metric: x, evaluator: {evaluator}}}\n")


def problems_of(*recipes: Path, include: tuple[Path, ...] = ()) -> tuple[str, ...]:
    with pytest.raises(RequestError) as error:
        gather(recipes, include)
    return error.value.problems


# --- what is sent ----------------------------------------------------------------------------------------------------------------


def test_a_plain_recipe_goes_alone(tmp_path: Path) -> None:
    recipe = written(tmp_path / "recipe.yaml", RECIPE)
    written(tmp_path / "beside.txt")
    package = gather([recipe])
    assert package.files == {"recipe.yaml": recipe}
    assert package.names == {recipe: "recipe.yaml"}


@pytest.mark.parametrize(
    ("evaluator", "sent"),
    [
        ("my_eval.py:Accuracy", {"my_eval.py"}),
        ("{evals/my_eval.py:Accuracy: {words: [words.txt, /shared/more.txt, none.txt]}}", {"evals/my_eval.py", "words.txt"}),
        ("package.evaluators:Accuracy", {"package/__init__.py", "package/evaluators.py"}),
        ("installed_elsewhere:Accuracy", set()),
        ("/shared/my_eval.py:Accuracy", set()),
        ("{causal_lm: {data: {val: val.txt, test: {a: sub/a.jsonl, b: /shared/b.jsonl}}}}", {"val.txt", "sub/a.jsonl"}),
        ("{lm_eval: {tasks: {val: [mine]}, include_path: tasks}}", {"tasks/mine.yaml", "tasks/more/mine.jsonl"}),
        (
            "{command: {run: \"python score.py {model} --data=val.txt 'sub/a b.txt' --split {split}\"}}",
            {"score.py", "val.txt", "sub/a b.txt"},
        ),
    ],
)
def test_what_an_evaluator_is_made_of_goes_along(tmp_path: Path, evaluator: str, sent: set[str]) -> None:
    for name in ("my_eval.py", "evals/my_eval.py", "words.txt", "package/__init__.py", "package/evaluators.py", "val.txt"):
        written(tmp_path / name)
    for name in ("sub/a.jsonl", "sub/a b.txt", "score.py", "tasks/mine.yaml", "tasks/more/mine.jsonl", "tasks/__pycache__/x.pyc"):
        written(tmp_path / name)
    assert set(gather([with_evaluator(tmp_path, evaluator)]).files) == {"recipe.yaml", *sent}


def test_a_method_of_ones_own_goes_along_with_what_it_imports_from_beside_it(tmp_path: Path) -> None:
    recipe = written(tmp_path / "recipe.yaml", RECIPE.replace("pcb", "methods/mine.py:trimmed", 1))
    written(tmp_path / "methods" / "mine.py", "import os, torch\nimport pcb_ray.methods\ndef f():\n    from near import distance\n")
    written(tmp_path / "methods" / "near.py", "import tools.sub\nfrom . import x")
    written(tmp_path / "tools" / "sub" / "__init__.py", "import near, os")
    written(tmp_path / "tools" / "weights.safetensors")  # no Python: not sent, and so not refused
    written(tmp_path / "pcb_ray" / "methods.py")  # that of the cluster is used
    written(tmp_path / "os.py", "not python :")
    sent = set(gather([recipe]).files) - {"recipe.yaml"}
    assert sent == {"methods/mine.py", "methods/near.py", "tools/sub/__init__.py", "os.py"}


def test_what_lies_above_the_recipe_keeps_its_place_to_it(tmp_path: Path) -> None:
    written(tmp_path / "data" / "val.txt")
    recipe = with_evaluator(tmp_path / "recipes", "{causal_lm: {data: {val: ../data/val.txt}}}")
    package = gather([recipe])
    assert set(package.files) == {"recipes/recipe.yaml", "data/val.txt"}
    assert package.names == {recipe: "recipes/recipe.yaml"}


def test_what_is_included_goes_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = written(Path("recipe.yaml"), RECIPE)
    written(Path("more/a.txt"))
    written(Path("more/.hidden/venv/b.txt"))
    assert set(gather([recipe], [Path("more"), Path("recipe.yaml")]).files) == {
        "recipe.yaml",
        "more/a.txt",
        "more/.hidden/venv/b.txt",
    }
    (problem,) = problems_of(recipe, include=(Path("none"),))
    assert "--include none: wanted a file" in problem


@pytest.mark.parametrize(
    "source", ["base", "./base", "../x/base", "base.safetensors", "models/a/b", "org/there", "{model: {path: ./base}}"]
)
def test_a_model_by_a_relative_path_is_refused(tmp_path: Path, source: str) -> None:
    written(tmp_path / "base" / "config.json")
    written(tmp_path / "org" / "there" / "config.json")
    recipe = written(tmp_path / "recipe.yaml", f"base_model: /shared/base\nmodels: [{source}]\ntokenizer_source: ./base\n")
    problems = problems_of(recipe)
    assert [problem.partition(":")[0] for problem in problems] == ["tokenizer_source", "models[0]"]
    assert "absolute path that all nodes see, a URI, or a Hub id" in problems[1]


@pytest.mark.parametrize("source", ["/shared/base", "s3://bucket/base", "hf://org/name", "org/name", "org/name@v1.0", "~/base"])
def test_models_that_a_cluster_can_open_are_left_to_it(tmp_path: Path, source: str) -> None:
    gather([written(tmp_path / "recipe.yaml", f"base_model: {source}\nmodels: ['{source}']\n")])


@pytest.mark.parametrize("suffix", submitting.CHECKPOINTS)
def test_checkpoints_are_never_sent(tmp_path: Path, suffix: str) -> None:
    written(tmp_path / f"target{suffix}")
    (problem,) = problems_of(
        with_evaluator(tmp_path, f"{{my_eval.py:Near: {{target: target{suffix}}}}}"), include=(written(tmp_path / "my_eval.py"),)
    )
    assert "never sent" in problem
    (problem,) = problems_of(written(tmp_path / "other.yaml", RECIPE), include=(tmp_path / f"target{suffix}",))
    assert "never sent" in problem


def test_more_than_ray_takes_is_told_with_the_largest_files(tmp_path: Path) -> None:
    for name, size in ("a", 60 << 20), ("b", 50 << 20), ("c", 10):
        with (tmp_path / f"{name}.txt").open("wb") as file:
            file.truncate(size)
    recipe = with_evaluator(tmp_path, "{causal_lm: {data: {val: {a: a.txt, b: b.txt, c: c.txt}}}}")
    (problem,) = problems_of(recipe)
    assert problem.index("a.txt (62.9 MB)") < problem.index("b.txt (52.4 MB)") < problem.index("c.txt (10 B)")


def test_a_secret_in_a_recipe_is_refused_and_not_shown(tmp_path: Path) -> None:
    token = "hf_" + "x" * 34
    (problem,) = problems_of(with_evaluator(tmp_path, f"{{my_package.x:Y: {{token: {token}}}}}"))
    assert "secret" in problem
    assert token not in problem


@pytest.mark.parametrize("text", ["a: [", "\udc80", None])
def test_what_is_no_recipe_is_refused(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "recipe.yaml"
    if text is not None:
        path.write_bytes(text.encode(errors="surrogateescape"))
    (problem,) = problems_of(path)
    assert "recipe" in problem


def test_missing_code_is_told_here(tmp_path: Path) -> None:
    (problem,) = problems_of(with_evaluator(tmp_path, "my_eval.py:Accuracy"))
    assert f"found none at {tmp_path / 'my_eval.py'}" in problem


def test_names_that_ray_would_leave_out_are_refused(tmp_path: Path) -> None:
    for name in ("c:recipe.yaml", "a\\b.yaml", "a\nb.yaml"):
        (problem,) = problems_of(written(tmp_path / name, RECIPE))
        assert "Fix: rename it" in problem


def test_the_same_files_make_the_same_package(tmp_path: Path) -> None:
    script = written(tmp_path / "a" / "score.py")
    script.chmod(0o755)
    for folder in ("a", "b"):
        written(tmp_path / folder / "score.py").chmod(0o755)
        with_evaluator(
            tmp_path / folder, "{command: {run: ./score.py {model}}}".replace("./score.py {model}", '"./score.py {model}"')
        )
    os.utime(script, (0, 0))
    one, other = (gather([tmp_path / folder / "recipe.yaml"]).zipped() for folder in ("a", "b"))
    assert one == other
    with zipfile.ZipFile(io.BytesIO(one)) as archive:
        assert archive.namelist() == ["recipe.yaml", "score.py"]
        assert archive.getinfo("score.py").external_attr >> 16 == 0o755


# --- the command -----------------------------------------------------------------------------------------------------------------


def test_names_with_spaces_and_quotes_reach_the_command_as_they_are(tmp_path: Path) -> None:
    recipe = written(tmp_path / "it's a $(recipe).yaml", RECIPE)
    words = ["merge", str(recipe), "/shared/a b;c", "--memory", "2GB"]
    line = command_line(words, gather([recipe]).names, Path("/shared/a b;c"))
    assert shlex.split(line) == ["pcb-ray", "merge", "it's a $(recipe).yaml", "/shared/a b;c", "--memory", "2GB"]
    echoed = subprocess.run(line.replace("pcb-ray", "printf '%s\\n'", 1), shell=True, capture_output=True, text=True, check=True)
    assert echoed.stdout.splitlines() == [words[0], "it's a $(recipe).yaml", *words[2:]]


def test_a_recipe_whose_name_looks_like_an_option_stays_a_recipe(tmp_path: Path) -> None:
    recipe = written(tmp_path / "--resume", RECIPE)
    assert command_line(["merge", str(recipe), "/out"], gather([recipe]).names, "/out") == "pcb-ray merge ./--resume /out"


@pytest.mark.parametrize("out", ["out", "./out", "../out"])
def test_a_relative_output_is_refused(out: str) -> None:
    with pytest.raises(RequestError, match="wanted an absolute path"):
        command_line(["merge", "r.yaml", out], {}, Path(out))


@pytest.mark.parametrize("out", ["/shared/out", "s3://bucket/out", "hf://org/name"])
def test_paths_and_uris_are_passed_on_as_they_were_typed(out: str) -> None:
    assert command_line(["verify", out], {}, Path(out)) == f"pcb-ray verify {out}"


def test_a_secret_in_the_command_is_refused_and_not_shown() -> None:
    with pytest.raises(RequestError, match="secret") as error:
        command_line(["verify", "s3://key:planted@bucket/out"], {}, "s3://key:planted@bucket/out")
    assert "planted" not in str(error.value)


@pytest.mark.parametrize(
    ("typed", "words", "address"),
    [
        ("R O --address http://h:8265", ["merge", "R", "O"], "http://h:8265"),
        ("--address http://h:8265 R O", ["merge", "R", "O"], "http://h:8265"),
        ("R --address=http://h:8265 O --resume", ["merge", "R", "O", "--resume"], "http://h:8265"),
        ("merge R O --workers 4 --memory 2GB -v", ["merge", "R", "O", "--workers", "4", "--memory", "2GB", "-v"], None),
        ("search R O --address http://h:8265 --overwrite", ["search", "R", "O", "--overwrite"], "http://h:8265"),
        ("sweep R O", ["sweep", "R", "O"], None),
        ("verify O --sample 3", ["verify", "O", "--sample", "3"], None),
        ("plan R --json", ["plan", "R", "--json"], None),
        ("./merge O", ["merge", "./merge", "O"], None),
    ],
)
def test_the_command_and_its_options_get_through(typed: str, words: list[str], address: str | None) -> None:
    options = cli.parser().parse_args(["submit", *typed.split()])
    assert (options.words, options.address) == (words, address)


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        ("", "--follow JOB is required"),
        ("R", "wanted RECIPE and OUT, or --into DIR"),
        ("R O --sample 3", "unrecognized arguments: --sample 3"),
        ("merge R O --memory lots", "not a size"),
        ("verify O O", "unrecognized arguments: O"),
        ("--follow JOB R O", "--follow takes no command"),
    ],
)
def test_a_wrong_command_is_told_before_anything_is_sent(typed: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["submit", *typed.split()])
    assert end.value.code == 2
    assert told in capsys.readouterr().err


# --- addresses -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("address", ["head:8265", "head", "ray://head:10001", "http://", "http://h:x", ""])
def test_what_is_no_address_of_a_dashboard_is_refused(address: str) -> None:
    with pytest.raises(RequestError, match="wanted the address of the cluster's dashboard"):
        submitting._url(address)


def test_the_address_given_wins_over_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    assert submitting._url(None) == "http://127.0.0.1:8265"
    monkeypatch.setenv("RAY_ADDRESS", "http://other:1")
    assert submitting._url("http://head:8265/") == "http://head:8265"
    assert submitting._url(None) == "http://other:1"
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://api:2")
    assert submitting._url(None) == "http://api:2"


def submit(*arguments: object, home: Path, code: str = "", **variables: str) -> tuple[int, str]:
    """Exit code and output of `pcb-ray submit` in a process that runs `code` first."""
    program = f"import sys\n{code}\nfrom pcb_ray.cli import main\nsys.exit(main(['submit', *sys.argv[1:]]))"
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")} | {"HOME": str(home)} | variables
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)], env=environment, capture_output=True, text=True, timeout=120
    )
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return written(tmp_path / "recipe.yaml", RECIPE)


@pytest.fixture
def other_server() -> object:
    """A server that is no dashboard."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/api/version" else 404)
            self.end_headers()
            self.wfile.write(b"<html>hello</html>")

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_nothing_at_the_address_is_one_clear_message(recipe: Path, tmp_path: Path) -> None:
    code, told = submit(recipe, "/out", "--address", "http://127.0.0.1:1", home=tmp_path)
    assert code == 1, told
    assert "nothing answers there (Connection refused)" in told
    assert len(told.splitlines()) == 1


def test_a_server_that_is_no_dashboard_is_one_clear_message(recipe: Path, tmp_path: Path, other_server: str) -> None:
    code, told = submit(recipe, "/out", "--address", other_server, home=tmp_path)
    assert code == 2, told
    assert "found something else that answers" in told
    assert len(told.splitlines()) == 1


def test_a_token_that_is_asked_for_and_missing_is_one_clear_message(recipe: Path, tmp_path: Path, other_server: str) -> None:
    code, told = submit(recipe, "/out", "--address", other_server, home=tmp_path, RAY_AUTH_MODE="token")
    assert code == 2, told
    assert "found no token here" in told
    assert len(told.splitlines()) == 1


def test_a_token_of_two_lines_is_not_shown(recipe: Path, tmp_path: Path, other_server: str) -> None:
    code, told = submit(
        recipe, "/out", "--address", other_server, home=tmp_path, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="planted\nsecret"
    )
    assert code == 2, told
    assert "not one line of plain text" in told
    assert "planted" not in told
    assert "secret" not in told


@pytest.mark.parametrize("missing", ["aiohttp", "requests", "pydantic"])
def test_ray_without_what_its_jobs_need_is_one_clear_message(recipe: Path, tmp_path: Path, missing: str) -> None:
    code, told = submit(recipe, "/out", "--address", "http://127.0.0.1:1", home=tmp_path, code=f"sys.modules[{missing!r}] = None")
    assert code == 2, told
    assert "Fix: pip install 'ray[default]'" in told
    assert len(told.splitlines()) == 1


def test_headers_that_are_no_json_are_refused_and_not_shown(recipe: Path, tmp_path: Path) -> None:
    code, told = submit(recipe, "/out", "--address", "http://127.0.0.1:1", home=tmp_path, RAY_JOB_HEADERS="planted")
    assert code == 2, told
    assert "RAY_JOB_HEADERS: wanted a JSON object" in told
    assert "planted" not in told


# --- the log ---------------------------------------------------------------------------------------------------------------------


class Answers:
    """Stands for a cluster whose job prints more each time it is asked, and then has ended."""

    def __init__(self, *logs: str) -> None:
        self.logs, self.asked = list(logs), 0

    def ask(self, question: Callable[[object], object], _limit_s: float = 0.0) -> object:
        return question(self)

    def get_job_info(self, job: str) -> object:
        self.asked += 1
        has_ended = self.asked >= len(self.logs)
        return SimpleNamespace(submission_id=job, status=SimpleNamespace(is_terminal=lambda: has_ended))

    def get_job_logs(self, _job: str) -> str:
        return self.logs[self.asked - 1]


@pytest.fixture
def _without_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submitting.time, "sleep", lambda _: None)


@pytest.mark.usefixtures("_without_pauses")
def test_a_line_is_shown_when_it_is_whole_or_the_job_has_ended(capsys: pytest.CaptureFixture[str]) -> None:
    class Shown(Answers):
        def get_job_logs(self, job: str) -> str:
            parts.append(capsys.readouterr().out)
            return super().get_job_logs(job)

    parts: list[str] = []
    submitting._Log(Shown("", "one\ntw", "one\ntwo\n", "", "one\ntwo\nthree"), "job").until_the_end()
    assert [*parts[1:], capsys.readouterr().out] == ["", "one\n", "two\n", "", "three"]


@pytest.mark.usefixtures("_without_pauses")
def test_ctrl_c_while_lines_are_shown_neither_loses_nor_doubles_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log = submitting._Log(Answers("one\n", "one\ntwo\n", "one\ntwo\nthree\n"), "job")
    write = sys.stdout.write

    def interrupted(text: str) -> int:
        log.interrupt(signal.SIGINT, None)
        return write(text)

    monkeypatch.setattr(sys.stdout, "write", interrupted)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            log.until_the_end()
    assert capsys.readouterr().out == "one\ntwo\nthree\n"


def test_signals_that_nobody_holds_end_the_wait_at_once() -> None:
    log = submitting._Log(Answers(), "job")
    with pytest.raises(KeyboardInterrupt):
        log.interrupt(signal.SIGINT, None)
    with pytest.raises(submitting._Terminated):
        log.interrupt(signal.SIGTERM, None)
