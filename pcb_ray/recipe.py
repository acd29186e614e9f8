"""What the user wants, frozen and checked: a recipe in YAML that a mergekit user can read at once.

Nothing on disk is asked but the recipe's own file. Everything that is wrong is collected and raised as one
`RequestError`; what is right but may surprise a mergekit user becomes a note. Reading a recipe costs no more
than its text is long: size, depth, aliases and tags are bounded before a value is made.
"""

from __future__ import annotations

import difflib
import math
import numbers
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from pcb_ray.errors import RequestError

METHODS = ("pcb", "ties", "task_arithmetic", "linear")
VARIANTS = ("released", "pairwise", "paper")
DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}

Rule = tuple[str | None, float]
"""(filter, value): the value for tensors whose name contains the filter; None matches every name."""

MAX_TEXT_BYTES = 1 << 20
MAX_NODES = 50_000  # YAML nodes with aliases written out: what bounds the work of everything below
MAX_DEPTH = 32
MAX_MODELS = 1_000
MAX_RULES = 256  # weight rules of one model
MAX_STRING = 4_096
MAX_TEMPLATE = 1 << 18

_DTYPE_NAMES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "f32": "float32", "f16": "float16"}
_LARGEST = 3.4028234663852886e38  # of float32, in which the merge is computed

# Which methods a setting has an effect on.
_EFFECT = {"density": ("pcb", "ties"), "lambda": ("pcb", "ties", "task_arithmetic"), "variant": ("pcb",)}

_TOP_KEYS = (
    "merge_method", "base_model", "models", "parameters", "dtype", "out_dtype", "exclude", "tokenizer_source",
    "chat_template", "search",
)  # fmt: skip
_MODEL_KEYS = ("model", "parameters")
_MODEL_PARAMETERS = ("weight", "density", "int8_mask")
_PARAMETERS = ("density", "lambda", "variant", "weight", "int8_mask", "normalize")
_RULE_KEYS = ("filter", "value")

# Where a key belongs that stands in the wrong place; the first that fits wins.
_HOMES = (
    (_TOP_KEYS, "at the top level"),
    (_PARAMETERS, "in the top-level `parameters`"),
    (_MODEL_KEYS, "in an entry of `models`"),
)

_BY_NAME = "give `weight` rules by tensor name, such as {filter: layers.0., value: 0.5}"

# Keys of mergekit that change results there, with the nearest that can be had here.
_REFUSED_KEYS = {
    "slices": f"list whole models in `models`; {_BY_NAME}",
    "modules": "merge one module at a time: a recipe with `models` for each",
    "tokenizer": "use `tokenizer_source: base` or name one of the models there",
    "rescale": "remove it: kept values are never rescaled here; `parameters.lambda` scales the whole sum",
    "gradients": _BY_NAME,
    "layer_range": f"list whole models in `models`; {_BY_NAME}",
    "sources": "list whole models in `models`",
    "epsilon": "remove it: it belongs to `della`; `ties` and `pcb` need `density` alone",
    "gamma": "remove it: it belongs to `breadcrumbs`; `ties` and `pcb` need `density` alone",
    "t": "remove it: it belongs to `slerp`; give each model a `weight` with `merge_method: linear`",
    "select_topk": "remove it: it belongs to `sce`; `parameters.density` is the fraction that is kept",
    "consensus_method": "remove it: `ties` elects signs by their sum; `pcb` weighs agreement by itself",
    "residual_weight": "remove it: it belongs to `slices`; give each model a `weight`",
}
_NEAREST_METHODS = {  # of mergekit
    "pcb": ("sce", "arcee_fusion"),
    "ties": ("dare_ties", "della", "breadcrumbs_ties"),
    "task_arithmetic": ("dare_linear", "della_linear", "breadcrumbs"),
    "linear": ("slerp", "nuslerp", "multislerp", "karcher", "model_stock", "nearswap", "passthrough"),
}


@dataclass(frozen=True)
class Model:
    """One fine-tuned model and its part in the merge. It is checked by the Recipe that holds it."""

    source: str
    weight: tuple[Rule, ...] = ((None, 1.0),)
    """lambda_i by tensor name; the first rule that matches wins. A Recipe ends it with a rule that matches all."""
    density: float | None = None
    """Its own mask ratio, else the recipe's."""


_UNREAD = Model(source="")  # keeps the place of an entry that was already complained about


