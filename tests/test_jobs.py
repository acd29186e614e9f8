"""`ray job submit` of a merge to a real head node, as cluster/README.md says it."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import families
import psutil
import pyarrow.parquet
import pytest
from clusters import BIN, DEADLINE_S, Head, await_end, await_that, descendants, head_node, owners_under, receipt_of, title
from families import Family

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with head_node() as started:
        yield started


def submit(head: Head, folder: Path, *arguments: object) -> subprocess.Popen[str]:
    command = [BIN / "ray", "job", "submit", "--address", head.url, "--working-dir", folder, "--", "pcb-ray", *arguments]
    return subprocess.Popen(
        [str(c) for c in command],
        env=head.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def told(job: subprocess.Popen[str]) -> str:
    try:
        return job.communicate(timeout=DEADLINE_S)[0]
    finally:
        job.kill()


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return Family(tmp_path_factory.mktemp("job") / "family", *families.fine_tuned(3, scale=100))


def job_folder(tmp_path: Path, family: Family) -> Path:
    folder = tmp_path / "submitted"
    folder.mkdir()
    shutil.copy(family.recipe_file(parameters={"density": 0.2}), folder / "recipe.yaml")
    return folder


@pytest.mark.very_slow
def test_a_job_merges_on_the_cluster_that_it_was_submitted_to(head: Head, family: Family, tmp_path: Path) -> None:
    out = tmp_path / "out"
    job = submit(head, job_folder(tmp_path, family), "merge", "recipe.yaml", out)
    seen: dict[psutil.Process, int] = {}

    def at_work() -> bool:
        seen.update({p: p.ppid() for p in owners_under(head.process.pid)})
        return len(seen) == 2 or job.poll() is not None

    await_that("owners appear on the cluster", at_work)
    servers = [p for p in descendants(head.process.pid) if "gcs_server" in title(p)]
    text = told(job)
    assert job.returncode == 0, text
    assert "models merged" in text
    assert len(servers) == 1, "the job started a Ray of its own"
    raylets = {p.pid for p in descendants(head.process.pid) if p.name() == "raylet"}
    assert len(seen) == 2
    assert set(seen.values()) == raylets
    assert receipt_of(out)["workers"] == 2
    await_end(list(seen))

    import pcb_ray
    from pcb_ray.planning import plan
    from pcb_ray.recipe import Recipe

    local = families.merge_locally(plan(Recipe.from_dict(family.recipe(parameters={"density": 0.2}), tmp_path)), tmp_path / "local")
    assert (out / "model.safetensors").read_bytes() == local.files["model.safetensors"]
    assert pcb_ray.verify(out, quiet=True).ok
    job = submit(head, tmp_path / "submitted", "verify", out)
    text = told(job)
    assert job.returncode == 0, text
    assert "all digests match" in text


@pytest.mark.very_slow
def test_a_job_searches_and_sweeps_with_the_evaluator_that_was_submitted_with_it(
    head: Head, family: Family, tmp_path: Path
) -> None:
    folder, out = job_folder(tmp_path, family), tmp_path / "out"
    shutil.copy(Path(__file__).with_name("evaluators_of_tests.py"), folder / "near.py")
    target = family.folder / "model1" / "model.safetensors"
    with (folder / "recipe.yaml").open("a") as recipe:
        recipe.write(
            "search: "
            f"{{evaluator: {{near.py:Near: {{target: {target}}}}}, metric: near, budget: 6, population: 3, concurrency: 1}}\n"
        )
    job = submit(head, folder, "search", "recipe.yaml", out)
    text = told(job)
    assert job.returncode == 0, text
    assert "winner" in text
    assert len(pyarrow.parquet.read_table(out / "trials.parquet")) == 6
    assert receipt_of(out)["workers"] == 2
    with (folder / "recipe.yaml").open("a") as recipe:
        recipe.write("sweep: {density: [0.1, 0.3]}\n")
    job = submit(head, folder, "sweep", "recipe.yaml", tmp_path / "grid")
    text = told(job)
    assert job.returncode == 0, text
    assert len(pyarrow.parquet.read_table(tmp_path / "grid" / "sweep.parquet")) == 2


@pytest.mark.very_slow
def test_a_job_with_a_relative_output_is_refused(head: Head, family: Family, tmp_path: Path) -> None:
    start = time.monotonic()
    job = submit(head, job_folder(tmp_path, family), "merge", "recipe.yaml", "out")
    text = told(job)
    assert job.returncode == 1, text  # Ray tells of any failure so; the job's own exit code is in its message
    assert "failed with exit code 2" in text
    assert "give an absolute path" in text
    assert "Traceback" not in text
    assert time.monotonic() - start < 60
