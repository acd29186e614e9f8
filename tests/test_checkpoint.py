"""What pcb_ray.files.checkpoint promises, held against the safetensors, torch and transformers libraries themselves."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import pickle
import random
import re
import resource
import subprocess
import sys
import time
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from junk import mutate_bytes, mutate_json
from safetensors import SafetensorError, deserialize, safe_open
from safetensors.torch import load_file, save, save_file
from torch._subclasses.fake_tensor import FakeTensorMode

from pcb_ray.errors import RequestError
from pcb_ray.files.checkpoint import (
    DTYPE_BYTES,
    Checkpoint,
    Tensor,
    open_checkpoint,
    read_header,
    safetensors_header,
)
from pcb_ray.files.safetensors import OF_TORCH, File, dtype_problems
from pcb_ray.files.store import fsync_folder, write_atomically

# An oracle of its own: what torch calls the dtypes of safetensors.
TORCH_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "U16": torch.uint16,
    "U32": torch.uint32, "U64": torch.uint64, "BOOL": torch.bool,
}  # fmt: skip


def random_tensor(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    size = torch.empty((), dtype=dtype).element_size()
    raw = torch.randint(0, 2 if dtype is torch.bool else 256, (math.prod(shape) * size,), dtype=torch.uint8)
    return raw.view(dtype).reshape(shape)


def raw_bytes(tensor: torch.Tensor) -> bytes:
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def stored_bytes(tensor: Tensor) -> bytes:
    with open(tensor.file, "rb") as file:
        file.seek(tensor.start)
        data = file.read(tensor.nbytes)
    assert len(data) == tensor.nbytes == tensor.stop - tensor.start
    return data


def assert_holds(checkpoint: Checkpoint, expected: dict[str, torch.Tensor]) -> None:
    names = {*checkpoint.tensors, *checkpoint.aliases}
    assert names == expected.keys()
    for name, value in expected.items():
        found = checkpoint.tensors[checkpoint.aliases.get(name, name)]
        assert (TORCH_DTYPES[found.dtype], found.shape) == (value.dtype, tuple(value.shape)), name
        assert stored_bytes(found) == raw_bytes(value), name


def assert_one_line_each(error: RequestError) -> None:
    """Each problem says where, what was wanted, what was found, and what to do about it, in one line."""
    assert all("\n" not in problem and len(problem) < 2000 for problem in error.problems), error.problems
    assert all(GRAMMAR.fullmatch(problem) for problem in error.problems), error.problems


GRAMMAR = re.compile(r".+: wanted .+, found .+\. Fix: .+\.")


def problems_of(source: str | Path, **arguments: Any) -> tuple[str, ...]:
    with pytest.raises(RequestError) as caught:
        open_checkpoint(str(source), **arguments)
    assert_one_line_each(caught.value)
    return caught.value.problems


def problem_of(source: str | Path, *parts: str) -> str:
    (problem,) = problems_of(source)
    for part in parts:
        assert part in problem, problem
    return problem


def framed(header: bytes | str | dict[str, Any], data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file of this header, right or wrong."""
    text = json.dumps(header) if isinstance(header, dict) else header
    raw = text if isinstance(text, bytes) else text.encode()
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


def entry(begin: int, end: int, dtype: Any = "F32", shape: Any = None) -> dict[str, Any]:
    return {"dtype": dtype, "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


@pytest.fixture
def family() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    tensors = {f"layer.{name}": random_tensor(dtype, 3, 5) for name, dtype in TORCH_DTYPES.items()}
    return {**tensors, "scalar": torch.tensor(1.5), "empty": torch.empty(0, 7), "Größe 名前": torch.ones(2)}


def write_shards(folder: Path, shards: dict[str, dict[str, torch.Tensor]], kind: str = "safetensors") -> None:
    folder.mkdir(exist_ok=True)
    for file, tensors in shards.items():
        (folder / file).parent.mkdir(exist_ok=True)
        if kind == "safetensors":
            save_file(tensors, folder / file)
        else:
            torch.save(tensors, folder / file)
    index = {"metadata": {"total_size": 0}, "weight_map": {name: file for file in shards for name in shards[file]}}
    name = {"safetensors": "model.safetensors.index.json", "bin": "pytorch_model.bin.index.json"}[kind]
    (folder / name).write_text(json.dumps(index))


# ------------------------------------------------------------------------------------------- reading what is right


def test_a_safetensors_file_is_described_as_its_library_loads_it(tmp_path: Path, family: dict[str, torch.Tensor]) -> None:
    path = tmp_path / "m.safetensors"
    save_file(family, path, metadata={"format": "pt"})
    checkpoint = open_checkpoint(str(path))
    assert_holds(checkpoint, load_file(path))
    assert checkpoint.folder is checkpoint.config is checkpoint.commit is None
    tensors, metadata, raw = read_header(path)
    assert (tensors, metadata) == (checkpoint.tensors, {"format": "pt"})
    content = path.read_bytes()
    assert raw == content[: 8 + int.from_bytes(content[:8], "little")]
    assert checkpoint.files == (File(str(path), len(content), hashlib.sha256(raw).hexdigest()),)
    starts = [tensor.start for tensor in tensors.values()]
    assert starts == sorted(starts)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shard_size", ["5GB", "40KB"])
def test_what_save_pretrained_writes_is_read_bit_for_bit(tmp_path: Path, shard_size: str, tied: bool) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2,
        tie_word_embeddings=tied, dtype="bfloat16",
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "llama", max_shard_size=shard_size)
    checkpoint = open_checkpoint("llama", tmp_path)
    expected = {name: value for name, value in model.state_dict().items() if not (tied and name == "lm_head.weight")}
    assert_holds(checkpoint, expected)
    assert (len(checkpoint.files) > 1) == (shard_size == "40KB")
    assert checkpoint.folder == tmp_path / "llama"
    assert checkpoint.config is not None
    assert checkpoint.config["tie_word_embeddings"] == tied
    assert [f.path for f in checkpoint.files] == sorted(f.path for f in checkpoint.files)
    assert [f.size for f in checkpoint.files] == [os.path.getsize(f.path) for f in checkpoint.files]
    places = [(tensor.file, tensor.start) for tensor in checkpoint.tensors.values()]
    assert places == sorted(places)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_bin_file_is_described_as_torch_loads_it(tmp_path: Path, family: dict[str, torch.Tensor], protocol: int) -> None:
    path = tmp_path / "pytorch_model.bin"
    family["parameter"] = torch.nn.Parameter(torch.randn(4, 4))
    torch.save(family, path, pickle_protocol=protocol)
    checkpoint = open_checkpoint(str(tmp_path))
    assert_holds(checkpoint, torch.load(path, weights_only=True) if protocol == 2 else family)
    assert checkpoint.aliases == {}
    with zipfile.ZipFile(path) as archive:
        structure = archive.read("pytorch_model/data.pkl")
    assert checkpoint.files == (File(str(path), path.stat().st_size, hashlib.sha256(structure).hexdigest()),)


