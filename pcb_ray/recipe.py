"""What the user wants, frozen and checked: a recipe in YAML that a mergekit user can read at once.

Nothing on disk is asked but the recipe's own file. Everything that is wrong is collected and raised as one
`RequestError`; what is right but may surprise a mergekit user becomes a note.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from pcb_ray import methods
from pcb_ray.checks import choice, flag, nearest, number, present, section, shown, text, whole, wrong
from pcb_ray.errors import RequestError
from pcb_ray.files.objects import (
    SCHEMES,
    Access,
    is_object,
    lies_there,
    unreadable,
    uri_beside,
    uri_problem,
    without_credentials,
)
from pcb_ray.files.store import as_path, is_remote
from pcb_ray.files.stores import small_file
from pcb_ray.methods import Method, Parameter
from pcb_ray.methods.method import SHARED_PARAMETERS
from pcb_ray.user_code import UserCode, names_code, read_code

DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}

Gradient = tuple[float, ...]
"""Values over the layers, the first for the first and the last for the last; between two it is interpolated."""
Rule = tuple[str | None, float | Gradient]
"""(filter, value): the value for tensors whose name contains the filter; None matches every name."""

# What bounds the time of reading, whatever is in the text.
MAX_TEXT_BYTES = 1 << 19  # a winner of a search may have a rule per layer, group and model
MAX_EVENTS = 50_000  # of the YAML parser
MAX_DEPTH = 32
MAX_DIGITS = 1 << 13  # 1:59:59 and so on is a number to YAML, and slow to read

_TOP_KEYS = (
    "merge_method", "base_model", "models", "parameters", "dtype", "out_dtype", "exclude", "tokenizer_source",
    "chat_template", "search", "sweep", "name",
    "allow_unrelated", "storage", "transpose", "rest_tensors", "split",
)  # fmt: skip
_PARAMETERS = tuple(dict.fromkeys(name for method in methods.METHODS for name in (*method.parameters, "variant")))
_HOMES = {
    **dict.fromkeys((*_PARAMETERS, *SHARED_PARAMETERS), "write it in `parameters`"),
    **dict.fromkeys(_TOP_KEYS, "write it at the top level"),
}

# What mergekit has and we have not, with the nearest that can be had here.
_BY_NAME = "give `weight` rules by tensor name, such as {filter: layers.0., value: 0.5}"
_REFUSED_KEYS = {
    "slices": f"list whole models in `models`; {_BY_NAME}",
    "modules": "merge one module at a time, with a recipe for each",
    "tokenizer": "use `tokenizer_source: base` or name one of the models there",
    "grid": "merge each of its points with `pcb-ray merge RECIPE --into DIR`, or remove it",
    "rescale": "remove it: kept values are not rescaled here; `parameters.lambda` scales the whole sum",
}
_INT8_MASK = "`int8_mask` has no effect: it saves memory in mergekit; memory is bounded here without it."
_FIXES = _HOMES | _REFUSED_KEYS
_EQUIVALENTS = {"float64": "float32"} | {foreign: method.name for method in methods.METHODS for foreign in method.nearest_to}


@dataclass(frozen=True)
class Model:
    """One fine-tuned model and its part in the merge. It is checked by the Recipe that holds it."""

    source: str
    weight: tuple[Rule, ...] = ((None, 1.0),)
    """lambda_i by tensor name; the first rule that matches wins. A Recipe ends it with a rule that matches all."""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    """What it has of the method's parameters for itself; else the recipe's count."""


@dataclass(frozen=True)
class Recipe:
    """A valid merge request, complete: equal recipes ask for the same merge of the same files.

    Wherever it comes from, it is checked and put into one form: sources are text, numbers are finite floats, every
    model's weight ends with a rule that matches all, every parameter of the method has a value, and (but for methods
    that average what is listed) an entry of `models` that names the base is gone. Raises RequestError with all that is wrong.

    Where a method needs no base and there is none, the first model stands in for it: its config, tokenizer and dtypes.
    """

    models: tuple[Model, ...]
    base_model: str | None = None
    """Required for all methods that merge task vectors."""
    merge_method: str = methods.METHODS[0].name
    """The name of a method, or `file.py:object` or `module:object` of one of the user's own."""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    """Of the method; `variant` is one where a method has several."""
    dtype: str | None = None
    """Of the output, a key of DTYPES; None: the base's, tensor by tensor."""
    exclude: tuple[str, ...] = ()
    """fnmatch patterns of tensor names that are taken from the base."""
    tokenizer_source: str = "base"
    """`base`, or one of the models."""
    chat_template: str | None = None
    """A Jinja template; None: the one among the tokenizer files is copied."""
    lambda_by_tensor: tuple[Rule, ...] = ()
    """lambda by tensor name, as `weight` has it, in the place of the one number in `parameters`; empty where that is for all."""
    calibrate: str = ""
    """`svc`: singular values are calibrated after the merge; empty: they are not."""
    transpose: tuple[str, ...] = ()
    """fnmatch patterns of tensors that lie the other way round than their class says: of matrices, as the next two."""
    rest_tensors: tuple[str, ...] = ()
    """Patterns of tensors that are not merged as matrices."""
    split: tuple[tuple[str, tuple[int, ...]], ...] = ()
    """(pattern, outputs of each layer that is packed in such a tensor, or one number for all)."""
    allow_unrelated: bool = False
    """Whether models may be merged that are no fine-tunes of the base, as far as their weights tell."""
    storage: Mapping[str, Any] = field(default_factory=dict)
    """How object stores are reached, an `Access` or its keys by kind of store (s3, gs, az); never a credential."""
    search: Mapping[str, Any] | None = field(default=None, compare=False)
    """What a search of coefficients is to do (`search.request`): no part of the merge."""
    sweep: Mapping[str, Any] | None = field(default=None, compare=False)
    folder: Path = field(default=Path("."), compare=False)
    """Relative paths are resolved against it."""
    prefix: str = field(default="", compare=False)
    """Of a recipe that lies in a store, the URI that it lies below."""
    code: UserCode | None = field(default=None, repr=False)
    """Of a method of the user's own, as it was read when the recipe was made."""
    allow_code: bool = field(default=True, repr=False, compare=False)
    """Whether code may be run that is no file in or below `folder`. Recipes that Python code makes may name what it likes; those
    that are read from YAML may not, unless whoever reads them says so."""
    notes: tuple[str, ...] = field(default=(), compare=False)
    """What a mergekit user should know, to be printed before the run."""

    def __post_init__(self) -> None:
        problems: list[str] = []
        notes = list(self.notes)
        folder = Path(self.folder)
        name, code, variants = _methods(self.merge_method, self.code, folder, self.allow_code, problems)
        given: object = self.parameters
        by_tensor = self.lambda_by_tensor
        if next(iter(variants.values())).scale:
            given, by_tensor = _lambda_apart(given, by_tensor, problems)
        parameters = _parameters(given, "parameters", variants, problems, notes)
        method = variants.get(parameters.get("variant", ""), next(iter(variants.values())))
        base = None if self.base_model is None else _place(self.base_model, "base_model", problems)
        if base is None and method.has_base:
            problems.append(wrong("base_model", "the model that all others come from", None, "add `base_model: PATH`"))
        models = _models(self.models, base if method.has_base else None, folder, method, problems, notes)
        checked = {
            "models": models,
            "base_model": base,
            "merge_method": name,
            "parameters": parameters,
            "dtype": None if self.dtype is None else _dtype(self.dtype, problems),
            "exclude": _patterns(self.exclude, "exclude", problems),
            "calibrate": _calibrate(self.calibrate, method, problems),
            "transpose": _patterns(self.transpose, "transpose", problems),
            "rest_tensors": _patterns(self.rest_tensors, "rest_tensors", problems),
            "split": _split(self.split, problems),
            "tokenizer_source": _tokenizer_source(self.tokenizer_source, models, base, folder, problems),
            "chat_template": None if self.chat_template is None else _template(self.chat_template, problems),
            "lambda_by_tensor": by_tensor if method.scale else (),
            "allow_unrelated": flag(self.allow_unrelated, "allow_unrelated", problems),
            "storage": _storage(self.storage, problems),
            "folder": folder,
            "code": code,
        }
        plain = [model.weight[0][1] for model in models if len(model.weight) == 1 and isinstance(model.weight[0][1], float)]
        whole = len(plain) == len(models)
        if models and whole and (problem := method.wrong_weights(plain)):
            problems.append(f"models: {problem}. Fix: change a weight.")
        if problems:
            raise RequestError(problems)
        for key, value in checked.items():
            object.__setattr__(self, key, value)
        total = math.fsum(plain) if whole else math.nan
        asked_as_there = method.variant and method.variant in method.normalize.variants.values()
        if method.has_base and len(models) > 1 and 0.95 <= total <= 1.05 and not asked_as_there:
            notes.append(
                f"the weights sum to {total:.3g}: `weight` is not normalised here, so each model counts for a part only. "
                "Its default is 1 for each model; `lambda` scales the whole."
            )
        if method.normalize.unasked and not method.variant and any(value != 1.0 for model in models for _, value in model.weight):
            notes.append(method.normalize.unasked)
        if code is not None:
            notes.append(f"merge_method runs {code.told}.")
        object.__setattr__(self, "notes", tuple(dict.fromkeys(notes)))

    def __hash__(self) -> int:
        return hash((self.to_yaml(), self.code))

    @property
    def method(self) -> Method:
        """The record of the method."""
        if self.code is not None:
            return methods.own_method(self.code)
        return methods.variants_of(self.merge_method)[self.parameters.get("variant", "")]

    def with_parameters(self, changes: Mapping[str, Any]) -> Recipe:
        """The recipe with other values of some parameters, for all models alike."""
        models = tuple(
            dataclasses.replace(m, parameters={k: v for k, v in m.parameters.items() if k not in changes}) for m in self.models
        )
        by_tensor = () if self.method.scale in changes else self.lambda_by_tensor
        return dataclasses.replace(self, models=models, parameters={**self.parameters, **changes}, lambda_by_tensor=by_tensor)

    @classmethod
    def of(cls, recipe: Recipe | Mapping[str, Any] | str | os.PathLike[str], *, allow_code: bool = False) -> Recipe:
        """A recipe from its file, from the dictionary that such a file holds, or as it is. Raises RequestError."""
        if isinstance(recipe, Recipe):
            return dataclasses.replace(recipe, allow_code=True) if allow_code and not recipe.allow_code else recipe
        return cls.from_dict(recipe, os.getcwd()) if isinstance(recipe, Mapping) else cls.from_file(recipe, allow_code=allow_code)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str], *, allow_code: bool = False) -> Recipe:
        """The recipe in the file, or in the object of this URI; relative paths in it are of its folder, or its prefix. Code of the
        user's own must be a file in or below that folder, unless `allow_code`. Raises RequestError."""
        mapping, folder, prefix = read_file(path, allow_code=allow_code)
        return cls.from_dict(mapping, folder, allow_code=allow_code, prefix=prefix)

    @classmethod
    def from_yaml(cls, text: str | bytes, folder: str | os.PathLike[str] = ".", *, allow_code: bool = False) -> Recipe:
        """The recipe in the text, as in a file in `folder`: one YAML document of at most 512 KiB, without aliases and tags. Raises
        RequestError."""
        return cls.from_dict(read_yaml(text), folder, allow_code=allow_code)

    @classmethod
    def from_dict(
        cls,
        mapping: Mapping[str, Any],
        folder: str | os.PathLike[str] = ".",
        *,
        allow_code: bool = True,
        code: UserCode | None = None,
        prefix: str = "",
    ) -> Recipe:
        """The recipe in a mapping of the YAML file's layout, as `read_file` gives it. `code` is that of its method, if it has been
        read already. Raises RequestError."""
        # Here only keys and sections are looked at, and what they mean in mergekit: the constructor checks the values.
        if not isinstance(mapping, Mapping):
            raise RequestError(wrong("recipe", "`key: value` lines", mapping, "start with `merge_method: pcb`"))
        problems: list[str] = []
        notes: list[str] = []
        top = section(mapping, "recipe", _TOP_KEYS, problems, _FIXES)
        raw = top.get("parameters", {})
        if not isinstance(raw, Mapping):
            problems.append(wrong("parameters", "`key: value` lines", raw, f"give some of {', '.join(_PARAMETERS)}"))
            raw = {}
        parameters = present(raw)
        weight, int8_mask, normalize, calibrate = (parameters.pop(key, None) for key in SHARED_PARAMETERS)
        default = () if weight is None else _rules(weight, "parameters.weight", problems)
        models = top.get("models", ())
        if isinstance(models, (list, tuple)):
            models = tuple(_entry(entry, f"models[{i}]", default, problems, notes) for i, entry in enumerate(models))
            if default and all(model.weight[-len(default) :] != default for model in models):
                notes.append("`parameters.weight` has no effect: each model has its own.")
            notes += [
                f"`parameters.{name}` has no effect: each model has its own."
                for name in parameters
                if models and all(name in model.parameters for model in models)
            ]
        if top.pop("name", None) is not None:
            notes.append("`name` has no effect: OUT is named on the command line.")
        top |= {key: _source(top[key], key, problems) for key in ("base_model", "tokenizer_source") if key in top}
        if int8_mask is not None:
            notes.append(_INT8_MASK)
        named = top.get("merge_method", cls.merge_method)
        if normalize is not None:
            _, _, variants = _methods(named, code, Path(folder), allow_code, [])
            _normalize(normalize, next(iter(variants.values())), parameters, problems, notes)
        notes += _unasked(named, parameters, models)
        if "dtype" in top and top.get("out_dtype", top["dtype"]) != top["dtype"]:
            notes.append("`out_dtype` sets the output's dtype; `dtype` has no effect, since the arithmetic is float32 always.")
        asked = {
            **top,
            "parameters": parameters,
            "calibrate": calibrate,
            "models": models,
            "dtype": top.get("out_dtype", top.get("dtype")),
            "folder": Path(folder),
            "prefix": prefix,
            "code": code,
            "allow_code": allow_code,
            "notes": tuple(notes),
        }
        try:
            recipe = cls(**present({f.name: asked.get(f.name) for f in dataclasses.fields(cls)}))
        except RequestError as error:
            problems += error.problems
        if problems:
            raise RequestError(problems)
        return recipe

    def to_yaml(self) -> str:
        """The recipe with its defaults spelled out; `from_yaml` of it in the same folder is equal to this one.

        Sources stand as they were given, so relative ones are still relative to `folder`; see `resolved`.
        """
        models = []
        for model in self.models:
            own: dict[str, object] = {"weight": _written(model.weight), **model.parameters}
            models.append({"model": model.source, "parameters": own})
        parameters = {**self.parameters, **({"lambda": _written(self.lambda_by_tensor)} if self.lambda_by_tensor else {})}
        parameters |= {"calibrate": self.calibrate} if self.calibrate else {}
        layout = {
            "merge_method": self.merge_method,
            "base_model": self.base_model,
            "models": models,
            "parameters": parameters or None,
            "dtype": self.dtype,
            "exclude": list(self.exclude),
            "tokenizer_source": self.tokenizer_source,
            "chat_template": self.chat_template,
            "transpose": list(self.transpose) or None,
            "rest_tensors": list(self.rest_tensors) or None,
            "split": {pattern: list(sizes) for pattern, sizes in self.split} or None,
            "allow_unrelated": self.allow_unrelated or None,
            "storage": {kind: _written_access(access) for kind, access in self.storage.items()} or None,
        }
        # default_flow_style=None puts innermost lists and mappings on one line: `parameters: {weight: 1.0}`.
        text: str = yaml.safe_dump(present(layout), sort_keys=False, allow_unicode=True, width=120, default_flow_style=None)
        return text

    def resolved(self) -> Recipe:
        """The same merge, asked for from anywhere: sources that exist as local paths are absolute, Hub ids stay."""

        def absolute(source: str) -> str:
            path = _path(source, self.folder)
            return str(path) if os.path.exists(path) else source

        code = self.code
        if code is not None and code.is_file:
            code = code._replace(name=f"{code.file}:{code.name.rpartition(':')[2]}")
        return dataclasses.replace(
            self,
            merge_method=self.merge_method if code is None else code.name,
            code=code,
            base_model=None if self.base_model is None else absolute(self.base_model),
            models=tuple(dataclasses.replace(model, source=absolute(model.source)) for model in self.models),
            tokenizer_source="base" if self.tokenizer_source == "base" else absolute(self.tokenizer_source),
        )

    def weight(self, model_index: int, tensor_name: str, depth: float = 0.0) -> float:
        """lambda_i of the model for a tensor, whose depth `depths_of` tells: the value of the first rule that matches its name."""
        return _value_of(self.models[model_index].weight, tensor_name, depth)

    def lambda_(self, tensor_name: str, depth: float = 0.0) -> float:
        """lambda for a tensor, likewise; 1 for a method that has none."""
        if self.lambda_by_tensor:
            return _value_of(self.lambda_by_tensor, tensor_name, depth)
        return float(self.parameters.get(self.method.scale, 1.0))


