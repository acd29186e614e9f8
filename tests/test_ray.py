"""Merging on Ray: the same bytes however it is done, within the announced memory, on one node or on several."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import families
import oracle
import psutil
import pytest
import torch
from clusters import (
    DEADLINE_S,
    await_end,
    await_that,
    descendants,
    digests,
    flip,
    owners_under,
    pcb_ray,
    ray_address,
    receipt_of,
    running,
    state_of,
)
from families import Family
from hub_server import HubServer, Model, commit_of

import pcb_ray as package
from pcb_ray.budget import MIN_BLOCK, choose_block, worker_bytes
from pcb_ray.files.store import LocalStore
from pcb_ray.local import LocalOwners
from pcb_ray.methods import METHODS as RECORDS
from pcb_ray.nodes import Needs
from pcb_ray.planning import plan
from pcb_ray.questions import LARGEST_KEY, CountKeys
from pcb_ray.recipe import Recipe
from pcb_ray.runtime import RayOwners
from pcb_ray.selection import Bracket

# Ray closes its own sockets and log files late.
pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore::ResourceWarning")]

METHODS = tuple(record.full_name for record in RECORDS)


@pytest.fixture(scope="module", autouse=True)
def shared_ray() -> str:
    """Ray is running in this process: `merge` uses it."""
    return ray_address()


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """1.5 M elements in 24 chunks: enough for a sample to save sweeps."""
    return Family(tmp_path_factory.mktemp("ray") / "family", *families.fine_tuned(3, scale=75))


def recipe_of(family: Family, name: str = "pcb-pairwise") -> dict[str, Any]:
    method, _, variant = name.partition("-")
    recipe = family.recipe(
        merge_method=method, parameters={"density": 0.2, "lambda": 0.8} | ({"variant": variant} if variant else {})
    )
    if method == "linear":
        del recipe["base_model"], recipe["parameters"]
    elif method == "task_arithmetic":
        del recipe["parameters"]["density"]
    return recipe


def in_memory(family: Family, name: str = "pcb-pairwise") -> dict[str, torch.Tensor]:
    method, _, variant = name.partition("-")
    return package.merge_state_dicts(
        family.base,
        family.models,
        method=method,
        variant=variant or "pairwise",
        density=0.2,
        lambda_=1.0 if method == "linear" else 0.8,
    )


def assert_same_tensors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name


class Peak:
    """The most anonymous memory that any owner takes meanwhile, seen from outside."""

    def __enter__(self) -> Peak:
        self.bytes, self._done = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.02):
            for owner in owners_under(os.getpid()):
                try:
                    status = Path(f"/proc/{owner.pid}/status").read_text()
                except OSError:
                    continue
                kib = [int(k) for k in re.findall(r"^Rss(?:Anon|Shmem):\s+(\d+) kB", status, flags=re.MULTILINE)]
                self.bytes = max(self.bytes, 1024 * sum(kib))

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


# --- the bytes ------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def merged(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The merge that others are held against: one worker, two files."""
    out = tmp_path_factory.mktemp("merged") / "out"
    package.merge(recipe_of(family), out, workers=1, max_shard_bytes=2_000_000, quiet=True)
    return out


def test_bytes_do_not_depend_on_the_number_of_workers_or_their_memory(family: Family, merged: Path, tmp_path: Path) -> None:
    import ray

    made = plan(Recipe.from_dict(recipe_of(family), tmp_path), max_shard_bytes=2_000_000)
    least = worker_bytes(made, MIN_BLOCK)
    assert choose_block(made, "cpu", least) < choose_block(made, "cpu", None)
    expected, first = digests(merged), receipt_of(merged)
    for workers, memory in ((2, None), (4, least), (3, 700_000_000)):
        out = tmp_path / f"out{workers}"
        with Peak() as peak:
            receipt = package.merge(recipe_of(family), out, workers=workers, memory=memory, max_shard_bytes=2_000_000, quiet=True)
        assert digests(out) == expected
        for key in ("thresholds", "inputs", "outputs", "output_digest", "D", "sizes"):
            assert json.loads(receipt.to_json())[key] == first[key]
        assert receipt.workers == workers
        assert receipt.workers_lost == 0
        assert 50_000_000 < peak.bytes <= receipt.announced_worker_bytes
        assert receipt.peak_worker_bytes <= receipt.announced_worker_bytes <= (memory or 800_000_000)
    assert ray.is_initialized()
    await_end(owners_under(os.getpid()))


