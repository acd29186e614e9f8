"""Read-only models on disk or on the Hugging Face Hub: names, dtypes, shapes and byte ranges, from headers alone.

No tensor data is read here and nothing from a checkpoint is ever run: a `.bin` file's pickled structure goes through
a small interpreter that knows tensors, dicts and plain values, and no function. Whatever is wrong with a checkpoint
is gathered over all its files and raised at once as a `RequestError`.
"""

from __future__ import annotations

import errno
import fnmatch
import glob
import hashlib
import io
import json
import math
import os
import pickletools
import re
import reprlib
import secrets
import stat
import struct
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar
from urllib.parse import urlsplit

from pcb_ray.errors import RequestError

# The names that safetensors gives to dtypes, with the bytes of one element.
DTYPE_BYTES: dict[str, int] = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip
FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")
_QUANTISED_DTYPES = frozenset({
    "F4", "F6_E2M3", "F6_E3M2", "F8_E4M3", "F8_E4M3FNUZ", "F8_E5M2", "F8_E5M2FNUZ", "F8_E8M0",
    "QI8", "QU8", "QI32", "QU4X2", "QU2X4",
})  # fmt: skip
_COMPLEX_DTYPES = frozenset({"C32", "C64", "C128"})

_MAX_JSON_BYTES = 100_000_000  # the limit of the safetensors library, for a header; an index has the same
_MAX_PICKLE_BYTES = 8_000_000  # a tensor takes about 150 bytes: 50,000 of them in one file
_MAX_PROBLEMS = 100  # of one file: a wrecked header would otherwise have one per tensor
_MAX_INT = 2**63 - 1
_MAX_DIMS = 64  # numpy's limit
_HUB_TIMEOUT_S = 10
_HUB_HEADER_BYTES = 1 << 16  # the first request for a header; it holds some 500 tensors
_HUB_CONNECTIONS = 8

_ANEW = "copy or download it again"
_AS_SAFETENSORS = "load it once with torch and save it as safetensors"
_BIN_SUFFIXES = (".bin", ".pt", ".pth")
# What a merged model takes from its base besides weights: never code, never another format's weights.
_SMALL_FILES = (
    "config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*",
    "merges.txt", "*.model", "*.tiktoken", "tekken.json", "chat_template*", "additional_chat_templates/*",
    "preprocessor_config.json", "processor_config.json",
)  # fmt: skip
_SMALL_SUFFIXES = (".json", ".txt", ".model", ".tiktoken", ".jinja")


