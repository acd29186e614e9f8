"""All of Ray Tune and Nevergrad: candidates asked generation by generation, scored by trials that keep their model, told in the
order asked."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # Tune's own tables would print over our progress; it reads this when imported

from ray import tune
from ray.air.execution._internal import actor_manager
from ray.exceptions import OutOfMemoryError, RayActorError
from ray.tune.execution import class_cache, tune_controller
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher
from ray.tune.search.nevergrad import NevergradSearch

from pcb_ray.errors import RequestError, RunError, reason_in
from pcb_ray.nodes import Pool, autoscales, nodes, shown_nodes
from pcb_ray.progress import readable_bytes
from pcb_ray.searching.request import Config, Search, Space, key_of
from pcb_ray.searching.scorer import Job
from pcb_ray.searching.trial import LOAD_FAILED, OBJECTIVE, Record, Trial

log = logging.getLogger("pcb_ray")

# For a process that Ray ends because memory is short, it raises an error that Tune does not take for the death of an actor: that
# would end the search.
for module in (actor_manager, tune_controller):
    vars(module)["RayActorError"] = (RayActorError, OutOfMemoryError)

INITIAL_STD = 0.1  # of CMA, in ranges between bounds; Nevergrad's own, 0.05 or 0.025, is too timid for a budget of 100
SMALLEST_GRID = 16  # of fewer points a quarter may fail by chance
START_PATIENCE_S = 60.0  # how long idle trial processes wait for one more to start
RETRY_S = 600.0  # after so long they try again
GO_ON = "go on with --resume, which keeps what was scored"
MOST_UNLOADED = 8  # processes that could not load, with no result between them
WITH_ITS_NODE = re.compile(r"its node has died|preempted")
MOST_DEATHS = 10  # of processes that were to score the same candidate, also of those that died before

# --- who asks ---------------------------------------------------------------------------------------------------------------------


def nevergrad_space(space: Space, seed: int, start: Config) -> Any:
    """The space as Nevergrad's, to be searched from `start`."""
    import nevergrad as ng

    parameters: dict[str, Any] = {}
    for name, b in space.bounds.items():
        kind = ng.p.Log if b.is_log else ng.p.Scalar
        parameters[name] = kind(init=start[name], lower=b.lower, upper=b.upper)
    if space.variants:
        parameters["variant"] = ng.p.Choice(list(space.variants), deterministic=True)
    result = ng.p.Dict(**parameters)
    if space.variants:
        result["variant"].value = start["variant"]
    result.random_state.seed(seed)
    return result


def check_optimizer(search: Search, space: Space) -> None:
    """Raises RequestError for an optimizer that Nevergrad does not have, or that can't search this space a generation at a time."""
    import difflib

    import nevergrad as ng

    names = list(ng.optimizers.registry)
    if search.optimizer and search.optimizer not in names:
        near = ["CMA"] if "CMA" in search.optimizer.upper() else difflib.get_close_matches(search.optimizer, names, n=1)
        raise RequestError(
            f"search.optimizer: wanted CMA or another of Nevergrad's, found {search.optimizer!r}. Fix: write "
            + (f"{near[0]}." if near else "CMA, or a name of nevergrad.optimizers.registry.")
        )
    if search.optimizer in ("", "CMA"):
        return
    try:  # two generations, as they will be asked and told
        parametrization = nevergrad_space(space, search.seed, space.start)
        optimizer = optimizer_of(search, space)(parametrization=parametrization, **_of_optimizer(search))
        for _ in range(2):
            asked = [optimizer.ask() for _ in range(search.population)]
            for k, candidate in enumerate(asked):
                optimizer.tell(candidate, float(k))
    except Exception as error:  # whatever a package raises that is missing, or an optimizer that wants another kind of space
        raise RequestError(
            f"search.optimizer: wanted one for {len(space.bounds)} coefficients and {search.population} candidates at a time, "
            f"found that {search.optimizer} raised {type(error).__name__}: {reason_in(error)}. "
            "Fix: use CMA, or another of Nevergrad's."
        ) from error


def _of_optimizer(search: Search) -> dict[str, Any]:
    return {} if search.optimizer == "CMA" else {"budget": search.budget, "num_workers": search.population}