def test_a_merge_reads_its_inputs_three_times_and_a_sixteenth(family: Family, merged: Path) -> None:
    receipt = receipt_of(merged)
    inputs = sum(t.nbytes for state in (family.base, *family.models) for t in state.values())
    sweeps = {s["name"]: s["bytes"] for s in receipt["sweeps"]}
    assert receipt["full_sweeps"] == 3
    assert {name: size for name, size in sweeps.items() if "sample" not in name} == dict.fromkeys(
        ("ranks of |tau|", "ranks of beta", "write"), inputs
    )
    assert 0 < sweeps["sample of |tau|"] == sweeps["sample of beta"] <= inputs / 16
    assert receipt["bytes_read"] == pytest.approx(sum(sweeps.values()), rel=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in ("pcb-pairwise", "ties", "linear") else pytest.mark.very_slow) for n in METHODS]
)
def test_ray_merges_as_in_memory_and_as_the_oracle_says(family: Family, name: str, tmp_path: Path, merged: Path) -> None:
    out = merged
    if name != "pcb-pairwise":
        out = tmp_path / "out"
        package.merge(recipe_of(family, name), out, workers=2, quiet=True)
    found = families.load(out)
    assert_same_tensors(found, in_memory(family, name))
    method, _, variant = name.partition("-")
    lambda_ = 1.0 if method == "linear" else 0.8
    expected = oracle.merge_state_dicts(
        family.base, family.models, method, variant=variant or "pairwise", density=0.2, lambda_=lambda_
    )
    # Apart from roundings, next to a threshold or of the output (test_merge_in_memory has the exact bounds).
    differ = {n: (found[n].float() - t.float()).abs() > 2**-7 * t.float().abs() + 1e-6 for n, t in expected.items()}
    assert sum(int(d.sum()) for d in differ.values()) <= 1e-5 * sum(d.numel() for d in differ.values())
    assert package.verify(out, quiet=True).ok


@pytest.mark.very_slow
@pytest.mark.slow
def test_a_local_ray_with_the_native_kernel_makes_the_same_bytes(family: Family, merged: Path, tmp_path: Path) -> None:
    if importlib.util.find_spec("pcb_ray.kernels._native") is None:
        pytest.skip("the native kernel was not built: no C compiler at installation")
    recipe = family.folder / "local.yaml"
    recipe.write_text(json.dumps(recipe_of(family)))
    run = pcb_ray("merge", recipe, tmp_path / "out", "--max-shard-size", "2MB", "--memory", "700MB")
    assert run.process.returncode == 0, run.text
    assert digests(tmp_path / "out") == digests(merged)
    assert receipt_of(tmp_path / "out")["kernels"] == ["native on cpu"]
    assert receipt_of(merged)["kernels"] == ["torch on cpu"]


# --- what is wrong --------------------------------------------------------------------------------------------------------------


def test_a_number_that_is_not_finite_is_refused_by_name_and_leaves_nothing(tmp_path: Path) -> None:
    base, models = families.fine_tuned(2, scale=10)
    name = "model.layers.1.mlp.up_proj.weight"
    models[1][name][3, 5] = float("nan")
    family = Family(tmp_path / "family", base, models)
    with pytest.raises(package.RequestError) as caught:
        package.merge(family.recipe(), tmp_path / "out", workers=1, quiet=True)
    assert "model1" in str(caught.value)
    assert name in str(caught.value)
    assert "[3, 5]" in str(caught.value)
    assert {p.name for p in tmp_path.iterdir()} == {"family"}


@pytest.fixture
def copy(merged: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(merged, tmp_path / "copy"))


def test_verify_notices_a_changed_bit_anywhere(copy: Path) -> None:
    assert package.verify(copy, quiet=True).ok
    files = sorted(copy.glob("*.safetensors"))
    assert len(files) == 2
    header = 8 + int.from_bytes(files[0].read_bytes()[:8], "little")
    places = [(files[0], header), (files[1], files[1].stat().st_size - 1), (files[0], 20), (files[0], header - 1), (files[1], 0)]
    places += [(copy / name, 10) for name in ("config.json", "pcb_recipe.yaml", "model.safetensors.index.json", "README.md")]
    for path, at in places:
        flip(path, at)
        assert not package.verify(copy, quiet=True).ok, f"bit of byte {at} of {path.name}"
        flip(path, at)
    files[1].rename(copy / "elsewhere")
    assert any("found no file" in problem for problem in package.verify(copy, quiet=True).problems)
    (copy / "elsewhere").rename(files[1])
    assert package.verify(copy, quiet=True).ok