@dataclass(frozen=True)
class Recipe:
    """A valid merge request, complete: equal recipes ask for the same merge of the same files.

    Wherever it comes from, it is checked and put into one form: sources are text, numbers are finite floats, every
    model's weight ends with a rule that matches all, and (but for `linear`, which averages what is listed) an entry
    of `models` that names the base is gone. Raises RequestError with all that is wrong.

    For `linear` without a `base_model` the first model stands in for the base: its config, tokenizer and dtypes.
    """

    models: tuple[Model, ...]
    base_model: str | None = None
    """Required for all methods but `linear`."""
    merge_method: str = "pcb"
    density: float = 0.1
    """The mask ratio r: the fraction of all merged elements that is kept."""
    lambda_: float = 1.0
    variant: str = "pairwise"
    dtype: str | None = None
    """Of the output, a key of DTYPES; None: the base's, tensor by tensor."""
    exclude: tuple[str, ...] = ()
    """fnmatch patterns of tensor names that are taken from the base."""
    tokenizer_source: str = "base"
    """`base`, or the source of one of the models exactly as it stands in `models`."""
    chat_template: str | None = None
    """A Jinja template; None: the one among the tokenizer files is copied."""
    folder: Path = field(default=Path("."), compare=False)
    """Relative paths are resolved against it."""
    notes: tuple[str, ...] = field(default=(), compare=False)
    """What a mergekit user should know, to be printed before the run."""

    def __post_init__(self) -> None:
        problems: list[str] = []
        notes = list(self.notes)
        folder = Path(self.folder)
        method = _choice(self.merge_method, "merge_method", METHODS, problems)
        base = None if self.base_model is None else _text(self.base_model, "base_model", problems)
        if self.base_model is None and method != "linear" and not problems:
            problems.append(
                f"base_model: `{method}` needs the model that all others were fine-tuned from, found none. "
                "Fix: add `base_model: PATH`."
            )
        models = _models(self.models, problems, notes)
        models = _distinct(models, base if method != "linear" else None, folder, problems, notes)
        exclude = [self.exclude] if isinstance(self.exclude, str) else self.exclude
        if not isinstance(exclude, (list, tuple)):
            problems.append(_wrong("exclude", "a list of name patterns", exclude, 'write it as ["*.inv_freq"]'))
            exclude = ()
        patterns = [_text(pattern, f"exclude[{i}]", problems) for i, pattern in enumerate(exclude)]
        checked = {
            "models": models,
            "base_model": base,
            "merge_method": method,
            "density": _density(self.density, "parameters.density", problems),
            "lambda_": _number(self.lambda_, "parameters.lambda", problems),
            "variant": _choice(self.variant, "parameters.variant", VARIANTS, problems),
            "dtype": None if self.dtype is None else _dtype(self.dtype, "dtype", problems),
            "exclude": tuple(dict.fromkeys(patterns)),
            "tokenizer_source": _tokenizer_source(self.tokenizer_source, models, base, folder, problems),
            "chat_template": None if self.chat_template is None else _template(self.chat_template, problems),
            "folder": folder,
        }
        if method == "linear":
            problems += _vanishing_sums(models)
        if problems:
            raise RequestError(problems)
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        for key, differs in {
            "density": self.density != Recipe.density or any(model.density is not None for model in models),
            "lambda": self.lambda_ != Recipe.lambda_,
            "variant": self.variant != Recipe.variant,
        }.items():
            if differs and method not in _EFFECT[key]:
                notes.append(_no_effect(key, method))
        notes += _weight_notes(method, models)
        object.__setattr__(self, "notes", tuple(dict.fromkeys(notes)))

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> Recipe:
        """The recipe in the file; relative paths in it are resolved against its folder. Raises RequestError."""
        name = f"recipe {_shown(str(path))}"
        try:
            file = Path(path).absolute()
            if file.is_dir():
                raise RequestError(f"{name} is a directory. Fix: name the YAML file in it.")
            if not file.exists():
                raise RequestError(f"{name} does not exist. Fix: check the path.")
            if not file.is_file():  # a pipe would be waited for
                raise RequestError(f"{name} is not a regular file. Fix: save it as a file first.")
            with file.open("rb") as stream:
                data = stream.read(MAX_TEXT_BYTES + 1)
        except OSError as error:
            raise RequestError(f"{name} can't be read: {error.strerror}. Fix: check its path and rights.") from None
        if len(data) > MAX_TEXT_BYTES:
            raise RequestError(_too_large(f"more than {MAX_TEXT_BYTES}"))
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise RequestError(f"{name} is not UTF-8 text (byte {error.start}). Fix: save it as UTF-8.") from None
        return cls.from_yaml(text, file.parent)

    @classmethod
    def from_yaml(cls, text: str, folder: str | os.PathLike[str] = ".") -> Recipe:
        """The recipe in the text: one YAML document of at most 1 MiB, without tags. Raises RequestError."""
        problems: list[str] = []
        return cls._from_section(_read_yaml(text, problems), folder, problems)

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any], folder: str | os.PathLike[str] = ".") -> Recipe:
        """The recipe in a mapping of the YAML file's layout. Raises RequestError."""
        return cls._from_section(mapping, folder, [])

    @classmethod
    def _from_section(cls, raw: object, folder: str | os.PathLike[str], problems: list[str]) -> Recipe:
        # Here only the layout is looked at: keys, sections, and what they mean in mergekit. The values are
        # handed on as they are, and the constructor checks them.
        if not isinstance(raw, Mapping):
            found = "nothing" if raw is None else _shown(raw)
            raise RequestError(
                [*problems, f"recipe: wanted `key: value` lines, found {found}. Fix: start with `merge_method: pcb`."]
            )
        notes: list[str] = []
        top = _section(raw, "recipe", _TOP_KEYS, problems)
        parameters = _section(top.get("parameters", {}), "parameters", _PARAMETERS, problems)
        method = top.get("merge_method", cls.merge_method)

        default = None
        if "weight" in parameters:
            default = _rules(parameters["weight"], "parameters.weight", problems, notes=None)
        entries = top.get("models", [])
        models: list[Model] = []
        if not isinstance(entries, (list, tuple)):
            models.append(_UNREAD)
            problems.append(_wrong("models", "a list", entries, "start each model's line with `- model: PATH`"))
        elif len(entries) > MAX_MODELS:
            raise RequestError([*problems, _too_many_models(len(entries))])
        else:
            models += [_entry(entry, f"models[{i}]", default, problems, notes) for i, entry in enumerate(entries)]
        if default and models and not any(rule in (model.weight or ()) for model in models for rule in default):
            notes.append("`parameters.weight` has no effect: each model has its own weight.")
        if models and "density" in parameters and all(model.density is not None for model in models):
            notes.append("`parameters.density` has no effect: each model has its own density.")
        if "int8_mask" in parameters:
            notes.append(_INT8_MASK)
        if "normalize" in parameters and method in METHODS:
            ones = all(value == 1 for model in models for _, value in _rules(model.weight, "", [], None))
            notes.append(_normalize_note(parameters["normalize"], str(method), ones, problems))
        if "search" in top:
            notes.append("`search` has no effect on a merge: it is used by `pcb-ray search` only.")
        dtype = top.get("dtype")
        if "out_dtype" in top:
            given, dtype = dtype, _dtype(top["out_dtype"], "out_dtype", problems)
            if given is not None and _dtype(given, "dtype", problems) != dtype:
                notes.append(
                    f"`out_dtype: {dtype}` sets the output's dtype; `dtype: {_plain(given)}` has no effect, "
                    "since the arithmetic is float32 always."
                )
        for key, methods in _EFFECT.items():
            if key in parameters and method in METHODS and method not in methods:
                notes.append(_no_effect(key, str(method)))

        given_values = {
            "base_model": top.get("base_model"),
            "merge_method": method,
            "density": parameters.get("density"),
            "lambda_": parameters.get("lambda"),
            "variant": parameters.get("variant"),
            "dtype": dtype,
            "exclude": top.get("exclude"),
            "tokenizer_source": top.get("tokenizer_source"),
            "chat_template": top.get("chat_template"),
        }
        values: dict[str, Any] = {name: value for name, value in given_values.items() if value is not None}
        try:
            recipe = cls(models=tuple(models), folder=Path(folder), notes=tuple(notes), **values)
        except RequestError as error:
            raise RequestError([*problems, *error.problems]) from None
        if problems:
            raise RequestError(problems)
        return recipe

    def to_yaml(self) -> str:
        """The recipe with its defaults spelled out; `from_yaml` of it in the same folder is equal to this one.

        Sources stand as they were given, so relative ones are still relative to `folder`. A setting without an
        effect is left out unless it was changed.
        """
        settings = {"density": self.density, "lambda": self.lambda_, "variant": self.variant}
        defaults = {"density": Recipe.density, "lambda": Recipe.lambda_, "variant": Recipe.variant}
        parameters = {key: value for key, value in settings.items() if self.merge_method in _EFFECT[key] or value != defaults[key]}
        models = []
        for model in self.models:
            own: dict[str, object] = {"weight": _plain_weight(model.weight)}
            if model.density is not None:
                own["density"] = model.density
            models.append({"model": model.source, "parameters": own})
        layout = {
            "merge_method": self.merge_method,
            "base_model": self.base_model,
            "models": models,
            "parameters": parameters or None,
            "dtype": self.dtype,
            "exclude": list(self.exclude),
            "tokenizer_source": self.tokenizer_source,
            "chat_template": self.chat_template,
        }
        present = {key: value for key, value in layout.items() if value is not None}
        # default_flow_style=None puts innermost lists and mappings on one line: `parameters: {weight: 1.0}`.
        text: str = yaml.safe_dump(present, sort_keys=False, allow_unicode=True, width=120, default_flow_style=None)
        return text

    def weight(self, model_index: int, tensor_name: str) -> float:
        """lambda_i of the model for the tensor: the value of the first rule that matches its name."""
        return _first_match(self.models[model_index].weight, tensor_name)

    def density_of(self, model_index: int) -> float:
        """The mask ratio of the model: its own, else the recipe's."""
        own = self.models[model_index].density
        return self.density if own is None else own


