"""One file of a model is described here: where each tensor's bytes lie, and the header that says so in a `.safetensors` file."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from pcb_ray.errors import RequestError
from pcb_ray.files.foreign import (
    ANEW,
    MAX_JSON_BYTES,
    MAX_PROBLEMS,
    is_plain_text,
    is_unicode,
    mismatch,
    open_regular,
    os_problem,
    show,
    some,
    strict_json,
)
from pcb_ray.files.store import Stamp

# These are the names that safetensors gives to dtypes, with the bytes of one element.
DTYPE_BYTES: dict[str, int] = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip
FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")
# torch has other names for them; here are also those that can't be merged.
OF_TORCH: dict[str, str] = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32", "int16": "I16",
    "int8": "I8", "uint64": "U64", "uint32": "U32", "uint16": "U16", "uint8": "U8", "bool": "BOOL", "float8_e4m3fn": "F8_E4M3",
    "float8_e4m3fnuz": "F8_E4M3FNUZ", "float8_e5m2": "F8_E5M2", "float8_e5m2fnuz": "F8_E5M2FNUZ", "float8_e8m0fnu": "F8_E8M0",
    "float4_e2m1fn_x2": "F4", "complex32": "C32", "complex64": "C64", "complex128": "C128",
}  # fmt: skip
_DEQUANTISE = (
    "load it with transformers and quantization_config=FineGrainedFP8Config(dequantize=True) or the like, call "
    "save_pretrained(FOLDER, save_original_format=False), and give that folder; or give the model that it was made from"
)
_QUANTISED_DTYPES = ("F4", "F6_E2M3", "F6_E3M2", "F8_E4M3", "F8_E4M3FNUZ", "F8_E5M2", "F8_E5M2FNUZ", "F8_E8M0")
_COMPLEX_DTYPES = ("C32", "C64", "C128")

METADATA = "__metadata__"  # This entry of a header is no tensor.
MAX_DIMS = 64  # numpy has this limit.

AS_SAFETENSORS = "load it once with torch and save it as safetensors"


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor's bytes lie C-contiguous and little-endian in `file`, from byte `start` up to `stop`."""

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


@dataclass(frozen=True, slots=True)
class File:
    """A file of tensors is told from another by its size in bytes and the SHA-256 of its header.

    The header is all that comes before the data of a `.safetensors` file, and the pickled structure of a `.bin` file.
    """

    path: str
    size: int
    header_sha256: str
    stamp: Stamp | None = field(default=None, compare=False)
    """As it was when its header was read: it must stay so. None for what can't change."""


class FileContents(NamedTuple):
    """A file holds these tensors; an alias leads from a name to the tensor with the same bytes."""

    file: File
    tensors: dict[str, Tensor]
    aliases: dict[str, str]


# ---------------------------------------------------------------------------------------------------- safetensors


def read_header(path: Path) -> tuple[dict[str, Tensor], dict[str, str], bytes]:
    """Read one `.safetensors` file's tensors in the order of their data, its metadata, and the bytes before the data.

    The tensors cover the data exactly: no overlap, no hole, nothing after them. Raises RequestError.
    """
    with open_regular(path) as file:

        def read_first(count: int) -> bytes:
            file.seek(0)
            return file.read(count)

        try:
            return parse_header(str(path), os.fstat(file.fileno()).st_size, read_first)
        except OSError as error:
            raise RequestError(os_problem(path, error)) from None