def test_verify_notices_an_output_that_its_inputs_do_not_give(family: Family, copy: Path) -> None:
    path = family.folder / "model2" / "model.safetensors"
    was = path.read_bytes()
    try:
        families.write(path.parent, {n: t + t for n, t in family.models[2].items()})
        assert any("wanted what its inputs give" in problem for problem in package.verify(copy, quiet=True).problems)
        families.write(path.parent, {n: t.float() for n, t in family.models[2].items()})
        assert any("wanted the files that were merged" in problem for problem in package.verify(copy, quiet=True).problems)
    finally:
        path.write_bytes(was)
    assert package.verify(copy, quiet=True).ok


# --- transformers ---------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, pytest.param(False, marks=pytest.mark.very_slow)])
def test_transformers_loads_the_output(tied: bool, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=300, tie_word_embeddings=tied
    )
    states = []
    for k in range(3):
        torch.manual_seed(k)
        model = LlamaForCausalLM(config).to(torch.bfloat16)
        if k:
            with torch.no_grad():
                for name, parameter in model.named_parameters():  # a tied one comes once
                    parameter.copy_(states[0][name].float() + 0.02 * parameter.float())
        model.save_pretrained(tmp_path / f"m{k}")
        states.append({n: p.detach().clone() for n, p in model.named_parameters()})
    recipe = {"merge_method": "pcb", "base_model": "m0", "models": [{"model": "m1"}, {"model": "m2"}]}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    package.merge(tmp_path / "recipe.yaml", tmp_path / "out", workers=1, max_shard_bytes=60_000, quiet=True)
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 2

    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.dtype == torch.bfloat16
    assert (loaded.lm_head.weight.data_ptr() == loaded.model.embed_tokens.weight.data_ptr()) == tied
    expected = package.merge_state_dicts(states[0], states[1:])
    assert_same_tensors({n: p for n, p in loaded.state_dict().items() if n in expected}, expected)
    assert package.verify(tmp_path / "out", quiet=True).ok


# --- several nodes --------------------------------------------------------------------------------------------------------------


@pytest.mark.very_slow
def test_models_of_the_hub_are_verified_at_the_commits_that_were_merged(family: Family, tmp_path: Path) -> None:
    """Also when their branch has moved since, and from another cache."""
    old, new = commit_of("old"), commit_of("new")

    def files(folder: str) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in (family.folder / folder).iterdir()}

    models = {f"org/{k}": Model({old: files(k), new: files("base")}, {"main": old}) for k in ("base", "model0", "model1")}
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "out"
    recipe.write_text(json.dumps({"base_model": "org/base", "models": [{"model": "org/model0"}, {"model": "org/model1"}]}))
    with HubServer(models) as hub:
        settings = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "*"}
        run = pcb_ray("merge", recipe, out, "--address", ray_address(), env=settings)
        assert run.process.returncode == 0, run.text
        for model in models.values():
            model.revisions["main"] = new
        run = pcb_ray("verify", out, env=settings | {"HF_HOME": str(tmp_path / "hf2")})
        assert run.process.returncode == 0, run.text
    assert [i["commit"] for i in receipt_of(out)["inputs"]] == [old] * 3
    state = package.merge_state_dicts(family.base, family.models[:2])
    assert_same_tensors(families.load(out), state)


@pytest.mark.very_slow
@pytest.mark.parametrize("method", ["linear", pytest.param("pcb-pairwise", marks=pytest.mark.very_slow)])
def test_an_input_that_no_merge_can_take_leaves_nothing_behind(tmp_path: Path, method: str) -> None:
    """linear meets it while it writes; once it is repaired, the same command merges."""
    bad = Family(tmp_path / "family", *families.fine_tuned(2, scale=30))
    name = "model.layers.1.input_layernorm.weight"
    good = bad.models[1][name].clone()
    bad.models[1][name][3] = float("inf")
    families.write(bad.folder / "model1", bad.models[1])
    out = tmp_path / "out"
    with pytest.raises(
        package.RequestError, match=rf"model1: tensor {name}: wanted finite numbers, found inf at index \[3\] \(BF16\)"
    ):
        package.merge(recipe_of(bad, method), out, quiet=True)
    assert not out.exists()
    assert not state_of(out).exists()
    bad.models[1][name] = good
    families.write(bad.folder / "model1", bad.models[1])
    package.merge(recipe_of(bad, method), out, quiet=True)
    assert package.verify(out, quiet=True).ok


