"""The command line. Its names, JSON and exit codes are a contract; what it does is done elsewhere."""

# No `from __future__ import annotations`: Typer would compile the texts of all commands, twice, at every start.

import contextlib
import errno
import io
import json
import logging
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from enum import StrEnum
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TextIO

import typer

from hotpixd import __version__
from hotpixd.words import many

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

    from hotpixd.attached import OwnDaemon
    from hotpixd.config import Config
    from hotpixd.store.state import State

DONE, SHOTS_REFUSED, WRONG_USE, STATE_UNUSABLE = 0, 1, 2, 3
"""Exit codes."""

_TRIES, _AGAIN_S = 5, 0.2
"""How often a question is asked whose daemon ends before it has answered, and the pause before it is asked again."""

_STDOUT = Path("-")
"""What -o takes for the standard output, as other programs do."""

_Ask = Callable[..., dict[str, Any]]

_amiss: list[str] = []
"""What was wrong though a command has done what it could: said at its end, which is no success then."""

app = typer.Typer(
    name="hotpixd",
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Says which pixels of a camera's sensor are hot, stuck or dead, and how sure that is.",
    pretty_exceptions_enable=False,
)


def _state_path(text: str) -> Path:
    """Refuse an empty path, as an unset variable of a script gives it: Path takes it for the current folder."""
    if not text:
        raise typer.BadParameter("an empty path names no folder; name one, or leave --state out")
    return Path(text)


StateOption = Annotated[
    Path | None,
    typer.Option(
        "--state",
        metavar="DIR",
        help="State directory.",
        show_default="$STATE_DIRECTORY, else the user's",
        # Not checked whether it can be read: another user's daemon may answer us all the same.
        parser=_state_path,
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


SensorOption = Annotated[
    str | None,
    typer.Option(metavar="S", help="Only sensors of this serial number, or part of a name.", show_default="all"),
]
LumaOption = Annotated[
    bool,
    typer.Option(
        "--luma", help="Fold the luma of JPEGs instead of red, green and blue: faster, in half of the memory."
    ),
]
ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config", metavar="F", help="Configuration.", show_default="see README", exists=True, dir_okay=False
    ),
]


class LogLevel(StrEnum):
    """How much the daemon says."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


LogLevelOption = Annotated[
    LogLevel | None,
    typer.Option("--log-level", help="What is logged: this and worse.", show_default="of the configuration"),
]


class KindOption(StrEnum):
    """What the user says the shots are."""

    AUTO = "auto"
    LIGHT = "light"
    DARK = "dark"

    @property
    def given(self) -> str | None:
        """What they say, if anything."""
        return None if self is KindOption.AUTO else self.value


KindGiven = Annotated[KindOption, typer.Option(help="What the shots are; auto: the file's header or samples say.")]


def _pattern(text: str) -> str:
    from hotpixd.intake.files import check_pattern

    try:
        check_pattern(text)
    except ValueError as error:
        raise typer.BadParameter(f"{error}, got {text!r}") from error
    return text


IgnoreOption = Annotated[
    list[str] | None,
    typer.Option(
        "--ignore",
        metavar="PATTERN",
        help="Leave out files and folders of such a name below DIR or PATH, such as thumbnails or 'keogram*', in any"
        " case. May be repeated.",
        parser=_pattern,
        show_default="none",
    ),
]


class ExistingOption(StrEnum):
    """What is done with what was on the card before."""

    FETCH = "fetch"
    LEAVE = "leave"
    LATER = "later"


class FormatOption(StrEnum):
    """File formats of simulated shots."""

    DNG = "dng"
    JPG = "jpg"


class SceneOption(StrEnum):
    """Scenes of the virtual camera."""

    MOVING = "moving"
    TRIPOD = "tripod"
    TRACKED = "tracked"
    DITHERED = "dithered"
    DARK = "dark"
    FLAT = "flat"
    HORIZON = "horizon"


def main() -> None:
    """Run the command line; every foreseeable fault ends in a sentence and an exit code."""
    # NumPy's linear algebra, which nothing here uses, would take 32 MB per core, and asks for them without end.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    _prepare_streams()
    from hotpixd.store.durable import StateError, WrongUse

    # Before memory may be short: what says so needs it.
    from hotpixd.views.text import printable  # noqa: F401

    logging.basicConfig(level=logging.WARNING, handlers=[_to_stderr("%(name)s: %(message)s")])
    _prepare_cache()
    try:
        try:
            app()
        finally:
            # Here, not when the interpreter ends: then it could only complain.
            sys.stdout.flush()
    except SystemExit as end:
        if _amiss and not end.code:
            _fail("\n".join(_amiss), STATE_UNUSABLE)
        raise
    except WrongUse as error:
        _fail(str(error), WRONG_USE)
    except StateError as error:
        _fail(str(error), STATE_UNUSABLE)
    except OSError as error:
        _fail(_words(error), STATE_UNUSABLE)
    except (MemoryError, RuntimeError, ImportError) as error:
        if not _lacks_memory(error):
            raise
        _fail(
            "there is not enough memory. What was acknowledged is on the disk; the next run goes on from there.",
            STATE_UNUSABLE,
        )


def _lacks_memory(error: Exception) -> bool:
    """Tell whether memory is all that was missing: for an object, a thread's stack, or a library to load."""
    if isinstance(error, MemoryError):
        return True
    words = ("can't start new thread", "failed to map segment", "Cannot allocate memory")
    return any(word in str(error) for word in words)


