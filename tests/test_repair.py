"""Pictures corrected with the map of their sensor, as a user does it, compared with what was planted."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import Image
from typer.testing import CliRunner

from conftest import Camera, feed, run
from hotpixd.cli import app
from hotpixd.core.frame import Frame, SensorLayout
from hotpixd.intake.decode import decode
from hotpixd.simulate import PlantedDefect, VirtualSensor, VirtualShot
from hotpixd.views.repair import PictureRefusedError, Wish, WrongSensorError, planned, sensor_of
from pictures import SHARED

SENSOR = VirtualSensor(600, 400, hot=40, stuck=4, dead=4, clusters=2, seed=11, serial="V0011")
HEALTHY = VirtualSensor(600, 400, hot=0, stuck=0, dead=0, seed=11, serial="V0011")


@cache
def shot_pair(index: int, exposure_s: float = 1.0, iso: float = 100) -> tuple[VirtualShot, VirtualShot]:
    """Return a shot with defects and the same without: only the planted samples differ."""
    spoilt = SENSOR.shot(index, "moving", exposure_s=exposure_s, iso=iso)
    clean = HEALTHY.shot(index, "moving", exposure_s=exposure_s, iso=iso)
    mosaic = clean.mosaic.copy()
    for defect in SENSOR.defects:
        mosaic[defect.y, defect.x] = spoilt.mosaic[defect.y, defect.x]
    return replace(clean, mosaic=mosaic), clean


def entry(defect: PlantedDefect, **changes: Any) -> dict[str, Any]:
    """Return a planted defect as the map tells it."""
    return {
        "x": defect.x, "y": defect.y, "colour": defect.colour, "kind": defect.kind, "state": "stable",
        "dark_current_adu_per_s": defect.dark_current_adu_per_s,
        "dark_current_iso": None if defect.dark_current_adu_per_s is None else 100.0, **changes,
    }  # fmt: skip


def sensor_answer(defects: Any = SENSOR.defects, samples: str = "raw", **changes: Any) -> dict[str, Any]:
    return {
        "id": f"virtual-{samples}", "make": "Hotpixd", "model": "Virtual Camera", "serial": "V0011",
        "samples": samples, "width": 600, "height": 400, "colours": "RGGB" if samples == "raw" else "RGB",
        "defects": [entry(defect) for defect in defects], **changes,
    }  # fmt: skip


def raw_frame(index: int = 0, **settings: float) -> Frame:
    return SENSOR.frame(shot_pair(index, **settings)[0])


def chosen(plan: Any) -> set[tuple[int, int]]:
    return {(choice.x, choice.y) for choice in plan.choices if choice.corrected}


# What is corrected


def test_what_shows_is_corrected_and_what_does_not_is_left():
    """A short exposure shows the stuck and the dead, a long one the hot too; asked for, all are corrected."""
    fixed = {(d.x, d.y) for d in SENSOR.defects if d.kind != "hot"}
    every = {(d.x, d.y) for d in SENSOR.defects}
    short = planned(raw_frame(exposure_s=0.00002), sensor_answer(), Wish())
    assert chosen(short) == fixed
    long = planned(raw_frame(exposure_s=30.0), sensor_answer(), Wish())
    assert len(chosen(long)) >= len(every) - 2
    assert chosen(planned(raw_frame(exposure_s=0.00002), sensor_answer(), Wish(everything=True))) == every


def test_iso_counts_as_exposure_does():
    """A defect that is below the noise at ISO 100 and one second may show at ISO 6400, where excess and noise grow."""
    defect = next(d for d in SENSOR.defects if d.kind == "hot")
    weak = sensor_answer([defect])
    weak["defects"][0]["dark_current_adu_per_s"] = 40.0
    frame = raw_frame(exposure_s=0.02)
    assert chosen(planned(frame, weak, Wish())) == set()
    at_high = replace(frame, info=replace(frame.info, iso=640_000.0))
    assert chosen(planned(at_high, weak, Wish())) == {(defect.x, defect.y)}


def test_without_a_fitted_dark_current_the_picture_is_looked_at():
    """Then a defect is corrected where it stands out, and healthy samples that the map names are left."""
    strong = max((d for d in SENSOR.defects if d.kind == "hot"), key=lambda d: d.dark_current_adu_per_s or 0)
    answer = sensor_answer([])
    healthy = [(10 + 31 * k, 100) for k in range(8) if all((d.x, d.y) != (10 + 31 * k, 100) for d in SENSOR.defects)]
    unknown = {"colour": "R", "kind": "bright", "state": "stable", "dark_current_adu_per_s": None,
               "dark_current_iso": None}  # fmt: skip
    answer["defects"] = [{"x": x, "y": y, **unknown} for x, y in [(strong.x, strong.y), *healthy]]
    corrected = chosen(planned(raw_frame(), answer, Wish()))
    assert (strong.x, strong.y) in corrected
    assert len(corrected) <= 3


def test_declared_defects_are_corrected_unless_they_are_not_wanted():
    """What a user declares needs no evidence, and takes the place of an entry of the map at the same position."""
    declared = {"x": 150, "y": 90, "source": "mark", "declared_at": "2026-01-01T00:00:00Z"}
    answer = sensor_answer([], declared=[declared])
    assert chosen(planned(raw_frame(), answer, Wish())) == {(150, 90)}
    assert planned(raw_frame(), answer, Wish(declared=False)).sites.size == 0
    both = sensor_answer(declared=[{**declared, "x": SENSOR.defects[0].x, "y": SENSOR.defects[0].y}])
    plan = planned(raw_frame(exposure_s=0.00002), both, Wish())
    assert len({(c.x, c.y) for c in plan.choices}) == len(plan.choices) == len(SENSOR.defects)
    assert (SENSOR.defects[0].x, SENSOR.defects[0].y) in chosen(plan)
    outside = sensor_answer([], declared=[{**declared, "x": 600, "y": 7}])
    assert planned(raw_frame(), outside, Wish()).sites.size == 0


def test_candidates_are_corrected_if_they_are_asked_for():
    """And recovered ones never are; none of them is a source for others."""
    stuck = next(d for d in SENSOR.defects if d.kind == "stuck")
    for state, states, expected in (
        ("candidate", ("stable",), 0), ("candidate", ("stable", "candidate"), 1), ("recovered", ("stable",), 0),
    ):  # fmt: skip
        answer = sensor_answer([])
        answer["defects"] = [entry(stuck, state=state)]
        plan = planned(raw_frame(), answer, Wish(states=states))
        assert len(plan.sites) == expected
        assert plan.avoided.tolist() == [stuck.y * 600 + stuck.x]


def test_a_colour_sample_is_corrected_alone_where_nothing_was_demosaiced():
    """Of a lossless RGB picture only the defective channel; if it shows around it, all that it is smeared over."""
    rng = np.random.default_rng(0)
    layout = SensorLayout(60, 50, "RGB", 3)
    samples = rng.normal(100, 3, layout.shape).astype(np.uint8)
    identity = replace(SENSOR.identity, layout=layout, dtype="uint8", samples=type(SENSOR.identity.samples).RENDERED)
    defect = {"x": 20, "y": 25, "colour": "G", "kind": "bright", "state": "stable", "dark_current_adu_per_s": None,
              "dark_current_iso": None}  # fmt: skip
    answer = sensor_answer([], "rendered", width=60, height=50)
    answer["defects"] = [defect]
    samples[25, 61] = 250
    frame = replace(raw_frame(), sensor=identity, samples=samples)
    assert planned(frame, answer, Wish()).sites.tolist() == [25 * 180 + 61]
    assert len(planned(frame, answer, Wish(), jpeg=True).sites) == 13 * 3
    samples[24:27, 58:65] = 180
    assert len(planned(frame, answer, Wish()).sites) == 13 * 3


# Whose picture it is


def test_the_sensor_is_that_of_the_picture():
    """Make, model, serial number, sides, kind of samples and colours; nothing less will do."""
    frame, own = raw_frame(), sensor_answer()
    others = [
        sensor_answer(serial="V0012"), sensor_answer(model="Other"), sensor_answer(width=602),
        sensor_answer(colours="GRBG"), sensor_answer(samples="rendered"),
    ]  # fmt: skip
    assert sensor_of([*others, own], frame, Wish()) is own
    for other in others:
        with pytest.raises(PictureRefusedError, match="there is no map"):
            sensor_of([other], frame, Wish())
    with pytest.raises(PictureRefusedError, match="its serial number is V0011, not V0012"):
        sensor_of([*others, own], frame, Wish(sensor="V0012"))
    with pytest.raises(WrongSensorError, match="no sensor is called 'nobody'"):
        sensor_of([own], frame, Wish(sensor="nobody"))
    with pytest.raises(WrongSensorError, match="one of several"):
        sensor_of([own, others[0]], frame, Wish(sensor="virtual"))


def test_the_map_of_another_bit_depth_is_used_only_if_there_is_no_other():
    """Positions are the same, units are not."""
    usual, twelve = sensor_answer(), sensor_answer(bits=12)
    assert sensor_of([twelve, usual], raw_frame(), Wish()) is usual
    assert sensor_of([usual, twelve], replace(raw_frame(), white_level_adu=4095), Wish()) is twelve


def test_a_body_without_a_serial_number_is_named_by_the_user():
    """The refusal says how."""
    frame = replace(raw_frame(), sensor=replace(SENSOR.identity, serial=None))
    with pytest.raises(PictureRefusedError, match="of the body V0011, say --sensor virtual-raw"):
        sensor_of([sensor_answer()], frame, Wish())
    assert sensor_of([sensor_answer()], frame, Wish(sensor="V0011"))["id"] == "virtual-raw"


def test_the_map_of_raw_frames_serves_rendered_pictures_only_if_asked(tmp_path: Path):
    """And only those of the same body, as large as its raw frames."""
    path = tmp_path / "picture.jpg"
    SENSOR.write_jpeg(path, shot_pair(0)[0])
    frame = decode(path)
    frame = replace(frame, sensor=replace(frame.sensor, serial="V0011"))
    with pytest.raises(PictureRefusedError, match="--map-of virtual-raw"):
        sensor_of([sensor_answer()], frame, Wish())
    assert sensor_of([sensor_answer()], frame, Wish(map_of="virtual-raw"))["samples"] == "raw"
    with pytest.raises(PictureRefusedError, match="where its pixels lie on the sensor is not known"):
        sensor_of([sensor_answer(width=602)], frame, Wish(map_of="virtual-raw"))
    with pytest.raises(WrongSensorError, match="no sensor of raw frames"):
        sensor_of([sensor_answer(samples="rendered")], frame, Wish(map_of="virtual-rendered"))
    with pytest.raises(WrongSensorError, match="no sensor is called 'virtual-row'"):
        sensor_of([sensor_answer()], SENSOR.frame(shot_pair(0)[0]), Wish(map_of="virtual-row"))


# The command


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A state that knows the sensor from raw shots and from JPEGs, and folders raw and jpg with them."""
    root = tmp_path_factory.mktemp("known")
    for name, count in (("raw", 12), ("jpg", 12)):
        (root / name).mkdir()
        for index in range(count):
            shot = SENSOR.shot(index, "moving")
            write = SENSOR.write_dng if name == "raw" else SENSOR.write_jpeg
            write(root / name / f"shot{index:02}.{'dng' if name == 'raw' else 'jpg'}", shot)
    for index in range(8):
        SENSOR.write_dng(root / "raw" / f"dark{index}.dng", SENSOR.shot(index, "dark", exposure_s=1.0))
    feed(root / "state", root / "raw", root / "jpg")
    return root


