"""The virtual camera: defects behave as planted, noise as physics wants, and files read back as shot."""

from __future__ import annotations

import json
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

import exifread
import numpy as np
import pytest
import rawpy
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from hotpixd.core.frame import SampleKind, ShotKind
from hotpixd.simulate import (
    BASE_GAIN,
    BLACK_LEVEL_ADU,
    SCENES,
    TELEGRAPH_CYCLE,
    WHITE_LEVEL_ADU,
    XTRANS,
    PlantedDefect,
    Scene,
    VirtualSensor,
    write_series,
)


@pytest.fixture(scope="module")
def sensor() -> VirtualSensor:
    """A small sensor with every kind of defect."""
    return VirtualSensor(480, 320, hot=12, stuck=6, dead=6, unstable=6, clusters=2, seed=5)


def of_kind(sensor: VirtualSensor, kind: str) -> list[PlantedDefect]:
    return [defect for defect in sensor.defects if defect.kind == kind]


def mean_at(mosaics: list[NDArray[np.uint16]], defect: PlantedDefect) -> float:
    return float(np.mean([mosaic[defect.y, defect.x] for mosaic in mosaics]))


def fine_structure(mosaic: NDArray[np.uint16]) -> NDArray[np.float64]:
    """Return what a green plane holds above its own blur, with the extremes of edges and defects tamed."""
    plane = mosaic[::2, 1::2].astype(np.float64)
    fine = plane - ndimage.median_filter(plane, 5)
    return np.clip(fine, *np.percentile(fine, (1, 99)))


@pytest.mark.parametrize("scene", SCENES)
def test_a_shot_needs_no_other_shot(scene: Scene):
    """The same numbers give the same samples, whatever was shot before, and other numbers give others."""
    one, other = (VirtualSensor(120, 80, hot=5, stuck=1, dead=1, unstable=2, seed=7) for _ in range(2))
    one.shot(0, scene)
    assert one.defects == other.defects
    shot = one.shot(3, scene)
    assert np.array_equal(shot.mosaic, other.shot(3, scene).mosaic)
    assert not np.array_equal(shot.mosaic, other.shot(4, scene).mosaic)
    assert shot.kind is (ShotKind.DARK if scene == "dark" else ShotKind.LIGHT)


def test_another_seed_is_another_sensor():
    """Defects lie elsewhere."""
    one, other = (VirtualSensor(120, 80, hot=5, stuck=1, dead=1, seed=seed) for seed in (1, 2))
    assert {(d.x, d.y) for d in one.defects}.isdisjoint((d.x, d.y) for d in other.defects)


def test_defects_are_apart_and_clusters_adjacent(sensor: VirtualSensor):
    """Single defects have healthy neighbours; the members of a cluster touch."""
    assert [len(of_kind(sensor, kind)) for kind in ("stuck", "dead", "unstable")] == [6, 6, 6]
    clustered = len(of_kind(sensor, "hot")) - 12
    assert 4 <= clustered <= 8
    places = np.array([(d.x, d.y) for d in sensor.defects])
    distances = np.abs(places[:, np.newaxis] - places).max(axis=2) + 1000 * np.eye(len(places), dtype=int)
    assert np.all(distances[:clustered].min(axis=1) == 1)
    assert np.all(distances[clustered:].min(axis=1) > 6)
    assert all(sensor.layout.address(d.y * 480 + d.x) == (d.x, d.y, d.colour) for d in sensor.defects)


def test_a_sensor_too_small_for_its_defects_is_refused():
    """Planting ends with a sentence, not in an endless loop."""
    with pytest.raises(ValueError, match="no room"):
        VirtualSensor(20, 20, hot=40)