def _finite(value: float | None) -> float | None:
    """Refuse what Python takes for a number, and no range keeps out."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is no number to go by")
    return value


def _fail(message: str, code: int) -> NoReturn:
    from hotpixd.views.text import printable

    for line in message.split("\n"):
        print(f"hotpixd: {printable(line)}", file=sys.stderr)
    sys.exit(code)


def _words(error: OSError) -> str:
    if isinstance(error, FileNotFoundError):
        try:
            Path.cwd()
        except FileNotFoundError:
            return "the folder that this was started in is gone; change to one that is there"
    return f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}"


class _Out(io.FileIO):
    """A standard stream whose writes never fail: if its reader has gone (| head), say nothing.

    If its disk is full, what a command was to answer is lost, and it has failed. What others have done is in the state.
    """

    answers = True
    """Whether what is printed is what the command is for."""

    def write(self, data: "ReadableBuffer", /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.ENOSPC, errno.EIO):
                raise
            if error.errno != errno.EPIPE and self.answers and self.fileno() == 1:
                _amiss.append(f"the answer could not be written: {error.strerror}")
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            return memoryview(data).nbytes


def _prepare_streams() -> None:
    """Make the standard streams take every text, whether or not someone is there to read it."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # Closed by our caller. A file of ours must not get its number, or messages would be written into it.
            os.open(os.devnull, os.O_RDWR)
    sys.stdout = _text_stream(1, sys.stdout)
    sys.stderr = _text_stream(2, sys.stderr)


def _text_stream(number: int, before: TextIO | None) -> TextIO:
    out = _Out(number, "w", closefd=False)
    encoding = "utf-8" if before is None else before.encoding
    # Not strict: a name in Chinese must not end a scan where the terminal speaks Latin.
    return io.TextIOWrapper(
        io.BufferedWriter(out), encoding, errors="backslashreplace", line_buffering=number == 2 or out.isatty()
    )


def _prepare_cache() -> None:
    """Say where compiled kernels are kept: a service has $CACHE_DIRECTORY, a user their cache."""
    if "NUMBA_CACHE_DIR" in os.environ:
        return
    given = os.environ.get("CACHE_DIRECTORY", "").split(":")[0]
    if not given:
        import platformdirs

        given = platformdirs.user_cache_dir("hotpixd")
    place = Path(given) / f"kernels-{__version__}"
    try:
        place.mkdir(parents=True, exist_ok=True)
        usable = os.access(place, os.W_OK)
    except OSError:
        usable = False
    if not usable:
        # A user without a home: compiled anew each time, but never from a place where others could put code.
        import atexit
        import shutil
        import tempfile

        place = Path(tempfile.mkdtemp(prefix="hotpixd-kernels-"))
        atexit.register(shutil.rmtree, place, ignore_errors=True)
    os.environ["NUMBA_CACHE_DIR"] = str(place)


@app.callback(invoke_without_command=True)
def _options(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        print(f"hotpixd {__version__}")
        raise typer.Exit


@app.command()
def scan(
    paths: Annotated[list[str], typer.Argument(metavar="PATH...", help="Files, folders (with all below) or globs.")],
    kind: KindGiven = KindOption.AUTO,
    ignore: IgnoreOption = None,
    cluster: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Decode and add up on a Dask cluster: its scheduler's address (tcp://HOST:8786), or local, or local:4"
            " for 4 workers on this machine. PATH may then be a URL (s3://, http://, ssh://) too.",
        ),
    ] = None,
    on_disk: Annotated[
        bool, typer.Option("--on-disk", help="Keep the statistic on the disk while it runs: slower, for little memory.")
    ] = False,
    luma: LumaOption = False,
    state: StateOption = None,
) -> None:
    """Fold files or folders into the statistic, say what was found, and exit.

    Interrupted (Ctrl-C, a crash, a power cut), it goes on where it was when it is started again. On a cluster the
    result is the same, to the last bit; the state stays on this machine, and workers read the files themselves.
    """
    from hotpixd.scanning import find, run_cluster_scan, run_scan

    _Out.answers = False
    if on_disk and cluster is not None:
        _fail("--on-disk is for a scan on this machine alone: workers hold what --cluster adds up.", WRONG_USE)
    ignored = tuple(ignore or ())
    if cluster is not None:
        with _interruptible() as stop:
            code = run_cluster_scan(lambda: _opened(state), cluster, paths, kind.given, stop, ignore=ignored, luma=luma)
        raise typer.Exit(stop.code if code is None else code)
    # Before there is a state, which a wrong name must not begin.
    listing = find(paths, kind.given, ignored)
    if isinstance(listing, int):
        raise typer.Exit(listing)
    with _opened(state) as opened, _interruptible() as stop:
        code = run_scan(opened, listing, stop, on_disk=on_disk, luma=luma)
    raise typer.Exit(stop.code if code is None else code)


@app.command()
def run(
    config: ConfigOption = None,
    state: StateOption = None,
    log_level: LogLevelOption = None,
) -> None:
    """Be the daemon: watch every source of the configuration. This is what systemd starts."""
    raise typer.Exit(_serve(_config_loader(config, {"state": state, "log_level": log_level}), reloadable=True))


