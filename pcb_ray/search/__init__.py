"""The search: coefficients of a merge found by Ray Tune with Nevergrad's CMA-ES, over candidates that are never read again."""

from pcb_ray.search.run import search, sweep

__all__ = ["search", "sweep"]
