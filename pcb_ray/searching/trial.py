"""A trial of Ray Tune: one candidate after another, in a process that loads model and data once.

It is a module of its own, since what Nevergrad imports would make every trial process seconds slower to start."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping
from typing import Any

import ray
from ray import tune

from pcb_ray.errors import with_place
from pcb_ray.searching.request import key_of
from pcb_ray.searching.scorer import Job, Scorer

OBJECTIVE = "objective"  # what Tune sees as the metric of a trial: the user's metric, NaN for a trial that failed

Record = dict[str, Any]
"""What became of a candidate: config, metrics, objective, error, seconds, node."""


LOAD_FAILED = "the trial process could not load the model or its data"


def prepare_process(job: Job) -> None:
    """Make this a trial process, before torch looks for GPUs: one that has not asked for any must not see those that Ray may have
    lent to others."""
    if not job.search.gpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if os.path.isdir(job.folder):  # not on every node; the code comes with the job
        os.chdir(job.folder)
    import torch

    torch.set_num_threads(max(1, int(job.search.cpu)))


def is_spoiled() -> bool:
    """Whether an error has left this process without its GPU: after some all that follow fail too."""
    import torch

    if torch.cuda.is_available() and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            return True
    return False


class Trial(tune.Trainable):
    # Tune gives the last two, as `tune.with_parameters` told it.
    def setup(self, config: dict[str, Any], job: Job, known: Mapping[str, Record]) -> None:  # type: ignore[override]
        prepare_process(job)
        self._job, self._known = job, known
        self._scorer: Scorer | None = None

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        return True  # Tune has put it into self.config

    def step(self) -> dict[str, Any]:
        start = time.monotonic()
        found = dict(self._known.get(key_of(self.config), {}))
        if not found:
            found = {"metrics": {}, OBJECTIVE: math.nan, "error": "", "node": ray.util.get_node_ip_address(), "pid": os.getpid()}
            scorer, load_s = self._loaded()
            try:
                found |= self._score(scorer)
            except Exception as error:  # the evaluator's: any of them costs its trial only
                if is_spoiled():
                    raise  # and its process
                found["error"] = with_place(error)
            found["load_s"] = load_s
            found["seconds"] = time.monotonic() - start
        own = {
            k: v for k, v in found["metrics"].items() if k not in (*found, "done", "should_checkpoint")
        }  # those mean something to Tune
        return {**own, **found}

    def _loaded(self) -> tuple[Scorer, float]:
        """The scorer, with its model loaded, and the seconds that this took.

        What it raises ends the process: one that can't load, for a missing mount or a GPU that is full, must not take one candidate
        after another."""
        start = time.monotonic()
        try:
            self._scorer = self._scorer or Scorer(self._job)
        except Exception as error:
            raise RuntimeError(f"{LOAD_FAILED}: {with_place(error)}") from None
        return self._scorer, time.monotonic() - start

    def _score(self, scorer: Scorer) -> dict[str, Any]:
        search = self._job.search
        metrics, spent = scorer.score(self._job.space.candidate(self.config), search.search_split)
        value = metrics[search.metric]
        error = "" if math.isfinite(value) else f"{search.metric} is {value}"
        return {"metrics": metrics, OBJECTIVE: math.nan if error else value, "error": error, **spent}
