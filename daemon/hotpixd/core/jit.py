"""numba as all compiled loops use it, without what it would load for nothing."""

from __future__ import annotations

import importlib
import sys
from typing import Any

FAST: dict[str, Any] = {"boundscheck": False, "nogil": True, "error_model": "numpy", "cache": True}
"""Options of a loop: nogil, so that two threads take two halves of the rows."""


def _numba() -> Any:
    """Import numba; keep it from SciPy, of which it takes the linear algebra, wherever that is installed.

    No loop has any, and every start took 0.3 s of processor time longer, a fifth of it.
    """
    hidden = "scipy" not in sys.modules
    if hidden:
        # As the documentation of `import` has it: what is None there cannot be imported.
        sys.modules["scipy"] = None  # type: ignore[assignment]
    try:
        importlib.import_module("numba.np.arraymath")
        return importlib.import_module("numba")
    finally:
        if hidden:
            del sys.modules["scipy"]


nb = _numba()