def optimizer_of(search: Search, space: Space) -> Any:
    """The optimizer that the recipe names: CMA is CMA-ES (Nevergrad's own `CMA` is a choice among several)."""
    import nevergrad as ng

    if search.optimizer != "CMA":
        return ng.optimizers.registry[search.optimizer]
    # The scale is in Nevergrad's unit, a sixth of the range. Nevergrad multiplies it by this where all is bounded, and a choice of
    # variants is not.
    multiplied_by = 1.0 if space.variants else 0.3 if len(space.bounds) < 18 else 0.15
    # Below a population of 6, CMA would mirror samples, and then, with a warning, not know them again after their way through
    # Nevergrad.
    inopts = {"CMA_mirrors": 0}
    return ng.optimizers.ParametrizedCMA(popsize=search.population, scale=6 * INITIAL_STD / multiplied_by, inopts=inopts)


class FailureLimit:
    """Lost once more than a quarter of all trials have failed in a row."""

    def __init__(self, total: int) -> None:
        self._total, self._in_a_row, self.is_lost = total, 0, False

    def saw(self, *, failed: bool) -> None:
        self._in_a_row = self._in_a_row + 1 if failed else 0
        self.is_lost |= 4 * self._in_a_row > self._total


class Generations(NevergradSearch):
    """Nevergrad, one generation at a time, from the best of a first one that is spread over the uniform coefficients.

    Results are told in the order in which they were asked for, once a generation's are all there: so a seed gives the same
    candidates whatever finishes first. A trial that failed is told as the worst score so far."""

    def __init__(self, search: Search, space: Space, progress: Ledger) -> None:
        self._search, self._coefficients, self._progress = search, space, progress
        self._first = space.first_generation(search.population, search.seed)
        self._generation: list[str] = []
        self._losses: dict[str, float | None] = {}
        self._worst = -math.inf
        self._failures = FailureLimit(search.budget)
        super().__init__(
            optimizer=optimizer_of(search, space),
            optimizer_kwargs=_of_optimizer(search),
            space=nevergrad_space(space, search.seed, space.start),
            metric=OBJECTIVE,
            mode=search.mode,
        )

    def suggest(self, trial_id: str) -> Any:
        if self.stopped or self._progress.is_over:
            return Searcher.FINISHED
        if self._progress.is_full:
            return None  # until a trial process is free
        if lost := self._progress.next_lost():
            self._generation[self._generation.index(lost)] = trial_id
            if lost in self._live_trial_mapping:
                self._live_trial_mapping[trial_id] = self._live_trial_mapping.pop(lost)
            return self._progress.asked_again(trial_id, lost)
        if self._progress.all_asked or len(self._generation) == self._search.population:
            return None  # until all its results are there
        config = self._first.pop(0) if self._first else dict(super().suggest(trial_id) or {})
        self._generation.append(trial_id)
        self._progress.asked(trial_id, config)
        return config

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        self._ended(trial_id, float(result[OBJECTIVE]))

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        if trial_id in self._generation and not (error and self._progress.may_try_again(trial_id)):
            self._ended(trial_id, math.nan)

    @property
    def stopped(self) -> bool:
        return self._failures.is_lost or bool(self._progress.given_up)

    def _ended(self, trial_id: str, value: float) -> None:
        if trial_id not in self._generation or trial_id in self._losses:
            return  # told already: what comes now is only the end of its process
        self._losses[trial_id] = -self._search.better * value if math.isfinite(value) else None
        if len(self._losses) == self._search.population:
            self._learn([(one, self._losses[one]) for one in self._generation])
            self._generation, self._losses = [], {}

    def _learn(self, generation: Sequence[tuple[str, float | None]]) -> None:
        for _, loss in generation:
            self._failures.saw(failed=loss is None)
        scored = {one: loss for one, loss in generation if loss is not None}
        # Of the whole generation first: one that failed may have been asked before any that has a score.
        self._worst = max([self._worst, *scored.values()])
        if not self._live_trial_mapping:  # the first: Nevergrad was not asked for it
            best = min(scored, key=lambda one: scored[one], default=None)
            start = self._coefficients.start if best is None else self._progress.config(best)
            self._space = nevergrad_space(self._coefficients, self._search.seed, start)
            self._setup_nevergrad()
        for one, loss in generation:
            if one in self._live_trial_mapping:
                assert self._nevergrad_opt is not None
                worst = self._worst if math.isfinite(self._worst) else 0.0
                self._nevergrad_opt.tell(self._live_trial_mapping.pop(one), worst if loss is None else loss)


