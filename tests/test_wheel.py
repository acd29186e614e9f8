"""What `pip install` brings is whole: a wheel, built from the files of the repository, merges in an environment of its own."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import families
import pytest
import torch

pytestmark = pytest.mark.very_slow

ROOT = Path(__file__).parent.parent
MERGE = """
import sys, torch, pcb_ray
from pcb_ray.kernels.native import load_native
from pcb_ray.searching import run
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
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", str(wheel)], check=True)
    # Its libraries are those of these tests; the package that the tests run on is not among them.
    (site,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib"))

    family = families.Family(tmp_path / "family", *families.fine_tuned(2))
    plan = subprocess.run(
        [python.with_name("pcb-ray"), "plan", family.recipe_file(), "--json"], capture_output=True, text=True, check=True
    )
    assert json.loads(plan.stdout)["N"] == 2
    paths = [tmp_path / f"{name}.pt" for name in ("base", "model0", "model1")]
    for path, state in zip(paths, (family.base, *family.models), strict=True):
        torch.save(state, path)
    out = tmp_path / "merged.pt"
    done = subprocess.run([python, "-c", MERGE, out, *paths], capture_output=True, text=True, check=True, cwd=tmp_path)
    where, native = done.stdout.split()
    assert Path(where).is_relative_to(tmp_path)
    assert native == str(shutil.which("gcc") is not None)
    import pcb_ray

    expected = pcb_ray.merge_state_dicts(family.base, family.models, density=0.2)
    found = torch.load(out)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
