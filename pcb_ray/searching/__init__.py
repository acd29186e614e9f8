"""The search: coefficients of a merge found by Ray Tune with Nevergrad's CMA-ES, over candidates that are never read again."""