@app.command()
def watch(
    directories: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Cards or tether directories.")],
    kind: KindGiven = KindOption.AUTO,
    ignore: IgnoreOption = None,
    config: ConfigOption = None,
    state: StateOption = None,
    log_level: LogLevelOption = None,
    plain: Annotated[bool, typer.Option("--plain", help="Print lines, even to a terminal.")] = False,
) -> None:
    """Watch directories; shows the dashboard if stdout is a terminal."""
    for directory in directories:
        # What is not there yet may be mounted. Path's is_file() raises where it may not look.
        if os.path.isfile(directory.expanduser()):  # noqa: PTH113
            _fail(f"{directory} is a file; name the directory to watch (hotpixd scan takes files)", WRONG_USE)
    sources = [{"directory": str(d.expanduser().absolute()), "kind": kind.value, "ignore": ignore} for d in directories]
    given = {"state": state, "log_level": log_level, "sources": sources, "cameras": []}
    raise typer.Exit(_shown(_config_loader(config, given), state, plain=plain))


@app.command()
def tether(
    camera: Annotated[
        str, typer.Option("--camera", metavar="auto|PORT", help="All on USB, or one: usb:001,005, ptpip:192.168.1.1.")
    ] = "auto",
    save_to: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder for the photos.")] = None,
    save_as: Annotated[
        str | None, typer.Option(metavar="TEMPLATE", help="Path below it, such as {date:%Y-%m-%d}/{name}.")
    ] = None,
    delete: Annotated[
        bool, typer.Option("--delete", help="Delete photos from the card once they are saved and safe.")
    ] = False,
    existing: Annotated[
        ExistingOption,
        typer.Option(
            help="What is on the card when a camera comes for the first time: fetch, leave, or leave for later."
        ),
    ] = ExistingOption.FETCH,
    kind: KindGiven = KindOption.AUTO,
    check: Annotated[
        bool, typer.Option("--check", help="Only say whether cameras are usable, and if not, why.")
    ] = False,
    as_json: JsonOption = False,
    config: ConfigOption = None,
    state: StateOption = None,
    log_level: LogLevelOption = None,
    plain: Annotated[bool, typer.Option("--plain", help="Print lines, even to a terminal.")] = False,
) -> None:
    """Pull every shot from cameras while people shoot; shows the dashboard if stdout is a terminal."""
    section: dict[str, Any] = {
        "port": camera,
        "kind": kind.value,
        "save_to": None if save_to is None else str(save_to.expanduser().absolute()),
        "save_as": save_as,
        "delete": delete,
        "existing": existing.value,
    }
    given = {"state": state, "log_level": log_level, "sources": [], "cameras": [section]}
    load = _config_loader(config, given)
    if check:
        from hotpixd.checkup import run_checkup

        raise typer.Exit(run_checkup(_loaded(load).cameras[0].settings(), as_json=as_json))
    raise typer.Exit(_shown(load, state, plain=plain))


@app.command()
def darks(
    frames: Annotated[int, typer.Option(min=1, max=10_000, help="Number of darks.")] = 30,
    exposure: Annotated[
        float | None,
        typer.Option(
            min=0.0001, max=7200, callback=_finite, help="Exposure time, s.", show_default="as the camera is set"
        ),
    ] = None,
    iso: Annotated[
        int | None, typer.Option(min=1, help="ISO of all darks.", show_default="as the camera is set")
    ] = None,
    cooldown: Annotated[
        float, typer.Option(min=0, max=3600, callback=_finite, help="Pause between two darks, s.")
    ] = 0.0,
    bulb: Annotated[bool, typer.Option("--bulb", help="Hold the shutter open from here.")] = False,
    until_stable: Annotated[
        int | None, typer.Option(min=2, metavar="N", help="End early when N darks in a row change nothing on the map.")
    ] = None,
    anyway: Annotated[
        bool, typer.Option("--anyway", help="Go on where the camera does not follow, or a frame does not look dark.")
    ] = False,
    anew: Annotated[bool, typer.Option("--anew", help="Do not go on with an interrupted series.")] = False,
    stop: Annotated[bool, typer.Option("--stop", help="End the series that a daemon shoots, and exit.")] = False,
    camera: Annotated[str | None, typer.Option(metavar="PORT|SERIAL", help="Which, if there are several.")] = None,
    as_json: JsonOption = False,
    state: StateOption = None,
) -> None:
    """Shoot a series of dark frames and fold them: cap on, then this.

    A running daemon that tethers the camera shoots it; without one, this command tethers for itself. Interrupted, the
    same command goes on where it was.
    """
    from hotpixd.darkroom import end_darks, run_darks

    # A state of one's own is meant before that of the only daemon. Path's exists() raises where it may not look.
    is_there = os.path.exists(_state_dir(state) / "ledger.sqlite")  # noqa: PTH110
    socket = _daemon_of(_state_dir(state) if is_there else state)
    if stop:
        if socket is None:
            _fail("no daemon is running that could shoot darks", STATE_UNUSABLE)
        raise typer.Exit(end_darks(socket))
    # A port is one of libgphoto2's; all else is a serial number, which a daemon knows a camera by.
    is_port = camera is not None and (camera == "auto" or camera.startswith(("usb:", "ptpip:")))
    order = {
        "frames": frames,
        "exposure_s": exposure,
        "iso": iso,
        "cooldown_s": cooldown,
        "bulb": bulb,
        "until_stable": until_stable,
        "anyway": anyway,
        "anew": anew,
        "camera": None if is_port else camera,
    }

    def own() -> "OwnDaemon":
        from hotpixd.attached import OwnDaemon

        where = ["--state", str(_state_dir(state).absolute())]
        port = camera if is_port and camera is not None else "auto"
        # What was on the card before is no part of it, and would have to be fetched first.
        return OwnDaemon(["tether", "--plain", "--existing", "later", "--camera", port, *where], _state_dir(state))

    with _interruptible() as stopped:
        raise typer.Exit(run_darks(order, socket, own, stopped, as_json=as_json))