def invoke(*arguments: object) -> Any:
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def found_in(known: Path, samples: str) -> set[tuple[int, int]]:
    answer = json.loads(invoke("defects", "--json", "--state", known / "state").stdout)
    return {(d["x"], d["y"]) for s in answer["sensors"] if s["samples"] == samples for d in s["defects"]}


def test_raw_pictures_lose_their_defects_and_nothing_else(known: Path, tmp_path: Path):
    """The error at the hot samples that the map holds falls by at least 95 %; no other byte of the files changes."""
    left = before = 0.0
    found = found_in(known, "raw")
    for index in range(3):
        spoilt, clean = shot_pair(50 + index)
        SENSOR.write_dng(tmp_path / f"{index}.dng", spoilt)
        assert (
            invoke("repair", tmp_path / f"{index}.dng", "-o", tmp_path / "out", "--state", known / "state").exit_code
            == 0
        )
        old, new = ((tmp_path / where / f"{index}.dng").read_bytes() for where in (".", "out"))
        repaired = decode(tmp_path / "out" / f"{index}.dng").samples.astype(float)
        sites = {(d.x, d.y) for d in SENSOR.defects}
        changed = {(x, y) for y, x in np.argwhere(repaired != spoilt.mosaic).tolist()}
        assert changed <= found <= sites
        assert len(old) == len(new)
        assert sum(a != b for a, b in zip(old, new, strict=True)) <= 2 * len(changed)
        for defect in SENSOR.defects:
            if defect.kind == "hot" and (defect.x, defect.y) in found:
                truth = float(clean.mosaic[defect.y, defect.x])
                before += abs(float(spoilt.mosaic[defect.y, defect.x]) - truth)
                left += abs(repaired[defect.y, defect.x] - truth)
    assert left < 0.05 * before


