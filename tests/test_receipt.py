"""The receipt: read as it was written, or refused with what is wrong; and published without a path of the machine that merged."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from pcb_ray import Recipe, RequestError
from pcb_ray.planning import plan
from pcb_ray.receipt import RECEIPT, VERSION, MergedFile, MergedInput, Receipt, Sweep, Verified, WrittenFile, inputs_of_receipt
from pcb_ray.relation import Relation
from pcb_ray.tied import Apart

RECEIPT_OF_TESTS = Receipt(
    version=VERSION,
    versions={"pcb_ray": "1.2.3", "python": "3.11.7"},
    arithmetic="ieee-2",
    method="pcb-pairwise",
    N=1,
    D=1000,
    thresholds={"low": (0.25,), "high": (1e-30,), "t": (float("inf"),)},
    warnings=("model0: is odd",),
    sweeps=(Sweep("ranks", 1.5, 4000),),
    full_sweeps=3,
    kernels=("native on cpu",),
    bytes_read=12_000,
    bytes_fetched=0,
    retries=0,
    bytes_written=2_000,
    workers=2,
    workers_lost=0,
    announced_worker_bytes=10**9,
    peak_worker_bytes=10**8,
    code_sha256=None,
    sizes={"chunk_elements": 64},
    max_shard_bytes=5 * 10**9,
    inputs=tuple(MergedInput(name, None, "ab", (MergedFile("model.safetensors", 10, "cd"),)) for name in ("base", "model0")),
    relation=Relation(4096, (0.01,), (0.99,), (0.5,), ((1.0,),)),
    apart=(Apart(1, "lm_head.weight", "embed.weight"),),
    tensors_sha256="89",
    outputs=(WrittenFile("model.safetensors", 10, "ef"),),
    output_digest="01",
    files_sha256={"config.json": "23", "additional_chat_templates/tool.jinja": "45"},
    resumed=False,
    startup_s=0.5,
    elapsed_s=2,
)
CONTENT: dict[str, Any] = json.loads(RECEIPT_OF_TESTS.to_json())


def test_a_receipt_is_read_as_it_was_written(tmp_path):
    assert Receipt.from_json(RECEIPT_OF_TESTS.to_json().encode()) == RECEIPT_OF_TESTS
    (tmp_path / RECEIPT).write_text(RECEIPT_OF_TESTS.to_json())
    assert Receipt.of(tmp_path) == RECEIPT_OF_TESTS


def problems_of(content: Any) -> tuple[str, ...]:
    with pytest.raises(RequestError) as told:
        Receipt.from_json(content if isinstance(content, bytes) else json.dumps(content).encode())
    return told.value.problems


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"version": 1}, "version: wanted 4, found 1. Fix: use the pcb_ray that wrote it ('1.2.3'), or merge again."),
        ({"N": "1"}, "N: wanted a whole number, found '1'. Fix:"),
        ({"N": True}, "N: wanted a whole number, found true. Fix:"),
        ({"N": 2}, "inputs: wanted the base and 2 models, found '2 inputs'. Fix:"),
        ({"D": 0}, "D: wanted at least 1, found 0. Fix:"),
        ({"max_shard_bytes": -5}, "max_shard_bytes: wanted at least 1, found -5. Fix:"),
        ({"elapsed_s": 10**400}, "elapsed_s: wanted a number, found"),
        ({"thresholds": {"low": [0.5, None]}}, "thresholds: 'low'[1]: wanted a number, found nothing. Fix:"),
        ({"sweeps": [{"name": "a", "bytes": 1}]}, "sweeps[0]: wanted the key 'elapsed_s', found nothing. Fix:"),
        ({"outputs": [3]}, "outputs[0]: wanted a table, found 3. Fix:"),
        ({"files_sha256": {"../../secret": "00"}}, "wanted a name inside the output, found '../../secret'. Fix:"),
        ({"files_sha256": {"/etc/passwd": "00"}}, "wanted a name inside the output, found '/etc/passwd'. Fix:"),
        ({"files_sha256": {"a\0": "00"}}, "wanted a name inside the output"),
        ({"files_sha256": {"x" * 300: "00"}}, "wanted a name inside the output"),
        ({"more": 1}, "wanted only the keys of Receipt, found 'more'. Fix:"),
    ],
)
def test_a_receipt_that_is_not_as_it_was_written_is_told_in_one_line(changes, problem):
    (found,) = problems_of(CONTENT | changes)
    assert found.startswith(RECEIPT)
    assert problem in found


def test_all_that_is_wrong_with_a_receipt_is_told_at_once():
    assert len(problems_of(CONTENT | {"N": None, "kernels": {}, "resumed": 0})) == 3
    assert len(problems_of({"version": VERSION})) == len(dataclasses.fields(Receipt)) - 1


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"null", b"\xff", b"[" * 100_000, b'{"version": 2, "version": 2}', b"1" * 5000])
def test_what_is_no_receipt_at_all_is_told(raw):
    assert problems_of(raw)


def test_a_receipt_that_is_not_there_is_told(tmp_path):
    for where in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(RequestError, match=rf"{RECEIPT}: wanted a receipt, found no file. Fix: name a directory"):
            Receipt.of(where)
    os.mkfifo(tmp_path / RECEIPT)
    with pytest.raises(RequestError, match="found no file"):
        Receipt.of(tmp_path)


def test_what_is_wrong_is_told_without_asserts_too(tmp_path):
    (tmp_path / RECEIPT).write_text(json.dumps(CONTENT | {"N": 0, "files_sha256": {"../x": ""}}))
    program = f"from pathlib import Path; from pcb_ray.receipt import Receipt; Receipt.of(Path({str(tmp_path)!r}))"
    run = subprocess.run([sys.executable, "-O", "-c", program], capture_output=True, text=True, timeout=120)
    assert "RequestError" in run.stderr
    assert "N: wanted at least 1, found 0" in run.stderr
    assert "wanted a name inside the output, found '../x'" in run.stderr


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()) | st.just("\ud800"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


def places(content: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) in it."""
    if isinstance(content, dict):
        return [(content, key) for key in content] + [place for value in content.values() for place in places(value)]
    if isinstance(content, list):
        return [(content, k) for k in range(len(content))] + [place for value in content for place in places(value)]
    return []


