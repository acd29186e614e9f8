"""The output directory: made aside, complete in every file, and moved to its name only when whole.

Beside OUT lies `.OUT.pcb-ray/`, the state of an unfinished merge: `state.json` (what was asked and found so far), `journal.jsonl` (chunks
written, with digests) and `out/` (the files to be). It survives crashes and Ctrl-C for `--resume`, and goes when OUT is committed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pcb_ray.errors import InputError, RequestError, RunError
from pcb_ray.files import companions
from pcb_ray.files.checkpoint import Checkpoint
from pcb_ray.files.store import fsync_file, fsync_folder, write_atomically
from pcb_ray.planning import Input, Plan, Slot
from pcb_ray.recipe import DTYPES, Recipe

RECEIPT, RECIPE, CARD = "pcb_receipt.json", "pcb_recipe.yaml", "README.md"
DTYPE_NAMES = {short: name for name, short in DTYPES.items()}


def check_place(out: Path) -> None:
    """A relative OUT inside a Ray job is a wrong request."""
    if not out.is_absolute() and "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:
        raise RequestError(
            f"{out}: inside a Ray job a relative output is written to the job's temporary folder and lost; "
            "give an absolute path on storage that lasts"
        )


def check_out(out: Path, plan: Plan, *, overwrite: bool, resume: bool, model: bool = True, beside: int = 0) -> None:
    """Whether OUT can be written, before anything is computed: the merged `model`, and so many bytes `beside` it until it is done.

    Raises RequestError with all that is in the way."""
    problems = []
    if os.path.lexists(out) and not overwrite:
        nothing = " and there is nothing to resume" if resume and not (state_folder(out) / "state.json").exists() else ""
        problems.append(f"{out}: exists{nothing}; choose another name, or replace it with --overwrite")
    if os.path.lexists(out) and overwrite and not out.is_dir():
        problems.append(f"{out}: is not a directory; --overwrite replaces directories only")
    target = out.resolve()
    for one in plan.inputs:
        for place in _claimed_by(one, plan.recipe.folder):
            if place == target or place in target.parents or target in place.parents:
                problems.append(
                    f"{out}: would lie inside or around the input {one.source} ({place}); choose a folder apart from the inputs"
                )
                break
    parent = existing_parent(target)
    if not os.access(parent, os.W_OK):
        problems.append(f"{out}: can't write to {parent}; choose a folder that you may write to")
    else:
        state = state_folder(out)
        there = sum(f.lstat().st_blocks * 512 for f in state.rglob("*")) if resume or overwrite else 0
        needed, free = plan.written_bytes * model + beside, shutil.disk_usage(parent).free
        if free + there < needed:
            what = f"{beside:,} of them for the basis, until it is done; " if beside else ""
            problems.append(
                f"{out}: the run needs {needed:,} bytes, {parent} has {free:,} free; {what}"
                f"free some, write elsewhere, or ask for {'a smaller density' if beside else 'a narrower `dtype`'}"
            )
        if not resume and not overwrite and (state / "state.json").exists():
            problems.append(f"{state}: holds an unfinished run to {out}; go on with --resume, or start afresh with --overwrite")
    if problems:
        raise RequestError(problems)


def _claimed_by(one: Input, relative_to: Path) -> list[Path]:
    """The folder of an input, whose files may lie anywhere below it, and the files, which may be links; a model that is one file has no folder."""
    files = [Path(file.path) for file in one.files]
    if one.commit is None:
        folders = [relative_to / Path(one.source).expanduser()]
    else:  # the snapshot of a model of the Hub is named after its commit
        folders = [folder for folder in files[0].parents if folder.name == one.commit]
    return [path.resolve() for path in (*folders, *files)]


def existing_parent(path: Path) -> Path:
    """The nearest folder above `path` that exists."""
    for parent in path.parents:
        if parent.is_dir():
            return parent
    return Path("/")


def asked_of(plan: Plan, arithmetic: str) -> dict[str, Any]:
    """What decides the bytes of a merge."""
    modified = {f.path: os.stat(f.path).st_mtime_ns for i in plan.inputs for f in i.files}
    return {**plan.fingerprint(), "arithmetic": arithmetic, "modified": modified}


def state_folder(out: Path) -> Path:
    out = out.resolve()  # a link to a folder stays, and what it leads to is replaced
    return out.parent / f".{out.name}.pcb-ray"


class State:
    """The state of one merge (or search) on disk. `with State(...)` holds its lock: two to one OUT can't run at once.

    `asked` is what an unfinished one must share with the one that resumes it, as JSON values."""

    def __init__(self, out: Path, asked: Mapping[str, Any], *, resume: bool) -> None:
        self.out = out.resolve()
        self.folder = state_folder(out)
        self.staging = self.folder / "out"
        self.found: dict[str, Any] = {}
        self.journal: dict[str, str] = {}
        self._asked = json.loads(json.dumps(asked))
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            raise RequestError(
                f"{out}: another merge is writing it now ({self.folder} is locked); wait for it, or choose another name"
            ) from None
        try:
            self._restore_replaced()
            if resume and (self.folder / "state.json").exists():
                self._load()
            else:
                self._clear()
                self.save()
            self.staging.mkdir(exist_ok=True)
        except BaseException:
            self.close()
            raise

    def _load(self) -> None:
        try:
            saved = json.loads((self.folder / "state.json").read_text())
            asked, self.found = saved["asked"], saved["found"]
        except (ValueError, KeyError, TypeError) as error:
            raise RequestError(f"{self.folder / 'state.json'}: can't be read ({error}); start afresh with --overwrite") from None
        differences = list(_differences(asked, self._asked))
        if differences:
            raise RequestError(
                [f"--resume: this is not the merge that was begun: {d}" for d in differences]
                + ["Fix: ask for the same merge, or start afresh with --overwrite"]
            )
        with contextlib.suppress(FileNotFoundError):
            for line in (self.folder / "journal.jsonl").read_text().splitlines():
                with contextlib.suppress(ValueError):  # the last line may be cut off
                    self.journal.update(json.loads(line))

    def _clear(self) -> None:
        for path in self.folder.iterdir():
            if path.is_dir() and not path.is_symlink() and path.name != "replaced":
                shutil.rmtree(path, ignore_errors=True)
            elif path.name not in ("lock", "replaced"):
                path.unlink(missing_ok=True)

    def _restore_replaced(self) -> None:
        replaced = self.folder / "replaced"  # a crash between the two renames of `commit` leaves the old OUT here
        if replaced.exists() and not self.out.exists():
            replaced.rename(self.out)

    def save(self) -> None:
        """Make `found` durable."""
        write_atomically(self.folder / "state.json", json.dumps({"asked": self._asked, "found": self.found}).encode())

    def wrote(self, entries: Mapping[str, str]) -> None:
        """Note pieces of the output that were written, with their digests."""
        self.journal.update(entries)
        with (self.folder / "journal.jsonl").open("a") as journal:
            journal.write(f"\n{json.dumps(entries)}\n")  # on a line of its own, also after one that was cut off

    def make_files(self, plan: Plan) -> None:
        """The output files at full size with their headers; what a resumed run wrote stays."""
        for file in plan.files:
            fd = os.open(self.staging / file.name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                os.truncate(fd, file.size)
                os.pwrite(fd, file.header, 0)
            finally:
                os.close(fd)

    def commit(self) -> None:
        """Make everything durable and give it its name."""
        for path in sorted(p for p in self.staging.rglob("*") if p.is_file()):
            fsync_file(path)
        for folder in (*(p for p in self.staging.rglob("*") if p.is_dir()), self.staging):
            fsync_folder(folder)
        if self.out.exists():
            shutil.rmtree(self.folder / "replaced", ignore_errors=True)
            self.out.rename(self.folder / "replaced")
        self.staging.rename(self.out)
        fsync_folder(self.out.parent)
        shutil.rmtree(self.folder, ignore_errors=True)

    def discard(self) -> None:
        """Forget this merge: there is nothing in it to go on with."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def close(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        unused = isinstance(error, RequestError | RunError) and not self.found and not self.journal
        if unused or isinstance(error, InputError):
            # A wrong request that showed itself late, or no cluster: there is nothing to resume, and the next try is a merge of its own.
            self.discard()
        self.close()


