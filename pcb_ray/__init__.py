"""Merge large fine-tuned models by PCB-Merging on a Ray cluster: exact over the whole model, in bounded memory, resumable."""

from pcb_ray.errors import RequestError, RunError
from pcb_ray.merging import merge, merge_state_dicts, verify
from pcb_ray.planning import plan
from pcb_ray.recipe import Model, Recipe
from pcb_ray.searching.run import search, sweep

__all__ = ["Model", "Recipe", "RequestError", "RunError", "merge", "merge_state_dicts", "plan", "search", "sweep", "verify"]
