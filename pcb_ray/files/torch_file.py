"""A file of torch.save: where its tensors lie, without torch, without reading data, and without running anything.

The pickled structure goes through Python's own unpickler, with torch's few names leading to descriptions, every other
name refused, and no opcodes but those of plain data. torch.load(weights_only=True) is not enough for a file from
anywhere: in torch 2.13, 300 kB crash the process (a dict key of 300,000 nested tuples), 450 bytes keep it busy for ever
(a key of tuples that share tuples) and 32 bytes take 4 GB (a bytearray). It also lacks pickle protocols 4 and 5, and
takes seconds to import.
"""

from __future__ import annotations

import errno
import hashlib
import io
import math
import os
import pickle
import re
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from pcb_ray.errors import RequestError
from pcb_ray.files.safetensors import (
    ANEW,
    AS_SAFETENSORS,
    DTYPE_BYTES,
    MAX_JSON_BYTES,
    MAX_PROBLEMS,
    File,
    Tensor,
    Weights,
    dtype_problems,
    foreign_format,
    is_shape,
    name_problem,
    open_regular,
    os_problem,
    show,
)

_MAX_PICKLE_BYTES = 2_000_000  # 150 bytes a tensor: 13,000 of them in one file; a hostile one takes 100 times as much memory

_STORAGES = {
    f"torch {kind}Storage": dtype
    for kind, dtype in {
        "Double": "F64", "Float": "F32", "Half": "F16", "BFloat16": "BF16", "Long": "I64", "Int": "I32", "Short": "I16",
        "Char": "I8", "Byte": "U8", "Bool": "BOOL", "ComplexFloat": "C64", "ComplexDouble": "C128",
    }.items()
} | {"torch.storage UntypedStorage": "U8"}  # fmt: skip
_DTYPES = {
    f"torch {name}": dtype
    for name, dtype in {
        "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32",
        "int16": "I16", "int8": "I8", "uint64": "U64", "uint32": "U32", "uint16": "U16", "uint8": "U8", "bool": "BOOL",
        "float8_e4m3fn": "F8_E4M3", "float8_e4m3fnuz": "F8_E4M3FNUZ", "float8_e5m2": "F8_E5M2",
        "float8_e5m2fnuz": "F8_E5M2FNUZ", "float8_e8m0fnu": "F8_E8M0", "float4_e2m1fn_x2": "F4", "complex32": "C32",
    }.items()
}  # fmt: skip
_ORDERED_DICT = "collections OrderedDict"
_PARAMETER = "torch._utils _rebuild_parameter"
_TENSOR = "torch._utils _rebuild_tensor_v2"
_TENSOR_OF_DTYPE = "torch._utils _rebuild_tensor_v3"
_OPCODES = (
    "PROTO FRAME STOP MARK BINPUT LONG_BINPUT MEMOIZE BINGET LONG_BINGET NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 "
    "LONG1 BINFLOAT BINUNICODE SHORT_BINUNICODE EMPTY_TUPLE TUPLE1 TUPLE2 TUPLE3 TUPLE EMPTY_LIST APPEND APPENDS "
    "EMPTY_DICT GLOBAL STACK_GLOBAL BINPERSID REDUCE"  # and those that _Unpickler redefines
)
_NAMES = {*_STORAGES, *_DTYPES, _ORDERED_DICT, _PARAMETER, _TENSOR, _TENSOR_OF_DTYPE}


class _Storage(NamedTuple):
    dtype: str
    key: str
    numel: int


class _View(NamedTuple):
    """A tensor as pickled: a storage, and offset, shape and stride in elements of `dtype`."""

    storage: _Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    flags: Any  # of values that are not what the bytes say: a lazy negation or conjugation


class _Name(NamedTuple):
    """A class or function that the structure refers to. It stays a name; called, it describes what torch would make."""

    name: str

    def __call__(self, *args: Any) -> Any:
        if self.name == _ORDERED_DICT and not args:
            return {}
        if self.name == _PARAMETER and len(args) == 3 and isinstance(args[0], _View):
            return args[0]
        storage, offset, shape, stride, _requires_grad, _hooks, *rest = args
        if self.name == _TENSOR:
            dtype = storage.dtype
        elif self.name == _TENSOR_OF_DTYPE and storage.dtype == "U8":
            dtype = _DTYPES[rest.pop(0).name]
        else:
            raise ValueError(self.name)
        tuples = isinstance(shape, tuple) and isinstance(stride, tuple) and len(shape) == len(stride)
        if not (isinstance(storage, _Storage) and tuples and is_shape([offset]) and is_shape(shape) and is_shape(stride)):
            raise ValueError(f"{self.name} of something else")
        return _View(storage, dtype, offset, shape, stride, *rest or [None])


