"""A one-off run over files and folders: shots in, a progress bar meanwhile, what was found at the end."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from hotpixd.core.frame import SampleKind, ShotKind
from hotpixd.intake.decode import DecodeError
from hotpixd.intake.files import Listing, find_shots
from hotpixd.monitor import Fate, Monitor, Outcome
from hotpixd.store.state import State
from hotpixd.views import answers, tables
from hotpixd.views.text import plain_console, printable
from hotpixd.words import many

_REFUSALS_SHOWN = 20
_DEFECTS_SHOWN = 20


def find(wanted: list[str], kind: str | None, ignore: tuple[str, ...] = ()) -> Listing | int:
    """Return the shots that some paths lead to; if there are none, say so and return the exit code.

    Parameters
    ----------
    wanted : files, folders, glob patterns
    kind : "light" or "dark", if the user says so
    ignore : see `find_shots`
    """
    return _some_of(find_shots(wanted, None if kind is None else ShotKind(kind), ignore), wanted, ignore)


def run_scan(
    state: State, listing: Listing, stop: Callable[[], bool], *, on_disk: bool = False, luma: bool = False
) -> int | None:
    """Fold shots and print what was found; return the exit code, None if it was stopped before the last shot.

    Parameters
    ----------
    listing : of `find`
    stop : becomes true when the user wants to stop
    on_disk, luma : see `Monitor`
    """
    return _scan(state, listing, lambda: Monitor(state, on_disk=on_disk, luma=luma), stop, luma=luma)


def run_cluster_scan(
    opened: Callable[[], AbstractContextManager[State]],
    address: str,
    wanted: list[str],
    kind: str | None,
    stop: Callable[[], bool],
    *,
    ignore: tuple[str, ...] = (),
    luma: bool = False,
) -> int | None:
    """Do as `find` and `run_scan` do, on a cluster.

    Parameters
    ----------
    opened : opens the state, once the cluster has answered and there are shots: nothing else must begin one
    address : see `cluster.connection.connected`
    wanted : URLs too
    ignore : see `find_shots`
    luma : see `Monitor`
    """
    from hotpixd.cluster.connection import ClusterError, connected
    from hotpixd.cluster.inputs import InputError, find_inputs

    try:
        with connected(address) as client:
            # The cluster first: where its extra is missing, this may be what URLs lack as well.
            from hotpixd.cluster.coordinator import ClusterMonitor

            inputs = find_inputs(wanted, None if kind is None else ShotKind(kind), ignore)
            listing = _some_of(inputs.listing, wanted, ignore, remote=True)
            if isinstance(listing, int):
                return listing
            with opened() as state:
                return _scan(
                    state, listing, lambda: ClusterMonitor(state, client, inputs.marks, luma=luma), stop, luma=luma
                )
    except (ClusterError, InputError) as error:
        _say(plain_console(stderr=True), str(error))
        return 2


def _some_of(listing: Listing, wanted: list[str], ignore: tuple[str, ...], *, remote: bool = False) -> Listing | int:
    console = plain_console(stderr=True)
    if listing.missing:
        for text in listing.missing:
            _say(console, _why_missing(text, remote=remote))
        return 2
    for folder, reason in listing.unreadable:
        _say(console, f"{folder} cannot be listed: {reason}")
    if not listing.shots:
        others = " but for what --ignore leaves out" if ignore else ""
        _say(console, f"there are no pictures in {', '.join(wanted)}{others}")
        return 1 if listing.unreadable else 2
    return listing


def _why_missing(text: str, *, remote: bool) -> str:
    """Say what is at a path that leads to no file or folder; `remote`: URLs were followed."""
    # Paths as they were given: Path takes the second slash away from a URL.
    if os.path.exists(text):  # noqa: PTH110
        return f"{text} is a special file (a pipe, a socket or a device), which is not opened"
    if os.path.islink(text):  # noqa: PTH114
        return f"{text} is a link that leads to nothing"
    if "://" in text and not remote:
        return f"{text} is a remote address, which only scan --cluster reads (--cluster local on this machine)"
    return f"nothing is at {text}"


def _scan(
    state: State, listing: Listing, start: Callable[[], Monitor], stop: Callable[[], bool], *, luma: bool
) -> int | None:
    console = plain_console(stderr=True)
    outcomes: list[Outcome] = []
    changes: Counter[str] = Counter()
    with start() as monitor:
        # What was imported stays; the collector went through all of it with every frame, 2 ms of processor time.
        gc.freeze()
        _replay(monitor, console, stop)
        total = len(listing.shots)
        with progress("shot", total) as advance:
            for outcome in monitor.process(listing.shots, stop):
                if outcome.report is not None:
                    changes.update(t.change for t in outcome.report.transitions)
                # Without its report: that holds an array per shot.
                outcomes.append(replace(outcome, report=None))
                advance(f"{changes['stable'] - changes['recovered']} stable")
        monitor.checkpoint()
        for warning in monitor.warnings:
            _say(console, warning)
        left = total - len(outcomes)
        _print_fates(outcomes, left)
        given = listing.shots[0].kind
        others = sum(o.fate is Fate.KNOWN and o.kind not in (None, given) for o in outcomes)
        if given is not None and others:
            kind = "dark" if given is ShotKind.LIGHT else "light"
            print(
                f"  {others} of those known {_were(others)} folded as {kind}, which stays so. To change that:"
                " hotpixd rebuild FOLDER --kind ..."
            )
        _print_folded_otherwise(monitor, state, outcomes, luma=luma)
        _print_found(monitor, state, outcomes)
    if left:
        print(f"Interrupted: {many(left, 'shot')} left. Run the same command again to go on where it stopped.")
        return None
    bad = listing.unreadable or monitor.lost or any(o.fate in (Fate.REFUSED, Fate.UNREADABLE) for o in outcomes)
    return 1 if bad else 0


@contextlib.contextmanager
def progress(unit: str, total: int) -> Iterator[Callable[[str], None]]:
    """Show a bar with units per second and time left while stderr is a terminal; yields what advances it by one."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=total, rate="", note="")

        def advance(note: str) -> None:
            bar.advance(task)
            speed = bar.tasks[0].finished_speed or bar.tasks[0].speed
            bar.update(task, note=note, rate="" if speed is None else f"{speed:.1f} {unit}s/s")

        yield advance


