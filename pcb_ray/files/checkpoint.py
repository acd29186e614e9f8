"""Read-only models on disk or on the Hugging Face Hub are described here by headers alone: names, dtypes, shapes, byte ranges.

No tensor data is read here and nothing from a checkpoint is ever run. Whatever is wrong with a checkpoint is gathered
over all its files and raised at once as a `RequestError`.
"""

from __future__ import annotations

import itertools
import os
import re
import stat
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from pcb_ray.errors import RequestError
from pcb_ray.files import hub
from pcb_ray.files.arrow import ArrowFiles, is_arrow
from pcb_ray.files.beside import CONFIG, Beside, beside, sizes_in
from pcb_ray.files.foreign import (
    ANEW,
    MAX_JSON_BYTES,
    clip,
    is_inside,
    is_plain_text,
    mismatch,
    open_regular,
    os_problem,
    show,
    some,
    strict_json,
)
from pcb_ray.files.objects import HUB_SCHEME, SCHEMES, ObjectModel, Storage, find_objects, is_object, without_credentials
from pcb_ray.files.quantised import parts_of, quantisation_in, quantised
from pcb_ray.files.safetensors import (
    DTYPE_BYTES,
    FLOAT_DTYPES,
    File,
    FileContents,
    Tensor,
    contents_of,
    name_problem,
    parse_header,
    read_header,
    safetensors_header,
)
from pcb_ray.files.store import LocalStore
from pcb_ray.files.torch_file import parse_torch_file, read_torch_file

__all__ = [
    "DTYPE_BYTES", "FLOAT_DTYPES", "Checkpoint", "File", "Tensor", "open_checkpoint", "read_header", "safetensors_header",
]  # fmt: skip

_FIRST_BYTES = 1 << 16  # The first request for a file asks for so many: a header of these describes some 500 tensors.
_CONNECTIONS = 8
_TORCH_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")

_T = TypeVar("_T")


def _nothing(name: str) -> bytes:
    raise RequestError(f"{name}: {mismatch('a file beside the tensors', 'a model that has none', 'give a folder')}")


@dataclass(frozen=True)
class Checkpoint:
    """A model that can be read. `tensors` are sorted by file, and by offset within a file.

    `aliases` leads from a name to the first name with the same bytes (shared storage in a `.bin` file); an alias is
    not in `tensors`. `folder` is where config and tokenizer files lie: None for a single file, for a model in a store, and for
    one of the Hub that is not downloaded yet, whose files are named `hub://org/name@commit/file`. Where the data of a `.bin`
    file begin is known only after the download: until then, `start` is the least that it can be.
    """

    source: str
    folder: Path | None
    tensors: dict[str, Tensor]
    aliases: dict[str, str]
    files: tuple[File, ...]
    config: dict[str, Any] | None
    commit: str | None
    beside: tuple[Beside, ...] = ()
    """The other files of its folder, those that are left out of an output included."""
    notes: tuple[str, ...] = ()
    """What is odd about it, and no mistake."""
    stem: str = "model"
    """Of the name that its loader looks for: `stem.safetensors`, or numbered parts of it."""
    inner: str = ""
    """The folder in it, with a `/` at its end, where the tensors and their config lie, if they don't lie beside the rest: a part of
    a pipeline, or the first of sentence-transformers' modules. The output has it too, with the rest of the model around it."""
    prefix: str | None = None
    """In an object store, or on the Hub and read there, what its files are named below."""
    read: Callable[[str], bytes] = field(default=_nothing, repr=False, compare=False)
    """The content of a small file beside the tensors, by its path from there. Raises RequestError."""

    @property
    def where(self) -> str | None:
        """The folder, or the URI of what stands for one, that its files are read below; None for a single file, and for a model on
        the Hub that is not downloaded."""
        return self.prefix if self.folder is None else str(self.folder)

    @property
    def own(self) -> tuple[Beside, ...]:
        """What lies beside the tensors, by its path from there; not the rest of the model around that folder."""
        inner = len(self.inner)
        return tuple(replace(one, name=one.name[inner:]) for one in self.beside if one.name.startswith(self.inner))

    @property
    def library(self) -> str:
        """Whose loader reads its config: transformers, diffusers, or another (empty)."""
        if self.config is None:
            return ""
        if "_class_name" in self.config or "_diffusers_version" in self.config:
            return "diffusers"
        return "" if {"model_type", "architectures", "auto_map"}.isdisjoint(self.config) else "transformers"