class _Unpickler(pickle._Unpickler):
    """The unpickler written in Python, whose opcodes are in a table; the one in C believes sizes that a pickle announces."""

    stack: list[Any]  # this and the next are the base class's, and missing in its stubs
    pop_mark: Callable[[], list[Any]]
    dispatch: ClassVar[dict[int, Callable[[Any], None]]]

    def __init__(self, where: str, pickled: bytes) -> None:
        super().__init__(io.BytesIO(pickled))
        self.where = where
        self.storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str) -> _Name:
        if f"{module} {name}" not in _NAMES:
            raise RequestError(
                f"{self.where}: refers to {show(f'{module}.{name}')}, which is not part of a plain tensor and is never run; "
                f"{AS_SAFETENSORS}, if you trust it"
            )
        return _Name(f"{module} {name}")

    def persistent_load(self, pid: Any) -> _Storage:
        tag, kind, key, _location, numel = pid
        if tag != "storage" or not isinstance(kind, _Name) or not isinstance(key, str) or not is_shape([numel]):
            raise ValueError("not a storage")
        storage = _Storage(_STORAGES[kind.name], key, numel)
        if self.storages.setdefault(key, storage) != storage:
            raise RequestError(f"{self.where}: storage {show(key)} is described in two ways; {ANEW}")
        return storage

    def load_setitem(self) -> None:
        self._set_items([self.stack.pop(-2), self.stack.pop()])

    def load_setitems(self) -> None:
        self._set_items(self.pop_mark())

    def _set_items(self, items: list[Any]) -> None:
        table = self.stack[-1]
        if not isinstance(table, dict):
            raise ValueError("not a dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, str):  # nor is it hashed, which for nested tuples may take for ever or crash
                raise RequestError(f"{self.where}: {_kind(key)} as a tensor's name; save tensors by name (texts)")
            if key in table:
                raise RequestError(f"{self.where}: {show(key)} occurs twice; {ANEW}")
            table[key] = value

    def load_build(self) -> None:
        """The attributes of an OrderedDict: `_metadata`, which holds no tensor."""
        self.stack.pop()
        if not isinstance(self.stack[-1], dict):
            raise ValueError("attributes of something else than a dict")

    dispatch = {code[0]: pickle._Unpickler.dispatch[code[0]] for code in (getattr(pickle, name) for name in _OPCODES.split())} | {
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
        pickle.BUILD[0]: load_build,
    }


class _BoundedFile(io.FileIO):
    """A file for `zipfile`, which would believe whatever size a damaged directory announces."""

    def read(self, size: int | None = -1, /) -> bytes:
        left = max(os.fstat(self.fileno()).st_size - self.tell(), 0)
        count = left if size is None or size < 0 else min(size, left)
        if count > MAX_JSON_BYTES:
            raise zipfile.BadZipFile(f"a directory of {count} bytes")
        return super().read(count) or b""


def read_torch_file(path: Path) -> Weights:
    """A file of torch.save, from its zip directory and its pickled structure. Raises RequestError."""
    try:
        with open_regular(path) as opened:
            head, size = opened.read(64), os.fstat(opened.fileno()).st_size
        if not head.startswith(b"PK\x03\x04"):
            why = "a safetensors file; name it .safetensors" if head[8:9] == b"{" else foreign_format(head)
            raise RequestError(f"{path}: {why or f'not a file of torch.save; {ANEW}'}")
        with _BoundedFile(path) as file, zipfile.ZipFile(file) as archive:
            pickled, records = _read_archive(path, size, archive, file)
    except RequestError:
        raise
    except Exception as error:  # zipfile does not document what it raises on a damaged archive; nothing else is done here
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # that is a seek to where a damaged directory leads
            raise RequestError(os_problem(path, error)) from None
        raise RequestError(f"{path}: a damaged zip archive ({_brief(error)}); {ANEW}") from None
    try:
        value = _Unpickler(str(path), pickled).load()
    except RequestError:
        raise
    except Exception as error:  # what pickle raises on a damaged structure is any exception, its documentation says
        raise RequestError(
            f"{path}: its structure is damaged, or of more than plain tensors ({_brief(error)}); {ANEW}, or if you trust it "
            f"{AS_SAFETENSORS}"
        ) from None
    tensors, aliases = _locate(str(path), value, records)
    return Weights(File(str(path), size, hashlib.sha256(pickled).hexdigest()), tensors, aliases)


def _read_archive(path: Path, size: int, archive: zipfile.ZipFile, file: io.FileIO) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """The pickled structure, and by storage key where a record's bytes begin and how many they are."""
    infos = archive.infolist()
    roots = [info.filename[: -len("data.pkl")] for info in infos if re.fullmatch(r"[^/]+/data\.pkl", info.filename)]
    if len(roots) != 1 or len({info.filename for info in infos}) < len(infos):
        raise RequestError(f"{path}: a zip archive that is not a file of torch.save (no single data.pkl); {ANEW}")
    small = {f"{roots[0]}data.pkl", f"{roots[0]}byteorder"}
    records: dict[str, tuple[int, int]] = {}
    for info in infos:
        name, length = show(info.filename), info.file_size
        if info.compress_type != zipfile.ZIP_STORED:
            raise RequestError(f"{path}: {name} is compressed, so its bytes can't be read in place; {AS_SAFETENSORS}")
        if info.filename in small and length > _MAX_PICKLE_BYTES:
            raise RequestError(f"{path}: {name} has {length} bytes, the limit is {_MAX_PICKLE_BYTES}; {AS_SAFETENSORS}")
        file.seek(info.header_offset)
        local = file.read(30)  # only this header tells where the data begins: torch pads it to align them
        if local[:4] != b"PK\x03\x04":
            raise RequestError(f"{path}: no record where the directory says {name} lies; {ANEW}")
        start = info.header_offset + 30 + sum(struct.unpack("<HH", local[26:]))
        if info.flag_bits & 1 or info.compress_size != length or start + length > size:
            raise RequestError(
                f"{path}: {name} should take bytes {start} to {start + length} as they are, in a file of {size} bytes; {ANEW}"
            )
        if info.filename.startswith(f"{roots[0]}data/"):
            records[info.filename.removeprefix(f"{roots[0]}data/")] = (start, length)
    if f"{roots[0]}byteorder" in archive.namelist() and archive.read(f"{roots[0]}byteorder") != b"little":
        raise RequestError(f"{path}: not little-endian; {AS_SAFETENSORS} on a little-endian machine")
    return archive.read(f"{roots[0]}data.pkl"), records


def _locate(where: str, value: Any, records: dict[str, tuple[int, int]]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of an unpickled state dict, by place, and the aliases among them."""
    if isinstance(value, dict) and len(value) == 1:
        key, inner = next(iter(value.items()))
        value = inner if key in ("state_dict", "model", "module") and isinstance(inner, dict) else value
    if not isinstance(value, dict):
        raise RequestError(f"{where}: holds {_kind(value)}; expected tensors by name (a state dict); {AS_SAFETENSORS}")
    problems: list[str] = []
    refused: dict[str, list[str]] = {}
    first_at: dict[tuple[int, str, tuple[int, ...]], str] = {}
    tensors: list[Tensor] = []
    aliases: dict[str, str] = {}
    for name, view in value.items():
        if len(problems) >= MAX_PROBLEMS:
            break
        if not isinstance(view, _View):
            problems.append(f"{where}: entry {show(name)} is {_kind(view)}, not a tensor; save the state dict without it")
        elif view.dtype not in DTYPE_BYTES:
            refused.setdefault(view.dtype, []).append(name)
        elif problem := name_problem(name) or _view_problem(view, records):
            problems.append(f"{where}: tensor {show(name)}: {problem}")
        else:
            start = records[view.storage.key][0] + view.offset * DTYPE_BYTES[view.dtype]
            tensor = Tensor(name, view.dtype, view.shape, where, start)
            first = first_at.setdefault((start, view.dtype, view.shape), name)
            if first != name and tensor.nbytes:
                aliases[name] = first
            else:
                tensors.append(tensor)
    problems += dtype_problems(where, refused)
    if problems:
        raise RequestError(problems)
    tensors.sort(key=lambda tensor: (tensor.start, tensor.stop, tensor.name))
    return {tensor.name: tensor for tensor in tensors}, aliases


def _view_problem(view: _View, records: dict[str, tuple[int, int]]) -> str | None:
    if view.flags:
        return f"stored with {show(view.flags)}; load it once with torch and save tensor.resolve_neg()"
    expected = 1
    for length, stride in zip(reversed(view.shape), reversed(view.stride), strict=True):
        if length > 1 and stride != expected and 0 not in view.shape:
            return (
                f"not contiguous (shape {show(view.shape)}, stride {show(view.stride)}); load it once with torch and save "
                "tensor.contiguous()"
            )
        expected *= length
    if view.storage.key not in records:
        return f"its storage {show(view.storage.key)} is not in the file; {ANEW}"
    end = (view.offset + math.prod(view.shape)) * DTYPE_BYTES[view.dtype]
    promised, held = view.storage.numel * DTYPE_BYTES[view.storage.dtype], records[view.storage.key][1]
    if not end <= promised <= held:
        return f"ends at byte {show(end)} of a storage of {promised} bytes, of which the file holds {held}; {ANEW}"
    return None


def _kind(value: Any) -> str:
    if isinstance(value, _Name):
        return f"the name {show(value.name)}"
    return "a tensor" if isinstance(value, _View) else f"a {type(value).__name__.lstrip('_')}"


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {show(str(error))}"