def _differences(old: Any, new: Any, where: str = "") -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted({*old, *new}):
            yield from _differences(old.get(key), new.get(key), f"{where}.{key}" if where else key)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for index, (a, b) in enumerate(zip(old, new, strict=True)):
            yield from _differences(a, b, f"{where}[{index}]")
    elif isinstance(old, str) and isinstance(new, str) and "\n" in old + new and old != new:
        changed = [(a, b) for a, b in zip(old.splitlines(), new.splitlines(), strict=False) if a != b] or [("", "")]
        yield f"{where} was {changed[0][0].strip()!r}, now {changed[0][1].strip()!r}"
    elif old != new:
        yield f"{where} was {str(old)[:80]!r}, now {str(new)[:80]!r}"


# --- the files beside the tensors -------------------------------------------------------------------------------------------------


def side_files(recipe: Recipe, plan: Plan, base: Checkpoint, tokenizer: Checkpoint) -> dict[str, bytes]:
    """config.json, generation config, tokenizer files, index and recipe by name. Raises RequestError if the vocabularies don't match."""
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
                f"tokenizer_source: the vocabulary of {tokenizer.source} ({sizes[1]}) differs from the base's ({sizes[0]}) in {name}; "
                "merged embeddings follow the base's vocabulary: use `tokenizer_source: base`, or models that share it"
            )


