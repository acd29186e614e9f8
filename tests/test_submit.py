"""`pcb-ray submit` to a real cluster: a head that nothing may be scheduled on, and a node with two cores, which want a token."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import families
import psutil
import pytest
from clusters import (
    BIN,
    DEADLINE_S,
    Head,
    Run,
    await_end,
    await_that,
    descendants,
    digests,
    head_node,
    node_of,
    owners_under,
    pcb_ray,
    receipt_of,
    running,
    state_of,
    title,
)
from families import Family

pytestmark = [pytest.mark.ray, pytest.mark.slow]

STOPPED, KILLED, LEFT = 143, 137, 130


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """Its other node computes with the torch kernel, slowly enough to be hit."""
    with head_node(cpus=0) as head:
        environment = {**head.environment, "PCB_RAY_KERNEL": "torch"}
        # Nodes that share a folder unpack a job's files over each other's, and the driver loses its working directory.
        start = ["--address", head.address, "--temp-dir", head.folder / "node"]
        with node_of(start, 2, environment, head.folder / "node.log") as node:
            await_that("the node joins", lambda: any(p.name() == "raylet" for p in descendants(node.pid)))
            NODES[head.url] = node
            yield head


NODES: dict[str, subprocess.Popen[bytes]] = {}
TOLD: list[str] = []
"""All that a run has printed here: the token must not be in it."""


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return Family(tmp_path_factory.mktemp("submit") / "family", *families.fine_tuned(3, scale=400))


@pytest.fixture(scope="module")
def merged(family: Family, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The digests of its merge on this machine alone."""
    from pcb_ray import merge

    out = tmp_path_factory.mktemp("here") / "out"
    merge(family.recipe_file(parameters={"density": 0.2}), out, workers=2)
    return digests(out)


@pytest.fixture
def recipe(family: Family, tmp_path: Path) -> Path:
    folder = tmp_path / "my recipes"
    folder.mkdir()
    return Path(shutil.copy(family.recipe_file(parameters={"density": 0.2}), folder / "it's one.yaml"))


def variables(head: Head) -> dict[str, str]:
    return {name: value for name, value in head.environment.items() if name.startswith("RAY_")}


def submit(head: Head, *arguments: Any, url: str = "") -> Run:
    """`pcb-ray submit` that has ended."""
    run = pcb_ray("submit", *arguments, "--address", url or head.url, env=variables(head))
    TOLD.append(run.text)
    return run


@contextlib.contextmanager
def submitting(head: Head, *arguments: Any, url: str = "", keyboard: bool = False) -> Iterator[Run]:
    with running("submit", *arguments, "--address", url or head.url, env=variables(head), keyboard=keyboard) as run:
        yield run
        TOLD.append(run.text)


def job_of(run: Run) -> str:
    """The id, as soon as it is told."""
    return run.wait_for("submitting job").split()[-1]


def ray_job(head: Head, *arguments: Any) -> subprocess.CompletedProcess[str]:
    command = [str(a) for a in (BIN / "ray", "job", *arguments[:1], "--address", head.url, *arguments[1:])]
    done = subprocess.run(command, env=head.environment, capture_output=True, text=True, timeout=DEADLINE_S)
    TOLD.append(done.stdout + done.stderr)
    return done


def job_that(head: Head, name: str, script: str) -> str:
    """Submit a job of another kind: a shell script."""
    done = ray_job(head, "submit", "--no-wait", "--submission-id", name, "--", "sh", "-c", script)
    assert done.returncode == 0, done.stdout + done.stderr
    return name


