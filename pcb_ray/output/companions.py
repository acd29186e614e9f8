"""The files beside the tensors, that loaders and readers want: config, tokenizer, index, recipe, and the model card."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pcb_ray.errors import RequestError, RunError
from pcb_ray.files import companions
from pcb_ray.files.checkpoint import Checkpoint
from pcb_ray.planning import Plan, Slot
from pcb_ray.receipt import RECEIPT, names_of_inputs
from pcb_ray.recipe import DTYPES, Recipe

RECIPE, CARD = "pcb_recipe.yaml", "README.md"
DTYPE_NAMES = {short: name for name, short in DTYPES.items()}


def side_files(recipe: Recipe, plan: Plan, base: Checkpoint, tokenizer: Checkpoint) -> dict[str, bytes]:
    """Config, generation config, tokenizer files, index and recipe by name. Raises RequestError if the vocabularies don't match."""
    files: dict[str, bytes] = {}
    if tokenizer is not base:
        _check_vocabularies(base, tokenizer)
    if base.config is not None:
        files[companions.CONFIG] = _as_json(_config(base.config, plan, recipe))
    for folder, patterns in ((base.folder, companions.OF_BASE), (tokenizer.folder, companions.OF_TOKENIZER)):
        if folder is not None:
            files |= {name: (folder / name).read_bytes() for name in companions.in_folder(folder, patterns)}
    if recipe.chat_template is not None:
        files["chat_template.jinja"] = recipe.chat_template.encode()
    if len(plan.files) > 1:
        where = {name: plan.files[slot.file].name for name, slot in slots_of(plan).items()}
        total = sum(f.size - len(f.header) for f in plan.files)
        files["model.safetensors.index.json"] = _as_json(
            {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
        )
    files[RECIPE] = _pinned(recipe.resolved(), plan).to_yaml().encode()
    return files


def _pinned(recipe: Recipe, plan: Plan) -> Recipe:
    """The recipe with models of the Hub at the commits that are merged."""
    at = {i.source: f"{i.source.split('@')[0]}@{i.commit}" for i in plan.inputs if i.commit is not None}
    return dataclasses.replace(
        recipe,
        base_model=None if recipe.base_model is None else at.get(recipe.base_model, recipe.base_model),
        models=tuple(dataclasses.replace(model, source=at.get(model.source, model.source)) for model in recipe.models),
        tokenizer_source=at.get(recipe.tokenizer_source, recipe.tokenizer_source),
    )


def slots_of(plan: Plan) -> dict[str, Slot]:
    """The place of every tensor of the output by name."""
    return {t.name: t.slot for t in plan.tensors} | {c.source.name: c.slot for c in plan.copies}


def _config(config: Mapping[str, Any], plan: Plan, recipe: Recipe) -> dict[str, Any]:
    """The base's config with the dtype of the output."""
    result = json.loads(json.dumps(config))
    sizes: dict[str, int] = {}
    for tensor in plan.tensors:
        sizes[tensor.slot.dtype] = sizes.get(tensor.slot.dtype, 0) + tensor.numel
    name = recipe.dtype or DTYPE_NAMES[max(sizes, key=lambda dtype: sizes[dtype])]
    for part in (result, *(v for k, v in result.items() if k.endswith("_config") and isinstance(v, dict))):
        for key in ("dtype", "torch_dtype"):
            if key in part:
                part[key] = name
    if "dtype" not in result and "torch_dtype" not in result:
        result["dtype"] = name
    return dict(result)


def _check_vocabularies(base: Checkpoint, tokenizer: Checkpoint) -> None:
    for name in ("tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model"):
        paths = [c.folder / name if c.folder is not None else None for c in (base, tokenizer)]
        if not all(p is not None and p.is_file() for p in paths):
            continue
        first, second = (_vocabulary(p) for p in paths if p is not None)
        if first != second:
            sizes = [f"{len(v)} entries" for v in (first, second)]
            raise RequestError(
                f"tokenizer_source: the vocabulary of {tokenizer.source} ({sizes[1]}) differs from the base's ({sizes[0]}) in "
                f"{name}, and merged embeddings follow the base's. "
                "Fix: write `tokenizer_source: base`, or merge models that share it."
            )


def _vocabulary(path: Path) -> Any:
    if path.suffix != ".json":
        return path.read_bytes()
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RequestError(f"{path}: is not JSON: {error}. Fix: fetch or save the tokenizer's files anew.") from None
    if path.name == "tokenizer.json" and isinstance(content, dict):
        model = content.get("model") or {}
        return (model.get("vocab"), [t.get("content") for t in content.get("added_tokens") or []])
    return content


def _as_json(content: Any) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def model_card(plan: Plan, version: str) -> bytes:
    """README.md: a model card with the metadata that the Hub reads. It is made to be published: it names models, and no paths."""
    import yaml

    recipe = plan.recipe
    hub_ids = [i.source.split("@")[0] for i in plan.inputs if i.commit is not None]
    metadata: dict[str, Any] = {
        "library_name": "transformers",
        "tags": ["merge", plan.method.tag],
    }
    if hub_ids:
        metadata |= {"base_model": hub_ids, "base_model_relation": "merge"}
    lines = [
        "---",
        yaml.safe_dump(metadata, sort_keys=False).strip(),
        "---",
        "",
        f"# {plan.N} models merged by {plan.method.name}",
        "",
    ]
    lines += [f"{plan.method.full_name}: {plan.method.formula}.", plan.method.source, ""] if plan.method.formula else []
    base, *models = _public_names(plan)
    rows = [(base, "base", "")] if recipe.base_model is not None else []
    for k, name in enumerate(models):
        weights = recipe.models[k].weight
        weight = f"{weights[0][1]:g}" if len(weights) == 1 and weights[0][0] is None else "by tensor"
        values = {key: plan.settings.of_model[k][key] for key, p in plan.method.parameters.items() if p.per_model}
        own = [f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}" for key, value in values.items()]
        rows.append((name, "model", ", ".join([f"weight {weight}", *own])))
    lines += ["| checkpoint | role | parameters |", "| --- | --- | --- |"]
    lines += ["| " + " | ".join(cell.replace("|", "&#124;") for cell in row) + " |" for row in rows]
    lines += ["", "## Recipe", "", "```yaml", _named(recipe, plan).to_yaml().strip(), "```", ""]
    lines += [
        f"Merged by pcb_ray {version}; `{RECEIPT}` tells what was done and on what, and `pcb-ray verify` checks it.",
        "",
    ]
    return "\n".join(lines).encode()


def _public_names(plan: Plan) -> list[str]:
    """Names of local models, and Hub ids with their commits."""
    named = zip(names_of_inputs(plan), plan.inputs, strict=True)
    return [name if one.commit is None else f"{name}@{one.commit}" for name, one in named]


def _named(recipe: Recipe, plan: Plan) -> Recipe:
    """The recipe with public names in the place of paths."""
    base, *models = _public_names(plan)
    tokenizer = recipe.tokenizer_source
    if tokenizer != "base":
        resolved = recipe.resolved()
        places = [Path(model.source) for model in resolved.models]
        tokenizer = models[places.index(Path(resolved.tokenizer_source))]
    code = recipe.code
    if code is not None and code.is_file:
        code = code._replace(name=code.name[code.name.rfind("/") + 1 :])
    return dataclasses.replace(
        recipe,
        merge_method=recipe.merge_method if code is None else code.name,
        code=code,
        base_model=None if recipe.base_model is None else base,
        models=tuple(dataclasses.replace(model, source=name) for model, name in zip(recipe.models, models, strict=True)),
        tokenizer_source=tokenizer,
    )


def write_side_files(folder: Path, files: Mapping[str, bytes]) -> dict[str, str]:
    """Write them; their sha256 by name. Raises RunError."""
    for name, data in files.items():
        path = folder / name
        try:
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(data)
        except OSError as error:
            raise RunError(
                f"{path}: wanted to write {len(data):,} bytes, found: {error.strerror}. Fix: mend that and run it again."
            ) from None
    return {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