# ---------------------------------------------------------------------------------------------------- opening


def open_checkpoint(
    source: str, relative_to: Path = Path("."), *, download: bool = False, storage: Storage | None = None
) -> Checkpoint:
    """Open the model that `source` names, reading headers only.

    `source` is a folder in the Hugging Face layout, one `.safetensors` or `.bin` file, a Hub id
    `org/name[@revision]`, or a URI: of a folder or a file in an object store, which `storage` says how to reach, or of a model on
    the Hub that is read there, `hf://org/name[@revision]`. A path is taken relative to `relative_to` (the recipe's folder), and
    wins over a Hub id. With `download` a Hub id's tensors, config and tokenizer are fetched into the Hub's cache and opened there.

    Raises RequestError with all that is wrong, also when the Hub or the store can't be reached.
    """
    if not source or not is_plain_text(source):
        fix = "name a folder, a file, or org/name"
        raise RequestError(f"model: {mismatch('a path or a Hub id', show(source), fix)}")
    if source.startswith(HUB_SCHEME):
        return _open_hub(source, None, download)
    if is_object(source):
        return _open_listed(source, find_objects(source, storage))
    if is_arrow(source):
        return _open_listed(source, find_objects(source, None, ArrowFiles()))
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", source):
        shown, fix = re.sub("//.*@", "//", source), "copy the model to a local folder"  # An address may carry a password.
        wanted = f"a path, a Hub id, or a URI of {', '.join(SCHEMES)}, hf, hdfs or file"
        raise RequestError(f"model {shown}: {mismatch(wanted, 'another URI', fix)}")
    try:
        path = (relative_to / Path(source).expanduser()).absolute()
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return _open_hub(source, path, download)
    except RuntimeError:  # There is no user of this ~name.
        raise RequestError(f"model {source}: {mismatch('a home folder', 'no such user', 'write the path out')}") from None
    except OSError as error:
        raise RequestError(os_problem(Path(clip(source)), error)) from None
    if stat.S_ISDIR(mode):
        return _open_folder(path, source, None)
    _check_suffix(str(path))
    survey = _Survey([], None, _Layout([path.name], None, {}, path.stem))
    return _checkpoint(source, None, [_read_file(path)], survey, None, [], [], _nothing)


def _open_folder(folder: Path, source: str, commit: str | None) -> Checkpoint:
    def names_in(inner: str) -> set[str]:
        where = folder / inner
        try:
            return {name for name in os.listdir(where) if os.path.isfile(where / name)}
        except OSError as error:
            raise RequestError(os_problem(where, error)) from None

    survey = _survey(str(folder), names_in, partial(_read_within, folder))
    problems, layout = survey.problems, survey.layout
    contents: list[FileContents] = []
    notes: list[str] = []
    if layout is not None:
        own = folder / survey.inner
        contents = _gather(problems, (partial(_read_file, own / name) for name in layout.files))
        contents = _by_index(str(own), layout, contents, survey.config, problems, notes)
    others: list[Beside] = []
    for sizes, lead_out in _gather(problems, [partial(sizes_in, folder)]):
        others += (replace(one, is_needed=survey.is_read(one.name)) for one in lead_out if one.name not in survey.own_files)
        others += survey.beside(sizes)
    read = partial(_read_within, folder / survey.inner)
    return _checkpoint(source, folder, contents, survey, commit, others, notes, read)


