"""The report: one page, opened in a real browser, that shows what was planted and asks nobody for anything."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from conftest import environment, feed, run
from hotpixd.store.state import State
from hotpixd.views import answers, evidence, report
from years import Year, monthly, shoot

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def year(tmp_path_factory: pytest.TempPathFactory) -> Year:
    """Four evenings at four temperatures; half of the defects are remapped before the last."""
    folder = tmp_path_factory.mktemp("year")
    sessions = tuple(
        s.__class__(s.begin, 16, "dark", (1.0, 2.0, 8.0), temp)
        for s, temp in zip(monthly(4), (20.0, 26.0, 17.0, 23.0), strict=True)
    )
    return shoot(folder / "shots", sessions, start=12, per_session=3, remap_before=4, fits=True)


@pytest.fixture(scope="module")
def state(year: Year) -> Path:
    """All shots of that year."""
    root = year.folder.with_name("state")
    feed(root, year.folder)
    return root


@pytest.fixture(scope="module")
def page(state: Path) -> Path:
    """Its report."""
    path = state.with_name("report.html")
    done = run("report", "--state", state, "-o", path)
    assert done.returncode == 0, done.stderr
    return path


@dataclass
class Opened:
    """A page in a browser, and what it complained of or asked for."""

    page: Any
    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def rows(self) -> list[list[str]]:
        """The texts of the table's rows, as they are on the page."""
        texts = "rows => rows.map(row => [...row.cells].map(cell => cell.textContent))"
        return list(self.page.eval_on_selector_all("table.defects tbody tr[data-at]", texts))


@contextmanager
def opened(path: Path, width: int = 1280, height: int = 900, **options: Any) -> Iterator[Opened]:
    """Open a page in Chromium, and wait until all is drawn."""
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("there is no Chromium")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        context = browser.new_context(viewport={"width": width, "height": height}, **options)
        found = Opened(context.new_page())
        found.page.on("console", lambda said: found.errors.append(said.text) if said.type == "error" else None)
        found.page.on("pageerror", lambda error: found.errors.append(str(error)))
        found.page.on("request", lambda asked: found.requests.append(asked.url))
        found.page.goto(path.as_uri())
        found.page.wait_for_selector("html[data-drawn=all]", timeout=60_000)
        yield found
        browser.close()


def test_it_shows_each_defect_once_and_asks_nobody(state, page):
    """As many rows as defects and candidates, no error, and no request but for the page itself."""
    everything = json.loads(run("defects", "--all", "--json", "--state", state).stdout)["sensors"][0]["defects"]
    assert len(everything) >= 20
    with opened(page) as browser:
        rows = browser.rows()
        assert {(int(row[1]), int(row[2])) for row in rows} == {(d["x"], d["y"]) for d in everything}
        assert len(rows) == len(everything)
        assert browser.page.text_content(".filter output") == f"{len(rows)} of {len(rows)}"
        assert browser.errors == []
        assert [url for url in browser.requests if not url.startswith(("data:", "blob:"))] == [page.as_uri()]


def test_it_is_no_blank_page(page):
    """The map holds points in the colour of hot defects; the crop of the one chosen is brightest in its centre."""
    with opened(page) as browser:
        for selector in (".map .plot", '[data-single="over_exposure"]', '[data-plot="growth"]'):
            shown = np.asarray(Image.open(io.BytesIO(browser.page.locator(selector).screenshot())).convert("RGB"), int)
            orange = np.abs(shown - (232, 89, 12)).sum(axis=2) < 60
            assert orange.sum() > 20, selector
        pixels = browser.page.evaluate(
            "() => [...document.querySelector('.one canvas.crop').getContext('2d').getImageData(0, 0, 13, 13).data]"
        )
        crop = np.array(pixels).reshape(13, 13, 4)[..., :3].sum(axis=2)
        crop[crop == 3 * 128] = 0
        assert np.unravel_index(crop.argmax(), crop.shape) == (6, 6)


