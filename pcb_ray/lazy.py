"""A module that is imported when it is first used.

The driver of a merge reads what methods say of themselves, but computes nothing: it is spared torch, its seconds and its memory.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any


class LazyModule(ModuleType):
    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module(self.__name__), name)