def _open_hub(source: str, path: Path | None, download: bool) -> Checkpoint:
    """Open `org/name[@revision]`, there being nothing at `path`; or `hf://org/name[@revision]`, in place."""
    named = source.removeprefix(HUB_SCHEME)
    parts = re.fullmatch(r"([A-Za-z0-9][\w.-]*/[\w.-]+)(?:@([^\s@?#]+))?", named, flags=re.ASCII)
    if parts is None and path is None:
        shown, found = clip(without_credentials(source)), "another URI"
        fix = "name the repository; a folder or a file in it can't be named"
        raise RequestError(f"model {shown}: {mismatch('hf://org/name[@revision]', found, fix)}")
    if parts is None or (path is not None and Path(parts[1]).suffix in (".safetensors", ".gguf", *_TORCH_SUFFIXES)):
        if "+" in source:
            raise RequestError(_adapter_problem(source))
        found = f"no file or folder {path}, nor a Hub id org/name[@revision]"
        raise RequestError(f"model {source}: {mismatch('a path or a Hub id', found, 'check it')}")
    model = hub.find_model(source, path, parts[1], parts[2])
    if isinstance(model, hub.Snapshot):
        try:
            return _open_folder(model.folder, source, model.folder.name)
        except RequestError as incomplete:
            raise RequestError([model.problem, *incomplete.problems]) from None
    if path is None:
        return _open_listed(source, model.in_place())
    if not download:
        return _open_listed(source, model)
    survey = _survey_listed(model)
    wanted = [*survey.own_files, *(one.name for one in survey.beside(model.sizes) if not one.left_out)]
    folder = model.download(wanted, parts[2])
    return _open_folder(folder, source, folder.name)


def _survey_listed(model: hub.HubModel | ObjectModel) -> _Survey:
    """The survey of a model whose files are listed. Raises RequestError, also for files that are not among them."""

    def names_in(inner: str) -> set[str]:
        return {name[len(inner) :] for name in model.sizes if name.startswith(inner)}

    survey = _survey(model.where, names_in, partial(_read_small_of, model))
    layout = survey.layout
    absent = [name for name in layout.files if survey.inner + name not in model.sizes] if layout else []
    problems = [
        f"{model.where}: {mismatch(f'{show(name)}, which its index names', 'no such file', 'mend the index')}" for name in absent
    ]
    if survey.problems or problems or layout is None:
        raise RequestError([*survey.problems, *problems])
    return survey


def _read_small_of(model: hub.HubModel | ObjectModel, name: str) -> bytes:
    raw, size = model.read(name, 0, MAX_JSON_BYTES + 1)
    if size > MAX_JSON_BYTES:
        raise RequestError(f"{model.where}/{name}: {mismatch(f'at most {MAX_JSON_BYTES} bytes', f'{size}', ANEW)}")
    return raw


def _open_listed(source: str, model: hub.HubModel | ObjectModel) -> Checkpoint:
    """Open a model whose files are listed, and read by ranges."""

    def read_contents(name: str) -> FileContents:
        where = f"{model.where}/{name}"
        first, size = model.read(name, 0, _FIRST_BYTES)

        def read_range(start: int, stop: int) -> bytes:
            return first[start:stop] if min(stop, size) <= len(first) else model.read(name, start, stop)[0]

        if name.endswith(".safetensors"):
            tensors, _, raw = parse_header(where, size, partial(read_range, 0))
            contents = contents_of(where, tensors, raw)
        else:  # a model of the Hub is opened again when it was downloaded
            contents = parse_torch_file(where, size, read_range, exact=isinstance(model, ObjectModel))
        stamp = model.stamps[name] if isinstance(model, ObjectModel) else None  # a commit does not change
        return contents._replace(file=replace(contents.file, stamp=stamp))

    one_file = source.removesuffix("/").removeprefix(f"{model.where}/")
    if isinstance(model, ObjectModel) and one_file in model.sizes:  # what was named is a file itself
        _check_suffix(source)
        survey = _Survey([], None, _Layout([one_file], None, {}, Path(one_file).stem))
        return _checkpoint(source, None, [read_contents(one_file)], survey, None, [], [], _nothing)
    survey = _survey_listed(model)
    layout, inner = survey.layout, survey.inner
    assert layout is not None  # _survey_listed has seen to it
    others, notes = survey.beside(model.sizes), list[str]()
    with ThreadPoolExecutor(_CONNECTIONS) as pool:
        contents = _gather(survey.problems, [pool.submit(read_contents, inner + name).result for name in layout.files])
    where = f"{model.where}/{inner}".removesuffix("/")
    contents = _by_index(where, layout, contents, survey.config, survey.problems, notes)
    opened = _checkpoint(
        source, None, contents, survey, model.commit, others, notes, lambda name: _read_small_of(model, inner + name)
    )
    return replace(opened, prefix=model.where) if isinstance(model, ObjectModel) else opened