def test_its_table_sorts_and_filters(page):
    """By a click on a title, by words, and by kind and state."""
    with opened(page) as browser:
        every = browser.rows()
        titles = [text.strip() for text in browser.page.locator("table.defects th").all_text_contents()]
        x, state, strength = (titles.index(title) for title in ("x", "state", "excess (σ)"))
        browser.page.click("th[data-key=x] button")
        across = [int(row[x]) for row in browser.rows()]
        assert across == sorted(across)
        assert across != [int(row[x]) for row in every]
        browser.page.click("th[data-key=x] button")
        assert [int(row[x]) for row in browser.rows()] == across[::-1]
        browser.page.click("th[data-key=excess_sigma] button")
        values = [float(row[strength].replace(",", "")) for row in browser.rows()]
        assert values == sorted(values, reverse=True)
        browser.page.select_option("select[data-key=state]", "recovered")
        recovered = browser.rows()
        assert 0 < len(recovered) < len(every)
        assert {row[state] for row in recovered} == {"recovered"}
        browser.page.select_option("select[data-key=state]", "")
        browser.page.fill(".filter input", every[0][x])
        assert {row[x] for row in browser.rows()} | {row[x + 1] for row in browser.rows()} >= {every[0][x]}
        assert len(browser.rows()) < len(every)
        browser.page.fill(".filter input", "no such thing")
        assert browser.rows() == []
        assert browser.errors == []


def test_a_row_opens_what_is_known_of_its_defect(page):
    """Below the row: its place, and its doubling temperature, which is planted as 6 C."""
    with opened(page) as browser:
        browser.page.click("table.defects tbody tr[data-at]:nth-child(2)")
        below = browser.page.locator("tr.below")
        x, y = browser.rows()[1][1:3]
        assert below.locator("h3").text_content().startswith(f"{x}, {y}: ")
        doubling = re.search(r"doubles every([\d.]+) ± ([\d.]+)", below.locator("dl").text_content())
        assert doubling is not None
        assert float(doubling[1]) == pytest.approx(6.0, abs=0.5)
        browser.page.click("th[data-key=y] button")
        assert browser.page.locator("tr.below").count() == 0
        assert browser.errors == []


def test_a_phone_shows_it_without_scrolling_sideways(page):
    """At 390 pixels, and with touch."""
    with opened(page, 390, 844, is_mobile=True, has_touch=True) as browser:
        browser.page.tap("table.defects tbody tr[data-at]:nth-child(3)")
        browser.page.wait_for_selector("tr.below canvas")
        assert browser.page.evaluate("document.documentElement.scrollWidth") == 390
        assert browser.errors == []


def test_two_sensors_are_two_sections_and_one_can_be_chosen(year, camera, tmp_path):
    """Each with its own table."""
    feed(tmp_path / "state", *sorted(year.folder.iterdir())[:20], camera.folder)
    run("report", "--state", tmp_path / "state", "-o", tmp_path / "both.html")
    with opened(tmp_path / "both.html") as browser:
        assert browser.page.locator("section.sensor").count() == 2
        assert browser.page.locator("nav a").count() == 2
        assert browser.errors == []
    run("report", "--state", tmp_path / "state", "-o", tmp_path / "one.html", "--sensor", "V0001")
    one = (tmp_path / "one.html").read_text()
    assert 'id="sensor-0"' in one
    assert 'id="sensor-1"' not in one
    wrong = run("report", "--state", tmp_path / "state", "-o", tmp_path / "none.html", "--sensor", "Leica")
    assert wrong.returncode == 2
    assert "no sensor is called 'Leica'" in wrong.stderr
    assert not (tmp_path / "none.html").exists()


def test_a_sensor_without_defects_has_a_page_that_says_so(tmp_path):
    """The control."""
    year = shoot(tmp_path / "shots", monthly(1, frames=6), start=0)
    feed(tmp_path / "state", year.folder)
    run("report", "--state", tmp_path / "state", "-o", tmp_path / "report.html")
    with opened(tmp_path / "report.html") as browser:
        assert all("candidate" in row for row in browser.rows())
        assert browser.page.locator(".tiles b").first.text_content() == "0"
        assert "each frame was new evidence" in browser.page.text_content("section")
        assert browser.errors == []