def _value_of(rules: Sequence[Rule], tensor_name: str, depth: float) -> float:
    """The value of the first rule that matches a tensor's name."""
    value = next(value for part, value in rules if part is None or part in tensor_name)
    if not isinstance(value, tuple):
        return value
    place = depth * (len(value) - 1)
    first = int(place)
    last = min(first + 1, len(value) - 1)
    return (1 - (place - first)) * value[first] + (place - first) * value[last]


def depths_of(names: Iterable[str]) -> dict[str, float]:
    """How deep in the model each tensor lies, as mergekit counts it for gradients: 0 in the first layer, 1 in the last (and in the
    only one); 0 for what is in no layer."""
    layer_of: dict[str, tuple[str, int]] = {}
    last: dict[str, int] = {}
    for name in names:
        if found := re.search(r"(?:^|\.)(\d+)\.", name):
            stack, layer = name[: found.start()], int(found[1])
            layer_of[name] = (stack, layer)
            last[stack] = max(last.get(stack, 0), layer)
    return {
        name: (1.0 if last[layer_of[name][0]] == 0 else layer_of[name][1] / last[layer_of[name][0]]) if name in layer_of else 0.0
        for name in names
    }


def _path(source: str, folder: Path) -> Path:
    """Where the source lies if it is a path; also one form for its spellings (`a`, `./a`, `a/`)."""
    return folder.absolute() / os.path.expanduser(source)


