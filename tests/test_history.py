"""The history of a virtual camera of which it is known what came when, and what was remapped."""

from __future__ import annotations

import json
import re
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import feed, run
from hotpixd.store.state import State
from hotpixd.views import answers
from hotpixd.views.history import poisson_interval
from years import BEGIN, Session, Year, monthly, shoot


@pytest.fixture(scope="module")
def year(tmp_path_factory: pytest.TempPathFactory) -> Year:
    """Six evenings, a month apart: 10 defects from the start, 3 more with each, 70 % remapped before the fifth."""
    folder = tmp_path_factory.mktemp("year")
    return shoot(folder / "shots", monthly(6, frames=18), start=10, per_session=3, remap_before=5)


@pytest.fixture(scope="module")
def state(year: Year) -> Path:
    """All shots of that year."""
    root = year.folder.with_name("state")
    feed(root, year.folder)
    return root


def asked(root: Path, *arguments: object) -> dict[str, Any]:
    done = run("history", "--json", "--state", root, *arguments)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


@pytest.fixture(scope="module")
def told(state: Path) -> dict[str, Any]:
    """What the command says of the one sensor."""
    (sensor,) = asked(state)["sensors"]
    return dict(sensor)


def test_each_defect_has_its_onset_in_the_session_with_which_it_began(year, told):
    """All planted ones, no others, each in its session."""
    assert {(d["x"], d["y"]): d["onset_session"] for d in told["defects"]} == year.onset


def test_those_remapped_have_recovered_and_no_others(year, told):
    """The date of recovery is of the session after the remap."""
    recovered = {(d["x"], d["y"]): d["recovered"][:10] for d in told["defects"] if d["state"] == "recovered"}
    assert recovered == dict.fromkeys(year.healed, str(year.sessions[4].begin.date()))
    assert told["defects_now"] == len(year.onset) - len(year.healed)


def test_each_defect_is_told_when_it_was_seen_last_and_in_how_many_sessions(state, told):
    """Up to the one in which it recovered. When those were seen last cannot be known: healthy sites have events too."""
    with State(state, create=False) as opened:
        (id_,) = opened.ledger.sensors()
        shape = opened.ledger.sensors()[id_]["layout"]["width"]
        seen = {row.site: row.taken_at for row in opened.ledger.observations(id_) if row.events}
    for defect in told["defects"]:
        ended = 6 if defect["state"] == "stable" else 5
        assert defect["sessions"] == ended - defect["onset_session"] + 1
        last = None if ended == 5 else seen[defect["y"] * shape + defect["x"]]
        assert defect["last_seen"] == (None if last is None else last.replace("+00:00", "Z"))
    assert {defect["last_seen"] for defect in told["defects"]} > {None}


def test_the_remap_is_named_with_its_date_and_number(year, told):
    """Between the end of one session and the begin of the next."""
    (remap,) = told["remaps"]
    fourth, fifth = year.sessions[3:5]
    last = fourth.begin + timedelta(seconds=40 * 17)
    assert remap["after"] == last.strftime("%Y-%m-%dT%H:%M:%SZ")
    assert remap["before"] == fifth.begin.strftime("%Y-%m-%dT%H:%M:%SZ")
    there = sum(session < 5 for session in year.onset.values())
    assert (remap["defects"], remap["of"], remap["cause"]) == (len(year.healed), there, "remap")
    assert remap["came_back"] == 0


def test_sessions_and_months_add_up(year, told):
    """What came, less what went, is what there is; each session has its frames."""
    assert [s["frames"] for s in told["sessions"]] == [18] * 6
    assert [s["new"] for s in told["sessions"]] == [10, *[3] * 5]
    assert [s["recovered"] for s in told["sessions"]] == [0] * 4 + [len(year.healed), 0]
    for series in (told["sessions"], told["months"]):
        assert np.cumsum([s["new"] - s["recovered"] for s in series]).tolist() == [s["defects"] for s in series]
    assert [m["month"] for m in told["months"]] == [f"2025-{n:02d}" for n in range(1, 7)]


