"""Answers on a terminal: every width kept, every text fit to be shown."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Any

import pytest

import live_states as made_up
from conftest import environment
from hotpixd.core.overview import STATIC_SCENE, STATIC_SCENE_ADVICE
from hotpixd.intake.files import find_shots
from hotpixd.monitor import Monitor
from hotpixd.store.state import State
from hotpixd.views import answers, tables
from hotpixd.views.text import printable

SENSOR: dict[str, Any] = {
    "id": "x", "make": "Canon", "model": "Canon EOS R6", "serial": "0123", "samples": "raw", "width": 5472,
    "height": 3648, "colours": "RGGB", "frames": 12345, "frames_counted": 12000,
}  # fmt: skip
DEFECT: dict[str, Any] = {
    "x": 5471, "y": 3647, "colour": "G", "kind": "unstable", "state": "recovered", "certainty": 1.0, "log_e": 123.4,
    "excess_adu": -15000.0, "excess_sigma": -1234.5, "dark_current_adu_per_s": 123456.7, "dark_current_iso": 100.0,
    "share_on": 0.5, "level_adu": 16383.0, "first_seen": None, "stable_since": None, "frames_to_stable": 12345,
}  # fmt: skip


def shown(capsys: pytest.CaptureFixture[str], width: int, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> list[str]:
    monkeypatch.setenv("COLUMNS", str(width))
    sensor = {**SENSOR, **changes.pop("sensor", {}), "defects": [{**DEFECT, **changes}]}
    tables.print_defects({"sensors": [sensor]})
    return capsys.readouterr().out.splitlines()


def test_the_widest_row_fits_into_80_columns(capsys, monkeypatch):
    """Positions of 45 megapixels, the longest words, the largest numbers: nothing is cut."""
    lines = shown(capsys, 80, monkeypatch)
    # But for the sensor's name, which is as long as it is, and not broken into lines.
    assert max(len(line) for line in lines if "serial" not in line) <= 80
    row = lines[-1].split()
    assert row == ["5471", "3647", "G", "unstable", "recovered", "100", "%", "-15000", "-1234.5", "123457", "12345"]


def test_a_narrow_terminal_loses_no_number(capsys, monkeypatch):
    """Its lines are broken; a position that is cut off is worth nothing."""
    assert shown(capsys, 40, monkeypatch)[-1] == shown(capsys, 80, monkeypatch)[-1]


def test_unknown_numbers_are_left_blank(capsys, monkeypatch):
    """A file that does not state its exposure gives no dark current; what is not stable took no frames."""
    lines = shown(capsys, 80, monkeypatch, dark_current_adu_per_s=None, frames_to_stable=None)
    assert lines[-1].split()[-2:] == ["-15000", "-1234.5"]


@pytest.mark.parametrize(
    ("adu", "sigma", "words"),
    [
        (0.02, 0.013, ["0.0", "0.0"]),
        (-0.04, -0.03, ["0.0", "0.0"]),
        (0.125, 0.083, ["+0.1", "+0.1"]),
        (-9.94, -6.0, ["-9.9", "-6.0"]),
        (9.96, 6.0, ["+10", "+6.0"]),
    ],
)
def test_a_small_excess_is_told_in_tenths_and_none_without_a_sign(capsys, monkeypatch, adu, sigma, words):
    """In JPEGs a step is much. A dim candidate "+0, +0.0 sigma" looked wrong to an all-sky camera's owner."""
    (*_, line) = shown(capsys, 80, monkeypatch, excess_adu=adu, excess_sigma=sigma)
    assert line.split()[7:9] == words


def test_numbers_that_could_not_be_computed_do_not_end_the_table(capsys, monkeypatch):
    """The contract allows null for each of them; once that was a traceback."""
    lines = shown(capsys, 80, monkeypatch, excess_adu=None, excess_sigma=None, dark_current_adu_per_s=None)
    assert lines[-1].split() == ["5471", "3647", "G", "unstable", "recovered", "100", "%", "12345"]


@pytest.mark.parametrize(
    ("make", "model", "serial", "name"),
    [
        ("Canon", "Canon EOS R6", "0123", "Canon EOS R6, serial 0123, 5472x3648 raw"),
        ("NIKON CORPORATION", "NIKON D750", None, "NIKON D750, no serial number, 5472x3648 raw"),
        ("Point Grey", "Flea3", "1", "Point Grey Flea3, serial 1, 5472x3648 raw"),
        (None, None, None, "Unknown camera, no serial number, 5472x3648 raw"),
        ("  ", "X", None, "X, no serial number"),
        ("[red]", "a\x1b[2J\nb", "c\x07", r"[red] a\x1b[2J\nb, serial c\x07, 5472x3648 raw"),
    ],
)
def test_a_sensor_has_a_name_that_people_know(capsys, monkeypatch, make, model, serial, name):
    """The maker once, and nothing of it as a command to the terminal or as markup."""
    lines = shown(capsys, 200, monkeypatch, sensor={"make": make, "model": model, "serial": serial})
    assert name in re.sub(" +", " ", lines[1])


def test_a_long_list_is_cut_with_a_count(capsys, monkeypatch):
    """The end of a scan shows the strongest; the rest is one command away."""
    monkeypatch.setenv("COLUMNS", "80")
    defects = [{**DEFECT, "x": x, "excess_sigma": float(x)} for x in range(30)]
    tables.print_defects({"sensors": [{**SENSOR, "defects": defects}]}, most=20)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].strip().startswith("... and 10 more")
    assert [int(line.split()[0]) for line in lines[-21:-1]] == list(range(29, 9, -1))


