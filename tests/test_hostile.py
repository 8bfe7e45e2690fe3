"""Hostile input on the real program: names that forge lines, files that are none, secrets that must not be told."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from conftest import HOTPIXD, Camera, environment, run
from daemons import eventually
from hotpixd.feed import find_sockets
from hotpixd.simulate import VirtualSensor, write_series

FORGED = "\n1999-01-01 00:00:00 ERROR   the disk is on fire\n<0>1999"
"""What would be a line of its own wherever line breaks get through."""

SAID = f"[red]Evil[/red]\x1b[31m\x07{FORGED}\x7f"
"""What a camera says of itself: EXIF is ASCII."""

NAMES = (
    f"a[bold]\x1b]0;title\x07{FORGED}\r".encode() + b"\xff\xfe\xc2\x9b31m\xe2\x80\xae\xe2\x80\xa8.dng",
    b"b" + "\u202e".encode() * 83 + b".dng",
    b"c[b]\x1b[2J" + b"x" * (255 - 12) + b".dng",
)
"""Names of files: markup, escape sequences, line breaks of all sorts, bytes that are no UTF-8, as long as can be."""


def assert_plain(text: bytes | str, what: str) -> None:
    """Assert that a terminal, or who reads it line by line, is shown nothing but what the program says."""
    said = text.decode("utf-8") if isinstance(text, bytes) else text
    bad = {c for c in said if not (c.isprintable() or c == "\n")}
    assert not bad, f"{what} has {bad}: {said!r}"
    forged = [line for line in said.split("\n") if re.match(r"(<\d>)*\s*(<0>)?1999", line)]
    assert not forged, f"{what} has lines that are not its own: {forged}"


def strings(value: Any) -> Iterator[str]:
    """Go through all texts in some JSON."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from strings(key)
            yield from strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from strings(inner)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of hostile name with shots of a hostile camera, and one that is broken, under hostile names."""
    made = tmp_path_factory.mktemp("made")
    sensor = VirtualSensor(96, 64, hot=4, stuck=1, dead=1, seed=5, make=SAID, model=SAID, serial=SAID)
    for _ in write_series(made, sensor, 8, "moving", "dng"):
        pass
    folder = Path(os.fsdecode(os.fsencode(tmp_path_factory.mktemp("hostile")) + b"/card[red]\x1b[5m\n1999 ")).absolute()
    folder.mkdir()
    shots = sorted(made.glob("*.dng"))
    for name, shot in zip(NAMES, shots, strict=False):
        shutil.copyfile(shot, os.fsencode(folder) + b"/" + name)
        Path(os.fsdecode(os.fsencode(folder) + b"/z" + name[1:])).write_bytes(shot.read_bytes()[:3000] + name)
    for shot in shots[len(NAMES) :]:
        shutil.copyfile(shot, folder / shot.name)
    return folder


COMMANDS = (
    ("status",),
    ("defects", "--all"),
    ("defects",),
    ("least-variance", "-k", "5"),
    ("verify",),
)


def test_nothing_hostile_reaches_a_terminal_by_a_scan(hostile: Path, tmp_path: Path):
    """Nor by what is asked afterwards; as JSON, all of it is ASCII. That it was there at all is asserted, too."""
    done = run("scan", hostile, "--state", tmp_path / "state")
    assert done.returncode == 1
    assert "[red]Evil[/red]" in done.stdout
    assert done.stdout.count("  refused ") == len(NAMES)
    assert_plain(done.stdout, "scan")
    assert_plain(done.stderr, "scan's stderr")
    for command in COMMANDS:
        done = run(*command, "--state", tmp_path / "state")
        assert done.returncode == 0, done.stderr
        assert_plain(done.stdout + done.stderr, command[0])
        if command[0] != "verify":
            assert "[red]Evil[/red]" in done.stdout, command
        done = run(*command, "--json", "--state", tmp_path / "state")
        assert done.stdout.isascii()
        json.loads(done.stdout)
    for wanted in (hostile / "none\x1b[31m\n1999", str(hostile) + "*\x1b\n1999"):
        done = run("scan", wanted, "--state", tmp_path / "state")
        assert done.returncode == 2
        assert_plain(done.stdout + done.stderr, "scan of nothing")


@pytest.mark.parametrize("journal", [False, True], ids=["lines", "journal"])
def test_nothing_hostile_reaches_what_a_daemon_tells(hostile: Path, tmp_path: Path, runtime: Path, journal: bool):
    """Its log, the journal, the feed, alerts, metrics, the dashboard and the answers."""
    told_to, state = tmp_path / "told.jsonl", tmp_path / "state"
    config = tmp_path / "hotpixd.yaml"
    sections = {
        "log_level": "debug",
        "sources": [
            {"directory": os.fsencode(hostile).decode(), "camera": f"x{SAID}", "settle_s": 0.1},
            {"directory": f"{tmp_path}/missing{SAID}\u202e"},
        ],
        "alerts": {"command": ["sh", "-c", f"cat >> '{told_to}'; echo >> '{told_to}'"], "gather_s": 1},
        "metrics": {"listen": "127.0.0.1:19470"},
    }
    config.write_text(json.dumps(sections))  # JSON is YAML, and can say anything
    with (tmp_path / "log").open("w+b") as log:
        found = os.fstat(log.fileno())
        env = environment(XDG_RUNTIME_DIR=str(runtime))
        if journal:
            env["JOURNAL_STREAM"] = f"{found.st_dev}:{found.st_ino}"
        command = [*HOTPIXD, "run", "--config", str(config), "--state", str(state)]
        process = subprocess.Popen(command, env=env, stdout=log, stderr=log)
        try:

            def said() -> str:
                return (tmp_path / "log").read_bytes().decode("utf-8")

            eventually(
                lambda: said().count("folded ") >= 8 and said().count("refused ") >= len(NAMES), "it is done", 90
            )
            eventually(told_to.exists, "the command is run")
            (path,) = find_sockets(env)
            with socket.socket(socket.AF_UNIX) as feed:
                feed.settimeout(20)
                feed.connect(str(path))
                feed.sendall(b'{"ask":"watch"}\n{"ask":"status","id":"\\u001b[31m\\n1999"}\n{"ask":"\\u001b\\n1999"}\n')
                lines = feed.makefile("rb")
                received = [lines.readline() for _ in range(4)]
            for line in received:
                assert line.isascii()
                assert_plain(line, "feed")
            live = next(json.loads(line)["set"] for line in received if b'"snapshot"' in line)
            for text in (live["daemon"]["activity"], *strings(live["alerts"])):
                assert_plain(text, "the activity and alerts of the feed")
                assert "\n" not in text
            assert any("[red]Evil" in text for text in strings(live))
            with urllib.request.urlopen("http://127.0.0.1:19470/metrics", timeout=10) as response:
                assert_plain(response.read(), "metrics")
            for ask in COMMANDS:
                done = run(*ask, "--state", state, env=env)
                assert done.returncode == 0, done.stderr
                assert_plain(done.stdout + done.stderr, ask[0])
            picture = tmp_path / "screen.svg"
            picture.write_text("an older one")
            done = run("dashboard", "--picture", picture, "--force", "--size", "200x60", "--state", state, env=env)
            assert done.returncode == 0, done.stderr
            shown = picture.read_text()
            assert "[red]Evil" in shown.replace("&#160;", " ").replace("&#x27;", "'")
            assert not {c for c in shown if not (c.isprintable() or c == "\n")} - {"\xa0"}
        finally:
            process.terminate()
            process.wait(60)
        assert_plain(said(), "the log")
    messages = [json.loads(line) for line in told_to.read_text().splitlines() if line]
    assert messages
    for message in messages:
        assert_plain(message["body"], "an alert")
        assert_plain(message["title"], "the title of an alert")
        for text in strings(message["alerts"]):
            assert_plain(text, "an alert")
            assert "\n" not in text


@pytest.mark.parametrize(
    "text",
    [
        f'"{{}}": 1\nlog_level: "{"x" * 200}\\e[31m\\n1999"',
        'detection: {"\\e[31m\\n1999": 1, alpha: "\\n1999\\e"}',
        'sources: [{directory: "/x\\e\\n1999", kind: "\\n1999"}, {directory: "/x\\e\\n1999/y"}]',
        'cameras: [{save_as: "../\\e\\n1999", save_to: "/\\e\\n1999"}]',
        'alerts: {quiet_hours: "\\n1999\\e\\u202e"}',
        "\x1b[31m: [",
        "a: *\u202e",
        "state: \udcff",
    ],
)
def test_a_hostile_configuration_is_told_on_lines_of_our_own(tmp_path: Path, text: str):
    """Whatever its keys and values hold, and its own name."""
    path = tmp_path / "\x1b[31m\n1999.yaml"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    done = run("check-config", path)
    assert done.returncode == 2
    assert done.stderr
    assert_plain(done.stdout + done.stderr, "check-config")


def test_only_files_are_taken_from_a_watched_folder(camera: Camera, tmp_path: Path, start):
    """Links, loops of links, FIFOs, sockets and devices with a picture's name are not followed, opened or told of."""
    inbox, elsewhere = tmp_path / "inbox", tmp_path / "elsewhere"
    (inbox / "DCIM").mkdir(parents=True)
    elsewhere.mkdir()
    shutil.copyfile(camera.shots[0], elsewhere / "elsewhere.dng")
    shutil.copyfile(camera.shots[1], inbox / "DCIM" / "real.dng")
    for number, target in enumerate(("/etc/passwd", elsewhere / "elsewhere.dng", elsewhere, inbox, ".", "nowhere")):
        (inbox / "DCIM" / f"link{number}.dng").symlink_to(target)
    (inbox / "folder").symlink_to(elsewhere)
    (inbox / "loop").symlink_to(inbox)
    os.mkfifo(inbox / "fifo.dng")
    with socket.socket(socket.AF_UNIX) as listener:
        # By its short name: a socket's path has at most 107 bytes.
        here = Path.cwd()
        os.chdir(inbox)
        try:
            listener.bind("socket.dng")
        finally:
            os.chdir(here)
        if os.geteuid() == 0:
            with contextlib.suppress(PermissionError):
                os.mknod(inbox / "device.dng", 0o600 | 0o020000, os.makedev(1, 5))
        daemon = start("watch", inbox)
        daemon.wait_folded(1)
        time.sleep(2.5)
        answer = daemon.ask("status")
        assert answer["sources"][0]["files"] == 1
        assert answer["shots"] == {**answer["shots"], "folded": 1, "refused": 0}
        assert daemon.stop() == 0