def details(head: Head, job: str = "") -> Any:
    request = urllib.request.Request(f"{head.url}/api/jobs/{job}", headers={"Authorization": f"Bearer {head.token}"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)


# --- runs ------------------------------------------------------------------------------------------------------------------------


def test_a_merge_is_submitted_to_a_head_that_schedules_nothing(
    head: Head, recipe: Path, merged: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "the output"
    seen: dict[psutil.Process, int] = {}
    with submitting(head, recipe, out, "--workers", "2") as run:
        job = job_of(run)

        def at_work() -> bool:
            for process in owners_under(NODES[head.url].pid):
                with contextlib.suppress(psutil.NoSuchProcess):
                    seen[process] = process.ppid()
            return len(seen) == 2 or run.process.poll() is not None

        await_that("owners appear on the other node", at_work)
        assert not owners_under(head.process.pid)
        assert run.finish() == 0, run.text
    await_end(list(seen))
    assert digests(out) == merged
    assert receipt_of(out)["workers"] == 2
    assert any(line.startswith("pcb-ray: sending") and "it's one.yaml" in line for line in run.lines), run.text
    assert sum("models merged" in line for line in run.lines) == 1
    assert [line.partition(":")[0] for line in run.lines if ": done, " in line] == [
        "sample of |tau|", "ranks of |tau|", "sample of beta", "ranks of beta", "write",
    ]  # fmt: skip
    told = details(head, job)
    assert told["status"] == "SUCCEEDED"
    assert "it'\"'\"'s one.yaml" in told["entrypoint"]

    checked = submit(head, "verify", out)
    assert checked.process.returncode == 0, checked.text
    assert "all digests match" in checked.text
    planned = submit(head, "plan", recipe)
    assert planned.process.returncode == 0, planned.text
    assert "3 models" in planned.text

    again = submit(head, recipe, out)
    assert again.process.returncode == 2, again.text
    assert "exists: wanted a free name" in again.text

    with next(out.glob("*.safetensors")).open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    spoilt = submit(head, "verify", out)
    assert spoilt.process.returncode == 1, spoilt.text


@pytest.mark.very_slow
def test_a_search_and_a_sweep_are_submitted_with_their_evaluator(head: Head, recipe: Path, family: Family, tmp_path: Path) -> None:
    shutil.copy(Path(__file__).with_name("evaluators_of_tests.py"), recipe.parent / "near_things.py")
    (recipe.parent / "near.py").write_text("from near_things import Near\n")
    target = family.folder / "model1" / "model.safetensors"
    with recipe.open("a") as text:
        text.write(f"search: {{evaluator: {{near.py:Near: {{target: {target}}}}}, metric: near, budget: 6, population: 3,")
        text.write(" concurrency: 1}\n")
        text.write("sweep: {density: [0.1, 0.3]}\n")
    found = submit(head, "search", recipe, tmp_path / "best")
    assert found.process.returncode == 0, found.text
    assert "near_things.py" in found.text
    assert (tmp_path / "best" / "best_recipe.yaml").is_file()
    swept = submit(head, "sweep", recipe, tmp_path / "grid")
    assert swept.process.returncode == 0, swept.text
    assert "2 points" in swept.text


# --- how a job ends --------------------------------------------------------------------------------------------------------------


@pytest.mark.very_slow
def test_exit_codes_are_those_of_the_job(head: Head) -> None:
    scripts = {
        "ends-0": ("echo done", 0, "done"),
        "ends-1": ("echo bad; exit 1", 1, "ended with exit code 1"),
        "ends-2": ("exit 2", 2, "ended with exit code 2"),
        "ends-killed": ("kill -9 $$", KILLED, "its driver was ended by SIGKILL"),
        "ends-lacking": ("PATH=/nowhere pcb-ray merge a b", 127, "Fix: install pcb-ray on all nodes"),
    }
    for name, (script, _, _) in scripts.items():
        job_that(head, name, script)
    for name, (_, code, told) in scripts.items():
        run = submit(head, "--follow", name)
        assert run.process.returncode == code, run.text
        assert told in run.text
        assert "Traceback" not in run.text
    unknown = submit(head, "--follow", "nobody")
    assert unknown.process.returncode == 2, unknown.text
    assert "a cluster that doesn't know it" in unknown.text


@pytest.mark.very_slow
def test_a_log_that_is_no_text_does_not_keep_the_exit_code(head: Head) -> None:
    job_that(head, "no-text", "echo first; printf '\\377\\n'; exit 3")
    run = submit(head, "--follow", "no-text")
    assert run.process.returncode == 3, run.text
    assert run.text.count("bytes that are no text") == 1


@pytest.mark.very_slow
@pytest.mark.parametrize("is_hung", [False, True], ids=["by itself", "killed after 3 s"])
def test_a_merge_that_is_stopped_leaves_nothing_half_written(
    head: Head, recipe: Path, merged: dict[str, str], tmp_path: Path, is_hung: bool
) -> None:
    out = tmp_path / "out"
    with submitting(head, recipe, out) as run:
        job = job_of(run)
        driver = driver_in_its_last_sweep(head, out)
        owners = owners_under(NODES[head.url].pid)
        stopping = ray_job(head, "stop", "--no-wait", job)
        assert stopping.returncode == 0, stopping.stdout + stopping.stderr
        if not is_hung:
            driver.send_signal(signal.SIGCONT)
        assert run.finish() == STOPPED, run.text
    assert "was stopped" in run.text
    assert ("pcb-ray: interrupted" in run.text) is not is_hung
    assert details(head, job)["status"] == "STOPPED"
    await_end([*owners, driver])
    assert not os.path.lexists(out)
    assert state_of(out).is_dir()
    resumed = submit(head, recipe, out, "--resume")
    assert resumed.process.returncode == 0, resumed.text
    assert digests(out) == merged
    assert not state_of(out).exists()


def driver_in_its_last_sweep(head: Head, out: Path) -> psutil.Process:
    """The driver of a merge to `out`, standing still (SIGSTOP) while its owners write."""
    await_that("the merge writes", lambda: any(f.stat().st_size for f in state_of(out).rglob("*.safetensors")), DEADLINE_S)
    (driver,) = [p for p in descendants(head.process.pid) if "pcb-ray merge" in title(p) and "python" in title(p)]
    driver.send_signal(signal.SIGSTOP)
    assert not os.path.lexists(out), "the merge was too fast"
    return driver


# --- Ctrl-C ----------------------------------------------------------------------------------------------------------------------


def waiting_job(head: Head, name: str, gate: Path) -> str:
    """Prints a number each tenth of a second until there is such a file, and then a last line."""
    loop = f"i=0; while [ ! -e '{gate}' ]; do echo number $i; i=$((i+1)); sleep 0.1; done; echo last line of $i"
    return job_that(head, name, f"trap 'exit 5' TERM; {loop}")


def numbers_in(run: Run) -> list[int]:
    return [int(found[1]) for line in run.lines if (found := re.search(r"number (\d+)$", line))]  # after a ^C that is echoed


def last_of(run: Run) -> str:
    return next(line for line in reversed(run.lines) if line != "\x1b[0m")  # Ray leaves a terminal without colours


@pytest.mark.very_slow
def test_ctrl_c_asks_and_the_job_goes_on_or_is_stopped(head: Head, tmp_path: Path) -> None:
    job = waiting_job(head, "asked", tmp_path / "gate")
    with submitting(head, "--follow", job, keyboard=True) as run:
        run.wait_for("number 3")
        run.type("\x03")
        run.type("what\n")  # is asked again
        run.type("f\n")
        run.wait_for("number 40")
        run.type("\x03")
        run.type("l\n")
        assert run.finish() == LEFT, run.text
    assert run.text.count("[s/l/f]") == 3
    assert f"pcb-ray submit --follow {job} --address {head.url}" in run.text
    assert f"ray job stop --address {head.url} {job}" in run.text
    numbers = numbers_in(run)
    assert numbers == list(range(len(numbers))), run.text
    assert details(head, job)["status"] == "RUNNING"

    with submitting(head, "--follow", job, keyboard=True) as run:
        run.wait_for("number 40")
        run.type("\x03")
        run.type("s\n")
        assert run.finish() == STOPPED, run.text
    assert details(head, job)["status"] == "STOPPED"


@pytest.mark.very_slow
@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.very_slow)])
def test_without_a_terminal_an_interrupted_submit_leaves_its_job(head: Head, tmp_path: Path, number: signal.Signals) -> None:
    job = waiting_job(head, f"left-{number.name}", tmp_path / "gate")
    with submitting(head, "--follow", job) as run:
        run.wait_for("number 3")
        run.send(number)
        assert run.finish() == LEFT, run.text
    assert f"{job} goes on" in run.text
    assert details(head, job)["status"] == "RUNNING"
    (tmp_path / "gate").touch()
    again = submit(head, "--follow", job)
    assert again.process.returncode == 0, again.text
    numbers = numbers_in(again)
    assert numbers == list(range(len(numbers)))
    assert last_of(again) == f"last line of {len(numbers)}"


