"""The command line. Its names, JSON and exit codes are a contract; what it does is done elsewhere."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import logging
import os
import signal
import sys
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TextIO

import typer

from hotpixd import __version__

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

    from hotpixd.store.state import State

DONE, SHOTS_REFUSED, WRONG_USE, STATE_UNUSABLE = 0, 1, 2, 3
"""Exit codes."""

app = typer.Typer(
    name="hotpixd",
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Says which pixels of a camera's sensor are hot, stuck or dead, and how sure that is.",
    pretty_exceptions_enable=False,
)

StateOption = Annotated[
    Path | None,
    typer.Option("--state", metavar="DIR", help="State directory. [default: $STATE_DIRECTORY, else the user's]"),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


class KindOption(StrEnum):
    """What the user says the shots are."""

    AUTO = "auto"
    LIGHT = "light"
    DARK = "dark"


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


def main() -> None:
    """Run the command line; every foreseeable fault ends in a sentence and an exit code."""
    _prepare_streams()
    from hotpixd.store.durable import StateError

    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s", stream=sys.stderr)
    _prepare_cache()
    try:
        try:
            app()
        finally:
            # Here, not when the interpreter ends: then it could only complain.
            sys.stdout.flush()
    except StateError as error:
        _fail(str(error), STATE_UNUSABLE)
    except OSError as error:
        _fail(_words(error), STATE_UNUSABLE)


def _fail(message: str, code: int) -> NoReturn:
    from hotpixd.views.text import printable

    print(f"hotpixd: {printable(message)}", file=sys.stderr)
    sys.exit(code)


def _words(error: OSError) -> str:
    return f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}"


class _Out(io.FileIO):
    """A standard stream whose writes never fail: if its reader has gone (| head) or its disk is full, say nothing.

    What was done is told by the exit code, which such a failure must not change.
    """

    def write(self, data: ReadableBuffer, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.ENOSPC, errno.EIO):
                raise
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
    os.environ["NUMBA_CACHE_DIR"] = str(Path(given) / f"kernels-{__version__}")


@app.callback(invoke_without_command=True)
def _options(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        print(f"hotpixd {__version__}")
        raise typer.Exit


@app.command()
def scan(
    paths: Annotated[list[str], typer.Argument(metavar="PATH...", help="Files, folders (with all below) or globs.")],
    kind: Annotated[
        KindOption, typer.Option(help="What the shots are; auto: the file's header or samples say.")
    ] = KindOption.AUTO,
    state: StateOption = None,
) -> None:
    """Fold files or folders into the statistic, say what was found, and exit.

    Interrupted (Ctrl-C, a crash, a power cut), it goes on where it was when it is started again.
    """
    from hotpixd.scanning import run_scan

    with _opened(state) as opened, _interruptible() as stop:
        code = run_scan(opened, paths, None if kind is KindOption.AUTO else kind.value, stop)
    raise typer.Exit(code)


@app.command()
def status(state: StateOption = None, as_json: JsonOption = False) -> None:
    """Show sensors, frames, what was refused, the last shot."""
    from hotpixd.views import answers, tables

    with _opened(state, create=False) as opened:
        answer = answers.status(opened)
    _print_json(answer) if as_json else tables.print_status(answer)


@app.command()
def defects(
    state: StateOption = None,
    as_json: JsonOption = False,
    everything: Annotated[bool, typer.Option("--all", help="Candidates and recovered ones too.")] = False,
) -> None:
    """List the stable defects; with --all the candidates too."""
    from hotpixd.views import answers, tables

    with _opened(state, create=False) as opened:
        answer = answers.defects(opened, candidates=everything)
        waiting = answers.waiting(opened)
    _print_json(answer) if as_json else tables.print_defects(answer)
    if waiting:
        print(f"hotpixd: {waiting} shots were received but not folded; run scan again.", file=sys.stderr)


@app.command()
def least_variance(
    k: Annotated[int, typer.Option("-k", min=1, max=1_000_000, help="How many.")] = 10,
    state: StateOption = None,
    as_json: JsonOption = False,
) -> None:
    """List the k samples of least variance over all frames."""
    from hotpixd.views import answers, tables

    with _opened(state, create=False) as opened:
        answer = answers.least_variance(opened, k)
    _print_json(answer) if as_json else tables.print_least_variance(answer)


@app.command()
def verify(state: StateOption = None, as_json: JsonOption = False) -> None:
    """Check every digest of the state."""
    from hotpixd.views import answers, tables

    with _opened(state, create=False) as opened:
        answer = answers.verify(opened)
    _print_json(answer) if as_json else tables.print_verify(answer)
    raise typer.Exit(DONE if answer["ok"] else STATE_UNUSABLE)


@app.command()
def simulate(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the shots and truth.json.")],
    kind: Annotated[SceneOption, typer.Option(help="The scene.")] = SceneOption.MOVING,
    frames: Annotated[int, typer.Option(min=1, help="Number of shots.")] = 20,
    file_format: Annotated[FormatOption, typer.Option("--format", help="Raw or rendered.")] = FormatOption.DNG,
    seed: Annotated[int, typer.Option(min=0, help="Another seed is another sensor.")] = 0,
    width: Annotated[int, typer.Option(min=32, max=12000)] = 1500,
    height: Annotated[int, typer.Option(min=32, max=12000)] = 1000,
    hot: Annotated[int, typer.Option(min=0, help="Hot samples to plant.")] = 60,
    stuck: Annotated[int, typer.Option(min=0, help="Stuck samples to plant.")] = 10,
    dead: Annotated[int, typer.Option(min=0, help="Dead samples to plant.")] = 15,
    unstable: Annotated[int, typer.Option(min=0, help="Samples that come and go to plant.")] = 0,
    exposure: Annotated[float | None, typer.Option(help="Shutter time of all shots, s. [default: 0.3 to 2]")] = None,
    iso: Annotated[float | None, typer.Option(help="ISO of all shots. [default: 50 to 200]")] = None,
) -> None:
    """Write shots of a virtual sensor with known defects, and truth.json that says which."""
    from hotpixd.scanning import progress
    from hotpixd.simulate import VirtualSensor, write_series

    try:
        sensor = VirtualSensor(width, height, hot=hot, stuck=stuck, dead=dead, unstable=unstable, seed=seed)
    except ValueError as error:
        _fail(str(error), WRONG_USE)
    try:
        with progress("shot", frames) as advance:
            for _ in write_series(out, sensor, frames, kind.value, file_format.value, exposure_s=exposure, iso=iso):
                advance("")
    except (OSError, ValueError) as error:
        _fail(_words(error) if isinstance(error, OSError) else str(error), WRONG_USE)
    print(f"{frames} shots and truth.json with {len(sensor.defects)} defects are in {out}")


@app.command()
def demo(
    frames: Annotated[int, typer.Option(min=5, help="Number of shots.")] = 30,
    seed: Annotated[int, typer.Option(min=0, help="Another seed is another sensor.")] = 1,
    keep: Annotated[Path | None, typer.Option(metavar="DIR", help="Keep shots and state in this folder.")] = None,
) -> None:
    """Show the whole way on a virtual camera: shots, scan, defects, compared with what was planted."""
    from hotpixd.demo import run_demo

    with _interruptible() as stop:
        raise typer.Exit(run_demo(frames, seed, keep, stop))


@contextlib.contextmanager
def _opened(state: Path | None, *, create: bool = True) -> Iterator[State]:
    from hotpixd.store.state import State, default_state_dir

    with State(state or default_state_dir(), create=create) as opened:
        yield opened


class _Stop:
    """True once the user asked to stop. A second Ctrl-C does not wait any more."""

    def __init__(self) -> None:
        self.asked = False

    def __call__(self) -> bool:
        return self.asked

    def ask(self, number: int, _frame: FrameType | None) -> None:
        if self.asked:
            # Safe at any moment: what was received is in the spool and the ledger.
            if sys.stderr.isatty():
                # The progress bar has hidden the cursor.
                os.write(2, b"\x1b[?25h\n")
            os._exit(128 + number)
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