@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_no_change_of_a_receipt_gives_a_traceback(data):
    content = copy.deepcopy(CONTENT)
    for _ in range(data.draw(st.integers(1, 3))):
        container, key = data.draw(st.sampled_from(places(content)))
        if data.draw(st.booleans()):
            container[key] = data.draw(JSON)
        else:
            del container[key]
        if not content:
            return
    read = read_or_refused(json.dumps(content).encode())
    if isinstance(read, Receipt):
        assert Receipt.from_json(read.to_json().encode()).to_json() == read.to_json()
    else:
        assert all("wanted" in problem and ". Fix: " in problem for problem in read.problems)


def read_or_refused(raw: bytes) -> Receipt | RequestError:
    try:
        return Receipt.from_json(raw)
    except RequestError as error:
        return error


@settings(max_examples=300, deadline=None)
@given(at=st.integers(0, len(RECEIPT_OF_TESTS.to_json())), length=st.integers(0, 40), put=st.binary(max_size=40))
@example(at=0, length=10**6, put=b"")
def test_no_change_of_its_bytes_gives_a_traceback(at, length, put):
    raw = RECEIPT_OF_TESTS.to_json().encode()
    assert read_or_refused(raw[:at] + put + raw[at + length :])


# --- what it tells ----------------------------------------------------------------------------------------------------------------


def test_inputs_are_told_by_name_and_no_path_of_this_machine(family, tmp_path):
    one = family(2, folder=tmp_path / "home", shards=2)
    (tmp_path / "home" / "flat").mkdir()
    (tmp_path / "home" / "model1" / "sub").mkdir()
    recipe = one.recipe(models=["../home/model0/", str(one.folder / "model1")])
    made = plan(Recipe.from_dict(recipe, tmp_path / "home"))
    told = inputs_of_receipt(made, ["0a", "0b", "0c"])
    assert [(i.name, i.commit, i.digest) for i in told] == [("base", None, "0a"), ("model0", None, "0b"), ("model1", None, "0c")]
    for one_told, planned in zip(told, made.inputs, strict=True):
        assert [(f.name, f.size, f.header_sha256) for f in one_told.files] == [
            (Path(f.path).name, f.size, f.header_sha256) for f in planned.files
        ]
    text = dataclasses.replace(RECEIPT_OF_TESTS, inputs=told, N=2).to_json()
    assert not [part for part in (str(tmp_path), "home", str(Path.home())) if part in text]


def test_a_model_that_is_one_file_is_told_by_its_name(family, tmp_path):
    one = family(1)
    recipe = one.recipe(models=[str(one.folder / "model0" / "model.safetensors")])
    (_, told) = inputs_of_receipt(plan(Recipe.from_dict(recipe)), ["0a", "0b"])
    assert (told.name, told.files[0].name) == ("model.safetensors", "model.safetensors")


def test_models_of_the_hub_are_told_by_id_commit_and_the_names_of_their_files(family):
    made = plan(Recipe.from_dict(family(1).recipe()))
    commit = "0123456789" * 4
    where = (
        f"/home/me/.cache/hub/models--org--m/snapshots/{commit}/sub/model.safetensors",
        f"hub://org/m@{commit}/sub/model.safetensors",
    )
    for path in where:
        (base, model) = made.inputs
        model = dataclasses.replace(
            model, source="org/m@main", commit=commit, files=(dataclasses.replace(model.files[0], path=path),)
        )
        told = inputs_of_receipt(dataclasses.replace(made, inputs=(base, model)), ["0a", "0b"])[1]
        assert (told.name, told.commit, told.files[0].name) == ("org/m", commit, "sub/model.safetensors")


def test_an_output_is_well_if_nothing_is_wrong_with_it():
    assert Verified().ok
    assert not Verified(("x: is missing",)).ok