@app.command()
def dashboard(
    state: StateOption = None,
    socket: Annotated[Path | None, typer.Option(metavar="PATH", help="Socket of the daemon's feed.")] = None,
    picture: Annotated[
        Path | None, typer.Option(metavar="FILE.svg", help="Save the screen as a picture instead of showing it.")
    ] = None,
    size: Annotated[str, typer.Option(metavar="COLUMNSxROWS", help="Size of the picture.")] = "120x36",
    force: Annotated[bool, typer.Option("--force", help="Replace a picture of that name.")] = False,
) -> None:
    """Attach to the running daemon; q detaches."""
    from hotpixd.attached import run_attached, save_attached
    from hotpixd.store.durable import require_place

    where = socket or _socket(state)
    if picture is None:
        raise typer.Exit(run_attached(where))
    if picture.suffix.lower() != ".svg":
        _fail(f"the picture is SVG: end its name in .svg, {picture} does not", WRONG_USE)
    width, _, height = size.partition("x")
    if not (width.isdecimal() and height.isdecimal() and 80 <= int(width) <= 500 and 24 <= int(height) <= 200):
        _fail(f"--size is given as 120x36, from 80x24 to 500x200, not {size!r}", WRONG_USE)
    require_place(picture, force=force)
    save_attached(where, picture, int(width), int(height))


@app.command()
def check_config(
    config: Annotated[Path | None, typer.Argument(metavar="[F]", help="The file.", show_default="as for run")] = None,
) -> None:
    """Say what is wrong with a configuration, by key and line."""
    from hotpixd import config as configuration

    path = config or configuration.find_config(os.environ)
    try:
        loaded = configuration.load(path, environ=os.environ, overrides={})
    except configuration.ConfigError as error:
        _fail(str(error), WRONG_USE)
    from hotpixd.alerts import complaints

    warned = (*configuration.warnings(loaded, path), *complaints(loaded.alerts.settings()))
    for sentence in warned:
        print(sentence)
    named = [
        many(count, word) for word, count in (("source", len(loaded.sources)), ("camera", len(loaded.cameras))) if count
    ]
    checked = f"{path} is right" if path else "No configuration file: the defaults apply"
    names = "it names" if path else "they name"
    said = " and ".join(named) or f"but {names} no sources or cameras: there is nothing to watch"
    print(f"{checked}{' except for what is said above' if warned else ''}, {said}.")


@app.command()
def status(state: StateOption = None, as_json: JsonOption = False) -> None:
    """Show sensors, frames, sources, what was refused, the last shot, alerts."""
    answer = _asked(state, "status")
    if as_json:
        _print_json(answer)
        return
    from hotpixd.views import tables

    tables.print_status(answer)


@app.command()
def defects(
    state: StateOption = None,
    as_json: JsonOption = False,
    everything: Annotated[bool, typer.Option("--all", help="Candidates and recovered ones too.")] = False,
) -> None:
    """List the stable defects; with --all the candidates too."""
    from hotpixd.views import tables

    answer = _asked(state, "defects", candidates=everything)
    waiting = answer.pop("waiting", 0)
    _print_json(answer) if as_json else tables.print_defects(answer)
    tables.warn_of_waiting(waiting)


@app.command()
def history(
    sensor: SensorOption = None,
    since: Annotated[
        str | None, typer.Option(metavar="DATE", help="Only what changed since, such as 2026-01-31.")
    ] = None,
    gap: Annotated[
        float,
        typer.Option(min=0.01, max=8784, callback=_finite, metavar="HOURS", help="Pause that parts two sessions."),
    ] = 6.0,
    everything: Annotated[bool, typer.Option("--all", help="All changes, not only the latest.")] = False,
    as_json: JsonOption = False,
    state: StateOption = None,
) -> None:
    """Show when defects came and went, by date and session, and how many more there are per month."""
    from hotpixd.views import tables
    from hotpixd.views.history import moment_s

    try:
        since is None or moment_s(since)
    except ValueError as error:
        _fail(str(error), WRONG_USE)
    answer = _known_sensor(_asked(state, "history", sensor=sensor, since=since, gap_h=gap))
    _print_json(answer) if as_json else tables.print_history(answer, everything=everything)


@app.command()
def least_variance(
    k: Annotated[int, typer.Option("-k", min=1, max=1_000_000, help="How many.")] = 10,
    state: StateOption = None,
    as_json: JsonOption = False,
) -> None:
    """List the k samples of least variance over all frames."""
    from hotpixd.views import tables

    answer = _asked(state, "least-variance", k=k)
    _print_json(answer) if as_json else tables.print_least_variance(answer)


@app.command()
def report(
    file: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="The page; - for stdout.")] = Path(
        "report.html"
    ),
    sensor: SensorOption = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is no report.")] = False,
    state: StateOption = None,
) -> None:
    """Make one HTML page of all that is known: maps, plots, magnified defects. It needs no network."""
    from hotpixd.views import report as making
    from hotpixd.views.history import GAP_H

    to_stdout = file == _STDOUT
    file = file.expanduser().absolute()
    if not to_stdout:
        making.look_at(file, force=force)
    with _asking(state, _own_answers) as ask:
        told = _known_sensor(making.gathered(ask, sensor, GAP_H))
    page = making.page_of(told)
    if to_stdout:
        # As bytes: the page says that it is UTF-8, whatever the terminal speaks.
        sys.stdout.buffer.write(page.encode())
        return
    size = making.write(file, page)
    print(f"{file} has {size / 1e6:.1f} MB; open it in a browser.")


