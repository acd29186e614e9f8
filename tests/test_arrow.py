"""Models that pyarrow's filesystems open: here what fsspec opens for it, since `hdfs://` takes a cluster of its own."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from families import MakeFamily, merge_locally
from test_remote import memory, merged_from, remote_recipe  # noqa: F401 - a fixture

from pcb_ray import Recipe, RequestError
from pcb_ray.errors import InputError
from pcb_ray.files import remote
from pcb_ray.files.arrow import ArrowFiles
from pcb_ray.files.room import Room
from pcb_ray.files.store import Range
from pcb_ray.files.stores import open_store
from pcb_ray.planning import plan


@pytest.mark.usefixtures("memory")
def test_a_merge_gives_the_same_bytes_and_fetches_each_once(
    family: MakeFamily, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "PIECE", 1 << 16)
    one = family(3, scale=64, shards=2)
    made = plan(remote_recipe(f"fsspec+file://{one.folder}", 3))
    assert made.is_remote
    wanted = merge_locally(plan(one.recipe()), tmp_path / "wanted").files
    found, traffic = merged_from(made, tmp_path / "out", Room("run", memory=1 << 30))
    assert found == wanted
    sizes = [file.size for one in made.inputs for file in one.files]
    probes = 2  # each owner looks whether it can read there
    assert made.sweep_bytes <= traffic.fetched <= sum(sizes) + probes


def test_one_file_is_a_model_too(family: MakeFamily) -> None:
    one = family(1, scale=16)
    at = f"fsspec+file://{one.folder}"
    models = [{"model": f"{at}/model0/model.safetensors"}]
    assert plan({"base_model": f"{at}/base", "models": models}).D == plan(one.recipe()).D


def written_later(file: Path) -> None:
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 10**9))


def longer(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"x")


@pytest.mark.parametrize("change", [written_later, longer])
def test_a_file_that_becomes_another_ends_the_run(family: MakeFamily, tmp_path: Path, change: Callable[[Path], None]) -> None:
    one = family(1, scale=16)
    made = plan(remote_recipe(f"fsspec+file://{one.folder}", 1))
    change(one.folder / "model0" / "model.safetensors")
    with pytest.raises(InputError, match=r"model0/model.safetensors: wanted the file as it was when the run began"):
        merged_from(made, tmp_path / "out")


def test_one_that_changes_while_its_header_is_read_is_told(family: MakeFamily, monkeypatch: pytest.MonkeyPatch) -> None:
    one, whole = family(1, scale=16), ArrowFiles.get

    def get(self: ArrowFiles, uri: str, *arguments: Any) -> Any:
        found = whole(self, uri, *arguments)
        written_later(Path(uri.removeprefix("fsspec+file://")))
        return found

    monkeypatch.setattr(ArrowFiles, "get", get)
    monkeypatch.setattr("pcb_ray.files.checkpoint._FIRST_BYTES", 64)
    with pytest.raises(RequestError, match="found another: it was changed meanwhile"):
        plan(remote_recipe(f"fsspec+file://{one.folder}", 1))


def test_what_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"none/base: wanted a model, found no object whose name begins so"):
        plan(remote_recipe(f"fsspec+file://{tmp_path}/none", 1))
    with pytest.raises(FileNotFoundError):
        open_store().stamp(f"fsspec+file://{tmp_path}")
    with pytest.raises(RequestError, match="wanted to read it, found .*nonesuch.*pip install pyarrow"):
        plan(remote_recipe("fsspec+nonesuch://host/a", 1))
    store = open_store()
    (tmp_path / "short").write_bytes(b"12345")
    with pytest.raises(InputError, match="wanted data up to byte 9, found its end at byte 5"):
        store.expect([Range(f"fsspec+file://{tmp_path}/short", 2, 9)], exact=True)
        store.read(f"fsspec+file://{tmp_path}/short", 2, memoryview(bytearray(7)))


@pytest.mark.skipif("CLASSPATH" in os.environ or "HADOOP_HOME" in os.environ, reason="Hadoop may be here")
@pytest.mark.parametrize("at", ["hdfs://namenode:8020/models", "hdfs:///models", "viewfs://cluster/models"])
def test_hdfs_without_its_client_is_told_with_what_it_takes(at: str) -> None:
    with pytest.raises(RequestError) as error:
        plan(remote_recipe(at, 1))
    assert any(f"{at}/base: wanted to read it, found " in one and "JAVA_HOME, HADOOP_HOME" in one for one in error.value.problems)


def test_a_password_in_a_uri_is_refused_and_not_shown() -> None:
    with pytest.raises(RequestError, match="wanted a URI without credentials") as error:
        Recipe.from_dict(remote_recipe("hdfs://me:secret-word@host/models", 1))
    assert "secret-word" not in str(error.value)
