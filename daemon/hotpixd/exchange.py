"""Maps of defects to and from other programs: the commands `export`, `import`, `mark` and `unmark`.

They ask whoever has the state open; files of the user are read and written here, with their rights.
"""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hotpixd.declaring import MOST_DECLARED, POINTS_AT_A_TIME, QUESTIONS, Declaring
from hotpixd.store import checkpoint
from hotpixd.store.durable import StateError, WrongUse, require_place, written_beside
from hotpixd.store.state import State
from hotpixd.views import answers
from hotpixd.views.exports import FORMATS, ExportError, Extras, Format, rawtherapee_name
from hotpixd.views.imports import BY_ROWS, READERS, ListError, read_list
from hotpixd.views.maps import STATES, Rows, defect_map
from hotpixd.views.tables import warn_of_waiting
from hotpixd.views.text import called, printable, sensor_name
from hotpixd.words import many

Ask = Callable[..., dict[str, Any]]
"""Asks a question, of the state or of its daemon."""

_TRIES = 5
"""Times that a generation which was replaced while it was to be read is asked for anew."""

_FITS_NAMES = (".fits", ".fit", ".fts", ".fits.fz")


def ask_of(state: State) -> Ask:
    """Return what answers the questions of these commands, and all reading ones, from a state."""
    declaring = Declaring(state)

    def ask(question: str, **arguments: Any) -> dict[str, Any]:
        if question in QUESTIONS:
            return declaring.answer(question, arguments)
        answer = answers.answer(state, question, arguments)
        if state.unusable:
            # A map without what was found, or a picture corrected with it, would be believed.
            raise StateError(next(iter(state.unusable.values())))
        return answer

    return ask


# --- export


@dataclass(frozen=True, slots=True)
class ExportOrder:
    """What the user wants exported, and how."""

    format: str
    out: Path | None
    """None: to stdout."""
    sensor: str | None = None
    states: Collection[str] = ("stable", "warm")
    least_sigma: float = 0.0
    declared: bool = True
    like: Path | None = None
    """A picture of the sensor."""
    camera_clock: bool = False
    raw_crop: str | None = None
    """LEFT,TOP: where RawTherapee's picture of this camera begins in the raw frame."""
    force: bool = False


def print_formats() -> None:
    """Print all formats, each in a line."""
    width = max(map(len, FORMATS))
    for known in FORMATS.values():
        print(f"{known.name:<{width}}  {known.about}")


def run_export(ask: Ask, order: ExportOrder) -> None:
    """Write a map, or a picture of the statistic, to stdout or a file.

    Raises
    ------
    WrongUse
        If the order is not one that can be obeyed.
    """
    wanted = FORMATS.get(order.format)
    if wanted is None:
        raise WrongUse(f"there is no format {order.format!r}; these are: {', '.join(FORMATS)}")
    unknown = set(order.states) - set(STATES)
    if unknown or not order.states:
        raise WrongUse(f"--which takes some of {', '.join(STATES)}, not {','.join(order.states)!r}")
    if order.out is None and not wanted.text:
        raise WrongUse(f"{wanted.name} is no text: name a file with -o")
    more = not set(order.states) <= {"stable", "warm"}
    answer = ask("defects", candidates=more)
    sensor = choose_sensor(answer["sensors"], order.sensor)
    if order.declared and wanted.mapped and "declared_unusable" in sensor:
        raise StateError(f"{sensor['declared_unusable']} To export without them: --no-declared.")
    rows = rows_of(ask, sensor, order.like) if wanted.by_rows else Rows.PICTURE
    about = defect_map(
        sensor,
        answers.now(),
        states=order.states,
        least_sigma=order.least_sigma,
        declared=order.declared,
        rows=rows,
    )
    out = None if order.out is None else _place(order.out, wanted, sensor)
    shift = (0, 0) if order.raw_crop is None else _shift(order, wanted)
    extras = Extras(
        order.camera_clock,
        order.like,
        shift,
        statistic=lambda: _statistic(ask, sensor["id"]),
        history=lambda: ask("history", sensor=sensor["id"])["sensors"][0],
        raw_frame=_raw_frame(order.like, sensor) if wanted.name == "json" else None,
    )
    try:
        if out is None:
            sys.stdout.write(wanted.make(about, extras).decode())
        else:
            extras = replace(extras, suffix=out.suffix.lower())
            contents = {out: wanted.make(about, extras)}
            if wanted.beside is not None:
                contents[_beside(out)] = wanted.beside(about, extras)
            for path in contents:
                if order.like is not None and path.exists() and path.samefile(order.like):
                    # As `repair` does: --force is for what a program has made, not for what a camera has.
                    raise WrongUse(f"{path} is the picture of --like, which is never replaced; name another file")
                require_place(path, force=order.force)
            for path, content in contents.items():
                write_anew(path, content, force=order.force)
                print(f"{path}: {_said(about.pixels, wanted)}")
    except ExportError as error:
        raise WrongUse(str(error)) from error
    except ModuleNotFoundError as error:
        raise WrongUse(_needs(error)) from error
    if wanted.name == "rawtherapee":
        names = f"{rawtherapee_name(sensor)!r}, then for {rawtherapee_name({**sensor, 'serial': None})!r}"
        print(
            f"hotpixd: RawTherapee looks in its folder of dark frames for {names}; in a DNG it finds no serial number",
            file=sys.stderr,
        )
    warn_of_waiting(answer.get("waiting", 0))


