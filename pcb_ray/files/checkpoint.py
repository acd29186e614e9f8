"""Read-only models on disk or on the Hugging Face Hub: names, dtypes, shapes and byte ranges, from headers alone.

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
from pcb_ray.files.safetensors import (
    ANEW,
    DTYPE_BYTES,
    FLOAT_DTYPES,
    MAX_JSON_BYTES,
    File,
    Tensor,
    Weights,
    clip,
    is_plain_text,
    name_problem,
    open_regular,
    os_problem,
    parse_header,
    read_header,
    safetensors_header,
    safetensors_weights,
    show,
    some,
    strict_json,
)
from pcb_ray.files.torch_file import read_torch_file

__all__ = [
    "DTYPE_BYTES", "FLOAT_DTYPES", "Checkpoint", "File", "Tensor", "open_checkpoint", "read_header", "safetensors_header",
]  # fmt: skip

_HUB_HEADER_BYTES = 1 << 16  # the first request for a header; it holds some 500 tensors
_HUB_CONNECTIONS = 8
_TORCH_SUFFIXES = (".bin", ".pt", ".pth")

_T = TypeVar("_T")


@dataclass(frozen=True)
class Checkpoint:
    """A model that can be read: `tensors` by name, file after file and by offset within a file.

    `aliases` leads from a name to the first name with the same bytes (shared storage in a `.bin` file); an alias is
    not in `tensors`. `folder` is where config and tokenizer files lie: None for a single file, and for a model on the
    Hub that is not downloaded, whose files are named `hub://org/name@commit/file`.
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
    `download` a Hub model's weights, config and tokenizer are fetched into the Hub's cache and opened there.

    Raises RequestError with all that is wrong, also when the Hub can't be reached.
    """
    if not source or not is_plain_text(source):
        raise RequestError(f"model {show(source)}: not a path or a Hub id; name a folder, a file, or org/name")
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", source):
        shown = re.sub("//.*@", "//", source)  # an address may carry a password
        raise RequestError(f"model {shown}: a URI, which is not supported yet; copy the model to a local folder")
    try:
        path = (relative_to / Path(source).expanduser()).absolute()
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return _open_hub(source, path, download)
    except RuntimeError:  # ~name of nobody
        raise RequestError(f"model {source}: no such user's home folder; write the path out") from None
    except OSError as error:
        raise RequestError(f"model {clip(source)}: cannot be read ({error.strerror}); check the path") from None
    if stat.S_ISDIR(mode):
        return _open_folder(path, source, None)
    if path.name.startswith("adapter_model."):
        raise RequestError(_adapter_problem(source))
    if path.suffix == ".gguf":
        raise RequestError(_gguf_problem(source))
    if path.suffix not in (".safetensors", *_TORCH_SUFFIXES):
        raise RequestError(f"model {source}: {path} has the suffix {path.suffix!r}; name a .safetensors or .bin file, or a folder")
    return _checkpoint(source, None, [_read_weights(path)], None, None, [])


def _open_folder(folder: Path, source: str, commit: str | None) -> Checkpoint:
    try:
        names = {name for name in os.listdir(folder) if os.path.isfile(folder / name)}
    except OSError as error:
        raise RequestError(os_problem(folder, error)) from None
    problems, config, layout = _survey(str(folder), names, lambda name: _read_small(folder / name))
    weights: list[Weights] = []
    if layout is not None:
        weights = _gather(problems, (partial(_read_weights, folder / name) for name in layout.files))
        problems += _index_problems(str(folder), layout, weights)
    return _checkpoint(source, folder, weights, config, commit, problems)


def _open_hub(source: str, path: Path, download: bool) -> Checkpoint:
    """Open `org/name[@revision]`, there being nothing at `path`."""
    parts = re.fullmatch(r"([A-Za-z0-9][\w.-]*/[\w.-]+)(?:@([^\s@]+))?", source, flags=re.ASCII)
    if parts is None or Path(parts[1]).suffix in (".safetensors", ".gguf", *_TORCH_SUFFIXES):
        if "+" in source:
            raise RequestError(_adapter_problem(source))
        raise RequestError(f"model {source}: no file or folder {path}, and not a Hub id org/name[@revision]; check it")
    model = hub.find_model(source, path, parts[1], parts[2])
    if isinstance(model, hub.Snapshot):
        try:
            return _open_folder(model.folder, source, model.folder.name)
        except RequestError as incomplete:
            raise RequestError([model.problem, *incomplete.problems]) from None

    def read(name: str) -> bytes:
        raw, size = model.first_bytes(name, MAX_JSON_BYTES + 1)
        if size > MAX_JSON_BYTES:
            raise RequestError(f"{model.where}/{name}: {size} bytes, the limit is {MAX_JSON_BYTES}")
        return raw

    def read_weights(name: str) -> Weights:
        first, size = model.first_bytes(name, _HUB_HEADER_BYTES)
        tensors, _, raw = parse_header(
            f"{model.where}/{name}", size, lambda n: first[:n] if n <= len(first) else model.first_bytes(name, n)[0]
        )
        return safetensors_weights(f"{model.where}/{name}", tensors, raw)

    problems, config, layout = _survey(model.where, set(model.names), read)
    problems += _kind_problems(source, [], config)
    absent = [name for name in layout.files if name not in model.names] if layout else []
    problems += [f"{model.where}: the index names {show(name)}, which the model does not have" for name in absent]
    if problems or layout is None:
        raise RequestError(problems)
    if download or not layout.files[0].endswith(".safetensors"):  # the structure of a .bin file lies at its end
        folder = model.download([*layout.files, *layout.index_names], parts[2])
        return _open_folder(folder, source, folder.name)
    with ThreadPoolExecutor(_HUB_CONNECTIONS) as pool:
        weights = _gather(problems, [pool.submit(read_weights, name).result for name in layout.files])
    problems += _index_problems(model.where, layout, weights)
    return _checkpoint(source, None, weights, config, model.commit, problems)


def _checkpoint(
    source: str,
    folder: Path | None,
    weights: Sequence[Weights],
    config: dict[str, Any] | None,
    commit: str | None,
    problems: Sequence[str],
) -> Checkpoint:
    """The checkpoint made of these files; raises the problems found so far with those that its kind has."""
    tensors = {name: tensor for one in weights for name, tensor in one.tensors.items()}
    aliases = {name: first for one in weights for name, first in one.aliases.items()}
    problems = [*problems, *_kind_problems(source, tensors.values(), config)]
    if not problems and not tensors:
        problems.append(f"model {source}: holds no tensor at all; give the model's weights")
    if problems:
        raise RequestError(problems)
    return Checkpoint(source, folder, tensors, aliases, tuple(one.file for one in weights), config, commit)


def _kind_problems(source: str, tensors: Collection[Tensor], config: dict[str, Any] | None) -> list[str]:
    problems = []
    quantised = _quantization(config)
    if quantised is not None:
        problems.append(
            f"model {source}: quantised ({show(quantised)} in the quantization_config of config.json), which is not "
            "supported; give the model in bfloat16, float16 or float32"
        )
    packed = [t for t in tensors if t.name.endswith(_PACKED_SUFFIXES) and t.dtype not in FLOAT_DTYPES]
    if packed and quantised is None:
        problems.append(
            f"model {source}: {len(packed)} tensors hold packed integers (first: {show(packed[0].name)}), a quantised "
            "model, which is not supported; give the model in bfloat16, float16 or float32"
        )
    if lora := [t for t in tensors if _LORA_NAME.search(t.name)]:
        problems.append(f"{_adapter_problem(source)} ({len(lora)} such tensors, first: {show(lora[0].name)})")
    return problems


_PACKED_SUFFIXES = (".qweight", ".qzeros", ".weight_packed", ".SCB", ".absmax")
_LORA_NAME = re.compile(r"\.lora_(A|B|embedding_A|embedding_B|magnitude_vector)\b")


def _quantization(config: dict[str, Any] | None) -> str | None:
    """The method named by a config's quantization_config (also a text part's); None where there is none."""
    for part in (config or {}, (config or {}).get("text_config")):
        if isinstance(part, dict) and part.get("quantization_config"):
            settings = part["quantization_config"]
            return str(settings.get("quant_method", "no method named") if isinstance(settings, dict) else "not a table")
    return None


def _adapter_problem(source: str) -> str:
    return (
        f"model {source}: a LoRA adapter, not whole weights, which is not supported; merge it into its base model "
        "first (peft: merge_and_unload, then save_pretrained)"
    )


def _gguf_problem(source: str) -> str:
    return f"model {source}: GGUF, which is not supported; give the model it was made from, in safetensors"


# ---------------------------------------------------------------------------------------------------- the layout


class _Layout(NamedTuple):
    """Which files of a model hold its weights; `weight_map` (tensor name -> file) if an index says so."""

    files: list[str]
    index_names: list[str]  # one, or none
    weight_map: dict[str, str]


def _survey(where: str, names: set[str], read: Callable[[str], bytes]) -> tuple[list[str], dict[str, Any] | None, _Layout | None]:
    """The problems, config and layout of a folder or Hub model with files of these names, told by its small files."""
    problems: list[str] = []
    configs = _gather(problems, [partial(_read_config, where, read)] if "config.json" in names else [])
    layouts = _gather(problems, [partial(_weight_files, where, names, read)])
    return problems, configs[0] if configs else None, layouts[0] if layouts else None


def _read_config(where: str, read: Callable[[str], bytes]) -> dict[str, Any]:
    config = strict_json(f"{where}/config.json", read("config.json"), constants=True)
    if not isinstance(config, dict):
        raise RequestError(f"{where}/config.json: {show(config)} where a table of settings was expected; {ANEW}")
    return config


def _weight_files(where: str, names: set[str], read: Callable[[str], bytes]) -> _Layout:
    """Choose one format among the files of a model's folder, safetensors before `.bin`; never both."""
    top = {name for name in names if "/" not in name and is_plain_text(name)}
    for single, suffix in (("model.safetensors", ".safetensors"), ("pytorch_model.bin", ".bin")):
        index = f"{single}.index.json"
        if index in top:
            weight_map = _read_index(f"{where}/{index}", read(index), suffix)
            files = sorted(set(weight_map.values()))
            if single in top and single not in files:
                raise RequestError(f"{where}: has both {single} and {index}, two models; remove the one not meant")
            return _Layout(files, [index], weight_map)
        if single in top:
            return _Layout([single], [], {})
        if suffix == ".safetensors":
            others = sorted(n for n in top if n.endswith(suffix) and not n.startswith("adapter_model."))
            shard = len(others) == 1 and re.search(r"-(\d+)-of-(\d+)\.safetensors$", others[0])
            if len(others) == 1 and not (shard and int(shard[2]) > 1):
                return _Layout(others, [], {})
            if others and not top & {"pytorch_model.bin", "pytorch_model.bin.index.json"}:
                raise RequestError(
                    f"{where}: has {len(others)} .safetensors files ({some(others)}) and no {index} that says which "
                    "belong together; add the index, or name one file"
                )
    if "adapter_config.json" in top or any(name.startswith("adapter_model.") for name in top):
        raise RequestError(_adapter_problem(where))
    if any(name.endswith(".gguf") for name in top):
        raise RequestError(_gguf_problem(where))
    raise RequestError(
        f"{where}: no weights; expected model.safetensors, model.safetensors.index.json, pytorch_model.bin or "
        f"pytorch_model.bin.index.json, found {some(sorted(top)) or 'no file'}"
    )


