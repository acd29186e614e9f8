"""Which nodes may work, and how many workers they hold."""

from __future__ import annotations

import pytest

from pcb_ray import RequestError, merge, nodes
from pcb_ray.cli import parser
from pcb_ray.nodes import Needs, Node, Pool, choose_device, choose_workers

GB = 10**9
NODES = [
    Node("a", {"CPU": 4, "memory": 3 * GB}, {"zone": "eu", "market": "spot"}),
    Node("b", {"CPU": 2, "memory": 9 * GB, "disk": 1.5}, {"zone": "us"}),
    Node("c", {"CPU": 1, "GPU": 2, "memory": 9 * GB, "disk": 0.3}, {}),
]


@pytest.mark.parametrize(
    ("selector", "admitted"),
    [("eu", "a"), ("!eu", "bc"), ("in(eu,us)", "ab"), ("!in(eu,us)", "c"), ("asia", ""), ("in(us)", "b")],
)
def test_labels_select_as_in_ray(selector: str, admitted: str) -> None:
    pool = Pool({"zone": selector})
    assert [node.id for node in NODES if pool.admits(node)] == list(admitted)


@pytest.mark.parametrize(
    ("needs", "places"),
    [
        (Needs("cpu", GB), 3 + 2 + 1),
        (Needs("cpu", 2 * GB), 1 + 2 + 1),
        (Needs("cuda", GB), 2),
        (Needs("cpu", GB, Pool(resources={"disk": 0.1})), 2 + 1),
        (Needs("cpu", GB, Pool(resources={"disk": 1})), 1),
        (Needs("cuda", GB, Pool(resources={"disk": 0.1})), 2),
        (Needs("cpu", GB, Pool({"zone": "!us"})), 3 + 1),
        (Needs("cpu", 10 * GB), 0),
    ],
)
def test_a_node_holds_as_many_workers_as_what_it_has_least_of(needs: Needs, places: int) -> None:
    assert needs.places(NODES) == places


def test_what_no_node_has_is_told_at_once_and_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes, "nodes", lambda: NODES)
    monkeypatch.setattr(nodes, "autoscales", lambda: False)
    for needs, told in (
        (Needs("cpu", GB, Pool({"zone": "asia"})), r"--label zone=asia: wanted a node with this, found zone: eu, us\. Fix:"),
        (Needs("cpu", GB, Pool({"rack": "1"})), r"--label rack=1: wanted a node with this, found rack: on no node\. Fix:"),
        (
            Needs("cpu", GB, Pool(resources={"disk": 2})),
            r"--resource disk=2: wanted a node with so much of it, found at most 1\.5\. ",
        ),
        (Needs("cpu", 10 * GB), r"room for a worker of 10\.00 GB and one CPU, found 4 CPUs, 0 GPUs and 3\.00 GB; 2 CPUs.* Fix:"),
    ):
        with pytest.raises(RequestError, match=told):
            choose_workers(None, needs, 100)
    with pytest.raises(RequestError, match=r"--workers: wanted 7, .*7 CPUs and memory for 6 workers .* Fix: ask for at most 6"):
        choose_workers(7, Needs("cpu", GB), 100)
    assert choose_workers(None, Needs("cpu", GB), 100) == 6
    assert choose_device("auto", Pool({"zone": "eu"})) == "cpu"
    assert choose_device("auto", Pool()) == "cuda"


@pytest.mark.parametrize(
    ("labels", "resources"),
    [
        ({"zone": ""}, {}),
        ({"zone": "in()"}, {}),
        ({"zone": "a b"}, {}),
        ({"": "eu"}, {}),
        ({}, {"CPU": 1.0}),
        ({}, {"memory": 1.0}),
        ({}, {"disk": 1.5}),
        ({}, {"disk": 0.0}),
        ({}, {"disk": float("nan")}),
    ],
)
def test_what_can_be_no_label_or_resource_is_refused(labels: dict[str, str], resources: dict[str, float]) -> None:
    with pytest.raises(RequestError, match="wanted .* found .*Fix:"):
        merge({}, "nowhere", labels=labels, resources=resources)


def test_labels_and_resources_are_given_to_a_command_one_by_one(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["merge", "r", "o", "--label", "zone=eu", "--label", "ray.io/market-type=!spot", "--resource", "disk=0.5"]
    options = parser().parse_args(words)
    assert options.labels == {"zone": "eu", "ray.io/market-type": "!spot"}
    assert options.resources == {"disk": 0.5}
    for wrong in (["--label", "zone"], ["--label", "zone=us"], ["--resource", "disk=1"], ["--resource", "x=much"]):
        with pytest.raises(SystemExit):
            parser().parse_args([*words, *wrong])
        assert "each once" in capsys.readouterr().err
