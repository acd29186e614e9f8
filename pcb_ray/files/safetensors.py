"""One weight file: where each tensor's bytes lie, and the header that says so in a `.safetensors` file.

Also what every reader of foreign files needs: strict JSON, text that is safe in a message, regular files only.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import reprlib
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from pcb_ray.errors import RequestError

# The names that safetensors gives to dtypes, with the bytes of one element.
DTYPE_BYTES: dict[str, int] = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip
FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")
_QUANTISED_DTYPES = ("F4", "F6_E2M3", "F6_E3M2", "F8_E4M3", "F8_E4M3FNUZ", "F8_E5M2", "F8_E5M2FNUZ", "F8_E8M0")

MAX_JSON_BYTES = 100_000_000  # the limit of the safetensors library, for a header; an index has the same
MAX_PROBLEMS = 100  # of one file: a wrecked header would otherwise have one per tensor
MAX_DIMS = 64  # numpy's limit

ANEW = "copy or download it again"
AS_SAFETENSORS = "load it once with torch and save it as safetensors"


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


class Weights(NamedTuple):
    """What a file holds; an alias leads from a name to the tensor with the same bytes."""

    file: File
    tensors: dict[str, Tensor]
    aliases: dict[str, str]


# ---------------------------------------------------------------------------------------------------- safetensors


def read_header(path: Path) -> tuple[dict[str, Tensor], dict[str, str], bytes]:
    """One `.safetensors` file's tensors in the order of their data, its metadata, and the bytes before the data.

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
    assert len(text) <= MAX_JSON_BYTES, "a header that readers refuse"
    return len(text).to_bytes(8, "little") + text


def parse_header(where: str, size: int, read_first: Callable[[int], bytes]) -> tuple[dict[str, Tensor], dict[str, str], bytes]:
    """`read_header` of a file of `size` bytes, of which `read_first(n)` gives the first n, or all if they are fewer."""
    head = read_first(64)
    if size < 8:
        raise RequestError(f"{where}: {size} bytes, too short for a safetensors file (at least 10); {ANEW}")
    length = int.from_bytes(head[:8], "little")
    if length > min(size - 8, MAX_JSON_BYTES) or head[8:9] != b"{":
        raise RequestError(f"{where}: {_why_not_safetensors(head, length, size)}")
    raw = read_first(8 + length)
    if len(raw) < 8 + length:
        raise RequestError(f"{where}: a header of {length} bytes, but only {len(raw) - 8} could be read; {ANEW}")
    table = strict_json(where, raw[8:])
    assert isinstance(table, dict), "it starts with {"
    metadata = table.pop("__metadata__", {})
    problems: list[str] = []
    if not isinstance(metadata, dict) or not all(_is_unicode(text) for pair in metadata.items() for text in pair):
        problems.append(f"{where}: __metadata__ is {show(metadata)}; expected texts by name; save the file again")
    spans: list[tuple[int, int, str]] = []
    refused: dict[str, list[str]] = {}
    for name, entry in table.items():
        if len(problems) >= MAX_PROBLEMS:
            break
        if problem := _entry_problem(name, entry):
            problems.append(f"{where}: tensor {show(name)}: {problem}")
        elif entry["dtype"] not in DTYPE_BYTES:
            refused.setdefault(entry["dtype"], []).append(name)
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


def safetensors_weights(where: str, tensors: dict[str, Tensor], raw: bytes) -> Weights:
    """A file by its parsed header, which is known to account for every byte of it."""
    size = len(raw) + sum(tensor.nbytes for tensor in tensors.values())
    return Weights(File(where, size, hashlib.sha256(raw).hexdigest()), tensors, {})


def _why_not_safetensors(head: bytes, length: int, size: int) -> str:
    if foreign := foreign_format(head):
        return foreign
    if length > size - 8:
        return f"announces a header of {length} bytes, but {size - 8} bytes follow: cut off or not safetensors; {ANEW}"
    if length > MAX_JSON_BYTES:
        return f"announces a header of {length} bytes; the format allows {MAX_JSON_BYTES}; {ANEW}"
    return f"the header starts with {head[8:9]!r}, expected b'{{': not a safetensors file; {ANEW}"


def foreign_format(head: bytes) -> str | None:
    """What other kind of file starts with these bytes, and what to do about it."""
    for magic, what, fix in (
        (b"PK\x03\x04", "a zip archive, as torch.save writes", "name it .bin"),
        (b"\x80\x02", "a pickle, as torch.save wrote before torch 1.6", AS_SAFETENSORS),
        (b"GGUF", "GGUF, which is not supported", "give the model it was made from, in safetensors"),
        (b"version https://git-lfs", "a git-lfs pointer, not the file itself", "run `git lfs pull` in its folder"),
        (b"<", "a web page or XML, not weights", ANEW),
    ):
        if head.startswith(magic):
            return f"{what}; {fix}"
    return None


