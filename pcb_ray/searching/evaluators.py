"""Evaluators: what gives a merged model its score.

An evaluator is any object with two methods:

    load(model_dir) -> torch.nn.Module       once per trial process: loads model and data; the search updates
                                             the parameters of the module in place
    score(split) -> dict[str, float]         after each update

and, if it likes, a collection of names `splits`: those that `score` knows. Asked for another, a search says so before anything is
loaded.

Built in are `causal_lm`, `classification`, `lm_eval` and `command`; others are named `file.py:object` or `module:object` in the
recipe, or given as an object in Python. A class is called with the options that stand below its name in the recipe.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol

from pcb_ray import checks
from pcb_ray.conversions import as_saved
from pcb_ray.errors import RequestError
from pcb_ray.files.store import as_path
from pcb_ray.recipe import DTYPES
from pcb_ray.user_code import UserCode, check_below, load_object, read_code

if TYPE_CHECKING:
    import torch

Metrics = dict[str, float]
_DTYPES = ("auto", *DTYPES)
LENGTH = 512  # tokens of a window
NONE: Mapping[str, tuple[int, ...]] = {}


class Evaluator(Protocol):
    """`splits: Collection[str]` is optional; see `check_splits`."""

    def load(self, model_dir: Path) -> torch.nn.Module:
        """Load what is needed to score; return the module whose parameters are those of the model in `model_dir`."""
        ...

    def score(self, split: str) -> Metrics:
        """The metrics of the module as its parameters are now, on this split of the data."""
        ...


def make_evaluator(name: str, options: Mapping[str, Any], folder: Path, code: UserCode | None = None) -> Evaluator:
    """The evaluator that a recipe names, of `code` if it is none of those that are built in. Relative paths are resolved against
    `folder`. Raises RequestError."""
    where = "search.evaluator"
    if code is None:
        return checked(_built_in(_BUILT_IN[name], options, folder, f"{where}.{name}"), name)
    found = load_object(code, where)
    if inspect.isclass(found):
        found = _call(found, options, where, name)
    elif options:
        raise RequestError(
            f"{where}: wanted no options for the object {name}, found {', '.join(options)}. Fix: remove them, or name its class."
        )
    return checked(found, name)


def folder_here(folder: str) -> Path:
    """The folder of a recipe as this machine has it: where it is not, this is a job whose files lie where its processes work."""
    return Path(folder) if os.path.isdir(folder) else Path.cwd()


def check_here(name: str, options: Mapping[str, Any], folder: str) -> None:
    """Whether this machine has what a built-in evaluator reads. Raises RequestError."""
    if name in _BUILT_IN:
        make_evaluator(name, options, folder_here(folder))


def check_evaluator(
    name: str, options: Mapping[str, Any], folder: Path, splits: Mapping[str, str], *, allow_code: bool
) -> UserCode | None:
    """The code of an evaluator of the user's own, as it is now; None for one that is built in, after a look at its options.

    Nothing of the user's is run. Unless `allow_code`, all code must lie in or below `folder`. Raises RequestError."""
    if name not in _BUILT_IN:
        return read_code(name, folder, "search.evaluator", allow_code=allow_code)
    made = make_evaluator(name, options, folder)
    check_splits(made, splits)
    if isinstance(made, LMEval) and made.include_path is not None and not allow_code:  # tasks may name functions beside them
        check_below(str(made.include_path), folder, "search.evaluator.lm_eval.include_path")
    return None


def checked(evaluator: Any, name: str) -> Evaluator:
    """The evaluator, if it has both methods. Raises RequestError."""
    missing = [method for method in ("load", "score") if not callable(getattr(evaluator, method, None))]
    if missing:
        raise RequestError(
            f"search.evaluator: wanted load(model_dir) -> torch.nn.Module and score(split) -> dict[str, float], found that "
            f"{name or type(evaluator).__name__} lacks {' and '.join(missing)}. Fix: give it both methods."
        )
    found: Evaluator = evaluator
    return found