# ---------------------------------------------------------------------------------------------- values
# Each takes a raw value and its place, appends what is wrong to `problems`, and then returns a stand-in.

_NO_GRADIENTS = f"lists of numbers over the layers are not known; {_BY_NAME}"
_INT8_MASK = "`int8_mask` has no effect: it saves memory in mergekit; memory is bounded here without it."
_UNSAFE = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
_UNSAFE_IN_TEMPLATE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")
_DECIMAL = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", re.ASCII)
_SECRET = re.compile(r"(?<=://)[^/@\s]+(?=@)|\bhf_[A-Za-z0-9]{30,}")


def _shown(value: object) -> str:
    """A value as a message may show it: at most some 60 characters, never what is inside it, never a secret."""
    if isinstance(value, str):
        text = repr(_SECRET.sub("***", value[:MAX_STRING]))
        return text if len(text) <= 62 else text[:59] + "..."
    if isinstance(value, (list, tuple)):
        return f"a list of {len(value)}"
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, bool) or value is None:
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, float) or (isinstance(value, int) and value.bit_length() <= 128):
        return repr(value)
    return "a huge integer" if isinstance(value, int) else f"a value of type {type(value).__name__[:40]}"


def _plain(value: object) -> str:
    return _shown(value).strip("'\"")


def _wrong(where: str, wanted: str, found: object, fix: str) -> str:
    return f"{where}: wanted {wanted}, found {_shown(found)}. Fix: {_stop(fix)}"