def test_settings_stay_in_their_ranges_and_time_goes_on(sensor: VirtualSensor):
    """Exposure, ISO and temperature vary as documented; the clock never goes back."""
    small = VirtualSensor(16, 16, hot=0, stuck=0, dead=0)
    shots = [small.shot(index, "dark") for index in range(60)]
    assert min(s.exposure_s for s in shots) < 0.6 < 1.0 < max(s.exposure_s for s in shots)
    assert all(0.3 <= s.exposure_s <= 2.0 and 50 <= s.iso <= 200 and 20 <= s.sensor_temp_c <= 24 for s in shots)
    assert all(abs(b.sensor_temp_c - a.sensor_temp_c) < 0.1 for a, b in pairwise(shots))
    assert all(a.taken_at < b.taken_at for a, b in pairwise(shots))


def test_hot_excess_is_linear_in_exposure_and_doubles_per_6_c(sensor: VirtualSensor):
    """The dark signal is dark current x exposure x ISO x 2^(dT / 6), up to the white level."""
    settings = [(0.4, 100, 20.0, 1.0), (0.8, 100, 20.0, 2.0), (0.4, 200, 20.0, 2.0), (0.4, 100, 26.0, 2.0)]
    for exposure_s, iso, temp_c, factor in settings:
        shots = [sensor.shot(i, "dark", exposure_s=exposure_s, iso=iso, sensor_temp_c=temp_c).mosaic for i in range(16)]
        for defect in of_kind(sensor, "hot"):
            assert defect.dark_current_adu_per_s is not None
            expected = 0.4 * factor * defect.dark_current_adu_per_s
            # Four standard errors of shot and read noise, in ADU, and what healthy dark current adds.
            gain = BASE_GAIN * 100 / iso
            error = 4 * np.sqrt((expected * gain + 9) / 16) / gain + 2
            if expected < 15_000:
                assert mean_at(shots, defect) - BLACK_LEVEL_ADU == pytest.approx(expected, abs=error)


def test_stuck_sites_say_the_same_always(sensor: VirtualSensor):
    """Whatever the light."""
    for scene in SCENES:
        mosaic = sensor.shot(1, scene).mosaic
        assert [mosaic[d.y, d.x] for d in of_kind(sensor, "stuck")] == [d.level_adu for d in of_kind(sensor, "stuck")]


def test_dead_sites_hardly_respond_to_light(sensor: VirtualSensor):
    """They give their share of what their neighbours of the same colour give."""
    mosaics = [sensor.shot(i, "flat", exposure_s=1.0, iso=100).mosaic for i in range(8)]
    for defect in of_kind(sensor, "dead"):
        healthy = mosaics[0][defect.y % 2 :: 2, defect.x % 2 :: 2]
        signal = float(np.median(healthy)) - BLACK_LEVEL_ADU
        assert defect.response is not None
        assert mean_at(mosaics, defect) - BLACK_LEVEL_ADU == pytest.approx(defect.response * signal, abs=0.02 * signal)


def test_unstable_sites_are_on_for_their_share_of_frames_in_runs(sensor: VirtualSensor):
    """Their excess comes and goes, and stays for more than one frame."""
    count = 5 * TELEGRAPH_CYCLE
    mosaics = [sensor.shot(i, "dark", exposure_s=1.0, iso=100).mosaic for i in range(count)]
    for defect in of_kind(sensor, "unstable"):
        assert defect.dark_current_adu_per_s is not None
        assert defect.duty is not None
        values = np.array([float(mosaic[defect.y, defect.x]) for mosaic in mosaics])
        on = values > BLACK_LEVEL_ADU + 0.5 * defect.dark_current_adu_per_s
        assert on.tolist() == [sensor.is_on(defect, i) for i in range(count)]
        assert on.mean() == pytest.approx(defect.duty, abs=0.15)
        # In each cycle it goes on and off once at most.
        assert 2 <= np.count_nonzero(np.diff(on)) <= 2 * 6