def _say(console: Console, sentence: str) -> None:
    console.print(f"hotpixd: {escape(printable(sentence))}", soft_wrap=True)


def _replay(monitor: Monitor, console: Console, stop: Callable[[], bool]) -> None:
    count = 0
    for _ in monitor.replay(stop):
        count += 1
    if count:
        console.print(f"Took up {many(count, 'shot')} from where the last run was interrupted.")


def _print_found(monitor: Monitor, state: State, outcomes: list[Outcome]) -> None:
    """Print the defects of the sensors that this run has met, in the order in which it met them."""
    met = dict.fromkeys(outcome.sensor_id for outcome in outcomes if outcome.sensor_id is not None)
    if met:
        found = answers.defects(state, sensors=monitor.sensors(met))
        tables.print_defects(found, most=_DEFECTS_SHOWN, not_counted=answers.reasons_not_counted(state))


def _print_folded_otherwise(monitor: Monitor, state: State, outcomes: list[Outcome], *, luma: bool) -> None:
    """Say how many shots are known by their colours, where luma was asked for, or the other way round."""
    known: dict[str, list[Path]] = {}
    for outcome in outcomes:
        if outcome.fate is Fate.KNOWN and outcome.sensor_id is not None:
            known.setdefault(outcome.sensor_id, []).append(outcome.path)
    others = 0
    for id_, about in state.ledger.sensors().items():
        if id_ not in known or about["samples"] != SampleKind.RENDERED:
            continue
        channels = about["layout"]["channels"]
        if channels > 1 if luma else channels == 1 and _is_coloured(monitor, known[id_][0]):
            others += len(known[id_])
    if others:
        kept, cure = ("red, green and blue", "--luma ") if luma else ("luma", "")
        print(
            f"  {others} of those known {_were(others)} folded as {kept}, which stays so. To change that:"
            f" hotpixd rebuild {cure}FOLDER"
        )


def _is_coloured(monitor: Monitor, path: Path) -> bool:
    """Tell whether a shot folded as luma would be folded in colours else: a grey JPEG is luma in any case."""
    try:
        return monitor.decoders.decode(path, luma=False).sensor.layout.channels > 1
    except (DecodeError, OSError):
        return False


def _were(count: int) -> str:
    return "was" if count == 1 else "were"


def _print_fates(outcomes: list[Outcome], left: int) -> None:
    fates = Counter(outcome.fate for outcome in outcomes)
    words = [f"{many(fates[Fate.FOLDED], 'shot')} folded"]
    if fates[Fate.KNOWN]:
        words.append(f"{fates[Fate.KNOWN]} known already")
    if fates[Fate.COMPANION]:
        words.append(f"{many(fates[Fate.COMPANION], 'companion')} of a raw file")
    refused = [o for o in outcomes if o.fate in (Fate.REFUSED, Fate.UNREADABLE)]
    if refused:
        words.append(f"{len(refused)} refused")
    if left:
        words.append(f"{left} left")
    print(", ".join(words) + ".")
    for outcome in refused[:_REFUSALS_SHOWN]:
        print(f"  refused {printable(outcome.path.name)}: {printable(outcome.reason or '')}")
    if len(refused) > _REFUSALS_SHOWN:
        print(f"  ... and {len(refused) - _REFUSALS_SHOWN} more; `hotpixd status` lists them all")
