"""The statistics. Pure: arrays and settings in, records out; no files, clocks, threads or terminals."""

from __future__ import annotations

import importlib
from types import ModuleType


def __getattr__(name: str) -> ModuleType:
    # numba takes longer to load than anything else, and who only asks a state needs none of it.
    if name == "kernels":
        return importlib.import_module("hotpixd.core.kernels")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