@app.command()
def verify(state: StateOption = None, as_json: JsonOption = False) -> None:
    """Say in one line whether all that was written can be believed, and if not, what to do."""
    from hotpixd.store.state import StateDamaged
    from hotpixd.views import answers, tables

    try:
        answer = _asked(state, "verify")
    except StateDamaged as error:
        answer = answers.damaged(error)
    _print_json(answer) if as_json else tables.print_verify(answer)
    raise typer.Exit(DONE if answer["ok"] else STATE_UNUSABLE)


@app.command()
def backup(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The backup to make.")],
    force: Annotated[bool, typer.Option("--force", help="Replace a file of that name.")] = False,
    state: StateOption = None,
) -> None:
    """Write all that was learnt into one file, while the daemon runs."""
    from hotpixd.backup import Backups, save

    def own(opened: "State") -> _Ask:
        return Backups(opened, live=False).answer

    file = file.expanduser().absolute()
    with _asking(state, own) as ask:
        size = save(ask, file, force=force, tell=_amiss.append)
    print(f"{file} holds {size / 1e6:.1f} MB; every digest in it was checked.")


@app.command()
def restore(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A backup.")],
    force: Annotated[bool, typer.Option("--force", help="Move a state with shots aside.")] = False,
    state: StateOption = None,
) -> None:
    """Make the state that a backup holds; one that is there is kept beside it."""
    from hotpixd.backup import restore as restored

    for sentence in restored(_state_dir(state), file.expanduser(), force=force):
        print(sentence)


@app.command()
def rebuild(
    folders: Annotated[list[str], typer.Argument(metavar="FOLDER...", help="The pictures: as for scan.")],
    kind: KindGiven = KindOption.AUTO,
    luma: LumaOption = False,
    state: StateOption = None,
) -> None:
    """Make the state anew from pictures, when its ledger is lost; the old one is kept beside it.

    Interrupted, the old state stays in place, and the same command goes on where it was.
    """
    from hotpixd.backup import rebuild as rebuilt
    from hotpixd.scanning import find, run_scan

    _Out.answers = False
    with _interruptible() as stop:

        def fold(made: "State") -> int | None:
            listing = find(folders, kind.given)
            code = listing if isinstance(listing, int) else run_scan(made, listing, stop, luma=luma)
            return None if stop.asked else code

        raise typer.Exit(rebuilt(_state_dir(state), fold))


OneSensorOption = Annotated[
    str | None, typer.Option("--sensor", metavar="S", help="Its id, serial number, or part of its name.")
]
LikeOption = Annotated[
    Path | None,
    typer.Option(
        "--like",
        metavar="PICTURE",
        help="One of the sensor's: the DNG to copy, how FITS rows are stored, or where a raw file's visible area lies.",
    ),
]


@app.command()
def export(
    format_name: Annotated[str | None, typer.Argument(metavar="FORMAT", help="See --list.")] = None,
    out: Annotated[
        str | None, typer.Option("-o", "--out", metavar="F", help="The file.", show_default="stdout")
    ] = None,
    sensor: OneSensorOption = None,
    states: Annotated[str, typer.Option("--which", help="Some of stable, warm, candidate, recovered.")] = "stable,warm",
    least_sigma: Annotated[
        float, typer.Option("--min-excess", metavar="SIGMA", min=0, callback=_finite, help="Leave weaker ones out.")
    ] = 0.0,
    like: LikeOption = None,
    no_declared: Annotated[bool, typer.Option("--no-declared", help="Leave declared defects out.")] = False,
    camera_clock: Annotated[
        bool, typer.Option("--camera-clock", help="dcraw: with times of death, as the camera's clock is right.")
    ] = False,
    raw_crop: Annotated[
        str | None, typer.Option(metavar="LEFT,TOP", help="rawtherapee: of its camconst.json, with --like.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file of that name.")] = False,
    list_formats: Annotated[bool, typer.Option("--list", help="List the formats, and exit.")] = False,
    state: StateOption = None,
) -> None:
    """Write the map of defects for another program, or a picture of the statistic."""
    from hotpixd.exchange import ExportOrder, print_formats, run_export

    if list_formats:
        print_formats()
        raise typer.Exit(DONE)
    if format_name is None:
        _fail("name a format; hotpixd export --list lists them", WRONG_USE)
    if out is not None and out.endswith("/") and not Path(out).expanduser().is_dir():
        _fail(f"there is no folder {out}", WRONG_USE)
    order = ExportOrder(
        format_name,
        None if out is None or Path(out) == _STDOUT else Path(out).expanduser(),
        sensor,
        [word.strip() for word in states.split(",") if word.strip()],
        least_sigma,
        not no_declared,
        like,
        camera_clock,
        raw_crop,
        force,
    )
    _exchanged(state, lambda ask: run_export(ask, order))