def safetensors_header(entries: Sequence[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """Make the bytes that precede the data of a `.safetensors` file holding `entries` (name, dtype, shape) in that order.

    They are padded with spaces, so that the data start at a multiple of 8 bytes.
    """
    table: dict[str, Any] = {METADATA: dict(metadata)} if metadata else {}
    start = 0
    for name, dtype, shape in entries:
        if name in table or name == METADATA:
            raise ValueError(f"tensor {show(name)}: the name occurs twice, or is kept by the format")
        stop = start + math.prod(shape) * DTYPE_BYTES[dtype]
        table[name] = {"dtype": dtype, "shape": shape, "data_offsets": (start, stop)}
        start = stop
    text = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_JSON_BYTES:
        found = f"{len(entries)} tensors whose header takes {len(text)}"
        raise RequestError(
            f"--max-shard-size: {mismatch(f'headers of at most {MAX_JSON_BYTES} bytes', found, 'give a smaller size')}"
        )
    return len(text).to_bytes(8, "little") + text


def parse_header(where: str, size: int, read_first: Callable[[int], bytes]) -> tuple[dict[str, Tensor], dict[str, str], bytes]:
    """Do as `read_header`, for a file of `size` bytes whose first n `read_first(n)` gives, or all if they are fewer."""
    head = read_first(64)
    if size < 8:
        raise RequestError(f"{where}: {mismatch('a safetensors file, of at least 10 bytes', f'{size} bytes', ANEW)}")
    length = int.from_bytes(head[:8], "little")
    if length > min(size - 8, MAX_JSON_BYTES) or head[8:9] != b"{":
        raise RequestError(f"{where}: {_why_not_safetensors(head, length, size)}")
    raw = read_first(8 + length)
    if len(raw) < 8 + length:
        raise RequestError(f"{where}: {mismatch(f'a header of {length} bytes', f'{len(raw) - 8} that could be read', ANEW)}")
    table: dict[str, Any] = strict_json(where, raw[8:])  # It starts with {.
    metadata = table.pop(METADATA, {})
    problems: list[str] = []
    if not isinstance(metadata, dict) or not all(is_unicode(text) for pair in metadata.items() for text in pair):
        problems.append(f"{where}: {METADATA}: {mismatch('texts by name', show(metadata), 'save the file again')}")
    spans: list[tuple[int, int, str]] = []
    refused: dict[str, str] = {}
    for name, entry in table.items():
        if len(problems) >= MAX_PROBLEMS:
            break
        if problem := _entry_problem(name, entry):
            problems.append(f"{where}: tensor {show(name)}: {problem}")
        elif entry["dtype"] not in DTYPE_BYTES:
            refused[name] = entry["dtype"]
        else:
            spans.append((*entry["data_offsets"], name))
    problems += dtype_problems(where, refused)
    if not problems:
        problems = _span_problems(where, sorted(spans), size - 8 - length)
    if problems:
        raise RequestError(problems)
    tensors = {
        name: Tensor(name, table[name]["dtype"], tuple(table[name]["shape"]), where, 8 + length + start)
        for start, _, name in sorted(spans)
    }
    return tensors, metadata, raw


def contents_of(where: str, tensors: dict[str, Tensor], raw: bytes) -> FileContents:
    """Describe a file by its parsed header, which is known to account for every byte of it."""
    size = len(raw) + sum(tensor.nbytes for tensor in tensors.values())
    return FileContents(File(where, size, hashlib.sha256(raw).hexdigest()), tensors, {})


def name_problem(name: str) -> str | None:
    """Say what is wrong with a tensor's name, to follow the place; None if it can be written."""
    if name == METADATA:
        return mismatch("the name of a tensor", f"{METADATA}, which safetensors keeps for itself", "rename or remove the tensor")
    if not is_plain_text(name):
        return mismatch("a name in plain Unicode", "one with control characters, or that is not Unicode", "rename the tensor")
    return None


def dtype_problems(where: str, dtypes: Mapping[str, str]) -> list[str]:
    """Tell, in one line for each, which of these dtypes (by tensor name) can't be merged."""
    refused: dict[str, list[str]] = {}
    for name, dtype in dtypes.items():
        if dtype not in DTYPE_BYTES:
            refused.setdefault(dtype, []).append(name)
    problems, known = [], f"dtypes among {', '.join(DTYPE_BYTES)}"
    for dtype, names in refused.items():
        if dtype in _QUANTISED_DTYPES:
            kind, fix = "quantised, which is not supported", _DEQUANTISE
        elif dtype in _COMPLEX_DTYPES:
            kind, fix = "complex", "split it into real tensors"
        else:
            kind, fix = "not a known dtype", "convert it to one of them"
        found = f"{len(names)} tensors ({some(names)}) of {show(dtype)}, {kind}"
        problems.append(f"{where}: {mismatch(known, found, fix)}")
    return problems


def is_shape(sizes: Sequence[Any]) -> bool:
    return len(sizes) <= MAX_DIMS and all(type(size) is int and 0 <= size < 2**63 for size in sizes)


def foreign_format(head: bytes) -> tuple[str, str] | None:
    """Say what other kind of file starts with these bytes, and what to do about it."""
    for magic, what, fix in (
        (b"PK\x03\x04", "a zip archive, as torch.save writes", "name it .bin"),
        (b"\x80\x02", "a pickle, as torch.save wrote before torch 1.6", AS_SAFETENSORS),
        (b"GGUF", "GGUF, which is not supported", "give the model it was made from, in safetensors"),
        (b"version https://git-lfs", "a git-lfs pointer, not the file itself", "run `git lfs pull` in its folder"),
        (b"<", "a web page or XML, not tensors", ANEW),
    ):
        if head.startswith(magic):
            return what, fix
    return None


def _why_not_safetensors(head: bytes, length: int, size: int) -> str:
    if foreign := foreign_format(head):
        return mismatch("a safetensors file", *foreign)
    if length > size - 8:
        found = f"{size - 8} bytes after its announcement: cut off, or not safetensors"
        return mismatch(f"a header of {length} bytes", found, ANEW)
    if length > MAX_JSON_BYTES:
        return mismatch(f"a header of at most {MAX_JSON_BYTES} bytes, as the format has it", f"one of {length} announced", ANEW)
    return mismatch("a header that starts with b'{'", f"{head[8:9]!r}: not a safetensors file", ANEW)


def _entry_problem(name: str, entry: Any) -> str | None:
    """Say what is wrong with one tensor's entry in a header, looked at alone."""
    if problem := name_problem(name):
        return problem
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        return mismatch("dtype, shape and data_offsets", show(entry), ANEW)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str):
        return mismatch("a dtype such as 'BF16'", show(dtype), ANEW)
    if not isinstance(shape, list) or not is_shape(shape):
        return mismatch(f"a shape of at most {MAX_DIMS} sizes", show(shape), ANEW)
    if not isinstance(offsets, list) or len(offsets) != 2 or not is_shape(offsets):
        return mismatch("begin and end as data_offsets", show(offsets), ANEW)
    needed, held = math.prod(shape) * DTYPE_BYTES.get(dtype, 0), offsets[1] - offsets[0]
    if dtype in DTYPE_BYTES and needed != held:
        return mismatch(f"{show(needed)} bytes for {dtype} {show(shape)}", f"{held} between data_offsets {show(offsets)}", ANEW)
    return None


def _span_problems(where: str, spans: Iterable[tuple[int, int, str]], data_bytes: int) -> list[str]:
    """Tell where sorted spans (begin, end, name) fail to cover `data_bytes` exactly."""
    problems: list[str] = []
    covered = 0
    last: str | None = None
    for begin, end, name in spans:
        if begin != covered and len(problems) < MAX_PROBLEMS:
            after = "" if last is None else f", where tensor {show(last)} ends"
            found = f"byte {begin}: {'overlapping offsets' if begin < covered else 'a hole'}"
            problem = mismatch(f"it to begin at byte {covered} of the data{after}", found, ANEW)
            problems.append(f"{where}: tensor {show(name)}: {problem}")
        if end >= covered:
            covered, last = end, name
    if not problems and covered != data_bytes:
        how = "cut off" if covered > data_bytes else "the rest belongs to no tensor"
        problems.append(f"{where}: {mismatch(f'{covered} bytes of data, as in the header', f'{data_bytes}: {how}', ANEW)}")
    return problems