# ---------------------------------------------------------------------------------------------- parts of a recipe


# It stands for a method that is wrong, so that all else in the recipe is still looked at.
_ANY_METHOD = Method(
    name="?",
    merge=lambda block, _known, _settings: block.theta,
    parameters={name: parameter for method in methods.METHODS for name, parameter in method.parameters.items()},
    has_base=False,
)
_VARIANTS = frozenset(method.variant for method in methods.METHODS if method.variant)
_ANY = {method.variant: _ANY_METHOD for method in methods.METHODS if method.variant}
_UNREAD_METHOD = dataclasses.replace(_ANY_METHOD)  # of the user's own: nobody knows what its parameters would be


def _methods(
    raw: object, code: UserCode | None, folder: Path, allow_code: bool, problems: list[str]
) -> tuple[str, UserCode | None, dict[str, Method]]:
    """The name of a method, the code of one of the user's own, and the records by variant."""
    if not names_code(raw):
        name = choice(raw, "merge_method", methods.names(), problems, _EQUIVALENTS, " or my_methods.py:name")
        return name, None, methods.variants_of(name) or _ANY
    name = str(raw)
    try:
        if code is None or code.name != name:
            code = read_code(name, folder, "merge_method", allow_code=allow_code)
        return name, code, {"": methods.own_method(code)}
    except RequestError as error:
        problems += error.problems
        return name, None, {"": _UNREAD_METHOD}


