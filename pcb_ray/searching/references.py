"""What is scored outside of trials: the base before anything expensive, and what the winner is compared with."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping
from typing import Any

from pcb_ray.errors import RequestError, RunError, reason_in, with_place
from pcb_ray.methods import Known
from pcb_ray.nodes import nodes, shown_nodes
from pcb_ray.output.state import Place, State
from pcb_ray.progress import CountBar
from pcb_ray.schedule import Patience
from pcb_ray.searching.request import Config, key_of
from pcb_ray.searching.results import Scores
from pcb_ray.searching.scorer import Job

log = logging.getLogger("pcb_ray")

PATIENCE = Patience()
MOST_TRIES = 3
_One = tuple[str, str]
"""What is scored by its name, and the split."""


def dry_score(job: Job, state: State[Place], *, quiet: bool) -> Scores:
    """The base on both splits, before anything expensive: a wrong evaluator shows itself here."""
    if state.found.get("base", {}).get("by") == job.scored_by:
        known: Scores = state.found["base"]["scores"]
        return known
    request, scores = job.search, dict[str, Any]()
    asked: dict[_One, int | Config] = {("base", split): 0 for split in request.splits.values()}
    bar = CountBar("score of the base", len(asked), "splits", quiet=quiet)
    with contextlib.closing(bar), contextlib.closing(_Scorers(job, 1)) as scorers:
        for (_, split), found in scorers.score(asked):
            if isinstance(found, RequestError):
                raise found
            if isinstance(found, RunError):
                fix = "make the evaluator score the base model"
                raise RequestError(f"search.evaluator: wanted a score of the base, found that {found}. Fix: {fix}.")
            if isinstance(found, Exception):
                fix = "see that the model fits in memory, and that the evaluator does not end its process"
                raise RequestError(
                    f"search.evaluator: wanted a score of the base, found that the process died ({reason_in(found)}). Fix: {fix}."
                ) from found
            if not math.isfinite(value := found[request.metric]):
                raise RequestError(
                    f"search.metric: wanted a finite {request.metric} of the base on {split}, found {value}. "
                    "Fix: make it a number; candidates are compared by it."
                )
            scores[split] = found
            bar.advance(f"{request.metric} {value:.5g} on {split}")
    state.found["base"] = {"by": job.scored_by, "scores": scores}
    state.save()
    return scores


def references(
    job: Job, state: State[Place], base: Scores, records: list[dict[str, Any]], best: Mapping[str, Any], *, quiet: bool
) -> tuple[dict[str, Scores], dict[str, Any]]:
    """The scores of base, experts, start and winner on both splits; and the winner's config: the best of start and trials.

    What can't be scored has no metrics, with a warning: the search is not lost for it."""
    from pcb_ray.searching import tune

    request, space = job.search, job.space
    splits = (request.search_split, request.report_split)
    inputs: dict[str, int | Config] = {label: i + 1 for i, label in enumerate(space.labels)} | {"start": space.start}
    asked = {(name, split): what for name, what in inputs.items() for split in splits} | {("winner", splits[1]): best["config"]}
    found = {("winner", splits[0]): best["metrics"]}
    if records[0]["config"] == space.start and not records[0]["error"]:
        found["start", splits[0]] = records[0]["metrics"]
    if best["config"] == space.start:
        del asked["winner", splits[1]]
    entries = {one: f"reference {job.scored_by} {one[0]} {one[1]} {_key(what)}" for one, what in asked.items()}
    found |= {
        one: json.loads(state.journal[entry]) for one, entry in entries.items() if entry in state.journal and one not in found
    }
    left = {one: what for one, what in asked.items() if one not in found}
    bar = CountBar("scores to compare with", len(left), "scores", quiet=quiet)
    at_a_time = min(tune.check_resources(request, job.pool), len(left))
    with contextlib.closing(bar), contextlib.closing(_Scorers(job, at_a_time)) as scorers:
        for one, metrics in scorers.score(left):
            bar.advance(" on ".join(one))
            if isinstance(metrics, Exception):
                own = isinstance(metrics, RequestError | RunError)  # and all of it is worth telling
                log.warning("%s has no score on %s: %s", *one, " ".join(str(metrics).split()) if own else reason_in(metrics))
                found[one] = {}
            else:
                found[one] = metrics
                state.wrote({entries[one]: json.dumps(metrics)})
    scores: dict[str, Scores] = {"base": base} | {name: {split: found[name, split] for split in splits} for name in inputs}
    of_start = scores["start"][splits[0]].get(request.metric, math.nan)
    if request.better * of_start >= request.better * best["objective"]:
        return scores | {"winner": scores["start"]}, space.start
    return scores | {"winner": {split: found["winner", split] for split in splits}}, dict(best["config"])


def known_of(job: Job, best: Config) -> Known:
    """What is known at the density of a candidate, found where the basis is. Raises RunError."""
    import ray

    task = ray.remote(_known_of).options(**job.pool.options(job.search.amounts), max_retries=MOST_TRIES)
    try:
        found: Known = ray.get(task.remote(job, best), timeout=PATIENCE.start_s)
    except ray.exceptions.GetTimeoutError:
        raise RunError(
            f"search: wanted the thresholds of the winner within {PATIENCE.start_s:.0f} s, found no answer. Fix: see what holds "
            "the cluster's nodes, then go on with --resume."
        ) from None
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    except ray.exceptions.RayError as error:
        raise RunError(
            f"search: wanted the thresholds of the winner, found: {reason_in(error)}. Fix: go on with --resume."
        ) from error
    return found


