"""The whole daemon without a camera: libgphoto2's virtual one shoots frames of a virtual sensor with known defects.

The daemon is the real one, `hotpixd tether`, and so is the way of the shots:
pressed on the body, announced by an event, fetched, folded. A dark series on
the same camera follows. In the end what was found is compared with what was
planted.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from hotpixd.attached import OwnDaemon, leaving_by_signals, save_attached, show_dashboard_of
from hotpixd.core.sensor import DetectionSettings
from hotpixd.feed import FeedClient, FeedError
from hotpixd.simulate import PlantedDefect, Scene, VirtualSensor
from hotpixd.views.text import printable
from hotpixd.words import many

_WIDTH, _HEIGHT = 750, 500
_HOT_ADU_PER_S = (500.0, 12_000.0)
"""Dark currents planted. In a JPEG of 1 s, weaker ones would take more frames than a demo has."""

_DARK_S = 1.0
"""The longest exposure that the virtual camera has."""

_FILE_BYTES = 400_000
"""The virtual camera's files cannot change their size: each is filled up to this one."""

_MOST_DARKS = 20
"""The virtual camera stops taking pictures after 26."""

_PACE_S = 0.8
"""Least time between two scenes: who watches wants to see candidates rise."""

_NEAR = 2
"""Pixels by which a defect found in JPEGs may be off: the camera has interpolated its colours."""

_PRESS = "0x9999,0x0,0x0"
"""What makes the virtual camera believe that its button was pressed."""

_COME_WITHIN_S = 30.0
_START_WITHIN_S = 300.0
"""For the first shot: a small computer compiles for minutes."""

_READ_THE_END_S = 4.0
_TOLD_WITHIN_S = 1.5


def run_demo(frames: int, seed: int, keep: Path | None, stop: Callable[[], bool]) -> int:
    """Shoot, tether and compare; return 0 only if every planted defect was found and no other.

    Parameters
    ----------
    frames : shots of moving scenes, then half as many darks, at most twenty
    keep : folder for card, state and results; if None only the results are kept, in a temporary one
    """
    results = keep or Path(tempfile.mkdtemp(prefix="hotpixd-demo-"))
    results.mkdir(parents=True, exist_ok=True)
    shows = sys.stdin.isatty() and sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb"
    with contextlib.ExitStack() as stack:
        work = keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hotpixd-demo-work-")))
        # Sockets need short paths.
        runtime = stack.enter_context(tempfile.TemporaryDirectory(prefix="hpx-"))
        sensor = VirtualSensor(_WIDTH, _HEIGHT, hot=30, stuck=6, dead=6, seed=seed, hot_range_adu_per_s=_HOT_ADU_PER_S)
        print(f"A virtual camera of {_WIDTH}x{_HEIGHT} pixels with {len(sensor.defects)} planted defects. It shoots")
        print(f"{frames} scenes and {_darks(frames)} darks; the daemon tethers it. At first it compiles for a while.")
        print(f"Results go to {results}", flush=True)
        card = _Card(work / "card", sensor)
        # The first shot is found on the card, before any button is pressed.
        card.put(0, "moving")
        environ = {
            **{name: value for name, value in os.environ.items() if not name.startswith("HOTPIXD_")},
            "VCAMERADIR": str(card.root),
            "XDG_RUNTIME_DIR": runtime,
        }
        environ.pop("RUNTIME_DIRECTORY", None)
        state = work / "state"
        stack.enter_context(leaving_by_signals() if shows else contextlib.nullcontext())
        daemon = OwnDaemon(["tether", "--plain", "--state", str(state)], state, environ)
        stack.callback(daemon.stop)
        if not daemon.answers():
            sys.stderr.write(daemon.said)
            return 1
        demo = _Demo(card, daemon, frames, stop, results, quiet=shows)
        demo.run_with_dashboard() if shows else demo.run()
        if demo.failure is not None:
            print(f"The demo did not come to its end: {demo.failure}")
            return 1
        return _compare(sensor, demo.found, results)