def test_the_same_command_may_simply_be_run_again(tmp_path: Path) -> None:
    """It starts, has nothing to do, and refuses or replaces another merge."""
    family, out = Family(tmp_path / "family", *families.fine_tuned(3)), tmp_path / "out"
    command = ("merge", family.recipe_file(), out, "--workers", 1, "--address", ray_address(), "--resume")
    first = pcb_ray(*command)
    assert first.process.returncode == 0, first.text
    made = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    before = digests(out)
    again = pcb_ray(*command)
    assert again.process.returncode == 0, again.text
    assert "is this very merge already" in again.text
    assert ({path: path.stat().st_mtime_ns for path in out.iterdir()}, digests(out)) == (made, before)
    family.recipe_file(dtype="float16")
    other = pcb_ray(*command)
    assert other.process.returncode == 2, other.text
    assert "is not this very merge" in other.text
    assert digests(out) == before
    replaced = pcb_ray(*command, "--overwrite")
    assert replaced.process.returncode == 0, replaced.text
    assert "float16" in (out / "pcb_recipe.yaml").read_text()


def test_a_link_to_a_folder_elsewhere_stays_a_link_when_its_folder_is_replaced(
    family: Family, merged: Path, tmp_path: Path
) -> None:
    if not os.access("/dev/shm", os.W_OK):
        pytest.skip("no second file system here")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as elsewhere:
        target, link = Path(elsewhere) / "target", tmp_path / "link"
        target.mkdir()
        (target / "old").touch()
        link.symlink_to(target)
        package.merge(recipe_of(family), link, overwrite=True, max_shard_bytes=2_000_000, quiet=True)
        assert link.is_symlink()
        assert not (target / "old").exists()
        assert digests(target) == digests(merged)
        assert [p.name for p in Path(elsewhere).iterdir()] == ["target"]


@pytest.mark.slow
def test_every_node_gets_an_owner_and_a_lost_node_changes_no_byte(
    three_nodes: Any, family: Family, merged: Path, tmp_path: Path
) -> None:
    recipe, out = family.folder / "nodes.yaml", tmp_path / "out"
    recipe.write_text(json.dumps(recipe_of(family)))
    arguments = ("merge", recipe, out, "--address", three_nodes.address, "--workers", 3, "--max-shard-size", "2MB")
    with running(*arguments) as run:
        run.wait_for("ranks of |tau|: ")
        with run.stopped():
            node_of = {p: p.ppid() for p in owners_under(os.getpid())}
            raylets = {p.pid for p in descendants(os.getpid()) if p.name() == "raylet" and p.pid in node_of.values()}
            assert len(node_of) == len(raylets) == 3
            three_nodes.remove_node(next(iter(three_nodes.worker_nodes)), allow_graceful=False)
        assert run.finish() == 0, run.text
    assert receipt_of(out)["workers_lost"] == 1
    assert digests(out) == digests(merged)
    assert not state_of(out).exists()


