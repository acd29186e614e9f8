"""What `pip install` brings is whole: a wheel, built from the files of the repository, merges in an environment of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import families
import pytest
import torch
from clusters import receipt_of

import pcb_ray

pytestmark = pytest.mark.very_slow

ROOT = Path(__file__).parent.parent
MERGE = """
import sys
import torch, pcb_ray
from pcb_ray.kernels.native import load_native
base, *models = (torch.load(path) for path in sys.argv[2:])
torch.save(pcb_ray.merge_state_dicts(base, models, density=0.2), sys.argv[1])
print(pcb_ray.__file__, load_native() is not None)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines():
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(built), str(source)]
    subprocess.run(command, check=True)
    (path,) = built.glob("*.whl")
    return path


def test_a_wheel_holds_every_module(wheel: Path) -> None:
    held = set(zipfile.ZipFile(wheel).namelist())
    wanted = {str(path.relative_to(ROOT)) for path in (ROOT / "pcb_ray").rglob("*.py")} | {"pcb_ray/py.typed"}
    assert wanted <= held, wanted - held
    assert not [name for name in held if name.startswith(("tests", "docs", "examples"))]
    if shutil.which("gcc"):
        assert any(name.startswith("pcb_ray/kernels/_native") and name.endswith(".so") for name in held)


def test_a_wheel_merges_in_an_environment_of_its_own(wheel: Path, tmp_path: Path) -> None:
    """Every module can be imported; a plan, a merge in memory, and one on a Ray of its own."""
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", str(wheel)], check=True)
    # Its libraries are those of these tests; the package that the tests run on is not among them.
    (site,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib"))

    def told(*command: object) -> str:
        """What a command prints, away from the files of the repository."""
        alone = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"RAY_AUTH_MODE": "token"}
        done = subprocess.run(list(map(str, command)), env=alone, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    names = [name.removesuffix(".py").replace("/", ".") for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".py")]
    told(python, "-c", "".join(f"import {name}\n" for name in names if not name.endswith("__main__")))
    family = families.Family(tmp_path / "family", *families.fine_tuned(2))
    recipe = family.recipe_file(parameters={"density": 0.2})
    assert json.loads(told(python.with_name("pcb-ray"), "plan", recipe, "--json"))["N"] == 2
    paths = [tmp_path / f"{name}.pt" for name in ("base", "model0", "model1")]
    for path, state in zip(paths, (family.base, *family.models), strict=True):
        torch.save(state, path)
    out = tmp_path / "merged.pt"
    where, native = told(python, "-c", MERGE, out, *paths).split()
    assert Path(where).is_relative_to(tmp_path)
    assert native == str(shutil.which("gcc") is not None)
    expected = pcb_ray.merge_state_dicts(family.base, family.models, density=0.2)
    found = torch.load(out)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    told(python.with_name("pcb-ray"), "merge", recipe, tmp_path / "out", "--workers", 1)
    on_disk = families.load(tmp_path / "out")
    assert all(torch.equal(on_disk[name], tensor) for name, tensor in expected.items())
    assert receipt_of(tmp_path / "out")["kernels"] == ["native on cpu" if native == "True" else "torch on cpu"]