def _shift(order: ExportOrder, wanted: Format) -> tuple[int, int]:
    """Return what is added to x and y of the visible area where a picture begins elsewhere in the raw frame."""
    left, _, top = (order.raw_crop or "").partition(",")
    if wanted.name != "rawtherapee" or order.like is None or not (left.isdecimal() and top.isdecimal()):
        raise WrongUse(
            "--raw-crop takes the first two numbers of raw_crop in RawTherapee's camconst.json, as 72,38; it is for"
            " the format rawtherapee, and needs a raw file of the camera (--like)"
        )
    sizes = _raw_sizes(order.like)
    return sizes.left_margin - int(left), sizes.top_margin - int(top)


def _raw_frame(like: Path | None, sensor: Mapping[str, Any]) -> dict[str, int] | None:
    """Return how large the whole frame of a raw file is, and where its visible area begins; None of other pictures."""
    if like is None or sensor["samples"] != "raw" or like.name.lower().endswith(_FITS_NAMES):
        return None
    sizes = _raw_sizes(like)
    if (sizes.width, sizes.height) != (sensor["width"], sensor["height"]):
        raise WrongUse(
            f"the visible area of {like} has {sizes.width}x{sizes.height} pixels, the sensor"
            f" {sensor['width']}x{sensor['height']}: name a raw file of this camera with --like"
        )
    margins = {"left": sizes.left_margin, "top": sizes.top_margin}
    return {"width": sizes.raw_width, "height": sizes.raw_height, **margins}


def _raw_sizes(path: Path) -> Any:
    """Return the sizes of a raw file's frame and of its visible area, as LibRaw has them."""
    import rawpy

    try:
        with rawpy.imread(os.fspath(path)) as raw:
            return raw.sizes
    except (rawpy.LibRawError, OSError) as error:
        raise WrongUse(f"{path} is no raw file that LibRaw can read: {error}") from error


def _said(pixels: Sequence[object], wanted: Format) -> str:
    return many(len(pixels), "pixel") if wanted.mapped else wanted.about.partition(":")[0]


def _needs(error: ModuleNotFoundError) -> str:
    return f'this format needs {(error.name or "a package").partition(".")[0]}: pip install "hotpixd[fits]"'


def _place(out: Path, wanted: Format, sensor: Mapping[str, Any]) -> Path:
    if not out.is_dir():
        return out
    if wanted.name != "rawtherapee":
        raise WrongUse(f"{out} is a folder; name a file")
    return out / rawtherapee_name(sensor)


def _beside(out: Path) -> Path:
    """Return where PHD2's master dark belongs: PHD2 names its own this way."""
    head, name, tail = out.stem.partition("PHD2_defect_map")
    return out.with_name(f"{head}{name}_master{tail}.fit" if name else f"{out.stem}_master.fit")