@pytest.mark.parametrize(
    ("level", "position"),
    [
        pytest.param(1, 0, id="who is to absorb", marks=pytest.mark.very_slow),
        pytest.param(1, 1, id="who is to give"),
        pytest.param(1, 2, id="who waits", marks=pytest.mark.very_slow),
        pytest.param(2, 0, id="who has absorbed", marks=pytest.mark.very_slow),
        pytest.param(3, 0, id="who has it all"),
    ],
)
def test_totals_lost_while_they_are_added_up_are_found_again(
    family: Family, level: int, position: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three owners hold a third each, and add up at two levels; before one of them, or before the total is fetched, one is
    killed."""
    made = plan(Recipe.from_dict(recipe_of(family)))
    question = CountKeys(0, {}, ((Bracket(0, 1 << 29), Bracket(1 << 29, 1 << 30)),) * made.N)
    owners = RayOwners(workers=3, needs=Needs("cpu", worker_bytes(made, MIN_BLOCK)))
    add_up, levels, counted = owners._add_up, list[int](), set[int]()

    def kill(number: int) -> None:
        victim = psutil.Process(owners._states[number].pid)
        victim.kill()
        await_end([victim])

    def kill_and_add_up(job: Any, holders: Any) -> int:
        levels.append(len(holders))
        if len(levels) == level < 3:
            kill(holders[position])
        failed = add_up(job, holders)
        if level == 3 and len(levels) == 2:
            kill(job.schedule.holders()[0])
        return failed

    monkeypatch.setattr(owners, "_add_up", kill_and_add_up)
    try:
        owners.use(made, MIN_BLOCK)
        owners.wait_until_ready()
        total = owners.fold(question, range(made.chunks), counted.update)
        assert levels[0] == 3
        assert owners.deaths == 1
    finally:
        owners.close()
    expected = LocalOwners(made, LocalStore()).fold(question, range(made.chunks), lambda _chunks: None)
    assert counted == set(range(made.chunks))
    assert total.largest == expected.largest
    assert total.digests == expected.digests
    for of_model, expected_of_model in zip(total.tallies, expected.tallies, strict=True):
        for tally, other in zip(of_model, expected_of_model, strict=True):
            assert tally.upto_hi > 0
            for name in ("below_lo", "upto_lo", "below_hi", "upto_hi"):
                assert getattr(tally, name) == getattr(other, name)
            for rank in range(0, tally.upto_hi, 99_991):
                assert tally.select(rank, 0, LARGEST_KEY[32]) == other.select(rank, 0, LARGEST_KEY[32])


@pytest.mark.very_slow
@pytest.mark.slow
def test_a_node_that_does_not_see_the_inputs_is_named_before_anything_is_read(
    three_nodes: Any, family: Family, tmp_path: Path
) -> None:
    """A node of its own mount namespace, where an empty folder lies over one of the models."""
    hide = f"mount -t tmpfs none {family.folder / 'model1'}"
    if subprocess.run(["unshare", "--mount", "sh", "-c", hide], capture_output=True, check=False).returncode:
        pytest.skip("no right to make a mount namespace here")

    def alive() -> int:
        return sum(node["Alive"] for node in three_nodes.global_state.node_table())

    before = alive()
    ray = Path(sys.executable).with_name("ray")
    start = f"exec {ray} start --address={three_nodes.address} --num-cpus=1 --object-store-memory=80000000 --block"
    command = ["unshare", "--mount", "sh", "-c", f"{hide} && {start}"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as node:
        try:
            await_that("the node has joined", lambda: alive() == before + 1)
            recipe, out = family.folder / "blind.yaml", tmp_path / "out"
            recipe.write_text(json.dumps(recipe_of(family)))
            run = pcb_ray("merge", recipe, out, "--address", three_nodes.address, "--workers", before + 1)
            assert run.process.returncode == 2, run.text
            wanted = rf"{family.folder}/model1/model\.safetensors: wanted a file that node \S+ can read, found: No such file"
            assert re.search(wanted, run.text), run.text
            assert "all nodes share" in run.text
            assert not out.exists()
            assert not state_of(out).exists()
        finally:
            processes = descendants(node.pid)
            node.terminate()
            await_end(processes)


LOSE_A_NODE_THAT_KEEPS_ANSWERS = """
import sys, time, psutil, ray
from pathlib import Path
from pcb_ray.budget import worker_bytes
from pcb_ray.cluster import cluster
from pcb_ray.planning import plan
from pcb_ray.questions import CountKeys
from pcb_ray.recipe import Recipe
from pcb_ray.nodes import Needs
from pcb_ray.runtime import RayOwners
from pcb_ray.selection import Bracket

made = plan(Recipe.from_file(Path(sys.argv[2])))
with cluster(sys.argv[1]):
    owners = RayOwners(workers=2, needs=Needs("cpu", worker_bytes(made, 1 << 15)))
    owners.use(made, 1 << 15)
    owners.wait_until_ready()
    everything = ((Bracket(0, (1 << 31) - 1),),) * made.N  # answers of many keys, so that they stay on the node that found them
    answers = owners.ask(CountKeys(0, {}, everything), range(made.chunks))
    total = [next(answers)[1]]
    while len(owners.states) < 2:
        total.append(next(answers)[1])
    time.sleep(3)  # the batches asked for are answered meanwhile
    (port,) = [n["NodeManagerPort"] for n in ray.nodes() if n["NodeID"] == ray.get_runtime_context().get_node_id()]
    raylets = [psutil.Process(psutil.Process(s.pid).ppid()) for s in owners.states]
    away = [p for p in raylets if port not in [c.laddr.port for c in p.net_connections() if c.status == "LISTEN"]]
    away[0].kill()
    total += [answer for _, answer in answers]
    counted = sum(tally.upto_hi for answer in total for tally in answer.tallies[0])
    print("counted", counted, "of", made.D, "lost", owners.deaths)
    owners.close()
"""


@pytest.mark.very_slow
def test_answers_lost_with_their_node_are_asked_for_again(three_nodes: Any, tmp_path: Path) -> None:
    family = Family(tmp_path / "family", *families.fine_tuned(2, scale=75, dtype=torch.float32))
    command = [sys.executable, "-c", LOSE_A_NODE_THAT_KEEPS_ANSWERS, three_nodes.address, str(family.recipe_file())]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    D = sum(t.numel() for t in family.base.values())
    assert done.returncode == 0, done.stderr
    assert f"counted {D} of {D} lost 1" in done.stdout, done.stdout + done.stderr
