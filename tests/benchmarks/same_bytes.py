"""The digests of merges of one family by all methods, for a comparison of two states of the code: equal lines are equal bytes.

python tests/benchmarks/make_family.py /data/family
python tests/benchmarks/same_bytes.py /data/family --workers 1 2 > digests.txt
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

RECIPES = {
    "pcb-pairwise": {"merge_method": "pcb", "parameters": {"density": 0.1, "variant": "pairwise"}},
    "pcb-released": {"merge_method": "pcb", "parameters": {"density": 0.1, "variant": "released"}},
    "pcb-paper": {"merge_method": "pcb", "parameters": {"density": 0.1, "variant": "paper"}},
    "ties": {"merge_method": "ties", "parameters": {"density": 0.2, "lambda": 0.7}},
    "task_arithmetic": {"merge_method": "task_arithmetic", "parameters": {"lambda": 0.4}},
    "linear": {"merge_method": "linear"},
    "pcb-pairwise float32": {"merge_method": "pcb", "dtype": "float32", "parameters": {"lambda": 1.3}},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", type=Path)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    options = parser.parse_args()
    experts = sorted(path.name for path in options.family.glob("expert*") if path.is_dir())
    weights = [1.0, 0.8, 1.2, 0.5]
    models = [{"model": name, "parameters": {"weight": weights[k % 4]}} for k, name in enumerate(experts)]
    recipe, out = options.family / "same-bytes.yaml", options.family / "same-bytes"
    for name, asked in RECIPES.items():
        recipe.write_text(yaml.safe_dump({**asked, "base_model": "base", "models": models}))
        for workers in options.workers:
            shutil.rmtree(out, ignore_errors=True)
            command = [sys.executable, "-m", "pcb_ray", "merge", str(recipe), str(out), "--workers", str(workers), "--overwrite"]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            for file in sorted(out.glob("*.safetensors")):
                with file.open("rb") as stream:
                    digest = hashlib.file_digest(stream, "sha256").hexdigest()
                print(f"{name:22} {workers} workers  {file.name}  {digest}", flush=True)
    shutil.rmtree(out, ignore_errors=True)
    recipe.unlink()


if __name__ == "__main__":
    main()