def test_jpegs_lose_their_defects_and_nothing_else(known: Path, tmp_path: Path):
    """The squared error around the hot sites of the map falls by 85 %, at them by 95; elsewhere no pixel changes."""
    at = {"site": [0.0, 0.0], "near": [0.0, 0.0]}
    found = found_in(known, "rendered")
    for index in range(3):
        spoilt, clean = shot_pair(60 + index)
        path = tmp_path / f"{index}.jpg"
        SENSOR.write_jpeg(path, spoilt)
        SENSOR.write_jpeg(tmp_path / "clean.jpg", clean)
        assert invoke("repair", path, "-o", tmp_path / "out", "--state", known / "state").exit_code == 0
        old, new, truth = (
            np.asarray(Image.open(p)).astype(float)
            for p in (path, tmp_path / "out" / path.name, tmp_path / "clean.jpg")
        )
        near = np.zeros(old.shape[:2], bool)
        blocks = near.copy()
        site = near.copy()
        for defect in SENSOR.defects:
            y, x = defect.y, defect.x
            blocks[max(y - 18, 0) : y + 19, max(x - 18, 0) : x + 19] = True
            if defect.kind == "hot" and any(abs(x - fx) <= 2 and abs(y - fy) <= 2 for fx, fy in found):
                site[y, x] = True
                near[max(y - 8, 0) : y + 9, max(x - 8, 0) : x + 9] = True
        assert (old == new)[~blocks].all()
        for name, mask in (("site", site), ("near", near)):
            at[name][0] += ((old - truth)[mask] ** 2).sum()
            at[name][1] += ((new - truth)[mask] ** 2).sum()
    assert at["site"][1] < 0.05 * at["site"][0]
    assert at["near"][1] < 0.15 * at["near"][0]