@app.command("import")
def import_(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Lists or masks of other programs.")],
    format_name: Annotated[
        str | None, typer.Option("--format", metavar="F", help="Their format.", show_default="as the content is")
    ] = None,
    sensor: OneSensorOption = None,
    like: LikeOption = None,
    state: StateOption = None,
) -> None:
    """Declare the bad pixels that other programs' lists name. They are kept apart from those found."""
    from hotpixd.exchange import run_import

    _exchanged(state, lambda ask: run_import(ask, files, format_name=format_name, sensor=sensor, like=like))


def integer(text: str) -> int:
    """Return a column or row. The help calls it by the name of this."""
    try:
        place = int(text)
    except ValueError:
        place = -1
    if place < 0:
        raise typer.BadParameter(f"a pixel's column and row are whole numbers from 0 on, such as 1042 87, not {text!r}")
    return place


ColumnArgument = typer.Argument(metavar="X", parser=integer, help="Column, 0-based.")
RowArgument = typer.Argument(metavar="Y", parser=integer, help="Row, 0-based, from the top.")


@app.command()
def mark(
    x: Annotated[int, ColumnArgument],
    y: Annotated[int, RowArgument],
    sensor: OneSensorOption = None,
    state: StateOption = None,
) -> None:
    """Declare a pixel to be defective."""
    from hotpixd.exchange import run_mark

    _exchanged(state, lambda ask: run_mark(ask, x, y, sensor=sensor))


@app.command()
def unmark(
    x: Annotated[int | None, ColumnArgument] = None,
    y: Annotated[int | None, RowArgument] = None,
    source: Annotated[
        str | None, typer.Option("--source", help="All that a list declares, such as dcraw:.badpixels.")
    ] = None,
    sensor: OneSensorOption = None,
    state: StateOption = None,
) -> None:
    """Take back what declares a pixel to be defective. What was found stays."""
    from hotpixd.exchange import run_unmark, run_unmark_source

    if source is not None and x is None:
        _exchanged(state, lambda ask: run_unmark_source(ask, source, sensor=sensor))
    elif source is None and x is not None and y is not None:
        _exchanged(state, lambda ask: run_unmark(ask, x, y, sensor=sensor))
    else:
        _fail("name a pixel as X Y, or a list with --source", WRONG_USE)


@app.command()
def repair(
    pictures: Annotated[list[Path], typer.Argument(metavar="PICTURE...", help="JPEG, TIFF, PNG, DNG or FITS files.")],
    folder: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="DIR", help="Folder for the corrected pictures.")
    ] = None,
    sensor: Annotated[
        str | None, typer.Option(metavar="SENSOR", help="Whose map: id, serial number, or a part of the name.")
    ] = None,
    map_of: Annotated[
        str | None,
        typer.Option(metavar="SENSOR", help="Raw frames of the same body and size, whose map is to be used."),
    ] = None,
    states: Annotated[str, typer.Option("--states", metavar="LIST", help="stable, or stable,candidate.")] = "stable",
    everything: Annotated[bool, typer.Option("--all", help="Defects that do not show in a picture, too.")] = False,
    no_declared: Annotated[bool, typer.Option("--no-declared", help="Leave declared defects.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace files in DIR; never a picture given.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be corrected.")] = False,
    as_json: JsonOption = False,
    state: StateOption = None,
) -> None:
    """Correct pictures with the map of their sensor; metadata and all other samples stay."""
    from hotpixd.exchange import ask_of
    from hotpixd.repairing import run_repair
    from hotpixd.views.repair import Wish

    wanted = [word.strip() for word in states.split(",")]
    if not set(wanted) <= {"stable", "candidate"}:
        _fail(f"--states lists stable and candidate, got {states!r}", WRONG_USE)
    if sensor is not None and map_of is not None:
        _fail("--sensor and --map-of name two maps; give one of them", WRONG_USE)
    if folder is None and not dry_run:
        _fail("say with -o DIR where the corrected pictures go", WRONG_USE)
    with _asking(state, ask_of) as ask:
        answer = ask("defects", candidates=True)
    if folder is not None and _daemon_of(state) is not None:
        _require_unwatched(folder, _asked(state, "status"))
    wish = Wish(wanted, not no_declared, everything, sensor, map_of)
    options = {"force": force, "dry_run": dry_run, "as_json": as_json}
    with _interruptible() as stop:
        raise typer.Exit(run_repair(answer, pictures, folder, wish, stop=stop, **options))


def _require_unwatched(folder: Path, status: dict[str, Any]) -> None:
    """Fail if a daemon takes what is put into a folder for shots: corrected ones would make defects recover."""
    for source in status["sources"]:
        watched = Path(source["name"])
        if watched.is_absolute() and folder.absolute().resolve().is_relative_to(watched.resolve()):
            _fail(
                f"the daemon watches {watched}, and would take corrected pictures there for shots: defects would seem"
                " to have recovered. Name another folder with -o.",
                WRONG_USE,
            )