class Listed(Searcher):
    """Asks for these configs, in order."""

    def __init__(self, configs: Sequence[Config], mode: str, progress: Ledger) -> None:
        super().__init__(metric=OBJECTIVE, mode=mode)
        self._told: set[str] = set()
        self._left, self._progress, self._failures = list(configs), progress, FailureLimit(max(len(configs), SMALLEST_GRID))

    def suggest(self, trial_id: str) -> Any:
        if self.stopped or self._progress.is_over:
            return Searcher.FINISHED
        if self._progress.is_full:
            return None
        if lost := self._progress.next_lost():
            return self._progress.asked_again(trial_id, lost)
        if not self._left:
            return None
        config = dict(self._left.pop(0))
        self._progress.asked(trial_id, config)
        return config

    @property
    def stopped(self) -> bool:
        return self._failures.is_lost or bool(self._progress.given_up)

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        self._told.add(trial_id)
        self._failures.saw(failed=not math.isfinite(result[OBJECTIVE]))

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        if error and trial_id not in self._told and not self._progress.may_try_again(trial_id):
            self._failures.saw(failed=True)

    def save(self, checkpoint_path: str) -> None:
        pass

    def restore(self, checkpoint_path: str) -> None:
        pass


# --- who watches ------------------------------------------------------------------------------------------------------------------


class Ledger(tune.Callback):
    """Keeps a record of every candidate as it ends, and shows how far the search has come."""

    def __init__(
        self,
        total: int,
        search: Search,
        keep: Callable[[str, Record], None],
        known: Mapping[str, Record],
        *,
        base: float,
        room: int,
        quiet: bool,
    ) -> None:
        from pcb_ray.progress import CountBar

        self.total, self.room = total, room
        self.given_up = ""
        """Why no trial can succeed."""
        self.interrupted = False
        self.records: dict[int, Record] = {}
        self._numbers: dict[str, tuple[int, dict[str, Any]]] = {}
        self._started: set[str] = set()
        self._deaths: dict[int, list[bool]] = {}
        self._lost: list[str] = []
        self._search, self._keep, self._known, self._base = search, keep, known, base
        self._bar = CountBar("search", total, "trials", quiet=quiet)

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune saves its callbacks from time to time; a resumed search makes its own

    def asked(self, trial_id: str, config: dict[str, Any]) -> None:
        self._numbers[trial_id] = (len(self._numbers), dict(config))
        self._bar.note(self._words)

    def may_try_again(self, trial_id: str) -> bool:
        """Whether the candidate of a trial whose process died is to have another. It is not, if this was the second at work on it:
        the candidate may be the cause.

        A process may have died, with its node, while it was idle: then the next trial only finds it so."""
        number = self._numbers[trial_id][0]
        if number in self.records or trial_id in self._lost:
            return False
        deaths = self._deaths.setdefault(number, [])
        deaths.append(trial_id in self._started)
        again = sum(deaths) < 2 and len(deaths) < MOST_DEATHS
        if again:
            self._lost.append(trial_id)
        return again

    def was_not_at_work(self, trial_id: str) -> None:
        """Its process ended before it could be."""
        self._started.discard(trial_id)

    def next_lost(self) -> str | None:
        return self._lost[0] if self._lost else None

    def asked_again(self, trial_id: str, lost: str) -> dict[str, Any]:
        self._lost.remove(lost)
        self._numbers[trial_id] = self._numbers.pop(lost)
        return dict(self._numbers[trial_id][1])

    def config(self, trial_id: str) -> dict[str, Any]:
        return self._numbers[trial_id][1]

    def number(self, trial_id: str) -> int:
        return self._numbers[trial_id][0]

    @property
    def is_full(self) -> bool:
        """As many trials are without a result as may run at a time."""
        return self.in_flight >= self.room

    @property
    def in_flight(self) -> int:
        return len(self._numbers) - len(self.records) - len(self._lost)

    @property
    def is_over(self) -> bool:
        return len(self.records) == self.total

    @property
    def all_asked(self) -> bool:
        return len(self._numbers) == self.total

    @property
    def best(self) -> Record | None:
        """The record with the best score; of equals the first."""
        scored = [r for _, r in sorted(self.records.items()) if not r["error"]]
        return max(scored, key=lambda r: self._search.better * r[OBJECTIVE], default=None)

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._started.add(trial.trial_id)

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: Record, **info: Any) -> None:
        kept = ("metrics", OBJECTIVE, "error", "node", "pid", "seconds", "load_s", "apply_s", "score_s")
        self._ended(trial.trial_id, {k: result[k] for k in kept if k in result})

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        if trial.trial_id in self._lost or trial.trial_id not in self._numbers:
            return  # another process will have it
        error = f"the trial process died: {reason_of(trial)}"
        self._ended(trial.trial_id, {"metrics": {}, OBJECTIVE: math.nan, "error": error, "node": "", "seconds": math.nan})

    def _ended(self, trial_id: str, found: Record) -> None:
        number, config = self._numbers[trial_id]
        if number in self.records:
            return  # its process died after it
        key = key_of(config)
        ended = self._known.get(key, {}).get("ended", time.time())  # of one that is known: then
        record = self.records[number] = {"number": number, "config": config, "ended": ended, **found}
        if key not in self._known:
            self._keep(key, record)
        self._bar.advance(self._words)
        if len(self.records) == max(self._search.population, 4) and all(r[OBJECTIVE] == self._base for r in self.records.values()):
            log.warning("all candidates score as the base, %s: does score() use the module that load() returned?", self._base)

    @property
    def _words(self) -> str:
        best, failed = self.best, sum(bool(r["error"]) for r in self.records.values())
        words = [f"best {self._search.metric} {best[OBJECTIVE]:.5g}" if best else "no score yet"]
        words += [f"{self.in_flight} running"] if self.in_flight else []
        words += [f"{failed} failed"] if failed else []
        return ", ".join(words)

    def close(self) -> None:
        self._bar.close()