def test_a_folder_that_becomes_a_link_leads_nowhere(camera: Camera, tmp_path: Path, start):
    """Swapped to and fro while its shots are read: nothing of the other place is ever folded."""
    inbox, outside = tmp_path / "inbox", tmp_path / "outside"
    (inbox / "DCIM").mkdir(parents=True)
    outside.mkdir()
    for number, shot in enumerate(camera.shots[:6]):
        shutil.copyfile(shot, inbox / "DCIM" / f"{number}.dng")
    for number in range(6):
        shutil.copyfile(camera.shots[6 + number % 6], outside / f"{number}.dng")
    daemon = start("watch", inbox)
    until = time.monotonic() + 6
    while time.monotonic() < until:
        (inbox / "DCIM").rename(tmp_path / "aside")
        (inbox / "DCIM").symlink_to(outside)
        time.sleep(0.01)
        (inbox / "DCIM").unlink()
        (tmp_path / "aside").rename(inbox / "DCIM")
        time.sleep(0.05)
    daemon.wait_folded(6, 90)
    names = {row["name"] for row in [daemon.ask("status")["last_shot"]] if row}
    assert names <= {f"{number}.dng" for number in range(6)}
    assert daemon.folded() == 6
    assert daemon.stop() == 0
    spooled = {path.read_bytes() for path in (daemon.state / "spool").iterdir()}
    assert spooled == {shot.read_bytes() for shot in camera.shots[:6]}