def check_splits(evaluator: Any, asked: Mapping[str, str]) -> None:
    """Whether there is data for the splits that are asked for, by their place in the request; as far as the evaluator tells by
    `splits` before it has loaded anything: one that is empty may be filled later. Raises RequestError."""
    known = getattr(evaluator, "splits", None)
    if not isinstance(known, Collection) or isinstance(known, str) or not len(known):
        return
    names, wanted = [str(name) for name in known], "a split that the evaluator has data for"
    problems = [
        checks.wrong(place, wanted, split, f"{checks.nearest(split, names)}, or give it such data")
        for place, split in asked.items()
        if split not in names
    ]
    if problems:
        raise RequestError(problems)


def _built_in(kind: Any, options: Mapping[str, Any], folder: Path, where: str) -> Any:
    """A built-in evaluator. Raises RequestError with all that is wrong with its options."""
    required, *others = (name for name in inspect.signature(kind).parameters if name != "folder")
    problems: list[str] = []
    given = checks.section(options, where, (required, *others), problems)
    what = given.pop(required, None)
    try:
        made = kind(what, **given, folder=folder)
    except RequestError as error:
        raise RequestError([*problems, *error.problems]) from None
    if problems:
        raise RequestError(problems)
    return made


def _call(what: Any, options: Mapping[str, Any], where: str, name: str) -> Any:
    try:
        inspect.signature(what).bind(**options)
    except TypeError as error:
        known = ", ".join(inspect.signature(what).parameters)
        raise RequestError(
            f"{where}.{name}: wanted its options ({known or 'none'}), found {error}. Fix: write these below its name."
        ) from None
    return what(**options)


def _by_split(raw: Any, where: str, wanted: str, fix: str, problems: list[str]) -> Iterator[tuple[str, str, Any]]:
    """Each split with its place and what is given for it."""
    if not isinstance(raw, Mapping) or not raw:
        problems.append(checks.wrong(where, f"{wanted} for each split", raw, fix))
        return
    for split, given in raw.items():
        name = checks.text(split, where, problems, "the name of a split")
        if isinstance(given, Mapping | list | tuple) and not given:
            problems.append(checks.wrong(f"{where}.{name}", wanted, None, "give it one, or remove the split"))
        yield name, f"{where}.{name}", given


def _files(data: Any, folder: Path, where: str, problems: list[str]) -> dict[str, dict[str, Path]]:
    """`data: {split: file}` or `{split: {part: file}}` as {split: {part: path}}."""
    result: dict[str, dict[str, Path]] = {}
    for split, at, given in _by_split(data, where, "a file", "write data: {val: val.jsonl, test: test.jsonl}", problems):
        if isinstance(given, Mapping):
            named = {checks.text(part, at, problems, "the name of a part"): file for part, file in given.items()}
            result[split] = {part: _path(file, "file", folder, f"{at}.{part}", problems) for part, file in named.items()}
        else:
            result[split] = {"": _path(given, "file", folder, at, problems)}
    return result


def _tasks(tasks: Any, where: str, problems: list[str]) -> dict[str, list[str]]:
    result: dict[str, list[str]] = {}
    for split, at, given in _by_split(tasks, where, "a task", "write tasks: {val: [my_task], test: [arc_easy]}", problems):
        names = given if isinstance(given, list | tuple) else [given]
        result[split] = [checks.text(name, at, problems, "the name of a task") for name in names]
    return result