class _Card:
    """The card in the virtual camera: one file, which each press of the button shows under another name."""

    def __init__(self, root: Path, sensor: VirtualSensor) -> None:
        self.root = root
        self._sensor = sensor
        self._folder = root / "DCIM" / "100VIRTL"
        self._folder.mkdir(parents=True, exist_ok=True)
        self._shots = 0

    def put(self, index: int, scene: Scene) -> None:
        """Have the next shot show this."""
        exposure_s = _DARK_S if scene == "dark" else None
        path = self._folder / ".next"
        self._sensor.write_jpeg(path, self._sensor.shot(index, scene, exposure_s=exposure_s))
        size = path.stat().st_size
        if size > _FILE_BYTES:
            raise ValueError(f"shot {index} has {size} bytes, more than {_FILE_BYTES}")
        with path.open("ab") as file:
            file.write(bytes(_FILE_BYTES - size))
        # Names come again when the camera is opened anew; sizes are equal. The times tell shots apart.
        self._shots += 1
        os.utime(path, (1_750_000_000 + 2 * self._shots,) * 2)
        path.replace(self._folder / "VIRT0001.JPG")


class _Demo:
    """Presses the button and orders the darks, while the daemon and perhaps its dashboard do their work."""

    def __init__(
        self, card: _Card, daemon: OwnDaemon, frames: int, stop: Callable[[], bool], results: Path, *, quiet: bool
    ) -> None:
        self._card = card
        self._daemon = daemon
        self._frames = frames
        self._stop = stop
        self._results = results
        self._quiet = quiet
        self._left = threading.Event()
        self._alerts = 0
        self._counted = 0
        self.failure: str | None = None
        self.found: dict[str, Any] = {"sensors": []}

    def run_with_dashboard(self) -> None:
        """Run, with the daemon's dashboard on the terminal until the end or until the user quits."""
        shooting = threading.Thread(target=self._run_and_end_dashboard, daemon=True)
        shooting.start()
        show_dashboard_of(self._daemon)
        self._left.set()
        shooting.join(_COME_WITHIN_S + 15.0)

    def _run_and_end_dashboard(self) -> None:
        self.run()
        if not self._left.is_set():
            # Let the last candidates be seen as what they have become.
            self._left.wait(_READ_THE_END_S)
            os.kill(os.getpid(), signal.SIGINT)

    def run(self) -> None:
        """Shoot everything, and take in what was found."""
        try:
            with contextlib.closing(FeedClient(self._daemon.socket)) as client:
                self._shoot(client)
                self._shoot_darks(client)
                # The daemon tells how it does once per second.
                time.sleep(_TOLD_WITHIN_S)
                save_attached(self._daemon.socket, self._results / "dashboard.svg", 120, 36)
                self.found = client.ask("defects")
        except (FeedError, OSError, ValueError) as error:
            self.failure = "it was stopped" if self._is_over() else str(error)
        except _Stopped:
            self.failure = "it was stopped"

    def _is_over(self) -> bool:
        return self._left.is_set() or self._stop()

    def _shoot(self, client: FeedClient) -> None:
        self._wait_for(client, 1, _START_WITHIN_S)
        for index in range(1, self._frames):
            began = time.monotonic()
            self._card.put(index, "moving")
            client.ask("set", name="opcode", value=_PRESS)
            self._wait_for(client, index + 1)
            time.sleep(max(0.0, began + _PACE_S - time.monotonic()))

    def _shoot_darks(self, client: FeedClient) -> None:
        count = _darks(self._frames)
        self._say("The cap goes on: a series of darks.")
        # The virtual camera takes no more than 26 pictures before it is opened anew.
        client.ask("list-cards")
        until = time.monotonic() + _COME_WITHIN_S
        while not any(camera["condition"] == "ready" for camera in client.ask("cameras")["cameras"]):
            self._pause(until, "the camera")
        self._card.put(self._frames, "dark")
        client.ask("darks", frames=count, exposure_s=_DARK_S, cooldown_s=0.4)
        shown = 0
        until = time.monotonic() + _COME_WITHIN_S
        while True:
            series = client.ask("series")["series"]
            if series["stage"] == "failed":
                raise ValueError(series["detail"])
            taken = series["taken"]
            if taken > shown:
                shown, until = taken, time.monotonic() + _COME_WITHIN_S
                if taken < count:
                    # One more would be fetched as a shot of its own when the card is listed again.
                    self._card.put(self._frames + taken, "dark")
                self._tell(client)
            if series["stage"] == "done":
                break
            self._pause(until, f"dark {taken + 1}")
        self._wait_for(client, self._frames + count)

    def _wait_for(self, client: FeedClient, shots: int, within_s: float = _COME_WITHIN_S) -> None:
        """Wait until so many shots are folded."""
        until = time.monotonic() + within_s
        while True:
            status = client.ask("status")
            if status["shots"]["folded"] >= shots:
                self._tell(client, status)
                return
            self._pause(until, f"shot {shots}")

    def _pause(self, until: float, what: str) -> None:
        if self._is_over():
            raise _Stopped
        if time.monotonic() > until:
            raise ValueError(f"{what} has not come within {_COME_WITHIN_S:.0f} s")
        if not self._daemon.running:
            raise ValueError(f"the daemon has ended:\n{self._daemon.said}")
        time.sleep(0.04)

    def _tell(self, client: FeedClient, status: Mapping[str, Any] | None = None) -> None:
        """Print a line now and then, and every alert, where there is no dashboard."""
        if self._quiet:
            return
        status = status or client.ask("status")
        for alert in status["alerts"]:
            if alert["id"] > self._alerts:
                self._alerts = alert["id"]
                print(f"  alert: {printable(alert['text'])}")
        folded = status["shots"]["folded"]
        if folded % 5 == 0 and folded != self._counted and status["sensors"]:
            self._counted = folded
            sensor = status["sensors"][0]
            # They are multiples of five.
            self._say(f"{folded} shots folded: {many(sensor['candidate'], 'candidate')}, {sensor['stable']} stable")

    def _say(self, line: str) -> None:
        if not self._quiet:
            print(line, flush=True)