def test_an_empty_state_has_a_page(tmp_path):
    """Nothing was folded yet."""
    with State(tmp_path / "state"):
        pass
    assert run("report", "--state", tmp_path / "state", "-o", tmp_path / "report.html").returncode == 0
    assert "No sensor is known yet" in (tmp_path / "report.html").read_text()


def _told(state: Path) -> dict[str, Any]:
    with State(state, create=False) as held:
        return report.gathered(lambda question, **given: answers.answer(held, question, given), None, 6.0)


def test_texts_of_cameras_and_files_are_no_html(state, tmp_path):
    """Wherever they stand: names of cameras, of files, of lists."""
    told = _told(state)
    evil = "</script><script>document.title='owned'</script><img src=http://example.com/x onerror=alert(1)>"
    for one in (*told["sensors"], *told["shown"]):
        one.update(make=evil, model=evil, serial=evil)
    shown = told["shown"][0]
    shown["not_counted"] = [
        {"reason": evil, "count": 1, "first": "2025-01-01T00:00:00Z", "last": "2025-01-01T00:00:00Z"}
    ]
    shown["not_counted_frames"] = [{"name": evil, "at": "2025-01-01T00:00:00Z", "reason": evil}]
    x, y = shown["defects"]["x"][0], shown["defects"]["y"][0]
    when = "2025-01-01T00:00:00Z"
    shown["declared"] = [
        {"x": x, "y": y, "source": f"siril:{evil}", "declared_at": when, "sources": [f"siril:{evil}", evil]},
        {"x": 1, "y": 1, "source": evil, "declared_at": when, "sources": [evil]},
    ]
    path = tmp_path / "report.html"
    report.write(path, report.page_of(told))
    with opened(path) as browser:
        assert "example.com" in browser.page.title()
        assert browser.page.locator("img").count() == 0
        assert browser.errors == []
        assert len([url for url in browser.requests if not url.startswith(("data:", "blob:"))]) == 1


def test_declared_defects_are_compared_with_those_found(state, tmp_path):
    """By source: what a list and the detection agree on, and what only one of them has."""
    told = _told(state)
    defects = told["shown"][0]["defects"]
    stable = [(x, y) for x, y, s in zip(defects["x"], defects["y"], defects["state"], strict=True) if s == "stable"]
    told["shown"][0]["declared"] = [
        {"x": x, "y": y, "source": "mark", "declared_at": "2025-01-01T00:00:00Z", "sources": ["mark", "dcraw:a"][:n]}
        for n, (x, y) in enumerate([*stable[:3], (1, 1)], 1)
    ]
    path = tmp_path / "report.html"
    report.write(path, report.page_of(told))
    text = " ".join(path.read_text().split())
    assert f"4 declared defects: 3 found stable, 1 not; {len(stable) - 3} found but not declared." in text
    assert "<tr><td>dcraw:a<td>3<td>2<td>1</tr><tr><td>mark<td>4<td>3<td>1</tr>" in text
    with opened(path) as browser:
        browser.page.fill(".filter input", "mark")
        assert {(int(row[1]), int(row[2])) for row in browser.rows()} == set(stable[:3])


def test_a_file_of_others_is_not_replaced(state, page, tmp_path):
    """A report is; anything else only with --force, a folder never."""
    path = tmp_path / "notes.html"
    path.write_text("<html>mine</html>")
    refused = run("report", "--state", state, "-o", path)
    assert refused.returncode == 2
    assert "--force" in refused.stderr
    assert path.read_text() == "<html>mine</html>"
    assert run("report", "--state", state, "-o", path, "--force").returncode == 0
    assert run("report", "--state", state, "-o", path).returncode == 0
    assert run("report", "--state", state, "-o", tmp_path).returncode == 2
    lost = run("report", "--state", state, "-o", tmp_path / "no" / "report.html")
    assert lost.returncode == 2
    assert "There is no folder" in lost.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["notes.html"]