def _check_suffix(where: str) -> None:
    """A model that is one file is known by its name. Raises RequestError."""
    name, suffix = os.path.basename(where), os.path.splitext(where)[1]
    if name.startswith("adapter_model."):
        raise RequestError(_adapter_problem(where))
    if suffix == ".gguf":
        raise RequestError(_gguf_problem(where))
    if suffix not in (".safetensors", *_TORCH_SUFFIXES):
        fix = "name a file of these, or a folder"
        raise RequestError(f"{where}: {mismatch('a .safetensors or .bin file', f'the suffix {suffix!r}', fix)}")


def _checkpoint(
    source: str,
    folder: Path | None,
    contents: Sequence[FileContents],
    survey: _Survey,
    commit: str | None,
    others: Sequence[Beside],
    notes: Sequence[str],
    read: Callable[[str], bytes],
) -> Checkpoint:
    """Make the checkpoint of these files, or raise the problems found so far with those that its kind has."""
    tensors = {name: tensor for one in contents for name, tensor in one.tensors.items()}
    aliases = {name: first for one in contents for name, first in one.aliases.items()}
    problems = [*survey.problems, *_kind_problems(source, tensors.values(), survey.config)]
    if not problems and not tensors:
        problems.append(f"model {source}: {mismatch('tensors', 'none at all', 'name a model that holds some')}")
    if problems or survey.layout is None:
        raise RequestError(problems)
    if method := quantisation_in(survey.config):
        notes = [
            *notes,
            f"{source}: config.json says that it is quantised ({show(method)}), which no tensor is: it is taken as left over from "
            "a training, and is not in the output's",
        ]
    return Checkpoint(
        source=source,
        folder=folder,
        tensors=tensors,
        aliases=aliases,
        files=tuple(one.file for one in contents),
        config=survey.config,
        commit=commit,
        beside=tuple(others),
        notes=tuple(notes),
        stem=survey.layout.stem,
        inner=survey.inner,
        read=read,
    )


def _kind_problems(source: str, tensors: Collection[Tensor], config: dict[str, Any] | None) -> list[str]:
    problems = [] if (problem := quantised(source, tensors, config)) is None else [problem]
    if states := [t for t in tensors if _OF_OPTIMIZER.search(t.name)]:
        found = f"states of an optimizer among them (first: {show(states[0].name)})"
        fix = "save the model apart from its training (transformers: save_pretrained), and give that"
        problems.append(f"model {source}: {mismatch('tensors of a model', found, fix)}")
    if lora := [t for t in tensors if _LORA_NAME.search(t.name)]:
        problems.append(_adapter_problem(source, f" ({len(lora)} of its tensors, first: {show(lora[0].name)})"))
    return problems


_OF_OPTIMIZER = re.compile(r"(^|[./])(exp_avg|exp_avg_sq|max_exp_avg_sq|momentum_buffer|optimizer|optimizer_state)([./]|$)")
_LORA_NAME = re.compile(r"\.lora_(A|B|embedding_A|embedding_B|magnitude_vector)\b")


def _adapter_problem(source: str, which: str = "") -> str:
    fix = "merge it into its base model first (peft: merge_and_unload, then save_pretrained)"
    return f"model {source}: {mismatch('a whole model', f'a LoRA adapter{which}, which is not supported', fix)}"


