"""The scripts of cluster/, run: Rays of three nodes, `ray symmetric-run` on two, an environment installed anew."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from clusters import DEADLINE_S, await_that, digests, executable, pcb_ray, receipt_of, state_of
from families import Family, MakeFamily

pytestmark = [pytest.mark.ray, pytest.mark.very_slow]

ROOT = Path(__file__).parent.parent
CLUSTER = ROOT / "cluster"
ENVIRONMENT = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


@contextlib.contextmanager
def script(name: str, *arguments: object, **variables: object) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """A script of cluster/ as a process group of its own, and the file of what it prints. Its marks are in `variables`."""
    log = Path(str(variables.pop("log")))
    environment = ENVIRONMENT | {key: str(value) for key, value in variables.items()}
    with log.open("wb") as stream:
        command = ["bash", str(CLUSTER / name), *map(str, arguments)]
        process = subprocess.Popen(command, env=environment, stdout=stream, stderr=stream, start_new_session=True)
    try:
        yield process, log
    finally:
        if process.poll() is None:
            process.terminate()
        process.wait(timeout=DEADLINE_S)


def marked(mark: str) -> list[int]:
    """The processes that have this in their environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if mark.encode() in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
    return found


def of_ray() -> set[str]:
    """What Rays of local.sh leave on disk."""
    return {str(path) for path in Path("/tmp").glob("pcb.*")}


def job_folder(family: Family, tmp_path: Path) -> Path:
    folder = tmp_path / "job"
    folder.mkdir()
    (folder / "recipe.yaml").write_bytes(family.recipe_file(parameters={"density": 0.2}).read_bytes())
    return folder


@pytest.mark.timeout(600)
def test_a_cluster_on_this_machine_merges_verifies_and_searches_and_leaves_nothing(tmp_path: Path) -> None:
    before = of_ray()
    with script("local.sh", log=tmp_path / "log", MARK=tmp_path) as (process, log):
        assert process.wait(timeout=500) == 0, log.read_text()
    text = log.read_text()
    assert "3 models merged" in text
    assert "by 2 workers" in text
    assert "all digests match" in text
    assert "the winner of 8 candidates" in text
    assert marked(f"MARK={tmp_path}") == []
    assert of_ray() == before


@pytest.mark.timeout(600)
def test_a_cluster_on_this_machine_ends_with_a_job_that_fails(family: MakeFamily, tmp_path: Path) -> None:
    folder, before = job_folder(family(), tmp_path), of_ray()
    wrong = ["pcb-ray merge recipe.yaml out", f"touch {tmp_path}/second"]  # OUT must be absolute in a job
    with script("local.sh", folder, *wrong, log=tmp_path / "log", MARK=tmp_path) as (process, log):
        assert process.wait(timeout=500) == 1
    assert "give an absolute path" in log.read_text()
    assert "wanted a job that succeeds, found it failed: pcb-ray merge recipe.yaml out" in log.read_text()
    assert not (tmp_path / "second").exists()
    assert marked(f"MARK={tmp_path}") == []
    assert of_ray() == before


@pytest.mark.timeout(600)
def test_ctrl_c_stops_the_job_and_the_cluster_and_the_merge_can_go_on(family: MakeFamily, tmp_path: Path) -> None:
    made, before, out = family(scale=300), of_ray(), tmp_path / "out"
    folder = job_folder(made, tmp_path)
    with script("local.sh", folder, f"pcb-ray merge recipe.yaml {out}", log=tmp_path / "log", MARK=tmp_path) as (process, log):
        await_that("the merge begins", lambda: state_of(out).exists() or process.poll() is not None, timeout_s=300)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        assert process.wait(timeout=DEADLINE_S) == 130, log.read_text()
    assert "stopping the job" in log.read_text()
    assert marked(f"MARK={tmp_path}") == []
    assert of_ray() == before
    assert not out.exists()
    assert pcb_ray("merge", folder / "recipe.yaml", out, "--resume").process.returncode == 0


# --- Slurm ----------------------------------------------------------------------------------------------------------------------

HOSTS = {"10.231.77.1": "pcbtest1", "10.231.77.2": "pcbtest2"}
"""Addresses, and network namespaces, of two machines that exist for a test only."""


@pytest.fixture
def two_hosts(tmp_path: Path) -> Iterator[Path]:
    """A folder with an `srun` that starts its command on both: each has its own network and processes, and its own /tmp for Ray, so
    that `ray stop` ends what runs there and nothing else."""
    if os.geteuid() != 0:
        pytest.skip("needs namespaces of its own: root only")
    first, second = HOSTS.values()
    try:
        for name in HOSTS.values():
            ip("netns", "add", name)
        ip("link", "add", "eth0", "netns", first, "type", "veth", "peer", "name", "eth0", "netns", second)
        for address, name in HOSTS.items():
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "address", "add", f"{address}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
        folder = tmp_path / "bin"
        folder.mkdir()
        host = 'mkdir -p $RAY_TMPDIR && mount -t tmpfs none $RAY_TMPDIR && exec "$@"'
        isolated = f"unshare --mount --pid --fork --kill-child --mount-proc bash -c '{host}' host"
        executable(
            folder / "srun",
            'while [[ "$1" == --* ]]; do shift; done\n'
            f'ip netns exec {second} {isolated} "$@" & other=$!\n'
            f'ip netns exec {first} {isolated} "$@"; code=$?\n'
            'wait $other; echo "the other node: $?"; exit $code',
        )
        executable(folder / "scontrol", "exit 1")
        yield folder
    finally:
        for name in HOSTS.values():
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)
        with contextlib.suppress(FileNotFoundError):
            tmp_of_ray().rmdir()  # empty here: each host saw a disk of its own in its place