@pytest.mark.very_slow
def test_a_job_that_nobody_waits_for_is_followed_later(head: Head, recipe: Path, merged: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    sent = submit(head, "merge", recipe, out, "--no-wait")
    assert sent.process.returncode == 0, sent.text
    run = submit(head, "--follow", last_of(sent))
    assert run.process.returncode == 0, run.text
    assert digests(out) == merged


# --- the connection --------------------------------------------------------------------------------------------------------------


class Proxy:
    """What lies between a laptop and the dashboard: it can be cut, and come back."""

    def __init__(self, port: int) -> None:
        self._target, self._connections, self._lock = port, list[socket.socket](), threading.Lock()
        self.cuts = 0
        self._server = self._listen(0)
        self.port = self._server.getsockname()[1]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def _listen(self, port: int) -> socket.socket:
        server = socket.create_server(("127.0.0.1", port))
        threading.Thread(target=self._accept, args=(server,), daemon=True).start()
        return server

    def _accept(self, server: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                ours, _ = server.accept()
                theirs = socket.create_connection(("127.0.0.1", self._target))
                with self._lock:
                    self._connections += [ours, theirs]
                for one, other in (ours, theirs), (theirs, ours):
                    threading.Thread(target=self._pump, args=(one, other), daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)

    def cut(self) -> None:
        """All connections break, and there are no new ones."""
        self.cuts += 1
        with contextlib.suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        with self._lock:
            for one in self._connections:
                with contextlib.suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)
                one.close()
            self._connections.clear()

    def restore(self) -> None:
        self._server = self._listen(self.port)


@pytest.fixture
def proxy(head: Head) -> Iterator[Proxy]:
    made = Proxy(head.port)
    try:
        yield made
    finally:
        made.cut()


@pytest.mark.very_slow
def test_lost_connections_lose_no_line_and_show_none_twice(head: Head, tmp_path: Path, proxy: Proxy) -> None:
    job = waiting_job(head, "cut", tmp_path / "gate")
    with submitting(head, "--follow", job, url=proxy.url) as run:
        for at in ("number 5", "number 60"):
            run.wait_for(at)
            proxy.cut()
            run.wait_for("lost the connection")
            proxy.restore()
            run.wait_for("connected to")
        last = run.wait_for("number 120")
        proxy.cut()
        (tmp_path / "gate").touch()
        await_that("the job ends meanwhile", lambda: details(head, job)["status"] == "SUCCEEDED", DEADLINE_S)
        run.wait_for("lost the connection")
        proxy.restore()
        assert run.finish() == 0, run.text
    assert last
    numbers = numbers_in(run)
    assert numbers == list(range(len(numbers)))
    assert last_of(run) == f"last line of {len(numbers)}"
    assert run.text.count("\nlast line") == 1


@pytest.mark.very_slow
def test_a_connection_that_breaks_while_a_merge_is_submitted_starts_it_once(
    head: Head, recipe: Path, merged: dict[str, str], tmp_path: Path, proxy: Proxy
) -> None:
    out = tmp_path / "out"
    with submitting(head, recipe, out, url=proxy.url) as run:
        job = job_of(run)
        await_that("the job is there", lambda: any(one["submission_id"] == job for one in details(head)), DEADLINE_S)
        proxy.cut()  # most often before its answer is there
        run.wait_for("lost the connection")
        proxy.restore()
        assert run.finish() == 0, run.text
    assert digests(out) == merged
    assert sum(one["submission_id"] == job for one in details(head)) == 1


@pytest.mark.very_slow
def test_a_cluster_that_stays_away_is_told_after_the_stated_time(head: Head, tmp_path: Path, proxy: Proxy) -> None:
    job = waiting_job(head, "away", tmp_path / "gate")
    limit = "import pcb_ray.submitting as s; s.Cluster.ask.__defaults__ = (3.0,); s.RECONNECT_S = 3.0"
    code = f"import sys; {limit}; from pcb_ray.cli import main; sys.exit(main(['submit', *sys.argv[1:]]))"
    environment = {**os.environ, **variables(head)}
    with subprocess.Popen(
        [BIN / "python", "-c", code, "--follow", job, "--address", proxy.url],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line == "number 3\n":
                break
        proxy.cut()
        _, told = process.communicate(timeout=DEADLINE_S)
    TOLD.append(told)
    assert process.returncode == 1, told
    assert "wanted an answer within 3 s" in told
    assert "pcb-ray submit --follow" in told
    (tmp_path / "gate").touch()


# --- the token -------------------------------------------------------------------------------------------------------------------


@pytest.mark.very_slow
def test_another_token_or_none_is_refused_with_a_way_to_mend_it(head: Head, recipe: Path) -> None:
    for change, found in ({"RAY_AUTH_MODE": "disabled"}, "none sent"), ({"RAY_AUTH_TOKEN": "0" * 64}, "another one here"):
        run = pcb_ray("submit", recipe, "/out", "--address", head.url, env={**variables(head), **change})
        assert run.process.returncode == 2, run.text
        assert f"wanted the cluster's token, found {found}" in run.text
        assert "RAY_AUTH_MODE=token" in run.text
        TOLD.append(run.text)


@pytest.mark.very_slow
def test_the_token_is_in_no_log_job_or_output(head: Head, recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run = submit(head, recipe, out)
    assert run.process.returncode == 0, run.text
    planted = head.token.encode()
    assert planted not in json.dumps(details(head)).encode()
    assert planted not in "\n".join(TOLD).encode()
    files = [path for folder in (head.folder, out) for path in folder.rglob("*") if path.is_file() and path.name != "token"]
    assert any(path.name.startswith("job-driver-") for path in files)
    assert not [path for path in files if planted in path.read_bytes()]
