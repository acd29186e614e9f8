"""Read-only models on disk or on the Hugging Face Hub are described here by headers alone: names, dtypes, shapes, byte ranges.

No tensor data is read here and nothing from a checkpoint is ever run. Whatever is wrong with a checkpoint is gathered
over all its files and raised at once as a `RequestError`.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from pcb_ray.errors import RequestError
from pcb_ray.files import hub
from pcb_ray.files.foreign import (
    ANEW,
    MAX_JSON_BYTES,
    clip,
    is_plain_text,
    mismatch,
    open_regular,
    os_problem,
    show,
    some,
    strict_json,
)
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
from pcb_ray.files.torch_file import parse_torch_file, read_torch_file

__all__ = [
    "DTYPE_BYTES", "FLOAT_DTYPES", "Checkpoint", "File", "Tensor", "open_checkpoint", "read_header", "safetensors_header",
]  # fmt: skip

_HUB_FIRST_BYTES = 1 << 16  # The first request for a file asks for so many: a header of these describes some 500 tensors.
_HUB_CONNECTIONS = 8
_TORCH_SUFFIXES = (".bin", ".pt", ".pth")

_T = TypeVar("_T")


@dataclass(frozen=True)
class Checkpoint:
    """A model that can be read. `tensors` are sorted by file, and by offset within a file.

    `aliases` leads from a name to the first name with the same bytes (shared storage in a `.bin` file); an alias is
    not in `tensors`. `folder` is where config and tokenizer files lie: None for a single file, and for a model on the
    Hub that is not downloaded, whose files are named `hub://org/name@commit/file`. Where the data of a `.bin` file begin
    is known only after the download: until then, `start` is the least that it can be.
    """

    source: str
    folder: Path | None
    tensors: dict[str, Tensor]
    aliases: dict[str, str]
    files: tuple[File, ...]
    config: dict[str, Any] | None
    commit: str | None


# ---------------------------------------------------------------------------------------------------- opening


def open_checkpoint(source: str, relative_to: Path = Path("."), *, download: bool = False) -> Checkpoint:
    """Open the model that `source` names, reading headers only.

    `source` is a folder in the Hugging Face layout, one `.safetensors` or `.bin` file, or a Hub id
    `org/name[@revision]`; a path is taken relative to `relative_to` (the recipe's folder), and wins over a Hub id. With
    `download` a Hub model's tensors, config and tokenizer are fetched into the Hub's cache and opened there.

    Raises RequestError with all that is wrong, also when the Hub can't be reached.
    """
    if not source or not is_plain_text(source):
        fix = "name a folder, a file, or org/name"
        raise RequestError(f"model: {mismatch('a path or a Hub id', show(source), fix)}")
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", source):
        shown = re.sub("//.*@", "//", source)  # An address may carry a password.
        raise RequestError(f"model {shown}: {mismatch('a path or a Hub id', 'a URI', 'copy the model to a local folder')}")
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
    if path.name.startswith("adapter_model."):
        raise RequestError(_adapter_problem(source))
    if path.suffix == ".gguf":
        raise RequestError(_gguf_problem(source))
    if path.suffix not in (".safetensors", *_TORCH_SUFFIXES):
        fix = "name a file of these, or a folder"
        raise RequestError(f"{path}: {mismatch('a .safetensors or .bin file', f'the suffix {path.suffix!r}', fix)}")
    return _checkpoint(source, None, [_read_file(path)], None, None, [])


def _open_folder(folder: Path, source: str, commit: str | None) -> Checkpoint:
    try:
        names = {name for name in os.listdir(folder) if os.path.isfile(folder / name)}
    except OSError as error:
        raise RequestError(os_problem(folder, error)) from None
    problems, config, layout = _survey(str(folder), names, lambda name: _read_small(folder / name))
    contents: list[FileContents] = []
    if layout is not None:
        contents = _gather(problems, (partial(_read_file, folder / name) for name in layout.files))
        problems += _index_problems(str(folder), layout, contents)
    return _checkpoint(source, folder, contents, config, commit, problems)


def _open_hub(source: str, path: Path, download: bool) -> Checkpoint:
    """Open `org/name[@revision]`, there being nothing at `path`."""
    parts = re.fullmatch(r"([A-Za-z0-9][\w.-]*/[\w.-]+)(?:@([^\s@]+))?", source, flags=re.ASCII)
    if parts is None or Path(parts[1]).suffix in (".safetensors", ".gguf", *_TORCH_SUFFIXES):
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

    def read_small(name: str) -> bytes:
        raw, size = model.read(name, 0, MAX_JSON_BYTES + 1)
        if size > MAX_JSON_BYTES:
            raise RequestError(f"{model.where}/{name}: {mismatch(f'at most {MAX_JSON_BYTES} bytes', f'{size}', ANEW)}")
        return raw

    def read_contents(name: str) -> FileContents:
        where = f"{model.where}/{name}"
        first, size = model.read(name, 0, _HUB_FIRST_BYTES)

        def read_range(start: int, stop: int) -> bytes:
            return first[start:stop] if min(stop, size) <= len(first) else model.read(name, start, stop)[0]

        if not name.endswith(".safetensors"):
            return parse_torch_file(where, size, read_range)
        tensors, _, raw = parse_header(where, size, partial(read_range, 0))
        return contents_of(where, tensors, raw)

    problems, config, layout = _survey(model.where, set(model.names), read_small)
    problems += _kind_problems(source, [], config)
    absent = [name for name in layout.files if name not in model.names] if layout else []
    problems += [
        f"{model.where}: {mismatch(f'{show(name)}, which its index names', 'no such file', 'mend the index')}" for name in absent
    ]
    if problems or layout is None:
        raise RequestError(problems)
    if download:
        names = layout.files if layout.index_name is None else [*layout.files, layout.index_name]
        folder = model.download(names, parts[2])
        return _open_folder(folder, source, folder.name)
    with ThreadPoolExecutor(_HUB_CONNECTIONS) as pool:
        contents = _gather(problems, [pool.submit(read_contents, name).result for name in layout.files])
    problems += _index_problems(model.where, layout, contents)
    return _checkpoint(source, None, contents, config, model.commit, problems)


def _checkpoint(
    source: str,
    folder: Path | None,
    contents: Sequence[FileContents],
    config: dict[str, Any] | None,
    commit: str | None,
    problems: Sequence[str],
) -> Checkpoint:
    """Make the checkpoint of these files, or raise the problems found so far with those that its kind has."""
    tensors = {name: tensor for one in contents for name, tensor in one.tensors.items()}
    aliases = {name: first for one in contents for name, first in one.aliases.items()}
    problems = [*problems, *_kind_problems(source, tensors.values(), config)]
    if not problems and not tensors:
        problems.append(f"model {source}: {mismatch('tensors', 'none at all', 'name a model that holds some')}")
    if problems:
        raise RequestError(problems)
    return Checkpoint(source, folder, tensors, aliases, tuple(one.file for one in contents), config, commit)


def _kind_problems(source: str, tensors: Collection[Tensor], config: dict[str, Any] | None) -> list[str]:
    problems: list[str] = []
    wanted, fix = "floating-point tensors", "give the model in bfloat16, float16 or float32"
    quantised = _quantization(config)
    if quantised is not None:
        found = f"a quantised model ({show(quantised)} in the quantization_config of config.json), which is not supported"
        problems.append(f"model {source}: {mismatch(wanted, found, fix)}")
    packed = [t for t in tensors if t.name.endswith(_PACKED_SUFFIXES) and t.dtype not in FLOAT_DTYPES]
    if packed and quantised is None:
        found = f"{len(packed)} of packed integers (first: {show(packed[0].name)}), a quantised model, which is not supported"
        problems.append(f"model {source}: {mismatch(wanted, found, fix)}")
    if lora := [t for t in tensors if _LORA_NAME.search(t.name)]:
        problems.append(_adapter_problem(source, f" ({len(lora)} of its tensors, first: {show(lora[0].name)})"))
    return problems


_PACKED_SUFFIXES = (".qweight", ".qzeros", ".weight_packed", ".SCB", ".absmax")
_LORA_NAME = re.compile(r"\.lora_(A|B|embedding_A|embedding_B|magnitude_vector)\b")


def _quantization(config: dict[str, Any] | None) -> str | None:
    """Return the method that a config's quantization_config names (also a text part's), or None where there is none."""
    for part in (config or {}, (config or {}).get("text_config")):
        if isinstance(part, dict) and part.get("quantization_config"):
            settings = part["quantization_config"]
            return str(settings.get("quant_method", "no method named") if isinstance(settings, dict) else "not a table")
    return None


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


def _survey(where: str, names: set[str], read: Callable[[str], bytes]) -> tuple[list[str], dict[str, Any] | None, _Layout | None]:
    """Tell problems, config and layout of a folder or Hub model with files of these names, from its small files."""
    problems: list[str] = []
    configs = _gather(problems, [partial(_read_config, where, read)] if "config.json" in names else [])
    layouts = _gather(problems, [partial(_choose_files, where, names, read)])
    return problems, configs[0] if configs else None, layouts[0] if layouts else None


def _read_config(where: str, read: Callable[[str], bytes]) -> dict[str, Any]:
    config = strict_json(f"{where}/config.json", read("config.json"), constants=True)
    if not isinstance(config, dict):
        raise RequestError(f"{where}/config.json: {mismatch('a table of settings', show(config), ANEW)}")
    return config


def _choose_files(where: str, names: set[str], read: Callable[[str], bytes]) -> _Layout:
    """Choose one format among the files of a model's folder, safetensors before `.bin`; never both."""
    top = {name for name in names if "/" not in name and is_plain_text(name)}
    for single, suffix in (("model.safetensors", ".safetensors"), ("pytorch_model.bin", ".bin")):
        index = f"{single}.index.json"
        if index in top:
            weight_map = _read_index(f"{where}/{index}", read(index), suffix)
            files = sorted(set(weight_map.values()))
            if single in top and single not in files:
                found = f"both {single} and {index}"
                raise RequestError(f"{where}: {mismatch('one model', found, 'remove the one that is not meant')}")
            return _Layout(files, index, weight_map)
        if single in top:
            return _Layout([single], None, {})
        if suffix == ".safetensors":
            others = sorted(n for n in top if n.endswith(suffix) and not n.startswith("adapter_model."))
            shard = len(others) == 1 and re.search(r"-(\d+)-of-(\d+)\.safetensors$", others[0])
            if len(others) == 1 and not (shard and int(shard[2]) > 1):
                return _Layout(others, None, {})
            if others and not top & {"pytorch_model.bin", "pytorch_model.bin.index.json"}:
                found = f"{len(others)} .safetensors files ({some(others)}) and none that says which belong together"
                raise RequestError(f"{where}: {mismatch(index, found, 'add the index, or name one file')}")
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
        if not is_plain_text(file) or "\\" in file or {"", ".", ".."} & set(file.split("/")):
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