def _stop(fix: str) -> str:
    return fix if fix.endswith("?") else fix + "."


def _no_effect(key: str, method: str) -> str:
    return f"`{key}` has no effect with `merge_method: {method}`; it belongs to {', '.join(_EFFECT[key])}."


def _too_large(found: str) -> str:
    return f"recipe: wanted at most {MAX_TEXT_BYTES} bytes, found {found}. Fix: is this the recipe, or a model file?"


def _too_many_models(count: int) -> str:
    return f"models: wanted at most {MAX_MODELS} models, found {count}. Fix: merge in several steps."


def _number(raw: object, where: str, problems: list[str]) -> float:
    if isinstance(raw, (list, tuple)):
        problems.append(_wrong(where, "one number", raw, _NO_GRADIENTS))
        return 1.0
    value = math.nan
    if isinstance(raw, numbers.Real) and not isinstance(raw, bool):
        try:
            value = float(raw)
        except OverflowError:
            value = math.inf
    elif isinstance(raw, str) and len(raw) <= 100 and _DECIMAL.fullmatch(raw.strip()):
        value = float(raw)  # YAML 1.1 reads 1e-3 as text, and people write it
    if not abs(value) <= _LARGEST:
        problems.append(_wrong(where, "a finite float32 number", raw, "write it as 0.5 or 1e-3"))
        return 1.0
    return value


def _density(raw: object, where: str, problems: list[str]) -> float:
    if isinstance(raw, (list, tuple)):
        fix = "give one per model: its threshold spans all tensors, so it can't differ between layers"
        problems.append(_wrong(where, "one number in (0, 1]", raw, fix))
        return Recipe.density
    value = _number(raw, where, problems)
    if not 0 < value <= 1:
        problems.append(_wrong(where, "a number in (0, 1]", raw, "give the fraction to keep, such as 0.1"))
        return Recipe.density
    return value


def _text(raw: object, where: str, problems: list[str]) -> str:
    if isinstance(raw, os.PathLike):
        raw = os.fspath(raw)
    if isinstance(raw, Mapping):
        problems.append(_wrong(where, "text", raw, "write it on the same line: a path, a Hub id (org/name@revision)"))
    elif not isinstance(raw, str):
        problems.append(_wrong(where, "text", raw, "put it in quotes if it is meant as text"))
    elif not raw.strip():
        problems.append(f"{where}: wanted text, found an empty text. Fix: fill it in or remove the line.")
    elif len(raw) > MAX_STRING:
        problems.append(f"{where}: wanted at most {MAX_STRING} characters, found {len(raw)}: {_shown(raw)}. Fix: shorten it.")
    elif _UNSAFE.search(raw):
        problems.append(_wrong(where, "text without control characters", raw, "remove them"))
    else:
        return str(raw)
    return ""


def _choice(raw: object, where: str, known: Sequence[str], problems: list[str]) -> str:
    if isinstance(raw, str) and raw in known:
        return raw
    nearest = next((ours for ours, theirs in _NEAREST_METHODS.items() if raw in theirs), None)
    fix = f"`{nearest}` is the nearest" if nearest else _suggestion(raw, tuple(known))
    problems.append(_wrong(where, " | ".join(known), raw, fix))
    return known[0]