def _read_index(where: str, raw: bytes, suffix: str) -> dict[str, str]:
    index = strict_json(where, raw)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise RequestError(f"{where}: has no weight_map from tensor names to files; {ANEW}")
    problems = []
    for file in {v: None for v in weight_map.values() if isinstance(v, str)}:
        # Judged by its text alone, links are followed: in the Hub's cache every file is a link to `../../blobs`.
        if not is_plain_text(file) or "\\" in file or {"", ".", ".."} & set(file.split("/")):
            problems.append(f"{where}: names the file {show(file)}; a shard lies in the index's folder or below it")
        elif not file.endswith(suffix):
            problems.append(f"{where}: names the file {show(file)}; expected a {suffix} file")
    for name, file in weight_map.items():
        if not isinstance(file, str):
            problems.append(f"{where}: tensor {show(name)} maps to {show(file)}, which is not a file name; {ANEW}")
        elif problem := name_problem(name):
            problems.append(f"{where}: tensor {show(name)}: {problem}")
    if problems:
        raise RequestError(problems)
    return weight_map


def _index_problems(where: str, layout: _Layout, read: Sequence[Weights]) -> list[str]:
    """Where the index and the files (those that could be read) disagree."""
    problems: list[str] = []
    held = {one.file.path.removeprefix(f"{where}/"): {*one.tensors, *one.aliases} for one in read}
    holder: dict[str, str] = {}
    for index in layout.index_names:
        for file, names in held.items():
            for name in sorted(names):
                if name in holder:
                    problems.append(f"tensor {show(name)} lies in {holder[name]} and in {file}; remove one of them")
                elif name not in layout.weight_map:
                    problems.append(f"tensor {show(name)} lies in {file} but is not in the index; add or remove it")
                holder.setdefault(name, file)
        for name, file in layout.weight_map.items():
            if file in held and name not in held[file]:
                found = f"lies in {holder[name]}" if name in holder else "is in no file that could be read"
                problems.append(f"tensor {show(name)} should lie in {file}, but {found}; mend the index")
        problems = [f"{where}/{index}: {problem}" for problem in problems]
    return problems


# ---------------------------------------------------------------------------------------------------- files


def _read_weights(path: Path) -> Weights:
    if path.suffix != ".safetensors":
        return read_torch_file(path)
    tensors, _, raw = read_header(path)
    return safetensors_weights(str(path), tensors, raw)


def _read_small(path: Path) -> bytes:
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > MAX_JSON_BYTES:
            raise RequestError(f"{path}: {size} bytes, the limit for this file is {MAX_JSON_BYTES}; {ANEW}")
        try:
            return file.read(size)
        except OSError as error:
            raise RequestError(os_problem(path, error)) from None


def _gather(problems: list[str], attempts: Iterable[Callable[[], _T]]) -> list[_T]:
    """What the attempts give, in order, and in `problems` what is wrong with the others."""
    results = []
    for attempt in attempts:
        try:
            results.append(attempt())
        except RequestError as error:
            problems.extend(error.problems)
    return results
