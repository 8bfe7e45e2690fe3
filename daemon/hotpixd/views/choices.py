"""What the user has chosen to see on the dashboard, and how keys change it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, TypeVar

Live = Mapping[str, Any]
"""The live state of the daemon by key."""

Defect = Mapping[str, Any]
"""A candidate, stable or recovered, as the live state describes it."""

MOST_LISTED = 1000
"""Defects of a sensor in the live state: the most certain ones."""

_Choice = TypeVar("_Choice")


class Order(StrEnum):
    """What the list is sorted by."""

    CERTAINTY = "certainty"
    EXCESS = "excess"
    POSITION = "position"
    FIRST_SEEN = "first seen"


class Filter(StrEnum):
    """Which states the list shows."""

    ALL = "all"
    STABLE = "stable"
    CANDIDATE = "candidate"
    RECOVERED = "recovered"


class Page(StrEnum):
    """What fills the screen."""

    MAIN = "main"
    LOG = "log"
    HELP = "help"


@dataclass(frozen=True, slots=True)
class View:
    """What the user has chosen to see."""

    sensor: str | None = None
    """Id of the sensor shown; None until one is known."""

    site: int | None = None
    """The selected site; None if the list is empty."""

    picked: bool = False
    """Whether the user has moved the selection. Until then it is the top of the list, whatever comes to stand there."""

    index: int = 0
    """Where in the list the selected site was last: its heir, if it leaves the list, is who stands there then."""

    order: Order = Order.CERTAINTY
    only: Filter = Filter.ALL
    page: Page = Page.MAIN

    scroll: int = 0
    """Lines of a long page that are above the screen."""


_SORT_KEYS: Mapping[Order, Callable[[Defect], Any]] = {
    Order.CERTAINTY: lambda d: (-(d["certainty"] or 0.0), -abs(d["excess_sigma"] or 0.0), d["site"]),
    Order.EXCESS: lambda d: (-abs(d["excess_sigma"] or 0.0), d["site"]),
    Order.POSITION: lambda d: (d["y"], d["x"], d["site"]),
}


def arranged(live: Live, view: View) -> list[Defect]:
    """Return the defects of the view's sensor that its filter lets through, in its order."""
    defects: Sequence[Defect] = live.get(f"defects:{view.sensor}") or ()
    shown = [d for d in defects if view.only in (Filter.ALL, d["state"])]
    if view.order is Order.FIRST_SEEN:
        # The newest first: it is what one wants to see of a long list.
        return sorted(shown, key=lambda d: (d["first_seen"] or "", -d["site"]), reverse=True)
    return sorted(shown, key=_SORT_KEYS[view.order])


def settled(live: Live, view: View) -> tuple[View, list[Defect]]:
    """Return the view with a sensor and a site that exist, and its list.

    A sensor is kept once shown: two cameras in use at once must not make the screen flip between them.
    """
    sensors: Sequence[str] = live.get("sensors") or ()
    if view.sensor not in sensors:
        view = replace(view, sensor=sensors[0] if sensors else None, site=None, picked=False, index=0)
    defects = arranged(live, view)
    sites = [d["site"] for d in defects]
    if not sites:
        return replace(view, site=None), defects
    index = 0
    if view.picked:
        index = sites.index(view.site) if view.site in sites else min(view.index, len(sites) - 1)
    return replace(view, index=index, site=sites[index]), defects


def pressed(view: View, key: str, live: Live, defects: Sequence[Defect], rows: int, scroll_limit: int) -> View:
    """Return the view after a key.

    Parameters
    ----------
    view, defects : from `settled`
    key : as `terminal.KeyParser` names it; one without a meaning changes nothing
    rows : of the list (or lines of a long page) on the screen, by which a page up or down moves
    scroll_limit : lines by which a long page is longer than the screen
    """
    match key:
        case "s":
            return replace(view, order=_next(list(Order), view.order))
        case "f":
            return replace(view, only=_next(list(Filter), view.only))
        case "n" | "tab" | "N" | "shift-tab":
            ids = sorted(live.get("sensors") or ())
            if len(ids) < 2 or view.sensor is None:
                return view
            other = _next(ids, view.sensor, 1 if key in ("n", "tab") else -1)
            return replace(view, sensor=other, site=None, picked=False, index=0)
        case "h" | "?":
            return _turned(view, Page.HELP)
        case "a":
            return _turned(view, Page.LOG)
        case "escape":
            return replace(view, page=Page.MAIN)
    if view.page is not Page.MAIN:
        scroll = _moved(view.scroll, key, rows, scroll_limit)
        return view if scroll is None else replace(view, scroll=scroll)
    index = _moved(view.index, key, rows, len(defects) - 1)
    if not defects or index is None:
        return view
    return replace(view, picked=True, index=index, site=defects[index]["site"])


def _moved(at: int, key: str, rows: int, last: int) -> int | None:
    """Return where a key leads to from `at`, within 0 to `last`. None if it does not lead anywhere."""
    to = {
        "up": at - 1, "k": at - 1, "down": at + 1, "j": at + 1, "page up": at - rows, "page down": at + rows,
        "home": 0, "g": 0, "end": last, "G": last,
    }.get(key)  # fmt: skip
    return None if to is None else max(min(to, last), 0)


def _turned(view: View, page: Page) -> View:
    return replace(view, page=Page.MAIN if view.page is page else page, scroll=0)


def _next(values: list[_Choice], value: _Choice, step: int = 1) -> _Choice:
    return values[(values.index(value) + step) % len(values)]