MARK = "s3cr3tMARK77"


def test_secrets_are_told_to_nobody(camera: Camera, tmp_path: Path, start):
    """Not in the log at its most talkative, the feed, answers, metrics, the state, a traceback or the process list."""
    listed = tmp_path / "urls"
    listed.write_text(f"ntfy://tk_{MARK}@127.0.0.1:9/topic{MARK}\n# {MARK}\nnonsense-{MARK}\n")
    alerts = {
        "notify": [f"json://user:{MARK}@127.0.0.1:9/{MARK}/?cto=1", f"tgram://{MARK}/{MARK}"],
        "notify_file": str(listed),
        "command": ["sh", "-c", f"echo {MARK} >&2; exit 3", MARK],
        "gather_s": 0,
    }
    sections: dict[str, Any] = {
        "log_level": "debug",
        "sources": [{"directory": str(camera.folder)}],
        "alerts": alerts,
        "metrics": {"listen": "127.0.0.1:19471"},
    }
    config = tmp_path / "hotpixd.yaml"
    config.write_text(yaml.safe_dump(sections))
    checked = run("check-config", config)
    assert checked.returncode == 2, "a line of the file is no URL"
    everything = [checked.stdout, checked.stderr]
    listed.write_text(listed.read_text().replace(f"nonsense-{MARK}\n", f"unheardof://{MARK}\n"))
    daemon = start("run", "--config", config, PYTHONFAULTHANDLER="1")
    daemon.wait_folded(12)
    eventually(lambda: "ended with 3" in daemon.log, "the command fails")
    eventually(lambda: "was not delivered to json://127.0.0.1" in daemon.log, "the server is not there")
    for wrong in (
        {**sections, "alerts": {**alerts, "notify": f"json://user:{MARK}@x/"}},
        {**sections, "alerts": {**alerts, "nottify": [f"json://user:{MARK}@x/"]}},
        {**sections, "feed": {"socket": f"json://user:{MARK}@x/"}},
        {**sections, "alerts": {**alerts, "command": {MARK: MARK}}},
    ):
        config.write_text(yaml.safe_dump(wrong))
        everything += [(done := run("check-config", config)).stdout, done.stderr]
        assert done.returncode == 2
        errors = daemon.log.count("is not reloaded")
        daemon.process.send_signal(signal.SIGHUP)
        eventually(lambda errors=errors: daemon.log.count("is not reloaded") > errors, "the mistake is told")
    with contextlib.closing(daemon.client()) as client:
        everything += [json.dumps(next(iter(client.watch()))), json.dumps(dict(client.hello))]
    everything += [json.dumps(daemon.ask(*command)) for command in COMMANDS]
    with urllib.request.urlopen("http://127.0.0.1:19471/metrics", timeout=10) as response:
        everything.append(response.read().decode())
    process = Path(f"/proc/{daemon.process.pid}")
    everything += [(process / "cmdline").read_text(), (process / "comm").read_text()]
    daemon.stop(signal.SIGABRT)
    # Of which thread that was, a busy machine does not always say.
    assert "(most recent call first)" in daemon.log
    everything.append(daemon.log)
    for path in daemon.state.rglob("*"):
        if path.is_file():
            everything.append(path.read_bytes().decode("latin-1"))
    assert len(everything) > 20
    for text in everything:
        where = text.find(MARK)
        assert where < 0, text[max(where - 300, 0) : where + 100]