def _dtype(raw: object, where: str, problems: list[str]) -> str | None:
    name = raw[:64].lower().removeprefix("torch.") if isinstance(raw, str) else ""
    name = _DTYPE_NAMES.get(name, name)
    if name in DTYPES:
        return name
    fix = "`float32` is the widest" if name in ("float64", "double", "fp64") else _suggestion(name, tuple(DTYPES))
    problems.append(_wrong(where, " | ".join(DTYPES), raw, fix))
    return None


def _template(raw: object, problems: list[str]) -> str | None:
    fix = "remove the line to copy the template of `tokenizer_source`, or give the template itself"
    if not isinstance(raw, str):
        problems.append(_wrong("chat_template", "a Jinja template", raw, fix))
    elif len(raw) > MAX_TEMPLATE:
        problems.append(f"chat_template: wanted at most {MAX_TEMPLATE} characters, found {len(raw)}. Fix: {fix}.")
    elif "{{" not in raw and "{%" not in raw:  # `auto` and template names of mergekit among them
        problems.append(_wrong("chat_template", "a Jinja template", raw, fix))
    elif _UNSAFE_IN_TEMPLATE.search(raw):
        problems.append(_wrong("chat_template", "text without control characters", raw, "remove them"))
    else:
        return raw
    return None


def _identity(source: str, folder: Path) -> str:
    """One text for the spellings of one path or id (`a`, `./a`, `a/`). Only the text is looked at."""
    return source.rstrip("/") if "://" in source else str(folder / source)


def _tokenizer_source(raw: object, models: Sequence[Model], base: str | None, folder: Path, problems: list[str]) -> str:
    before = len(problems)
    text = _text(raw, "tokenizer_source", problems)
    if text == "base" or len(problems) > before:
        return "base"
    wanted = _identity(text, folder)
    if base and wanted == _identity(base, folder):
        return "base"
    for model in models:
        # A model that is called `base` can't be named here: the word has a meaning of its own.
        if wanted == _identity(model.source, folder) and model.source != "base":
            return model.source
    if not all(model.source for model in models) and text != "union":
        return "base"  # it may be one that could not be read
    fix = "vocabularies are not joined here; write `base`" if text == "union" else "write `base`"
    problems.append(_wrong("tokenizer_source", "base or one of `models`", raw, f"{fix}, or a model as in `models`"))
    return "base"


# --------------------------------------------------------------------------------------------- weights


def _first_match(rules: Sequence[Rule], tensor_name: str) -> float:
    for part, value in rules:
        if part is None or part in tensor_name:
            return value
    return 1.0


def _shadowed(part: str | None, earlier: Sequence[Rule]) -> bool:
    """No name can reach this rule: each that it matches is matched by an earlier one."""
    return any(other is None or (part is not None and other in part) for other, _ in earlier)


def _rules(raw: object, where: str, problems: list[str], notes: list[str] | None) -> tuple[Rule, ...]:
    """The weight's rules in one form. With `notes`, they are ended by a rule that matches all, and a note says so."""
    fix = "write `weight: 1.0`, or a list of rules such as {filter: self_attn, value: 1.2}"
    before = len(problems)
    if isinstance(raw, Mapping):
        problems.append(_wrong(where, "a number or a list of rules", raw, 'start the rule with "- "'))
    elif not isinstance(raw, (list, tuple)):
        return ((None, _number(raw, where, problems)),)
    elif not raw:
        problems.append(_wrong(where, "a number or a list of rules", raw, fix))
    elif len(raw) > MAX_RULES:
        problems.append(_wrong(where, f"at most {MAX_RULES} rules", raw, "use filters that match more names"))
    elif all(isinstance(item, (int, float, str)) for item in raw):
        problems.append(_wrong(where, "a number or a list of rules", raw, _NO_GRADIENTS))
    if len(problems) > before:
        return ((None, 1.0),)
    assert isinstance(raw, (list, tuple))
    rules: list[Rule] = []
    for i, item in enumerate(raw):
        at = f"{where}[{i}]"
        if isinstance(item, tuple) and len(item) == 2:
            item = {"filter": item[0], "value": item[1]}
        if not isinstance(item, Mapping):
            problems.append(_wrong(at, "a rule", item, "write it as {filter: self_attn, value: 1.2}"))
            continue
        rule = _section(item, at, _RULE_KEYS, problems)
        if "value" not in rule:
            problems.append(f"{at}: wanted a `value`, found none. Fix: write it as {{filter: self_attn, value: 1.2}}.")
            continue
        part = None if rule.get("filter", "*") == "*" else _text(rule["filter"], f"{at}.filter", problems)
        if part and "*" in part:
            problems.append(_wrong(f"{at}.filter", "a part of a tensor name", part, "remove the `*`: a part matches anywhere"))
        elif part != "" and _shadowed(part, rules):
            problems.append(
                f"{at}: never reached, since an earlier rule matches all its names (the first match wins). "
                "Fix: move it up or remove it."
            )
        rules.append((part, _number(rule["value"], f"{at}.value", problems)))
    if len(problems) > before:
        return ((None, 1.0),)
    if notes is not None and rules[-1][0] is not None:
        rules.append((None, 1.0))
        notes.append(f"{where}: tensors that no filter matches get weight 1.0, the default.")
    return tuple(rules)


