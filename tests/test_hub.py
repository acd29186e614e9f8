"""Models on the Hub, opened by the real client against a loopback imitation of the Hub (hub_server.py).

Each opening runs in a process of its own: the client reads HF_ENDPOINT, HF_HOME and HF_TOKEN once, when imported.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import HubServer, Model, commit_of
from safetensors.torch import save

from pcb_ray.checkpoint import open_checkpoint

TOKEN = "hf_thisIsSecret0123456789"
OPEN = """
import json, sys
from pathlib import Path
from pcb_ray.checkpoint import open_checkpoint
from pcb_ray.errors import RequestError
results = []
for source, download in json.loads(sys.argv[1]):
    try:
        found = open_checkpoint(source, Path(sys.argv[2]), download=download)
    except RequestError as error:
        results.append({"problems": error.problems})
        continue
    tensors = [[t.name, t.dtype, t.shape, t.file, t.start] for t in found.tensors.values()]
    results.append({"tensors": tensors, "files": found.files, "commit": found.commit, "config": found.config,
                    "folder": found.folder and str(found.folder), "source": found.source})
print(json.dumps(results))
"""


def open_all(tmp_path: Path, endpoint: str, *jobs: tuple[str, bool], **environment: str) -> list[dict[str, Any]]:
    """Open (source, download) one after another in a process without any network but `endpoint`; nothing secret is said."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_") and "proxy" not in name.lower()}
    settings = {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": TOKEN, "NO_PROXY": "*"}
    settings |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    command = [sys.executable, "-W", "error", "-c", OPEN, json.dumps(jobs), str(tmp_path)]
    done = subprocess.run(command, env=kept | settings | environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "Secret" not in done.stdout + done.stderr
    return list(json.loads(done.stdout))


def problem(result: dict[str, Any]) -> str:
    (only,) = result["problems"]
    assert "\n" not in only
    return str(only)


def tensors_for(seed: int, count: int = 3) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return {f"layers.{seed}.{i}.weight": torch.randn(200, 400) for i in range(count)}


def sharded(seed: int) -> dict[str, bytes]:
    """A model's files: three shards of about 1 MB each, and much that a merge does not need."""
    shards = {f"model-0000{i}-of-00003.safetensors": tensors_for(10 * seed + i) for i in (1, 2, 3)}
    weight_map = {name: file for file, tensors in shards.items() for name in tensors}
    return {
        **{file: save(tensors) for file, tensors in shards.items()},
        "model.safetensors.index.json": json.dumps({"weight_map": weight_map}).encode(),
        **{name: json.dumps({"of": name}).encode() for name in NEEDED if name.endswith("json") and name != "config.json"},
        "config.json": json.dumps({"seed": seed}).encode(),
        "tokenizer.model": b"pieces",
        "chat_template.jinja": b"{{ messages }}",
        "modeling_custom.py": b"raise SystemExit('never run')",
        "tokenization_custom.py": b"",
        "pytorch_model.bin": b"not wanted",
        "tf_model.h5": b"not wanted",
        "model-q4.gguf": b"GGUF",
        "README.md": b"# A model",
        "onnx/model.onnx": b"not wanted",
        "original/consolidated.00.pth": b"not wanted",
        "original/tokenizer.model": b"not wanted",
    }


NEEDED = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model",
          "special_tokens_map.json", "chat_template.jinja")  # fmt: skip


def one(files: dict[str, bytes], **settings: Any) -> Model:
    return Model({commit_of("c"): files}, {"main": commit_of("c")}, **settings)


@pytest.fixture
def hub() -> Iterator[HubServer]:
    old, new = commit_of("old"), commit_of("new")
    big = Model({old: sharded(1), new: sharded(2)}, {"main": new, "v1": old, "refs/pr/7": old})
    torch.save({"x": torch.ones(300)}, buffer := Path(f"/tmp/pcb_ray_hub_{os.getpid()}.bin"))
    pickled = buffer.read_bytes()
    buffer.unlink()
    models = {
        "org/big": big,
        "org/old-format": one({"config.json": b"{}", "pytorch_model.bin": pickled, "tf_model.h5": b"x"}),
        "org/many": one({"model.safetensors": save({f"layers.{i:04}.weight": torch.ones(4) for i in range(2000)})}),
        "org/private": one({"model.safetensors": save({"x": torch.ones(3)})}, token=TOKEN),
        "org/gated": one({"model.safetensors": save({"x": torch.ones(3)})}, gated=True),
        "org/adapter": one({"adapter_config.json": b"{}", "adapter_model.safetensors": save({"x": torch.ones(3)})}),
        "org/gptq": one({"config.json": b'{"quantization_config": {"quant_method": "gptq"}}', "model.safetensors": b""}),
        "org/cut": one({"model.safetensors": save({"x": torch.ones(50_000)})[:-9]}),
        "org/empty": one({"model.safetensors": b""}),
        "org/escape": one({"model.safetensors.index.json": b'{"weight_map": {"x": "../../x.safetensors"}}'}),
        "org/absent": one({"model.safetensors.index.json": b'{"weight_map": {"x": "x.safetensors"}}'}),
    }
    models |= {f"org/status-{status}": Model({}, {}, failing=status) for status in (200, 403, 429, 500)}
    with HubServer(models) as server:
        yield server


def test_planning_fetches_headers_only_and_pins_the_commit(tmp_path: Path, hub: HubServer) -> None:
    (result,) = open_all(tmp_path, hub.endpoint, ("org/big", False))
    new = commit_of("new")
    files = hub.models["org/big"].commits[new]
    shards = sorted(name for name in files if name.endswith(".safetensors"))
    assert hub.fetched().keys() == {"config.json", "model.safetensors.index.json", *shards}
    assert all(hub.fetched()[shard] <= 1 << 16 < len(files[shard]) // 10 for shard in shards)
    assert not (tmp_path / "hf" / "hub").exists()
    assert (result["commit"], result["folder"], result["config"]) == (new, None, {"seed": 2})
    resolved = [r.path for r in hub.requests if "/resolve/" in r.path]
    assert all(f"/resolve/{new}/" in path for path in resolved)
    # the same as the files opened on disk
    local = tmp_path / "local"
    local.mkdir()
    for name in (*shards, "model.safetensors.index.json"):
        (local / name).write_bytes(files[name])
    place = f"hub://org/big@{new}"
    expected = open_checkpoint(str(local))
    assert result["tensors"] == [
        [t.name, t.dtype, list(t.shape), t.file.replace(str(local), place), t.start] for t in expected.tensors.values()
    ]
    assert result["files"] == [[f.path.replace(str(local), place), f.size, f.header_sha256] for f in expected.files]


def test_the_token_goes_to_the_hub_and_not_to_where_the_hub_redirects(tmp_path: Path, hub: HubServer) -> None:
    results = open_all(tmp_path, hub.endpoint, ("org/private", False), ("org/private", True))
    assert all(len(result["tensors"]) == 1 for result in results)
    sent = {(r.path.startswith("/cdn/"), r.authorization) for r in hub.requests}
    assert sent == {(False, f"Bearer {TOKEN}"), (True, None)}


def test_a_header_longer_than_the_first_request_is_fetched_whole(tmp_path: Path, hub: HubServer) -> None:
    (result,) = open_all(tmp_path, hub.endpoint, ("org/many", False))
    content = hub.models["org/many"].commits[commit_of("c")]["model.safetensors"]
    header_bytes = 8 + int.from_bytes(content[:8], "little")
    assert len(result["tensors"]) == 2000
    assert header_bytes > 1 << 16
    assert hub.fetched()["model.safetensors"] == (1 << 16) + header_bytes


def test_a_server_that_ignores_ranges_is_left_after_the_header(tmp_path: Path, hub: HubServer) -> None:
    hub.ranges = False
    hub.models["org/big"] = one({"model.safetensors": save({"x": torch.ones(16_000_000)})})
    (result,) = open_all(tmp_path, hub.endpoint, ("org/big", False))
    assert result["tensors"][0][1:3] == ["F32", [16_000_000]]
    deadline = time.monotonic() + 10
    while not hub.fetched() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert hub.fetched()["model.safetensors"] < 16_000_000


def test_a_download_takes_the_needed_files_only_and_serves_when_the_hub_is_gone(tmp_path: Path, hub: HubServer) -> None:
    (result,) = open_all(tmp_path, hub.endpoint, ("org/big", True))
    new = commit_of("new")
    files = hub.models["org/big"].commits[new]
    shards = sorted(name for name in files if name.endswith(".safetensors"))
    wanted = {*NEEDED, *shards, "model.safetensors.index.json"}
    assert hub.fetched().keys() == wanted
    folder = Path(result["folder"])
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*")} == wanted
    assert all((folder / name).read_bytes() == files[name] for name in wanted)
    assert (result["commit"], result["config"]) == (new, {"seed": 2})
    assert result["tensors"] == [
        [t.name, t.dtype, list(t.shape), t.file, t.start] for t in open_checkpoint(str(folder)).tensors.values()
    ]
    # down, failing, or told to stay offline: the cache serves, for the branch and for the commit
    jobs = [("org/big", True), ("org/big", False), (f"org/big@{new}", True), ("org/big@v1", True)]
    hub.failing = 503
    for endpoint, offline in ((f"http://127.0.0.1:{free_port()}", "0"), (hub.endpoint, "0"), (hub.endpoint, "1")):
        *served, other = open_all(tmp_path, endpoint, *jobs, HF_HUB_OFFLINE=offline)
        assert [s["tensors"] for s in served] == [result["tensors"]] * 3
        assert [s["commit"] for s in served] == [new] * 3
        assert "org/big@v1" in problem(other)


def test_a_revision_is_a_branch_a_tag_a_pull_request_or_a_commit(tmp_path: Path, hub: HubServer) -> None:
    old, new = commit_of("old"), commit_of("new")
    revisions = ["v1", "refs/pr/7", old, "main", new]
    jobs = [(f"org/big@{revision}", download) for download in (False, True) for revision in revisions]
    found = open_all(tmp_path, hub.endpoint, *jobs)
    assert [result["commit"] for result in found] == [old, old, old, new, new] * 2
    assert [result["config"]["seed"] for result in found] == [1, 1, 1, 2, 2] * 2


def test_a_model_in_bin_files_alone_is_downloaded_also_for_a_plan(tmp_path: Path, hub: HubServer) -> None:
    (result,) = open_all(tmp_path, hub.endpoint, ("org/old-format", False))
    assert hub.fetched().keys() == {"config.json", "pytorch_model.bin"}
    assert result["tensors"][0][:3] == ["x", "F32", [300]]
    assert result["commit"] == commit_of("c")


def test_a_folder_with_the_name_of_a_hub_model_is_opened_instead(tmp_path: Path, hub: HubServer) -> None:
    (tmp_path / "org" / "big").mkdir(parents=True)
    (tmp_path / "org" / "big" / "model.safetensors").write_bytes(save({"mine": torch.ones(2)}))
    (result,) = open_all(tmp_path, hub.endpoint, ("org/big", True))
    assert (result["tensors"][0][0], result["commit"]) == ("mine", None)
    assert hub.requests == []


def test_what_the_hub_refuses_or_holds_wrong_is_told_at_once_and_by_name(tmp_path: Path, hub: HubServer) -> None:
    expected = {
        "org/nothing": "no such model on 127.0.0.1",
        "org/big@v9": "no such revision",
        "org/gated": "gated on 127.0.0.1",
        "org/adapter": "LoRA adapter",
        "org/gptq": "'gptq'",
        "org/cut": "describes 200000 bytes of data, the file has 199991",
        "org/empty": "0 bytes, too short",
        "org/escape": "'../../x.safetensors'",
        "org/absent": "names 'x.safetensors', which the model does not have",
        "org/a--b": "not a valid Hub id",
        "org/status-500": "HTTP 500",
        "org/status-429": "HTTP 429",
        "org/status-403": "refuses access (HTTP 403)",
        "org/status-200": "does not answer as a Hub does",
    }
    begin = time.perf_counter()
    results = open_all(tmp_path, hub.endpoint, *[(source, False) for source in expected])
    for (source, part), result in zip(expected.items(), results, strict=True):
        assert part in problem(result), (source, result)
        assert source in problem(result)
    assert time.perf_counter() - begin < 8
    assert sum(hub.fetched().values()) < 1 << 17
    for token, part in (("hf_otherSecret", "no such model on 127.0.0.1"), ("badSecret", "refuses access (HTTP 401)")):
        jobs = [("org/private", False), ("org/private", True)]
        for result in open_all(tmp_path, hub.endpoint, *jobs, HF_TOKEN=token):
            assert part in problem(result)
            assert "HF_TOKEN" in problem(result)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize(
    ("environment", "part"),
    [
        ({"HF_ENDPOINT": "http://user:hunter2@127.0.0.1:9"}, "127.0.0.1:9 cannot be reached (ConnectError)"),
        ({"HF_ENDPOINT": "nonsense"}, "HF_ENDPOINT"),
        ({"HF_ENDPOINT": "http://[half"}, "HF_ENDPOINT"),
        ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE"),
        ({"HF_TOKEN": "hf_naïveSecret"}, "HF_TOKEN"),
        ({"HF_TOKEN": "hf_two\nlinesSecret"}, ""),
    ],
)  # fmt: skip
def test_an_unreachable_hub_is_told_within_seconds(tmp_path: Path, environment: dict[str, str], part: str) -> None:
    begin = time.perf_counter()
    jobs = [("org/name", False), ("org/name", True)]
    results = open_all(tmp_path, f"http://127.0.0.1:{free_port()}", *jobs, **environment)
    assert time.perf_counter() - begin < 8
    for result in results:
        assert part in problem(result)
        assert "hunter2" not in problem(result)


def test_an_incomplete_cache_is_told_with_the_reason_why_it_was_asked(tmp_path: Path, hub: HubServer) -> None:
    (result,) = open_all(tmp_path, hub.endpoint, ("org/big", True))
    (Path(result["folder"]) / "model-00002-of-00003.safetensors").unlink()
    (again,) = open_all(tmp_path, f"http://127.0.0.1:{free_port()}", ("org/big", True))
    assert any("cannot be reached" in problem for problem in again["problems"])
    assert any("model-00002-of-00003.safetensors: no such file" in problem for problem in again["problems"])


def test_a_cache_that_cannot_be_written_is_told(tmp_path: Path, hub: HubServer) -> None:
    (tmp_path / "file").write_text("")
    (result,) = open_all(tmp_path, hub.endpoint, ("org/big", True), HF_HOME=str(tmp_path / "file"))
    assert "cannot be stored in the Hub's cache" in problem(result)
    assert "HF_HOME" in problem(result)