def _parameters(raw: object, where: str, variants: Mapping[str, Method], problems: list[str], notes: list[str]) -> dict[str, Any]:
    """The parameters of the method, each with a value in one form."""
    if not isinstance(raw, Mapping):
        problems.append(wrong(where, "`key: value` lines", raw, "write such as `density: 0.1`"))
        return {}
    given = present(raw)
    found: dict[str, Any] = {}
    default = next(iter(variants))
    variant = ""
    if default or given.get("variant") not in _VARIANTS.difference(variants):  # those of another method are left for a note
        asked = given.pop("variant", default)
        variant = choice(asked, f"{where}.variant", tuple(variants), problems) if asked else ""
    method = variants.get(variant, variants[default])
    for name, parameter in method.parameters.items():
        found[name] = _value(parameter, given.pop(name, parameter.default), f"{where}.{name}", problems)
    if variant or default:
        found["variant"] = variant
    _complain(given, where, method, tuple(method.parameters), problems, notes)
    return found


def _unasked(named: object, parameters: Mapping[str, Any], models: object) -> list[str]:
    """What there is to say of parameters that nobody has given. (`models` are read, if they are a tuple.)"""
    of_name = [method for method in methods.METHODS if method.name == named][:1]
    unasked = [
        (name, parameter.unasked) for method in of_name for name, parameter in method.parameters.items() if parameter.unasked
    ]
    listed = models if isinstance(models, tuple) else ()
    return [told for name, told in unasked if name not in parameters and not (listed and all(name in m.parameters for m in listed))]


def _lambda_apart(raw: object, rules: object, problems: list[str]) -> tuple[object, tuple[Rule, ...]]:
    """Parameters with a `lambda` that is a number or none, and what it is by tensor if that is more than one number for all."""
    given = raw.get("lambda") if isinstance(raw, Mapping) else None
    if isinstance(given, (Mapping, list, tuple)):
        rules = given
    if rules == () or not isinstance(raw, Mapping):
        return raw, ()
    if given is not rules and given not in (None, 1.0):
        problems.append(wrong("parameters.lambda", "one number, or rules by tensor", given, "remove one of the two"))
    found = _rules(rules, "parameters.lambda", problems)
    if not _matches_all(found) and found:
        found = (*found, (None, 1.0))  # its default, as in mergekit
    others = {key: value for key, value in raw.items() if key != "lambda"}
    if len(found) == 1 and not isinstance(found[0][1], tuple):
        return {**others, "lambda": found[0][1]}, ()
    return others, found