def reason_of(trial: Any) -> str:
    """Why a trial ended."""
    return reason_in(Path(trial.error_file).read_text()) if trial.error_file else "no reason was given"


# --- who works --------------------------------------------------------------------------------------------------------------------


class StayingTrials(FIFOScheduler):
    """Keeps the trial processes, with the model that each has loaded, from the first trial to the last.

    By itself Tune ends all idle processes but one whenever there is no trial to run, as at the end of each generation. And a
    process that becomes free gets the trial that another is just starting for, and that one is called off: trials shorter than such
    a start would be run by one process only. Here a trial that has its result stays with its process until another waits for it,
    and a starting process is waited for."""

    def __init__(self, asker: Generations | Listed, progress: Ledger) -> None:
        super().__init__()
        self._asker, self._progress = asker, progress
        self._held: list[Any] = []
        self._idle_since: float | None = None
        self._none_since = time.monotonic()
        self._full, self._again_at = progress.room, 0.0
        self._unloaded = 0  # processes that could not load, since the last result

    def on_trial_result(self, tune_controller: Any, trial: Any, result: Record) -> str:
        self._held.append(trial)
        self._unloaded = 0
        return TrialScheduler.NOOP

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        reason = reason_of(trial)
        if WITH_ITS_NODE.search(reason):
            self._progress.was_not_at_work(trial.trial_id)  # its candidate is not to blame
        if LOAD_FAILED in reason:
            self._unloaded += 1
            self._progress.was_not_at_work(trial.trial_id)
            if self._unloaded > MOST_UNLOADED:
                self._progress.given_up = f"{self._unloaded} trial processes after another that could not load; the last: {reason}"

    def choose_trial_to_run(self, tune_controller: Any) -> Any:
        if self._progress.interrupted:
            raise KeyboardInterrupt
        trials = tune_controller.get_live_trials()  # those that failed among them
        pending = [t for t in trials if t.status == "PENDING"]
        running = sum(t.status == "RUNNING" for t in trials)
        if self._progress.room < self._full and time.monotonic() > self._again_at:
            self._progress.room = self._full
        if self._progress.is_over or self._asker.stopped:
            while self._held:
                self._release(tune_controller)
        elif pending and self._held and (len(pending) > self._progress.room - running or self._is_vain(running)):
            self._release(tune_controller)
            return max(pending, key=lambda t: self._progress.number(t.trial_id))  # the last asked: no process is starting for it
        if not pending or len(self._held) < running:
            self._idle_since = None
        if running or not pending:
            self._none_since = time.monotonic()
        elif time.monotonic() - self._none_since > START_PATIENCE_S:
            log.warning(
                "no trial process could be placed for %g s: other jobs may hold what the cluster has; the search waits",
                START_PATIENCE_S,
            )
            self._none_since = time.monotonic()
        return None

    def _release(self, tune_controller: Any) -> None:
        tune_controller.stop_trial(self._held.pop(0))

    def _is_vain(self, running: int) -> bool:
        """Whether a process has been waited for too long, with nothing else to do: others use what the cluster has."""
        if len(self._held) < running:
            return False
        self._idle_since = self._idle_since or time.monotonic()
        if time.monotonic() - self._idle_since < START_PATIENCE_S:
            return False
        log.warning("no further trial process started within %g s: the search goes on with %d", START_PATIENCE_S, running)
        self._progress.room, self._idle_since = running, None
        self._again_at = time.monotonic() + RETRY_S
        return True