def choose_sensor(sensors: Sequence[Mapping[str, Any]], wanted: str | None) -> Mapping[str, Any]:
    """Return the one sensor, or the one whose id, serial number or name holds what is wanted.

    Raises
    ------
    WrongUse
        If that is none, or several.
    """
    if not sensors:
        raise WrongUse("no sensor is known yet: no shot was ever folded")
    found = list(sensors) if wanted is None else called(sensors, wanted)
    if len(found) == 1:
        return found[0]
    listed = "\n".join(f"  --sensor {sensor['id']}   {sensor_name(sensor)}" for sensor in found or sensors)
    if not found:
        raise WrongUse(f"no sensor is called {wanted!r}; these are known:\n{listed}")
    raise WrongUse(f"{len(found)} sensors may be meant; say which:\n{listed}")


def rows_of(ask: Ask, sensor: Mapping[str, Any], like: Path | None) -> Rows:
    """Return how the files of a sensor hold their rows: as a picture of it says.

    Raises
    ------
    WrongUse
        If there is none, though its files are FITS: of these some count from the top and others from the bottom.
    """
    if like is not None:
        return _rows_in(like)
    for known in ask("status")["sensors"]:
        shot = known["last_shot"]
        if known["id"] == sensor["id"] and shot is not None and shot["name"].lower().endswith(_FITS_NAMES):
            raise WrongUse(
                "the pictures of this sensor are FITS, of which some begin with the top row and others with the bottom"
                " row, and this format counts rows as they come: name one of them with --like"
            )
    return Rows.PICTURE


