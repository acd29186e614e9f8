"""Models on the Hub, opened by the real client against a loopback imitation of the Hub (hub_server.py).

Openings run in a process of their own: the client reads HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE once, when imported. A
start takes a second, so the tests share one process (`opened`) where nothing but the model differs.
"""

from __future__ import annotations

import io
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hub_server import HubServer, Model, commit_of
from safetensors.torch import save

from pcb_ray.files.checkpoint import open_checkpoint
from pcb_ray.output.companions import side_files
from pcb_ray.planning import Inputs, plan_of
from pcb_ray.recipe import Recipe

TOKEN = "hf_thisIsSecret0123456789"
OPEN = """
import json, os, sys, time
from pathlib import Path
from pcb_ray.files.checkpoint import open_checkpoint
from pcb_ray.errors import RequestError
results = []
for source, download, environment in json.loads(sys.argv[1]):
    before = dict(os.environ)
    os.environ.update(environment)
    begin = time.perf_counter()
    try:
        found = open_checkpoint(source, Path(sys.argv[2]), download=download)
        tensors = [[t.name, t.dtype, t.shape, t.file, t.start] for t in found.tensors.values()]
        result = {"tensors": tensors, "aliases": found.aliases, "commit": found.commit,
                  "files": [[f.path, f.size, f.header_sha256] for f in found.files],
                  "config": found.config,
                  "folder": found.folder and str(found.folder), "source": found.source}
    except RequestError as error:
        result = {"problems": error.problems}
    results.append(result | {"elapsed_s": time.perf_counter() - begin})
    os.environ.clear()
    os.environ.update(before)
print(json.dumps(results))
"""


class Job(NamedTuple):
    source: str
    download: bool = False
    environment: dict[str, str] = {}  # noqa: RUF012 - read only