@pytest.mark.parametrize("subsampling", [0, 2])
def test_a_progressive_jpeg_loses_its_defects_and_little_else(subsampling: int, known: Path, tmp_path: Path):
    """Found by a user: encoded again as a whole, some samples come out a little different, and all were refused."""
    spoilt, clean = shot_pair(63)
    for name, shot in (("shot", spoilt), ("clean", clean)):
        SENSOR.write_jpeg(tmp_path / f"{name}.jpg", shot)
        with Image.open(tmp_path / f"{name}.jpg") as image:
            how = {"exif": image.info["exif"], "progressive": True, "quality": 95, "subsampling": subsampling}
            image.save(tmp_path / f"{name}.jpg", **how)
    done = invoke("repair", tmp_path / "shot.jpg", "-o", tmp_path / "out", "--state", known / "state")
    assert done.exit_code == 0, done.output
    old, new, truth = (
        decode(tmp_path / name).samples.astype(float) for name in ("shot.jpg", "out/shot.jpg", "clean.jpg")
    )
    sites = np.zeros((400, 600), bool)
    for x, y in found_in(known, "rendered"):
        sites[y, x] = True
    sites = sites.repeat(3, axis=1)
    assert ((new - truth)[sites] ** 2).sum() < 0.15 * ((old - truth)[sites] ** 2).sum()
    assert np.abs(new - old)[~sites].mean() < 1.0