def tmp_of_ray() -> Path:
    """Where each host has a disk of its own: a short path, since Ray's sockets lie below it."""
    return Path(f"/tmp/pcbs{os.getpid()}")


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


def slurm_variables(folder: Path, tmp_path: Path, cpus: str = "1") -> dict[str, object]:
    made = {"HEAD_IP": next(iter(HOSTS)), "SLURM_JOB_ID": 4711, "SLURM_JOB_NUM_NODES": 2, "SLURM_CPUS_ON_NODE": cpus}
    path = f"{folder}:{ENVIRONMENT['PATH']}"
    return {**made, "PATH": path, "RAY_TMPDIR": tmp_of_ray(), "log": tmp_path / "log", "MARK": tmp_path}


@pytest.mark.timeout(600)
def test_two_nodes_of_slurm_merge_to_the_same_bytes_and_a_second_run_goes_on(
    two_hosts: Path, family: MakeFamily, tmp_path: Path
) -> None:
    made, out = family(scale=100), tmp_path / "out"
    recipe = made.recipe_file(parameters={"density": 0.2})
    with script("slurm.sh", recipe, out, **slurm_variables(two_hosts, tmp_path)) as (process, log):
        assert process.wait(timeout=500) == 0, log.read_text()
    assert receipt_of(out)["workers"] == 2
    assert "the other node: 0" in log.read_text()
    assert marked(f"MARK={tmp_path}") == []
    assert pcb_ray("merge", recipe, tmp_path / "local").process.returncode == 0
    assert digests(out) == digests(tmp_path / "local")


@pytest.mark.timeout(600)
def test_a_ray_that_does_not_start_is_a_failure_though_symmetric_run_ends_with_0(
    two_hosts: Path, family: MakeFamily, tmp_path: Path
) -> None:
    recipe = family().recipe_file()
    variables = slurm_variables(two_hosts, tmp_path, cpus="none") | {"RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT": 10}
    with script("slurm.sh", recipe, tmp_path / "out", **variables) as (process, log):
        assert process.wait(timeout=500) == 1, log.read_text()
    assert "never started or never ended (srun ended with 0)" in log.read_text()
    assert "'none' is not a valid integer" in log.read_text()


# --- the image ------------------------------------------------------------------------------------------------------------------


@pytest.mark.timeout(1800)
def test_what_the_image_installs_submits_jobs_merges_and_has_the_fast_kernel(family: MakeFamily, tmp_path: Path) -> None:
    source = copied_to(tmp_path / "src", (CLUSTER / "Dockerfile.dockerignore").read_text().splitlines())
    environment = {key: value for key, value in ENVIRONMENT.items() if key != "PYTHONPATH"} | {"PYTHON": sys.executable}
    where = tmp_path / "venv"
    install = ["bash", str(source / "cluster" / "install.sh"), str(where), "cuda"]  # of the package index, whatever build it has
    subprocess.run(install, env=environment, check=True, timeout=1500, cwd=tmp_path)
    environment["PATH"] = f"{where / 'bin'}:{os.environ['PATH']}"

    def told(*command: object) -> str:
        run = subprocess.run([str(c) for c in command], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert run.returncode == 0, run.stderr
        return run.stdout

    told("python", "-c", "import ray.dashboard.optional_deps, ray.tune, nevergrad")  # without them no jobs, and no searches
    assert "--working-dir" in told("ray", "job", "submit", "--help")
    assert str(where) in told("python", "-c", "import pcb_ray.kernels._native as n; print(n.__file__)")
    out = tmp_path / "out"
    told("pcb-ray", "merge", family().recipe_file(), out)
    assert receipt_of(out)["workers"] >= 1
    wanted = dict(
        line.split("==") for line in (CLUSTER / "constraints.txt").read_text().splitlines() if "==" in line and line[0] != "#"
    )
    found = dict(line.split("==") for line in told("python", "-m", "pip", "freeze").splitlines() if "==" in line)
    found.pop("pip", None)
    assert {name: version.partition("+")[0] for name, version in found.items()}.items() <= wanted.items(), "all versions are pinned"
    told("python", "-m", "pip", "check")


def copied_to(folder: Path, rules: Sequence[str]) -> Path:
    """What a build would get of this repository."""
    folder.mkdir()
    for name in (rule[1:] for rule in rules if rule.startswith("!")):
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
        else:
            shutil.copy(path, folder / name)
    return folder
