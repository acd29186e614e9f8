"""A method's passes in order: from owners that answer questions to what must be known of the whole model before a block can be
merged."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Sequence

from pcb_ray.errors import InputError
from pcb_ray.methods import Extrema, Known, Ranks, Sums
from pcb_ray.questions import LARGEST_KEY, AddUp, CountKeys, DifferingTwins, FindExtremes, SampleKeys, value_of_key
from pcb_ray.selection import Bracket
from pcb_ray.session import Session
from pcb_ray.tied import Apart

log = logging.getLogger("pcb_ray")

TWINS = "stored copies of tied tensors equal their originals"


def analyse(session: Session, known: Known | None = None, keep: Callable[[Known], None] = lambda _known: None) -> Known:
    """What the method of the session's plan must know, by name. What is `known` already is not found again; `keep` is called after
    each pass.

    Raises InputError if what was found shows that the inputs can't be merged, or if stored copies of tied tensors differ."""
    plan, method = session.plan, session.plan.method
    before, known = known or {}, {}
    if not before and (apart := differing(session)):
        raise InputError(
            [
                f"{plan.inputs[one.input].source}: wanted {one.copy} equal to {one.original}, as in a sample of both, found copies "
                "that differ elsewhere. Fix: let `pcb_ray.merging.settled` plan anew with them apart, as merge and search do."
                for one in sorted(apart)
            ]
        )
    for step, wanted in enumerate(method.passes):
        key = _decided_by(session, step, known)
        if is_old := all(name in before for name in wanted.gives):
            session.found[key] = {name: before[name] for name in wanted.gives}
        found = session.found.get(key)
        if found is None:
            if isinstance(wanted, Ranks):
                found = _ranks(session, step, wanted, known)
            elif isinstance(wanted, Extrema):
                found = _extrema(session, step, wanted, known)
            else:
                found = _sums(session, step, wanted, known)
            session.found[key] = found
        known = {**known, **found}  # a new one: kernels know by its identity what they have prepared
        if is_old:
            continue
        if problems := method.refuse(known, plan.settings, plan.names):
            raise InputError(problems)
        keep(known)
    return known


def differing(session: Session) -> frozenset[Apart]:
    """The stored copies that differ after all, by all of their bytes: found once for a session. Raises InputError for those that
    the model's own config declares to be one."""
    twins = session.plan.twins
    if TWINS in session.found or not twins:
        return frozenset()
    numbers = sorted(n for _, answer in session.owners.ask(DifferingTwins(), range(len(twins))) for n in answer)
    if wrong := [twins[n].complaint(session.plan.inputs[twins[n].input].source) for n in numbers if twins[n].declared]:
        raise InputError(wrong)
    if not numbers:
        session.found[TWINS] = {}  # it holds for all plans that read the same
    return frozenset(Apart(twins[n].input, twins[n].copy.name, twins[n].original.name) for n in numbers)


def _decided_by(session: Session, step: int, known: Known) -> object:
    """All that the result of a pass depends on, apart from the models: equal keys have equal results."""
    plan, wanted = session.plan, session.plan.method.passes[step]
    names = plan.settings.parameters if wanted.parameters is None else wanted.parameters
    settings = repr([(name, plan.settings.each(name)) for name in sorted(names)])
    places = session.plan.places(wanted) if isinstance(wanted, Ranks) else ()
    return plan.method.full_name, plan.recipe.code, step, settings, repr(places), tuple(sorted(known.items()))


def _ranks(session: Session, step: int, wanted: Ranks, known: Known) -> dict[str, tuple[float, ...]]:
    """For each model the values of the quantity at the wanted ranks over the whole model, exactly."""
    plan, quantity = session.plan, wanted.quantity
    places, bits, largest_key = plan.places(wanted), quantity.bits, LARGEST_KEY[quantity.bits]
    smallest_key = 0 if quantity.magnitude else -largest_key
    open_ranks = {(i, name): Bracket(smallest_key, largest_key) for i in range(plan.N) for name in wanted.places}
    sizes = plan.sizes
    # A sample of whole tensors would be the model.
    if sizes.tally_entries < plan.D and plan.method.unit != "tensor":
        share = sizes.sample_run / sizes.sample_stride
        sampled = session.total(f"sample of {quantity.name}", SampleKeys(step, known), share)
        for i, name in open_ranks:
            sample = sampled.of_model[i]
            open_ranks[i, name] = sample.bracket(places[i][name], plan.D, smallest_key, largest_key, sizes.tally_entries)
    found: dict[tuple[int, str], int] = {}
    largest: list[int] = []
    while open_ranks:
        asked = [_distinct([b for (i, _), b in open_ranks.items() if i == model]) for model in range(plan.N)]
        counted = session.total(wanted.title, CountKeys(step, known, tuple(map(tuple, asked)), session.relates))
        session.saw_inputs(counted.digests, wanted.title, counted.gram)
        largest = largest or counted.largest
        for (i, name), bracket in list(open_ranks.items()):
            answer = counted.tallies[i][asked[i].index(bracket)].select(places[i][name], smallest_key, largest_key)
            if isinstance(answer, Bracket):
                log.info("the sample misjudged the rank of %s of %s; one more sweep finds it", name, plan.names[i])
                open_ranks[i, name] = answer
            else:
                found[i, name] = answer
                del open_ranks[i, name]
    values = {name: tuple(value_of_key(found[i, name], bits) for i in range(plan.N)) for name in wanted.places}
    return values | ({wanted.largest: tuple(value_of_key(key, bits) for key in largest)} if wanted.largest else {})


def _distinct(brackets: Sequence[Bracket]) -> list[Bracket]:
    return sorted(set(brackets), key=lambda b: (b.lo, b.hi))


def _extrema(session: Session, step: int, wanted: Extrema, known: Known) -> dict[str, tuple[float, ...]]:
    found = session.total(wanted.title, FindExtremes(step, known, session.relates))
    session.saw_inputs(found.digests, wanted.title, found.gram)
    return {wanted.smallest: tuple(found.smallest), wanted.largest: tuple(found.largest)}


def _sums(session: Session, step: int, wanted: Sums, known: Known) -> dict[str, tuple[float, ...]]:
    plan = session.plan
    found = session.total(wanted.title, AddUp(step, known, session.relates))
    session.saw_inputs(found.digests, wanted.title, found.gram)
    if wanted.per == "model":
        of_all = [_exact_sums(found.of_piece.values())]
    else:
        of_cells: list[list[tuple[float, ...]]] = [[] for _ in plan.tensors]
        for first, sums in sorted(found.of_piece.items()):
            of_cells[next(plan.segments(first, first + 1)).tensor].append(sums)
        of_all = [_exact_sums(cells) for cells in of_cells]
    return {name: tuple(x for sums in of_all for x in sums[rows(plan.N)]) for name, rows in wanted.names.items()}


def _exact_sums(rows: Iterable[tuple[float, ...]]) -> tuple[float, ...]:
    """The sum of each column, rounded once: no order shows in it."""
    return tuple(math.fsum(column) for column in zip(*rows, strict=True))