# --- the run ----------------------------------------------------------------------------------------------------------------------


def check_resources(search: Search, pool: Pool) -> int:
    """How many trials run at a time: what the recipe says, or the cluster holds; where nodes are added on demand, a generation.
    Raises RequestError if it is none."""
    found = nodes()
    places = pool.places(found, search.amounts)
    if places == 0 and not autoscales():
        asked = " ".join(f"--label {key}={value}" for key, value in pool.labels.items())
        raise RequestError(
            f"search.resources_per_trial: wanted a node with {shown_resources(search, pool)}{asked and f' and {asked}'}, found "
            f"{shown_nodes(found)}. Fix: ask for less (memory: by default the model in float32), or join a cluster that has them "
            "by --address."
        )
    if places < search.population and autoscales():
        places = search.population
    return min(places, search.concurrency or places)


def shown_resources(search: Search, pool: Pool) -> str:
    """What a trial is given, for people."""
    own = "".join(f", {name} {amount:g}" for name, amount in pool.resources.items())
    memory = f" and {readable_bytes(search.memory)} of memory" if search.memory else ""
    return f"{search.cpu:g} CPUs, {search.gpu:g} GPUs{own}{memory}"


def run_trials(
    job: Job,
    asker: Generations | Listed,
    progress: Ledger,
    total: int,
    *,
    shelf: Path,
    known: Mapping[str, Record],
    name: str,
) -> list[Record]:
    """Have all candidates scored, as a Tune experiment of this name in the folder `shelf`, which this process alone needs to see;
    their records in the order asked.

    A candidate that is `known` is not scored again. Raises RunError if too many fail in a row."""
    search = job.search
    labels: Any = {"bundle_label_selector": [dict(job.pool.labels)]} if job.pool.labels else {}
    trainable = tune.with_resources(
        tune.with_parameters(Trial, job=job, known=dict(known)),
        tune.PlacementGroupFactory(
            [{**search.amounts, **job.pool.resources}],
            **labels,
        ),
    )
    tuner = tune.Tuner(
        trainable,
        tune_config=tune.TuneConfig(
            metric=OBJECTIVE,
            mode=search.mode,
            search_alg=asker,
            scheduler=StayingTrials(asker, progress),
            num_samples=-1,  # the asker says when all are done
            reuse_actors=True,
            trial_name_creator=lambda trial: f"trial_{trial.trial_id}",
            trial_dirname_creator=lambda trial: f"trial_{trial.trial_id}",
        ),
        run_config=tune.RunConfig(
            name=name,
            storage_path=str(shelf.absolute()),
            callbacks=[progress, *_loggers(search)],
            failure_config=tune.FailureConfig(max_failures=0),  # the asker gives a lost candidate to another process
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            verbose=0,
        ),
    )
    try:
        with _settings(progress.room), _noted(progress):
            tuner.fit()
    except Exception as error:  # whatever Tune or an optimizer of Nevergrad raises
        reason = f"{type(error).__name__}: {reason_in(error)}"
        raise RunError(f"search: wanted {total} trials, found {reason}. Fix: {GO_ON}.") from error
    finally:
        progress.close()
    records = [record for _, record in sorted(progress.records.items())]
    if len(records) < total and progress.given_up:
        raise RunError(f"search: wanted {total} trials, found {progress.given_up}. Fix: mend the cause, then {GO_ON}.")
    if len(records) < total and asker.stopped:
        last = next(record["error"] for record in reversed(records) if record["error"])
        raise RunError(
            f"search: wanted scores, found that more than a quarter of the {total} trials failed in a row, the last with: {last}. "
            f"Fix: mend the cause, then {GO_ON}."
        )
    if len(records) < total:
        raise RunError(f"search: wanted {total} trials, found that Tune ended after {len(records)}. Fix: {GO_ON}.")
    return records