def _plain_weight(rules: Sequence[Rule]) -> float | list[dict[str, object]]:
    if len(rules) == 1:
        return rules[0][1]
    return [{"value": value} if part is None else {"filter": part, "value": value} for part, value in rules]


def _models(raw: object, problems: list[str], notes: list[str]) -> tuple[Model, ...]:
    if not isinstance(raw, (list, tuple)):
        problems.append(_wrong("models", "a tuple of Model", raw, "write models=(Model(...), Model(...))"))
        return ()
    if len(raw) > MAX_MODELS:
        problems.append(_too_many_models(len(raw)))
        return ()
    if not raw:
        problems.append("models: wanted at least one model, found none. Fix: list them, each as `- model: PATH`.")
    models = []
    for i, model in enumerate(raw):
        where = f"models[{i}]"
        if model is _UNREAD:
            models.append(model)
            continue
        if not isinstance(model, Model):
            problems.append(_wrong(where, "a Model", model, "write Model(source=PATH)"))
            continue
        source = _text(model.source, f"{where}.model", problems)
        weight = _rules(model.weight, f"{where}.parameters.weight", problems, notes)
        density = None
        if model.density is not None:
            density = _density(model.density, f"{where}.parameters.density", problems)
        models.append(Model(source, weight, density))
    return tuple(models)


def _distinct(
    models: tuple[Model, ...], base: str | None, folder: Path, problems: list[str], notes: list[str]
) -> tuple[Model, ...]:
    """The models without those that name the base; a model given twice is a problem."""
    seen: dict[str, int] = {}
    kept = []
    base_identity = _identity(base, folder) if base else None
    for i, model in enumerate(models):
        identity = _identity(model.source, folder) if model.source else f"unreadable {i}"
        if identity == base_identity:
            notes.append(f"models[{i}] {_shown(model.source)} is the base model: it is left out and not counted.")
            continue
        if identity in seen:
            problems.append(
                f"models[{i}]: {_shown(model.source)} is given twice; it is models[{seen[identity]}] too. "
                "Fix: remove one, or raise its weight."
            )
        seen.setdefault(identity, i)
        kept.append(model)
    if models and not kept:
        problems.append(f"models: wanted a fine-tuned model, found only the base {_shown(base)}. Fix: list the others.")
    return tuple(kept)


def _vanishing_sums(models: Sequence[Model]) -> list[str]:
    """`linear` divides by the sum of the weights; where the recipe alone shows that it is 0.

    Asked for names that no filter matches and for each filter alone (200 at most): each tensor is checked again
    when it is merged.
    """
    problems = []
    filters = dict.fromkeys(part for model in models for part, _ in model.weight if part is not None)
    for name in ("", *list(filters)[:200]):
        if models and math.fsum(_first_match(model.weight, name) for model in models) == 0:
            which = f" of tensors that match {_shown(name)}" if name else " where no filter matches" if filters else ""
            problems.append(
                f"models: the weights{which} sum to 0, and `linear` divides by the sum. "
                "Fix: change a weight, or use `merge_method: task_arithmetic`."
            )
    return problems


def _weight_notes(method: str, models: Sequence[Model]) -> list[str]:
    plain = [model.weight[0][1] for model in models if len(model.weight) == 1]
    total = math.fsum(plain)
    if method == "linear" or len(models) < 2 or len(plain) < len(models) or not 0.95 <= total <= 1.05:
        return []
    return [
        f"the weights sum to {total:.3g}: `weight` is not normalised here, so each model counts for a part only. "
        "Its default is 1 for each model; `lambda` scales the whole."
    ]


def _normalize_note(raw: object, method: str, ones: bool, problems: list[str]) -> str:
    """mergekit's `normalize` passes where it asks for what the method does here anyway."""
    if raw not in (0, 1) or not isinstance(raw, (bool, int, float)):
        problems.append(_wrong("parameters.normalize", "true or false", raw, "remove it"))
        return ""
    if method == "linear":
        passes, fix = bool(raw), "`linear` divides by the sum of the weights; for a plain sum use `task_arithmetic`"
    elif method == "ties":
        # Ours divides by the number of agreeing models, mergekit's by the sum of their weights.
        passes = bool(raw) and ones
        fix = "`ties` divides by the number of agreeing models; remove it, and let the weights average 1"
    else:
        passes, fix = not raw, "scale the weights by hand, or use `merge_method: linear`"
    if not passes:
        wanted = f"what `{method}` does here"
        problems.append(_wrong("parameters.normalize", wanted, bool(raw), fix))
    return f"`normalize: {_shown(bool(raw))}` has no effect: it is what `{method}` does here."