def _gguf_problem(source: str) -> str:
    fix = "give the model it was made from, in safetensors"
    return f"model {source}: {mismatch('a model in safetensors', 'GGUF, which is not supported', fix)}"


# ---------------------------------------------------------------------------------------------------- the layout


class _Layout(NamedTuple):
    """It says which files of a model hold its tensors, and which file each of them lies in (`weight_map`) if there is an index."""

    files: list[str]
    index_name: str | None
    weight_map: dict[str, str]
    stem: str


class _Survey(NamedTuple):
    """What the small files of a model say, and what is wrong with them."""

    problems: list[str]
    config: dict[str, Any] | None
    layout: _Layout | None
    parts: tuple[str, ...] = ()
    """The subfolders that its loader reads too."""
    inner: str = ""
    """The one, with a `/`, that holds its tensors; its layout is told from there."""

    @property
    def own_files(self) -> list[str]:
        """The files that hold its tensors, and their index."""
        if self.layout is None:
            return []
        names = [*self.layout.files, *([] if self.layout.index_name is None else [self.layout.index_name])]
        return [self.inner + name for name in names]

    def is_read(self, name: str) -> bool:
        """Whether its loader reads a file, or a folder, beyond what all loaders do: its list of parts, or something of them."""
        parts = (*self.parts, *([self.inner.removesuffix("/")] if self.inner else []))
        return name in (_MODULES, _PIPELINE) or any(name == part or name.startswith(f"{part}/") for part in parts)

    def beside(self, sizes: Mapping[str, int]) -> list[Beside]:
        """What lies beside them among these files."""
        inner, own_files = len(self.inner), self.own_files
        around = {name: size for name, size in sizes.items() if not (self.inner and name.startswith(self.inner))}
        found = list(beside(around, own_files, self.parts))
        if self.inner:
            own = {name[inner:]: size for name, size in sizes.items() if name.startswith(self.inner)}
            found += (replace(one, name=self.inner + one.name) for one in beside(own, [name[inner:] for name in own_files]))
        return found


def _survey(where: str, names_in: Callable[[str], set[str]], read: Callable[[str], bytes]) -> _Survey:
    """Tell what a folder or Hub model holds, from its small files. `names_in` gives the files of it, or of a folder in it."""
    problems: list[str] = []
    top = _gather(problems, [partial(names_in, "")])
    names = top[0] if top else set[str]()
    inner, parts = "", tuple[str, ...]()
    for found in _gather(problems, [partial(_read_parts, where, names, names_in, read)]):
        inner, parts = found
    if problems and (_PIPELINE in names or not names):  # then nobody can tell which files to look at
        return _Survey(problems, None, None)
    if inner:
        where, names = f"{where}/{inner}".removesuffix("/"), names_in(inner)
    read_own = partial(_read_below, read, inner)
    configs = _gather(problems, [partial(_read_config, where, read_own)] if CONFIG in names else [])
    layouts = _gather(problems, [partial(_choose_files, where, names, read_own)])
    return _Survey(problems, configs[0] if configs else None, layouts[0] if layouts else None, parts, inner)


def _read_below(read: Callable[[str], bytes], inner: str, name: str) -> bytes:
    return read(inner + name)


_MODULES, _PIPELINE = "modules.json", "model_index.json"
_DENOISER = re.compile(r"(?:unet|transformer)(?:_\w+)?", flags=re.ASCII)
"""The part of a pipeline of diffusers that is trained, and merged."""


