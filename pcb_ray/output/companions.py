"""The files beside the tensors, that loaders and readers want: config, tokenizer, index, recipe, and the model card."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pcb_ray.errors import RunError
from pcb_ray.files.beside import CONFIG
from pcb_ray.files.checkpoint import Checkpoint
from pcb_ray.files.hub import hub_id
from pcb_ray.files.quantised import quantisation_in, without_settings
from pcb_ray.files.store import Store
from pcb_ray.planning import Plan, Slot
from pcb_ray.receipt import RECEIPT, names_of_inputs
from pcb_ray.recipe import DTYPES, Recipe

RECIPE, CARD = "pcb_recipe.yaml", "README.md"
DTYPE_NAMES = {short: name for name, short in DTYPES.items()}


SideFile = bytes | str
"""What a file beside the tensors will hold: these bytes, or what the file of this name holds."""
_AT_ONCE = 8 << 20


def side_files(recipe: Recipe, plan: Plan, base: Checkpoint, tokenizer: Checkpoint) -> dict[str, SideFile]:
    """All files beside the tensors by name, but for the card and the receipt, which tell what was done."""
    files: dict[str, SideFile] = {}
    for one in plan.along:
        source = tokenizer if one.of_tokenizer else base
        if source.where is not None:
            own = one.name.removeprefix(base.inner)
            files[one.name] = f"{source.where}/{source.inner + own if one.of_tokenizer else one.name}"
    if base.config is not None and base.library == "transformers":
        files[base.inner + CONFIG] = _as_json(_config(base.config, plan, recipe))
    elif base.config is not None and quantisation_in(base.config):  # else it stays as it is
        files[base.inner + CONFIG] = _as_json(without_settings(base.config))
    if recipe.chat_template is not None:
        files[base.inner + "chat_template.jinja"] = recipe.chat_template.encode()
    if len(plan.files) > 1:
        where = {name: plan.files[slot.file].name.removeprefix(base.inner) for name, slot in slots_of(plan).items()}
        total = sum(f.size - len(f.header) for f in plan.files)
        files[f"{base.inner}{base.stem}.safetensors.index.json"] = _as_json(
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
    tensors = {t.name: t.slot for t in plan.tensors if not t.part_of} | {c.source.name: c.slot for c in plan.copies}
    return tensors | {one.name: one.slot for one in plan.again} | dict(plan.packed)


def _config(config: Mapping[str, Any], plan: Plan, recipe: Recipe) -> dict[str, Any]:
    """The base's config with the dtype of the output, which is not quantised, and tied only if the merge is."""
    result = without_settings(json.loads(json.dumps(config)))
    if plan.untied:
        for part in (result, *(v for v in result.values() if isinstance(v, dict) and "tie_word_embeddings" in v)):
            part["tie_word_embeddings"] = False
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


def _as_json(content: Any) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def model_card(plan: Plan, version: str) -> bytes:
    """README.md: a model card with the metadata that the Hub reads. It is made to be published: it names models, and no paths."""
    import yaml

    recipe = plan.recipe
    hub_ids = [hub_id(i.source) for i in plan.inputs if i.commit is not None]
    metadata: dict[str, Any] = {
        **({"library_name": plan.library} if plan.library else {}),
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
    shown = [_linked(name) if one.commit else name for name, one in zip(_public_names(plan), plan.inputs, strict=True)]
    rows = [(shown[0], "base", "")] if recipe.base_model is not None else []
    for k, name in enumerate(shown[1:]):
        weights = recipe.models[k].weight
        value = weights[0][1] if len(weights) == 1 else None
        weight = f"{value:g}" if isinstance(value, float) else "by tensor" if value is None else "by layer"
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


def _linked(name: str) -> str:
    """A Hub id with its commit, as a link."""
    return f"[{name}](https://huggingface.co/{name.replace('@', '/tree/')})"


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
        storage={},
    )


def write_side_files(folder: str | os.PathLike[str], files: Mapping[str, SideFile], store: Store) -> dict[str, str]:
    """Write them, through `store` as they are read from there; their sha256 by name. Raises RunError.

    What makes a loader take a folder for a model comes last: the config, and the index after it."""
    digests = {}
    for name in sorted(files, key=lambda name: (name.endswith(".index.json"), os.path.basename(name) == CONFIG)):
        content, path, sha256 = files[name], os.path.join(folder, name), hashlib.sha256()
        try:
            size = _size_of(content, store)
            store.create(path, size)
            with store.part(path, 0, size) as target:
                for piece in _pieces(content, size, store):
                    sha256.update(piece)
                    target.write(piece)
        except OSError as error:
            what = f"to copy {content}" if isinstance(content, str) else f"to write {len(content):,} bytes"
            raise RunError(f"{path}: wanted {what}, found: {error.strerror}. Fix: mend that and run it again.") from None
        digests[name] = sha256.hexdigest()
    return digests


def check_side_files(files: Mapping[str, SideFile], store: Store) -> None:
    """Whether those that are copied can be read, before anything is computed. Raises RunError."""
    for content in files.values():
        try:
            sha256_of(content, store)
        except OSError as error:
            raise RunError(
                f"{error.filename or content!r}: wanted to copy it, found: {error.strerror}. Fix: mend that and run it again."
            ) from None


def sha256_of(content: SideFile, store: Store) -> str:
    """The digest of what such a file will hold."""
    sha256 = hashlib.sha256()
    for piece in _pieces(content, _size_of(content, store), store):
        sha256.update(piece)
    return sha256.hexdigest()


def _size_of(content: SideFile, store: Store) -> int:
    return len(content) if isinstance(content, bytes) else store.stamp(content).size


def _pieces(content: SideFile, size: int, store: Store) -> Iterator[bytes | memoryview]:
    if isinstance(content, bytes):
        yield content
        return
    for start in range(0, size, _AT_ONCE):
        piece = memoryview(bytearray(min(_AT_ONCE, size - start)))
        store.read(content, start, piece)
        yield piece