def test_a_bin_file_s_offsets_are_those_that_torch_computes_without_reading(tmp_path: Path) -> None:
    path = tmp_path / "m.bin"
    big = torch.arange(1000, dtype=torch.float32)
    tensors = {"view": big[10:20].view(2, 5), "odd": torch.ones(3, dtype=torch.int8), "tail": big[990:], "whole": big}
    torch.save(tensors, path)
    with FakeTensorMode():
        fake = torch.load(path, weights_only=True)
    expected = {
        name: value.untyped_storage()._checkpoint_offset + value.storage_offset() * value.element_size()
        for name, value in fake.items()
    }
    assert {name: tensor.start for name, tensor in open_checkpoint(str(path)).tensors.items()} == expected


def test_tensors_with_one_storage_are_aliases_only_if_they_are_the_same_bytes(tmp_path: Path) -> None:
    whole = torch.arange(12, dtype=torch.float32)
    tensors = {
        "embed": whole, "again": whole, "head": whole[:], "half": whole[:6], "shaped": whole.view(3, 4),
        "none": whole[:0], "nothing": whole[:0], "equal": whole.clone(),
    }  # fmt: skip
    torch.save(tensors, tmp_path / "m.bin")
    checkpoint = open_checkpoint("m.bin", tmp_path)
    assert checkpoint.aliases == {"again": "embed", "head": "embed"}
    assert_holds(checkpoint, tensors)