def test_a_progressive_jpeg_that_would_lose_much_is_refused(tmp_path: Path):
    """Of noise in pure colours, half of which subsampling has taken away, encoding again takes as much once more."""
    noise = np.random.default_rng(0).integers(0, 2, (128, 160, 3), np.uint8) * 255
    Image.fromarray(noise).save(tmp_path / "noise.jpg", progressive=True, quality=80, subsampling=2)
    feed(tmp_path / "state", tmp_path / "noise.jpg")
    assert run("mark", 40, 40, "--state", tmp_path / "state").returncode == 0
    done = invoke("repair", tmp_path / "noise.jpg", "-o", tmp_path / "out", "--state", tmp_path / "state")
    assert done.exit_code == 1
    assert "encoded again as a whole" in done.output
    assert "jpegtran" in done.output
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("kind", ["raw", "jpg"])
def test_repairing_again_changes_nothing_more(kind: str, known: Path, tmp_path: Path):
    """Every file that comes out is a fixed point."""
    first, second = tmp_path / "first", tmp_path / "second"
    assert (
        invoke("repair", *sorted((known / kind).glob("shot*")), "-o", first, "--state", known / "state").exit_code == 0
    )
    assert invoke("repair", *sorted(first.iterdir()), "-o", second, "--state", known / "state").exit_code == 0
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes(), path.name


def test_a_healthy_sensor_s_pictures_come_out_as_they_are(tmp_path: Path):
    """A control: no defects known, byte for byte the same files, with their times."""
    sensor = VirtualSensor(200, 150, hot=0, stuck=0, dead=0, seed=4, serial="V0099")
    for index in range(8):
        sensor.write_dng(tmp_path / f"{index}.dng", sensor.shot(index, "moving"))
        sensor.write_jpeg(tmp_path / f"{index}.jpg", sensor.shot(index, "moving"))
    os.utime(tmp_path / "0.dng", (1_000_000_000, 1_000_000_000))
    feed(tmp_path / "state", tmp_path)
    given = [tmp_path / "0.dng", tmp_path / "0.jpg"]
    done = invoke(
        "repair", *given, "-o", tmp_path / "out", "--state", tmp_path / "state", "--map-of", "V0099", "--json"
    )
    assert done.exit_code == 0, done.output
    assert [picture["corrected"] for picture in json.loads(done.stdout)["pictures"]] == [0, 0]
    for path in given:
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    assert (tmp_path / "out" / "0.dng").stat().st_mtime == 1_000_000_000


def test_a_sensor_of_too_few_frames_is_not_called_healthy(tmp_path: Path):
    """It said "0 defects corrected" where one frame was counted, which tells nothing of any defect."""
    for index in range(4):
        SENSOR.write_dng(tmp_path / f"{index}.dng", SENSOR.shot(index, "moving"))
    asked = ("repair", tmp_path / "0.dng", "--dry-run", "--state", tmp_path / "state")
    feed(tmp_path / "state", tmp_path / "0.dng")
    words = "0 defects would be corrected; nothing is known of its sensor yet, as a verdict takes 4 counted frames and"
    assert f"{words} there is 1 (" in invoke(*asked).stdout
    feed(tmp_path / "state", tmp_path)
    assert "nothing is known" not in invoke(*asked).stdout