@pytest.mark.parametrize("iso", [50, 100, 200])
def test_noise_follows_the_photon_transfer_curve(iso: int):
    """Temporal variance against mean is a line of slope 1 / gain, whose origin is the read noise.

    References
    ----------
    Janesick (2007), Photon Transfer, SPIE Press.
    """
    plain = VirtualSensor(400, 300, hot=0, stuck=0, dead=0, pattern="L", seed=3)
    means, variances = [], []
    for exposure_s in (0.0, 0.002, 0.02, 0.3, 0.8, 1.4):
        first, second = (
            plain.shot(i, "flat", exposure_s=exposure_s, iso=iso).mosaic.astype(np.float64) for i in (0, 1)
        )
        means.append(float(np.mean(first + second)) / 2 - BLACK_LEVEL_ADU)
        # The difference of two shots is free of what the sensor and the light have fixed.
        variances.append(float(np.var(first - second)) / 2)
    gain = BASE_GAIN * 100 / iso
    slope = np.polyfit(means, variances, 1)[0]
    assert slope == pytest.approx(1 / gain, rel=0.02)
    # Rounding to integers adds a twelfth.
    assert variances[0] == pytest.approx((3.0 / gain) ** 2 + 1 / 12, rel=0.05)
    for mean, variance in zip(means, variances, strict=True):
        assert variance == pytest.approx((mean * gain + 9) / gain**2 + 1 / 12, rel=0.05)


def test_a_dark_is_black_level_and_noise():
    """Its median is the black level; healthy sites spread by the read noise and a little dark current."""
    mosaic = VirtualSensor(300, 200, hot=0, stuck=0, dead=0).shot(0, "dark", exposure_s=1.0, iso=100).mosaic
    assert abs(float(np.median(mosaic)) - BLACK_LEVEL_ADU) <= 1
    assert float(np.std(mosaic)) == pytest.approx(np.sqrt(9 + 0.6 + BASE_GAIN**2 / 12) / BASE_GAIN, rel=0.1)
    assert mosaic.max() < BLACK_LEVEL_ADU + 20


def test_moving_frames_share_nothing_but_the_sensor():
    """Without the sensor's own pattern, the fine structure of two scenes is uncorrelated."""
    clean = VirtualSensor(600, 400, hot=0, stuck=0, dead=0, seed=2, prnu=0.0)
    fine = [fine_structure(clean.shot(i, "moving").mosaic) for i in range(5)]
    for i, one in enumerate(fine):
        for other in fine[i + 1 :]:
            # 60,000 samples of a plane: the standard error is 0.004, some more with texture.
            assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 0.02


def test_the_border_of_moving_scenes_does_not_stand_out():
    """The outermost rows and columns differ from those next to them as much as others do.

    A scene without a sky once had half a sky in its top row: a mark at a fixed place.
    """
    clean = VirtualSensor(240, 160, hot=0, stuck=0, dead=0, seed=2, pattern="L")
    shots = np.array([clean.shot(i, "moving").mosaic for i in range(40)], dtype=np.float64)
    relative = shots / np.median(shots, axis=(1, 2), keepdims=True)
    for across in (1, 2):
        # Scenes differ more than neighbouring rows do: compare each row with the next, scene by scene.
        profile = np.median(relative, axis=across)
        steps = np.abs(np.diff(profile, axis=1)).mean(axis=0)
        assert max(steps[0], steps[-1]) < 2 * np.median(steps)


def test_moving_scenes_are_exposed_like_photographs():
    """Medians at 5 to 30 % of full scale, some clipped highlights, some deep shadows."""
    clean = VirtualSensor(600, 400, hot=0, stuck=0, dead=0, seed=4)
    signals = [clean.shot(i, "moving").mosaic[::2, 1::2] - float(BLACK_LEVEL_ADU) for i in range(12)]
    span = WHITE_LEVEL_ADU - BLACK_LEVEL_ADU
    medians = [float(np.median(signal)) / span for signal in signals]
    assert 0.04 < min(medians) < max(medians) < 0.32
    assert sum(bool((signal >= span).mean() > 1e-4) for signal in signals) >= 4
    assert sum(bool((signal < 0.02 * span).mean() > 1e-3) for signal in signals) >= 4


