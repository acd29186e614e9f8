"""What a trial holds: an evaluator whose model stays loaded, and the bases that candidates are made from. It needs no Ray."""

from __future__ import annotations

import numbers
import os
import reprlib
import signal
import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar

from pcb_ray.errors import RequestError
from pcb_ray.methods import Known
from pcb_ray.nodes import Pool
from pcb_ray.planning import Plan
from pcb_ray.searching.evaluators import Evaluator, Metrics, check_splits, checked, folder_here, make_evaluator, match
from pcb_ray.searching.nearby import Material, Nearby
from pcb_ray.searching.request import Candidate, Search, Space
from pcb_ray.user_code import UserCode

if TYPE_CHECKING:
    from pcb_ray.searching.basis import Basis

T = TypeVar("T")

HANG_GRACE_S = 5.0  # after its time scoring is interrupted; one that does not mind is ended this much later, with its process
WATCH = "time limit"  # the name of the thread that does so


@dataclass(frozen=True)
class Arm:
    """One variant of the method: its plan, and the basis in `folder`, or below a prefix of a store."""

    plan: Plan
    folder: str
    known: Known


@dataclass(frozen=True)
class Job:
    """All that a scorer needs; it is the same for all of them."""

    search: Search
    space: Space
    arms: Mapping[str, Arm]
    """The arms by variant."""
    material: Material
    """Where the base lies, as the evaluator loads it, and what is fetched."""
    folder: str
    """The folder of the recipe, or of the Python code that gave the evaluator, which finds its relative paths from there."""
    scored_by: str = ""
    """What tells the evaluator from what it was before it was changed, so that their scores don't mix."""
    evaluator: Any = None
    """The evaluator that Python code gave; None stands for the one that the recipe names."""
    code: UserCode | None = None
    """Of the one that the recipe names, if it is the user's own."""
    pool: Pool = Pool()  # noqa: RUF009 - it is frozen
    """Which nodes may work."""


def basis_of(job: Job, variant: str, nearby: Nearby) -> Basis:
    """As this machine has it."""
    from pcb_ray.searching.basis import Basis  # and torch

    arm = job.arms[variant]
    return Basis(arm.plan, arm.folder, arm.known, nearby.path)


