"""Evaluators that searches of the tests use, by `file.py:object`. Their module is the model's tensors, without transformers."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from pcb_ray.searching.evaluators import module_of


class Near:
    """Minus the squared distance to a model that the tests have hidden: the best coefficients are known."""

    def __init__(self, target: str, digits: int = 6, uneven_s: float = 0.0, log: str = "", note: str = "") -> None:
        self.target, self.digits, self.uneven_s, self.log, self.note = target, digits, uneven_s, log, note

    def load(self, model_dir: Path) -> torch.nn.Module:
        if self.log:
            with open(self.log, "a") as log:
                log.write(f"load {os.getpid()}\n")
        self.wanted = load_file(self.target)
        self.module = module_of(
            {k: v.float() for path in Path(model_dir).glob("*.safetensors") for k, v in load_file(path).items()}
        )
        return self.module

    def score(self, split: str) -> dict[str, float]:
        if self.log:
            with open(self.log, "a") as log:
                log.write(f"score {split}\n")
        time.sleep(random.random() * self.uneven_s)
        distance = sum(float(((p - self.wanted[name].float()) ** 2).sum()) for name, p in self.module.named_buffers())
        return {"near": round(-distance, self.digits), "split_length": float(len(split))}


class KnowsBase(Near):
    def load(self, model_dir: Path) -> torch.nn.Module:
        module = super().load(model_dir)
        self.of_base = super().score("val")["near"]
        return module


class SlowOnce(KnowsBase):
    """The process that is first to score a candidate takes 8 s for it, so that the other idles at the end of the generation; both
    leave their pid."""

    def __init__(self, target: str, folder: str) -> None:
        super().__init__(target, digits=1)
        self.folder = Path(folder)

    def score(self, split: str) -> dict[str, float]:
        found = super().score(split)
        if found["near"] != self.of_base and split == "val":
            (self.folder / f"pid-{os.getpid()}").touch()
            with contextlib.suppress(FileExistsError):
                (self.folder / "slow").symlink_to(str(os.getpid()))
                time.sleep(8.0)
        return found


class LoadsLate(Near):
    """After the first process, so many can't load."""

    def __init__(self, target: str, folder: str, failing: int = 3) -> None:
        super().__init__(target)
        self.folder, self.failing = Path(folder), failing

    def load(self, model_dir: Path) -> torch.nn.Module:
        (self.folder / str(os.getpid())).touch()
        if 1 < len(list(self.folder.iterdir())) <= 1 + self.failing:
            raise FileNotFoundError("no mount")
        return super().load(model_dir)


class Sick(KnowsBase):
    """Scores the base; of all else only what is asked for: raises, gives NaN, hangs, ends its process or takes 6 GB, in turn by
    what the score would be."""

    def __init__(self, target: str, ways: tuple[str, ...] = ("raise", "nan", "hang", "die", "")) -> None:
        super().__init__(target)
        self.ways = ways

    def score(self, split: str) -> dict[str, float]:
        found = super().score(split)
        way = "" if found["near"] == self.of_base else self.ways[int(-found["near"] * 1e6) % len(self.ways)]
        if way == "raise":
            raise ValueError(f"no score for {found['near']}")
        if way == "hang":
            time.sleep(3600)
        if way == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if way == "hog":
            self.hoard = [(time.sleep(0.04), torch.ones(25_000_000)) for _ in range(60)]  # 6 GB
        return found | ({"near": float("nan")} if way == "nan" else {})


class DiesOnce(KnowsBase):
    """The first process to score anything but the base on the report split ends."""

    def __init__(self, target: str, marker: str) -> None:
        super().__init__(target)
        self.marker = Path(marker)

    def score(self, split: str) -> dict[str, float]:
        found = super().score(split)
        if split == "test" and found["near"] != self.of_base and not self.marker.exists():
            self.marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return found


def edit_and_hide(path: Path) -> None:
    """One bit of the last element changes; the file's times are as they were."""
    was = path.stat()
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([byte ^ 1]))
    os.utime(path, ns=(was.st_atime_ns, was.st_mtime_ns))


class Edits(KnowsBase):
    """The first trial edits a file."""

    def __init__(self, target: str, path: str, hidden: bool) -> None:
        super().__init__(target)
        self.path, self.hidden = Path(path), hidden

    def score(self, split: str) -> dict[str, float]:
        found = super().score(split)
        mark = self.path.with_name("edited")
        if found["near"] != self.of_base and not mark.exists():
            mark.touch()
            (edit_and_hide if self.hidden else os.utime)(self.path)
        return found


class Lacking:
    def load(self, model_dir: Path) -> None: ...


class WrongModule(Near):
    def load(self, model_dir: Path) -> torch.nn.Module:
        super().load(model_dir)
        return torch.nn.Linear(2, 2)


class NoModule(Near):
    def load(self, model_dir: Path) -> str:  # type: ignore[override]
        return "a model"


class NoNumber(Near):
    def score(self, split: str) -> dict[str, float]:
        return {"near": "high"}  # type: ignore[dict-item]


class NoDict(Near):
    def score(self, split: str) -> dict[str, float]:
        return 3.0  # type: ignore[return-value]


class NanBase(Near):
    def score(self, split: str) -> dict[str, float]:
        return {"near": float("nan")}


class Norm(Near):
    """The larger the model, the better."""

    def score(self, split: str) -> dict[str, float]:
        return {"norm": sum(float((b.double() ** 2).sum()) for b in self.module.buffers())}


class ValOnly(Near):
    def score(self, split: str) -> dict[str, float]:
        if split != "val":
            raise KeyError(split)
        return super().score(split)


not_an_evaluator = 3


class SeesGpus(Near):
    """It notes which GPU each of its processes was given, and takes a while, so that several are at work."""

    def __init__(self, target: str, log: str) -> None:
        super().__init__(target)
        self.notes = Path(log)

    def score(self, split: str) -> dict[str, float]:
        with self.notes.open("a") as notes:
            notes.write(f"{os.getpid()} {os.environ.get('CUDA_VISIBLE_DEVICES')}\n")
        time.sleep(0.5)
        return super().score(split)


class Indexed(Near):
    """It loads what an index names."""

    def load(self, model_dir: Path) -> torch.nn.Module:
        files = set(json.loads((Path(model_dir) / "model.safetensors.index.json").read_text())["weight_map"].values())
        self.wanted = load_file(self.target)
        tensors = {name: t for file in files for name, t in load_file(Path(model_dir) / file).items()}
        self.module = module_of({name: t.float() for name, t in tensors.items()})
        return self.module