def _path(raw: Any, kind: str, folder: Path, where: str, problems: list[str]) -> Path:
    name = as_path(checks.text(raw, where, problems, f"the path of a {kind}"))
    is_there = os.path.isdir if kind == "folder" else os.path.isfile
    if name and not is_there(folder / name):
        problems.append(
            f"{where}: wanted a {kind}, found none at {folder / name}. Fix: check the path, and that every node sees it."
        )
    return folder / name


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a JSONL or parquet file."""
    if path.suffix == ".parquet":
        import pyarrow.parquet

        yield from pyarrow.parquet.read_table(path).to_pylist()
        return
    for number, line in enumerate(
        path.read_text(encoding="utf-8").split("\n"), 1
    ):  # not `splitlines`: JSON may hold what else ends a line
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise RequestError(f"{path}, line {number}: wanted JSON, found {error}. Fix: write one object per line.") from None
        if not isinstance(row, dict):
            raise RequestError(
                f"{path}, line {number}: wanted an object, found {type(row).__name__}. Fix: write one object per line."
            )
        yield row


def _field(row: Mapping[str, Any], name: str, path: Path) -> Any:
    if name not in row:
        raise RequestError(
            f"{path}: wanted {name!r} in each row, found {', '.join(row)}. Fix: name the field in the evaluator's options."
        )
    return row[name]


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise RequestError(
            "search.evaluator: wanted transformers, which causal_lm and classification need, found it not installed. "
            "Fix: pip install 'pcb-ray[search]'."
        ) from None
    importlib.import_module("transformers.utils.logging").disable_progress_bar()
    return transformers


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _load_model(auto_class: Any, model_dir: Path, dtype: str) -> Any:
    """The model in float32 on a CPU, in its own dtype on a GPU, or as asked; layer by layer on several GPUs (needs accelerate)."""
    import torch

    device = _device()
    if dtype == "auto" and device == "cpu":
        dtype = "float32"
    if device == "cuda" and torch.cuda.device_count() > 1:
        return auto_class.from_pretrained(model_dir, dtype=dtype, local_files_only=True, device_map="auto").eval()
    return auto_class.from_pretrained(model_dir, dtype=dtype, local_files_only=True).to(device).eval()


class CausalLM:
    """Mean loss per token (nats) and perplexity of texts under a causal language model of transformers.

    data: {split: file} or {split: {part: file}}: plain text, or JSONL with a `text` field. With parts there is a loss for each
    (`loss_PART`), and `loss` is their mean. Texts are cut into windows of `length` tokens that overlap by one (512, or as many as
    the model has positions for); `tokens` bounds how many of a file are used.
    """

    def __init__(
        self,
        data: Mapping[str, Any],
        *,
        length: int | None = None,
        batch: int = 8,
        text: str = "text",
        tokens: int | None = None,
        dtype: str = "auto",
        folder: Path = Path("."),
    ) -> None:
        where, problems = "search.evaluator.causal_lm", list[str]()
        self.splits = _files(data, folder, f"{where}.data", problems)
        self.length = 0 if length is None else checks.whole(length, f"{where}.length", 1, problems)  # 0: as the model can
        self.batch = checks.whole(batch, f"{where}.batch", 1, problems)
        self.text = checks.text(text, f"{where}.text", problems)
        self.tokens = None if tokens is None else checks.whole(tokens, f"{where}.tokens", 1, problems)
        self.dtype = checks.choice(dtype, f"{where}.dtype", _DTYPES, problems)
        if problems:
            raise RequestError(problems)
        self._windows: dict[tuple[str, str], list[torch.Tensor]] = {}

    def load(self, model_dir: Path) -> torch.nn.Module:
        transformers = _transformers()
        tokenizer = transformers.AutoTokenizer.from_pretrained(model_dir, local_files_only=True)
        self.model = _load_model(transformers.AutoModelForCausalLM, model_dir, self.dtype)
        self.length = self.length or min(LENGTH, getattr(self.model.config, "max_position_embeddings", None) or LENGTH)
        for split, parts in self.splits.items():
            for part, path in parts.items():
                self._windows[split, part] = self._tokenize(tokenizer, path)
        model: torch.nn.Module = self.model
        return model

    def _tokenize(self, tokenizer: Any, path: Path) -> list[torch.Tensor]:
        import torch

        texts = (
            [_field(row, self.text, path) for row in _rows(path)]
            if path.suffix in (".jsonl", ".parquet")
            else [path.read_text(encoding="utf-8")]
        )
        ids: list[int] = []
        for one in texts:
            ids += tokenizer(one, verbose=False)["input_ids"]
            if self.tokens is not None and len(ids) > self.tokens:
                ids = ids[: self.tokens + 1]
                break
        if len(ids) < 2:
            raise RequestError(f"{path}: wanted two tokens at least, found {len(ids)}. Fix: give a longer text.")
        return [torch.tensor(ids[at : at + self.length + 1]) for at in range(0, len(ids) - 1, self.length)]

    def score(self, split: str) -> Metrics:
        losses = {part: self._loss(self._windows[split, part]) for part in self.splits[split]}
        mean = math.fsum(losses.values()) / len(losses)
        of_parts = {f"loss_{part}": loss for part, loss in losses.items() if part}
        return {"loss": mean, "perplexity": math.exp(min(mean, 700.0)), **of_parts}

    def _loss(self, windows: Sequence[torch.Tensor]) -> float:
        import torch

        device, total, count = self.model.device, 0.0, 0
        full = [w for w in windows if len(w) == self.length + 1]
        batches = [torch.stack(full[at : at + self.batch]) for at in range(0, len(full), self.batch)]
        batches += [w[None] for w in windows if len(w) <= self.length]
        with torch.inference_mode():
            for ids in (b.to(device) for b in batches):
                logits = self.model(ids[:, :-1], use_cache=False).logits
                loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="sum")
                total, count = total + loss.item(), count + ids[:, 1:].numel()
        return total / count


class Classification:
    """Accuracy and mean loss of a sequence classifier of transformers.

    data: {split: file} or {split: {part: file}}: JSONL or parquet with a text and an integer label (or one of the config's label
    names) in each row; with parts there is an accuracy for each (`accuracy_PART`), and `accuracy` and `loss` are means over the
    parts.
    """

    def __init__(
        self,
        data: Mapping[str, Any],
        *,
        text: str = "text",
        label: str = "label",
        length: int = 512,
        batch: int = 32,
        dtype: str = "auto",
        folder: Path = Path("."),
    ) -> None:
        where, problems = "search.evaluator.classification", list[str]()
        self.splits = _files(data, folder, f"{where}.data", problems)
        self.text = checks.text(text, f"{where}.text", problems)
        self.label = checks.text(label, f"{where}.label", problems)
        self.length = checks.whole(length, f"{where}.length", 1, problems)
        self.batch = checks.whole(batch, f"{where}.batch", 1, problems)
        self.dtype = checks.choice(dtype, f"{where}.dtype", _DTYPES, problems)
        if problems:
            raise RequestError(problems)
        self._batches: dict[tuple[str, str], list[tuple[Any, torch.Tensor]]] = {}

    def load(self, model_dir: Path) -> torch.nn.Module:
        transformers = _transformers()
        tokenizer = transformers.AutoTokenizer.from_pretrained(model_dir, local_files_only=True)
        self.model = _load_model(transformers.AutoModelForSequenceClassification, model_dir, self.dtype)
        if self.model.config.pad_token_id is None:
            self.model.config.pad_token_id = tokenizer.pad_token_id
        for split, parts in self.splits.items():
            for part, path in parts.items():
                self._batches[split, part] = self._read(tokenizer, path)
        model: torch.nn.Module = self.model
        return model

    def _read(self, tokenizer: Any, path: Path) -> list[tuple[Any, torch.Tensor]]:
        import torch

        rows = list(_rows(path))
        if not rows:
            raise RequestError(f"{path}: wanted some rows, found none. Fix: give the split some data.")
        labels = torch.tensor([self._number_of(_field(row, self.label, path), path) for row in rows])
        texts = [_field(row, self.text, path) for row in rows]
        result = []
        for at in range(0, len(rows), self.batch):
            inputs = tokenizer(
                texts[at : at + self.batch], padding=True, truncation=True, max_length=self.length, return_tensors="pt"
            )
            result.append((inputs, labels[at : at + self.batch]))
        return result

    def _number_of(self, label: Any, path: Path) -> int:
        known = self.model.config.label2id
        number = known.get(label) if isinstance(label, str) else label
        if not isinstance(number, int) or not 0 <= number < self.model.config.num_labels:
            raise RequestError(
                f"{path}: wanted a label of the model ({', '.join(known)}), found {label!r}. Fix: use these, or numbers from 0."
            )
        return number

    def score(self, split: str) -> Metrics:
        parts = {part: self._score(self._batches[split, part]) for part in self.splits[split]}
        means = {key: math.fsum(p[key] for p in parts.values()) / len(parts) for key in ("accuracy", "loss")}
        return means | {f"accuracy_{part}": found["accuracy"] for part, found in parts.items() if part}

    def _score(self, batches: Sequence[tuple[Any, torch.Tensor]]) -> Metrics:
        import torch

        right, loss, count = 0, 0.0, 0
        with torch.inference_mode():
            for inputs, labels in batches:
                logits = self.model(**inputs.to(self.model.device)).logits.float().cpu()
                right += int((logits.argmax(dim=-1) == labels).sum())
                loss += torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item()
                count += len(labels)
        return {"accuracy": right / count, "loss": loss / count}


class LMEval:
    """Tasks of EleutherAI's lm-evaluation-harness by name, also from YAML files in a local folder. Needs the extra `lm-eval`.

    tasks: {split: [task, ...]}. Metrics are TASK/METRIC, such as arc_easy/acc (of a task with several filters the first one's; each
    is there as TASK/METRIC,FILTER too), and METRIC the mean over the tasks of the split that have it. Tasks and data are loaded
    once; `num_fewshot` and the harness's own seed of 1234 decide the examples in the prompts.
    """

    def __init__(
        self,
        tasks: Mapping[str, Any],
        *,
        include_path: str | None = None,
        num_fewshot: int | None = None,
        limit: float | None = None,
        chat_template: bool = False,
        batch: int = 8,
        dtype: str = "auto",
        folder: Path = Path("."),
    ) -> None:
        where, problems = "search.evaluator.lm_eval", list[str]()
        self.splits = _tasks(tasks, f"{where}.tasks", problems)
        self.include_path = (
            None if include_path is None else _path(include_path, "folder", folder, f"{where}.include_path", problems)
        )
        self.num_fewshot = None if num_fewshot is None else checks.whole(num_fewshot, f"{where}.num_fewshot", 0, problems)
        self.limit = None if limit is None else checks.number(limit, f"{where}.limit", problems, is_positive=True)
        self.chat_template = checks.flag(chat_template, f"{where}.chat_template", problems)
        self.batch = checks.whole(batch, f"{where}.batch", 1, problems)
        self.dtype = checks.choice(dtype, f"{where}.dtype", _DTYPES, problems)
        if problems:
            raise RequestError(problems)

    def load(self, model_dir: Path) -> torch.nn.Module:
        try:
            from lm_eval.models.huggingface import HFLM
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise RequestError(
                f"search.evaluator: wanted the harness lm_eval, found {error}. Fix: pip install 'pcb-ray[lm-eval]'."
            ) from None
        manager = TaskManager(include_path=None if self.include_path is None else str(self.include_path))
        known = set(manager.all_tasks)
        unknown = [(split, name) for split, names in self.splits.items() for name in names if name not in known]
        if unknown:
            raise RequestError(
                checks.wrong(
                    f"search.evaluator.lm_eval.tasks.{split}",
                    "a task of the harness",
                    name,
                    f"{checks.nearest(name, manager.all_tasks, 'check the name')}, or give `include_path`",
                )
                for split, name in unknown
            )
        self._loaded = {split: manager.load(names) for split, names in self.splits.items()}
        for task in (task for loaded in self._loaded.values() for task in loaded["tasks"].values()):
            own = task.get_config("num_fewshot")
            if own != 0:  # a task that says 0 means it, as in the harness's own command
                task.set_config(key="num_fewshot", value=(own or 0) if self.num_fewshot is None else self.num_fewshot)
        transformers = _transformers()
        model = _load_model(transformers.AutoModelForCausalLM, model_dir, self.dtype)
        tokenizer = transformers.AutoTokenizer.from_pretrained(model_dir, local_files_only=True)
        self._harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=self.batch)
        module: torch.nn.Module = model
        return module

    def score(self, split: str) -> Metrics:
        import lm_eval
        import torch

        loaded = self._loaded[split]
        torch.manual_seed(1234)  # for tasks that sample what they generate
        for task in loaded["tasks"].values():
            task.set_fewshot_seed(seed=1234)
        # Not `simple_evaluate`: it would load the tasks again and describe the machine, for a second and more in each trial.
        results = lm_eval.evaluate(
            self._harness,
            loaded,
            limit=self.limit,
            log_samples=False,
            bootstrap_iters=0,
            apply_chat_template=self.chat_template,
        )["results"]
        found: Metrics = {}
        of_metric: dict[str, list[float]] = {}
        of_named: dict[str, list[float]] = {}  # a group stands beside its members: it is not to count twice
        for task, values in results.items():
            for key, value in values.items():
                metric, is_filtered, by = key.partition(",")
                if is_filtered and isinstance(value, int | float) and not metric.endswith("_stderr"):
                    if by != "none":
                        found[f"{task}/{key}"] = float(value)
                    if f"{task}/{metric}" in found:
                        continue
                    found[f"{task}/{metric}"] = float(value)
                    of_metric.setdefault(metric, []).append(float(value))
                    if task in self.splits[split]:
                        of_named.setdefault(metric, []).append(float(value))
        return found | {metric: math.fsum(values) / len(values) for metric, values in (of_metric | of_named).items()}


class Command:
    """A shell command that scores a model directory; {model} and {split} in it are filled in. Its last line of output is a JSON
    object of numbers.

    The candidate is written to a scratch folder (below `scratch`, or the system's), and removed when the command has ended, or the
    process that ran it, however that ended.
    """

    def __init__(self, run: str, *, scratch: str | None = None, timeout: float | None = None, folder: Path = Path(".")) -> None:
        where, problems = "search.evaluator.command", list[str]()
        if not isinstance(run, str) or "{model}" not in run:
            fix = "write one such as `python eval.py {model} {split}`, or the score would be that of no model"
            problems.append(checks.wrong(f"{where}.run", "a command with {model} in it", run, fix))
        self.run, self.folder = run, folder
        self.scratch = None if scratch is None else _path(scratch, "folder", folder, f"{where}.scratch", problems)
        self.timeout = None if timeout is None else checks.number(timeout, f"{where}.timeout", problems, is_positive=True)
        if problems:
            raise RequestError(problems)

    def load(self, model_dir: Path) -> torch.nn.Module:
        from safetensors.torch import load_file

        self.model_dir = Path(model_dir)
        files = sorted(self.model_dir.rglob("*.safetensors"))  # an index may lead to subfolders
        if not files:
            raise RequestError(
                "search.evaluator.command: wanted a base in safetensors files, found none. "
                "Fix: save it with transformers' save_pretrained."
            )
        self.files = {file.relative_to(self.model_dir).as_posix(): load_file(file) for file in files}
        return module_of({name: tensor for tensors in self.files.values() for name, tensor in tensors.items()})

    def score(self, split: str) -> Metrics:
        from safetensors.torch import save_file

        with _scratch(self.scratch) as (scratch, to_guard):
            for path in self.model_dir.iterdir():
                if path.is_file() and path.name not in self.files:
                    shutil.copy(path, scratch)
            for name, tensors in self.files.items():
                (scratch / name).parent.mkdir(parents=True, exist_ok=True)
                save_file(tensors, scratch / name, metadata={"format": "pt"})
            filled = self.run.replace("{model}", shlex.quote(str(scratch))).replace("{split}", shlex.quote(split))
            code, output, errors = _run_shell(filled, self.folder, self.timeout, to_guard)
        told = errors.strip() if code != 0 else ""
        last = (told or output.strip() or "it printed nothing").splitlines()[-1]
        ran, shown = checks.without_secrets(repr(filled))[:500], checks.without_secrets(last)[:300]
        if code != 0:
            raise RuntimeError(f"{ran} ended with code {code}: {shown}")
        try:
            metrics: Metrics = json.loads(last)
        except ValueError:
            raise RuntimeError(f"{ran}: its last line is not JSON: {shown}") from None
        return metrics


_BUILT_IN = {"causal_lm": CausalLM, "classification": Classification, "lm_eval": LMEval, "command": Command}

# Its input ends when this process does, however that ends: then it ends the command's processes and removes the model.
# In the background, since Ray ends the children of a process with it.
_GUARD = """exec 3<&0; { read -r group; cat >/dev/null; [ -z "$group" ] || kill -9 "-$group"; rm -rf -- "$0"; } <&3 3<&- &"""


@contextlib.contextmanager
def _scratch(folder: Path | None) -> Iterator[tuple[Path, IO[bytes]]]:
    """A folder that is removed, also if this process is killed; and where to write the process group that is to end with it."""
    with tempfile.TemporaryDirectory(prefix="pcb-ray-", dir=folder) as place:
        options: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        with subprocess.Popen(["sh", "-c", _GUARD, place], start_new_session=True, **options) as guard:
            assert guard.stdin is not None
            yield Path(place), guard.stdin


def _run_shell(command: str, folder: Path, timeout: float | None, to_guard: IO[bytes]) -> tuple[int, str, str]:
    """Exit code, output and errors. Its `python` is this one; whatever it has started ends with it."""
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")])
    # It begins when the guard knows it, and not at all if this process ends before.
    waiting = f"read -r _ || exit 1; exec </dev/null\n{command}"
    with subprocess.Popen(
        waiting,
        shell=True,
        cwd=folder,
        env=os.environ | {"PATH": path},
        text=True,
        start_new_session=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        to_guard.write(b"%d\n" % process.pid)
        to_guard.flush()
        try:
            output, errors = process.communicate("\n", timeout=timeout)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, output, errors


def module_of(tensors: Mapping[str, torch.Tensor]) -> torch.nn.Module:
    """A module whose parameters are these tensors by name."""
    import torch

    root = torch.nn.Module()
    for name, tensor in tensors.items():
        *path, last = name.split(".")
        module = root
        for part in path:
            if part not in module._modules:
                module.add_module(part, torch.nn.Module())
            module = module.get_submodule(part)
        module.register_buffer(last, tensor)
    return root


# --- a module and a checkpoint ----------------------------------------------------------------------------------------------------


def match(
    module: torch.nn.Module, shapes: Mapping[str, tuple[int, ...]], optional: Mapping[str, tuple[int, ...]] = NONE
) -> dict[str, torch.Tensor]:
    """The module's parameter or buffer for each of the merge's tensors, or the part of one that holds it; also for those of
    `optional` that it has. A prefix that all names on one side share is found by itself, and so are the names under which
    transformers saves what it has renamed or fused.

    Raises RequestError that lists both sides if any has none, or one of another shape."""
    own = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
    own = _as_saved(module, own) | own
    to_own = max(_renamings(own, shapes), key=lambda rename: sum(rename(name) in own for name in shapes))
    wanted = {**shapes, **optional}
    found = {name: own[to_own(name)] for name in wanted if to_own(name) in own}
    lost = [name for name in shapes if name not in found]
    if lost:
        unused = sorted(set(own) - {to_own(name) for name in shapes})
        raise RequestError(
            f"search.evaluator: wanted a module with the {len(shapes)} merged tensors, found one without {len(lost)} of them, "
            f"{_some(lost)}; of its own, nothing was matched to {_some(unused) or 'none'}. "
            "Fix: return the module whose state_dict has the checkpoint's names."
        )
    without = [name for name, tensor in found.items() if tensor.is_meta]
    problems = []
    if without:
        problems.append(
            f"search.evaluator: wanted a module with all its data, found {len(without)} tensors offloaded to disk or memory: "
            f"{_some(without)}. Fix: load all of it on CPU or GPUs, such as with more of them."
        )
    problems += [
        f"{name}: wanted the shape {list(shape)} of the merge, found {list(found[name].shape)} in the evaluator's module "
        f"({to_own(name)}). Fix: load the model as the base's config says."
        for name, shape in wanted.items()
        if name in found and tuple(found[name].shape) != shape
    ]
    if problems:
        raise RequestError(problems)
    return found


def _renamings(own: Mapping[str, Any], shapes: Mapping[str, Any]) -> Iterator[Any]:
    """Ways to come from the merge's names to the module's: as they are, with a prefix more, with a prefix less."""
    yield lambda name: name
    first = next(iter(shapes))
    for prefix in {name.removesuffix(first) for name in own if name.endswith("." + first)}:
        yield lambda name, prefix=prefix: prefix + name
    parts = first.split(".")
    for prefix in (".".join(parts[:count]) + "." for count in range(1, len(parts))):
        if all(name.startswith(prefix) for name in shapes):
            yield lambda name, prefix=prefix: name.removeprefix(prefix)


def _as_saved(module: torch.nn.Module, own: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of the transformers models in the module by the names that `save_pretrained` gives them, as views of their
    parameters.

    On loading, transformers renames some and fuses others (the experts of a mixture become one parameter); its way back is run here
    on the parameters themselves. What it can't give back without a copy is left out, since an update of a copy would be lost."""
    if "transformers" not in sys.modules:
        return {}
    from transformers import PreTrainedModel

    result: dict[str, torch.Tensor] = {}
    storages = {tensor.untyped_storage().data_ptr() for tensor in own.values()}
    outermost: list[str] = []
    for prefix, part in module.named_modules():
        if isinstance(part, PreTrainedModel) and not any(prefix.startswith(outer) for outer in outermost):
            outermost.append(f"{prefix}." if prefix else "")
            tensors = {name.removeprefix(outermost[-1]): t.detach() for name, t in own.items() if name.startswith(outermost[-1])}
            saved = as_saved(part, tensors)
            result |= {outermost[-1] + name: t for name, t in saved.items() if t.untyped_storage().data_ptr() in storages}
    return result


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