def test_pictures_of_others_are_refused_and_the_rest_is_done(known: Path, camera: Camera, tmp_path: Path):
    """Exit code 1, a sentence for each of them, and nothing written for it."""
    broken, strange = tmp_path / "broken.jpg", tmp_path / "strange.txt"
    broken.write_bytes((known / "jpg" / "shot00.jpg").read_bytes()[:5000])
    strange.write_text("no picture")
    os.mkfifo(tmp_path / "fifo.jpg")
    foreign = camera.shots[0]
    given = [foreign, broken, strange, tmp_path / "absent.dng", tmp_path / "fifo.jpg", known / "raw" / "shot00.dng"]
    done = run("repair", *given, "-o", tmp_path / "out", "--state", known / "state", "--json")
    assert done.returncode == 1
    told = json.loads(done.stdout)["pictures"]
    for picture, words in zip(
        told, ("there is no map", "JPEG", "no picture", "No such file", "regular file"), strict=False
    ):
        assert words in picture["refused"]
        assert picture["output"] is None
    assert told[-1]["refused"] is None
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["shot00.dng"]
    assert run("repair", foreign, "-o", tmp_path / "none", "--state", known / "state").returncode == 1
    assert not (tmp_path / "none").exists()


def test_nothing_is_overwritten(known: Path, tmp_path: Path):
    """Not a file that is there, unless that is wanted; a source never, whatever is wanted, nor by a link to it."""
    source = tmp_path / "shot.dng"
    shutil.copy(known / "raw" / "shot00.dng", source)
    content = source.read_bytes()
    out, state = tmp_path / "out", ("--state", known / "state")
    out.mkdir()
    (out / "shot.dng").write_text("mine")
    done = invoke("repair", source, "-o", out, *state)
    assert done.exit_code == 1
    assert "--force" in done.output
    assert (out / "shot.dng").read_text() == "mine"
    assert invoke("repair", source, "-o", out, *state, "--force").exit_code == 0
    assert (out / "shot.dng").read_bytes() != content
    for force in ((), ("--force",)):
        assert invoke("repair", source, "-o", tmp_path, *state, *force).exit_code == 1
    (out / "shot.dng").unlink()
    (out / "shot.dng").symlink_to(source)
    assert invoke("repair", source, "-o", out, *state, "--force").exit_code == 1
    (out / "shot.dng").unlink()
    (out / "shot.dng").hardlink_to(source)
    assert invoke("repair", source, "-o", out, *state, "--force").exit_code == 1
    assert source.read_bytes() == content
    # Two of one name, from two folders.
    (tmp_path / "other").mkdir()
    shutil.copy(known / "raw" / "shot01.dng", tmp_path / "other" / "shot.dng")
    done = invoke("repair", source, tmp_path / "other" / "shot.dng", "-o", tmp_path / "both", *state, "--force")
    assert done.exit_code == 1
    assert "another picture of that name" in done.output
    assert not list(tmp_path.rglob("*.part"))


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(known: Path, tmp_path: Path):
    """Each defect with the reason; no folder is needed."""
    source = known / "raw" / "shot00.dng"
    done = invoke("repair", source, "--dry-run", "--state", known / "state")
    assert done.exit_code == 0
    assert "would be corrected" in done.stdout
    told = json.loads(invoke("repair", source, "--dry-run", "--json", "--state", known / "state").stdout)["pictures"][0]
    assert told["output"] is None
    assert told["corrected"] == sum(d["corrected"] for d in told["defects"]) > 20
    assert {d["why"] for d in told["defects"]} >= {"shows", "always shows"}
    assert invoke("repair", source, "--dry-run", "-o", tmp_path / "out", "--state", known / "state").exit_code == 0
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "-o DIR"),
        (("-o", "out", "--states", "recovered"), "stable and candidate"),
        (("-o", "out", "--sensor", "a", "--map-of", "b"), "give one of them"),
        (("-o", "out", "--sensor", "nobody"), "no sensor is called 'nobody'"),
    ],
)
def test_wrong_use_is_told(arguments: tuple[str, ...], words: str, known: Path, tmp_path: Path):
    """With exit code 2."""
    given = [tmp_path / "out" if argument == "out" else argument for argument in arguments]
    done = run("repair", known / "raw" / "shot00.dng", *given, "--state", known / "state")
    assert done.returncode == 2
    assert words in done.stderr


