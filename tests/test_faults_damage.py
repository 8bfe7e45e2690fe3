"""A part of the campaign that damages every region of every file of a state; `tests/faults/damage.py` does all."""

from __future__ import annotations

import importlib.util
import random
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

_HARNESS = Path(__file__).with_name("faults") / "damage.py"

_AT_A_TIME = 70
"""Of some thousand damages; always the same."""


@pytest.fixture(scope="module")
def damage() -> ModuleType:
    """The harness."""
    spec = importlib.util.spec_from_file_location("damage", _HARNESS)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["damage"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def ground(damage: ModuleType) -> Iterator[Any]:
    """The state that is damaged; in memory, where nobody waits for a disk."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        yield damage.Ground(Path(folder))


def test_damage_is_cured_or_told(damage, ground):
    """One of each sort of damage to each sort of file, and some more at random places."""
    every = damage.damages(ground, 4)
    dice = random.Random(2)
    dice.shuffle(every)
    # Those that are rare first: all that is not a position in a file.
    first = {}
    for one in every:
        first.setdefault((damage._role(one.file), one.what), one)
    whole = [one for key, one in first.items() if "replaced" in key[1] or "removed" in key[1] or "version" in key[1]]
    places = [one for one in every if one not in whole]
    chosen = whole + places[: max(_AT_A_TIME - len(whole), 25)]
    wrong = {f"{one.file}: {one.what}": found for one in chosen if (found := damage.wrong_with(ground, one)[0])}
    assert wrong == {}


@pytest.mark.parametrize(
    "name",
    ["rows without seals", "generations without a digest", "generations not tied to their ledger",
     "a log that nothing is expected of"],
)  # fmt: skip
def test_without_a_check_damage_goes_unnoticed(damage, ground, name):
    """Or the harness could not tell."""
    switch_off, concerned = damage.CONTROLS[name]
    chosen = [one for one in damage.damages(ground, 12) if concerned(one)]
    random.Random(0).shuffle(chosen)
    with switch_off():
        assert any(damage.wrong_with(ground, one)[0] for one in chosen[:60])