def _read_parts(
    where: str, names: set[str], names_in: Callable[[str], set[str]], read: Callable[[str], bytes]
) -> tuple[str, tuple[str, ...]]:
    """Of a model that consists of parts in subfolders, the one that is merged (with a `/`; empty if that is the folder itself), and
    the others. Raises RequestError."""
    if _PIPELINE in names:
        parts = _read_pipeline(where, read)
        merged = [part for part in parts if _DENOISER.fullmatch(part)]
        if len(merged) != 1:
            found = some(merged) or f"none ({some(parts)})"
            part = (merged or parts or ["unet"])[0]
            fix = f"name the folder of the part that is to be merged ({where}/{part}), and likewise of the models"
            raise RequestError(f"{where}: {mismatch('a pipeline with one `unet` or `transformer`', found, fix)}")
        return f"{merged[0]}/", tuple(part for part in parts if part != merged[0])
    if _MODULES in names:
        paths = _read_modules(where, read)
        # Older models of sentence-transformers have the Transformer in `0_Transformer`.
        is_outside = not any(name.endswith((".safetensors", ".bin", ".index.json")) for name in names)
        inner = next((path for path in paths if is_outside and CONFIG in _or_none(names_in, f"{path}/")), None)
        return ("" if inner is None else f"{inner}/"), tuple(path for path in paths if path != inner)
    return "", ()


def _or_none(names_in: Callable[[str], set[str]], inner: str) -> set[str]:
    try:
        return names_in(inner)
    except RequestError:  # a module without files has no folder
        return set()


def _read_pipeline(where: str, read: Callable[[str], bytes]) -> list[str]:
    """The folders of a pipeline's parts: `{"unet": ["diffusers", "UNet2DConditionModel"], ...}`, null for what it does without."""
    index = strict_json(f"{where}/{_PIPELINE}", read(_PIPELINE))
    if not isinstance(index, dict):
        raise RequestError(f"{where}/{_PIPELINE}: {mismatch('a table of the parts of a pipeline', show(index), ANEW)}")
    parts = [name for name, of in index.items() if isinstance(of, list) and len(of) == 2 and all(isinstance(x, str) for x in of)]
    if wrong := [name for name in parts if "/" in name or not is_inside(name)]:
        raise RequestError(f"{where}/{_PIPELINE}: {mismatch('names of folders in it', some(wrong), ANEW)}")
    return parts


def _read_modules(where: str, read: Callable[[str], bytes]) -> tuple[str, ...]:
    """The subfolders of sentence-transformers' list of modules: `[{"idx": 1, "path": "1_Pooling", "type": ...}, ...]`."""
    modules = strict_json(f"{where}/{_MODULES}", read(_MODULES))
    wanted = "a list of modules, each with the `path` of its folder"
    if not isinstance(modules, list):
        raise RequestError(f"{where}/{_MODULES}: {mismatch(wanted, show(modules), ANEW)}")
    paths: list[str] = []
    for module in modules:
        path = module.get("path") if isinstance(module, dict) else None
        path = path.removeprefix("./").removesuffix("/") if isinstance(path, str) else None
        if path is None or not (path == "" or is_inside(path)):
            raise RequestError(f"{where}/{_MODULES}: {mismatch(wanted, show(module), ANEW)}")
        paths += [path] if path else []
    return tuple(paths)


def _read_config(where: str, read: Callable[[str], bytes]) -> dict[str, Any]:
    config = strict_json(f"{where}/config.json", read("config.json"), constants=True)
    if not isinstance(config, dict):
        raise RequestError(f"{where}/config.json: {mismatch('a table of settings', show(config), ANEW)}")
    return config


# By the stem of its safetensors file, the file of torch.save that stands for it: transformers, diffusers, and Mistral's own.
SHARDED = {"model": "pytorch_model", "diffusion_pytorch_model": "diffusion_pytorch_model", "consolidated": ""}
"""Stems of files that loaders also look for in parts, with an index that names them."""


