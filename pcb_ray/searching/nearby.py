"""What trials load and map, on their own machine: in place, where it lies on a disk that all nodes see; else each machine fetches
it once, into the room that it has for it."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pcb_ray.errors import RequestError, RunError, reason_in
from pcb_ray.files.beside import WEIGHT_SUFFIXES
from pcb_ray.files.checkpoint import Checkpoint
from pcb_ray.files.objects import Storage, object_problem
from pcb_ray.files.room import KeptHere, Room
from pcb_ray.files.store import Pins, Range, Stamp, Store, is_remote
from pcb_ray.files.stores import open_store
from pcb_ray.nodes import Node
from pcb_ray.output.companions import RECIPE, SideFile, write_side_files
from pcb_ray.progress import readable_bytes
from pcb_ray.schedule import Patience

PATIENCE = Patience()
LEAVE_S = 5.0
READ_AT_ONCE, READ_AHEAD = 8 << 20, 8
_INDEX = ".index.json"


@dataclass(frozen=True)
class Material:
    """What all scorers of a search read beside the models, the same for all."""

    model: Mapping[str, SideFile]
    """The files of the base as an evaluator loads it, by name: where each lies, or what it holds."""
    made: str
    """The folder that all nodes see where these files are; empty: each machine makes one."""
    pins: Pins = field(default_factory=dict)
    """What files in stores must be, by URI."""
    storage: Storage = field(default_factory=dict)
    room: Room | None = None
    """Where a machine keeps what it fetches; None if all lies on a disk."""
    fetched_bytes: int = 0
    """What each machine fetches at most."""


def model_files(base: Checkpoint, files: Mapping[str, SideFile]) -> dict[str, SideFile]:
    """The base as an evaluator loads it: its own tensors, with the config and tokenizer that the merge will have (`files`)."""
    others = {name: content for name, content in files.items() if name != RECIPE and not _is_weights(name)}
    stored = [file.path for file in base.files]
    if base.where is None:
        suffix = os.path.splitext(stored[0])[1]
        return others | {f"model{suffix}": _absolute(stored[0])}
    parts = [content for content in files.values() if isinstance(content, str) and _is_weights(content)]
    found: dict[str, SideFile] = others | {_below(base.where, path): _absolute(path) for path in (*stored, *parts)}
    if base.folder is not None:
        indexes = (base.folder / base.inner).glob(f"*{_INDEX}")
        return found | {str(path.relative_to(base.folder)): _absolute(str(path)) for path in indexes}
    suffix = os.path.splitext(stored[0])[1]
    whole = f"{base.inner}{base.stem}{suffix}"
    if [_below(base.where, path) for path in stored] != [whole]:
        found[f"{whole}{_INDEX}"] = _index_of(base)
    return found


def _index_of(base: Checkpoint) -> bytes:
    within = f"{base.where}/{base.inner}"
    where = {name: _below(within.removesuffix("/"), tensor.file) for name, tensor in base.tensors.items()}
    where |= {name: where[first] for name, first in base.aliases.items()}
    return json.dumps({"metadata": {}, "weight_map": where}).encode()


def _is_weights(name: str) -> bool:
    return name.endswith(WEIGHT_SUFFIXES)


def _absolute(path: str) -> str:
    return path if is_remote(path) else os.path.abspath(path)


def _below(where: str, path: str) -> str:
    return path.removeprefix(f"{where}/") if is_remote(path) else os.path.relpath(path, where)


class Nearby:
    """The files of a search as this machine has them. What it holds stays on this machine as long as one of its processes does.

    Raises RequestError if the folder of scratch can't be used."""

    def __init__(self, material: Material) -> None:
        self._material = material
        self.store: Store = open_store(material.pins, material.storage)
        self._kept = None if material.room is None else KeptHere(material.room)

    @property
    def room(self) -> int:
        """Bytes."""
        return 0 if self._kept is None else self._kept.bytes

    def path(self, file: str) -> str:
        """Where a file lies on this machine. Raises RunError if there is no room for it, InputError if it is another by now."""
        if not is_remote(file):
            return file
        pin = self._pin(file)
        return self._whole(f"{file}\n{pin.tag}", pin.size, lambda target: self._fetch(file, pin.size, target))

    def model_dir(self) -> Path:
        """The base as an evaluator loads it."""
        if self._material.made:
            return Path(self._material.made)
        model = self._material.model
        paths = {name: self.path(file) for name, file in weights_of(model).items()}
        others = [content for name, content in model.items() if name not in paths]
        size = sum(len(content) if isinstance(content, bytes) else self.store.stamp(content).size for content in others)

        def make(folder: Path) -> None:
            folder.mkdir()
            make_model_dir(folder, model, self.store, paths)

        return Path(self._whole("the base as an evaluator loads it", size, make))

    def close(self, patience_s: float = 0.0) -> None:
        """Let go of what this machine keeps; it goes with the last that does. With patience others are waited for."""
        self.store.close()
        if self._kept is not None:
            self._kept.close(patience_s)

    def _pin(self, file: str) -> Stamp:
        return self._material.pins.get(file) or self.store.stamp(file)

    def _whole(self, key: str, size: int, make: Any) -> str:
        path = None if self._kept is None else self._kept.whole(key, size, make)
        if path is None:
            raise RunError(
                f"{key.splitlines()[0]}: wanted room for its {size:,} bytes on this machine, found none left in memory or "
                "--scratch. Fix: give --scratch a folder on a larger disk of each node, then go on with --resume."
            )
        return path

    def _fetch(self, file: str, size: int, target: Path) -> None:
        """Copy a file from its store."""
        starts = range(0, size, READ_AT_ONCE)
        pieces = [Range(file, start, min(start + READ_AT_ONCE, size)) for start in starts]
        with target.open("xb", buffering=0) as out:
            for k, piece in enumerate(pieces):
                self.store.expect(pieces[k : k + READ_AHEAD], exact=True)
                data = memoryview(bytearray(piece.stop - piece.start))
                self.store.read(file, piece.start, data)
                while data:
                    data = data[out.write(data) :]
        self.store.expect(())