def test_a_model_s_state_dict_is_read_with_its_wrapper_and_metadata(tmp_path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    for key in (None, "state_dict", "model", "module"):
        torch.save(module.state_dict() if key is None else {key: module.state_dict()}, tmp_path / "m.pt")
        assert_holds(open_checkpoint("m.pt", tmp_path), module.state_dict())


def test_bin_shards_are_read_by_their_index_and_safetensors_win_over_them(tmp_path: Path) -> None:
    shards = {"a.bin": {"x": torch.randn(3)}, "sub/b.bin": {"y": torch.randn(2, 2)}}
    write_shards(tmp_path, shards, "bin")
    assert_holds(open_checkpoint(str(tmp_path)), {**shards["a.bin"], **shards["sub/b.bin"]})
    save_file({"z": torch.ones(1)}, tmp_path / "value_head.safetensors")  # of whatever it is, not of the model
    assert_holds(open_checkpoint(str(tmp_path)), {**shards["a.bin"], **shards["sub/b.bin"]})
    save_file({"w": torch.ones(1)}, tmp_path / "model.safetensors")
    assert_holds(open_checkpoint(str(tmp_path)), {"w": torch.ones(1)})


def test_the_hub_cache_of_links_to_blobs_is_read(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    write_shards(blobs, {"one.safetensors": {"x": torch.ones(3)}})
    for name in ("one.safetensors", "model.safetensors.index.json"):
        (blobs / name).rename(blobs / f"sha-{name}")
        (snapshot / name).symlink_to(f"../../blobs/sha-{name}")
    assert_holds(open_checkpoint(str(snapshot)), {"x": torch.ones(3)})


def test_paths_are_taken_from_the_recipe_s_folder_and_win_over_hub_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "org" / "name"
    folder.mkdir(parents=True)
    save_file({"x": torch.ones(3)}, folder / "model.safetensors")
    found = open_checkpoint("org/name", tmp_path)
    assert (found.source, found.folder) == ("org/name", folder)
    assert found.tensors["x"].file == str(folder / "model.safetensors")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert open_checkpoint("~/org/name", Path("/nowhere")).folder == folder
    monkeypatch.chdir(tmp_path / "org")
    assert open_checkpoint("name").folder == folder
    (tmp_path / "a+b").mkdir()
    save_file({"x": torch.ones(3)}, tmp_path / "a+b" / "model.safetensors")
    assert open_checkpoint("a+b", tmp_path).tensors


def test_opening_loads_neither_torch_nor_the_hub_library(tmp_path: Path) -> None:
    torch.save({"x": torch.ones(3)}, tmp_path / "m.bin")
    code = (
        "import sys; from pcb_ray.files.checkpoint import open_checkpoint; open_checkpoint(sys.argv[1]);"
        "print(sorted({'torch', 'huggingface_hub', 'safetensors', 'ray'} & sys.modules.keys()))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "m.bin")]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "[]\n"


def test_a_model_of_30_shards_and_140_gb_opens_in_a_fraction_of_a_second_and_little_memory(tmp_path: Path) -> None:
    names = [f"model.layers.{i // 9}.part{i % 9}.weight" for i in range(723)]
    weight_map = {}
    for shard in range(30):
        file = f"model-{shard + 1:05}-of-00030.safetensors"
        mine = names[shard::30]
        header = safetensors_header([(name, "BF16", (8192, 11900)) for name in mine], {"format": "pt"})
        with open(tmp_path / file, "wb") as out:
            out.write(header)
            out.truncate(len(header) + len(mine) * 8192 * 11900 * 2)
        weight_map |= dict.fromkeys(mine, file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    begin = time.perf_counter()
    assert len(open_checkpoint(str(tmp_path)).tensors) == 723
    assert time.perf_counter() - begin < 1
    tracemalloc.start()
    checkpoint = open_checkpoint(str(tmp_path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4_000_000
    assert sum(tensor.nbytes for tensor in checkpoint.tensors.values()) == 723 * 8192 * 11900 * 2


# ------------------------------------------------------------------------------------------- refusing what is wrong


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (b"", ["wanted a safetensors file, of at least 10 bytes, found 0 bytes"]),
        (b"\x02\0\0\0\0\0\0", ["of at least 10 bytes, found 7 bytes"]),
        (framed("{}", length=3), ["wanted a header of 3 bytes, found 2 bytes after"]),
        (framed("{}", length=2**63 + 5), [f"wanted a header of {2**63 + 5} bytes, found 2 bytes after"]),
        (framed("[]"), ["starts with b'{', found b'['"]),
        (framed(""), ["starts with b'{', found b''"]),
        (framed(b'{"a\xff": 1}'), ["wanted UTF-8, found something else at byte 3"]),
        (framed('{"a": }'), ["wanted JSON, found"]),
        (framed('{"a": NaN}'), ["wanted JSON, found", "NaN"]),
        (framed('{"a": ' + "9" * 5000 + "}"), ["wanted JSON, found"]),
        (framed('{"a":' + "[" * 100_000 + "]" * 100_000 + "}"), ["nested too deeply"]),
        (framed('{"a":' * 5_000 + "1" + "}" * 5_000), ["nested too deeply"]),
        (framed('{"a":1,"a":2}'), ["wanted one 'a', found several"]),
        (framed({"__metadata__": {"step": 3}}), ["__metadata__: wanted texts by name, found {'step': 3}"]),
        (framed({"__metadata__": ["x"]}), ["__metadata__: wanted texts by name, found ['x']"]),
        (framed({"a": 3}), ["tensor 'a': wanted dtype, shape and data_offsets, found 3"]),
        (framed({"a": {"dtype": "F32", "shape": [1]}}), ["tensor 'a': wanted dtype, shape and data_offsets, found {"]),
        (framed({"a": entry(0, 4, dtype=7)}, b"1234"), ["tensor 'a': wanted a dtype such as 'BF16', found 7"]),
        (framed({"a": entry(0, 4, dtype="F33")}, b"1234"), ["found 1 tensors ('a') of 'F33', not a known dtype", "BF16"]),
        (framed({"a": entry(0, 4, dtype="F8_E4M3", shape=[4])}, b"1234"), ["'a'", "'F8_E4M3'", "quantised"]),
        (framed({"a": entry(0, 4, dtype="F4", shape=[8])}, b"1234"), ["'F4'", "quantised"]),
        (framed({"a": entry(0, 8, dtype="C64", shape=[1])}, b"12345678"), ["'C64'", "complex"]),
        (framed({"a": entry(0, 4, shape=[True])}, b"1234"), ["wanted a shape of at most 64 sizes, found [True]"]),
        (framed({"a": entry(0, 4, shape=[1.0])}, b"1234"), ["a shape of at most 64 sizes, found [1.0]"]),
        (framed({"a": entry(0, 4, shape=[-1])}, b"1234"), ["a shape of at most 64 sizes, found [-1]"]),
        (framed({"a": entry(0, 4, shape=[2**64])}, b"1234"), ["a shape of at most 64 sizes, found [18446744073709551616]"]),
        (framed({"a": entry(0, 4, shape=[1] * 65)}, b"1234"), ["at most 64 sizes"]),
        (framed({"a": entry(0, 0, shape=[2**62] * 64)}), ["bytes for F32 [46116", "found 0 between data_offsets"]),
        (framed({"a": entry(0, 4, shape="1")}, b"1234"), ["a shape of at most 64 sizes, found '1'"]),
        (framed({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}}, b"1234"),
         ["begin and end as data_offsets, found [0, 4, 8]"]),
        (framed({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, "4"]}}, b"1234"),
         ["wanted begin and end as data_offsets, found [0, '4']"]),
        (framed({"a": entry(0, 4, shape=[2])}, b"1234"), ["wanted 8 bytes for F32 [2], found 4 between data_offsets [0, 4]"]),
        (framed({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}, b"1234"), ["found -4 between data_offsets [4, 0]"]),
        (framed({"a": entry(0, 8), "b": entry(4, 12)}, b"123456781234"),
         ["'b'", "at byte 8", "where tensor 'a' ends, found byte 4: overlapping"]),
        (framed({"a": entry(0, 4), "b": entry(8, 12)}, b"123456781234"),
         ["'b'", "at byte 4", "where tensor 'a' ends, found byte 8: a hole"]),
        (framed({"a": entry(4, 8)}, b"12345678"), ["'a': wanted it to begin at byte 0 of the data, found byte 4: a hole"]),
        (framed({"a": entry(0, 8)}, b"1234567"), ["wanted 8 bytes of data, as in the header, found 7: cut off"]),
        (framed({"a": entry(0, 4)}, b"12345"),
         ["wanted 4 bytes of data, as in the header, found 5: the rest belongs to no tensor"]),
        (framed({"a\x1b[2J": entry(0, 4)}, b"1234"), ["control characters"]),
        (framed('{"\\ud800": {"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', b"1234"), ["not Unicode"]),
        (framed({}), ["wanted tensors, found none at all"]),
        (framed({"m.lora_A.weight": entry(0, 4)}, b"1234"), ["LoRA adapter", "m.lora_A.weight"]),
        (framed({"m.qweight": entry(0, 4, dtype="I32")}, b"1234"), ["quantised by GPTQ or AWQ", "m.qweight"]),
        (b"PK\x03\x04 and more of a zip", ["zip archive", ".bin"]),
        (b"GGUF\x03\0\0\0 and so on", ["GGUF"]),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", ["git-lfs pointer", "git lfs pull"]),
        (b"<!DOCTYPE html><html>404</html>", ["web page"]),
    ],
)  # fmt: skip
def test_a_wrong_safetensors_file_is_refused_with_what_was_found(tmp_path: Path, content: bytes, parts: list[str]) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(content)
    begin = time.perf_counter()
    problem_of(path, str(path), *parts)
    assert time.perf_counter() - begin < 1


def test_a_header_beyond_the_format_s_limit_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(framed("{", length=100_000_001))
    os.truncate(path, 200_000_000)
    tracemalloc.start()
    problem_of(path, "100000001", "100000000")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000


def test_all_that_is_wrong_in_a_file_is_told_and_a_wrecked_one_stays_short(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(framed({"a": 1, "b": entry(0, 4, dtype=2), "c": entry(0, 4, dtype="F8_E5M2", shape=[4])}))
    assert [next(name for name in "abc" if f"'{name}'" in problem) for problem in problems_of(path)] == ["a", "b", "c"]
    path.write_bytes(framed({str(i): 1 for i in range(1000)}))
    assert len(problems_of(path)) == 100


def test_the_problems_of_all_files_of_a_model_are_told_at_once(tmp_path: Path) -> None:
    shards = {f"{name}.safetensors": {name: torch.ones(3)} for name in "abcd"}
    write_shards(tmp_path, shards)
    (tmp_path / "modules.json").write_text("{}")
    (tmp_path / "a.safetensors").unlink()
    (tmp_path / "b.safetensors").write_bytes(b"junk")
    (tmp_path / "c.safetensors").write_bytes((tmp_path / "d.safetensors").read_bytes())
    problems = problems_of(tmp_path)
    for part in ("a.safetensors: wanted a file, found none",
                 "b.safetensors: wanted a safetensors file, of at least 10 bytes, found 4",
                 "modules.json: wanted a list"):  # fmt: skip
        assert sum(part in problem for problem in problems) == 1, (part, problems)
    assert len(problems) == 3


# --- the index is the authority ---------------------------------------------------------------------------------------------------


def indexed(folder: Path, shards: dict[str, dict[str, torch.Tensor]], weight_map: dict[str, str], **config: object) -> Path:
    """A model of these files whose index says something else than they do."""
    folder.mkdir(exist_ok=True)
    for file, tensors in shards.items():
        save_file(tensors, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_an_entry_that_no_file_holds_is_a_note_where_the_model_can_do_without(tmp_path: Path) -> None:
    shards = {"one.safetensors": {f"model.layers.{k}.w": torch.ones(2) for k in range(2)}}
    named = dict.fromkeys(shards["one.safetensors"], "one.safetensors")
    for lost in ("mtp.fc.weight", "model.mtp.fc.weight", "lm_head.weight", "model.layers.2.w"):
        folder = indexed(tmp_path, shards, {**named, lost: "one.safetensors"}, num_hidden_layers=2)
        (note,) = open_checkpoint(str(folder)).notes
        assert f"names 1 tensors that no file holds: they are taken for no part of the model ('{lost}')" in note
        assert open_checkpoint(str(folder)).tensors.keys() == named.keys()
    for config in ({"num_hidden_layers": 3}, {"text_config": {"num_hidden_layers": 3}}, {}):
        folder = indexed(tmp_path, shards, {**named, "model.layers.2.w": "one.safetensors"}, **config)
        problem_of(folder, "wanted all tensors that it names, found 1 of them ('model.layers.2.w') in no file")


def test_an_entry_of_the_model_itself_that_no_file_holds_tells_that_it_is_not_whole(tmp_path: Path) -> None:
    shards = {"one.safetensors": {f"model.layers.{k}.w": torch.ones(2) for k in range(2)}}
    named = dict.fromkeys(shards["one.safetensors"], "one.safetensors")
    for lost in ("model.norm.weight", "model.embed_tokens.weight"):
        folder = indexed(tmp_path, shards, {**named, lost: "one.safetensors"}, num_hidden_layers=2)
        problem_of(folder, f"wanted all tensors that it names, found 1 of them ('{lost}') in no file")
    config = {"audio_config": {"num_hidden_layers": 1}, "text_config": {"num_hidden_layers": 3}}
    problem_of(indexed(tmp_path, shards, {**named, "model.layers.2.w": "one.safetensors"}, **config), "found 1 of them")
    strangers = {f"module.{name}": file for name, file in named.items()}
    problem_of(indexed(tmp_path, shards, strangers), "index.json: wanted tensors of its files, found other names alone")


def test_of_a_tensor_in_several_files_that_counts_which_the_index_names(tmp_path: Path) -> None:
    shards = {"one.safetensors": {"x": torch.ones(2), "y": torch.ones(2)}, "overlay.safetensors": {"x": torch.zeros(2)}}
    folder = indexed(tmp_path, shards, {"x": "overlay.safetensors", "y": "one.safetensors"})
    found = open_checkpoint(str(folder))
    assert {name: Path(t.file).name for name, t in found.tensors.items()} == {"x": "overlay.safetensors", "y": "one.safetensors"}
    assert found.notes == ()


def test_a_tensor_that_the_index_does_not_name_is_ignored_with_a_note(tmp_path: Path) -> None:
    folder = indexed(tmp_path, {"one.safetensors": {"x": torch.ones(2), "old": torch.ones(2)}}, {"x": "one.safetensors"})
    found = open_checkpoint(str(folder))
    assert found.tensors.keys() == {"x"}
    assert "fewer than its files hold: these are taken for no part of the model ('old')" in found.notes[0]


def test_a_tensor_in_another_file_than_the_index_says_is_taken_from_there_with_a_note(tmp_path: Path) -> None:
    shards = {f"{name}.safetensors": {name: torch.ones(2)} for name in "ab"}
    folder = indexed(tmp_path, shards, {"a": "b.safetensors", "b": "a.safetensors"})
    found = open_checkpoint(str(folder))
    assert {name: Path(t.file).name for name, t in found.tensors.items()} == {"a": "a.safetensors", "b": "b.safetensors"}
    assert "names 2 tensors in another file than it says ('a', 'b')" in found.notes[0]
    shards["c.safetensors"] = {"a": torch.zeros(2), "c": torch.zeros(2)}
    folder = indexed(tmp_path, shards, {"a": "b.safetensors", "b": "a.safetensors", "c": "c.safetensors"})
    problem_of(folder, "'a': wanted it in b.safetensors, found it in 'a.safetensors', 'c.safetensors'")


def test_of_a_storage_with_several_names_those_count_that_the_index_names(tmp_path: Path) -> None:
    embedding = torch.randn(4, 2)
    torch.save({"a": embedding, "b": embedding, "c": embedding, "d": torch.ones(2)}, tmp_path / "one.bin")
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": dict.fromkeys("bcd", "one.bin")}))
    found = open_checkpoint(str(tmp_path))
    assert (found.tensors.keys(), found.aliases) == ({"b", "d"}, {"c": "b"})


def test_states_of_an_optimizer_are_no_model(tmp_path: Path) -> None:
    for name in ("state.exp_avg.w", "optimizer.state.w", "exp_avg_sq"):
        save_file({"w": torch.ones(2), name: torch.ones(2)}, tmp_path / "model.safetensors")
        problem_of(tmp_path, "wanted tensors of a model, found states of an optimizer among them", "save_pretrained")
    save_file({"exp_average.w": torch.ones(2), "myoptimizer": torch.ones(2)}, tmp_path / "model.safetensors")
    open_checkpoint(str(tmp_path))


@pytest.mark.parametrize(
    ("index", "parts"),
    [
        (b"", ["wanted JSON, found"]),
        (b"[1]", ["wanted a weight_map from tensor names to files, found none"]),
        (b"{}", ["wanted a weight_map from tensor names to files, found none"]),
        (b'{"weight_map": {}}', ["wanted a weight_map from tensor names to files, found none"]),
        (b'{"weight_map": ["one.safetensors"]}', ["wanted a weight_map from tensor names to files, found none"]),
        (b'{"weight_map": {"x": 3}}', ["'x': wanted the name of its file, found 3"]),
        (b'{"weight_map": {"x": "../one.safetensors"}}',
         ["wanted shards in its own folder or below it, found '../one.safetensors'"]),
        (b'{"weight_map": {"x": "/etc/one.safetensors"}}', ["found '/etc/one.safetensors'"]),
        (b'{"weight_map": {"x": "a/../../one.safetensors"}}', ["found 'a/../../one.safetensors'"]),
        (b'{"weight_map": {"x": "a\\\\one.safetensors"}}',
         ["one.safetensors", "wanted shards in its own folder or below it, found"]),
        (b'{"weight_map": {"x": "one.safetensors\\u0000"}}', ["wanted shards in its own folder or below it, found"]),
        (b'{"weight_map": {"x": "\\ud800.safetensors"}}', ["wanted shards in its own folder or below it, found"]),
        (b'{"weight_map": {"x": ""}}', ["wanted shards in its own folder or below it, found"]),
        (b'{"weight_map": {"x": "one.py"}}', ["wanted .safetensors files, found 'one.py'"]),
        (b'{"weight_map": {"x": "one.safetensors", "x": "one.safetensors"}}', ["wanted one 'x', found several"]),
        (b'{"weight_map": {"x": "gone.safetensors"}}', ["gone.safetensors: wanted a file, found none"]),
        (b'{"weight_map": ' + b"[" * 50_000, ["nested too deeply"]),
    ],
)  # fmt: skip
def test_a_wrong_index_is_refused(tmp_path: Path, index: bytes, parts: list[str]) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"x": torch.ones(3)}, folder / "one.safetensors")
    save_file({"x": torch.ones(3)}, tmp_path / "one.safetensors")
    save_file({"y": torch.ones(3), "z": torch.ones(3)}, folder / "two.safetensors")
    (folder / "model.safetensors.index.json").write_bytes(index)
    problem_of(folder, str(folder), *parts)


@pytest.mark.parametrize(
    ("files", "parts"),
    [
        ([], ["wanted model.safetensors or pytorch_model.bin", "found no file"]),
        (["config.json", "flax_model.msgpack"],
         ["wanted model.safetensors or pytorch_model.bin", "found 'config.json', 'flax_model.msgpack'"]),
        (["adapter_config.json", "adapter_model.safetensors"], ["LoRA adapter", "merge_and_unload"]),
        (["adapter_model.bin"], ["LoRA adapter"]),
        (["model-q4.gguf"], ["GGUF"]),
        (["a.safetensors", "b.safetensors"], ["wanted model.safetensors.index.json, found 2 .safetensors files"]),
        (["model-00001-of-00002.safetensors"], ["wanted model.safetensors.index.json, found 1 .safetensors files"]),
    ],
)  # fmt: skip
def test_a_folder_without_one_clear_set_of_weights_is_refused(tmp_path: Path, files: list[str], parts: list[str]) -> None:
    for name in files:
        (tmp_path / name).write_text("{}")
    problem_of(tmp_path, str(tmp_path), *parts)


def test_two_models_in_one_folder_are_refused_rather_than_one_chosen(tmp_path: Path) -> None:
    write_shards(tmp_path, {"one.safetensors": {"x": torch.ones(3)}})
    save_file({"x": torch.zeros(3)}, tmp_path / "model.safetensors")
    problem_of(tmp_path, "wanted one model, found both model.safetensors and model.safetensors.index.json")


@pytest.mark.parametrize(
    ("config", "parts"),
    [
        ("{", ["config.json", "wanted JSON, found"]),
        ("[1]", ["config.json: wanted a table of settings, found [1]"]),
    ],
)
def test_a_wrong_config_is_refused(tmp_path: Path, config: str, parts: list[str]) -> None:
    save_file({"x": torch.ones(3)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(config)
    problem_of(tmp_path, *parts)
    (tmp_path / "config.json").write_text('{"quantization_config": null, "x": Infinity}')
    assert open_checkpoint(str(tmp_path)).tensors


@pytest.mark.parametrize(
    ("source", "parts"),
    [
        ("", ["wanted a path or a Hub id, found"]),
        ("a\0b", ["wanted a path or a Hub id, found"]),
        ("a\ud800", ["wanted a path or a Hub id, found"]),
        ("s3://key:secret@bucket/model", ["model s3://bucket/model: wanted a URI without credentials"]),
        ("org/name+org/lora", ["LoRA adapter"]),
        ("nowhere", ["no file or folder", "nowhere", "org/name"]),
        ("./no/where", ["no file or folder"]),
        ("a/b/c", ["no file or folder"]),
        ("org/name.safetensors", ["no file or folder"]),
        ("~nobody-of-this-name/x", ["wanted a home folder, found no such user"]),
        ("x" * 5000, ["wanted to read it, found File name too long"]),
        ("notes.txt", ["'.txt'", ".safetensors"]),
        ("m.gguf", ["GGUF"]),
        ("adapter_model.safetensors", ["LoRA adapter"]),
        ("pipe.safetensors", ["wanted a regular file, found something else"]),
        ("folder.safetensors", ["wanted model.safetensors or pytorch_model.bin"]),
    ],
)  # fmt: skip
def test_a_source_that_names_no_model_is_refused(tmp_path: Path, source: str, parts: list[str]) -> None:
    for name in ("notes.txt", "m.gguf", "adapter_model.safetensors"):
        (tmp_path / name).write_text("{}")
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    problems = problems_of(source, relative_to=tmp_path)
    assert len(problems) == 1
    assert all(part in problems[0] for part in parts), problems
    assert "secret" not in problems[0]


def test_a_folder_s_file_that_is_a_pipe_or_unreadable_is_refused_without_waiting(tmp_path: Path) -> None:
    write_shards(tmp_path, {"one.safetensors": {"x": torch.ones(3)}})
    (tmp_path / "one.safetensors").unlink()
    os.mkfifo(tmp_path / "one.safetensors")
    problem_of(tmp_path, "one.safetensors: wanted a regular file, found something else")
    (tmp_path / "one.safetensors").unlink()
    (tmp_path / "one.safetensors").symlink_to("one.safetensors")
    problem_of(tmp_path, "one.safetensors: wanted to read it, found Too many levels of symbolic links")


# ------------------------------------------------------------------------------------------- wrong .bin files


class Payload:
    """An object whose unpickling makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def archive_of(pickled: bytes, **records: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("m/data.pkl", pickled)
        for name, data in records.items():
            archive.writestr(f"m/{name.replace('_', '/')}", data)
    return out.getvalue()


def test_a_pickle_that_would_run_code_is_refused_and_not_run(tmp_path: Path) -> None:
    trap, mark = tmp_path / "m.bin", tmp_path / "ran"
    torch.save({"x": torch.ones(3), "y": Payload(mark)}, trap)
    torch.load(trap, weights_only=False)
    assert mark.exists(), "the trap works"
    mark.unlink()
    problem_of(trap, str(trap), "never run")
    codes = [b"cos\nsystem\n", b"\x8c\x02os\x8c\x06system\x93", b"(S'touch x'\nios\nsystem\n", b"\x82\x01"]
    # torch.load(weights_only=True) calls the first three
    codes += [b"cbuiltins\nbytearray\n", b"c_codecs\nencode\n", b"ctorch\nFloatTensor\n", b"cbuiltins\neval\n"]
    for code in codes:
        trap.write_bytes(archive_of(b"\x80\x04" + code + b"\x8c\x01x\x85R."))
        assert problems_of(trap)
    assert not mark.exists()


def test_bin_contents_that_are_not_plain_tensors_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "m.bin"
    square = torch.arange(9.0).view(3, 3)
    torch.save(
        {"epoch": 3, "ok": square, "turned": square.t(), "wide": square[:, :2], "list": [square], "s": "text",
         "inner": {"w": square}, "complex": torch.ones(2, dtype=torch.complex64),
         "small": torch.ones(2).to(torch.float8_e4m3fn), "spread": torch.ones(1).expand(3), "bad\n": square,
         "negated": torch._neg_view(square), "__metadata__": square},
        path,
    )  # fmt: skip
    problems = problems_of(path)
    expected = {"__metadata__": "which safetensors keeps for itself", "epoch": "int",
                "turned": "not contiguous", "wide": "not contiguous", "list": "list", "s": "str",
                "inner": "dict", "complex": "complex", "small": "quantised", "spread": "not contiguous",
                "bad\\n": "control characters", "negated": "{'neg': True}"}  # fmt: skip
    assert len(problems) == len(expected)
    for name, part in expected.items():
        assert sum(f"'{name}'" in problem and part in problem for problem in problems) == 1, (name, problems)


def test_bin_files_that_cannot_be_read_in_place_are_refused_with_the_fix(tmp_path: Path) -> None:
    path = tmp_path / "m.bin"
    tensors = {"x": torch.ones(100)}
    torch.save(tensors, path, _use_new_zipfile_serialization=False)
    problem_of(path, "before torch 1.6", "safetensors")
    path.write_bytes(pickle.dumps({"x": 1}))
    assert problems_of(path)
    path.write_bytes(save(tensors))
    problem_of(path, "name it .safetensors")
    path.write_bytes(b"")
    problem_of(path, "wanted a file of torch.save, found something else")
    torch.save(tensors, path)
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    for change, part in (
        ({"compression": zipfile.ZIP_DEFLATED}, "wanted records that can be read in place, found"),
        ({"m/byteorder": b"big"}, "wanted little-endian data, found another byte order"),
        ({"m/data/0": b"short"}, "wanted its data up to byte 400, found 5 in the file, of the 400 that its storage should have"),
        ({"m/data/0": None}, "wanted storage '0' in the file, found none"),
        ({"m/data.pkl": None}, "with one data.pkl, found another zip archive"),
        ({"n/data.pkl": b""}, "with one data.pkl, found another zip archive"),
        ({"m/data.pkl": b"\0" * 9_000_000}, "wanted at most 2000000 bytes, found 9000000 bytes"),
    ):
        with zipfile.ZipFile(path, "w", compression=change.pop("compression", zipfile.ZIP_STORED)) as archive:
            for name, data in (records | change).items():
                if data is not None:
                    archive.writestr(name, data)
        problem_of(path, str(path), part)
    torch.save([torch.ones(3)], path)
    problem_of(path, "wanted tensors by name, a state dict, found a value of type list")
    torch.save({3: torch.ones(3)}, path)
    problem_of(path, "wanted texts as names of tensors, found a value of type int")


@pytest.mark.parametrize(
    "pickled",
    [
        b"",
        b".",
        b"\x80\x02",
        b"\x80\x02}",
        b"\x80\x02(u.",
        b"\x80\x02}(X\x01\0\0\0xu.",
        b"\x80\x02}X\x01\0\0\0xX\x01\0\0\0ysu.",
        b"\x80\x02r\xff\xff\xff\x7f.",  # the C unpickler would make a memo of 2**31 entries
        b"\x80\x02}r\xff\xff\xff\x7fh\x05.",
        b"\x80\x02X\xff\xff\xff\x7fx.",
        b"\x80\x05\x96\xff\xff\xff\xff\xff\xff\xff\x7f.",
        b"\x80\x02\x8b\xff\xff\xff\x7f.",
        b"\x80\x02" + b"(" * 100_000 + b".",
        b"\x80\x02)" + b"\x85" * 300_000 + b".",
        b"\x80\x02)q\0" + b"h\0h\0\x86q\0" * 60 + b"}h\0Ns.",  # hashing such a key takes 2**60 steps, in torch.load too
        b"\x80\x02})" + b"\x85" * 300_000 + b"Ns.",  # hashing such a key overflows the stack, and ends torch.load's process
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}X\x04\0\0\0nameNsb.",  # attributes given to a function
        b"\x80\x02ccollections\nOrderedDict\n}\x85R.",
        b"\x80\x02ctorch.storage\nUntypedStorage\n\x8a\x06\0\0\0\0\0\x01\x85R.",
        b"\x80\x02}}(X\x01\0\0\0a)u.",
        b"\x80\x02)Q.",
        b"\x80\x02ctorch\nFloatStorage\n)R.",
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.",
        b"\x80\x02ccollections\nOrderedDict\n)\x81.",
        b"I" + b"9" * 10_000 + b"\n.",
    ],
    ids=range(25),
)
def test_a_hostile_pickle_is_refused_at_once_and_in_little_memory(tmp_path: Path, pickled: bytes) -> None:
    path = tmp_path / "m.bin"
    path.write_bytes(archive_of(pickled))
    begin = time.perf_counter()
    problem_of(path, str(path))
    assert time.perf_counter() - begin < 5


def test_dtypes_of_torch_that_cannot_be_merged_are_told_together_and_by_their_kind() -> None:
    known = {str(dtype).removeprefix("torch."): name for name, dtype in TORCH_DTYPES.items()}
    assert OF_TORCH.items() >= known.items()
    assert all(isinstance(getattr(torch, name), torch.dtype) for name in OF_TORCH)
    given = {
        "ok": torch.bfloat16,
        "e4": torch.float8_e4m3fn,
        "c": torch.complex64,
        "e4 too": torch.float8_e4m3fn,
        "q": torch.quint8,
    }
    names = {name: str(dtype).removeprefix("torch.") for name, dtype in given.items()}
    problems = dtype_problems("models[1]", {name: OF_TORCH.get(dtype, dtype) for name, dtype in names.items()})
    assert [problem.partition("found ")[2] for problem in problems] == [
        "2 tensors ('e4', 'e4 too') of 'F8_E4M3', quantised, which is not supported. Fix: load it with transformers and "
        "quantization_config=FineGrainedFP8Config(dequantize=True) or the like, call save_pretrained(FOLDER, "
        "save_original_format=False), and give that folder; or give the model that it was made from.",
        "1 tensors ('c') of 'C64', complex. Fix: split it into real tensors.",
        "1 tensors ('q') of 'quint8', not a known dtype. Fix: convert it to one of them.",
    ]
    assert all(GRAMMAR.fullmatch(problem) for problem in problems)
    assert dtype_problems("base", dict.fromkeys(known, "BF16")) == []


def test_a_header_with_a_name_that_readers_would_misread_is_never_written() -> None:
    for names in (["__metadata__"], ["a", "a"]):
        with pytest.raises(ValueError, match=rf"tensor '{names[-1]}'"):
            safetensors_header([(name, "F32", (1,)) for name in names], {})


def test_a_structure_as_large_as_allowed_takes_bounded_memory_whatever_it_holds(tmp_path: Path) -> None:
    paths = []
    for number, (head, unit) in enumerate([(b"", b"("), (b"}", b"\x94")]):  # stacks and memos, the worst of many tried
        paths.append(tmp_path / f"{number}.bin")
        paths[-1].write_bytes(archive_of(b"\x80\x02" + head + unit * 1_999_990 + b"."))
    code = (
        "import sys\nfrom pcb_ray.files.checkpoint import open_checkpoint\nfrom pcb_ray.errors import RequestError\n"
        "for path in sys.argv[1:]:\n    try:\n        open_checkpoint(path)\n    except RequestError as error:\n"
        "        print(len(error.problems))\n"
        "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    )
    done = subprocess.run([sys.executable, "-c", code, *map(str, paths)], capture_output=True, text=True, check=True, timeout=60)
    *problems, peak_kb = map(int, done.stdout.split())
    assert problems == [1] * len(paths)
    assert peak_kb < 400_000


def test_a_zip_directory_that_announces_gigabytes_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "m.bin"
    content = bytearray(archive_of(b"."))
    end = content.rfind(b"PK\x05\x06")
    content[end + 12 : end + 16] = (3_000_000_000).to_bytes(4, "little")
    with open(path, "wb") as out:
        out.write(bytes(content[:end]))
        out.truncate(3_500_000_000)
        out.seek(0, os.SEEK_END)
        out.write(bytes(content[end:]))
    tracemalloc.start()
    problem_of(path, "wanted a sound zip archive, found a damaged one")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000


# ------------------------------------------------------------------------------------------- writing

NAMES = st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=12).filter(lambda name: name != "__metadata__")
ENTRIES = st.lists(
    st.tuples(NAMES, st.sampled_from(sorted(DTYPE_BYTES)), st.lists(st.integers(0, 5), max_size=4).map(tuple)),
    max_size=8,
    unique_by=lambda item: item[0],
)


@settings(deadline=None, max_examples=200)
@given(ENTRIES, st.dictionaries(st.text(st.characters(exclude_categories=("Cs",))), st.text('añ漢\n"\\'), max_size=3))
def test_a_written_header_is_read_back_by_the_safetensors_library(
    tmp_path_factory: pytest.TempPathFactory,
    entries: list[tuple[str, str, tuple[int, ...]]],
    metadata: dict[str, str],
) -> None:
    header = safetensors_header(entries, metadata)
    assert len(header) % 8 == 0
    sizes = [math.prod(shape) * DTYPE_BYTES[dtype] for _, dtype, shape in entries]
    data = random.Random(0).randbytes(sum(sizes))
    parsed = dict(deserialize(header + data))
    assert parsed.keys() == {name for name, _, _ in entries}
    start = 0
    for (name, dtype, shape), size in zip(entries, sizes, strict=True):
        found = parsed[name]
        assert (found["dtype"], tuple(found["shape"])) == (dtype, shape)
        assert bytes(found["data"]) == data[start : start + size]
        start += size
    path = tmp_path_factory.getbasetemp() / "round.safetensors"
    path.write_bytes(header + data)
    tensors, read_metadata, raw = read_header(path)
    assert (raw, read_metadata) == (header, metadata)
    assert {(t.name, t.dtype, t.shape) for t in tensors.values()} == set(entries)
    assert all(stored_bytes(t) == bytes(parsed[t.name]["data"]) for t in tensors.values())
    with safe_open(path, "pt") as opened:
        assert (opened.metadata() or {}) == metadata


def test_a_file_written_atomically_is_whole_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    write_atomically(path, b"first")
    write_atomically(path, b"second")
    assert path.read_bytes() == b"second"
    mask = os.umask(0o022)
    os.umask(mask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~mask
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_atomically(path, bytes(1_000_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == b"second"
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.json"]
    with pytest.raises(FileNotFoundError):
        write_atomically(tmp_path / "none" / "out.json", b"")
    fsync_folder(tmp_path)


# ------------------------------------------------------------------------------------------- fuzzing


def fuzz_seeds() -> list[tuple[dict[str, Any], bytes]]:
    """Headers that are right, with their data."""
    torch.manual_seed(1)
    families = [
        {"a": torch.randn(3), "b": torch.randn(2, 2).bfloat16(), "c": torch.arange(5)},
        {"w": torch.empty(0, 3), "s": torch.tensor(2.0), "flags": torch.tensor([True, False, True, True])},
        {f"layers.{i}.weight": torch.randn(2, 2).half() for i in range(6)},
        {"only": torch.ones(8, dtype=torch.uint8)},
    ]
    seeds = []
    for metadata, tensors in zip([{"format": "pt"}, None, {"a": "b", "ö": "1"}, None], families, strict=True):
        content = save(tensors, metadata)
        stop = 8 + int.from_bytes(content[:8], "little")
        seeds.append((json.loads(content[8:stop]), content[stop:]))
    return seeds


def test_ten_thousand_mutated_headers_are_read_as_the_library_reads_them_or_refused(tmp_path: Path) -> None:
    rng = random.Random(20240607)
    seeds = fuzz_seeds()
    path = tmp_path / "m.safetensors"
    begin = time.perf_counter()
    read = refused = 0
    for round_ in range(10_000):
        header, data = rng.choice(seeds)
        raw = json.dumps(header, separators=rng.choice([(",", ":"), (", ", ": ")])).encode()
        kind = rng.random()
        if kind < 0.45:
            for _ in range(rng.choice([1, 1, 2, 3])):
                header = mutate_json(rng, header)
            content = framed(json.dumps(header), data)
        elif kind < 0.8:
            content = framed(mutate_bytes(rng, raw, json.dumps(rng.choice(seeds)[0]).encode()), data)
        elif kind < 0.95:  # the length, the data and their borders too
            content = mutate_bytes(rng, framed(raw, data), framed(*rng.choice(seeds)))
        else:  # what a reader must stand, and may accept
            rename = json.dumps({f"{key}\u00e9" if key[0] != "_" else key: value for key, value in header.items()})
            content = framed(rng.choice([raw + b" " * rng.randrange(9), b" " + raw, rename.encode()]), data)
        path.write_bytes(content)
        try:
            tensors = open_checkpoint(str(path)).tensors
        except RequestError as error:
            refused += 1
            assert_one_line_each(error)
            continue
        read += 1
        expected = dict(deserialize(content))  # raises where we were more lenient than the library
        assert tensors.keys() == expected.keys(), (round_, content)
        for name, found in expected.items():
            tensor = tensors[name]
            assert (tensor.dtype, list(tensor.shape)) == (found["dtype"], found["shape"]), (round_, content)
            assert content[tensor.start : tensor.stop] == bytes(found["data"]), (round_, content)
    assert time.perf_counter() - begin < 60
    assert min(read, refused) > 500, (read, refused)


@pytest.mark.parametrize("mutants", [1_000, pytest.param(10_000, marks=pytest.mark.very_slow)])
def test_mutated_indices_are_read_right_or_refused(tmp_path: Path, mutants: int) -> None:
    rng = random.Random(mutants)
    shards = {
        "one.safetensors": {"x": torch.ones(3), "y": torch.zeros(2)},
        "sub/two.safetensors": {"z": torch.ones(1)},
    }
    write_shards(tmp_path, shards)
    holds = {name: file for file, tensors in shards.items() for name in tensors}
    index = tmp_path / "model.safetensors.index.json"
    right = json.loads(index.read_bytes())
    read = 0
    for round_ in range(mutants):
        raw = json.dumps(mutate_json(rng, mutate_json(rng, right)) if round_ % 2 else right).encode()
        raw = raw if round_ % 2 else mutate_bytes(rng, raw, raw)
        index.write_bytes(raw)
        try:
            checkpoint = open_checkpoint(str(tmp_path))
        except RequestError:
            continue
        read += 1
        weight_map = json.loads(raw)["weight_map"]
        files = {*weight_map.values()}
        places = {name: Path(tensor.file).relative_to(tmp_path) for name, tensor in checkpoint.tensors.items()}
        assert places == {name: Path(holds[name]) for name in weight_map if holds.get(name) in files}, (round_, raw)
    assert mutants / 100 < read < mutants / 2


def test_a_thousand_mutated_bin_files_are_read_as_torch_reads_them_or_refused(tmp_path: Path) -> None:
    rng = random.Random(11)
    path = tmp_path / "m.bin"
    shared = torch.arange(6, dtype=torch.float32)
    torch.save({"a": shared, "b": shared[2:4], "c": torch.ones(3, dtype=torch.bfloat16), "d": shared}, path)
    right = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    begin = time.perf_counter()
    read = refused = torch_alone = 0
    for round_ in range(1_000):
        if round_ % 2:
            content = mutate_bytes(rng, right, right)
        else:  # a damaged structure in a sound archive
            out = io.BytesIO()
            changed = mutate_bytes(rng, records["m/data.pkl"], records["m/data.pkl"])
            with zipfile.ZipFile(out, "w") as archive:
                for name, data in (records | {"m/data.pkl": changed}).items():
                    archive.writestr(name, data)
            content = out.getvalue()
        path.write_bytes(content)
        try:
            checkpoint = open_checkpoint(str(path))
        except RequestError as error:
            refused += 1
            assert_one_line_each(error)
            continue
        read += 1
        assert all(0 <= tensor.start <= tensor.stop <= len(content) for tensor in checkpoint.tensors.values())
        try:
            expected = torch.load(path, weights_only=True)
        except Exception:  # torch alone minds damage in records that hold no tensor, and has no one error for it
            torch_alone += 1
            continue
        assert_holds(checkpoint, next(iter(expected.values())) if len(expected) == 1 else expected)
    assert time.perf_counter() - begin < 30
    assert min(read, refused) > 50, (read, refused)
    assert torch_alone < 0.02 * (read + refused)


def test_the_safetensors_library_is_a_strict_oracle() -> None:
    for wrong in (framed({"a": entry(4, 8)}, b"12345678"), framed({"a": entry(0, 4)}, b"12345")):
        with pytest.raises(SafetensorError):
            deserialize(wrong)