def test_a_tripod_keeps_the_scene():
    """Fine structure comes again, brightness flickers by a few percent, noise is new."""
    clean = VirtualSensor(300, 200, hot=0, stuck=0, dead=0, seed=2)
    shots = [clean.shot(i, "tripod").mosaic for i in range(6)]
    assert np.corrcoef(fine_structure(shots[0]).ravel(), fine_structure(shots[1]).ravel())[0, 1] > 0.5
    brightness = np.array([np.mean(shot) for shot in shots]) - BLACK_LEVEL_ADU
    assert 0.003 < brightness.std() / brightness.mean() < 0.1


def peaks_of(mosaic: NDArray[np.uint16]) -> NDArray[np.bool_]:
    """Return where a bright star has its peak, of all colours together."""
    blurred = ndimage.uniform_filter(mosaic.astype(np.float64), 2)
    return (blurred > BLACK_LEVEL_ADU + 1000) & (blurred == ndimage.maximum_filter(blurred, 9))


def test_tracked_stars_stay_and_dithered_stars_move():
    """Tracked: the same sites light up in two shots. Dithered: others do."""
    clean = VirtualSensor(600, 400, hot=0, stuck=0, dead=0, seed=2)
    near = np.ones((3, 3), dtype=bool)
    shares = {}
    for scene in ("tracked", "dithered"):
        one, other = (peaks_of(clean.shot(i, scene, exposure_s=1.0, iso=100).mosaic) for i in (0, 1))
        assert one.sum() > 50
        shares[scene] = (one & ndimage.binary_dilation(other, near)).sum() / one.sum()
    assert shares["tracked"] > 0.9
    assert shares["dithered"] < 0.1


@pytest.mark.parametrize("pattern", ["RGGB", "GBRG", XTRANS])
def test_libraw_reads_the_very_samples_of_a_dng(tmp_path: Path, pattern: str):
    """Bit for bit, with the right colour at every planted site, black and white level."""
    sensor = VirtualSensor(301, 200, seed=1, pattern=pattern)
    shot = sensor.shot(2, "moving")
    sensor.write_dng(tmp_path / "a.dng", shot)
    with rawpy.imread(str(tmp_path / "a.dng")) as raw:
        assert np.array_equal(raw.raw_image_visible, shot.mosaic)
        colours = raw.color_desc.decode()
        assert [colours[raw.raw_color(d.y, d.x)] for d in sensor.defects] == [d.colour for d in sensor.defects]
        assert set(raw.black_level_per_channel) == {BLACK_LEVEL_ADU}
        assert raw.white_level == WHITE_LEVEL_ADU
    assert [path.name for path in tmp_path.iterdir()] == ["a.dng"]


def test_libraw_reads_a_grey_dng(tmp_path: Path):
    """A sensor without colour filters."""
    sensor = VirtualSensor(300, 200, pattern="L")
    shot = sensor.shot(0, "moving")
    sensor.write_dng(tmp_path / "a.dng", shot)
    with rawpy.imread(str(tmp_path / "a.dng")) as raw:
        assert np.array_equal(raw.raw_image_visible, shot.mosaic)


def test_a_dng_says_how_it_was_taken(tmp_path: Path, sensor: VirtualSensor):
    """The settings of the shot come back exactly."""
    shot = sensor.shot(2, "dark")
    sensor.write_dng(tmp_path / "a.dng", shot)
    with (tmp_path / "a.dng").open("rb") as file:
        tags = exifread.process_file(file, details=False)
    assert str(tags["Image Make"]) == "Hotpixd"
    assert str(tags["Image Tag 0xC62F"]) == "V0001"
    assert float(tags["Image ExposureTime"].values[0]) == shot.exposure_s
    assert tags["Image ISOSpeedRatings"].values == [shot.iso]
    assert float(tags["Image Tag 0x9400"].values[0]) == shot.sensor_temp_c
    when = f"{tags['Image DateTimeOriginal']}.{tags['Image SubSecTimeOriginal']}"
    assert when == shot.taken_at.strftime("%Y:%m:%d %H:%M:%S.%f")[:-3]
    assert "Image Software" not in tags