def _written(rules: Sequence[Rule]) -> object:
    """Rules as a recipe has them: a number or a list of numbers where one rule matches all."""
    values = [(part, list(value) if isinstance(value, tuple) else value) for part, value in rules]
    written = [{"value": value} if part is None else {"filter": part, "value": value} for part, value in values]
    return written if len(written) > 1 else values[0][1]


def _normalize(raw: object, method: Method, parameters: dict[str, Any], problems: list[str], notes: list[str]) -> None:
    """What mergekit's `normalize` asks for: what the method does anyway, or one of its variants, which is then asked for."""
    means = method.normalize
    if not isinstance(raw, bool):
        problems.append(wrong("parameters.normalize", "true or false", raw, "write one of them, without quotes"))
    elif raw == means.harmless:
        notes.append(f"`normalize` has no effect: it asks for what `{method.name}` does anyway.")
    elif raw in means.variants:
        variant = means.variants[raw]
        if parameters.setdefault("variant", variant) != variant:
            which = f"`variant: {variant}`, which `normalize: {str(raw).lower()}` asks for"
            problems.append(wrong("parameters.variant", which, parameters["variant"], "remove one of the two"))
    elif method not in (_ANY_METHOD, _UNREAD_METHOD):
        problems.append(wrong("parameters.normalize", str(means.harmless).lower(), raw, means.fix))


def _value(parameter: Parameter, raw: object, where: str, problems: list[str]) -> Any:
    """The value of a parameter in one form, one that lasts: recipes are written with it and read again."""
    before = len(problems)
    value = parameter.check(raw, where, problems)
    if len(problems) == before:
        try:
            lasts = value is not None and parameter.check(yaml.safe_load(yaml.safe_dump(value)), where, []) == value
        except yaml.YAMLError:  # what can't be written
            lasts = False
        if not lasts:
            wanted = "a number, text or list that the parameter's own check leaves as it is"
            problems.append(f"{where}: wanted {wanted}, found it to give {value!r}. Fix: let the check give such a value.")
    return value


def _complain(
    left: Mapping[Any, Any], where: str, method: Method, known: Sequence[str], problems: list[str], notes: list[str]
) -> None:
    """About keys that are none of the method's parameters: those of another method have no effect, others are wrong."""
    if method is _UNREAD_METHOD:
        return
    for key in left:
        homes = [other.name for other in methods.METHODS if key in other.parameters or (key == "variant" and other.variant)]
        if homes:
            belongs = ", ".join(dict.fromkeys(homes))
            notes.append(f"`{key}` has no effect with `merge_method: {method.name}`; it belongs to {belongs}.")
        else:
            fix = _FIXES.get(key) if isinstance(key, str) else None
            able = (*known, *(["variant"] if method.variant else []), *SHARED_PARAMETERS)
            problems.append(f"{where}: unknown key {shown(key)}. Fix: {fix or nearest(key, able)}.")


def _entry(entry: object, where: str, default: tuple[Rule, ...], problems: list[str], notes: list[str]) -> Model:
    """One entry of `models`; but for the layout of its weight it is still unchecked."""
    says = section(entry, where, ("model", "parameters"), problems, _FIXES) if isinstance(entry, Mapping) else {"model": entry}
    raw = says.get("parameters", {})
    if not isinstance(raw, Mapping):
        problems.append(wrong(f"{where}.parameters", "`key: value` lines", raw, "write such as `parameters: {weight: 1.0}`"))
        raw = {}
    own = present(raw)
    if own.pop("int8_mask", None) is not None:
        notes.append(_INT8_MASK)
    raw_weight = own.pop("weight", None)
    weight = () if raw_weight is None else _rules(raw_weight, f"{where}.parameters.weight", problems)
    if not _matches_all(weight):  # as in mergekit: where no rule of the model matches, the recipe's own `weight` decides
        weight += default
    return Model(_source(says.get("model"), f"{where}.model", problems), weight or Model.weight, own)  # type: ignore[arg-type]


def _source(raw: object, where: str, problems: list[str], depth: int = 0) -> object:
    """A model as text. mergekit has it in parts too: `{model: org/name, revision: main}`, or that below another `model`."""
    if not isinstance(raw, Mapping):
        return raw
    keys = [key for key in ("model", "path") if raw.get(key) is not None]
    if len(keys) != 1 or depth > 2:
        fix = "write it as text, such as `model: org/name@revision`"
        problems.append(wrong(where, "a model, by `model` or by `path`", raw, fix))
        return "?"  # of which nobody complains once more
    given = {key: value for key, value in raw.items() if value is not None}  # mergekit writes out what it has not, as null
    says = section(given, where, ("model", "path", "revision", "lora"), problems)
    source = _source(says[keys[0]], f"{where}.{keys[0]}", problems, depth + 1)
    for key, sign in (("revision", "@"), ("lora", "+")):
        if key in says:
            part = _source(says[key], f"{where}.{key}", problems, depth + 1)
            source = f"{source}{sign}{text(part, f'{where}.{key}', problems)}"
    return source


def sources_in(mapping: Mapping[str, Any]) -> dict[str, str]:
    """By their places, the models that a mapping of the YAML file's layout names; what is wrong there is left out."""
    models = mapping.get("models")
    entries = models if isinstance(models, list | tuple) else ()
    named = {
        key: mapping[key]
        for key, word in (("base_model", None), ("tokenizer_source", "base"))
        if mapping.get(key) not in (None, word)
    }
    named |= {f"models[{i}]": entry.get("model") if isinstance(entry, Mapping) else entry for i, entry in enumerate(entries)}
    sources = {place: _source(raw, place, []) for place, raw in named.items()}
    return {place: source for place, source in sources.items() if isinstance(source, str) and source != "?"}


def _matches_all(rules: tuple[Rule, ...]) -> bool:
    return bool(rules) and rules[-1][0] is None