@app.command()
def simulate(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the shots and truth.json.")],
    kind: Annotated[SceneOption, typer.Option(help="The scene.")] = SceneOption.MOVING,
    frames: Annotated[int, typer.Option(min=1, help="Number of shots.")] = 20,
    file_format: Annotated[FormatOption, typer.Option("--format", help="Raw or rendered.")] = FormatOption.DNG,
    seed: Annotated[int, typer.Option(min=0, help="Another seed is another sensor.")] = 0,
    width: Annotated[int, typer.Option(min=32, max=12000, help="Columns of the sensor.")] = 1500,
    height: Annotated[int, typer.Option(min=32, max=12000, help="Rows of the sensor.")] = 1000,
    hot: Annotated[int, typer.Option(min=0, help="Hot samples to plant.")] = 60,
    stuck: Annotated[int, typer.Option(min=0, help="Stuck samples to plant.")] = 10,
    dead: Annotated[int, typer.Option(min=0, help="Dead samples to plant.")] = 15,
    unstable: Annotated[int, typer.Option(min=0, help="Samples that come and go to plant.")] = 0,
    exposure: Annotated[
        float | None,
        typer.Option(
            min=1e-4, max=7200, callback=_finite, help="Shutter time of all shots, s.", show_default="0.3 to 2"
        ),
    ] = None,
    iso: Annotated[
        float | None,
        typer.Option(min=1, max=1e7, callback=_finite, help="ISO of all shots.", show_default="50 to 200"),
    ] = None,
) -> None:
    """Write shots of a virtual sensor with known defects, and truth.json that says which."""
    from hotpixd.scanning import progress
    from hotpixd.simulate import VirtualSensor, write_series
    from hotpixd.store.durable import full_disk_as_state_full

    try:
        sensor = VirtualSensor(
            width, height, hot=hot, stuck=stuck, dead=dead, unstable=unstable, seed=seed, serial=f"V{seed + 1:04d}"
        )
    except ValueError as error:
        _fail(str(error), WRONG_USE)
    try:
        with full_disk_as_state_full(f"for the shots in {out}"), progress("shot", frames) as advance:
            for _ in write_series(out, sensor, frames, kind.value, file_format.value, exposure_s=exposure, iso=iso):
                advance("")
    except (FileExistsError, IsADirectoryError, NotADirectoryError, ValueError) as error:
        _fail(_words(error) if isinstance(error, OSError) else str(error), WRONG_USE)
    print(f"{many(frames, 'shot')} and truth.json with {many(len(sensor.defects), 'defect')} are in {out}")


@app.command()
def demo(
    frames: Annotated[int, typer.Option(min=5, help="Number of shots.")] = 30,
    seed: Annotated[int, typer.Option(min=0, help="Another seed is another sensor.")] = 1,
    keep: Annotated[Path | None, typer.Option(metavar="DIR", help="Keep shots and state in this folder.")] = None,
) -> None:
    """Show the whole way on a virtual camera: shots, scan, defects, compared with what was planted."""
    from hotpixd.demo import run_demo

    if keep is not None and keep.exists() and (not keep.is_dir() or any(keep.iterdir())):
        _fail(f"{keep} is no empty folder; name another, which need not be there", WRONG_USE)
    with _interruptible() as stop:
        raise typer.Exit(run_demo(frames, seed, keep, stop))


@contextlib.contextmanager
def _opened(state: Path | None, *, create: bool = True) -> "Iterator[State]":
    from hotpixd.store.state import State

    with State(_state_dir(state), create=create) as opened:
        yield opened


def _state_dir(state: Path | None) -> Path:
    from hotpixd.store.lock import default_state_dir

    return state or default_state_dir()


def _exchanged(state: Path | None, work: Callable[[_Ask], object]) -> None:
    """Do something for one of the commands of `exchange`, whoever has the state open."""
    from hotpixd.exchange import ask_of

    with _asking(state, ask_of) as ask:
        work(ask)


def _asked(state: Path | None, question: str, **arguments: Any) -> dict[str, Any]:
    """Answer from the state, or have the daemon answer that has it open."""
    with _asking(state, _own_answers) as ask:
        return ask(question, **arguments)


def _own_answers(opened: "State") -> _Ask:
    from hotpixd.views import answers

    return lambda question, **arguments: answers.answer(opened, question, arguments)


def _known_sensor(answer: dict[str, Any]) -> dict[str, Any]:
    if "unknown" in answer:
        _fail(answer["unknown"], WRONG_USE)
    return answer


@contextlib.contextmanager
def _asking(state: Path | None, own: "Callable[[State], _Ask]") -> Iterator[_Ask]:
    """Yield what answers questions: `own` makes it of the state, or else the daemon does that has it open.

    If that ends, or is killed, what it has not answered is asked of the state itself, or of the daemon that comes next.
    """
    from hotpixd.feed import DaemonGone

    answering: _Ask | None = None
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(DaemonGone):
            # Already here: that a state cannot be used is said before all else.
            answering = stack.enter_context(_answering(state, own))

        def ask(question: str, /, **arguments: Any) -> dict[str, Any]:
            nonlocal answering
            failed = 0
            while True:
                try:
                    if answering is None:
                        answering = stack.enter_context(_answering(state, own))
                    return answering(question, **arguments)
                except DaemonGone:
                    failed += 1
                    if failed == _TRIES:
                        raise
                    answering = None
                    time.sleep(_AGAIN_S)

        yield ask


@contextlib.contextmanager
def _answering(state: Path | None, own: "Callable[[State], _Ask]") -> Iterator[_Ask]:
    """Yield what `_asking` asks until a daemon ends."""
    from hotpixd.store import lock

    socket = lock.answering(_state_dir(state))
    if socket is None:
        # Not before it is needed: a daemon's answer is shown without.
        from hotpixd.store.state import State, StateDamaged, StateError, StateLocked

        try:
            opened = State(_state_dir(state), create=False, brief=True)
        except StateDamaged:
            raise
        except StateLocked as locked:
            if locked.feed is None:
                raise
            # It has just begun to answer.
            socket = locked.feed
        except StateError:
            # Another user's: a service may have it open and answer those it lets in.
            socket = _others_socket(state)
            if socket is None:
                raise
        else:
            with opened:
                yield own(opened)
                _amiss.extend(opened.unusable.values())
            return
    from hotpixd.feed import FeedClient

    with contextlib.closing(FeedClient(socket)) as client:
        yield client.ask


