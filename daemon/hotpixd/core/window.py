"""The window of a sample and the grid of positions: what the kernels and those who read their results agree on."""

from __future__ import annotations

HALF_WINDOW = 3
"""Plane rows and columns on either side of a sample in its window."""

WINDOW = 2 * HALF_WINDOW + 1
"""Width of the window: a sample has WINDOW**2 - 1 = 48 neighbours of its plane."""

PHASE_ROWS, PHASE_COLS = 16, 48
"""Extremes are counted by position in this grid of samples: JPEG codes blocks of 8 or 16 pixels of 3 samples."""