def _patterns(raw: object, where: str, problems: list[str]) -> tuple[str, ...]:
    items = raw if isinstance(raw, (list, tuple)) else [raw]
    return tuple(text(pattern, f"{where}[{i}]", problems) for i, pattern in enumerate(items))


def _calibrate(raw: object, method: Method, problems: list[str]) -> str:
    if raw in ("", "none", None):
        return ""
    found = choice(raw, "parameters.calibrate", ("svc", "none"), problems)
    if found and (method.is_flat or not method.has_base):
        why = "all singular values equal already" if method.is_flat else "no task vectors"
        problems.append(f"parameters.calibrate: wanted none with {method.name}, which has {why}, found svc. Fix: remove it.")
    return found


def _split(raw: object, problems: list[str]) -> tuple[tuple[str, tuple[int, ...]], ...]:
    if isinstance(raw, tuple):  # it has been read
        return raw
    if not isinstance(raw, Mapping):
        problems.append(wrong("split", "`pattern: [sizes]` lines", raw, 'write such as `"*.qkv_proj.weight": [4096, 1024, 1024]`'))
        return ()
    found = []
    for key, value in raw.items():
        pattern = text(key, "split", problems)
        sizes = value if isinstance(value, list | tuple) else [value]
        found.append((pattern, tuple(whole(size, f"split.{pattern}", 1, problems) for size in sizes)))
    return tuple(found)


def _dtype(raw: object, problems: list[str]) -> str:
    if isinstance(raw, str):
        name = raw.lower().removeprefix("torch.")
        raw = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}.get(name, name)
    return choice(raw, "dtype", tuple(DTYPES), problems, _EQUIVALENTS)


def _template(raw: object, problems: list[str]) -> str:
    if isinstance(raw, str) and "{" in raw and not re.search("[\ud800-\udfff]", raw):  # surrogates can't be written
        return raw
    fix = "remove the line to copy the template of `tokenizer_source`, or give the template itself"  # `auto` or a name
    problems.append(wrong("chat_template", "a Jinja template", raw, fix))
    return ""


_SECRETS = re.compile(r"secret|token|password|access_?key|account_?key|sas|credential", flags=re.IGNORECASE)


def _storage(raw: object, problems: list[str]) -> dict[str, Access]:
    """By kind of store how it is reached. A credential is refused: recipes are published with models, and sent to clusters."""
    kinds = dict.fromkeys(SCHEMES.values())
    found: dict[str, Access] = {}
    for kind, of_kind in section(raw, "storage", tuple(kinds), problems).items():
        where = f"storage.{kind}"
        if isinstance(of_kind, Access):
            found[kind] = of_kind
            continue
        if isinstance(of_kind, Mapping) and (secrets := [key for key in of_kind if _SECRETS.search(str(key))]):
            problems.append(
                f"{where}: {shown(secrets[0])}: wanted no credential in a recipe, found one. Fix: remove it, and give each node a "
                "role, or credentials in its environment or files."
            )
            continue
        says = section(of_kind, where, tuple(f.name for f in dataclasses.fields(Access)), problems)
        texts = {key: text(says[key], f"{where}.{key}", problems) for key in ("endpoint", "region") if key in says}
        endpoint = texts.get("endpoint", "")
        if endpoint and (not re.match(r"https?://[^/@?#]+(/[^@?#]*)?$", endpoint)):
            problems.append(wrong(f"{where}.endpoint", "an address without user or query", endpoint, "write http(s)://HOST:PORT"))
        found[kind] = Access(**texts, anonymous=flag(says.get("anonymous", False), f"{where}.anonymous", problems))
    return found


def _written_access(access: Access) -> dict[str, object]:
    return {key: value for key, value in dataclasses.asdict(access).items() if value}


def _place(raw: object, where: str, problems: list[str]) -> str:
    """The source of a model as text: a path, a Hub id, or a URI without credentials."""
    source = text(raw, where, problems)
    if is_remote(source := as_path(source)) and (problem := uri_problem(source)) is not None:
        problems.append(f"{where} {shown(without_credentials(source))}: {problem}")
        return ""
    return source


def _tokenizer_source(raw: object, models: Sequence[Model], base: str | None, folder: Path, problems: list[str]) -> str:
    source = raw if raw == "base" else _place(raw, "tokenizer_source", problems)
    if not source or source == "base" or (base and _path(source, folder) == _path(base, folder)):
        return "base"
    if all(_path(source, folder) != _path(model.source, folder) for model in models):
        fix = "write `base`, or a model as in `models`; vocabularies are not joined here"
        problems.append(wrong("tokenizer_source", "base or one of `models`", raw, fix))
    return source


def _rules(raw: object, where: str, problems: list[str]) -> tuple[Rule, ...]:
    """A `weight` in one form: from a number, a rule, or a list of rules, each a mapping or a pair; () if it is wrong."""
    items = raw if isinstance(raw, (list, tuple)) and not _is_gradient(raw) else [raw if isinstance(raw, Mapping) else (None, raw)]
    if not items or not all(isinstance(item, Mapping) or (isinstance(item, tuple) and len(item) == 2) for item in items):
        problems.append(wrong(where, "a number, a list of numbers over the layers, or a list of rules", raw, _BY_NAME))
        return ()
    before = len(problems)
    rules: list[Rule] = []
    for i, item in enumerate(items):
        at = where if len(items) == 1 else f"{where}[{i}]"
        if isinstance(item, Mapping):
            rule = section(item, at, ("filter", "value"), problems, _FIXES)
            item, at = (rule.get("filter"), rule.get("value")), f"{at}.value"
        part, value = item
        part = None if part in (None, "*") else text(part, f"{at}.filter", problems)  # "*" as in mergekit
        if part and "*" in part:
            problems.append(wrong(f"{at}.filter", "a part of a tensor name", part, "remove the `*`: a part matches anywhere"))
        if rules and rules[-1][0] is None:
            problems.append(f"{at}: never reached, since the rule before it matches every name. Fix: exchange them.")
        if _is_gradient(value):
            rules.append((part, tuple(number(one, f"{at}[{k}]", problems) for k, one in enumerate(value))))
        else:
            rules.append((part, number(value, at, problems)))
    return tuple(rules) if len(problems) == before else ()


