"""A classification family: a small vision transformer for digits, five experts for shifted domains, merges with and without a
search.

    .venv/bin/python examples/digits.py [--fresh] [--out FOLDER]

The digits are scikit-learn's (1797 images of 8 x 8). The base knows them upright, slightly distorted; each expert is fine-tuned
from it on one domain that the base is bad at. lambda is chosen for each method by `pcb_ray.sweep`, the lambda_i by
`pcb_ray.search`, all on the validation split; the table is of the test split.

Names: B images in a batch, accuracies are fractions.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import math
import os
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # idle threads sleep: much faster where the cores are shared

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.nn.functional import affine_grid, cross_entropy, grid_sample

SEED = 0
SHAPE = {
    "image_size": 8,
    "patch_size": 2,
    "num_channels": 1,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 256,
    "num_labels": 10,
}
BASE_STEPS, EXPERT_STEPS, BATCH = 2000, 120, 64
BASE_LR, EXPERT_LR = 1e-3, 1e-4
TRAIN_IMAGES, VALIDATION_IMAGES = 900, 350  # the rest, 547, is for the test
DENSITY = 0.2  # ties and pcb keep this fraction of all elements
LAMBDAS = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0, 1.2, 1.4, 1.7, 2.0]  # the same for every method
BUDGET = 60
SEEDS = (0, 1, 2)

Images = torch.Tensor  # (B, 1, 8, 8), 0 to 1
Accuracies = dict[str, float]  # domain or "mean" -> fraction


def warped(images: Images, degrees: Any = 0.0, scale: Any = 1.0, dx: Any = 0.0, dy: Any = 0.0) -> Images:
    """Turned, scaled and moved, by one value for all or one for each."""
    angle, scale, dx, dy = (torch.as_tensor(v, dtype=torch.float32).expand(len(images)) for v in (degrees, scale, dx, dy))
    cos, sin = torch.cos(angle * math.pi / 180) / scale, torch.sin(angle * math.pi / 180) / scale
    matrices = torch.stack([torch.stack([cos, -sin, dx], 1), torch.stack([sin, cos, dy], 1)], 1)
    return grid_sample(images, affine_grid(matrices, list(images.shape), align_corners=False), align_corners=False)


def noisy(images: Images) -> Images:
    return (images + 0.5 * torch.randn(images.shape, generator=torch.Generator().manual_seed(SEED))).clamp(0, 1)


def halved(images: Images) -> Images:
    return torch.cat([torch.zeros_like(images[:, :, :3]), images[:, :, 3:]], dim=2)


DOMAINS: dict[str, Callable[[Images], Images]] = {
    "upright": lambda images: images,
    "left": functools.partial(warped, degrees=45.0),
    "right": functools.partial(warped, degrees=-45.0),
    "small": functools.partial(warped, scale=0.55),
    "noisy": noisy,
    "halved": halved,
}
EXPERTS = [domain for domain in DOMAINS if domain != "upright"]


def read_data() -> dict[str, dict[str, torch.Tensor]]:
    """For each split, the labels and the images of each domain. Each digit is in one split only, in all domains."""
    from sklearn.datasets import load_digits

    pixels, labels = (torch.from_numpy(a) for a in load_digits(return_X_y=True))
    images = (pixels / 16).float().reshape(-1, 1, 8, 8)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(SEED))
    parts = order.tensor_split([TRAIN_IMAGES, TRAIN_IMAGES + VALIDATION_IMAGES])
    return {
        split: {"labels": labels[part].long()} | {name: shift(images[part]).contiguous() for name, shift in DOMAINS.items()}
        for split, part in zip(("train", "val", "test"), parts, strict=True)
    }


def distorted(images: Images, random: torch.Generator) -> Images:
    """What the base is trained on."""

    def some(low: float, high: float) -> torch.Tensor:
        return torch.rand(len(images), generator=random) * (high - low) + low

    moved = warped(images, some(-35, 35), some(0.65, 1.2), some(-0.2, 0.2), some(-0.2, 0.2))
    return moved + some(0, 0.4)[:, None, None, None] * torch.randn(images.shape, generator=random)


def train(
    model: torch.nn.Module, images: Images, labels: torch.Tensor, title: str, steps: int, peak_lr: float, distort: bool
) -> None:
    """AdamW with warm-up and a cosine to zero."""
    random = torch.Generator().manual_seed(SEED)
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak_lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 20, 0.5 + 0.5 * math.cos(math.pi * step / steps))
    )
    started_s = time.perf_counter()
    model.train()
    for _ in range(steps):
        picks = torch.randint(len(images), (BATCH,), generator=random)
        batch = distorted(images[picks], random) if distort else images[picks]
        loss = cross_entropy(model(batch).logits, labels[picks])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    print(f"  {title:<14} {steps} steps   training loss {loss.item():.2f}   {time.perf_counter() - started_s:4.0f} s", flush=True)


def train_family(out: Path) -> None:
    """Writes `out/base`, `out/DOMAIN` for each expert, the data, and `family.json` when all is there."""
    data = read_data()
    out.mkdir(parents=True, exist_ok=True)
    for split in ("val", "test"):
        save_file(data[split], out / f"{split}.safetensors")
    images, labels = data["train"], data["train"]["labels"]
    torch.manual_seed(SEED)
    base = transformers.ViTForImageClassification(transformers.ViTConfig(**SHAPE))
    print(f"  a vision transformer of {base.num_parameters() / 1e6:.2f} million parameters")
    train(base, images["upright"], labels, "base", BASE_STEPS, BASE_LR, distort=True)
    base.save_pretrained(out / "base")
    for domain in EXPERTS:
        expert = transformers.ViTForImageClassification.from_pretrained(out / "base")
        train(expert, images[domain], labels, f"expert {domain}", EXPERT_STEPS, EXPERT_LR, distort=False)
        expert.save_pretrained(out / domain)
    (out / "family.json").write_text(json.dumps(settings(), indent=2))


def settings() -> dict[str, str]:
    """What the family depends on: a saved one is used again only if this is unchanged."""
    code = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    return {"torch": torch.__version__, "transformers": transformers.__version__, "digits.py": code}


def is_trained(family: Path) -> bool:
    record = family / "family.json"
    return record.exists() and json.loads(record.read_text()) == settings()


class Accuracy:
    """The evaluator: accuracy on each domain, and their mean."""

    def __init__(self, family: str) -> None:
        self.family = Path(family)

    def load(self, model_dir: Path) -> torch.nn.Module:
        self.data = {split: load_file(self.family / f"{split}.safetensors") for split in ("val", "test")}
        self.model = transformers.ViTForImageClassification.from_pretrained(model_dir).eval()
        return self.model

    @torch.inference_mode()
    def score(self, split: str) -> Accuracies:
        data = self.data[split]
        found = {name: float((self.model(data[name]).logits.argmax(-1) == data["labels"]).float().mean()) for name in DOMAINS}
        return found | {"mean": statistics.fmean(found.values())}


def recipe_of(family: Path, method: str, search: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A recipe as it would stand in a file; `pcb-ray search` and `pcb-ray sweep` take the same."""
    return {
        "merge_method": method,
        "base_model": str(family / "base"),
        "models": [{"model": str(family / domain)} for domain in EXPERTS],
        "parameters": {"density": DENSITY} if method in ("ties", "pcb") else {},
        "search": {"evaluator": {f"{__file__}:Accuracy": {"family": str(family)}}, "metric": "mean", **search},
        **more,
    }