def _darks(frames: int) -> int:
    return min(max(frames // 2, 1), _MOST_DARKS)


class _Stopped(Exception):  # noqa: N818 - a wish, not an error
    """The user does not want to go on."""


def _compare(sensor: VirtualSensor, found: Mapping[str, Any], results: Path) -> int:
    entries = [entry for known in found["sensors"] for entry in known["defects"]]
    (results / "defects.json").write_text(json.dumps({"sensors": found["sensors"]}, indent=1) + "\n", "utf-8")
    _draw_map(sensor, entries, results / "map.png")
    matched = {id(planted): entry for planted, entry in _matches(sensor.defects, entries)}
    missed = [planted for planted in sensor.defects if id(planted) not in matched]
    false = [entry for entry in entries if not any(_is_near(planted, entry) for planted in sensor.defects)]
    print(f"\nPlanted {len(sensor.defects)}, found {len(matched)}, missed {len(missed)}, false {len(false)}.")
    for planted in missed:
        print(f"  missed {_words(planted)}")
    for entry in false:
        print(f"  false at x {entry['x']}, y {entry['y']}: {entry['kind']}")
    kinds = sum(matched[id(p)]["kind"] == p.kind for p in sensor.defects if id(p) in matched)
    floor = DetectionSettings().floor_sigma
    print(f"Of those found, {kinds} are named as the kind they are; hot ones below {floor:g} sigma are named warm.")
    print(f"defects.json, map.png and dashboard.svg are in {results}")
    return 0 if not missed and not false else 1


def _matches(
    planted: tuple[PlantedDefect, ...] | list[PlantedDefect], entries: list[dict[str, Any]]
) -> Iterator[tuple[PlantedDefect, dict[str, Any]]]:
    for defect in planted:
        near = [entry for entry in entries if _is_near(defect, entry)]
        if near:
            yield defect, min(near, key=lambda entry: abs(entry["x"] - defect.x) + abs(entry["y"] - defect.y))


def _is_near(planted: PlantedDefect, entry: Mapping[str, Any]) -> bool:
    return bool(max(abs(entry["x"] - planted.x), abs(entry["y"] - planted.y)) <= _NEAR)


def _draw_map(sensor: VirtualSensor, entries: list[dict[str, Any]], path: Path) -> None:
    """Draw where defects were found (dots by their kind) and where they were planted (rings)."""
    from PIL import Image, ImageDraw

    picture = Image.new("RGB", (_WIDTH, _HEIGHT), (16, 18, 22))
    draw = ImageDraw.Draw(picture)
    for planted in sensor.defects:
        draw.ellipse((planted.x - 6, planted.y - 6, planted.x + 6, planted.y + 6), outline=(110, 116, 126))
    colours = {"hot": (255, 96, 64), "warm": (255, 190, 90), "bright": (255, 230, 120), "stuck": (96, 200, 255)}
    for entry in entries:
        box = (entry["x"] - 2, entry["y"] - 2, entry["x"] + 2, entry["y"] + 2)
        draw.rectangle(box, fill=colours.get(entry["kind"], (190, 140, 255)))
    picture.save(path)


def _words(defect: PlantedDefect) -> str:
    strength = "" if defect.dark_current_adu_per_s is None else f" of {defect.dark_current_adu_per_s:.0f} ADU/s"
    return f"{defect.kind}{strength} at x {defect.x}, y {defect.y}"