def _is_gradient(raw: object) -> bool:
    """Whether it is a list of numbers, and no rule or list of rules."""
    return (
        isinstance(raw, (list, tuple)) and bool(raw) and all(isinstance(x, numbers.Real) and not isinstance(x, bool) for x in raw)
    )


def _models(
    raw: object, base: str | None, folder: Path, method: Method, problems: list[str], notes: list[str]
) -> tuple[Model, ...]:
    """The models, checked, without those that name the base."""
    if not isinstance(raw, (list, tuple)) or not raw:
        problems.append(wrong("models", "a list of models", raw or None, "list them, each as `- model: PATH`"))
        return ()
    seen: dict[Path, int] = {}
    models = []
    for i, model in enumerate(raw):
        where = f"models[{i}]"
        if not isinstance(model, Model):
            model = Model(model)
        source = _place(model.source, f"{where}.model", problems)
        weight = _rules(model.weight, f"{where}.parameters.weight", problems)
        if not _matches_all(weight):
            weight += Model.weight
            notes.append(f"{where}: tensors that no filter of its `weight` matches get 1.0, the default.")
        own = _of_model(model.parameters, f"{where}.parameters", method, problems, notes)
        path = _path(source, folder)
        if source and base and path == _path(base, folder):
            notes.append(f"{where} {shown(source)} is the base model: it is left out and not counted.")
            continue
        if source and seen.setdefault(path, i) != i:
            problems.append(f"{where}: {shown(source)} is given twice; it is models[{seen[path]}] too. Fix: remove one.")
        models.append(Model(source, weight, own))
    if not models:
        problems.append(f"models: wanted a fine-tuned model, found only the base {shown(base)}. Fix: list the others.")
    return tuple(models)


def _of_model(raw: Mapping[str, Any], where: str, method: Method, problems: list[str], notes: list[str]) -> dict[str, Any]:
    """What a model has of the method's parameters for itself."""
    given = present(raw)
    known = {name: parameter for name, parameter in method.parameters.items() if parameter.per_model}
    found = {
        name: _value(parameter, given.pop(name), f"{where}.{name}", problems) for name, parameter in known.items() if name in given
    }
    for name in [name for name in given if name in method.parameters or name == "variant"]:
        del given[name]
        problems.append(f"{where}: unknown key {shown(name)}. Fix: {_HOMES.get(name, 'write it in `parameters`')}.")
    _complain(given, where, method, tuple(known), problems, notes)
    return found


# ------------------------------------------------------------------------------------------------ YAML

_SafeLoader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's is not in every build


class _Loader(_SafeLoader):  # type: ignore[misc]
    """PyYAML's safe loader, but a key that is given twice is an error: by itself it takes the last."""

    def flatten_mapping(self, node: Any) -> None:
        """Keys are looked at once, as they were written: what `<<` brings is put into the node itself, in the place of its own."""
        if id(node) in self._flattened:
            return
        self._flattened[id(node)] = node  # it lives on, so that no other node gets its number
        keys = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in keys:
                raise _yaml_error(f"key {shown(key.value)} is given twice", key)
            keys.add(str(key.value))
        super().flatten_mapping(node)

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self._flattened: dict[int, Any] = {}


def _yaml_error(problem: str, at: Any) -> yaml.YAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=at.start_mark)


class Read(NamedTuple):
    """What a recipe's file holds, and where it lies."""

    value: Any
    folder: Path
    """Against which relative paths in it are resolved."""
    prefix: str = ""
    """What the file lies below in a store."""


def read_file(path: str | os.PathLike[str], *, allow_code: bool = False) -> Read:
    """The value of the only document in a file, or in the object of this URI. What a recipe in a store names by relative paths is
    named by URIs then; it names no code, unless `allow_code`. Raises RequestError."""
    name = as_path(os.fspath(path))
    if is_remote(name):
        return _read_far(name, allow_code)
    file = Path(name).absolute()
    try:
        if not file.is_file():  # a pipe would be waited for
            raise RequestError(f"recipe {shown(str(path))}: not a regular file, or not there. Fix: name the YAML file.")
        with file.open("rb") as stream:
            data = stream.read(MAX_TEXT_BYTES + 1)
    except OSError as error:
        raise RequestError(f"recipe {shown(str(path))}: {error.strerror}. Fix: check its path and rights.") from None
    return Read(read_yaml(data), file.parent)


def _read_far(uri: str, allow_code: bool) -> Read:
    """A recipe in a store. How that is reached the usual variables say: the recipe's own `storage` is for what it names."""
    shown_uri, prefix = shown(without_credentials(uri)), uri.rpartition("/")[0]
    if not is_object(uri):
        fix = f"name a file, or an object of {', '.join(f'{scheme}://' for scheme in SCHEMES)}"
        raise RequestError(f"recipe {shown_uri}: wanted one that can be read, found another URI. Fix: {fix}.")
    if (problem := uri_problem(uri)) is not None or prefix.count("/") < 2:
        raise RequestError(f"recipe {shown_uri}: {problem or 'wanted an object, found a bucket. Fix: name the YAML file in it.'}")
    try:
        value = read_yaml(small_file(uri, MAX_TEXT_BYTES))
    except OSError as error:
        raise RequestError(f"recipe {unreadable(uri, error)}") from None
    if not isinstance(value, Mapping):
        return Read(value, Path.cwd(), prefix)
    problems: list[str] = []
    value = _with_uris(value, prefix, allow_code, problems)
    if problems:
        raise RequestError(problems)
    return Read(value, Path.cwd(), prefix)