def open_all(tmp_path: Path, endpoint: str, *jobs: Job, **environment: str) -> list[dict[str, Any]]:
    """Open models one after another in a process without any network but `endpoint`; nothing secret is said."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_") and "proxy" not in name.lower()}
    settings = {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": TOKEN, "NO_PROXY": "*"}
    settings |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    command = [sys.executable, "-W", "error", "-c", OPEN, json.dumps(jobs), str(tmp_path)]
    done = subprocess.run(command, env=kept | settings | environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "Secret" not in done.stdout + done.stderr
    assert "hunter2" not in done.stdout + done.stderr
    return list(json.loads(done.stdout))


def problem(result: dict[str, Any]) -> str:
    (only,) = result["problems"]
    assert re.fullmatch(r".+: wanted .+, found .+\. Fix: .+\.", only), only
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
        **{name: json.dumps({"of": name}).encode() for name in NEEDED},
        "config.json": json.dumps({"seed": seed}).encode(),
        "modeling_custom.py": b"raise SystemExit('never run')",
        "pytorch_model.bin": b"not wanted",
        "tf_model.h5": b"not wanted",
        "model-q4.gguf": b"GGUF",
        "README.md": b"# A model",
        "onnx/model.onnx": b"not wanted",
        "original/consolidated.00.pth": b"not wanted",
        "original/tokenizer.model": b"not wanted",
        "checkpoint-10/config.json": b"not wanted",
        ".gitattributes": b"not wanted",
    }


# What lies beside the tensors and goes along: what many loaders read, and what only the model's own code knows of.
NEEDED = (
    "config.json", "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json", "generation_config.json",
    "tokenizer_config.json", "tokenizer.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "merges.txt", "sentencepiece.bpe.model", "qwen.tiktoken", "tekken.json", "chat_template.json",
    "chat_template.jinja", "additional_chat_templates/tool.jinja", "modeling_custom.py", "tokenization_custom.py", "LICENSE",
    "1_Pooling/config.json", "voices/one.pt",
)  # fmt: skip


GPTQ = save({"l.qweight": torch.zeros(8, 8, dtype=torch.int32), "l.g_idx": torch.zeros(8, dtype=torch.int32)})


def one(files: dict[str, bytes], **settings: Any) -> Model:
    return Model({commit_of("c"): files}, {"main": commit_of("c")}, **settings)


def bin_file(tensors: dict[str, torch.Tensor]) -> bytes:
    torch.save(tensors, buffer := io.BytesIO())
    return buffer.getvalue()


def in_bin_files(seed: int) -> dict[str, bytes]:
    """A model of three shards of 1.4 MB each, one in a subfolder, with a tied tensor, views of one storage, and 500 small
    tensors."""
    torch.manual_seed(seed)
    embedding, views = torch.randn(600, 600), torch.randn(5000)
    shards = {
        "pytorch_model-00001-of-00003.bin": {"embed.weight": embedding, "lm_head.weight": embedding, "odd": torch.ones(3)},
        "sub/pytorch_model-00002-of-00003.bin": {"w": torch.randn(600, 600), "a": views[:3000], "b": views[3000:].bfloat16()},
        "pytorch_model-00003-of-00003.bin": {f"{k}": torch.randn(20, 30) for k in range(500)} | {"half": views[100:2100]},
    }
    weight_map = {name: file for file, tensors in shards.items() for name in tensors}
    index = {"pytorch_model.bin.index.json": json.dumps({"weight_map": weight_map}).encode()}
    return {file: bin_file(tensors) for file, tensors in shards.items()} | index


def announcing() -> bytes:
    """A zip archive whose end says that its directory takes 20 MB."""
    content = bytearray(bin_file({"x": torch.randn(6_000_000)}))
    end = content.rfind(b"PK\x05\x06")
    content[end + 12 : end + 20] = (20_000_000).to_bytes(4, "little") + (end - 20_000_000).to_bytes(4, "little")
    return bytes(content).replace(b"PK\x06\x07", b"PK\x00\x00")  # and there is no other end, of 64 bits


OLD, NEW = commit_of("old"), commit_of("new")
BIG = sharded(2)
MODELS = {
    "org/big": Model({NEW: BIG}, {"main": NEW}),
    "org/whole": Model({OLD: sharded(1), NEW: BIG}, {"main": NEW, "v1": OLD}),
    "org/tagged": Model(
        {commit: {"config.json": b'{"seed": %d}' % seed, "model.safetensors": save(tensors_for(seed, 1))}
         for seed, commit in enumerate((OLD, NEW), start=1)},
        {"main": NEW, "v1": OLD, "refs/pr/7": OLD},
    ),
    "org/pipeline": one(
        {
            "model_index.json": b'{"unet": ["diffusers", "U"], "text_encoder": ["t", "T"], "safety_checker": [null, null]}',
            "unet/config.json": b'{"_class_name": "U"}',
            "unet/diffusion_pytorch_model.safetensors": save(tensors_for(7, 2)),
            "unet/diffusion_pytorch_model.fp16.safetensors": b"not wanted",
            "text_encoder/model.safetensors": b"goes along",
            "text_encoder/pytorch_model.fp16.bin": b"goes along",
            "v1-5-pruned.safetensors": b"not wanted",
        }
    ),
    "org/old-format": one({"config.json": b"{}", "pytorch_model.bin": bin_file({"x": torch.ones(300)}), "tf_model.h5": b"x"}),
    "org/bins": one({"config.json": b"{}", **in_bin_files(1)}),
    "org/bins-no-ranges": one({"config.json": b"{}", **in_bin_files(2)}, ranges=False),
    "org/bin-cut": one({"pytorch_model.bin": bin_file({"x": torch.randn(300_000)})[:-9]}),
    "org/bin-announcing": one({"pytorch_model.bin": announcing()}),
    "org/bin-hostile": one({"pytorch_model.bin": bin_file({"x": torch.randn(300_000), "y": commit_of})}),
    "org/many": one({"model.safetensors": save({f"layers.{i:04}.weight": torch.ones(4) for i in range(2000)})}),
    "org/no-ranges": one({"model.safetensors": save({"x": torch.ones(16_000_000)})}, ranges=False),
    "org/private": one({"model.safetensors": save({"x": torch.ones(3)})}, token=TOKEN),
    "org/hidden": one({"model.safetensors": save({"x": torch.ones(3)})}, token=TOKEN),
    "org/local": one({"model.safetensors": save({"x": torch.ones(3)})}),
    "org/gated": one({"model.safetensors": save({"x": torch.ones(3)})}, gated=True),
    "org/adapter": one({"adapter_config.json": b"{}", "adapter_model.safetensors": save({"x": torch.ones(3)})}),
    "org/gptq": one({"config.json": b'{"quantization_config": {"quant_method": "gptq"}}', "model.safetensors": GPTQ}),
    "org/cut": one({"model.safetensors": save({"x": torch.ones(50_000)})[:-9]}),
    "org/empty": one({"model.safetensors": b""}),
    "org/escape": one({"model.safetensors.index.json": b'{"weight_map": {"x": "../../x.safetensors"}}'}),
    "org/absent": one({"model.safetensors.index.json": b'{"weight_map": {"x": "x.safetensors"}}'}),
    **{f"org/status-{status}": Model({}, {}, failing=status) for status in (200, 403, 429, 500)},
}  # fmt: skip


class Moving(dict[str, str]):
    """Revisions of which each leads to the old commit when it is first asked for, and then to the new one."""

    def get(self, revision: str, other: Any = None) -> Any:
        first = revision not in self
        self[revision] = OLD if first else NEW
        return other if revision in (OLD, NEW) else self[revision]


REFUSED = {
    "org/nothing": "no such model on 127.0.0.1",
    "org/tagged@v9": "no such revision",
    "org/gated": "gated on 127.0.0.1",
    "org/adapter": "LoRA adapter",
    "org/gptq": "quantised by GPTQ",
    "org/cut": "wanted 200000 bytes of data, as in the header, found 199991",
    "org/empty": "of at least 10 bytes, found 0 bytes",
    "org/escape": "'../../x.safetensors'",
    "org/bin-cut": "wanted a sound zip archive, found a damaged one",
    "org/bin-announcing": "wanted a sound zip archive, found a damaged one (BadZipFile: 'a directory of 20000000 bytes')",
    "org/bin-hostile": "wanted plain tensors, found 'hub_server.commit_of', which is never run",
    "org/absent": "wanted 'x.safetensors', which its index names, found no such file",
    "org/a--b": "not a valid Hub id",
    "org/status-500": "answers with HTTP 500",
    "org/status-429": "HTTP 429",
    "org/status-403": "refuses access (HTTP 403)",
    "org/status-200": "does not answer as a Hub does",
}
OTHER_TOKENS = {"hf_otherSecret": "no such model on 127.0.0.1", "badSecret": "refuses access (HTTP 401)"}
REVISIONS = {"v1": 1, "refs/pr/7": 1, OLD: 1, "main": 2, NEW: 2}


@pytest.fixture(scope="module")
def hub() -> Iterator[HubServer]:
    with HubServer(MODELS) as server:
        yield server


class Opened(NamedTuple):
    root: Path
    hub: HubServer
    results: dict[str, dict[str, Any]]  # by source, and also "download" or a token

    def problem(self, key: str) -> str:
        return problem(self.results[key])


@pytest.fixture(scope="module")
def opened(hub: HubServer, tmp_path_factory: pytest.TempPathFactory) -> Opened:
    """Many openings in one process; each test looks at its own model."""
    root = tmp_path_factory.mktemp("opened")
    (root / "org" / "local").mkdir(parents=True)
    (root / "org" / "local" / "model.safetensors").write_bytes(save({"mine": torch.ones(2)}))
    sources = ["org/big", "org/many", "org/no-ranges", "org/old-format", "org/private", "org/bins", "org/bins-no-ranges", *REFUSED]
    jobs = {source: Job(source) for source in sources} | {"org/local": Job("org/local", True)}
    jobs |= {f"org/{name} download": Job(f"org/{name}", True) for name in ("private", "whole", "bins", "bins-no-ranges")}
    for revision in REVISIONS:
        jobs |= {f"{revision} {download}": Job(f"org/tagged@{revision}", download) for download in (False, True)}
    for token in OTHER_TOKENS:
        jobs |= {f"{token} {download}": Job("org/hidden", download, {"HF_TOKEN": token}) for download in (False, True)}
    results = open_all(root, hub.endpoint, *jobs.values())
    return Opened(root, hub, dict(zip(jobs, results, strict=True)))


def test_planning_fetches_headers_only_and_pins_the_commit(tmp_path: Path, opened: Opened) -> None:
    result, fetched = opened.results["org/big"], opened.hub.fetched("org/big")
    shards = sorted(name for name in BIG if name.endswith(".safetensors"))
    assert fetched.keys() == {"config.json", "model.safetensors.index.json", *shards}
    assert all(fetched[shard] <= 1 << 16 < len(BIG[shard]) // 10 for shard in shards)
    assert not list(opened.root.rglob("models--org--big"))
    assert list(opened.root.rglob("models--org--whole"))
    assert (result["commit"], result["folder"], result["config"]) == (NEW, None, {"seed": 2})
    resolved = [r.path for r in opened.hub.about("org/big") if "/resolve/" in r.path]
    assert all(f"/resolve/{NEW}/" in path for path in resolved)
    # the same as the files opened on disk
    for name in (*shards, "model.safetensors.index.json"):
        (tmp_path / name).write_bytes(BIG[name])
    place = f"hub://org/big@{NEW}"
    expected = open_checkpoint(str(tmp_path))
    assert result["tensors"] == [
        [t.name, t.dtype, list(t.shape), t.file.replace(str(tmp_path), place), t.start] for t in expected.tensors.values()
    ]
    assert result["files"] == [[f.path.replace(str(tmp_path), place), f.size, f.header_sha256] for f in expected.files]


def test_the_token_goes_to_the_hub_and_not_to_where_the_hub_redirects(opened: Opened) -> None:
    assert all(len(opened.results[key]["tensors"]) == 1 for key in ("org/private", "org/private download"))
    sent = {(r.path.startswith("/cdn/"), r.authorization) for r in opened.hub.about("org/private")}
    assert sent == {(False, f"Bearer {TOKEN}"), (True, None)}


def test_a_header_longer_than_the_first_request_is_fetched_whole(opened: Opened) -> None:
    content = MODELS["org/many"].commits[commit_of("c")]["model.safetensors"]
    header_bytes = 8 + int.from_bytes(content[:8], "little")
    assert len(opened.results["org/many"]["tensors"]) == 2000
    assert header_bytes > 1 << 16
    assert opened.hub.fetched("org/many")["model.safetensors"] == (1 << 16) + header_bytes


def test_a_server_that_ignores_ranges_is_left_after_the_header(opened: Opened) -> None:
    assert opened.results["org/no-ranges"]["tensors"][0][1:3] == ["F32", [16_000_000]]
    deadline = time.monotonic() + 10
    while not opened.hub.fetched("org/no-ranges") and time.monotonic() < deadline:
        time.sleep(0.05)
    assert opened.hub.fetched("org/no-ranges")["model.safetensors"] < 16_000_000


def test_a_download_takes_the_needed_files_only_and_serves_when_the_hub_is_gone(opened: Opened) -> None:
    result, hub = opened.results["org/whole download"], opened.hub
    shards = sorted(name for name in BIG if name.endswith(".safetensors"))
    wanted = {*NEEDED, *shards, "model.safetensors.index.json"}
    assert hub.fetched("org/whole").keys() == wanted
    folder = Path(result["folder"])
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} == wanted
    assert all((folder / name).read_bytes() == BIG[name] for name in wanted)
    assert (result["commit"], result["config"]) == (NEW, {"seed": 2})
    assert result["tensors"] == [
        [t.name, t.dtype, list(t.shape), t.file, t.start] for t in open_checkpoint(str(folder)).tensors.values()
    ]
    # down, failing, or told to stay offline: the cache serves, for the branch and for the commit
    jobs = [Job("org/whole", True), Job("org/whole"), Job(f"org/whole@{NEW}", True), Job("org/whole@v1", True)]
    jobs += [Job("org/name"), Job("org/name", True)]
    with HubServer(MODELS, failing=503) as failing:
        for endpoint, offline, part in (
            (nowhere(), "0", "cannot be reached (ConnectError)"),
            (failing.endpoint, "0", "HTTP 503"),
            (hub.endpoint, "1", "HF_HUB_OFFLINE"),
        ):
            *served, other, unknown, unknown_too = open_all(opened.root, endpoint, *jobs, HF_HUB_OFFLINE=offline)
            assert [s["tensors"] for s in served] == [result["tensors"]] * 3
            assert [s["commit"] for s in served] == [NEW] * 3
            assert "org/whole@v1" in problem(other)
            for told in (unknown, unknown_too):
                assert part in problem(told)
                assert told["elapsed_s"] < 5
    # and what is missing in the cache is told with the reason why it was asked
    (folder / "model-00002-of-00003.safetensors").rename(folder / "aside")
    (again,) = open_all(opened.root, nowhere(), Job("org/whole", True))
    (folder / "aside").rename(folder / "model-00002-of-00003.safetensors")
    assert any("cannot be reached" in problem for problem in again["problems"])
    assert any("model-00002-of-00003.safetensors: wanted a file, found none" in problem for problem in again["problems"])


def test_of_a_pipeline_on_the_hub_the_part_is_opened_by_its_header_and_the_rest_fetched_with_it(
    tmp_path: Path, hub: HubServer
) -> None:
    before, after = open_all(tmp_path, hub.endpoint, Job("org/pipeline"), Job("org/pipeline", True))
    strip = [[name, dtype, shape] for name, dtype, shape, _, _ in after["tensors"]]
    assert [[name, dtype, shape] for name, dtype, shape, _, _ in before["tensors"]] == strip
    assert {file for _, _, _, file, _ in before["tensors"]} == {
        f"hub://org/pipeline@{before['commit']}/unet/diffusion_pytorch_model.safetensors"
    }
    assert after["config"] == {"_class_name": "U"}
    folder = Path(after["folder"])
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    unet = {"unet/config.json", "unet/diffusion_pytorch_model.safetensors"}
    assert there == {"model_index.json", *unet, "text_encoder/model.safetensors", "text_encoder/pytorch_model.fp16.bin"}


def test_every_file_beside_the_tensors_that_is_fetched_is_copied_too_and_the_other_way_round(opened: Opened) -> None:
    folder = Path(opened.results["org/whole download"]["folder"])
    fetched = {name for name in opened.hub.fetched("org/whole") if "safetensors" not in name}
    recipe = Recipe.from_dict({"merge_method": "linear", "models": [{"model": str(folder)}]})
    base = open_checkpoint(str(folder))
    copied = side_files(recipe, plan_of(recipe, Inputs(base, (base,), base)), base, base)
    assert copied.keys() - {"pcb_recipe.yaml"} == fetched == {*NEEDED}
    assert all(copied[name] == str(folder / name) for name in fetched - {"config.json"})


def test_a_revision_is_a_branch_a_tag_a_pull_request_or_a_commit(opened: Opened) -> None:
    for revision, seed in REVISIONS.items():
        for download in (False, True):
            found = opened.results[f"{revision} {download}"]
            assert (found["commit"], found["config"]["seed"]) == ({1: OLD, 2: NEW}[seed], seed)
            assert found["tensors"][0][0] == f"layers.{seed}.0.weight"
            assert (found["folder"] is not None) == download


def test_planning_a_model_in_bin_files_fetches_their_structure_only(opened: Opened) -> None:
    result, downloaded, hub = opened.results["org/bins"], opened.results["org/bins download"], opened.hub
    files = MODELS["org/bins"].commits[commit_of("c")]
    shards = [name for name in files if name.endswith(".bin")]
    assert hub.fetched("org/bins").keys() == {"config.json", "pytorch_model.bin.index.json", *shards}
    for shard in shards:  # what the download took comes to a plan's few blocks
        took = hub.fetched("org/bins")[shard] - len(files[shard])
        assert 0 < took <= 4 << 16 < len(files[shard]) // 4
    # the plan's tensors are those of the download, but for where their data begin
    place, folder = f"hub://org/bins@{commit_of('c')}", downloaded["folder"]
    assert [t[:4] for t in result["tensors"]] == [[*t[:3], t[3].replace(folder, place)] for t in downloaded["tensors"]]
    assert all(0 <= exact[4] - least[4] < 256 for least, exact in zip(result["tensors"], downloaded["tensors"], strict=True))
    assert result["files"] == [[path.replace(folder, place), size, sha256] for path, size, sha256 in downloaded["files"]]
    assert result["aliases"] == downloaded["aliases"] == {"lm_head.weight": "embed.weight"}
    assert (result["folder"], result["commit"], downloaded["commit"]) == (None, commit_of("c"), commit_of("c"))
    assert opened.results["org/old-format"]["tensors"][0][:3] == ["x", "F32", [300]]


def test_a_server_without_ranges_is_told_with_the_bytes_that_a_plan_would_have_to_fetch(opened: Opened) -> None:
    files = MODELS["org/bins-no-ranges"].commits[commit_of("c")]
    problems = opened.results["org/bins-no-ranges"]["problems"]
    assert len(problems) == 3
    for shard in (name for name in files if name.endswith(".bin")):
        told = next(problem for problem in problems if f"/{shard}: wanted its bytes " in problem)
        assert (
            f"sends whole files only, {len(files[shard])} bytes. Fix: fetch the model with `hf download org/bins-no-ranges" in told
        )
    assert len(opened.results["org/bins-no-ranges download"]["tensors"]) == len(opened.results["org/bins"]["tensors"])


def test_a_branch_that_moves_before_the_download_is_told_rather_than_two_commits_mixed(tmp_path: Path) -> None:
    commits = {commit: {"model.safetensors": save(tensors_for(seed, 1))} for seed, commit in enumerate((OLD, NEW))}
    with HubServer({"org/moving": Model(commits, Moving())}) as server:
        results = open_all(tmp_path, server.endpoint, Job("org/moving", True), Job("org/moving", True))
    assert f"wanted commit {OLD}, found {NEW}, to which it moved just now" in problem(results[0])
    assert results[1]["commit"] == NEW


def test_a_folder_with_the_name_of_a_hub_model_is_opened_instead(opened: Opened) -> None:
    result = opened.results["org/local"]
    assert (result["tensors"][0][0], result["commit"]) == ("mine", None)
    assert opened.hub.about("org/local") == []


def test_what_the_hub_refuses_or_holds_wrong_is_told_at_once_and_by_name(opened: Opened) -> None:
    for source, part in REFUSED.items():
        assert part in opened.problem(source), source
        assert source in opened.problem(source)
        assert opened.results[source]["elapsed_s"] < 2
        assert sum(opened.hub.fetched(source).values()) < (4 << 16 if "/bin-" in source else 1 << 17)
    for token, part in OTHER_TOKENS.items():
        for download in (False, True):
            assert part in opened.problem(f"{token} {download}")
            assert "HF_TOKEN" in opened.problem(f"{token} {download}")


def nowhere() -> str:
    """An address at which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