def _socket(state: Path | None) -> Path:
    """Return where the daemon of a state listens; without one, where it would."""
    from hotpixd.feed import default_socket

    return _daemon_of(state) or default_socket(_state_dir(state), os.environ)


def _daemon_of(state: Path | None) -> Path | None:
    """Return where the daemon of a state listens, or the only daemon if no state is named; None if there is none."""
    from hotpixd.store import lock

    return lock.answering(_state_dir(state)) or _others_socket(state)


def _others_socket(state: Path | None) -> Path | None:
    """Return the socket of the one daemon of this state, or of the only daemon if none is named."""
    from hotpixd.feed import FeedClient, FeedError, find_sockets

    found = []
    for path in find_sockets(os.environ):
        with contextlib.suppress(FeedError), contextlib.closing(FeedClient(path)) as client:
            if state is None or Path(client.hello["state"]) == state.absolute():
                found.append((path, client.hello["state"]))
    if len(found) > 1:
        listed = ", ".join(f"--state {where}" for _, where in found)
        _fail(f"several daemons are running; say which: {listed}", WRONG_USE)
    return found[0][0] if found else None


def _config_loader(config: Path | None, overrides: dict[str, Any]) -> "Callable[[], Config]":
    """Return what reads the configuration, now and at every reload."""
    from hotpixd import config as configuration

    given = {key: value for key, value in overrides.items() if value is not None}

    def load() -> "Config":
        # What watch is told is all there is to watch; only run looks for a file by itself.
        path = config if "sources" in given else config or configuration.find_config(os.environ)
        return configuration.load(path, environ=os.environ, overrides=given)

    return load


def _loaded(load: "Callable[[], Config]") -> "Config":
    from hotpixd.config import ConfigError

    try:
        return load()
    except ConfigError as error:
        _fail(str(error), WRONG_USE)


def _shown(load: "Callable[[], Config]", state: Path | None, *, plain: bool) -> int:
    """Be the daemon of this command: with its dashboard if there is a terminal for it, else printing lines."""
    if plain or not (sys.stdout.isatty() and sys.stdin.isatty()) or os.environ.get("TERM", "dumb") == "dumb":
        return _serve(load, reloadable=False)
    _loaded(load)
    from hotpixd.attached import watch_with_dashboard

    return watch_with_dashboard(sys.argv[1:], _state_dir(state))


def _serve(load: "Callable[[], Config]", *, reloadable: bool) -> int:
    config = _loaded(load)
    if not config.sources and not config.cameras:
        _fail(
            "nothing to watch: name directories under `sources` or cameras under `cameras` in the configuration",
            WRONG_USE,
        )
    _log_to(config.log_level)
    _Out.answers = False
    from hotpixd.feed import FeedError
    from hotpixd.metrics import MetricsError
    from hotpixd.service import serve

    try:
        code = serve(config, load, reloadable=reloadable)
    except (FeedError, MetricsError) as error:
        # Not wrong use: whoever has the address may give it up, and the service manager tries again.
        _fail(str(error), STATE_UNUSABLE)
    _leave_hung_reads(code)
    return code


def _leave_hung_reads(code: int) -> None:
    """End here if a read of a dying card never will, or a write to a dead drive: Python would wait for its thread."""
    import threading

    from hotpixd.intake.camera import SAVING
    from hotpixd.monitor import HASHING

    for thread in threading.enumerate():
        if thread.name.startswith((HASHING, SAVING)):
            thread.join(1.0)
            if thread.is_alive():
                logging.getLogger("hotpixd").warning("a file is still being read or saved; it is left behind")
                sys.stderr.flush()
                os._exit(code)


def _log_to(level: str) -> None:
    """Log to the journal if that is where stderr goes, else with the time to stderr."""
    from hotpixd.systemd import log_to_journal

    handler = log_to_journal(os.environ) or _to_stderr("%(asctime)s %(levelname)-7s %(message)s")
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


def _to_stderr(form: str) -> logging.Handler:
    from hotpixd.systemd import PlainFormatter

    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(PlainFormatter(form, "%Y-%m-%d %H:%M:%S"))
    return handler


class _Stop:
    """True once the user asked to stop. A second Ctrl-C does not wait any more."""

    def __init__(self) -> None:
        self.asked = False
        self.code = DONE
        """Exit code of what was stopped, as shells have it: 130 after Ctrl-C, 143 after SIGTERM."""

    def __call__(self) -> bool:
        return self.asked

    def ask(self, number: int, _frame: FrameType | None) -> None:
        if self.asked:
            # Safe at any moment: what was received is in the spool and the ledger.
            if sys.stderr.isatty():
                # The progress bar has hidden the cursor.
                os.write(2, b"\x1b[?25h\n")
            os._exit(128 + number)
        self.code = 128 + number
        self.asked = True


@contextlib.contextmanager
def _interruptible() -> Iterator[_Stop]:
    stop = _Stop()
    before = {number: signal.signal(number, stop.ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _print_json(answer: dict[str, Any]) -> None:
    json.dump(answer, sys.stdout, indent=1, ensure_ascii=True)
    print()