def evaluate(folder: Path, evaluator: Accuracy) -> dict[str, Accuracies]:
    evaluator.load(folder)
    return {split: evaluator.score(split) for split in ("val", "test")}


def merge_and_score(family: Path, out: Path) -> dict[str, list[dict[str, Accuracies]]]:
    """For each row of the table its accuracies on both splits: one, or one for each seed of a search."""
    import pcb_ray

    evaluator = Accuracy(str(family))
    rows = {
        name: [evaluate(family / name.removeprefix("expert "), evaluator)] for name in ("base", *(f"expert {d}" for d in EXPERTS))
    }
    for method in ("linear", "task_arithmetic", "ties", "pcb"):
        recipe: Any = recipe_of(family, method, {})
        if method == "linear":
            del recipe["search"]  # a mean: it has no lambda
        else:
            swept = out / f"{method}-sweep"
            found = pcb_ray.sweep(recipe | {"sweep": {"lambda": LAMBDAS}}, swept, overwrite=True, quiet=True)
            recipe = swept / "best_recipe.yaml"
            print(f"  {method:<24} lambda {found.best['lambda']}", flush=True)
        pcb_ray.merge(recipe, out / method, overwrite=True, quiet=True)
        rows[method] = [evaluate(out / method, evaluator)]
    space = {"density": {"lower": 0.05, "upper": 0.6}}
    for method, opened in (("task_arithmetic", {}), ("pcb", space)):
        name = f"{method} + search"
        for seed in SEEDS:
            searched = out / f"{method}-search-{seed}"
            recipe = recipe_of(family, method, {"budget": BUDGET, "seed": seed, "space": opened})
            found = pcb_ray.search(recipe, searched, overwrite=True, quiet=True)
            best = ", ".join(f"{key.removeprefix('weight.')} {value:.2f}" for key, value in found.best.items())
            print(f"  {name:<24} seed {seed}: {best}", flush=True)
            rows.setdefault(name, []).append(evaluate(searched, evaluator))
    return rows