def _index_problems(where: str, layout: _Layout, read: Sequence[FileContents]) -> list[str]:
    """Tell where the index and the files (those that could be read) disagree."""
    if layout.index_name is None:
        return []
    problems: list[tuple[str, str]] = []
    held = {one.file.path.removeprefix(f"{where}/"): {*one.tensors, *one.aliases} for one in read}
    holder: dict[str, str] = {}
    for file, names in held.items():
        for name in sorted(names):
            if name in holder:
                problems.append((name, mismatch("it in one file", f"it in {holder[name]} and in {file}", "remove one of them")))
            elif name not in layout.weight_map:
                problems.append((name, mismatch("it in the index", f"it in {file} alone", "add it to the index, or remove it")))
            holder.setdefault(name, file)
    for name, file in layout.weight_map.items():
        if file in held and name not in held[file]:
            found = f"it in {holder[name]}" if name in holder else "it in no file that could be read"
            problems.append((name, mismatch(f"it in {file}", found, "mend the index")))
    return [f"{where}/{layout.index_name}: tensor {show(name)}: {problem}" for name, problem in problems]


# ---------------------------------------------------------------------------------------------------- files


def _read_file(path: Path) -> FileContents:
    if path.suffix != ".safetensors":
        return read_torch_file(path)
    tensors, _, raw = read_header(path)
    return contents_of(str(path), tensors, raw)


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