# ---------------------------------------------------------------------------------------------- layout


@lru_cache(maxsize=1024)
def _nearest(word: str, known: tuple[str, ...]) -> str | None:
    return next(iter(difflib.get_close_matches(word.lower(), known, n=1)), None)


def _suggestion(found: object, known: tuple[str, ...]) -> str:
    near = _nearest(found, known) if isinstance(found, str) and len(found) <= 32 else None
    return f"did you mean `{near}`?" if near else f"use one of {', '.join(known)}"


def _place_of(key: object, known: tuple[str, ...]) -> str:
    """The fix for a key that is not known where it stands: another spelling, or another place."""
    for keys, home in _HOMES:
        if key in keys:
            return f"write it {home}"
    here = _suggestion(key, known)
    for keys, home in _HOMES if not here.endswith("?") else ():
        there = _suggestion(key, keys)
        if there.endswith("?"):
            return f"{there} Write it {home}"
    return here


def _section(raw: object, where: str, known: tuple[str, ...], problems: list[str]) -> dict[str, Any]:
    """What a mapping says under the known keys; `key:` with nothing after it counts as absent."""
    if not isinstance(raw, Mapping):
        problems.append(_wrong(where, "`key: value` lines", raw, f"give some of {', '.join(known)}"))
        return {}
    strange = [key for key in raw if key not in known]
    for key in strange[:20]:
        fix = _REFUSED_KEYS[key] if key in _REFUSED_KEYS else _place_of(key, known)
        problems.append(f"{where}: unknown key {_shown(key)}. Fix: {_stop(fix)}")
    if len(strange) > 20:
        problems.append(f"{where}: {len(strange) - 20} more unknown keys. Fix: use {', '.join(known)}.")
    return {key: raw[key] for key in known if raw.get(key) is not None}


def _entry(entry: object, where: str, default: tuple[Rule, ...] | None, problems: list[str], notes: list[str]) -> Model:
    """One entry of `models`, its values still unchecked; `_UNREAD` if it names no model."""
    if isinstance(entry, (str, os.PathLike)):
        entry = {"model": entry}
    if not isinstance(entry, Mapping):
        problems.append(_wrong(where, "a model", entry, "write it as `- model: PATH`"))
        return _UNREAD
    section = _section(entry, where, _MODEL_KEYS, problems)
    own = _section(section.get("parameters", {}), f"{where}.parameters", _MODEL_PARAMETERS, problems)
    if "int8_mask" in own:
        notes.append(_INT8_MASK)
    weight = own.get("weight")
    if default is not None:
        # As in mergekit: where no rule of the model matches, the recipe's own `weight` decides.
        rules = () if weight is None else _rules(weight, f"{where}.parameters.weight", problems, notes=None)
        weight = (*rules, *(rule for rule in default if not _shadowed(rule[0], rules)))
    if "model" not in section:
        problems.append(f"{where}: wanted a `model`, found none. Fix: write it as `- model: PATH`.")
        return _UNREAD
    return Model(section["model"], ((None, 1.0),) if weight is None else weight, own.get("density"))


# ------------------------------------------------------------------------------------------------ YAML