def weights_of(model: Mapping[str, SideFile]) -> dict[str, str]:
    """Where the files lie that hold tensors, by name."""
    return {n: c for n, c in model.items() if isinstance(c, str) and (_is_weights(n) or _is_weights(c))}


def make_model_dir(folder: Path, model: Mapping[str, SideFile], store: Store, paths: Mapping[str, str] | None = None) -> None:
    """Tensors by link, all else written. `paths` says where the files with tensors lie here, if they lie elsewhere."""
    weights = weights_of(model)
    for name, path in (weights if paths is None else paths).items():
        link = folder / name  # where the index says; that may be in a subfolder
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path)
    write_side_files(folder, {name: content for name, content in model.items() if name not in weights}, store)


# --- on every node ----------------------------------------------------------------------------------------------------------------


class _Keeper:
    """Keeps what trials of its node have fetched, from the first to the last of them."""

    def __init__(self, material: Material, reads: Sequence[str], check: Callable[[], None]) -> None:
        self._material, self._reads, self._check = material, reads, check
        self._nearby: Nearby | None = None

    def problems(self) -> tuple[str, list[str]]:
        """This machine's name, and all that is in the way of trials on it."""
        found = list[str]()
        for look in (self._look_at_room, self._look_at_files, self._check):
            try:
                look()
            except RequestError as error:
                found += error.problems
        return socket.gethostname(), found

    def leave(self) -> None:
        """Nothing stays on this node, once the trials that are just ending have ended."""
        if self._nearby is not None:
            self._nearby.close(LEAVE_S)

    def _look_at_room(self) -> None:
        self._nearby = Nearby(self._material)
        wanted, found = self._material.fetched_bytes, self._nearby.room
        if wanted > found and self._material.room is not None:
            raise RequestError(
                f"wanted room for {readable_bytes(wanted)}, the base and at most so much of a basis, found {readable_bytes(found)} "
                "in memory and --scratch. Fix: give --scratch a folder on a large disk of each node, give --cache more, or search "
                "at a smaller density."
            )

    def _look_at_files(self) -> None:
        with contextlib.closing(open_store(self._material.pins, self._material.storage)) as store:
            if problems := [problem for file in self._reads if (problem := _problem_with(file, store))]:
                raise RequestError(problems)


def _problem_with(file: str, store: Store) -> str:
    try:
        if is_remote(file):
            store.read(file, 0, memoryview(bytearray(1)))
        else:
            os.stat(file)
    except OSError as error:
        if is_remote(file):
            return object_problem(file, error)
        return (
            f"{file}: wanted what trials read there, found: {error.strerror}. Fix: let all nodes see one file system there, or "
            "search with the models and OUT in a store (s3://bucket/best), from where each node fetches them."
        )
    except RequestError as error:
        return " ".join(error.problems)
    return ""


@contextlib.contextmanager
def kept_on(found: Sequence[Node], material: Material, reads: Sequence[str], check: Callable[[], None]) -> Iterator[None]:
    """With what trials fetch kept on each of these nodes until the block ends, whichever processes come and go.

    Raises RequestError, by node, if one can't read a file that trials read, does not stand the `check`, or has no room for what is
    fetched."""
    if not found or (material.room is None and len(found) == 1):  # the one that this process is on
        yield
        return
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    keeper: Any = ray.remote(num_cpus=0)(_Keeper)

    def made_on(node: Node) -> Any:
        there = NodeAffinitySchedulingStrategy(node.id, soft=False)
        return keeper.options(scheduling_strategy=there).remote(material, reads, check)

    made = [(node, made_on(node)) for node in found]
    try:
        asked = {actor.problems.remote(): node for node, actor in made}
        waiting, problems = list(asked), list[str]()
        ready, late = ray.wait(waiting, num_returns=len(waiting), timeout=PATIENCE.placement_s)
        for answer in ready:
            try:
                host, there = ray.get(answer, timeout=PATIENCE.exchange_s)
            except ray.exceptions.RayError as error:
                host, there = asked[answer].id[:12], [f"wanted a process there, found that it died: {reason_in(error)}."]
            problems += [f"node {host}: {problem}" for problem in there]
        problems += [
            f"node {asked[answer].id[:12]}: wanted an answer within {PATIENCE.placement_s:.0f} s, found none: it hangs, or "
            "others use it. Fix: see what holds it, or leave it out with --label."
            for answer in late
        ]
        if problems:
            raise RequestError(problems)
        yield
    finally:
        left = [actor.leave.remote() for _, actor in made]
        ray.wait(left, num_returns=len(left), timeout=2 * LEAVE_S)
        for _, actor in made:
            ray.kill(actor)
