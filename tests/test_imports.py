"""Who may import whom: read from the source, so that a stray import fails here and not in a user's terminal."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

import hotpixd

ROOT = Path(hotpixd.__file__).parent

MAY_IMPORT = {
    "core": {"core"},
    "store": {"durable", "store", "words"},
    "durable": set(),
    "words": set(),
    "intake": {"core", "durable", "intake", "words"},
    "archive": {"archive", "core", "durable", "store", "words"},
    "views": {"archive", "core", "durable", "store", "views", "words"},
    "monitor": {"archive", "core", "durable", "intake", "monitor", "store"},
    "simulate": {"core", "simulate"},
    "feed": {"feed"},
    "alerts": {"alerts", "core", "durable", "store", "words"},
    "metrics": {"metrics", "scrape"},
    "scrape": {"scrape"},
    "systemd": {"systemd"},
}
"""Parts of ours by part; those not named, such as the cli, may import any."""

NOT_IN_CORE = {"io", "logging", "os", "pathlib", "rich", "sqlite3", "threading", "time"}
"""Core is handed arrays and returns records: no files, clocks, threads, logs or terminals."""

HEAVY = ("PIL", "astropy", "gphoto2", "numba", "numpy", "rawpy")
"""Imported where they are used: help and completion answer at once."""

MODULES = sorted(ROOT.rglob("*.py"))


def part_of(name: str) -> str:
    """Return the part a dotted name of ours belongs to: "hotpixd.core.frame" is of "core"."""
    if name.startswith("hotpixd.store.durable"):
        # What every durable write goes through, wherever it is made. It knows nobody, and belongs to no other part.
        return "durable"
    return name.partition(".")[2].partition(".")[0]


def imported(source: str, package: str) -> set[str]:
    """Return the dotted names that a module of `package` imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            # What is taken from the top package, or from a part, may be a module.
            names.update(f"{base}.{alias.name}" for alias in node.names)
    return names


def stray(source: str, module: str, package: str) -> set[str]:
    """Return the imports of a module that its part may not make."""
    part = part_of(module)
    names = imported(source, package)
    ours = {name for name in names if name.partition(".")[0] == "hotpixd"}
    allowed = MAY_IMPORT.get(part)
    wrong = set() if allowed is None else {name for name in ours if part_of(name) not in {*allowed, "__version__"}}
    if part == "core":
        wrong |= {name for name in names if name.partition(".")[0] in NOT_IN_CORE}
    return wrong


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_only_what_its_part_may(path: Path):
    """Core knows nobody, the store nobody, views never the monitor: see MAY_IMPORT."""
    parts = ("hotpixd", *path.relative_to(ROOT).with_suffix("").parts)
    package = ".".join(parts[:-1])
    assert not stray(path.read_text(encoding="utf-8"), ".".join(parts), package)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("hotpixd.core.sensor", "from hotpixd.store import ledger"),
        ("hotpixd.core.sensor", "from ..intake.decode import decode"),
        ("hotpixd.core.sensor", "def f():\n    import os.path"),
        ("hotpixd.core.sensor", "from pathlib import Path"),
        ("hotpixd.store.ledger", "import hotpixd.core.frame"),
        ("hotpixd.intake.decode", "from hotpixd import store"),
        ("hotpixd.views.dashboard", "from hotpixd.monitor import feed"),
        ("hotpixd.views.dashboard", "from .. import monitor"),
        ("hotpixd.intake.camera", "from hotpixd.store import spool"),
        ("hotpixd.monitor", "from hotpixd.views import dashboard"),
        ("hotpixd.simulate", "from hotpixd.intake.decode import decode"),
    ],
)
def test_a_stray_import_is_found(module: str, source: str):
    """However it is written: absolute, relative, within a function, a module taken from its package."""
    assert stray(source, module, module.rpartition(".")[0])


def test_the_command_line_starts_without_heavy_libraries():
    """`hotpixd --help` need not wait for numba, nor for a decoder."""
    if importlib.util.find_spec("hotpixd.cli") is None:
        pytest.skip("hotpixd.cli does not exist yet")
    code = f"import sys, hotpixd.cli; print(*(name for name in {HEAVY} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