def _rows_in(path: Path) -> Rows:
    try:
        with path.open("rb") as file:
            if file.read(9) != b"SIMPLE  =":
                return Rows.PICTURE
        from astropy.io import fits

        with fits.open(path, lazy_load_hdus=True) as units:
            pictures = (unit for unit in units if unit.is_image and len(unit.shape) >= 2)
            header: Mapping[str, object] = next((unit.header for unit in pictures), {})
            top_down = str(header.get("ROWORDER", "")).strip().upper() == "TOP-DOWN"
    except ModuleNotFoundError as error:
        raise WrongUse(_needs(error)) from error
    except (OSError, ValueError, TypeError) as error:
        raise WrongUse(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    return Rows.FITS_TOP_DOWN if top_down else Rows.FITS


def _statistic(ask: Ask, sensor_id: str) -> checkpoint.Generation:
    """Read the newest generation. A daemon may remove it meanwhile, but then there is a newer one."""
    for left in reversed(range(_TRIES)):
        answer = ask("generation", sensor=sensor_id)
        if answer["path"] is None:
            raise ExportError(
                "there is no whole generation of this sensor's statistic yet; a scan or the daemon makes one"
            )
        path = Path(answer["path"])
        try:
            generation = checkpoint.read_generation(path)
        except checkpoint.GenerationError:
            try:
                path.stat()
                readable = os.access(path, os.R_OK)
            except FileNotFoundError:
                if left:
                    continue
                raise
            except PermissionError:
                readable = False
            if not readable:
                raise ExportError(
                    f"the statistic is in {path.parent}, which is closed to this user: run this as root or as the"
                    " daemon's user"
                ) from None
            raise
        if answer["waiting"]:
            words = "shots were received but are not in it; scan, or start the daemon, to have them folded"
            print(f"hotpixd: {answer['waiting']} {words}", file=sys.stderr)
        return generation
    raise AssertionError("unreachable")


# --- import


def run_import(
    ask: Ask, paths: Iterable[Path], *, format_name: str | None, sensor: str | None, like: Path | None
) -> None:
    """Declare what other programs' lists say; all of them, or nothing.

    Raises
    ------
    WrongUse
        If a list is not understood, or not of this sensor.
    """
    if format_name is not None and format_name not in READERS:
        raise WrongUse(f"there is no format {format_name!r} to read; these are: {', '.join(READERS)}")
    chosen = choose_sensor(ask("defects")["sensors"], sensor)
    width, height = int(chosen["width"]), int(chosen["height"])
    said: dict[str, tuple[tuple[int, int], ...]] = {}
    read = []
    rows = None if like is None else _rows_in(like)
    try:
        for path in paths:
            listing = read_list(path, width, height, format_name, rows or Rows.PICTURE)
            if rows is None and listing.format in BY_ROWS:
                rows_of(ask, chosen, None)
            source = printable(f"{listing.format}:{path.name}")
            said[source] = (*said.get(source, ()), *listing.pixels)
            read.append(f"{path}: {many(len(listing.pixels), 'pixel')}, read as {listing.format}")
    except ListError as error:
        raise WrongUse(str(error)) from error
    except ModuleNotFoundError as error:
        raise WrongUse(_needs(error)) from error
    answer = declare(ask, chosen["id"], said)
    print(*read, sep="\n")
    known = f"; declared already: {answer['known']}" if answer["known"] else ""
    print(f"Declared {many(answer['added'], 'pixel')} of {sensor_name(chosen)}{known}.")


def declare(ask: Ask, sensor_id: str, said: Mapping[str, Sequence[tuple[int, int]]]) -> Mapping[str, Any]:
    """Declare pixels by source, in as many questions as it takes; all at once with the last one."""
    total = sum(map(len, said.values()))
    if total > MOST_DECLARED:
        raise WrongUse(f"{total} pixels are no list of defects; at most {MOST_DECLARED} are declared of a sensor")
    upload = secrets.token_hex(8)
    answer: Mapping[str, Any] = {"added": 0, "known": 0}
    offset = 0
    for source, pixels in said.items():
        for start in range(0, len(pixels), POINTS_AT_A_TIME):
            part = pixels[start : start + POINTS_AT_A_TIME]
            answer = ask(
                "declare",
                sensor=sensor_id,
                upload=upload,
                offset=offset,
                total=total,
                source=source,
                points=[number for pixel in part for number in pixel],
            )
            offset += len(part)
    return answer


def run_mark(ask: Ask, x: int, y: int, *, sensor: str | None) -> None:
    """Declare one pixel by hand."""
    chosen = _with_pixel(ask, x, y, sensor)
    answer = declare(ask, chosen["id"], {"mark": [(x, y)]})
    print(f"({x}, {y}) of {sensor_name(chosen)} {'is declared now' if answer['added'] else 'was declared already'}.")


def run_unmark(ask: Ask, x: int, y: int, *, sensor: str | None) -> bool:
    """Take back what declares one pixel, whoever did; tell whether anything did."""
    chosen = _with_pixel(ask, x, y, sensor)
    answer = ask("undeclare", sensor=chosen["id"], points=[x, y])
    pixel = f"({x}, {y}) of {sensor_name(chosen)}"
    if answer["removed"]:
        print(f"{pixel} is not declared any more; {printable(', '.join(answer['sources']))} did.")
    else:
        print(f"{pixel} was not declared.")
    return bool(answer["removed"])


def run_unmark_source(ask: Ask, source: str, *, sensor: str | None) -> bool:
    """Take back what one list declares; tell whether anything was."""
    answer = ask("defects")
    chosen = choose_sensor(answer["sensors"], sensor)
    known = sorted({name for entry in chosen.get("declared", []) for name in entry["sources"]})
    if source not in known:
        raise WrongUse(f"nothing is declared by {source!r}; there is: {', '.join(known) or 'nothing'}")
    answer = ask("undeclare", sensor=chosen["id"], source=source)
    kept = f"; others declare {answer['kept']} too, which stay" if answer["kept"] else ""
    print(f"Took back {many(answer['removed'], 'pixel')} of {sensor_name(chosen)}{kept}.")
    return bool(answer["sources"])


def _with_pixel(ask: Ask, x: int, y: int, sensor: str | None) -> Mapping[str, Any]:
    chosen = choose_sensor(ask("defects")["sensors"], sensor)
    if not (0 <= x < chosen["width"] and 0 <= y < chosen["height"]):
        raise WrongUse(
            f"({x}, {y}) is outside of the sensor, which has {chosen['width']}x{chosen['height']} pixels; x and y are"
            " 0-based, from the top left"
        )
    return chosen


# --- writing files of the user's


def write_anew(path: Path, content: bytes, *, force: bool) -> None:
    """Write a file beside its place, then give it its name: all of it is there, or nothing.

    Raises
    ------
    WrongUse
        If something of that name is there and `force` is not given.
    """
    require_place(path, force=force)
    try:
        with written_beside(path, content, replace=force):
            pass
    except FileExistsError:
        require_place(path, force=False)
        raise
