"""Secrets are planted wherever a user has them, and looked for in everything that a run leaves behind."""

from __future__ import annotations

import shutil
import signal
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import families
import pytest
import yaml
from clusters import Head, Run, await_that, head_node, pcb_ray, running, state_of
from families import Family, MakeFamily
from object_servers import ObjectServer, s3_server
from test_remote import put_all

from pcb_ray.checks import without_secrets
from pcb_ray.cli import main

IN_URIS = "planted-in-a-uri"
PLANTED = {
    "AWS_SECRET_ACCESS_KEY": "planted/aws+0123456789abcdef",
    "AWS_SESSION_TOKEN": "planted-session-0123456789",
    "HF_TOKEN": "hf_planted0123456789planted0123456789",
    "AZURE_STORAGE_SAS_TOKEN": "sv=2024-11-04&sig=planted-signature",
    "WANDB_API_KEY": "planted-wandb-0123456789abcdef",
}
OF_CLIENT = {name: value.replace("planted", "carried") for name, value in PLANTED.items()}
"""What the machine has that submits: none of it is for the cluster."""

# What it raises quotes all secrets of its node, as errors of clients may.
QUOTING = """
import os

def quote(where):
    names = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "HF_TOKEN", "AZURE_STORAGE_SAS_TOKEN", "WANDB_API_KEY")
    told = " ".join(os.environ.get(name, "") for name in names)
    raise RuntimeError(f"{where}: quoted s3://me:planted-in-a-uri@bucket/x az://c/x?se=1&sig=planted-in-a-uri {told}")
"""


def secrets_in(data: bytes) -> list[str]:
    known = [*PLANTED.values(), *OF_CLIENT.values(), IN_URIS]
    known += [value.partition("sig=")[2] for value in known if "sig=" in value]
    return sorted({one for one in known if one.encode() in data})


def assert_clean(told: str, *folders: Path) -> None:
    assert not secrets_in(told.encode()), told
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file() and path.suffix != ".safetensors"]
    assert files or not folders
    found = {str(path): secrets for path in files if (secrets := secrets_in(path.read_bytes()))}
    assert not found


# --- what is refused --------------------------------------------------------------------------------------------------------------

URIS = [
    f"s3://me:{IN_URIS}@bucket/model",
    f"az://container/model?sv=1&sig={IN_URIS}",
    f"abfs://container:{IN_URIS}@account.dfs.core.windows.net/model",
    f"abfss://container@account.dfs.core.windows.net/model?sig={IN_URIS}",
    f"gs://bucket/model?X-Goog-Signature={IN_URIS}",
    f"hf://me:{IN_URIS}@org/name",
    f"http://me:{IN_URIS}@server/model",
]


