"""Merge large fine-tuned models by PCB-Merging on a Ray cluster: exact over the whole model, in bounded memory, resumable."""

from pcb_ray.errors import RequestError, RunError
from pcb_ray.in_memory import merge_state_dicts
from pcb_ray.many import Merged, merge_many
from pcb_ray.merging import merge
from pcb_ray.planning import plan
from pcb_ray.receipt import Receipt, Verified
from pcb_ray.recipe import Model, Recipe
from pcb_ray.searching.results import Found, Swept
from pcb_ray.searching.run import search, sweep
from pcb_ray.verifying import verify

__all__ = [
    "Found", "Merged", "Model", "Receipt", "Recipe", "RequestError", "RunError", "Swept", "Verified", "merge", "merge_many",
    "merge_state_dicts", "plan", "search", "sweep", "verify",
]  # fmt: skip