def test_growth_is_what_was_planted_within_its_uncertainty(told):
    """Three with each session after the first, which are thirty days apart."""
    growth = told["growth"]
    assert growth["new"] == 15
    assert growth["low"] < 3 / 30 * 30.44 < growth["high"]
    assert growth["low"] < growth["per_month"] < growth["high"]


def test_since_a_date_only_what_is_new_is_told(year, state):
    """Before the fourth session there is nothing of it, and after the last there is nothing."""
    since = str(year.sessions[3].begin.date())
    told = asked(state, "--since", since)["sensors"][0]
    assert {(d["x"], d["y"]) for d in told["new"]} == {site for site, session in year.onset.items() if session >= 4}
    later = asked(state, "--since", "2026-01-01")["sensors"][0]
    assert later["new"] == later["sessions"] == later["months"] == later["events"] == []
    rows = _rows(run("history", "--since", since, "--state", state).stdout)
    assert rows
    assert min(rows) == since[:7]
    none = run("history", "--since", "2026-01-01", "--state", state).stdout
    assert "no session since 2026-01-01" in none
    assert "0 new defects" not in none
    assert _rows(none) == []


def test_json_leaves_out_what_the_table_does(year, state, told):
    """JSON held the sessions, months and events of all time. How many there are in all is in both."""
    fourth = year.sessions[3].begin
    since = asked(state, "--since", fourth.date())["sensors"][0]
    assert [s["session"] for s in since["sessions"]] == [4, 5, 6]
    assert [m["month"] for m in since["months"]] == ["2025-04", "2025-05", "2025-06"]
    assert since["events"] == [e for e in told["events"] if e["session"] >= 4]
    assert len(since["events"]) < len(told["events"])
    assert since["sessions_in_all"] == 6
    assert {"begin": since["begin"], "end": since["end"]} == {"begin": told["begin"], "end": told["end"]}
    assert "in 6 sessions, 2025-01" in run("history", "--since", fourth.date(), "--state", state).stdout


def _rows(text: str) -> list[str]:
    """Return the moments and months that begin or number the rows of the tables."""
    return re.findall(r"^ *(?:\d+ +)?(\d{4}-\d\d(?:-\d\d \d\d:\d\d)?) ", text, re.MULTILINE)


def test_the_gap_decides_what_a_session_is(state):
    """With one of a year, all is one session, and then there is neither growth nor a remap to be told."""
    told = asked(state, "--gap", 24 * 300)["sensors"][0]
    assert len(told["sessions"]) == 1
    assert told["growth"] is None
    assert told["remaps"] == []


def test_it_reads_well_on_a_terminal(state):
    """The sentences are there, and what was left out is said."""
    done = run("history", "--state", state)
    assert "defects vanished between 2025-04-04" in done.stdout
    assert "new defects per month (95 %:" in done.stdout
    assert "hotpixd history --all" in done.stdout
    assert "hotpixd history --all" not in run("history", "--state", state, "--all").stdout
    # It said "0 sessions and 61 changes".
    one_session = run("history", "--state", state, "--gap", 24 * 300).stdout
    assert re.search(r"^  \.\.\. and before that \d+ changes: hotpixd history --all$", one_session, re.MULTILINE)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--since", "yesterday"], "a date is given as 2026-01-31"),
        (["--sensor", "Nikon"], "no sensor is called 'Nikon'"),
    ],
)
def test_wrong_use_is_a_sentence(state, arguments, sentence):
    """And exit code 2."""
    done = run("history", "--state", state, *arguments)
    assert done.returncode == 2
    assert sentence in done.stderr


def test_a_sensor_is_found_by_its_serial_number_or_a_part_of_its_name(state):
    """Whatever its case."""
    for word in ("Y0001", "virtual cam"):
        assert len(asked(state, "--sensor", word)["sensors"]) == 1


def test_a_running_daemon_answers_the_same(year, state, start, tmp_path):
    """Over its socket."""
    feed(tmp_path / "state", *sorted(year.folder.iterdir())[:60])
    before = asked(tmp_path / "state")
    (tmp_path / "card").mkdir()
    daemon = start("watch", tmp_path / "card", "--plain")
    assert daemon.ask("history") == before
    refused = run("history", "--sensor", "Nikon", "--state", tmp_path / "state", env=daemon.env)
    assert refused.returncode == 2
    assert "no sensor is called" in refused.stderr