@pytest.mark.parametrize("uri", URIS)
def test_a_secret_in_a_uri_is_not_shown(
    uri: str, family: MakeFamily, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    one = family(2)
    wrong = {
        "base": one.recipe_file("base.yaml", base_model=uri),
        "model": one.recipe_file("model.yaml", models=[uri, *one.recipe()["models"]]),
        "tokenizer": one.recipe_file("tokenizer.yaml", tokenizer_source=uri),
        "storage": one.recipe_file("storage.yaml", storage={"s3": {"endpoint": uri}}),
        "exclude": one.recipe_file("exclude.yaml", exclude=[uri], dtype=uri, merge_method=uri),
    }
    for path in wrong.values():
        for command in (["plan", str(path), "-v"], ["merge", str(path), str(one.folder / "out"), "-v"]):
            assert main(command) == 2
            assert main(["submit", *command, "--address", "http://127.0.0.1:1"]) == 2
    right = str(one.recipe_file())
    for command in (["merge", right, uri, "-v"], ["verify", uri], ["submit", right, uri], ["merge", right, "o", "--address", uri]):
        assert main(command) != 0
    assert_clean("".join(capfd.readouterr()) + without_secrets(caplog.text))
    assert not (one.folder / "out").exists()


# --- what runs leave --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server() -> Iterator[ObjectServer]:
    with s3_server() as server:
        yield server


@pytest.fixture(scope="module")
def head(server: ObjectServer) -> Iterator[Head]:
    with head_node(cpus=2, PCB_RAY_KERNEL="torch", **{**server.environment, **PLANTED}) as head:
        yield head


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return Family(tmp_path_factory.mktemp("secrets") / "family", *families.fine_tuned(2, scale=200))


def variables(head: Head, secrets: Mapping[str, str]) -> dict[str, str]:
    ray = {name: value for name, value in head.environment.items() if name.startswith("RAY_") and name != "RAY_AUTH_TOKEN_PATH"}
    return {**ray, "RAY_AUTH_TOKEN": head.token, **secrets}


def jobs_of(head: Head) -> str:
    request = urllib.request.Request(f"{head.url}/api/jobs/", headers={"Authorization": f"Bearer {head.token}"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return str(answer.read().decode())


@pytest.mark.very_slow
@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_nothing_that_a_job_leaves_holds_a_secret(head: Head, server: ObjectServer, one: Family, tmp_path: Path) -> None:
    """Merges that end well, fail and are interrupted, a search whose evaluator fails, all of models in a store, with -v."""
    folder, outs = tmp_path / "recipes", tmp_path / "outs"
    folder.mkdir()
    outs.mkdir()
    (folder / "quoting.py").write_text(QUOTING)
    shutil.copy(Path(__file__).with_name("evaluators_of_tests.py"), folder / "near_things.py")
    (folder / "own.py").write_text(
        "from quoting import quote\nfrom pcb_ray.methods import Method\n"
        "own = Method(name='own', merge=lambda block, known, settings: quote('merge'))\n"
    )
    (folder / "near.py").write_text(
        "from near_things import KnowsBase\nfrom quoting import quote\n\nclass Near(KnowsBase):\n    count = 0\n\n"
        "    def score(self, split):\n        found = super().score(split)\n        Near.count += found['near'] != self.of_base\n"
        "        return quote('score') if found['near'] != self.of_base and Near.count % 3 == 0 else found\n"
    )
    at = put_all(server, one.folder, "secrets")
    recipe: dict[str, Any] = one.recipe(models=[f"{at}/model0", f"{at}/model1"])
    search = {"evaluator": {"near.py:Near": {"target": str(one.folder / "model1" / "model.safetensors")}}, "metric": "near"}
    search |= {"budget": 9, "population": 3, "concurrency": 1}
    wanted = {
        "good": (recipe, "merge", 0),
        "bad": (recipe | {"merge_method": "own.py:own"}, "merge", 2),
        "best": (recipe | {"search": search}, "search", 0),
    }
    told = ""
    client = variables(head, OF_CLIENT)

    def keep(run: Run, code: int) -> None:
        nonlocal told
        told += run.text
        assert run.process.returncode == code, run.text

    for name, (asked, command, code) in wanted.items():
        path = folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(asked))
        keep(pcb_ray("submit", command, path, outs / name, "-v", "--address", head.url, env=client), code)
    keep(pcb_ray("submit", "verify", outs / "good", "-v", "--address", head.url, env=client), 0)
    assert "quoted s3://***@bucket/x" in told, "the errors are told"

    joined = variables(head, {**server.environment, **PLANTED})
    with running("merge", folder / "good.yaml", outs / "cut", "-v", "--address", head.address, env=joined) as run:
        await_that("something is kept", lambda: "thresholds" in kept(state_of(outs / "cut")) or run.process.poll() is not None)
        run.send(signal.SIGINT)
        run.finish()
        told += run.text
    assert kept(state_of(outs / "cut")), run.text
    assert any((outs / "best").rglob("result.json")), "Tune's experiment is there"
    assert any("quoted" in path.read_text(errors="replace") for path in (outs / "best").rglob("*.json"))

    assert head.token not in told + jobs_of(head)
    assert_clean(told + jobs_of(head), outs)
    sent = (".zip", "quoting.py")  # the job's own files, where the test has written such a URI
    logs = [path for path in head.folder.rglob("*") if path.is_file() and not path.name.endswith(sent) and path.name != "token"]
    assert any(path.name.startswith("job-driver-") for path in logs)
    assert {str(path): found for path in logs if (found := secrets_in(path.read_bytes()))} == {}
    assert not [path for path in logs if head.token.encode() in path.read_bytes()]


def kept(folder: Path) -> str:
    """What the state of an unfinished merge holds."""
    file = folder / "state.json"
    return file.read_text() if file.is_file() else ""
