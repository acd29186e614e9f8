"""The whole story on a small real case: train a base and three experts, merge them in six ways, compare on held-out text.

    .venv/bin/python examples/quickstart.py [--fresh] [--out FOLDER]

lambda is chosen on the validation split, by merges in memory; the merges of the table are made by `pcb-ray merge` and
measured on the test split.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # idle threads sleep: much faster where the cores are shared

import matplotlib
import torch
import transformers
import yaml
from safetensors.torch import load_file
from train_family import held_out_loss, is_trained, read_held_out, train_family
from transformers import AutoModelForCausalLM

import pcb_ray

matplotlib.use("Agg")
import matplotlib.pyplot as plt

DENSITY = 0.2  # ties and pcb keep this fraction of all elements
LAMBDAS = [0.2, 0.3, 0.5, 0.7, 1.0, 1.4]  # the same for every method
METHODS: dict[str, dict[str, object]] = {  # row of the table -> what its recipe says
    "linear": {"merge_method": "linear"},
    "task_arithmetic": {"merge_method": "task_arithmetic"},
    "ties": {"merge_method": "ties", "density": DENSITY},
    "pcb released": {"merge_method": "pcb", "density": DENSITY, "variant": "released"},
    "pcb pairwise": {"merge_method": "pcb", "density": DENSITY, "variant": "pairwise"},
    "pcb paper": {"merge_method": "pcb", "density": DENSITY, "variant": "paper"},
}
BLACK, GREY, BLUE, ORANGE = "#000000", "#8a8a8a", "#0072b2", "#d55e00"  # told apart by colour-blind readers (Okabe and Ito)

Losses = dict[str, float]  # domain or "mean" -> nats per token
StateDict = dict[str, torch.Tensor]


def with_mean(losses: Losses) -> Losses:
    return {**losses, "mean": sum(losses.values()) / len(losses)}


def table(corner: str, columns: list[str], rows: dict[str, list[str]]) -> str:
    """Plain text, rows named on the left, cells to the right."""
    name_chars = max(map(len, [corner, *rows]))
    cell_chars = [max(map(len, column)) + 2 for column in zip(columns, *rows.values(), strict=True)]
    lines = [[corner, *columns], *([name, *cells] for name, cells in rows.items())]
    text = [
        f"  {name:<{name_chars}}" + "".join(f"{cell:>{chars}}" for cell, chars in zip(cells, cell_chars, strict=True))
        for name, *cells in lines
    ]
    return "\n".join([text[0], "  " + "-" * (len(text[0]) - 2), *text[1:]])


def choose_lambdas(family: Path, domains: list[str]) -> dict[str, float | None]:
    """The lambda with the lowest mean validation loss for each method; None for `linear`, which has none."""
    base, *experts = [load_file(family / name / "model.safetensors") for name in ["base", *domains]]
    split = read_held_out(family, "validation")
    model = AutoModelForCausalLM.from_pretrained(family / "base", dtype=torch.float32)
    chosen: dict[str, float | None] = {"linear": None}
    rows: dict[str, list[str]] = {}
    for name, says in METHODS.items():
        if name == "linear":
            continue
        means = []
        for value in LAMBDAS:
            merged = pcb_ray.merge_state_dicts(
                base,
                experts,
                method=str(says["merge_method"]),
                density=DENSITY,
                variant=str(says.get("variant", "pairwise")),
                lambda_=value,
            )
            model.load_state_dict(merged, strict=False)  # the tied output layer is not in the files
            means.append(with_mean(held_out_loss(model, split))["mean"])
        best = min(range(len(LAMBDAS)), key=means.__getitem__)
        chosen[name] = LAMBDAS[best]
        rows[name] = [f"{mean:.3f}{'*' if i == best else ' '}" for i, mean in enumerate(means)]
    print(table("lambda", [f"{value} " for value in LAMBDAS], rows))
    return chosen


def write_recipe(path: Path, name: str, lambda_: float | None, family: Path, domains: list[str]) -> None:
    """A recipe as a user would write it; its paths are relative to its own folder."""
    says = dict(METHODS[name])
    models = os.path.relpath(family, path.parent)
    recipe: dict[str, object] = {
        "merge_method": says.pop("merge_method"),
        "base_model": f"{models}/base",
        "models": [{"model": f"{models}/{domain}"} for domain in domains],
    }
    if lambda_ is not None:
        recipe["parameters"] = {**says, "lambda": lambda_}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))


def merge(recipe: Path, merged: Path, log: Path, folder: Path) -> None:
    """`pcb-ray merge`, as typed in a terminal in `folder`; what it says goes to `log`."""
    words = ["merge", os.path.relpath(recipe, folder), os.path.relpath(merged, folder), "--overwrite"]
    print(f"  $ {'pcb-ray ' + ' '.join(words):<80}", end="", flush=True)
    started_s = time.perf_counter()
    command = [str(Path(sys.executable).with_name("pcb-ray")), *words]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text(done.stdout + done.stderr)
    print(f"{time.perf_counter() - started_s:4.0f} s")
    if done.returncode:
        sys.exit(f"{done.stdout}{done.stderr}\nerror: the merge failed with exit code {done.returncode}; see {log}")


def evaluate(folders: dict[str, Path], family: Path) -> dict[str, Losses]:
    """Test losses of complete model folders, loaded as any user would load them."""
    split = read_held_out(family, "test")
    return {
        name: with_mean(held_out_loss(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), split))
        for name, folder in folders.items()
    }


def plot(losses: dict[str, Losses], lambdas: dict[str, float | None], path: Path) -> None:
    """The table as dots: a panel per domain and one for the mean, a row per model, the base as a dashed line."""
    names = list(losses)
    panels = list(losses["base"])
    figure, axes = plt.subplots(1, len(panels), figsize=(11, 4.4), sharey=True, layout="constrained")
    for axis, panel in zip(axes, panels, strict=True):
        values = [losses[name][panel] for name in names]
        colors = [_color(name) for name in names]
        axis.axvline(losses["base"][panel], color=BLACK, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
        axis.hlines(range(len(names)), losses["base"][panel], values, color=colors, linewidth=1.5, zorder=2)
        axis.scatter(values, range(len(names)), color=colors, s=38, zorder=3)
        span = max(values) - min(values)
        axis.set_xlim(min(values) - 0.12 * span, max(values) + 0.38 * span)  # room for the numbers
        for row, value in enumerate(values):
            right = max(value, losses["base"][panel])
            axis.annotate(f"{value:.3f}", (right, row), (7, 0), textcoords="offset points", va="center", fontsize=8)
        axis.set_title(panel, fontsize=11, fontweight="bold" if panel == "mean" else "normal")
        axis.grid(axis="x", color="#e6e6e6", linewidth=0.8)
        axis.set_axisbelow(True)
        axis.tick_params(length=0, labelsize=9)
        axis.locator_params(axis="x", nbins=4)
        axis.spines[["top", "right", "left"]].set_visible(False)
    labels = [name if (value := lambdas.get(name)) is None else f"{name}  (λ = {value})" for name in names]
    axes[0].set_yticks(range(len(names)), labels)
    axes[0].invert_yaxis()
    figure.suptitle("Held-out loss of a base, its experts and their merges", fontsize=12, x=0.01, ha="left")
    figure.supxlabel("nats per token on the test split, lower is better; dashed: the base", fontsize=9)
    figure.savefig(path, dpi=160)


def _color(name: str) -> str:
    if name == "base":
        return BLACK
    if name.startswith("expert"):
        return GREY
    return ORANGE if name.startswith("pcb") else BLUE


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Train a small base and three experts, merge them in six ways, compare the results."
    )
    parser.add_argument("--fresh", action="store_true", help="train the models again, even if trained ones are there")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "quickstart-out", help="where everything is written")
    options = parser.parse_args()
    out = options.out.resolve()
    family = out / "family"
    torch.set_num_threads(min(os.cpu_count() or 1, 4))  # the models are too small for more
    transformers.utils.logging.disable_progress_bar()
    started_s = time.perf_counter()

    print("\n1. A base model and three experts\n")
    if is_trained(family) and not options.fresh:
        print(f"  Found in {os.path.relpath(family)}; --fresh trains them again.")
    else:
        shutil.rmtree(family, ignore_errors=True)
        train_family(family)
    domains = list(read_held_out(family, "test"))

    print("\n2. lambda for each method: mean validation loss of merges made in memory (* lowest; linear has no lambda)\n")
    lambdas = choose_lambdas(family, domains)

    print(f"\n3. The merges, in {os.path.relpath(out)}, each on a local Ray that starts by itself\n")
    folders = {"base": family / "base", **{f"expert {domain}": family / domain for domain in domains}}
    for name, lambda_ in lambdas.items():
        file_name = name.replace(" ", "-")
        recipe = out / "recipes" / f"{file_name}.yaml"
        write_recipe(recipe, name, lambda_, family, domains)
        folders[name] = out / "merged" / file_name
        merge(recipe, folders[name], out / "logs" / f"{file_name}.log", out)

    print("\n4. Held-out loss on the test split, in nats per token (lower is better)\n")
    losses = evaluate(folders, family)
    rows = {
        name: ["" if lambdas.get(name) is None else str(lambdas[name]), *(f"{value:.3f}" for value in row.values())]
        for name, row in losses.items()
    }
    results = table("model", ["lambda", *domains, "mean"], rows)
    print(results)
    best_expert = min((name for name in losses if name.startswith("expert")), key=lambda name: losses[name]["mean"])
    best_merge = min(METHODS, key=lambda name: losses[name]["mean"])
    print(
        f"\n  Means: best merge {losses[best_merge]['mean']:.3f} ({best_merge}), base {losses['base']['mean']:.3f}, "
        f"best expert {losses[best_expert]['mean']:.3f} ({best_expert})."
    )
    print(f"  ties and pcb keep {DENSITY:.0%} of all elements; the weight of every expert is 1.")

    (out / "results.txt").write_text(results + "\n")
    (out / "results.json").write_text(json.dumps({"density": DENSITY, "lambda": lambdas, "test_loss": losses}, indent=2))
    plot(losses, lambdas, out / "results.png")
    print(f"\n5. Files in {os.path.relpath(out)}\n")
    for what, where in (
        ("the plot and the table", "results.png, results.txt, results.json"),
        ("the recipes", "recipes/"),
        ("the merged models", "merged/   (each loads with transformers)"),
        ("the trained models", "family/"),
    ):
        print(f"  {what:<24}{where}")
    print(f"\nDone in {time.perf_counter() - started_s:.0f} s.")


if __name__ == "__main__":
    main()