def _choose_files(where: str, names: set[str], read: Callable[[str], bytes]) -> _Layout:
    """Choose one layout among the files of a model's folder, safetensors before files of torch.save; never two."""
    top = {name for name in names if "/" not in name and is_plain_text(name)}
    for suffix in (".safetensors", ".bin"):
        for stem, of_torch in SHARDED.items():
            single = f"{stem if suffix == '.safetensors' else of_torch}{suffix}"
            index = f"{single}.index.json"
            if index in top:
                weight_map = _read_index(f"{where}/{index}", read(index), suffix)
                files = sorted(set(weight_map.values()))
                if single in top and single not in files:
                    found = f"both {single} and {index}"
                    raise RequestError(f"{where}: {mismatch('one model', found, 'remove the one that is not meant')}")
                return _Layout(files, index, weight_map, stem)
            if single in top:
                return _Layout([single], None, {}, stem)
        if suffix == ".safetensors" and not top & {"pytorch_model.bin", "pytorch_model.bin.index.json"}:
            others = sorted(n for n in top if n.endswith(suffix) and not n.startswith("adapter_model."))
            shard = re.fullmatch(r"(.*)-(\d+)-of-(\d+)\.safetensors", others[0]) if len(others) == 1 else None
            if len(others) == 1 and not (shard and int(shard[3]) > 1):
                return _Layout(others, None, {}, shard[1] if shard else others[0].removesuffix(suffix))
            if others:
                stem = shard[1] if (shard := re.fullmatch(r"(.*?)(?:\.\w+)?-\d+-of-\d+\.safetensors", others[0])) else "model"
                found = f"{len(others)} .safetensors files ({some(others)}) and none that says which belong together"
                fix = "add the index, or name one file"
                if variants := sorted(name for name in top if re.fullmatch(r".*\.index\.\w+\.json", name)):
                    found = f"a variant in parts ({variants[0]}), which is not read"
                    fix = "load it with its own library and save it without a variant, likewise the models"
                raise RequestError(f"{where}: {mismatch(f'{stem}.safetensors.index.json', found, fix)}")
    if "adapter_config.json" in top or any(name.startswith("adapter_model.") for name in top):
        raise RequestError(_adapter_problem(where))
    if any(name.endswith(".gguf") for name in top):
        raise RequestError(_gguf_problem(where))
    wanted = "model.safetensors or pytorch_model.bin, or the .index.json of either"
    raise RequestError(f"{where}: {mismatch(wanted, some(sorted(top)) or 'no file', 'name the folder of a model')}")


def _read_index(where: str, raw: bytes, suffix: str) -> dict[str, str]:
    index = strict_json(where, raw)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise RequestError(f"{where}: {mismatch('a weight_map from tensor names to files', 'none', ANEW)}")
    problems = []
    for file in {v: None for v in weight_map.values() if isinstance(v, str)}:
        # A name is judged by its text, and links are followed: in the Hub's cache every file is a link to `../../blobs`.
        if not is_inside(file):
            problems.append(f"{where}: {mismatch('shards in its own folder or below it', show(file), 'mend the index')}")
        elif not file.endswith(suffix):
            problems.append(f"{where}: {mismatch(f'{suffix} files', show(file), 'mend the index')}")
    for name, file in weight_map.items():
        if not isinstance(file, str):
            problems.append(f"{where}: tensor {show(name)}: {mismatch('the name of its file', show(file), ANEW)}")
        elif problem := name_problem(name):
            problems.append(f"{where}: tensor {show(name)}: {problem}")
    if problems:
        raise RequestError(problems)
    return weight_map