def _vocabulary(path: Path) -> Any:
    if path.suffix != ".json":
        return path.read_bytes()
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RequestError(f"{path}: is not JSON ({error}); repair the tokenizer's files") from None
    if path.name == "tokenizer.json" and isinstance(content, dict):
        model = content.get("model") or {}
        return (model.get("vocab"), [t.get("content") for t in content.get("added_tokens") or []])
    return content


def _as_json(content: Any) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def model_card(plan: Plan, receipt: Mapping[str, Any]) -> bytes:
    """README.md: a model card with the metadata that the Hub reads."""
    import yaml

    hub_ids = [i.source for i in plan.inputs if i.commit is not None]
    metadata: dict[str, Any] = {
        "library_name": "transformers",
        "tags": ["merge", "pcb-merging" if plan.method.startswith("pcb") else plan.method.replace("_", "-")],
    }
    if hub_ids:
        metadata |= {"base_model": [i.split("@")[0] for i in hub_ids], "base_model_relation": "merge"}
    recipe = plan.recipe
    inputs = list(plan.inputs)
    lines = [
        "---",
        yaml.safe_dump(metadata, sort_keys=False).strip(),
        "---",
        "",
        f"# {plan.N} models merged by {recipe.merge_method}",
        "",
    ]
    if recipe.merge_method == "pcb":
        lines += [
            f"Parameter competition balancing (variant `{recipe.variant}`): of each task vector's {plan.D:,} elements, the share below is kept by a",
            "threshold over the whole model, and competing elements are weighed by their scores.",
            "",
        ]
    rows = [(inputs[0].source, "base", "")] if recipe.base_model is not None else []
    for k, one in enumerate(inputs[1:]):
        weights = recipe.models[k].weight
        weight = f"{weights[0][1]:g}" if len(weights) == 1 and weights[0][0] is None else "by tensor"
        rows.append(
            (
                one.source,
                "model",
                f"weight {weight}" + (f", density {recipe.density_of(k):g}" if recipe.merge_method in ("pcb", "ties") else ""),
            )
        )
    lines += ["| checkpoint | role | parameters |", "| --- | --- | --- |", *(f"| {' | '.join(row)} |" for row in rows), ""]
    lines += ["## Recipe", "", "```yaml", recipe.to_yaml().strip(), "```", ""]
    lines += [
        f"Merged by pcb_ray {receipt['versions']['pcb_ray']}; `{RECEIPT}` tells what was done and on what, and `pcb-ray verify` checks it.",
        "",
    ]
    return "\n".join(lines).encode()


def write_side_files(folder: Path, files: Mapping[str, bytes]) -> dict[str, str]:
    """Write them; their sha256 by name."""
    for name, data in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        try:
            (folder / name).write_bytes(data)
        except OSError as error:
            raise RunError(f"{folder / name}: {error.strerror}; finished work is kept: --resume goes on") from None
    return {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