def test_a_hyphen_is_the_standard_output(state, tmp_path):
    """The page and nothing else, in UTF-8 whatever the terminal speaks."""
    done = run("report", "--state", state, "-o", "-", cwd=tmp_path, env=environment(PYTHONIOENCODING="latin-1"))
    assert done.returncode == 0, done.stderr
    path = tmp_path / "report.html"
    assert run("report", "--state", state, "-o", path).returncode == 0
    assert done.stdout.startswith("<!doctype html>")
    assert done.stdout.endswith("</html>\n")
    assert abs(len(done.stdout) - len(path.read_text("utf-8"))) < 100
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_without_the_library_a_sentence_says_how_to_get_it(state, tmp_path):
    """In an environment without it."""
    code = "import sys; sys.modules['bokeh'] = None; from hotpixd.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "report", "--state", state, "-o", tmp_path / "report.html"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "pip install 'hotpixd[report]'" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "report.html").exists()


def test_a_running_daemon_is_asked(year, start, tmp_path):
    """While it has the state: the same page as without it, but for the time."""
    feed(tmp_path / "state", *sorted(year.folder.iterdir())[:20])
    run("report", "--state", tmp_path / "state", "-o", tmp_path / "before.html")
    (tmp_path / "card").mkdir()
    daemon = start("watch", tmp_path / "card", "--plain")
    done = run("report", "--state", tmp_path / "state", "-o", tmp_path / "report.html", env=daemon.env)
    assert done.returncode == 0, done.stderr

    def data(path: Path) -> Any:
        (found,) = re.findall('id="data">(.*?)</script>', path.read_text())
        (sensor,) = json.loads(found)["sensors"]
        # Bokeh gives each part a name of its own.
        sensor.pop("plots")
        return sensor

    assert data(tmp_path / "report.html") == data(tmp_path / "before.html")


def test_crops_are_the_mean_frame_around_each_defect(state):
    """What is packed for the page is what the dashboard magnifies."""
    shown = _told(state)["shown"][0]
    crops = evidence.unpacked(shown["crops"], "u1").reshape(-1, 13, 13)
    with State(state, create=False) as held:
        (_, kept), *_ = answers._given(held, None)
        for k, defect in enumerate(kept.sensor.defects(candidates=True)):
            around = kept.sensor.around(defect.site, evidence.REACH)
            assert ((crops[k] == 0) == np.isnan(around)).all()
            inside = ~np.isnan(around)
            assert (np.abs(np.sign(around[inside]) - np.sign(crops[k][inside].astype(int) - 128)) < 2).all()
            if defect.status == "stable":
                assert crops[k].max() == crops[k][6, 6]


def test_excesses_are_packed_without_loss_that_shows(state):
    """To a part in 30,000 of the site's largest; what was not observed is none."""
    shown = _told(state)["shown"][0]
    frames = len(shown["frames_shown"]["at"])
    packed = np.frombuffer(base64.b64decode(shown["excess"]), "<i2").reshape(-1, frames)
    scale = np.frombuffer(base64.b64decode(shown["excess_scale"]), "<f4")
    with State(state, create=False) as held:
        id_ = shown["id"]
        rows = {(o.seq, o.site): o.excess_adu for o in held.ledger.observations(id_)}
        seqs = held.ledger.frames_observed(id_).tolist()
        width = shown["width"]
        for k, (x, y) in enumerate(zip(shown["defects"]["x"], shown["defects"]["y"], strict=True)):
            wanted = [rows.get((seq, y * width + x)) for seq in seqs]
            assert [w is None for w in wanted] == (packed[k] == -32768).tolist()
            known = [w for w in wanted if w is not None]
            assert (packed[k] * scale[k])[packed[k] != -32768] == pytest.approx(known, abs=1.01 * float(scale[k]))