def _by_index(
    where: str,
    layout: _Layout,
    read: Sequence[FileContents],
    config: dict[str, Any] | None,
    problems: list[str],
    notes: list[str],
) -> list[FileContents]:
    """The tensors that the index names, each from the file that it names: it is the authority, as it is for loaders."""
    if layout.index_name is None:
        return list(read)
    names_in = {one.file.path.removeprefix(f"{where}/"): {*one.tensors, *one.aliases} for one in read}
    index, taken = f"{where}/{layout.index_name}", {file: set[str]() for file in names_in}
    held = {name for names in names_in.values() for name in names}
    moved, lost = [], []
    for name, file in layout.weight_map.items():
        if file not in names_in:  # it could not be read
            continue
        holders = [file] if name in names_in[file] else [other for other, names in names_in.items() if name in names]
        if len(holders) > 1:
            found = f"it in {some(sorted(holders))}"
            problems.append(f"{index}: tensor {show(name)}: {mismatch(f'it in {file}', found, 'mend the index')}")
        elif holders:
            taken[holders[0]].add(name)
            moved += [name] if holders[0] != file else []
        else:
            lost.append(name)
    if held and lost and not any(taken.values()):
        wanted, found = "tensors of its files", f"other names alone ({some(sorted(lost))}; its files have {some(sorted(held))})"
        problems.append(f"{index}: {mismatch(wanted, found, 'mend the index, or save the model again')}")
    kinds = {_kind(name) for name in held}
    modules = {prefix for name in held for prefix in itertools.accumulate(name.split("."), "{}.{}".format)}
    needed = sorted(name for name in lost if _is_needed(name, kinds, modules, config))
    if needed:
        found = f"{len(needed)} of them ({some(needed)}) in no file"
        problems.append(f"{index}: {mismatch('all tensors that it names', found, f'{ANEW}, for the model is not whole')}")
    unnamed = sorted(held - set(layout.weight_map))
    for names, what in (
        (lost, "that no file holds: they are taken for no part of the model"),
        (moved, "in another file than it says"),
        (unnamed, "fewer than its files hold: these are taken for no part of the model"),
    ):
        if names and len(names_in) == len(layout.files):
            notes.append(f"{index}: names {len(names)} tensors {what} ({some(sorted(names))})")
    return [_only(one, taken[one.file.path.removeprefix(f"{where}/")]) for one in read]


def _kind(name: str) -> str:
    return re.sub(r"\d+", "*", name)


def _is_needed(name: str, kinds: Collection[str], modules: Collection[str], config: dict[str, Any] | None) -> bool:
    """Whether a model can hardly be loaded without the tensor: it is of one of the layers, which have others of its kind, or lies
    in a module beside others.

    Layers beyond those of the config, and modules of which nothing is held (as for the prediction of several tokens), can be done
    without, and a head may be tied."""
    number = re.search(r"\d+", name)
    if number is None:
        around = name.rpartition(".")[0].rpartition(".")[0]
        return around in modules
    layers = [part["num_hidden_layers"] for part in parts_of(config) if type(part.get("num_hidden_layers")) is int]
    return _kind(name) in kinds and (not layers or int(number[0]) < max(layers))


def _only(contents: FileContents, names: Collection[str]) -> FileContents:
    """A file with these of its tensors only."""
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    stands_for: dict[str, str] = {}  # by the name of a storage, the name that is kept for it
    for name, first in ((name, contents.aliases.get(name, name)) for name in (*contents.tensors, *contents.aliases)):
        if name not in names:
            continue
        if first in stands_for:
            aliases[name] = stands_for[first]
        else:
            stands_for[first] = name
            tensors[name] = replace(contents.tensors[first], name=name)
    return contents._replace(tensors=dict(sorted(tensors.items(), key=lambda item: item[1].start)), aliases=aliases)


# ---------------------------------------------------------------------------------------------------- files


def _read_file(path: Path) -> FileContents:
    try:
        stamp = LocalStore().stamp(str(path))  # before it is read, so that a change from here on shows
    except OSError as error:
        raise RequestError(os_problem(path, error)) from None
    if path.suffix != ".safetensors":
        contents = read_torch_file(path)
    else:
        tensors, _, raw = read_header(path)
        contents = contents_of(str(path), tensors, raw)
    return contents._replace(file=replace(contents.file, stamp=stamp))


def _read_within(folder: Path, name: str) -> bytes:
    return _read_small(folder / name)


def _read_small(path: Path) -> bytes:
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > MAX_JSON_BYTES:
            raise RequestError(f"{path}: {mismatch(f'at most {MAX_JSON_BYTES} bytes', f'{size}', ANEW)}")
        try:
            return file.read(size)
        except OSError as error:
            raise RequestError(os_problem(path, error)) from None


def _gather(problems: list[str], attempts: Iterable[Callable[[], _T]]) -> list[_T]:
    """Return what the attempts give, in order, and add to `problems` what is wrong with the others."""
    results = []
    for attempt in attempts:
        try:
            results.append(attempt())
        except RequestError as error:
            problems.extend(error.problems)
    return results