@contextlib.contextmanager
def _settings(room: int) -> Iterator[None]:
    """Tune's settings for one experiment; the caller may have others."""
    wanted = {
        "TUNE_DISABLE_SIGINT_HANDLER": "1",  # on Ctrl-C it would end the trials and return as if all were done
        # There is one result per trial, so nothing to buffer, and a driver that looks more often starts the next one sooner.
        "TUNE_RESULT_BUFFER_LENGTH": "0",
        "TUNE_MAX_PENDING_TRIALS_PG": str(room),  # so that all processes start together
        "RAY_CHDIR_TO_TRIAL_DIR": "0",
    }
    before, logger = {name: os.environ.get(name) for name in wanted}, logging.getLogger("ray.tune")
    level = logger.level
    sent = {name for name in class_cache.ENV_VARS_TO_PROPAGATE if name.startswith("AWS_")}
    class_cache.ENV_VARS_TO_PROPAGATE -= sent  # Tune would send the driver's keys to all nodes, whose logs show them
    os.environ.update(wanted)
    logger.setLevel(logging.CRITICAL)  # the records hold the errors
    try:
        yield
    finally:
        logger.setLevel(level)
        class_cache.ENV_VARS_TO_PROPAGATE |= sent
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _noted(progress: Ledger) -> Iterator[None]:
    """Ctrl-C and SIGTERM set `progress.interrupted`, and Tune's loop ends at the next look for a trial, some 0.1 s later.

    A KeyboardInterrupt that comes wherever the loop is may be lost in a destructor, or leave a lock of a logger's queue taken, for
    which the process would then wait at its end. The second one ends the run at once, as it did before."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, frame: FrameType | None) -> None:
        handler = before[signal.Signals(number)]
        if progress.interrupted and callable(handler):
            handler(number, frame)
        progress.interrupted = True

    ours = [number for number, handler in before.items() if callable(handler)]
    for number in ours:
        signal.signal(number, note)
    try:
        yield
        if progress.interrupted:
            raise KeyboardInterrupt
    finally:
        for number in ours:
            signal.signal(number, before[number])


def check_loggers(search: Search) -> None:
    """Have those that the recipe asks for set up once, as Tune will. Raises RequestError."""
    for (name, _), logger in zip(search.loggers, _loggers(search), strict=True):
        try:
            logger.setup()
        except Exception as error:  # the service's own: a wrong address, a missing key
            fix = "see that its service can be reached and its key is in the environment, or remove the logger"
            raise RequestError(
                f"search.loggers.{name}: wanted its service, found {type(error).__name__}: {reason_in(error)}. Fix: {fix}."
            ) from error


def _loggers(search: Search) -> list[Any]:
    """The loggers that the recipe asks for. Raises RequestError."""
    result: list[Any] = []
    for name, options in search.loggers:
        try:
            if name == "wandb":
                from ray.air.integrations.wandb import WandbLoggerCallback

                result.append(WandbLoggerCallback(**options))
            elif name == "mlflow":
                from ray.air.integrations.mlflow import MLflowLoggerCallback

                result.append(MLflowLoggerCallback(**options))
            else:
                import tensorboardX  # noqa: F401  # Tune's own logger writes its files where it is installed

                result.append(tune.Callback())
        except (ImportError, RuntimeError) as error:
            raise RequestError(
                f"search.loggers: wanted {name}, found {error}. Fix: pip install it, or remove the logger."
            ) from None
        except TypeError as error:
            raise RequestError(
                f"search.loggers.{name}: wanted options of Ray's logger callback, found {error}. Fix: write those that it knows."
            ) from None
    return result
