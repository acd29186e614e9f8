"""A small family of models, and a recipe that merges it and searches its weights: what cluster/local.sh tries a cluster with.

`python cluster/tryout.py FOLDER` writes FOLDER/models (a base and three experts of 3 million parameters) and FOLDER/job
(recipe.yaml, closeness.py), the folder to submit. What the search is to come close to is a plain mean of other weights."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy
from safetensors.numpy import save_file

SHAPES = {f"layers.{k}.{name}.weight": (512, 512) for k in range(6) for name in ("attention", "mlp")}
WEIGHTS = (1.2, 0.4, 0.8)

EVALUATOR = '''\
"""How close a model is to one that is hidden from the search."""

import torch
from safetensors.torch import load_file

from pcb_ray.searching.evaluators import module_of


class Closeness:
    def __init__(self, hidden: str) -> None:
        self.hidden = load_file(hidden)

    def load(self, model_dir):
        files = model_dir.glob("*.safetensors")
        self.module = module_of({name: tensor.float() for path in files for name, tensor in load_file(path).items()})
        return self.module

    def score(self, split):
        apart = sum(float((tensor - self.hidden[name]).square().sum()) for name, tensor in self.module.named_buffers())
        return {"closeness": -apart}
'''


def make(folder: Path) -> None:
    numbers = numpy.random.default_rng(0)

    def drawn(scale: float) -> dict[str, numpy.ndarray]:
        return {name: (scale * numbers.standard_normal(shape)).astype(numpy.float32) for name, shape in SHAPES.items()}

    base, taus = drawn(0.02), [drawn(0.002) for _ in WEIGHTS]
    models = {"base": base} | {f"expert{k}": {name: base[name] + tau[name] for name in base} for k, tau in enumerate(taus, 1)}
    models["hidden"] = {name: base[name] + sum(w * tau[name] for w, tau in zip(WEIGHTS, taus, strict=True)) / 3 for name in base}
    for name, tensors in models.items():
        path = folder / "models" / name
        path.mkdir(parents=True)
        save_file(tensors, path / "model.safetensors")
    job = folder / "job"
    job.mkdir()
    (job / "closeness.py").write_text(EVALUATOR)
    places = {name: str((folder / "models" / name).resolve()) for name in models}  # a job's folder is a copy: absolute paths
    recipe = {
        "merge_method": "pcb",
        "base_model": places["base"],
        "models": [{"model": places[f"expert{k}"]} for k in (1, 2, 3)],
        "parameters": {"density": 0.3},
        "search": {
            "evaluator": {"closeness.py:Closeness": {"hidden": places["hidden"] + "/model.safetensors"}},
            "metric": "closeness",
            "budget": 8,
            "population": 4,
        },
    }
    (job / "recipe.yaml").write_text(json.dumps(recipe, indent=2) + "\n")  # JSON is YAML


if __name__ == "__main__":
    make(Path(sys.argv[1]))