def test_it_works_while_the_daemon_runs(known: Path, tmp_path: Path, start: Callable[..., Any]):
    """The map is then the daemon's; what it watches is no place for corrected pictures."""
    shutil.copytree(known / "state", tmp_path / "state")
    card = tmp_path / "card"
    card.mkdir()
    start("watch", card)
    source = known / "raw" / "shot00.dng"
    done = run("repair", source, "-o", tmp_path / "out", "--state", tmp_path / "state")
    assert done.returncode == 0, done.stderr
    alone = run("repair", source, "-o", tmp_path / "alone", "--state", known / "state")
    assert alone.returncode == 0
    assert (tmp_path / "out" / source.name).read_bytes() == (tmp_path / "alone" / source.name).read_bytes()
    refused = run("repair", source, "-o", card / "repaired", "--state", tmp_path / "state")
    assert refused.returncode == 2
    assert "watches" in refused.stderr
    assert not list(card.iterdir())


def test_rendered_pictures_are_corrected_with_the_map_of_raw_frames(known: Path, tmp_path: Path):
    """If the user says so; the error around the defects falls."""
    state = tmp_path / "state"
    feed(state, known / "raw")
    spoilt, clean = shot_pair(70)
    SENSOR.write_jpeg(tmp_path / "spoilt.jpg", spoilt)
    SENSOR.write_jpeg(tmp_path / "clean.jpg", clean)
    assert invoke("repair", tmp_path / "spoilt.jpg", "-o", tmp_path / "out", "--state", state).exit_code == 1
    done = invoke("repair", tmp_path / "spoilt.jpg", "-o", tmp_path / "out", "--state", state, "--map-of", "V0011")
    assert done.exit_code == 0, done.output
    old, new, truth = (
        np.asarray(Image.open(tmp_path / p)).astype(float) for p in ("spoilt.jpg", "out/spoilt.jpg", "clean.jpg")
    )
    assert ((new - truth) ** 2).sum() < 0.2 * ((old - truth) ** 2).sum()


# Metadata