def cells(scores: list[dict[str, Accuracies]]) -> list[str]:
    """The mean on the validation split, then the test split: each domain, and the mean of all; of several seeds their mean and
    spread."""
    columns = [[s["val"]["mean"] for s in scores], *([s["test"][name] for s in scores] for name in (*DOMAINS, "mean"))]
    spread = f" ±{(max(columns[-1]) - min(columns[-1])) / 2:.3f}" if len(scores) > 1 else ""
    return [f"{statistics.fmean(column):.3f}" for column in columns[:-1]] + [f"{statistics.fmean(columns[-1]):.3f}{spread}"]


def main() -> None:
    from quickstart import table

    parser = argparse.ArgumentParser(description="Train a base and five experts on digits, merge them, search the coefficients.")
    parser.add_argument("--fresh", action="store_true", help="train the models again, even if trained ones are there")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "digits-out", help="where everything is written")
    options = parser.parse_args()
    out = options.out.resolve()
    family = out / "family"
    torch.set_num_threads(min(os.cpu_count() or 1, 4))
    transformers.utils.logging.disable_progress_bar()
    started_s = time.perf_counter()

    print("\n1. A base model and five experts\n")
    if is_trained(family) and not options.fresh:
        print(f"  Found in {os.path.relpath(family)}; --fresh trains them again.")
    else:
        shutil.rmtree(family, ignore_errors=True)
        train_family(family)

    print("\n2. Merges: lambda from a grid of 12, or the lambda_i (and the density of pcb) from a search with a budget of 60\n")
    rows = merge_and_score(family, out)

    print("\n3. Accuracy: mean on the validation split, by which everything was chosen; then on the test split\n")
    results = table("model", ["val", *DOMAINS, "mean"], {name: cells(scores) for name, scores in rows.items()})
    print(results)
    print(f"\n  Searches: mean of {len(SEEDS)} seeds ± half their range. Each has a report.html in {os.path.relpath(out)}.")
    (out / "results.txt").write_text(results + "\n")
    (out / "results.json").write_text(json.dumps(rows, indent=2))
    print(f"\nDone in {time.perf_counter() - started_s:.0f} s.")


if __name__ == "__main__":
    main()
