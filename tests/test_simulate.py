"""The virtual camera: its defects behave as planted, its files read back as shot."""

from __future__ import annotations

import numpy as np

from hotpixd.simulate import VirtualSensor


def test_a_shot_needs_no_other_shot():
    """The same numbers give the same samples, whatever was shot before."""
    one = VirtualSensor(120, 80, hot=5, stuck=1, dead=1, unstable=1, seed=7)
    other = VirtualSensor(120, 80, hot=5, stuck=1, dead=1, unstable=1, seed=7)
    one.shot(0, "moving")
    assert one.defects == other.defects
    assert np.array_equal(one.shot(3, "moving").mosaic, other.shot(3, "moving").mosaic)
