"""Names every place of the product at which something is fsynced: by module, function and number in it."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

_CALLS = ("fsync", "fsync_file", "fsync_folder")


@functools.cache
def sites_of(path: str) -> dict[int, str]:
    """Return the sites of a file of the product by their lines; none of other files."""
    file = Path(path)
    if "hotpixd" not in file.parts or not file.is_file():
        return {}
    return {line: name for line, name in _sites(file) if not name.startswith("durable.fsync_")}


def all_sites(package: Path) -> set[str]:
    """Return all sites of the product. Those that serve several steps are one for each step."""
    found: set[str] = set()
    for file in package.rglob("*.py"):
        found.update(sites_of(str(file)).values())
    steps = {step for file in package.rglob("*.py") for step in _steps(file)}
    shared = {site for site in found if site.startswith("durable.replace_durably")}
    return found - shared | {f"{site} {step}" for site in shared for step in steps}


def _sites(file: Path) -> Iterator[tuple[int, str]]:
    for function in ast.walk(ast.parse(file.read_text("utf-8"))):
        if not isinstance(function, ast.FunctionDef):
            continue
        lines = sorted({call.lineno for call in ast.walk(function) if isinstance(call, ast.Call) and _fsyncs(call)})
        for number, line in enumerate(lines, 1):
            yield line, f"{file.stem}.{function.name}" + (f"#{number}" if len(lines) > 1 else "")


def _fsyncs(call: ast.Call) -> bool:
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    return name in _CALLS


def _steps(file: Path) -> Iterator[str]:
    """Return the steps for which `replace_durably` is called."""
    for call in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "replace_durably":
            given = [word.value for word in call.keywords if word.arg == "step"]
            yield given[0].value if given and isinstance(given[0], ast.Constant) else "file"