def test_a_camera_without_defects_has_a_history_without_changes(tmp_path):
    """The control: the same months."""
    year = shoot(tmp_path / "shots", monthly(4, frames=8), start=0, seed=7)
    feed(tmp_path / "state", year.folder)
    (told,) = asked(tmp_path / "state")["sensors"]
    assert told["defects"] == told["events"] == told["remaps"] == []
    assert [s["new"] for s in told["sessions"]] == [0] * 4
    assert told["growth"]["per_month"] == 0
    assert 0 < told["growth"]["high"] < 2


def test_cold_is_not_taken_for_a_remap(tmp_path):
    """All is weaker by far when the sensor is 30 C colder, and comes back when it is warm again."""
    pytest.importorskip("astropy")
    temps = (20.0, 20.0, -20.0, 20.0)
    sessions = tuple(
        Session(BEGIN + timedelta(days=10 * n), frames=16, temp_c=temp, exposures_s=(0.5,))
        for n, temp in enumerate(temps)
    )
    year = shoot(tmp_path / "shots", sessions, start=12, fits=True, seed=9, hot_range_adu_per_s=(300.0, 900.0))
    feed(tmp_path / "state", year.folder)
    (told,) = asked(tmp_path / "state")["sensors"]
    assert [remap["cause"] for remap in told["remaps"]] == ["colder"]
    assert told["remaps"][0]["session"] == 3
    assert told["remaps"][0]["came_back"] >= 10
    assert all(d["from_start"] for d in told["defects"])
    assert "which may only hide them" in run("history", "--state", tmp_path / "state").stdout


def test_what_only_shows_when_it_is_warm_is_not_taken_for_growth(tmp_path):
    """Weak ones are there from the start, but it takes a warm evening with long exposures to see them."""
    pytest.importorskip("astropy")
    sessions = tuple(
        Session(BEGIN + timedelta(days=20 * n), frames=16, temp_c=temp, exposures_s=exposures)
        for n, (temp, exposures) in enumerate(((10.0, (0.5,)), (12.0, (0.5,)), (22.0, (4.0, 8.0)), (10.0, (0.5,))))
    )
    year = shoot(tmp_path / "shots", sessions, start=20, fits=True, seed=4, hot_range_adu_per_s=(3.0, 600.0))
    feed(tmp_path / "state", year.folder)
    (told,) = asked(tmp_path / "state")["sensors"]
    assert [s["new"] for s in told["sessions"]][2] >= 4
    assert sum(not d["from_start"] for d in told["defects"]) <= 1
    assert told["growth"]["low"] < 0.5


def test_months_of_thinned_observations_still_date_the_remap(year, state, monkeypatch, tmp_path):
    """Where little is left of the sessions, the remap lies between the same two."""
    from hotpixd.store import thinning

    monkeypatch.setattr(thinning, "is_kept", lambda ranks, newest: ranks > newest - 3)
    feed(tmp_path / "state", year.folder)
    with State(tmp_path / "state", create=False) as opened:
        id_ = next(iter(opened.ledger.sensors()))
        assert len(opened.ledger.frames_observed(id_)) == 3
        (thinned,) = answers.answer(opened, "history", {})["sensors"]
    with State(state, create=False) as opened:
        (whole,) = answers.answer(opened, "history", {})["sensors"]
    assert thinned["sessions"] == whole["sessions"]
    (one,), (other,) = thinned["remaps"], whole["remaps"]
    assert (one["after"], one["before"]) == (other["after"], other["before"])
    # Of three frames, not each tells of each defect.
    assert other["defects"] // 2 < one["defects"] <= other["defects"]


def test_poisson_limits_are_those_of_tables():
    """Garwood's, to the digits that matter: 95 % limits of Poisson means."""
    for count, low, high in ((0, 0.0, 3.689), (1, 0.0253, 5.572), (4, 1.090, 10.242), (20, 12.217, 30.888)):
        assert poisson_interval(count) == pytest.approx((low, high), rel=0.03, abs=0.02)