def _known_of(job: Job, best: Config) -> Known:
    from pcb_ray.searching.nearby import Nearby
    from pcb_ray.searching.scorer import basis_of

    candidate = job.space.candidate(best)
    variant = candidate.variant or job.space.recipe.parameters.get("variant", "")
    with contextlib.closing(Nearby(job.material)) as nearby:
        return basis_of(job, variant, nearby).known(candidate.density, threads=max(1, int(job.search.cpu)))


def _key(what: int | Config) -> str:
    return str(what) if isinstance(what, int) else key_of(what)


class _ScorerActor:
    """A scorer as a Ray actor, for what is scored outside of trials."""

    def __init__(self, job: Job) -> None:
        from pcb_ray.searching.scorer import Scorer
        from pcb_ray.searching.trial import prepare_process

        prepare_process(job)
        self._start = lambda: Scorer(job)
        self._scorer: Any = None

    def is_there(self) -> None:
        """Answers once the actor has been placed."""

    def score(self, what: int | Config, split: str) -> dict[str, float]:
        """The metrics of the base (0), a model (1..N), or a candidate. Raises RequestError, or RunError with what was raised."""
        try:
            self._scorer = self._scorer or self._start()
            if isinstance(what, int):
                return dict(self._scorer.score_input(what, split))
            return dict(self._scorer.score(self._scorer.job.space.candidate(what), split)[0])
        except RequestError:
            raise
        except Exception as error:  # the evaluator's
            from pcb_ray.searching.trial import is_spoiled

            if is_spoiled():
                os._exit(1)
            doing = f"score({split!r})" if self._scorer else "load()"
            raise RunError(f"{doing} raised {with_place(error)}") from None


class _Scorers:
    """Some of them, at work on one thing each."""

    def __init__(self, job: Job, count: int) -> None:
        import ray

        from pcb_ray.searching.tune import shown_resources

        self._actor: Any = ray.remote(_ScorerActor).options(**job.pool.options(job.search.amounts))
        self._job = ray.put(job)
        self._waits_for = shown_resources(job.search, job.pool)
        self._starting: dict[Any, Any] = {}  # what tells that it is there -> scorer
        self._idle: list[Any] = []
        self._busy: dict[Any, tuple[Any, _One, bool]] = {}  # answer -> scorer, what it scores, whether it may be asked again
        for _ in range(count):
            self._add()

    def _add(self) -> None:
        scorer = self._actor.remote(self._job)
        self._starting[scorer.is_there.remote()] = scorer

    def score(self, asked: Mapping[_One, int | Config]) -> Iterator[tuple[_One, dict[str, float] | Exception]]:
        """The metrics of each (name, split), or what scoring it raised, or the RayError of a scorer that died.

        Such a scorer gets a successor, which is asked once more.
        Raises RunError if the cluster has no place for one."""
        import ray

        waiting, last_sign = [(one, True) for one in asked], time.monotonic()
        readers: dict[str, Any] = {}  # name -> the scorer that has read it, for one split, and scores it on the other
        while waiting or self._busy:
            for scorer in list(self._idle):
                if (
                    k := next((k for k, (one, _) in enumerate(waiting) if readers.get(one[0], scorer) is scorer), None)
                ) is not None:
                    one, again = waiting.pop(k)
                    readers[one[0]] = scorer
                    self._idle.remove(scorer)
                    self._busy[scorer.score.remote(asked[one], one[1])] = (scorer, one, again)
            ready, _ = ray.wait([*self._busy, *self._starting], timeout=5.0)
            if self._busy or ready:
                last_sign = time.monotonic()
            elif time.monotonic() - last_sign > PATIENCE.placement_s:
                raise RunError(
                    f"search.resources_per_trial: wanted a process with {self._waits_for}, found no place for it in "
                    f"{PATIENCE.placement_s:.0f} s: other jobs may hold what the cluster has ({shown_nodes(nodes())}). "
                    "Fix: free some, then go on with --resume."
                )
            for answer in ready:
                if answer in self._starting:
                    self._idle.append(self._starting.pop(answer))  # one that has died by now says so when it is asked
                    continue
                scorer, one, again = self._busy.pop(answer)
                try:
                    found = dict(ray.get(answer, timeout=PATIENCE.exchange_s))
                except ray.exceptions.RayTaskError as error:
                    self._idle.append(scorer)
                    yield one, error.cause
                except ray.exceptions.RayError as error:
                    readers = {name: reader for name, reader in readers.items() if reader is not scorer}
                    self._add()
                    if again:
                        waiting.append((one, False))
                    else:
                        yield one, error
                else:
                    self._idle.append(scorer)
                    yield one, found

    def close(self) -> None:
        import ray

        for scorer in (*self._idle, *self._starting.values(), *(scorer for scorer, _, _ in self._busy.values())):
            ray.kill(scorer)