def told_by_exiftool(path: Path) -> dict[str, str]:
    done = subprocess.run(
        ["exiftool", "-G1", "-a", "-u", "-s", "-j", "--System:all", "--ExifTool:all", "--SourceFile", path],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    (told,) = json.loads(done.stdout)
    told.pop("SourceFile")
    return dict(told)


def require_same_metadata(old: Path, new: Path, moved: tuple[str, ...] = ()) -> None:
    before, after = told_by_exiftool(old), told_by_exiftool(new)
    assert {k: v for k, v in before.items() if not k.endswith(moved or ("\0",))} == {
        k: v for k, v in after.items() if not k.endswith(moved or ("\0",))
    }
    assert len(before) > 10


needs_exiftool = pytest.mark.skipif(shutil.which("exiftool") is None, reason="exiftool is not installed")


@needs_exiftool
def test_metadata_of_simulated_pictures_survive(known: Path, tmp_path: Path):
    """Every tag that exiftool knows of."""
    for source in (known / "raw" / "shot00.dng", known / "jpg" / "shot00.jpg"):
        assert invoke("repair", source, "-o", tmp_path, "--state", known / "state").exit_code == 0
        assert (tmp_path / source.name).read_bytes() != source.read_bytes()
        require_same_metadata(source, tmp_path / source.name)


@needs_exiftool
@pytest.mark.parametrize(
    ("pattern", "moved"),
    [
        ("canon_1d4_left/calib_1.JPG", ()),
        ("exif_zoo_jpeg/Canon_EOS_20D_1.jpg", ()),
        ("exif_zoo_jpeg/Issue_177.jpg", ()),
        ("exif_zoo_jpeg/Olympus_S760.jpg", ()),
        ("flea3_d1_dng_derived/lights/*_3916ms*.dng", ()),
        ("flea3_d1_bayer/lights/*500nm_3916ms*.tif", (":StripOffsets", ":StripByteCounts")),
        ("tetra3_bfs_jpeg/*Alt40_Azi45*.jpg", ()),
        ("tetra3_bfs_tiff/*Alt40_Azi45*.tiff", ()),
        ("umd_st8_fits/calib-001-bi.fit", ()),
    ],
)
def test_metadata_of_real_pictures_survive(pattern: str, moved: tuple[str, ...], tmp_path: Path):
    """Whatever makers write; defects are declared at some places, and only near them pixels change."""
    sources = sorted(SHARED.glob(pattern))
    if not sources:
        pytest.skip("the real pictures are not here")
    source = sources[0]
    frame = decode(source)
    layout = frame.sensor.layout
    rng = np.random.default_rng(0)
    places = zip(rng.integers(0, layout.width, 400).tolist(), rng.integers(0, layout.height, 400).tolist(), strict=True)
    declared = [{"x": x, "y": y, "source": "mark"} for x, y in places]
    answer = {
        "sensors": [
            {
                "id": "it", "make": frame.sensor.make, "model": frame.sensor.model, "serial": frame.sensor.serial,
                "samples": str(frame.sensor.samples), "width": layout.width, "height": layout.height,
                "colours": layout.colours, "defects": [], "declared": declared,
            }
        ]
    }  # fmt: skip
    from hotpixd.repairing import run_repair

    assert run_repair(answer, [source], tmp_path, Wish()) == 0
    done = tmp_path / source.name
    assert done.read_bytes() != source.read_bytes()
    require_same_metadata(source, done, moved)
    after = decode(done)
    assert (after.sensor, after.info) == (frame.sensor, frame.info)
    changed = (after.samples != frame.samples).reshape(layout.height, layout.width, -1).any(axis=2)
    reach = 0 if frame.sensor.samples == "raw" else 36
    for defect in declared:
        x, y = defect["x"], defect["y"]
        changed[max(y - reach, 0) : y + reach + 1, max(x - reach, 0) : x + reach + 1] = False
    assert not changed.any()


def test_a_tiff_and_a_png_are_corrected_too(tmp_path: Path):
    """Lossless pictures: only the samples of the defects change."""
    from hotpixd.repairing import run_repair

    spoilt, _ = shot_pair(0)
    tifffile.imwrite(tmp_path / "grey.tif", spoilt.mosaic, compression="deflate", metadata=None)
    Image.fromarray(spoilt.mosaic).save(tmp_path / "grey.png")
    answer = {"sensors": [sensor_answer(make=None, model=None, serial=None, colours="LLLL")]}
    assert (
        run_repair(answer, [tmp_path / "grey.tif", tmp_path / "grey.png"], tmp_path / "out", Wish(everything=True)) == 0
    )
    expected: NDArray[np.bool_] = np.zeros((400, 600), bool)
    for defect in SENSOR.defects:
        expected[defect.y, defect.x] = True
    for name in ("grey.tif", "grey.png"):
        after = decode(tmp_path / "out" / name).samples
        assert not (after != spoilt.mosaic)[~expected].any()
        assert (after != spoilt.mosaic)[expected].mean() > 0.9