def _with_uris(mapping: Mapping[str, Any], prefix: str, allow_code: bool, problems: list[str]) -> dict[str, Any]:
    """The recipe with URIs in the place of the relative paths that name models and code below a prefix."""
    wrong_storage: list[str] = []
    storage = _storage(mapping.get("storage") or {}, wrong_storage)

    def model(source: str) -> str:
        if source.startswith(("/", "~")) or is_remote(source) or wrong_storage:
            return source
        uri = uri_beside(prefix, source)
        if not re.fullmatch(r"[\w.-]+/[\w.-]+(@[^\s@]+)?", source) or lies_there(uri, storage):
            return uri
        if os.path.exists(source):  # as a path it would win over the model of the Hub
            fix = "write the path out, or run this elsewhere"
            problems.append(wrong(source, f"a model below {prefix}, or on the Hub", "neither, but a path of this machine", fix))
        return source

    def code(name: Any, where: str) -> Any:
        if not names_code(name):
            return name
        if not allow_code:
            problems.append(_code_from_afar(where, name))
        source, _, found = name.rpartition(":")
        relative = source.endswith(".py") and not source.startswith(("/", "~")) and not is_remote(source)
        return f"{uri_beside(prefix, source)}:{found}" if relative else name

    at = {place: model(source) for place, source in sources_in(mapping).items()}
    made: dict[str, Any] = {**mapping, **{key: at[key] for key in ("base_model", "tokenizer_source") if key in at}}
    if isinstance(entries := mapping.get("models"), list):
        made["models"] = [
            entry
            if (source := at.get(f"models[{i}]")) is None
            else {**entry, "model": source}
            if isinstance(entry, Mapping)
            else source
            for i, entry in enumerate(entries)
        ]
    made |= {key: code(mapping[key], key) for key in ("merge_method",) if key in mapping}
    if isinstance(grid := mapping.get("grid"), Mapping) and isinstance(named := grid.get("method"), list):
        made["grid"] = {**grid, "method": [code(name, "grid.method") for name in named]}
    if isinstance(search := mapping.get("search"), Mapping) and (evaluator := search.get("evaluator")) is not None:
        where = "search.evaluator"
        if isinstance(evaluator, Mapping):
            tasks = evaluator.get("lm_eval")
            if not allow_code and ("command" in evaluator or (isinstance(tasks, Mapping) and tasks.get("include_path"))):
                problems.append(_code_from_afar(where, "command" if "command" in evaluator else "include_path"))
            made["search"] = {**search, "evaluator": {code(name, where): options for name, options in evaluator.items()}}
        else:
            made["search"] = {**search, "evaluator": code(evaluator, where)}
    return made


def _code_from_afar(where: str, name: str) -> str:
    fix = "read that code, and if it is to be run, give --allow-code (allow_code=True in Python)"
    return wrong(where, "no code in a recipe that lies in a store, as long as nobody allows it", name, fix)


def read_yaml(text: str | bytes) -> Any:
    """The value of the only document in the text."""
    if len(text) > MAX_TEXT_BYTES:
        raise RequestError(f"recipe: wanted at most {MAX_TEXT_BYTES} bytes, found more. Fix: name the recipe, not a model file.")
    try:
        _check_events(text)
        return yaml.load(text, Loader=_Loader)
    # YAMLError: not YAML, or refused above. ValueError: a date or number that can't be (2024-99-99, 0x_, 5000 digits), or
    # text that can't be encoded. OverflowError: a date or number out of range (1:59:59 and so on).
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        what = str(getattr(error, "problem", None) or error).partition("\n")[0]
        fix = "check indentation, colons and brackets, and put odd-looking text in quotes"
        raise RequestError(f"recipe{where}: {what[:200]}. Fix: {fix}.") from None


def _check_events(text: str | bytes) -> None:
    """Raises YAMLError for a text that would take long to read, or more than that.

    The parser's events do not nest, so they are looked at before anything grows: libyaml's loader ends the process (a full stack)
    on deep nesting, aliases multiply, and on a wrong tag constructors raise whatever they like."""
    depth, count = 0, -1
    begun: list[tuple[str, int]] = []  # the anchor of each collection that is open, and the count where it began
    deepest = [0]  # of each that is open, how deep it goes below itself
    sizes: dict[str, tuple[int, int]] = {}  # of each anchor what an alias stands for: how many values, how deep
    for event in yaml.parse(text, Loader=_Loader):
        count += 1
        if isinstance(event, yaml.CollectionStartEvent):
            begun.append((event.anchor or "", count))
            deepest.append(0)
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, first = begun.pop()
            below = deepest.pop() + 1
            deepest[-1] = max(deepest[-1], below)
            sizes[anchor] = (count - first, below)
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise _yaml_error("an alias of what is not known, or of what it stands in", event)
            values, below = sizes[event.anchor]
            count += values
            deepest[-1] = max(deepest[-1], below)
        elif isinstance(event, yaml.ScalarEvent):
            sizes[event.anchor or ""] = (1, 0)
            if len(event.value) > MAX_DIGITS and not event.value.strip("+-.:_0123456789"):
                raise _yaml_error("a number of too many digits", event)
        depth = len(begun) + deepest[-1]
        if depth > MAX_DEPTH or count > MAX_EVENTS:
            raise _yaml_error("nested too deep, or too many values", event)
        if getattr(event, "tag", None) is not None:
            raise _yaml_error("tags are not taken; write the value out", event)