def test_wrong_settings_of_the_client_are_told_by_name_within_seconds(tmp_path: Path) -> None:
    user = nowhere().replace("//", "//user:hunter2@")
    settings = [  # the wrong addresses come first: with them the library does not even load
        ({"HF_ENDPOINT": "http://[half"}, "HF_ENDPOINT: wanted an http or https address, found something else"),
        ({"HF_ENDPOINT": "nonsense"}, "HF_ENDPOINT: wanted an http or https address, found something else"),
        ({"HF_ENDPOINT": user}, f"{user.partition('@')[2]} cannot be reached (ConnectError)"),
        ({"HF_ENDPOINT": user, "HF_TOKEN": "hf_naïveSecret"}, "HF_TOKEN is not plain ASCII"),
        ({"HF_ENDPOINT": user, "HF_TOKEN": "hf_two\nlinesSecret"}, ""),
    ]
    for download in (False, True):
        results = open_all(tmp_path, "nonsense", *(Job("org/name", download, environment) for environment, _ in settings))
        for (_, part), result in zip(settings, results, strict=True):
            assert part in problem(result)
            assert result["elapsed_s"] < 5


def test_a_cache_that_cannot_be_written_is_told(tmp_path: Path, hub: HubServer) -> None:
    (tmp_path / "file").write_text("")
    (result,) = open_all(tmp_path, hub.endpoint, Job("org/tagged", True), HF_HOME=str(tmp_path / "file"))
    assert "cannot be stored in the Hub's cache" in problem(result)
    assert "HF_HOME" in problem(result)


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Callable[[Path], None]]:
    """Make a folder read-only, for root too."""
    mounted: list[Path] = []

    def mount(folder: Path) -> None:
        bind = ["mount", "--bind", str(folder), str(folder)]
        done = subprocess.run(bind, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"can't mount: {done.stderr.strip()}")
        mounted.append(folder)
        subprocess.run(["mount", "-o", "remount,ro,bind", str(folder)], check=True)

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_read_only_cache_serves_what_it_holds_and_says_what_it_can_not_store(
    tmp_path: Path, hub: HubServer, read_only: Callable[[Path], None]
) -> None:
    """As of a cluster whose nodes share a cache that an administrator fills."""
    (tmp_path / "hf").mkdir()
    (filled,) = open_all(tmp_path, hub.endpoint, Job("org/bins", True))
    assert "problems" not in filled
    read_only(tmp_path / "hf")
    again, other = open_all(tmp_path, hub.endpoint, Job("org/bins", True), Job("org/tagged", True))
    assert {key: again[key] for key in ("tensors", "commit")} == {key: filled[key] for key in ("tensors", "commit")}
    assert "cannot be stored in the Hub's cache (Read-only file system) while downloading" in problem(other)
    assert "check HF_HOME and its disk" in problem(other)