def _entry_problem(name: str, entry: Any) -> str | None:
    """What is wrong with one tensor's entry in a header, looked at alone."""
    if problem := name_problem(name):
        return problem
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        return f"the entry is {show(entry)}; expected dtype, shape and data_offsets; {ANEW}"
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str):
        return f"the dtype is {show(dtype)}; expected a name such as 'BF16'; {ANEW}"
    if not isinstance(shape, list) or not is_shape(shape):
        return f"the shape is {show(shape)}; expected at most {MAX_DIMS} sizes; {ANEW}"
    if not isinstance(offsets, list) or len(offsets) != 2 or not is_shape(offsets):
        return f"data_offsets are {show(offsets)}; expected begin and end; {ANEW}"
    needed, held = math.prod(shape) * DTYPE_BYTES.get(dtype, 0), offsets[1] - offsets[0]
    if dtype in DTYPE_BYTES and needed != held:
        return f"{dtype} {show(shape)} takes {show(needed)} bytes, data_offsets {show(offsets)} hold {held}; {ANEW}"
    return None


def dtype_problems(where: str, refused: Mapping[str, list[str]]) -> list[str]:
    """One line for each dtype that can't be merged, with the names of the tensors that have it."""
    problems = []
    for dtype, names in refused.items():
        if dtype in _QUANTISED_DTYPES:
            why = "quantised, which is not supported; give the model in bfloat16, float16 or float32"
        elif dtype in ("C32", "C64", "C128"):
            why = "complex, which is not supported; split it into real tensors"
        else:
            why = f"not a known dtype ({', '.join(DTYPE_BYTES)}); convert it to one of them"
        problems.append(f"{where}: {len(names)} tensors ({some(names)}) are {show(dtype)}: {why}")
    return problems


def _span_problems(where: str, spans: Iterable[tuple[int, int, str]], data_bytes: int) -> list[str]:
    """Where sorted spans (begin, end, name) fail to cover `data_bytes` exactly."""
    problems: list[str] = []
    covered, last = 0, ""
    for begin, end, name in spans:
        if begin != covered and len(problems) < MAX_PROBLEMS:
            found = f"{where}: tensor {show(name)} begins at byte {begin} of the data"
            if begin < covered:
                problems.append(f"{found}, before tensor {show(last)} ends at {covered}: overlapping offsets; {ANEW}")
            else:
                problems.append(f"{found}, but what precedes it ends at {covered}: a hole; {ANEW}")
        if end >= covered:
            covered, last = end, name
    if not problems and covered != data_bytes:
        how = "cut off" if covered > data_bytes else "has bytes that belong to no tensor"
        problems.append(f"{where}: the header describes {covered} bytes of data, the file has {data_bytes}: {how}; {ANEW}")
    return problems


# ---------------------------------------------------------------------------------------------------- files and text


def open_regular(path: Path) -> BinaryIO:
    """Open a file to read it; a pipe or a device would block or never end."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise RequestError(f"{path}: not a regular file; give the weights as a file")
        return open(path, "rb")
    except OSError as error:
        raise RequestError(os_problem(path, error)) from None


def os_problem(path: Path, error: OSError) -> str:
    if isinstance(error, FileNotFoundError):
        return f"{path}: no such file; {ANEW}, or mend the index that names it"
    return f"{path}: cannot be read ({error.strerror}); check the file and its permissions"


def strict_json(where: str, raw: bytes, *, constants: bool = False) -> Any:
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
        raise RequestError(f"{where}: not UTF-8 at byte {error.start} of the header or file; {ANEW}") from None
    except RecursionError:
        raise RequestError(f"{where}: JSON nested too deeply; {ANEW}") from None
    except ValueError as error:
        raise RequestError(f"{where}: not JSON ({clip(str(error))}); {ANEW}") from None
    if repeated:
        raise RequestError([f"{where}: {show(key)} occurs twice; {ANEW}" for key in repeated[:MAX_PROBLEMS]])
    return value


def is_shape(sizes: Sequence[Any]) -> bool:
    return len(sizes) <= MAX_DIMS and all(type(size) is int and 0 <= size < 2**63 for size in sizes)


def _is_unicode(value: Any) -> bool:
    return isinstance(value, str) and not re.search(r"[\ud800-\udfff]", value)


def is_plain_text(text: str) -> bool:
    """Whether a name can be written to a file, a terminal or a header: UTF-8, no control characters."""
    return not re.search(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]", text)


def name_problem(name: str) -> str | None:
    return None if is_plain_text(name) else "a name with control characters, or that is not Unicode; rename it"


_BRIEF = reprlib.Repr()
_BRIEF.maxstring = _BRIEF.maxother = 100
_BRIEF.maxlist = _BRIEF.maxtuple = 8


def show(value: Any) -> str:
    """A value in a message: one line, short and printable whatever it is, nested a thousand deep or of a megabyte."""
    return clip(_BRIEF.repr(value))


def clip(text: str) -> str:
    return text if len(text) <= 120 else f"{text[:117]}..."


def some(names: Sequence[str]) -> str:
    return ", ".join(show(name) for name in names[:3]) + (", ..." if len(names) > 3 else "")
