"""What a merge would take on a cluster that isn't here: the arithmetic against numbers worked out by hand and claims that hold for
all clusters, its rates against the sweeps of real merges."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from families import CONFIG, MakeFamily, merge_locally
from hypothesis import given, settings
from hypothesis import strategies as st

from pcb_ray import RequestError
from pcb_ray.cli import main
from pcb_ray.estimate import SHARE_OF_WORKERS, Cluster, Estimate, estimate, sweeps_of
from pcb_ray.files.safetensors import safetensors_header
from pcb_ray.methods import METHODS
from pcb_ray.planning import Plan, Sizes, open_inputs, plan, plan_of
from pcb_ray.rates import measured_rates
from pcb_ray.recipe import Recipe

GB, TB = 10**9, 10**12
RATES = {"sample of |tau|": 2e6, "ranks of |tau|": 5e7, "sample of beta": 2e6, "ranks of beta": 2e7, "write": 3e7}
WORKER = 1 * GB


# --- ten models of 70 B, of which only the headers take room --------------------------------------------------------------------


def of_llama(hidden: int, inner: int, layers: int, vocabulary: int, keys: int) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    yield "model.embed_tokens.weight", "BF16", (vocabulary, hidden)
    for k in range(layers):
        for name, shape in (
            ("input_layernorm", (hidden,)),
            ("mlp.down_proj", (hidden, inner)),
            ("mlp.gate_proj", (inner, hidden)),
            ("mlp.up_proj", (inner, hidden)),
            ("post_attention_layernorm", (hidden,)),
            ("self_attn.k_proj", (keys, hidden)),
            ("self_attn.o_proj", (hidden, hidden)),
            ("self_attn.q_proj", (hidden, hidden)),
            ("self_attn.v_proj", (keys, hidden)),
        ):
            yield f"model.layers.{k}.{name}.weight", "BF16", shape
    yield "model.norm.weight", "BF16", (hidden,)
    yield "lm_head.weight", "BF16", (vocabulary, hidden)


def write_sparse(folder: Path, entries: list[tuple[str, str, tuple[int, ...]]], files: int) -> None:
    """A checkpoint whose data are a hole in each file."""
    folder.mkdir(parents=True)
    weight_map = {}
    for k in range(files):
        part = [entry for at, entry in enumerate(entries) if at * files // len(entries) == k]
        name, header = f"model-{k + 1:05d}-of-{files:05d}.safetensors", safetensors_header(part, {"format": "pt"})
        with (folder / name).open("wb") as file:
            file.write(header)
            file.truncate(len(header) + sum(2 * math.prod(shape) for _, _, shape in part))
        weight_map |= {tensor: name for tensor, _, _ in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(CONFIG))


@pytest.fixture(scope="module")
def recipe_70b(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("70b")
    entries = list(of_llama(8192, 28672, 80, 128256, 1024))
    for name in ("base", *(f"model{k}" for k in range(10))):
        write_sparse(folder / name, entries, 30)
    models = [{"model": str(folder / f"model{k}")} for k in range(10)]
    return {"merge_method": "pcb", "base_model": str(folder / "base"), "models": models, "allow_unrelated": True}


@pytest.fixture(scope="module")
def local(recipe_70b: dict[str, Any]) -> Plan:
    return plan(recipe_70b)


def in_stores(made: Plan) -> Plan:
    """The plan as it would be if its inputs lay in an object store."""
    tensors = tuple(
        dataclasses.replace(t, sources=tuple(s and dataclasses.replace(s, file=f"s3://models{s.file}") for s in t.sources))
        for t in made.tensors
    )
    return dataclasses.replace(made, tensors=tensors)


@pytest.fixture(scope="module")
def remote(local: Plan) -> Plan:
    return in_stores(local)


def of_70b(made: Plan, text: str) -> Estimate:
    return estimate(made, Cluster.parse(text), WORKER, RATES)


# --- numbers worked out by hand -------------------------------------------------------------------------------------------------


def test_ten_models_of_70b_on_16_nodes_are_bound_by_the_network_once(remote):
    assert remote.D == 70_553_706_496
    found = of_70b(remote, "nodes=16,cores=64,mem=1TB,net=25Gb,disk=5GB/s")
    node = 11 * 2 * 70_553_706_496 / 16  # 97.01 GB
    assert found.input_bytes == found.kept_in_memory == node
    assert found.kept_on_disk == found.fetched_again == 0
    assert (found.workers_per_node, found.workers) == (64, 1024)
    first, ranks, *_ = found.sweeps
    assert [sweep.name for sweep in found.sweeps] == list(RATES)
    assert (first.bound_by, round(first.seconds, 2)) == ("network", 31.04)  # 97.01 GB / 3.125 GB/s
    assert (ranks.bound_by, ranks.network_s, ranks.disk_s) == ("arithmetic", 0.0, 0.0)
    chunks = -(-70_553_706_496 // (1 << 22))
    assert ranks.seconds == pytest.approx(-(-chunks // 1024) * 70_553_706_496 / chunks / 5e7)  # 17 chunks
    assert [sweep.received_bytes for sweep in found.sweeps[:-1]] == [node, 0.0, 0.0, 0.0]
    assert found.seconds == sum(sweep.seconds for sweep in found.sweeps)


def test_a_file_in_a_store_has_one_writer_who_needs_what_other_nodes_keep(remote):
    one = of_70b(remote, "nodes=1,cores=64,mem=10TB,net=25Gb")
    assert one.fetched_bytes == one.input_bytes == remote.sweep_bytes  # they are all here
    assert one.sweeps[-1].sent_bytes == remote.written_bytes
    found = of_70b(remote, "nodes=15,cores=64,mem=1TB,net=25Gb")
    write, sizes = found.sweeps[-1], sorted(file.size for file in remote.files)
    assert len(sizes) == 30
    assert write.busiest_elements == pytest.approx(sizes[-1] / 2, rel=1e-4)  # bfloat16: a worker has one of 30 files
    assert 2 * sizes[14] < write.sent_bytes < 2 * sizes[-1]  # a node has two
    assert write.received_bytes == pytest.approx(11 * write.sent_bytes * 14 / 15, rel=1e-4)
    assert found.fetched_bytes == found.input_bytes + write.received_bytes


def test_what_memory_does_not_hold_goes_to_scratch_or_is_fetched_by_each_pass(remote):
    half = 11 * 2 * 70_553_706_496 / 16 / 2
    scratch = of_70b(remote, f"nodes=16,cores=64,mem={2 * half:.0f}B,net=25Gb,disk=1GB/s")
    assert (scratch.kept_in_memory, scratch.kept_on_disk, scratch.fetched_again) == (half, half, 0.0)
    assert [sweep.received_bytes for sweep in scratch.sweeps[:-1]] == [2 * half, 0.0, 0.0, 0.0]
    assert [round(sweep.disk_bytes / half, 4) for sweep in scratch.sweeps] == [1, 1, round(1 / 128, 4), 1, 1]
    assert scratch.sweeps[0].bound_by == "disk"
    without = of_70b(remote, f"nodes=16,cores=64,mem={2 * half:.0f}B,net=25Gb")
    assert (without.kept_in_memory, without.kept_on_disk, without.fetched_again) == (half, 0.0, half)
    assert [sweep.received_bytes for sweep in without.sweeps[:-1]] == [2 * half, half, half, half]
    assert len(without.sweeps) == remote.method.passes_over_inputs == 5
    assert {sweep.bound_by for sweep in without.sweeps[:-1]} == {"network"}


def test_local_paths_are_read_by_each_sweep_from_the_disk_or_else_over_the_network(local):
    node = local.sweep_bytes / 16
    disk = of_70b(local, "nodes=16,cores=64,mem=1TB,net=25Gb,disk=5GB/s")
    assert [sweep.disk_bytes for sweep in disk.sweeps] == [
        *(node / 128, node, node / 128, node),
        node + local.written_bytes / 16,
    ]
    assert not any(sweep.received_bytes or sweep.sent_bytes for sweep in disk.sweeps)
    assert disk.remote_bytes == disk.fetched_bytes == disk.kept_in_memory == 0
    network = of_70b(local, "nodes=16,cores=64,mem=1TB,net=25Gb")
    assert [sweep.received_bytes for sweep in network.sweeps] == [node / 128, node, node / 128, node, node]
    assert network.sweeps[-1].sent_bytes == local.written_bytes / 16


def test_memory_bounds_the_workers_and_a_node_without_room_for_one_is_refused_with_the_least_that_would_do(local):
    assert of_70b(local, "nodes=2,cores=64,mem=10GB,net=25Gb").workers_per_node == int(10 * SHARE_OF_WORKERS)
    with pytest.raises(RequestError, match=r"--cluster: mem: wanted at least 1,428,571,429 bytes.*found 1,000,000,000") as caught:
        of_70b(local, "nodes=2,cores=64,mem=1GB,net=25Gb")
    least = str(caught.value).partition("at least ")[2].split()[0].replace(",", "")
    assert of_70b(local, f"nodes=2,cores=64,mem={least}B,net=25Gb").workers == 2


# --- what holds for all clusters --------------------------------------------------------------------------------------------------

CLUSTERS = st.builds(
    Cluster,
    nodes=st.integers(1, 2000),
    cores=st.integers(1, 256),
    memory_bytes=st.integers(2 * GB, 4 * TB),
    network=st.floats(1e7, 1e11),
    disk=st.none() | st.floats(1e7, 1e11),
)


@pytest.fixture(scope="module")
def both(local: Plan, remote: Plan) -> tuple[Plan, Plan]:
    return local, remote


def sums(values: Iterator[float] | list[float]) -> Any:
    return pytest.approx(sum(values), rel=1e-9, abs=1e-3)


@given(on=CLUSTERS)
@settings(max_examples=30, deadline=None)
def test_twice_the_nodes_are_never_slower_and_halve_what_network_or_disk_bound(both, on):
    for made in both:
        one, two = (estimate(made, dataclasses.replace(on, nodes=nodes), WORKER, RATES) for nodes in (on.nodes, 2 * on.nodes))
        # The write to a store is apart: a file has one writer, and with more nodes more of its inputs lie elsewhere.
        count = len(one.sweeps) - (one.remote_bytes > 0)
        for before, after in list(zip(one.sweeps, two.sweeps, strict=True))[:count]:
            assert after.seconds <= before.seconds
            assert after.network_s <= before.network_s / 2 * (1 + 1e-9)
            assert after.disk_s <= before.disk_s / 2 * (1 + 1e-9)
        assert two.sweeps[-1].arithmetic_s <= one.sweeps[-1].arithmetic_s


@given(on=CLUSTERS, times=st.floats(1, 10))
@settings(max_examples=30, deadline=None)
def test_more_of_anything_is_never_slower(both, on, times):
    for made in both:
        before = estimate(made, on, WORKER, RATES).seconds
        for more in (
            {"cores": int(on.cores * times)},
            {"network": on.network * times},
            {"disk": on.disk and on.disk * times},
        ):
            assert estimate(made, dataclasses.replace(on, **more), WORKER, RATES).seconds <= before
        # More memory keeps more of what would else be fetched again, or come from the disk.
        larger = estimate(made, dataclasses.replace(on, memory_bytes=int(on.memory_bytes * times)), WORKER, RATES)
        assert larger.seconds <= before * (1 + 1e-9)


@given(on=CLUSTERS)
@settings(max_examples=30, deadline=None)
def test_the_bytes_of_all_nodes_are_those_of_the_plan_and_each_has_one_place(both, on):
    for made in both:
        found = estimate(made, on, WORKER, RATES)
        assert found.input_bytes * on.nodes == pytest.approx(made.sweep_bytes)
        assert found.written_bytes * on.nodes == pytest.approx(made.written_bytes)
        assert found.remote_bytes == sums([found.kept_in_memory, found.kept_on_disk, found.fetched_again])
        analysis = found.remote_bytes + (len(found.sweeps) - 2) * found.fetched_again
        if found.remote_bytes:
            assert found.fetched_bytes == sums([sweep.received_bytes for sweep in found.sweeps])
            assert found.fetched_bytes == sums([analysis, found.sweeps[-1].received_bytes])
            assert found.sweeps[-1].received_bytes <= made.sweep_bytes
        else:
            assert found.fetched_bytes == 0
        assert found.workers <= min(on.nodes * on.cores, made.chunks)
        for sweep in found.sweeps:
            times = {"network": sweep.network_s, "disk": sweep.disk_s, "arithmetic": sweep.arithmetic_s}
            assert sweep.seconds == times[sweep.bound_by] == max(times.values())


# --- how a cluster is written -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("nodes=16,cores=64,mem=1TB,net=25Gb,disk=5GB/s", Cluster(16, 64, TB, 25e9 / 8, 5 * GB)),
        (" net = 100 Gbit/s , mem=512GiB, nodes=1, cores=2 ", Cluster(1, 2, 512 << 30, 12.5e9)),
        ("nodes=1,cores=1,mem=1.5GB,net=2.5Gbps,disk=300MB", Cluster(1, 1, 1_500_000_000, 312.5e6, 300_000_000)),
    ],
)
def test_a_cluster_is_read_as_it_was_meant(text, wanted):
    assert Cluster.parse(text) == wanted


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("nodes=2,cores=2,mem=1TB", "keys: wanted net too"),
        ("nodes=2", "keys: wanted cores, mem, net too"),
        ("nodes=2,core=2,mem=1TB,net=1Gb", "found 'core=2'. Fix: write `cores`"),
        (
            "nodes=2,cores=2,mem=1TB,net=25GB",
            "net: wanted bits per second, of each node, found '25GB'. Fix: write one such as net=25Gb",
        ),
        ("nodes=2,cores=2,mem=1TB,net=1Gb,disk=5Gb/s", "disk: wanted bytes per second, of each node, found '5Gb/s'"),
        ("nodes=2.5,cores=2,mem=1TB,net=1Gb", "nodes: wanted a whole number of at least 1, found '2.5'"),
        ("nodes=0,cores=2,mem=1TB,net=1Gb", "nodes: wanted a whole number of at least 1, found '0'"),
        ("nodes=²,cores=2,mem=1TB,net=1Gb", "nodes: wanted a whole number of at least 1"),
        ("nodes=2,cores=2,mem=lots,net=1Gb", "mem: wanted the memory of each node, found 'lots'"),
        ("nodes=2,cores=2,mem=1TB,net=1Gb,nodes=3", "nodes: wanted one value, found two"),
        ("", "Fix: write it as in nodes=16"),
        ("16x64", "Fix: write it as in nodes=16"),
    ],
)
def test_what_is_no_cluster_is_refused_in_words(text, told):
    with pytest.raises(RequestError) as caught:
        Cluster.parse(text)
    (problem,) = caught.value.problems
    assert told in problem
    assert "Fix: " in problem


def test_all_that_is_wrong_with_a_cluster_is_told_at_once(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["plan", "recipe.yaml", "--cluster", "nodes=0,core=64,mem=1TB,net=25GB"])
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert all(f"{key}" in told for key in ("argument --cluster", "nodes: wanted", "write `cores`", "net: wanted"))


# --- rates ------------------------------------------------------------------------------------------------------------------------


def swept(made: Plan, out: Path) -> list[tuple[str, float]]:
    """The sweeps of a merge, and the share of the inputs that each read."""
    return [(sweep.name, sweep.bytes / made.sweep_bytes) for sweep in merge_locally(made, out).session.sweeps]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.full_name)
def test_the_sweeps_are_those_of_a_merge(family: MakeFamily, tmp_path, method):
    one = family(2, scale=16)
    changes = {"merge_method": method.name} | ({"parameters": {"variant": method.variant}} if method.variant else {})
    recipe = Recipe.from_dict(one.recipe(**changes))
    sizes = Sizes(1 << 16, sample_run=64, sample_stride=1024, tally_entries=1 << 14)
    made = plan_of(recipe, open_inputs(recipe), sizes=sizes)
    found = dict(swept(made, tmp_path / "out"))
    assert list(found) == [name for name, _ in sweeps_of(made)]
    for name, share in sweeps_of(made):
        assert found[name] == pytest.approx(share, rel=1e-3), name


def rates_of(family: MakeFamily, **changes: Any) -> tuple[Plan, Mapping[str, float]]:
    made = plan(family(2).recipe(**changes))
    return made, measured_rates(made, 1 << 16)


@pytest.mark.very_slow
def test_rates_are_measured_for_the_sweeps_of_a_large_model(family: MakeFamily):
    made, rates = rates_of(family)
    large = dataclasses.replace(made, D=10**9)
    assert list(rates) == [name for name, _ in sweeps_of(large)]
    assert all(rate > 0 for rate in rates.values())
    assert rates["sample of |tau|"] < rates["ranks of |tau|"]  # runs here and there


@pytest.mark.very_slow
@pytest.mark.parametrize("method", METHODS[1:], ids=lambda method: method.full_name)
def test_rates_of_all_methods_are_measured(family: MakeFamily, method):
    variant = {"parameters": {"variant": method.variant}} if method.variant else {}
    made, rates = rates_of(family, merge_method=method.name, **variant)
    assert set(rates) >= {name for name, _ in sweeps_of(made)}
    assert all(rate > 0 for rate in rates.values())


@pytest.mark.very_slow
def test_rates_of_a_method_of_ones_own_that_sees_whole_tensors_are_measured(family: MakeFamily, tmp_path):
    text = 'mean = Method("mean", lambda block, known, settings: block.theta + block.tau.mean(0), unit="tensor")'
    (tmp_path / "mine.py").write_text(f"from pcb_ray.methods import Method\n{text}\n")
    made, rates = rates_of(family, merge_method=f"{tmp_path / 'mine.py'}:mean", dtype="float16", exclude=["*norm*"])
    assert list(rates) == [name for name, _ in sweeps_of(made)] == ["write"]


# --- the command ------------------------------------------------------------------------------------------------------------------


def test_plan_shows_the_arithmetic_for_a_cluster_and_has_no_torch(recipe_70b, tmp_path):
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe_70b))
    command = ["plan", str(tmp_path / "recipe.yaml"), "--cluster", "nodes=16,cores=64,mem=1TB,net=25Gb,disk=5GB/s"]
    code = f"import sys; from pcb_ray.cli import main; code = main({command}); assert 'torch' not in sys.modules; sys.exit(code)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    for words in (
        "cluster    16 nodes, each of 64 cores, 1 TB of memory, 3.12 GB/s of network, 5 GB/s of disk",
        "inputs     1.55 TB / 16 nodes = 97 GB on each",
        "writes     141 GB / 16 nodes = 8.82 GB on each",
        "disk 97 GB / 5 GB/s = 19.4 s",
        "1,024 in all, for 16,822 chunks",
    ):
        assert words in ended.stdout, ended.stdout


@pytest.mark.very_slow
def test_the_json_of_a_plan_has_the_numbers_for_a_cluster(family: MakeFamily, tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text(json.dumps(family(2).recipe()))
    assert main(["plan", str(tmp_path / "recipe.yaml"), "--json", "--cluster", "nodes=2,cores=4,mem=8GB,net=10Gb"]) == 0
    told = json.loads(capsys.readouterr().out)["cluster"]
    assert told["cluster"] == {"nodes": 2, "cores": 4, "memory_bytes": 8 * GB, "network": 1.25e9, "disk": None}
    assert told["seconds"] == pytest.approx(sum(sweep["seconds"] for sweep in told["sweeps"]))
    assert [sweep["name"] for sweep in told["sweeps"]] == ["ranks of |tau|", "ranks of beta", "write"]
    assert {sweep["bound_by"] for sweep in told["sweeps"]} <= {"network", "disk", "arithmetic"}
