"""A file of torch.save tells where its tensors lie, without torch, without reading data, and without running anything.

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
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from pcb_ray.errors import RequestError
from pcb_ray.files.foreign import ANEW, MAX_PROBLEMS, mismatch, open_regular, os_problem, show
from pcb_ray.files.safetensors import (
    AS_SAFETENSORS,
    DTYPE_BYTES,
    OF_TORCH,
    File,
    FileContents,
    Tensor,
    dtype_problems,
    foreign_format,
    is_shape,
    name_problem,
)

_MAX_PICKLE_BYTES = 2_000_000  # 13,000 tensors take that; a hostile one takes 100 times as much memory.
_MAX_DIRECTORY_BYTES = 16_000_000  # A record takes about 120.
_BLOCK_BYTES = 1 << 16  # A file that is read by ranges is read in blocks of this size.
_KEPT_BLOCKS = 64

_STORAGES = {
    f"torch {kind}Storage": dtype
    for kind, dtype in {
        "Double": "F64", "Float": "F32", "Half": "F16", "BFloat16": "BF16", "Long": "I64", "Int": "I32", "Short": "I16",
        "Char": "I8", "Byte": "U8", "Bool": "BOOL", "ComplexFloat": "C64", "ComplexDouble": "C128",
    }.items()
} | {"torch.storage UntypedStorage": "U8"}  # fmt: skip
_DTYPES = {f"torch {name}": dtype for name, dtype in OF_TORCH.items()}
_ORDERED_DICT = "collections OrderedDict"
_PARAMETER = "torch._utils _rebuild_parameter"
_TENSOR = "torch._utils _rebuild_tensor_v2"
_TENSOR_OF_DTYPE = "torch._utils _rebuild_tensor_v3"
_OPCODES = (
    "PROTO FRAME STOP MARK BINPUT LONG_BINPUT MEMOIZE BINGET LONG_BINGET NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 "
    "LONG1 BINFLOAT BINUNICODE SHORT_BINUNICODE EMPTY_TUPLE TUPLE1 TUPLE2 TUPLE3 TUPLE EMPTY_LIST APPEND APPENDS "
    "EMPTY_DICT GLOBAL STACK_GLOBAL BINPERSID REDUCE"  # _Unpickler adds those that it redefines.
)
_NAMES = {*_STORAGES, *_DTYPES, _ORDERED_DICT, _PARAMETER, _TENSOR, _TENSOR_OF_DTYPE}


class _Storage(NamedTuple):
    dtype: str
    key: str
    numel: int


class _View(NamedTuple):
    """A tensor is pickled as a storage, with offset, shape and stride in elements of `dtype`."""

    storage: _Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    flags: Any  # They are set if the values are not what the bytes say: a lazy negation or conjugation.


class _Name(NamedTuple):
    """The structure refers to a class or function: it stays a name, and called, it describes what torch would make."""

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
    """This is the unpickler written in Python, whose opcodes are in a table; the one in C believes the sizes in a pickle."""

    stack: list[Any]  # This and the next are the base class's, and missing in its stubs.
    pop_mark: Callable[[], list[Any]]
    dispatch: ClassVar[dict[int, Callable[[Any], None]]]

    def __init__(self, where: str, pickled: bytes) -> None:
        super().__init__(io.BytesIO(pickled))
        self.where = where
        self.storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str) -> _Name:
        if f"{module} {name}" not in _NAMES:
            found = f"{show(f'{module}.{name}')}, which is never run"
            raise RequestError(f"{self.where}: {mismatch('plain tensors', found, f'{AS_SAFETENSORS}, if you trust it')}")
        return _Name(f"{module} {name}")

    def persistent_load(self, pid: Any) -> _Storage:
        tag, kind, key, _location, numel = pid
        if tag != "storage" or not isinstance(kind, _Name) or not isinstance(key, str) or not is_shape([numel]):
            raise ValueError("not a storage")
        storage = _Storage(_STORAGES[kind.name], key, numel)
        if self.storages.setdefault(key, storage) != storage:
            raise RequestError(f"{self.where}: storage {show(key)}: {mismatch('one description', 'two', ANEW)}")
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
            if not isinstance(key, str):  # It is not hashed either: for nested tuples that may take for ever, or crash.
                raise RequestError(f"{self.where}: {mismatch('texts as names of tensors', _kind(key), 'save tensors by name')}")
            if key in table:
                raise RequestError(f"{self.where}: {mismatch(f'one {show(key)}', 'several', ANEW)}")
            table[key] = value

    def load_build(self) -> None:
        """Drop the attributes of an OrderedDict, `_metadata`, which hold no tensor."""
        self.stack.pop()
        if not isinstance(self.stack[-1], dict):
            raise ValueError("attributes of something else than a dict")

    dispatch = {code[0]: pickle._Unpickler.dispatch[code[0]] for code in (getattr(pickle, name) for name in _OPCODES.split())} | {
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
        pickle.BUILD[0]: load_build,
    }


class _BoundedFile(io.FileIO):
    """A file as `zipfile` may have it, which would believe whatever size a damaged directory announces."""

    def read(self, size: int | None = -1, /) -> bytes:
        return super().read(_bounded(size, os.fstat(self.fileno()).st_size - self.tell())) or b""


class _RangedFile(io.RawIOBase):
    """The same for a file elsewhere, which is read in blocks: neighbours come at once, and a few are kept."""

    def __init__(self, size: int, read_range: Callable[[int, int], bytes]) -> None:
        self._size, self._read_range = size, read_range
        self._at = 0
        self._blocks: OrderedDict[int, bytes] = OrderedDict()

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        if at < 0:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        self._at = at
        return at

    def read(self, size: int | None = -1, /) -> bytes:
        start = self._at
        self._at = stop = start + _bounded(size, self._size - start)
        wanted = range(start // _BLOCK_BYTES, -(-stop // _BLOCK_BYTES)) if start < stop else range(0)
        if missing := [number for number in wanted if number not in self._blocks]:
            first, last = missing[0], missing[-1]
            fetched = self._read_range(first * _BLOCK_BYTES, min((last + 1) * _BLOCK_BYTES, self._size))
            for number in range(first, last + 1):
                self._blocks[number] = fetched[(number - first) * _BLOCK_BYTES :][:_BLOCK_BYTES]
        joined = b"".join(self._blocks[number] for number in wanted)
        while len(self._blocks) > _KEPT_BLOCKS:
            self._blocks.popitem(last=False)
        return joined[start - wanted.start * _BLOCK_BYTES :][: stop - start]


def _bounded(size: int | None, left: int) -> int:
    """Tell how many bytes to read where `size` are asked for (None or negative: all) and so many are left."""
    count = max(left, 0) if size is None or size < 0 else min(size, max(left, 0))
    if count > _MAX_DIRECTORY_BYTES:
        raise zipfile.BadZipFile(f"a directory of {count} bytes")
    return count


def read_torch_file(path: Path) -> FileContents:
    """Read a file of torch.save, from its zip directory and its pickled structure. Raises RequestError."""
    try:
        with open_regular(path) as opened:
            head, size = opened.read(64), os.fstat(opened.fileno()).st_size
        _check_head(str(path), head)
        with _BoundedFile(path) as file:
            return _parse(str(path), size, file, exact=True)
    except OSError as error:
        raise RequestError(os_problem(path, error)) from None


def parse_torch_file(where: str, size: int, read_range: Callable[[int, int], bytes], *, exact: bool) -> FileContents:
    """Do as `read_torch_file`, for a file of `size` bytes elsewhere, of which `read_range` gives bytes start to stop.

    Where exactly the data of a record begin is written nowhere but just before them. If that need not be `exact`, only a few blocks
    are read, at the end and where the structure lies, and a tensor's `start` is the least that it can be; else one for each tensor.
    """
    _check_head(where, read_range(0, min(size, _BLOCK_BYTES))[:64])
    return _parse(where, size, _RangedFile(size, read_range), exact=exact)


def _check_head(where: str, head: bytes) -> None:
    if not head.startswith(b"PK\x03\x04"):
        other = ("a safetensors file", "name it .safetensors") if head[8:9] == b"{" else foreign_format(head)
        raise RequestError(f"{where}: {mismatch('a file of torch.save', *(other or ('something else', ANEW)))}")


def _parse(where: str, size: int, file: io.RawIOBase, *, exact: bool) -> FileContents:
    try:
        with zipfile.ZipFile(file) as archive:
            pickled, records = _read_archive(where, size, archive, file if exact else None)
    except RequestError:
        raise
    except Exception as error:  # zipfile does not document what it raises on a damaged archive; nothing else is done here.
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # That is a seek to where a damaged directory leads.
            raise
        raise RequestError(f"{where}: {mismatch('a sound zip archive', f'a damaged one ({_brief(error)})', ANEW)}") from None
    try:
        value = _Unpickler(where, pickled).load()
    except RequestError:
        raise
    except Exception as error:  # What pickle raises on a damaged structure is any exception, its documentation says.
        found = f"a structure that is damaged, or of more ({_brief(error)})"
        raise RequestError(f"{where}: {mismatch('plain tensors', found, f'{ANEW}, or if you trust it {AS_SAFETENSORS}')}") from None
    tensors, aliases = _locate(where, value, records)
    return FileContents(File(where, size, hashlib.sha256(pickled).hexdigest()), tensors, aliases)


def _read_archive(
    where: str, size: int, archive: zipfile.ZipFile, file: io.RawIOBase | None
) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """Return the pickled structure, and by storage key where a record's bytes begin and how many they are.

    Without `file`, a record begins where it may at the least.
    """
    infos = archive.infolist()
    roots = [info.filename[: -len("data.pkl")] for info in infos if re.fullmatch(r"[^/]+/data\.pkl", info.filename)]
    if len(roots) != 1 or len({info.filename for info in infos}) < len(infos):
        raise RequestError(f"{where}: {mismatch('a file of torch.save, with one data.pkl', 'another zip archive', ANEW)}")
    small = {f"{roots[0]}data.pkl", f"{roots[0]}byteorder"}
    records: dict[str, tuple[int, int]] = {}
    for info in infos:
        name, length = show(info.filename), info.file_size
        if info.compress_type != zipfile.ZIP_STORED:
            raise RequestError(f"{where}: {mismatch('records that can be read in place', f'{name} compressed', AS_SAFETENSORS)}")
        if info.filename in small and length > _MAX_PICKLE_BYTES:
            found = f"{length} bytes"
            raise RequestError(f"{where}: {name}: {mismatch(f'at most {_MAX_PICKLE_BYTES} bytes', found, AS_SAFETENSORS)}")
        start = info.header_offset + 30 + len(info.filename)
        if file is not None:
            file.seek(info.header_offset)
            local = file.read(30) or b""  # Only this header tells where the data begin: torch pads it to align them.
            if local[:4] != b"PK\x03\x04":
                raise RequestError(f"{where}: {name}: {mismatch(f'the record at byte {info.header_offset}', 'none', ANEW)}")
            start = info.header_offset + 30 + sum(struct.unpack("<HH", local[26:]))
        if info.flag_bits & 1 or info.compress_size != length or start + length > size:
            wanted = f"bytes {start} to {start + length} as they are"
            raise RequestError(f"{where}: {name}: {mismatch(wanted, f'a file of {size} bytes, or others', ANEW)}")
        if info.filename.startswith(f"{roots[0]}data/"):
            records[info.filename.removeprefix(f"{roots[0]}data/")] = (start, length)
    if f"{roots[0]}byteorder" in archive.namelist() and archive.read(f"{roots[0]}byteorder") != b"little":
        fix = f"{AS_SAFETENSORS} on a little-endian machine"
        raise RequestError(f"{where}: {mismatch('little-endian data', 'another byte order', fix)}")
    return archive.read(f"{roots[0]}data.pkl"), records


def _locate(where: str, value: Any, records: dict[str, tuple[int, int]]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of an unpickled state dict, by place, and the aliases among them."""
    if isinstance(value, dict) and isinstance(value.get("state_dict"), dict):
        value = value["state_dict"]  # a training's record is beside it
    elif isinstance(value, dict) and len(value) == 1:
        key, inner = next(iter(value.items()))
        value = inner if key in ("model", "module") and isinstance(inner, dict) else value
    if not isinstance(value, dict):
        raise RequestError(f"{where}: {mismatch('tensors by name, a state dict', _kind(value), AS_SAFETENSORS)}")
    problems: list[str] = []
    refused: dict[str, str] = {}
    first_at: dict[tuple[int, str, tuple[int, ...]], str] = {}
    tensors: list[Tensor] = []
    aliases: dict[str, str] = {}
    for name, view in value.items():
        if len(problems) >= MAX_PROBLEMS:
            break
        if not isinstance(view, _View):
            problems.append(f"{where}: {show(name)}: {mismatch('a tensor', _kind(view), 'save the state dict without it')}")
        elif view.dtype not in DTYPE_BYTES:
            refused[name] = view.dtype
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
        return mismatch("plain data", f"them with {show(view.flags)}", "load it once with torch and save tensor.resolve_neg()")
    expected = 1
    for length, stride in zip(reversed(view.shape), reversed(view.stride), strict=True):
        if length > 1 and stride != expected and 0 not in view.shape:
            found = f"them not contiguous (shape {show(view.shape)}, stride {show(view.stride)})"
            return mismatch("contiguous data", found, "load it once with torch and save tensor.contiguous()")
        expected *= length
    if view.storage.key not in records:
        return mismatch(f"storage {show(view.storage.key)} in the file", "none", ANEW)
    end = (view.offset + math.prod(view.shape)) * DTYPE_BYTES[view.dtype]
    promised, held = view.storage.numel * DTYPE_BYTES[view.storage.dtype], records[view.storage.key][1]
    if not end <= promised <= held:
        found = f"{held} in the file, of the {promised} that its storage should have"
        return mismatch(f"its data up to byte {show(end)}", found, ANEW)
    return None


def _kind(value: Any) -> str:
    if isinstance(value, _Name):
        return f"the name {show(value.name)}"
    return "a tensor" if isinstance(value, _View) else f"a value of type {type(value).__name__.lstrip('_')}"


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {show(str(error))}"