def test_no_sensor_and_no_defect_are_said_in_words(capsys, monkeypatch):
    """An empty table would leave open whether something is wrong."""
    tables.print_defects({"sensors": []})
    tables.print_defects({"sensors": [{**SENSOR, "defects": []}]})
    said = capsys.readouterr().out
    assert "No sensor is known yet." in said
    assert "no stable defect" in said


@pytest.mark.parametrize(
    ("counted", "samples", "reason", "told"),
    [
        (1, "rendered", STATIC_SCENE, 2),
        (4, "rendered", STATIC_SCENE, 2),
        (4, "raw", STATIC_SCENE, 1),
        (6, "rendered", STATIC_SCENE, 0),
        (0, "rendered", "the frame is blurred by stars that trail", 0),
    ],
)
def test_where_hardly_anything_moved_the_user_is_told_what_to_do(capsys, counted, samples, reason, told):
    """A mount, a foreground, a caption; dark JPEGs can be taken for light frames, raw ones cannot.

    Where most frames were counted, the others are of a tripod. An all-sky camera's owner was only told of the cap.
    """
    sensor = {**SENSOR, "samples": samples, "frames_counted": counted, "defects": []}
    tables.print_defects({"sensors": [sensor]}, not_counted={"x": {reason: 5}})
    *_, said = capsys.readouterr().out.partition(f"  5 frames not counted: {reason}\n")
    advice = [f"    {STATIC_SCENE_ADVICE}", "    If the cap was on: hotpixd rebuild FOLDER --kind dark"]
    assert said.splitlines() == [*advice[:told], "  no stable defect"]


def test_the_status_says_in_the_word_of_each_source_how_it_is(capsys, monkeypatch):
    """A directory has none; where there is nothing more to say, there is no colon either."""
    monkeypatch.setenv("COLUMNS", "80")
    directory = {"name": "/media/card", "status": "watching", "detail": "12 files", "files": 12, "waiting": 0}
    answer: dict[str, Any] = {
        "state": "/var/lib/hotpixd",
        "sources": [directory, {**directory, "name": "/mnt", "condition": ""}, *made_up.cameras()],
        "shots": {},
        "sensors": [],
        "alerts": [],
        "refused": [],
    }
    tables.print_status(answer)
    assert capsys.readouterr().out.splitlines() == [
        "State in /var/lib/hotpixd",
        "  /media/card watching: 12 files",
        "  /mnt watching: 12 files",
        "  Acme One 0042 ready: 1204 files on its card",
        "  Acme Two 7 catching up",
        "  camera at usb:001,005 claimed: gvfs has it open.",
        "  Acme Old 1 absent: it is switched off or unplugged",
        "  Acme New 2 opening: asking it what it is",
        "No shot yet.",
    ]


def test_one_of_a_thing_is_no_plural(capsys):
    """It was "1 candidates", "1 shots"."""
    sensor = {**SENSOR, "frames": 1, "stable": 1, "candidate": 1, "recovered": 1, "not_counted": {}, "last_shot": None}
    plain: dict[str, Any] = {"state": "s", "sources": [], "shots": {}, "alerts": [], "refused": []}
    tables.print_status({**plain, "sensors": [sensor]})
    tables.print_verify({"problems": [], "sensors": [sensor], "waiting": 1})
    said = capsys.readouterr().out
    assert "1 frame, " in said
    assert "1 stable, 1 candidate, 1 recovered" in said
    assert "1 frame of 1 sensor" in said
    assert "1 shot received but not folded" in said


def test_status_calls_no_shot_folded_that_is_to_be_folded_again(camera, tmp_path, capsys):
    """After a kill the ledger has their verdict, but no generation has them; it was "8 folded, 8 counted"."""
    with State(tmp_path / "state") as state, Monitor(state) as monitor:
        list(monitor.process(find_shots(map(str, camera.shots[:5])).shots))
        monitor.checkpoint()
        list(monitor.process(find_shots(map(str, camera.shots[5:8])).shots))
    with State(tmp_path / "state") as state:
        answer = answers.status(state)
    assert answer["shots"]["folded"] == 8
    tables.print_status(answer)
    said = capsys.readouterr().out
    assert "\n3 received but not folded, 5 folded, 5 counted\n  What is not folded yet is folded when the" in said
    # A running one is about to; and there is nothing to be said of none.
    tables.print_status({**answer, "daemon": {"activity": "folding"}})
    with State(tmp_path / "state") as state, Monitor(state) as monitor:
        assert len(list(monitor.replay())) == 3
        monitor.checkpoint()
        tables.print_status(answers.status(state))
    assert "What is not folded yet" not in capsys.readouterr().out


def test_an_answer_that_lacks_shots_is_warned_of_on_stderr(capsys):
    """The answer itself goes to stdout, where another program may read it."""
    tables.warn_of_waiting(0)
    tables.warn_of_waiting(2)
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == "hotpixd: 2 shots received but not folded; run scan again.\n"


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("IMG_0001.CR2", "IMG_0001.CR2"),
        ("Größe 雪.jpg", "Größe 雪.jpg"),
        ("a\nb\tc\x1b[0m\x9b", r"a\nb\tc\x1b[0m\x9b"),
        ("\udcff\u202e\u200b\u2028", r"\udcff\u202e\u200b\u2028"),
    ],
)
def test_text_from_outside_is_shown_as_what_it_is(text, written):
    """Letters of all languages stay; what would act on the terminal, or turn its direction, becomes an escape."""
    assert printable(text) == written


@pytest.mark.parametrize("module", ["tables", "answers"])
def test_who_only_asks_does_without_the_kernels(module: str):
    """What a daemon has answered, or the state itself, is shown at once: to load numba takes longer than the rest."""
    done = subprocess.run(
        [sys.executable, "-c", f"import sys, hotpixd.views.{module}; sys.exit('numba' in sys.modules)"],
        env=environment(),
    )
    assert done.returncode == 0
