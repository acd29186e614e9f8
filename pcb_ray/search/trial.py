"""A trial of Ray Tune: one candidate after another, in a process that loads model and data once.

A module of its own, since what Nevergrad imports would make every worker seconds slower to start."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping
from typing import Any

import ray
from ray import tune

from pcb_ray.errors import with_place
from pcb_ray.search.request import key_of
from pcb_ray.search.worker import Job, Worker

OBJECTIVE = "objective"  # what Tune sees as the metric of a trial: the user's metric, NaN for a trial that failed

Record = dict[str, Any]
"""What became of a candidate: config, metrics, objective, error, seconds, node."""


def hide_gpus_unless(asked: float) -> None:
    """A process that has not asked for a GPU must not see those that Ray may have lent to others. To be called before torch looks for them."""
    if not asked:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


class Trial(tune.Trainable):
    def setup(self, config: dict[str, Any], job: Job | None = None, known: Mapping[str, Record] | None = None) -> None:
        import torch

        assert job is not None
        hide_gpus_unless(job.search.gpu)
        torch.set_num_threads(max(1, int(job.search.cpu)))
        self._job, self._known = job, known or {}
        self._worker: Worker | None = None

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        return True  # Tune has put it into self.config

    def step(self) -> dict[str, Any]:
        start = time.monotonic()
        found = dict(self._known.get(key_of(self.config), {}))
        if not found:
            found = {"metrics": {}, OBJECTIVE: math.nan, "error": "", "node": ray.util.get_node_ip_address(), "pid": os.getpid()}
            try:
                found |= self._score()
            except Exception as error:  # the evaluator's: any of them costs its trial only
                found["error"] = with_place(error)
            found["seconds"] = time.monotonic() - start
        own = {
            k: v for k, v in found["metrics"].items() if k not in (*found, "done", "should_checkpoint")
        }  # those mean something to Tune
        return {**own, **found}

    def _score(self) -> dict[str, Any]:
        search = self._job.search
        start = time.monotonic()
        if self._worker is None:
            self._worker = Worker(self._job)
        load_s = time.monotonic() - start
        metrics, spent = self._worker.score(self._job.space.candidate(self.config), search.search_split)
        value = metrics[search.metric]
        error = "" if math.isfinite(value) else f"{search.metric} is {value}"
        return {"metrics": metrics, OBJECTIVE: math.nan if error else value, "error": error, "load_s": load_s, **spent}
