"""A short shoot with a fault every second; tests/faults/shoot.py makes a day of it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "faults"))

import shoot

LONG = bool(os.environ.get("HOTPIXD_LONG"))

pytestmark = pytest.mark.timeout(3600 if LONG else 300)


def test_a_shoot_with_a_fault_every_second_ends_as_one_without() -> None:
    """Digests, transitions and verdicts are those of a fold in one go; every alert came once; nothing grew."""
    findings = shoot.shot(3000 if LONG else 200, fault_every_s=0.7, pace_s=0.05)
    assert findings.wrong == []
    assert findings.faults.total() >= 5
    assert findings.alerts
    if LONG:
        assert shoot.growth(findings.samples)[1] == []


@pytest.mark.parametrize("what", list(shoot.SABOTAGE) if LONG else list(shoot.SABOTAGE)[:1])
def test_a_product_that_is_wrong_on_purpose_is_found_out(what: str) -> None:
    """Negative controls: the comparison at the end can fail."""
    assert shoot.sabotaged(what, 300 if LONG else 120).wrong