class Scorer:
    """Loads the model once; then each candidate is an update of it."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self._bases: dict[str, Basis] = {}
        search = job.search
        self.evaluator: Evaluator = (
            make_evaluator(search.evaluator, search.options, folder_here(job.folder), job.code)
            if job.evaluator is None
            else checked(job.evaluator, "")
        )
        check_splits(self.evaluator, search.splits)
        self._nearby = Nearby(job.material)
        self._held: int | None = None  # the input whose tensors the module has
        module = self.evaluator.load(self._nearby.model_dir())
        self._plan = next(iter(job.arms.values())).plan
        if not callable(getattr(module, "named_parameters", None)):
            raise RequestError(
                f"search.evaluator: wanted a torch.nn.Module from load(), found {type(module).__name__}. "
                "Fix: return the module whose parameters are to be updated."
            )
        shapes = {t.name: t.shape for t in self._plan.tensors}
        # What the plan counts once may be twice in a module that knows no ties, such as that of `command`.
        again = {one.name: self._plan.tensors[one.tensor].name for one in self._plan.again}
        tied = {name: original for name, original in self._plan.tied if original in shapes} | again
        optional = {name: shapes[original] for name, original in tied.items()}
        kept = {c.source.name: c.source.shape for c in self._plan.copies if c.why == "excluded"}
        found = match(module, shapes, optional={**kept, **optional})
        _check_apart({name: found[name] for name in (*kept, *shapes) if name in found}, kept)
        self.parameters = {name: found[name] for name in (*shapes, *optional) if name in found}
        self._twins = [(self.parameters.pop(name), self.parameters[tied[name]]) for name in tied if name in self.parameters]

    def score(self, candidate: Candidate, split: str) -> tuple[Metrics, dict[str, float]]:
        """The metrics of a candidate, and how long applying and scoring took. Raises whatever the evaluator raises."""
        import torch

        start, threads = time.monotonic(), torch.get_num_threads()
        basis = self._basis(candidate)
        known = basis.known(candidate.density, threads=threads)
        self._held = None
        basis.apply(self.parameters, self.job.space.lambdas(candidate), candidate.lambda_, known, threads=threads)
        self._update_twins()
        applied = time.monotonic()
        metrics = self._metrics(split)
        return metrics, {"apply_s": applied - start, "score_s": time.monotonic() - applied}

    def _basis(self, candidate: Candidate) -> Basis:
        variant = candidate.variant or self.job.space.recipe.parameters.get("variant", "")
        if variant not in self._bases:
            self._bases[variant] = basis_of(self.job, variant, self._nearby)
        return self._bases[variant]

    def score_input(self, source: int, split: str) -> Metrics:
        """The metrics of the base (0) or a model (1..N): its merged tensors in the base's place."""
        from pcb_ray.searching.basis import copy_input

        if self._held != source:
            self._held = None
            copy_input(self._plan, source, self.parameters, self._nearby.store, self._nearby.path)
            self._held = source
        self._update_twins()
        return self._metrics(split)

    def _update_twins(self) -> None:
        for twin, original in self._twins:
            if twin.data_ptr() != original.data_ptr():
                twin.detach().copy_(original.detach())

    def _metrics(self, split: str) -> Metrics:
        found = within(self.job.search.trial_timeout_s, lambda: self.evaluator.score(split))
        metric = self.job.search.metric
        if not isinstance(found, Mapping):
            raise RequestError(
                f"search.evaluator: wanted a dict of numbers from score({split!r}), found {type(found).__name__}. "
                f"Fix: return one with {metric!r}."
            )
        if metric not in found:
            raise RequestError(
                f"search.metric: wanted {metric!r} from score({split!r}), found {', '.join(map(str, found)) or 'nothing'}. "
                "Fix: name one of these, or return it."
            )
        values: dict[Any, Any] = dict(found)
        found = {k: v.item() if getattr(v, "ndim", None) == 0 else v for k, v in values.items()}  # of numpy or torch
        bad = {k: v for k, v in found.items() if isinstance(v, bool) or not isinstance(v, numbers.Real)}
        if bad:
            key, value = next(iter(bad.items()))
            raise RequestError(
                f"search.evaluator: wanted numbers from score({split!r}), found {key} = {reprlib.repr(value)}. "
                "Fix: return numbers, such as float(x)."
            )
        return {str(k): float(v) for k, v in found.items()}


def _check_apart(parameters: Mapping[str, Any], kept: Collection[str]) -> None:
    """Raises RequestError for a module that ties what the merge has apart, of which some may be `kept` as they are: a candidate
    would be no merge."""
    held: dict[int, str] = {}
    for name, parameter in parameters.items():
        other = held.setdefault(parameter.data_ptr(), name) if parameter.numel() else name
        if other != name and not {name, other} <= set(kept):
            raise RequestError(
                f"search.evaluator: wanted a module with {name} apart from {other}, as the merge has them, found one that ties "
                "them: each candidate would change both. Fix: load it untied, or merge a base and models that tie them."
            )


def within(seconds: float | None, call: Callable[[], T]) -> T:
    """What the call returns. After so many seconds a TimeoutError interrupts it, and if it does not mind, it ends with its process.

    To be called in the main thread. Neither the alarm nor the end of the process can come once this has returned or raised. An
    alarm that was set before, such as that of a limit around this one, waits until then.
    """
    if seconds is None:
        return call()
    armed, ended, deciding = False, threading.Event(), threading.Lock()

    def ring(_number: int, _frame: FrameType | None) -> None:
        if armed:
            raise TimeoutError(f"the trial took longer than {seconds:g} s (trial_timeout)")

    def end_process(after: float) -> None:
        if not ended.wait(after):
            with deciding:  # either the call has ended, or the process ends before it goes on
                if not ended.is_set():
                    os._exit(1)

    start = time.monotonic()
    left, _ = signal.setitimer(signal.ITIMER_REAL, 0)
    before = signal.signal(signal.SIGALRM, ring)
    try:
        threading.Thread(target=end_process, args=(seconds + HANG_GRACE_S,), name=WATCH, daemon=True).start()
        try:
            armed = True
            signal.setitimer(signal.ITIMER_REAL, seconds)
            return call()
        finally:
            # The alarm rings once: if before this line, the other `finally` is not disturbed any more; after it, it is not heard.
            armed = False
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        with deciding:
            ended.set()
        signal.signal(signal.SIGALRM, before)
        if left:
            signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic() - start), 1e-3))
