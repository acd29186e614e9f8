"""What was done and on what: the receipt of a merge, and what checking an output against it found.

A receipt is made to be published with the model. It names inputs and their files by their own names, commits and digests; where
they lay on the machine that merged them is told by pcb_recipe.yaml alone, which `verify` reads.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from pcb_ray.checks import shown, wrong
from pcb_ray.errors import RequestError
from pcb_ray.files.foreign import is_inside, strict_json
from pcb_ray.files.hub import hub_id
from pcb_ray.files.objects import unreadable
from pcb_ray.files.safetensors import File
from pcb_ray.files.store import Store, is_remote
from pcb_ray.files.stores import open_store, size_of_file
from pcb_ray.planning import Input, Plan
from pcb_ray.relation import Relation
from pcb_ray.tied import Apart

RECEIPT = "pcb_receipt.json"
VERSION = 4
MAX_BYTES = 1 << 26
_FIX = "restore it as pcb-ray merge wrote it, or merge again"


@dataclass(frozen=True)
class MergedFile:
    """A file of an input; `name` is relative to the model."""

    name: str
    size: int
    header_sha256: str
    tag: str = dataclasses.field(default="", compare=False)
    """What its object store called its content (ETag); empty for a file on a disk."""


@dataclass(frozen=True)
class MergedInput:
    """A checkpoint as it was merged. `digest` is that of its merged tensors, as the sweeps read them."""

    name: str
    commit: str | None
    digest: str
    files: tuple[MergedFile, ...]


@dataclass(frozen=True)
class WrittenFile:
    """A file of the output that holds tensors; `bytes` is its size."""

    name: str
    bytes: int
    header_sha256: str


@dataclass(frozen=True)
class Sweep:
    """One pass over the inputs."""

    name: str
    elapsed_s: float
    bytes: int


@dataclass(frozen=True)
class Receipt:
    """The fields are the keys of pcb_receipt.json; their types are its schema."""

    version: int
    versions: Mapping[str, str]
    arithmetic: str
    method: str
    code_sha256: str | None
    N: int
    D: int
    thresholds: Mapping[str, tuple[float, ...]]
    warnings: tuple[str, ...]
    sweeps: tuple[Sweep, ...]
    full_sweeps: int
    kernels: tuple[str, ...]
    bytes_read: int
    bytes_fetched: int
    retries: int
    bytes_written: int
    workers: int
    workers_lost: int
    announced_worker_bytes: int
    peak_worker_bytes: int
    sizes: Mapping[str, int]
    max_shard_bytes: int
    inputs: tuple[MergedInput, ...]
    relation: Relation | None
    apart: tuple[Apart, ...]
    tensors_sha256: str
    outputs: tuple[WrittenFile, ...]
    output_digest: str
    files_sha256: Mapping[str, str]
    resumed: bool
    startup_s: float
    elapsed_s: float

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, raw: bytes, where: str = RECEIPT) -> Self:
        """The receipt that the text holds. Raises RequestError with all that is wrong with it; `where` names it there."""
        content = strict_json(where, raw, constants=True)
        if not isinstance(content, dict):
            raise RequestError(wrong(where, "the receipt of a merge", content, _FIX))
        if content.get("version") != VERSION:
            by = _maker(content)
            raise RequestError(
                wrong(
                    f"{where}: version", str(VERSION), content.get("version"), f"use the pcb_ray that wrote it{by}, or merge again"
                )
            )
        problems: list[str] = []
        receipt: Self = _read(cls, content, where, problems)
        if not problems:
            problems = receipt._inconsistencies(where)
        if problems:
            raise RequestError(problems)
        return receipt

    @classmethod
    def of(cls, out: str | os.PathLike[str], store: Store | None = None) -> Self:
        """The receipt in an output: a folder, or a prefix in a store. Raises RequestError."""
        return cls.from_json(read_small(out, RECEIPT, store or open_store()), f"{os.fspath(out)}/{RECEIPT}")

    def _inconsistencies(self, where: str) -> list[str]:
        problems = [
            wrong(f"{where}: {key}", f"at least {least}", value, _FIX)
            for key, value, least in (
                ("N", self.N, 1),
                ("D", self.D, 1),
                ("max_shard_bytes", self.max_shard_bytes, 1),
            )
            if value < least
        ]
        if len(self.inputs) != self.N + 1:
            problems.append(wrong(f"{where}: inputs", f"the base and {self.N} models", f"{len(self.inputs)} inputs", _FIX))
        names = [*self.files_sha256, *(file.name for file in self.outputs)]
        problems += [wrong(f"{where}: a file", "a name inside the output", name, _FIX) for name in names if not is_inside(name)]
        return problems


def read_small(out: str | os.PathLike[str], name: str, store: Store) -> bytes:
    """A small file of an output. Raises RequestError."""
    file = f"{os.fspath(out)}/{name}"
    try:
        size = size_of_file(store, file)
        if size is None:
            what = "a receipt" if name == RECEIPT else "a file"
            raise RequestError(
                f"{file}: wanted {what}, found no file. Fix: name a directory (or a prefix) that pcb-ray merge wrote."
            )
        if size > MAX_BYTES:
            raise RequestError(f"{file}: wanted at most {MAX_BYTES:,} bytes, found more. Fix: {_FIX}.")
        data = bytearray(size)
        store.read(file, 0, memoryview(data))
    except OSError as error:
        raise RequestError(unreadable(file, error)) from None
    return bytes(data)


@dataclass(frozen=True)
class Verified:
    """What `verify` found wrong with an output; nothing if all is well."""

    problems: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        return not self.problems


def _maker(content: Mapping[str, Any]) -> str:
    versions = content.get("versions")
    version = versions.get("pcb_ray") if isinstance(versions, dict) else None
    return f" ({shown(version)})" if isinstance(version, str) else ""


_CALLED = {int: "a whole number", float: "a number", str: "text", bool: "true or false", tuple: "a list", Mapping: "a table"}


def _read(kind: Any, value: Any, where: str, problems: list[str]) -> Any:
    """A JSON value in the form that the type asks for; None after a complaint in `problems`."""
    if dataclasses.is_dataclass(kind):
        return _read_record(kind, value, where, problems)
    origin, arguments = typing.get_origin(kind) or kind, typing.get_args(kind)
    if origin is types.UnionType:
        (of,) = (one for one in arguments if one is not type(None))
        return None if value is None else _read(of, value, where, problems)
    if origin is tuple and isinstance(value, list):
        return tuple(_read(arguments[0], one, f"{where}[{k}]", problems) for k, one in enumerate(value))
    if origin is Mapping and isinstance(value, dict):
        return {key: _read(arguments[1], one, f"{where}: {shown(key)}", problems) for key, one in value.items()}
    if type(value) is origin:
        return value
    if origin is float and type(value) is int and abs(value) < 2**63:
        return float(value)
    problems.append(wrong(where, _CALLED[origin], value, _FIX))
    return None


def _read_record(kind: Any, value: Any, where: str, problems: list[str]) -> Any:
    if not isinstance(value, dict):
        problems.append(wrong(where, "a table", value, _FIX))
        return None
    types_of = typing.get_type_hints(kind)
    problems += [wrong(where, f"the key {key!r}", None, _FIX) for key in types_of if key not in value]
    problems += [wrong(where, f"only the keys of {kind.__name__}", key, _FIX) for key in value if key not in types_of]
    fields = {key: _read(of, value[key], f"{where}: {key}", problems) for key, of in types_of.items() if key in value}
    return kind(**fields) if len(fields) == len(types_of) else None


# --- inputs by name ---------------------------------------------------------------------------------------------------------------


def inputs_of_receipt(plan: Plan, digests: Sequence[str]) -> tuple[MergedInput, ...]:
    """The inputs of a plan with their digests, and no path of this machine."""
    return tuple(
        MergedInput(name, one.commit, digest, tuple(_merged_file(file, one, plan) for file in one.files))
        for name, one, digest in zip(names_of_inputs(plan), plan.inputs, digests, strict=True)
    )


def _merged_file(file: File, one: Input, plan: Plan) -> MergedFile:
    return MergedFile(_name_within(file.path, one, plan), file.size, file.header_sha256, file.stamp.tag if file.stamp else "")


def names_of_inputs(plan: Plan) -> tuple[str, ...]:
    """What each input may be called in public: its Hub id, or the last part of its path. Several that share that part are numbered:
    more of their paths would tell of this machine, or look like a Hub id."""
    names: dict[str, str] = {}
    for one in plan.inputs:
        place = _place(one, plan)
        if one.commit is not None:
            names.setdefault(place, hub_id(one.source))
        elif place not in names:
            # A model that is called "base" would be taken for the base by `tokenizer_source`.
            taken = {*names.values(), *(["base"] if names else [])}
            name = os.path.basename(place).strip() or "model"
            numbered = (f"{name} ({k})" for k in itertools.count(2))
            names[place] = next(n for n in itertools.chain([name], numbered) if n not in taken)
    return tuple(names[_place(one, plan)] for one in plan.inputs)


def _place(one: Input, plan: Plan) -> str:
    """Where a local model lies, or how the recipe calls one of the Hub."""
    if one.commit is not None:
        return one.source
    if is_remote(one.source):
        return one.source.rstrip("/")
    return os.path.normpath(plan.recipe.folder.absolute() / os.path.expanduser(one.source))


def _name_within(path: str, one: Input, plan: Plan) -> str:
    if one.commit is not None:
        return path.rpartition(f"{one.commit}/")[2]  # in the Hub's cache or on the Hub itself
    if is_remote(path):
        place = _place(one, plan)
        return os.path.basename(path) if path == place else path.removeprefix(f"{place}/")
    name = os.path.relpath(path, _place(one, plan))
    return os.path.basename(path) if name == "." else name