@dataclass(frozen=True, slots=True)
class Tensor:
    """Where a tensor's bytes lie: C-contiguous and little-endian in `file`, from byte `start` up to `stop`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    start: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * DTYPE_BYTES[self.dtype]

    @property
    def stop(self) -> int:
        return self.start + self.nbytes


class File(NamedTuple):
    """A weight file, by what tells it from another: its size in bytes and the SHA-256 of its header.

    The header is all that comes before the data of a `.safetensors` file, and the pickled structure of a `.bin` file.
    """

    path: str
    size: int
    header_sha256: str


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


_T = TypeVar("_T")


class _Weights(NamedTuple):
    file: File
    tensors: dict[str, Tensor]
    aliases: dict[str, str]


# ---------------------------------------------------------------------------------------------------- opening


def open_checkpoint(source: str, relative_to: Path = Path("."), *, download: bool = False) -> Checkpoint:
    """Open the model that `source` names, reading headers only.

    `source` is a folder in the Hugging Face layout, one `.safetensors` or `.bin` file, or a Hub id
    `org/name[@revision]`; a path is taken relative to `relative_to` (the recipe's folder), and wins over a Hub id. With
    `download` a Hub model's weights, config and tokenizer are fetched into the Hub's cache and opened there.

    Raises RequestError with all that is wrong, also when the Hub can't be reached.
    """
    if not source or not _is_plain_text(source):
        raise RequestError(f"model {_show(source)}: not a path or a Hub id; name a folder, a file, or org/name")
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
        raise RequestError(f"model {_clip(source)}: cannot be read ({error.strerror}); check the path") from None
    if stat.S_ISDIR(mode):
        return _open_folder(path, source, None)
    if path.name.startswith("adapter_model."):
        raise RequestError(_adapter_problem(source))
    if path.suffix == ".gguf":
        raise RequestError(_gguf_problem(source))
    if path.suffix != ".safetensors" and path.suffix not in _BIN_SUFFIXES:
        raise RequestError(f"model {source}: {path} has the suffix {path.suffix!r}; name a .safetensors or .bin file, or a folder")
    return _checkpoint(source, None, [_read_weights(path)], None, None, [])


def _open_folder(folder: Path, source: str, commit: str | None) -> Checkpoint:
    def read(name: str) -> bytes:
        return _read_small(folder / name)

    try:
        names = {name for name in os.listdir(folder) if os.path.isfile(folder / name)}
    except OSError as error:
        raise RequestError(_os_problem(folder, error)) from None
    problems: list[str] = []
    config = _gather(problems, lambda: _read_config(str(folder), names, read))
    found = _gather(problems, lambda: _weight_files(str(folder), names, read))
    weights: list[_Weights] = []
    if found is not None:
        attempts = (_gather(problems, partial(_read_weights, folder / name)) for name in found.files)
        weights = [one for one in attempts if one is not None]
        problems += _index_problems(str(folder), found, weights)
    return _checkpoint(source, folder, weights, config, commit, problems)


def _checkpoint(
    source: str,
    folder: Path | None,
    weights: Sequence[_Weights],
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
            f"model {source}: quantised ({_show(quantised)} in the quantization_config of config.json), which is not "
            "supported; give the model in bfloat16, float16 or float32"
        )
    packed = [t for t in tensors if t.name.endswith(_PACKED_SUFFIXES) and t.dtype not in FLOAT_DTYPES]
    if packed and quantised is None:
        problems.append(
            f"model {source}: {len(packed)} tensors hold packed integers (first: {_show(packed[0].name)}), a quantised "
            "model, which is not supported; give the model in bfloat16, float16 or float32"
        )
    if lora := [t for t in tensors if _LORA_NAME.search(t.name)]:
        problems.append(f"{_adapter_problem(source)} ({len(lora)} such tensors, first: {_show(lora[0].name)})")
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
    index_name: str | None
    weight_map: dict[str, str]


def _weight_files(where: str, names: set[str], read: Callable[[str], bytes]) -> _Layout:
    """Choose one format among the files of a model's folder, safetensors before `.bin`; never both."""
    top = {name for name in names if "/" not in name and _is_plain_text(name)}
    for single, suffix in (("model.safetensors", ".safetensors"), ("pytorch_model.bin", ".bin")):
        index = f"{single}.index.json"
        if index in top:
            weight_map = _read_index(f"{where}/{index}", read(index), suffix)
            files = sorted(set(weight_map.values()))
            if single in top and single not in files:
                raise RequestError(f"{where}: has both {single} and {index}, two models; remove the one not meant")
            return _Layout(files, index, weight_map)
        if single in top:
            return _Layout([single], None, {})
        if suffix == ".safetensors":
            others = sorted(n for n in top if n.endswith(suffix) and not n.startswith("adapter_model."))
            shard = len(others) == 1 and re.search(r"-(\d+)-of-(\d+)\.safetensors$", others[0])
            if len(others) == 1 and not (shard and int(shard[2]) > 1):
                return _Layout(others, None, {})
            if others and not top & {"pytorch_model.bin", "pytorch_model.bin.index.json"}:
                raise RequestError(
                    f"{where}: has {len(others)} .safetensors files ({_some(others)}) and no {index} that says which "
                    "belong together; add the index, or name one file"
                )
    if "adapter_config.json" in top or any(name.startswith("adapter_model.") for name in top):
        raise RequestError(_adapter_problem(where))
    if any(name.endswith(".gguf") for name in top):
        raise RequestError(_gguf_problem(where))
    raise RequestError(
        f"{where}: no weights; expected model.safetensors, model.safetensors.index.json, pytorch_model.bin or "
        f"pytorch_model.bin.index.json, found {_some(sorted(top)) or 'no file'}"
    )


def _read_index(where: str, raw: bytes, suffix: str) -> dict[str, str]:
    index = _strict_json(where, raw)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise RequestError(f"{where}: has no weight_map from tensor names to files; {_ANEW}")
    problems = []
    for file in {v: None for v in weight_map.values() if isinstance(v, str)}:
        if not _stays_inside(file):
            problems.append(f"{where}: names the file {_show(file)}; a shard lies in the index's folder or below it")
        elif not file.endswith(suffix):
            problems.append(f"{where}: names the file {_show(file)}; expected a {suffix} file")
    for name, file in weight_map.items():
        if not isinstance(file, str):
            problems.append(f"{where}: tensor {_show(name)} maps to {_show(file)}, which is not a file name; {_ANEW}")
        elif not _is_plain_text(name):
            problems.append(f"{where}: tensor name {_show(name)} has control characters or is not Unicode; rename it")
    if problems:
        raise RequestError(problems)
    return weight_map


def _index_problems(where: str, layout: _Layout, read: Sequence[_Weights]) -> list[str]:
    """Where the index and the files (those that could be read) disagree."""
    if layout.index_name is None:
        return []
    problems = []
    index = f"{where}/{layout.index_name}"
    held = {one.file.path.removeprefix(f"{where}/"): {*one.tensors, *one.aliases} for one in read}
    holder: dict[str, str] = {}
    for file, names in held.items():
        for name in sorted(names):
            if name in holder:
                problems.append(f"{index}: tensor {_show(name)} lies in {holder[name]} and in {file}; remove one of them")
            elif name not in layout.weight_map:
                problems.append(f"{index}: tensor {_show(name)} lies in {file} but is not in the index; add or remove it")
            holder.setdefault(name, file)
    for name, file in layout.weight_map.items():
        if file in held and name not in held[file]:
            found = f"lies in {holder[name]}" if name in holder else "is in no file that could be read"
            problems.append(f"{index}: tensor {_show(name)} should lie in {file}, but {found}; mend the index")
    return problems


def _read_config(where: str, names: set[str], read: Callable[[str], bytes]) -> dict[str, Any] | None:
    if "config.json" not in names:
        return None
    config = _strict_json(f"{where}/config.json", read("config.json"), constants=True)
    if not isinstance(config, dict):
        raise RequestError(f"{where}/config.json: {_show(config)} where a table of settings was expected; {_ANEW}")
    return config


def _read_weights(path: Path) -> _Weights:
    return _read_safetensors(path) if path.suffix == ".safetensors" else _read_bin(path)


# ---------------------------------------------------------------------------------------------------- safetensors


def read_header(path: Path) -> tuple[dict[str, Tensor], dict[str, str], bytes]:
    """One `.safetensors` file's tensors in the order of their data, its metadata, and the bytes before the data.

    The tensors cover the data exactly: no overlap, no hole, nothing after them. Raises RequestError.
    """
    with _open_regular(path) as file:

        def read_first(count: int) -> bytes:
            file.seek(0)
            return file.read(count)

        try:
            return _parse_safetensors(str(path), os.fstat(file.fileno()).st_size, read_first)
        except OSError as error:
            raise RequestError(_os_problem(path, error)) from None


def safetensors_header(entries: Sequence[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """The bytes that precede the data of a `.safetensors` file holding `entries` (name, dtype, shape) in that order.

    Padded with spaces, so that the data starts at a multiple of 8 bytes.
    """
    table: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    start = 0
    for name, dtype, shape in entries:
        assert name not in table, f"two tensors named {name!r}"
        assert name != "__metadata__", "a name that the format keeps for itself"
        stop = start + math.prod(shape) * DTYPE_BYTES[dtype]
        table[name] = {"dtype": dtype, "shape": shape, "data_offsets": (start, stop)}
        start = stop
    text = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    assert len(text) <= _MAX_JSON_BYTES, "a header that readers refuse"
    return len(text).to_bytes(8, "little") + text


def _read_safetensors(path: Path) -> _Weights:
    tensors, _, raw = read_header(path)
    size = len(raw) + sum(tensor.nbytes for tensor in tensors.values())
    return _Weights(File(str(path), size, hashlib.sha256(raw).hexdigest()), tensors, {})


def _parse_safetensors(
    where: str, size: int, read_first: Callable[[int], bytes]
) -> tuple[dict[str, Tensor], dict[str, str], bytes]:
    """Parse the header of a file of `size` bytes; `read_first(n)` gives its first n bytes, or all if they are fewer."""
    head = read_first(64)
    if size < 8:
        raise RequestError(f"{where}: {size} bytes, too short for a safetensors file (at least 10); {_ANEW}")
    length = int.from_bytes(head[:8], "little")
    if length > min(size - 8, _MAX_JSON_BYTES) or head[8:9] != b"{":
        raise RequestError(f"{where}: {_why_not_safetensors(head, length, size)}")
    raw = read_first(8 + length)
    if len(raw) < 8 + length:
        raise RequestError(f"{where}: a header of {length} bytes, but only {len(raw) - 8} could be read; {_ANEW}")
    table = _strict_json(where, raw[8:])
    assert isinstance(table, dict), "it starts with {"
    metadata = table.pop("__metadata__", {})
    problems: list[str] = []
    if not isinstance(metadata, dict) or not all(_is_unicode(text) for pair in metadata.items() for text in pair):
        problems.append(f"{where}: __metadata__ is {_show(metadata)}; expected texts by name; save the file again")
    spans: list[tuple[int, int, str]] = []
    refused: dict[str, list[str]] = {}
    for name, entry in table.items():
        if len(problems) >= _MAX_PROBLEMS:
            break
        problem = _entry_problem(name, entry)
        if problem is not None:
            problems.append(f"{where}: tensor {_show(name)}: {problem}")
        elif entry["dtype"] not in DTYPE_BYTES:
            refused.setdefault(entry["dtype"], []).append(name)
        else:
            spans.append((*entry["data_offsets"], name))
    problems += _dtype_problems(where, refused)
    if not problems:
        problems = _span_problems(where, sorted(spans), size - 8 - length)
    if problems:
        raise RequestError(problems)
    tensors = {
        name: Tensor(name, table[name]["dtype"], tuple(table[name]["shape"]), where, 8 + length + start)
        for start, _, name in sorted(spans)
    }
    return tensors, metadata, raw


def _why_not_safetensors(head: bytes, length: int, size: int) -> str:
    if foreign := _foreign(head):
        return foreign
    if length > size - 8:
        return f"announces a header of {length} bytes, but {size - 8} bytes follow: cut off or not safetensors; {_ANEW}"
    if length > _MAX_JSON_BYTES:
        return f"announces a header of {length} bytes; the format allows {_MAX_JSON_BYTES}; {_ANEW}"
    return f"the header starts with {head[8:9]!r}, expected b'{{': not a safetensors file; {_ANEW}"


def _foreign(head: bytes) -> str | None:
    """What other kind of file starts with these bytes, and what to do about it."""
    for magic, what, fix in (
        (b"PK\x03\x04", "a zip archive, as torch.save writes", "name it .bin"),
        (b"\x80\x02", "a pickle, as torch.save wrote before torch 1.6", _AS_SAFETENSORS),
        (b"GGUF", "GGUF, which is not supported", "give the model it was made from, in safetensors"),
        (b"version https://git-lfs", "a git-lfs pointer, not the file itself", "run `git lfs pull` in its folder"),
        (b"<", "a web page or XML, not weights", _ANEW),
    ):
        if head.startswith(magic):
            return f"{what}; {fix}"
    return None


def _entry_problem(name: str, entry: Any) -> str | None:
    """What is wrong with one tensor's entry in a header, looked at alone."""
    if not _is_plain_text(name):
        return "a name with control characters, or that is not Unicode; rename it"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        return f"the entry is {_show(entry)}; expected dtype, shape and data_offsets; {_ANEW}"
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str):
        return f"the dtype is {_show(dtype)}; expected a name such as 'BF16'; {_ANEW}"
    if not isinstance(shape, list) or len(shape) > _MAX_DIMS or not all(_is_size(n) for n in shape):
        return f"the shape is {_show(shape)}; expected at most {_MAX_DIMS} sizes; {_ANEW}"
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_size(n) for n in offsets):
        return f"data_offsets are {_show(offsets)}; expected begin and end; {_ANEW}"
    begin, end = offsets
    if dtype in DTYPE_BYTES and math.prod(shape) * DTYPE_BYTES[dtype] != end - begin:
        needed = _show(math.prod(shape) * DTYPE_BYTES[dtype])
        return f"{dtype} {_show(shape)} takes {needed} bytes, data_offsets {_show(offsets)} hold {end - begin}; {_ANEW}"
    return None


def _dtype_problems(where: str, refused: Mapping[str, list[str]]) -> list[str]:
    """One line for each dtype that can't be merged, with the names of the tensors that have it."""
    problems = []
    for dtype, names in refused.items():
        if dtype in _QUANTISED_DTYPES:
            why = "quantised, which is not supported; give the model in bfloat16, float16 or float32"
        elif dtype in _COMPLEX_DTYPES:
            why = "complex, which is not supported; split it into real tensors"
        else:
            why = f"not a known dtype ({', '.join(DTYPE_BYTES)}); convert it to one of them"
        problems.append(f"{where}: {len(names)} tensors ({_some(names)}) are {_show(dtype)}: {why}")
    return problems


def _span_problems(where: str, spans: Iterable[tuple[int, int, str]], data_bytes: int) -> list[str]:
    """Where sorted spans (begin, end, name) fail to cover `data_bytes` exactly."""
    problems = []
    covered, last = 0, ""
    for begin, end, name in spans:
        if begin < covered:
            problems.append(
                f"{where}: tensor {_show(name)} begins at byte {begin} of the data, before tensor {_show(last)} ends "
                f"at {covered}: overlapping offsets; {_ANEW}"
            )
        elif begin > covered:
            problems.append(
                f"{where}: tensor {_show(name)} begins at byte {begin} of the data, but what precedes it ends at "
                f"{covered}: a hole; {_ANEW}"
            )
        if end >= covered:
            covered, last = end, name
        if len(problems) >= _MAX_PROBLEMS:
            break
    if not problems and covered != data_bytes:
        how = "cut off" if covered > data_bytes else "has bytes that belong to no tensor"
        problems.append(f"{where}: the header describes {covered} bytes of data, the file has {data_bytes}: {how}; {_ANEW}")
    return problems


# ---------------------------------------------------------------------------------------------------- .bin files

_STORAGE_DTYPES = {
    "torch DoubleStorage": "F64", "torch FloatStorage": "F32", "torch HalfStorage": "F16",
    "torch BFloat16Storage": "BF16", "torch LongStorage": "I64", "torch IntStorage": "I32", "torch ShortStorage": "I16",
    "torch CharStorage": "I8", "torch ByteStorage": "U8", "torch BoolStorage": "BOOL",
    "torch.storage UntypedStorage": "U8", "torch UntypedStorage": "U8",
    "torch ComplexFloatStorage": "C64", "torch ComplexDoubleStorage": "C128",
    "torch QInt8Storage": "QI8", "torch QUInt8Storage": "QU8", "torch QInt32Storage": "QI32",
    "torch QUInt4x2Storage": "QU4X2", "torch QUInt2x4Storage": "QU2X4",
}  # fmt: skip
_TORCH_DTYPES = {
    "torch float64": "F64", "torch float32": "F32", "torch float16": "F16", "torch bfloat16": "BF16",
    "torch int64": "I64", "torch int32": "I32", "torch int16": "I16", "torch int8": "I8",
    "torch uint64": "U64", "torch uint32": "U32", "torch uint16": "U16", "torch uint8": "U8", "torch bool": "BOOL",
    "torch float8_e4m3fn": "F8_E4M3", "torch float8_e4m3fnuz": "F8_E4M3FNUZ", "torch float8_e5m2": "F8_E5M2",
    "torch float8_e5m2fnuz": "F8_E5M2FNUZ", "torch float8_e8m0fnu": "F8_E8M0", "torch float4_e2m1fn_x2": "F4",
    "torch complex32": "C32", "torch complex64": "C64", "torch complex128": "C128",
}  # fmt: skip
_STORAGE_BYTES = DTYPE_BYTES | {"C64": 8, "C128": 16, "QI8": 1, "QU8": 1, "QI32": 4, "QU4X2": 1, "QU2X4": 1}
_REBUILD = "torch._utils _rebuild_tensor_v2"
_REBUILD_WITH_DTYPE = "torch._utils _rebuild_tensor_v3"
_REBUILD_PARAMETER = "torch._utils _rebuild_parameter"
_ORDERED_DICT = "collections OrderedDict"
_GLOBALS = frozenset({*_STORAGE_DTYPES, *_TORCH_DTYPES, _REBUILD, _REBUILD_WITH_DTYPE, _REBUILD_PARAMETER, _ORDERED_DICT})


class _Global(NamedTuple):
    """The name of a function or class that a pickle refers to. It stays a name."""

    name: str


class _Storage(NamedTuple):
    dtype: str
    key: str
    nbytes: int


class _View(NamedTuple):
    """A tensor as pickled: a storage, and offset, shape and stride in elements of `dtype`."""

    storage: _Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class _BoundedFile(io.FileIO):
    """A file for `zipfile`, which would believe whatever size a damaged directory announces."""

    def read(self, size: int | None = -1, /) -> bytes:
        left = max(os.fstat(self.fileno()).st_size - self.tell(), 0)
        count = left if size is None or size < 0 else min(size, left)
        if count > _MAX_JSON_BYTES:
            raise zipfile.BadZipFile(f"a directory of {count} bytes")
        return super().read(count) or b""


def _read_bin(path: Path) -> _Weights:
    """A file of torch.save, from its zip directory and its pickled structure; no data is read, nothing is run."""
    with _open_regular(path) as file:
        try:
            head, size = file.read(64), os.fstat(file.fileno()).st_size
        except OSError as error:
            raise RequestError(_os_problem(path, error)) from None
    if not head.startswith(b"PK\x03\x04"):
        why = "a safetensors file; name it .safetensors" if head[8:9] == b"{" else _foreign(head)
        raise RequestError(f"{path}: {why or f'not a file of torch.save; {_ANEW}'}")
    try:
        with _BoundedFile(path) as file, zipfile.ZipFile(file) as archive:
            return _read_archive(path, size, archive, file)
    except RequestError:
        raise
    except OSError as error:
        raise RequestError(_os_problem(path, error)) from None
    # What zipfile raises on a damaged archive, beside its own error; RuntimeError means encrypted.
    except (zipfile.BadZipFile, zlib.error, struct.error, EOFError, ValueError, KeyError, RuntimeError) as error:
        raise RequestError(f"{path}: a damaged zip archive ({_clip(str(error))}); {_ANEW}") from None


def _read_archive(path: Path, size: int, archive: zipfile.ZipFile, file: io.FileIO) -> _Weights:
    records = {info.filename: info for info in archive.infolist()}
    root, pickled = _structure(path, archive)
    views, problems = _state_dict(str(path), _unpickle(str(path), pickled))
    starts: dict[str, int] = {}
    first_at: dict[tuple[int, str, tuple[int, ...]], str] = {}
    refused: dict[str, list[str]] = {}
    tensors: list[Tensor] = []
    aliases: dict[str, str] = {}
    for name, view in views.items():
        if len(problems) >= _MAX_PROBLEMS:
            break
        if view.dtype not in DTYPE_BYTES:
            refused.setdefault(view.dtype, []).append(name)
            continue
        record = records.get(f"{root}data/{view.storage.key}")
        begin = view.offset * DTYPE_BYTES[view.dtype]
        end = begin + math.prod(view.shape) * DTYPE_BYTES[view.dtype]
        where = f"{path}: tensor {_show(name)}"
        if not _is_plain_text(name):
            problems.append(f"{where}: a name with control characters, or that is not Unicode; rename it")
        elif not _is_contiguous(view):
            problems.append(
                f"{where}: not contiguous (shape {_show(view.shape)}, stride {_show(view.stride)}); load it once with "
                "torch and save tensor.contiguous()"
            )
        elif record is None:
            problems.append(f"{where}: its storage {_show(view.storage.key)} is not in the file; {_ANEW}")
        elif not end <= view.storage.nbytes <= record.file_size:
            problems.append(
                f"{where}: ends at byte {_show(end)} of a storage of {view.storage.nbytes} bytes, of which the file "
                f"holds {record.file_size}; {_ANEW}"
            )
        else:
            if record.filename not in starts:
                starts[record.filename] = _record_start(path, size, file, record)
            tensor = Tensor(name, view.dtype, view.shape, str(path), starts[record.filename] + begin)
            first = first_at.setdefault((tensor.start, tensor.dtype, tensor.shape), name)
            if first != name and tensor.nbytes:
                aliases[name] = first
            else:
                tensors.append(tensor)
    problems += _dtype_problems(str(path), refused)
    if problems:
        raise RequestError(problems)
    tensors.sort(key=lambda tensor: (tensor.start, tensor.stop, tensor.name))
    digest = hashlib.sha256(pickled).hexdigest()
    return _Weights(File(str(path), size, digest), {tensor.name: tensor for tensor in tensors}, aliases)


def _structure(path: Path, archive: zipfile.ZipFile) -> tuple[str, bytes]:
    """The folder within the archive that holds all its records, and the pickled structure."""
    infos = archive.infolist()
    roots = [info.filename[: -len("data.pkl")] for info in infos if re.fullmatch(r"[^/]+/data\.pkl", info.filename)]
    if len(roots) != 1 or len({info.filename for info in infos}) < len(infos):
        raise RequestError(f"{path}: a zip archive that is not a file of torch.save (no single data.pkl); {_ANEW}")
    for info in infos:
        if info.compress_type != zipfile.ZIP_STORED:
            raise RequestError(
                f"{path}: {_show(info.filename)} is compressed, so its bytes can't be read in place; {_AS_SAFETENSORS}"
            )
        if info.filename in (f"{roots[0]}data.pkl", f"{roots[0]}byteorder") and info.file_size > _MAX_PICKLE_BYTES:
            raise RequestError(
                f"{path}: {info.filename} has {info.file_size} bytes, the limit is {_MAX_PICKLE_BYTES}; {_AS_SAFETENSORS}"
            )
    if f"{roots[0]}byteorder" in archive.namelist() and archive.read(f"{roots[0]}byteorder") != b"little":
        raise RequestError(f"{path}: not little-endian; {_AS_SAFETENSORS} on a little-endian machine")
    return roots[0], archive.read(f"{roots[0]}data.pkl")


def _record_start(path: Path, size: int, file: io.FileIO, record: zipfile.ZipInfo) -> int:
    """Where a stored record's bytes begin. Only its local header tells: torch pads it to align the data."""
    file.seek(record.header_offset)
    local = file.read(30) or b""
    if len(local) < 30 or local[:4] != b"PK\x03\x04":
        raise RequestError(f"{path}: no record where the directory says {_show(record.filename)} lies; {_ANEW}")
    name_bytes, extra_bytes = struct.unpack("<HH", local[26:30])
    start = record.header_offset + 30 + int(name_bytes) + int(extra_bytes)
    if record.flag_bits & 1 or record.compress_size != record.file_size or start + record.file_size > size:
        raise RequestError(
            f"{path}: {_show(record.filename)} should take bytes {start} to {start + record.file_size} as they are, in "
            f"a file of {size} bytes; {_ANEW}"
        )
    return start


def _is_contiguous(view: _View) -> bool:
    expected = 1
    for length, stride in zip(reversed(view.shape), reversed(view.stride), strict=True):
        if length > 1 and stride != expected:
            return 0 in view.shape
        expected *= length
    return True


def _state_dict(where: str, value: Any) -> tuple[dict[str, _View], list[str]]:
    """The tensors by name, and a problem for each other value; `state_dict`, `model`, `module` may wrap them alone."""
    if isinstance(value, dict) and len(value) == 1:
        key, inner = next(iter(value.items()))
        if key in ("state_dict", "model", "module") and isinstance(inner, dict):
            value = inner
    if not isinstance(value, dict):
        raise RequestError(f"{where}: holds {_kind(value)}; expected tensors by name (a state dict); {_AS_SAFETENSORS}")
    views: dict[str, _View] = {}
    problems: list[str] = []
    for name, entry in value.items():
        if isinstance(entry, _View):
            views[name] = entry
        elif len(problems) < _MAX_PROBLEMS:
            problems.append(f"{where}: entry {_show(name)} is {_kind(entry)}, not a tensor; save the state dict without it")
    return views, problems


def _kind(value: Any) -> str:
    return f"the name {_show(value.name)}" if isinstance(value, _Global) else f"a {type(value).__name__.lstrip('_')}"


def _unpickle(where: str, data: bytes) -> Any:
    """What a pickle of tensors says, with the tensors as `_View`s and dicts with text keys only."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # pickletools on a damaged name
            return _interpret(where, data)
    except RequestError:
        raise
    except (ValueError, IndexError, KeyError) as error:  # a damaged pickle: bad opcode, empty stack, unknown memo
        raise RequestError(f"{where}: a damaged structure record ({type(error).__name__}); {_ANEW}") from None


def _interpret(where: str, data: bytes) -> Any:
    stack: list[Any] = []
    outer: list[list[Any]] = []  # the stacks below the marks
    memo: dict[int, Any] = {}
    storages: dict[str, _Storage] = {}

    def to_mark() -> list[Any]:
        nonlocal stack
        items, stack = stack, outer.pop()
        return items

    arg: Any
    for opcode, arg, position in pickletools.genops(data):
        match opcode.name:
            case "PROTO" | "FRAME":
                pass
            case "STOP":
                return stack.pop()
            case "MARK":
                outer.append(stack)
                stack = []
            case "BINPUT" | "LONG_BINPUT":
                memo[arg] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[arg])
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT":
                stack.append(arg)
            case "BINUNICODE" | "SHORT_BINUNICODE" | "BINUNICODE8":
                stack.append(arg)
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(opcode.name == "NEWTRUE")
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(opcode.name[-1])
                if len(stack) < count:
                    raise IndexError
                stack[-count:] = [tuple(stack[-count:])]
            case "TUPLE":
                items = to_mark()
                stack.append(tuple(items))
            case "EMPTY_LIST":
                stack.append([])
            case "APPEND" | "APPENDS":
                items = [stack.pop()] if opcode.name == "APPEND" else to_mark()
                _expect(stack[-1], list).extend(items)
            case "EMPTY_DICT":
                stack.append({})
            case "SETITEM" | "SETITEMS":
                items = [stack.pop(-2), stack.pop()] if opcode.name == "SETITEM" else to_mark()
                if len(items) % 2:
                    raise ValueError
                table = _expect(stack[-1], dict)
                for key, value in zip(items[::2], items[1::2], strict=True):
                    if not isinstance(key, str):
                        raise RequestError(f"{where}: {_kind(key)} as a tensor's name; save tensors by name (texts)")
                    if key in table:
                        raise RequestError(f"{where}: {_show(key)} occurs twice; {_ANEW}")
                    table[key] = value
            case "GLOBAL" | "STACK_GLOBAL":
                if opcode.name == "STACK_GLOBAL":
                    module, name = _expect(stack.pop(-2), str), _expect(stack.pop(), str)
                    arg = f"{module} {name}"
                if arg not in _GLOBALS:
                    raise RequestError(
                        f"{where}: refers to {_show(arg.replace(' ', '.', 1))} (byte {position} of its structure), "
                        f"which is not part of a plain tensor and is never run; {_AS_SAFETENSORS}, if you trust it"
                    )
                stack.append(_Global(arg))
            case "BINPERSID":
                storage = _storage(stack.pop())
                if storages.setdefault(storage.key, storage) != storage:
                    raise RequestError(f"{where}: storage {_show(storage.key)} is described in two ways; {_ANEW}")
                stack.append(storage)
            case "REDUCE":
                args = _expect(stack.pop(), tuple)
                stack.append(_rebuild(_expect(stack.pop(), _Global).name, args))
            case "BUILD":  # an OrderedDict's attributes: `_metadata`, which holds no tensor
                stack.pop()
                _expect(stack[-1], dict)
            case _:
                raise RequestError(
                    f"{where}: {opcode.name} at byte {position} of its structure, which no plain tensor needs; "
                    f"{_AS_SAFETENSORS}, if you trust it"
                )
    raise ValueError("no end")


def _storage(pid: Any) -> _Storage:
    tag, kind, key, _location, numel = _expect(pid, tuple)
    dtype = _STORAGE_DTYPES[_expect(kind, _Global).name]
    if tag != "storage" or not _is_size(numel):
        raise ValueError
    return _Storage(dtype, _expect(key, str), numel * _STORAGE_BYTES[dtype])


def _rebuild(function: str, args: tuple[Any, ...]) -> Any:
    """The value that torch's function of this name makes, as a description."""
    if function == _ORDERED_DICT and not args:
        return {}
    if function == _REBUILD_PARAMETER and len(args) == 3:
        return _expect(args[0], _View)
    if function == _REBUILD and len(args) in (6, 7):
        dtype = _expect(args[0], _Storage).dtype
    elif function == _REBUILD_WITH_DTYPE and len(args) in (7, 8):
        dtype = _TORCH_DTYPES[_expect(args[6], _Global).name]
    else:
        raise ValueError
    storage, offset, shape, stride = args[:4]
    shape, stride = _expect(shape, tuple), _expect(stride, tuple)
    if len(shape) != len(stride) or len(shape) > _MAX_DIMS or not all(_is_size(n) for n in (offset, *shape, *stride)):
        raise ValueError
    return _View(_expect(storage, _Storage), dtype, offset, shape, stride)


def _expect(value: Any, kind: type[Any]) -> Any:
    if type(value) is not kind:
        raise ValueError
    return value


# ---------------------------------------------------------------------------------------------------- the Hub


def _open_hub(source: str, path: Path, download: bool) -> Checkpoint:
    """Open `org/name[@revision]`, there being nothing at `path`."""
    parts = re.fullmatch(r"([A-Za-z0-9][\w.-]*/[\w.-]+)(?:@([^\s@]+))?", source, flags=re.ASCII)
    if parts is None or Path(parts[1]).suffix in (".safetensors", ".gguf", *_BIN_SUFFIXES):
        if "+" in source:
            raise RequestError(_adapter_problem(source))
        raise RequestError(f"model {source}: no file or folder {path}, and not a Hub id org/name[@revision]; check it")
    repo, revision = parts[1], parts[2]

    host = _host(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")  # the library fails to load with a wrong one

    from huggingface_hub import HfApi, hf_hub_url, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HTTPError  # type: ignore[attr-defined]

    # Transport errors are HTTPError; the library's own are HTTPError, OSError or ValueError; an answer that is not
    # the Hub's fails as one of the rest. None of their texts is passed on: a header's could quote the token.
    failures = (HTTPError, OSError, ValueError, TypeError, KeyError, AttributeError)
    try:
        info = HfApi().model_info(repo, revision=revision, timeout=_HUB_TIMEOUT_S)
        commit, names = str(info.sha), {file.rfilename for file in info.siblings or ()}
    except failures as error:
        problem = _hub_problem(source, path, host, error)
        if isinstance(error, HfHubHTTPError) and error.response.status_code < 500:
            raise RequestError(problem) from None
        try:  # the pattern asks for no file that must be there: what is missing, opening the folder tells
            cached = snapshot_download(repo, revision=revision, local_files_only=True, allow_patterns="config.json")
        except failures:
            raise RequestError(problem) from None
        try:
            return _open_folder(Path(cached), source, Path(cached).name)
        except RequestError as incomplete:
            raise RequestError([problem, *incomplete.problems]) from None

    where = f"hub://{repo}@{commit}"

    def fetch(name: str, count: int) -> tuple[bytes, int]:
        try:
            return _fetch_first(hf_hub_url(repo, name, revision=commit), count)
        except failures as error:
            if isinstance(error, RequestError):
                raise
            raise RequestError(f"{_hub_problem(source, path, host, error)} (while fetching {_show(name)})") from None

    def read(name: str) -> bytes:
        raw, size = fetch(name, _MAX_JSON_BYTES + 1)
        if size > _MAX_JSON_BYTES:
            raise RequestError(f"{where}/{name}: {size} bytes, the limit is {_MAX_JSON_BYTES}")
        return raw

    def read_header(name: str) -> _Weights:
        first, size = fetch(name, _HUB_HEADER_BYTES)
        tensors, _, raw = _parse_safetensors(
            f"{where}/{name}", size, lambda count: first[:count] if count <= len(first) else fetch(name, count)[0]
        )
        return _Weights(File(f"{where}/{name}", size, hashlib.sha256(raw).hexdigest()), tensors, {})

    problems: list[str] = []
    config = _gather(problems, lambda: _read_config(where, names, read))
    layout = _gather(problems, lambda: _weight_files(where, names, read))
    if layout is not None:
        absent = [name for name in layout.files if name not in names]
        problems += [f"{where}: {layout.index_name} names {_show(name)}, which the model does not have" for name in absent]
        problems += _kind_problems(source, [], config) if config and _quantization(config) else []
    if problems or layout is None:
        raise RequestError(problems)
    if download or not layout.files[0].endswith(".safetensors"):  # the structure of a .bin file lies at its end
        small = [name for name in names if _is_small_file(name)]
        wanted = [*layout.files, *([layout.index_name] if layout.index_name else []), *small]
        try:
            folder = snapshot_download(repo, revision=revision, allow_patterns=[glob.escape(name) for name in wanted])
        except failures as error:
            raise RequestError(f"{_hub_problem(source, path, host, error)} (while downloading)") from None
        return _open_folder(Path(folder), source, Path(folder).name)
    with ThreadPoolExecutor(_HUB_CONNECTIONS) as pool:
        waiting = [pool.submit(read_header, name) for name in layout.files]
        weights = [one for future in waiting if (one := _gather(problems, future.result))]
    problems += _index_problems(where, layout, weights)
    return _checkpoint(source, None, weights, config, commit, problems)


def _fetch_first(url: str, count: int) -> tuple[bytes, int]:
    """The first `count` bytes of a file on the Hub (all, if they are fewer), and its size."""
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status  # type: ignore[attr-defined]

    headers = {**build_hf_headers(), "Range": f"bytes=0-{count - 1}", "Accept-Encoding": "identity"}
    with get_session().stream("GET", url, headers=headers, timeout=_HUB_TIMEOUT_S) as response:
        if response.status_code == 416:  # an empty file has no first byte
            return b"", 0
        if response.status_code >= 400:
            response.read()
            hf_raise_for_status(response)
        data = bytearray()
        for piece in response.iter_bytes(1 << 16):  # a server that ignores the range is left after `count` bytes
            data += piece
            if len(data) >= count:
                break
        told = response.headers.get("Content-Range", "").rpartition("/")[2]
        if response.status_code != 206:
            told = response.headers.get("Content-Length", "")
        size = int(told) if told.isdecimal() else len(data)
    return bytes(data[:count]), size


def _hub_problem(source: str, path: Path, host: str, error: Exception) -> str:
    from huggingface_hub import errors
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else None
    if isinstance(error, errors.GatedRepoError):
        why = f"gated on {host}; accept its terms there and set HF_TOKEN to a token of that account"
    elif isinstance(error, errors.RevisionNotFoundError):
        why = f"{host} has no such revision of it; check what follows the @"
    elif isinstance(error, errors.RepositoryNotFoundError) or status == 404:
        why = f"no folder {path}, and no such model on {host} (or a private one); check the name, or set HF_TOKEN"
    elif status in (401, 403):
        why = f"{host} refuses access (HTTP {status}); check that HF_TOKEN is valid and may read this model"
    elif status is not None:
        why = f"{host} answers with HTTP {status}; try again later"
    elif isinstance(error, errors.HFValidationError):
        why = f"no folder {path}, and not a valid Hub id; check the name"
    elif isinstance(error, errors.OfflineModeIsEnabled):
        why = "not whole in the Hub's cache, and HF_HUB_OFFLINE forbids to fetch it; unset it, or give a folder"
    elif isinstance(error, UnicodeError):
        why = "HF_TOKEN is not plain ASCII; set it anew"
    elif isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError):
        why = f"cannot be stored in the Hub's cache ({os.strerror(error.errno)}); check HF_HOME and its disk"
    elif isinstance(error, (HTTPError, OSError)):
        why = (
            f"no folder {path}, and {host} cannot be reached ({type(error).__name__}), nor is it whole in the Hub's "
            "cache; check the network and HF_ENDPOINT, or give a folder"
        )
    else:
        why = f"{host} does not answer as a Hub does ({type(error).__name__}); check HF_ENDPOINT and HF_TOKEN"
    return f"model {source}: {why}"


def _host(endpoint: str) -> str:
    """The host of HF_ENDPOINT, without a user or password that the address may carry."""
    try:
        address = urlsplit(endpoint)
        name = f"{address.hostname}:{address.port}" if address.port else address.hostname
    except ValueError:
        name = None
    if not name or address.scheme not in ("http", "https"):
        raise RequestError("HF_ENDPOINT: not an http or https address; set it to one such as https://huggingface.co")
    return name


def _is_small_file(name: str) -> bool:
    return name.endswith(_SMALL_SUFFIXES) and any(
        fnmatch.fnmatchcase(name, pattern) and name.count("/") == pattern.count("/") for pattern in _SMALL_FILES
    )


# ---------------------------------------------------------------------------------------------------- files


def write_atomically(path: Path, data: bytes) -> None:
    """After this, `path` holds `data`, also after a power cut; until then it holds what it held before.

    Raises OSError, leaving nothing behind.
    """
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(aside, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


def fsync_folder(path: Path) -> None:
    """Make the folder's entries (files made, renamed, removed) durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that can't sync folders
            raise
    finally:
        os.close(descriptor)


def _open_regular(path: Path) -> BinaryIO:
    """Open a file to read it; a pipe or a device would block or never end."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise RequestError(f"{path}: not a regular file; give the weights as a file")
        return open(path, "rb")
    except OSError as error:
        raise RequestError(_os_problem(path, error)) from None


def _read_small(path: Path) -> bytes:
    with _open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > _MAX_JSON_BYTES:
            raise RequestError(f"{path}: {size} bytes, the limit for this file is {_MAX_JSON_BYTES}; {_ANEW}")
        try:
            return file.read(size)
        except OSError as error:
            raise RequestError(_os_problem(path, error)) from None


def _os_problem(path: Path, error: OSError) -> str:
    if isinstance(error, FileNotFoundError):
        return f"{path}: no such file; {_ANEW}, or mend the index that names it"
    return f"{path}: cannot be read ({error.strerror}); check the file and its permissions"


# ---------------------------------------------------------------------------------------------------- small checks


def _strict_json(where: str, raw: bytes, *, constants: bool = False) -> Any:
    """Parse JSON, refusing repeated keys, and NaN and infinities unless `constants`."""
    repeated: list[str] = []

    def table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) < len(pairs):
            repeated.extend(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        return result

    def constant(name: str) -> float:
        if constants:
            return float(name)
        raise ValueError(f"{name} is not a number of JSON")

    def integer(text: str) -> int | float:  # other parsers take -0 for a floating number
        return -0.0 if text == "-0" else int(text)

    try:
        value = json.loads(raw.decode(), object_pairs_hook=table, parse_int=integer, parse_constant=constant)
    except UnicodeDecodeError as error:
        raise RequestError(f"{where}: not UTF-8 at byte {error.start} of the header or file; {_ANEW}") from None
    except RecursionError:
        raise RequestError(f"{where}: JSON nested too deeply; {_ANEW}") from None
    except ValueError as error:
        raise RequestError(f"{where}: not JSON ({_clip(str(error))}); {_ANEW}") from None
    if repeated:
        raise RequestError([f"{where}: {_show(key)} occurs twice; {_ANEW}" for key in repeated[:_MAX_PROBLEMS]])
    return value


def _gather(problems: list[str], attempt: Callable[[], _T]) -> _T | None:
    try:
        return attempt()
    except RequestError as error:
        problems.extend(error.problems)
        return None


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _MAX_INT


def _is_unicode(value: Any) -> bool:
    return isinstance(value, str) and not re.search(r"[\ud800-\udfff]", value)


def _is_plain_text(text: str) -> bool:
    """Whether a name can be written to a file, a terminal or a header: UTF-8, no control characters."""
    return _is_unicode(text) and not re.search(r"[\x00-\x1f\x7f-\x9f]", text)


def _stays_inside(name: str) -> bool:
    """Whether a file name from an index is plainly below the index's folder, judged by its text.

    Links are followed: in the Hub's cache every file is a link to `../../blobs`.
    """
    return _is_plain_text(name) and "\\" not in name and all(part not in ("", ".", "..") for part in name.split("/"))


_BRIEF = reprlib.Repr()
_BRIEF.maxstring = _BRIEF.maxother = 100
_BRIEF.maxlist = _BRIEF.maxtuple = 8


def _show(value: Any) -> str:
    """A value in a message: one line, short and printable whatever it is, nested a thousand deep or of a megabyte."""
    return _clip(_BRIEF.repr(value))


def _clip(text: str) -> str:
    return text if len(text) <= 120 else f"{text[:117]}..."


def _some(names: Sequence[str]) -> str:
    return ", ".join(_show(name) for name in names[:3]) + (", ..." if len(names) > 3 else "")