def test_a_jpeg_looks_like_a_cameras(tmp_path: Path, sensor: VirtualSensor):
    """Size, EXIF, and white that is white."""
    shot = sensor.shot(2, "flat", exposure_s=1.0, iso=100)
    sensor.write_jpeg(tmp_path / "a.jpg", shot)
    with Image.open(tmp_path / "a.jpg") as picture:
        assert picture.size == (480, 320)
        exif = picture.getexif()
        details = exif.get_ifd(0x8769)
        colours = np.asarray(picture).reshape(-1, 3).mean(axis=0)
    assert colours.max() - colours.min() < 2
    assert 120 < colours.mean() < 150
    assert (exif[0x010F], exif[0x0110]) == ("Hotpixd", "Virtual Camera")
    assert 0x0131 not in exif
    assert details[0xA431] == "V0001"
    assert float(details[0x829A]) == shot.exposure_s
    assert details[0x8827] == shot.iso
    assert details[0x9003] == shot.taken_at.strftime("%Y:%m:%d %H:%M:%S")
    assert details[0x9291] == f"{shot.taken_at.microsecond // 1000:03d}"
    assert details[0x9011] == "+00:00"
    assert (details[0xA002], details[0xA003]) == (480, 320)


@pytest.mark.parametrize("pattern", ["RGGB", "BGGR", XTRANS])
def test_rendering_keeps_colours_in_place(pattern: str):
    """A hot site shows in the rendered picture at its own address and in its own colour."""
    sensor = VirtualSensor(301, 201, hot=20, stuck=0, dead=0, seed=8, pattern=pattern, hot_range_adu_per_s=(5e3, 8e3))
    rendered = sensor.rendered(sensor.shot(0, "dark", exposure_s=1.0, iso=100))
    assert rendered.shape == (201, 301, 3)
    for defect in sensor.defects:
        here = rendered[defect.y, defect.x]
        assert here.argmax() == "RGB".index(defect.colour)
        assert here.max() > 100
    assert np.median(rendered) < 5


def test_a_frame_is_what_the_file_decodes_to(sensor: VirtualSensor):
    """Identity, kind, settings and levels."""
    shot = sensor.shot(0, "dark")
    frame = sensor.frame(shot)
    assert frame.samples is shot.mosaic
    assert frame.samples.flags.c_contiguous
    assert frame.samples.shape == frame.sensor.layout.shape
    assert frame.sensor.samples is SampleKind.RAW
    assert (frame.kind, frame.info.exposure_s) == (ShotKind.DARK, shot.exposure_s)
    assert (frame.black_level_adu, frame.white_level_adu) == (BLACK_LEVEL_ADU, WHITE_LEVEL_ADU)


@pytest.mark.parametrize("suffix", ["dng", "jpg"])
def test_a_series_is_written_file_by_file_with_its_truth(tmp_path: Path, sensor: VirtualSensor, suffix: str):
    """Each path is whole when it is yielded; the truth lists every defect with all it is."""
    for number, path in enumerate(write_series(tmp_path / "out", sensor, 2, "moving", suffix), start=1):
        assert path.name == f"frame_{number:04d}.{suffix}"
        assert path.stat().st_size > 10_000
    truth = json.loads((tmp_path / "out" / "truth.json").read_text())
    assert truth["defects"] == [asdict(defect) for defect in sensor.defects]
    assert (truth["scene"], truth["frames"], truth["seed"], truth["width"]) == ("moving", 2, 5, 480)
    assert len(list((tmp_path / "out").iterdir())) == 3


def test_an_unknown_scene_or_format_is_refused(tmp_path: Path, sensor: VirtualSensor):
    """With the offending value."""
    with pytest.raises(ValueError, match="'sunset'"):
        sensor.shot(0, "sunset")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'png'"):
        list(write_series(tmp_path, sensor, 1, "dark", "png"))  # type: ignore[arg-type]