_UNPRINTABLE = re.compile(r"[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def _read_yaml(text: str, problems: list[str]) -> object:
    """The value of the only document in the text, as mergekit's loader would read it, but for dates (text here).

    It is built from the parser's events. They do not nest, so that depth, aliases and tags are refused before
    anything grows, and no constructor runs. Duplicate keys are appended to `problems`; the rest raises.
    """
    if len(text) > MAX_TEXT_BYTES:
        raise RequestError(_too_large(str(len(text))))
    if bad := _UNPRINTABLE.search(text):
        before = text[: bad.start()]
        line, column = before.count("\n"), len(before) - before.rfind("\n") - 1
        raise RequestError(_at(line, column, f"character U+{ord(bad.group()):04X} is not allowed", "remove it"))
    document = _Document(problems)
    try:
        for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
            document.take(event)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        said = [getattr(error, "context", None), getattr(error, "problem", None)]
        what = ": ".join(str(part)[:100] for part in said if part) or "it is not YAML"
        line, column = (mark.line, mark.column) if mark else (0, 0)
        raise RequestError(_at(line, column, what, "check indentation, colons, brackets and quotes there")) from None
    return document.root


def _at(line: int, column: int, what: str, fix: str) -> str:
    return f"recipe, line {line + 1}, column {column + 1}: {what}. Fix: {fix}."


@dataclass
class _Open:
    """A list or mapping whose end has not been seen."""

    value: Any
    anchor: str | None
    nodes_before: int
    key: str | None = None
    merged: list[Any] = field(default_factory=list)


class _Document:
    """Events in, one value out: `root`."""

    def __init__(self, problems: list[str]) -> None:
        self.root: object = None
        self.problems = problems
        self.open: list[_Open] = []
        self.anchors: dict[str, tuple[Any, int] | None] = {}  # value and nodes; None while it is open
        self.nodes = 0
        self.documents = 0
        self.resolver: Any = yaml.resolver.Resolver()
        self.constructor: Any = yaml.constructor.SafeConstructor()

    def take(self, event: Any) -> None:
        if isinstance(event, yaml.DocumentStartEvent):
            self.documents += 1
            if self.documents > 1:
                raise _bad(event, "a second document starts", "keep one recipe in a file")
        elif isinstance(event, yaml.CollectionEndEvent):
            self.close(event)
        elif isinstance(event, yaml.NodeEvent):
            self.node(event)

    def node(self, event: Any) -> None:
        parent = self.open[-1] if self.open else None
        is_key = parent is not None and isinstance(parent.value, dict) and parent.key is None
        value, nodes = None, 1
        if isinstance(event, yaml.AliasEvent):
            value, nodes = self.anchored(event)
        elif event.tag is not None:
            raise _bad(event, f"tag {_shown(event.tag)} is not allowed", "remove it; values need no tag")
        elif isinstance(event, yaml.ScalarEvent):
            value = event.value if is_key else self.scalar(event)  # a key is text, whatever it looks like: `on`, `1`
            if event.anchor:
                self.anchors[event.anchor] = (value, 1)
        else:
            value = {} if isinstance(event, yaml.MappingStartEvent) else []
        self.nodes += nodes
        if self.nodes > MAX_NODES:
            raise _bad(event, f"more than {MAX_NODES} values, aliases written out", "shorten the recipe")
        if is_key and not isinstance(value, str):
            raise _bad(event, "a key must be plain text", "start the line with `key:`")
        self.place(event, value)
        if isinstance(event, yaml.CollectionStartEvent):
            if len(self.open) == MAX_DEPTH:
                raise _bad(event, f"nested more than {MAX_DEPTH} deep", "a recipe needs no such depth")
            if event.anchor:
                self.anchors[event.anchor] = None
            self.open.append(_Open(value, event.anchor, self.nodes - 1))

    def place(self, event: Any, value: Any) -> None:
        if not self.open:
            self.root = value
            return
        parent = self.open[-1]
        if isinstance(parent.value, list):
            parent.value.append(value)
        elif parent.key is None:
            parent.key = value
        else:
            if parent.key == "<<":
                parent.merged.append(value)  # it may still be empty: its own events come next
            elif parent.key in parent.value:
                mark = event.start_mark
                what = f"key {_shown(parent.key)} is given twice"
                self.problems.append(_at(mark.line, mark.column, what, "remove one"))
            else:
                parent.value[parent.key] = value
            parent.key = None

    def close(self, event: Any) -> None:
        done = self.open.pop()
        for merged in done.merged:
            for mapping in merged if isinstance(merged, list) else [merged]:
                if not isinstance(mapping, dict):
                    raise _bad(event, "`<<` takes a mapping or a list of them", "write `<<: *name`")
                for key, value in mapping.items():
                    done.value.setdefault(key, value)  # what is written out wins, then what comes first
        if done.anchor:
            self.anchors[done.anchor] = (done.value, self.nodes - done.nodes_before)

    def anchored(self, event: Any) -> tuple[Any, int]:
        if event.anchor not in self.anchors:
            raise _bad(event, f"alias {_shown(event.anchor)} names no anchor above", "write the value itself")
        found = self.anchors[event.anchor]
        if found is None:
            raise _bad(event, f"alias {_shown(event.anchor)} is inside what it names", "write the value itself")
        return found

    def scalar(self, event: Any) -> object:
        """Plain text as YAML 1.1 reads it: null, booleans and numbers; quoted or long text stays text."""
        text = event.value
        if len(text) > 100:  # no number of use, and Python refuses to convert the longest
            return text
        tag = self.resolver.resolve(yaml.ScalarNode, text, event.implicit)
        kind = tag.rpartition(":")[2]
        if kind == "null":
            return None
        if kind not in ("bool", "int", "float"):
            return text
        try:
            return getattr(self.constructor, f"construct_yaml_{kind}")(yaml.ScalarNode(tag, text))
        except ValueError:  # `0x_` looks like a number and is none
            return text


def _bad(event: Any, what: str, fix: str) -> RequestError:
    return RequestError(_at(event.start_mark.line, event.start_mark.column, what, fix))
