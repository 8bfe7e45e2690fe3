"""The commands export, import, mark and unmark, as a user gives them; and what becomes of what they declare."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from astropy.io import fits

from conftest import Camera, feed, told
from declarations import command, declared, only
from hotpixd.backup import Backups, save
from hotpixd.store.state import State
from pictures import mosaic, write_dng


@pytest.fixture
def root(scanned: Path, tmp_path: Path) -> Path:
    """A state of one sensor with 200x150 pixels."""
    shutil.copytree(scanned, tmp_path / "state")
    return tmp_path / "state"


# --- marking and importing


def test_pixels_are_marked_and_unmarked_by_hand(root):
    """Once, whoever says it again; what was found does not change."""
    before = told(root)["digests"]
    assert declared(root) == []
    assert "is declared now" in command("mark", 199, 149, state=root)
    assert "was declared already" in command("mark", 199, 149, state=root)
    command("mark", 0, 0, state=root)
    (first, second) = only(root)["declared"]
    assert (first["x"], first["y"], first["source"]) == (0, 0, "mark")
    assert first["declared_at"].endswith("Z")
    assert (second["x"], second["y"]) == (199, 149)
    assert "is not declared any more; mark did" in command("unmark", 0, 0, state=root)
    assert "was not declared" in command("unmark", 0, 0, state=root)
    assert declared(root) == [(199, 149)]
    assert told(root)["digests"] == before


def test_a_pixel_outside_of_the_sensor_is_wrong_use(root):
    """With the size that it has."""
    for x, y in ((200, 0), (0, 150)):
        assert "200x150 pixels" in command("mark", x, y, state=root, code=2)
    assert declared(root) == []


def test_lists_are_imported_as_a_whole_or_not_at_all(root, tmp_path):
    """Several at once, too: one bad line in the last of them, and nothing of any is declared."""
    (tmp_path / "good").write_text("1 2 0\n3 4 0\n")
    (tmp_path / "bad").write_text("P 5 6 H\nP 200 6 H\n")
    said = command("import", tmp_path / "good", tmp_path / "bad", state=root, code=2)
    assert f"{tmp_path / 'bad'}, line 2: (200, 6) is outside of the sensor" in said
    assert declared(root) == []
    (tmp_path / "bad").write_text("P 5 6 H\nP 1 2 H\n")
    assert "3 pixels of" in command("import", tmp_path / "good", tmp_path / "bad", state=root)
    assert [(d["x"], d["y"], d["source"]) for d in only(root)["declared"]] == [
        (1, 2, "dcraw:good"),
        (3, 4, "dcraw:good"),
        (5, 6, "siril:bad"),
    ]
    assert "there is: dcraw:good, siril:bad" in command("unmark", "--source", "nonsense", state=root, code=2)


def test_what_several_declare_stays_until_all_of_them_take_it_back(root, tmp_path):
    """Imported at once, one after the other, or marked by hand."""
    (tmp_path / "a").write_text("1 2 0\n3 4 0\n")
    (tmp_path / "b").write_text("P 5 6 H\nP 1 2 H\n")
    command("import", tmp_path / "a", tmp_path / "b", state=root)
    first = only(root)["declared"][0]
    assert (first["source"], first["sources"]) == ("dcraw:a", ["dcraw:a", "siril:b"])
    assert "1 pixel of" in (said := command("unmark", "--source", "dcraw:a", state=root))
    assert "others declare 1 too" in said
    assert declared(root) == [(1, 2), (5, 6)]
    command("import", tmp_path / "a", state=root)
    assert "was declared already" in command("mark", 1, 2, state=root)
    assert only(root)["declared"][0]["sources"] == ["siril:b", "dcraw:a", "mark"]
    for source in ("siril:b", "dcraw:a"):
        command("unmark", "--source", source, state=root)
    assert declared(root) == [(1, 2)]
    command("import", tmp_path / "b", state=root)
    assert "mark, siril:b did" in command("unmark", 1, 2, state=root)
    assert declared(root) == [(5, 6)]


def test_of_several_sensors_one_must_be_named(root, other_camera: Camera):
    """By serial number, id or name; the error lists them."""
    feed(root, other_camera.folder)
    for arguments in (["export", "dcraw"], ["mark", 1, 2], ["unmark", 1, 2]):
        said = command(*arguments, state=root, code=2)
        assert "--sensor Hotpixd-Virtual-Camera-V0001" in said
        assert "--sensor Hotpixd-Virtual-Camera-V0002" in said
    assert "no sensor is called" in command("mark", 1, 2, "--sensor", "V0009", state=root, code=2)
    command("mark", 1, 2, "--sensor", "V0002", state=root)
    assert "\n1 2 0\n" in command("export", "dcraw", "--sensor", "V0002", state=root)
    assert "\n1 2 0\n" not in command("export", "dcraw", "--sensor", "V0001", state=root)


def test_what_was_exported_comes_back_as_declared(root, camera: Camera, tmp_path):
    """And agrees with what is found, of which tables and answers tell."""
    command("export", "siril", "-o", tmp_path / "map.lst", state=root)
    command("import", tmp_path / "map.lst", state=root)
    found = {(d["x"], d["y"]) for d in only(root)["defects"]}
    planted = {(d.x, d.y) for d in camera.sensor.defects}
    assert len(found) >= 5
    assert found <= planted
    assert set(declared(root)) == found
    command("mark", 3, 3, state=root)
    said = command("defects", state=root)
    assert f"{len(found) + 1} declared: {len(found)} of them found, 1 not; 0 found but not declared" in said


def test_declared_defects_are_exported_unless_left_out(root):
    """By default they are part of the map."""
    command("mark", 7, 9, state=root)
    found = len(only(root)["defects"])
    with_it = command("export", "dcraw", state=root).splitlines()
    without = command("export", "dcraw", "--no-declared", state=root).splitlines()
    assert "7 9 0" in with_it
    assert "7 9 0" not in without
    assert sum(line[0] != "#" for line in with_it) == found + 1
    assert sum(line[0] != "#" for line in without) == found


# --- exporting, as a command


def test_binary_formats_want_a_file_and_files_are_not_overwritten(root, tmp_path):
    """Unless it is said that they may be; and nothing is left beside them."""
    assert "name a file with -o" in command("export", "png-mask", state=root, code=2)
    out = tmp_path / "out" / "mask.png"
    assert "no folder" in command("export", "png-mask", "-o", out, state=root, code=2)
    assert "there is no folder" in command("export", "rawtherapee", "-o", f"{out.parent}/", state=root, code=2)
    assert not out.parent.exists()
    out.parent.mkdir()
    command("export", "png-mask", "-o", out, state=root)
    first = out.read_bytes()
    command("mark", 7, 9, state=root)
    assert "is there already" in command("export", "png-mask", "-o", out, state=root, code=2)
    assert out.read_bytes() == first
    command("export", "png-mask", "-o", out, "--force", state=root)
    assert out.read_bytes() != first
    assert [path.name for path in out.parent.iterdir()] == ["mask.png"]
    os.mkfifo(pipe := out.parent / "pipe.png")
    assert "a pipe" in command("export", "png-mask", "-o", pipe, "--force", state=root, code=2)
    assert pipe.is_fifo()


def test_the_picture_to_copy_is_never_replaced(root, camera: Camera, tmp_path):
    """Whatever is wanted, by whatever name: it may be the only one there is."""
    raw = tmp_path / "frame.dng"
    shutil.copy(camera.shots[0], raw)
    (tmp_path / "linked.dng").symlink_to(raw)
    (tmp_path / "same.dng").hardlink_to(raw)
    before = raw.read_bytes()
    for like in (raw, tmp_path / "linked.dng"):
        for out in ("frame.dng", "linked.dng", "same.dng"):
            order = ("export", "dng", "--like", like, "-o", tmp_path / out, "--force")
            assert "never replaced" in command(*order, state=root, code=2)
    assert raw.read_bytes() == before
    assert (tmp_path / "linked.dng").is_symlink()
    command("export", "dng", "--like", raw, "-o", tmp_path / "copy.dng", state=root)
    command("export", "dng", "--like", raw, "-o", tmp_path / "copy.dng", "--force", state=root)


def test_our_own_map_says_since_when_and_where_in_a_raw_file(root, camera: Camera, tmp_path):
    """As the history has it; and where the visible area lies in the file that is named, as margins differ by format."""
    write_dng(tmp_path / "a.dng", mosaic(160, 212), active_area=(4, 8, 154, 208))
    plain = json.loads(command("export", "json", "--which", "stable,warm,candidate", state=root))
    (history,) = json.loads(command("history", "--json", state=root))["sensors"]
    lives = {(life["x"], life["y"]): life for life in history["defects"]}
    assert lives
    for entry in plain["defects"]:
        life = lives.get((entry["x"], entry["y"]), {"last_seen": None, "sessions": None})
        assert (entry["last_seen"], entry["sessions"]) == (life["last_seen"], life["sessions"])
        assert entry["first_seen"]
    assert {entry["sessions"] for entry in plain["defects"] if entry["state"] == "stable"} == {1}
    assert plain["raw_frame"] is None
    placed = json.loads(command("export", "json", "--like", tmp_path / "a.dng", state=root))
    assert placed["raw_frame"] == {"width": 212, "height": 160, "left": 8, "top": 4}
    write_dng(tmp_path / "b.dng", mosaic(160, 212), active_area=(4, 8, 154, 206))
    said = command("export", "json", "--like", tmp_path / "b.dng", state=root, code=2)
    assert "b.dng has 198x150 pixels, the sensor 200x150" in said


def test_a_hyphen_is_the_standard_output(root, tmp_path):
    """As other programs take it; a file of that name was written."""
    plain = command("export", "dcraw", state=root).splitlines()
    assert command("export", "dcraw", "-o", "-", state=root, cwd=tmp_path).splitlines()[1:] == plain[1:]
    assert "no text" in command("export", "png-mask", "-o", "-", state=root, code=2, cwd=tmp_path)
    assert not (tmp_path / "-").exists()


def test_wrong_orders_are_told_what_is_right(root, tmp_path):
    """Each in a sentence, exit code 2."""
    assert "these are: dcraw" in command("export", "nonsense", state=root, code=2)
    assert "--list" in command("export", state=root, code=2)
    assert "stable, warm, candidate" in command("export", "dcraw", "--which", "hot", state=root, code=2)
    assert "--like" in command("export", "dng", "-o", tmp_path / "a.dng", state=root, code=2)
    assert "ends in .fits or .tif" in command("export", "mean", "-o", tmp_path / "a.png", state=root, code=2)
    assert "camconst.json" in command("export", "rawtherapee", "--raw-crop", "1,2", state=root, code=2)
    assert "these are: dcraw" in command("import", "--format", "x", tmp_path / "a", state=root, code=2)
    assert "cannot be read" in command("import", tmp_path / "a", state=root, code=2)
    assert "name a pixel" in command("unmark", 1, state=root, code=2)
    for wrong, order in (("'a'", ("mark", "a", "b")), ("'2.5'", ("mark", 1, "2.5")), ("'b'", ("unmark", 1, "b"))):
        said = " ".join(command(*order, state=root, code=2).replace("│", "").split())
        assert f"whole numbers from 0 on, such as 1042 87, not {wrong}" in said
    listed = command("export", "--list", state=root)
    assert all(len(line) <= 120 for line in listed.splitlines())
    assert "rawtherapee" in listed


def test_rawtherapee_s_list_goes_into_its_folder_under_its_name(root, tmp_path):
    """And it is said which names it looks for."""
    said = command("export", "rawtherapee", "-o", tmp_path, state=root)
    assert (tmp_path / "Hotpixd Virtual Camera V0001.badpixels").is_file()
    assert "'Hotpixd Virtual Camera.badpixels'" in said


def test_phd2_gets_its_two_files(root, tmp_path):
    """Named as it names them; the second as large as the sensor."""
    command("export", "phd2", "-o", tmp_path / "PHD2_defect_map_1.txt", state=root)
    with fits.open(tmp_path / "PHD2_defect_map_master_1.fit") as units:
        assert units[0].data.shape == (150, 200)


def test_frames_in_fits_want_a_picture_that_says_how_their_rows_are_stored(tmp_path):
    """Else a map would be upside down in half of all cases, and nobody would know."""
    import numpy as np

    rng = np.random.default_rng(4)
    for number in range(6):
        frame = rng.normal(1000, 20, (64, 80)).astype(np.uint16)
        frame[10, 20] = 9000
        unit = fits.PrimaryHDU(frame)
        unit.header["IMAGETYP"] = "Dark Frame"
        unit.writeto(tmp_path / f"{number}.fits")
    root = tmp_path / "state"
    feed(root, *sorted(tmp_path.glob("*.fits")))
    command("mark", 20, 53, state=root)  # as hotpixd sees row 10 of 64 from the bottom
    assert "--like" in command("export", "phd2", "-o", tmp_path / "m.txt", state=root, code=2)
    command("export", "phd2", "-o", tmp_path / "m.txt", "--like", tmp_path / "0.fits", state=root)
    assert "20 10" in (tmp_path / "m.txt").read_text().splitlines()
    assert "20 53 0" in command("export", "dcraw", state=root)
    assert "--like" in command("import", tmp_path / "m.txt", state=root, code=2)
    command("import", tmp_path / "m.txt", "--like", tmp_path / "0.fits", state=root)
    assert declared(root) == [(20, 53)]


# --- the rest of the state's life


def test_damage_is_told_and_nothing_is_written_over_it(root, tmp_path):
    """By verify; what was found is told as ever, and exported when it is said to leave declared ones out."""
    command("mark", 1, 2, state=root)
    (path,) = (root / "declared").iterdir()
    path.write_bytes(path.read_bytes().replace(b"[1, 2", b"[1, 3"))
    damaged = path.read_bytes()
    assert str(path) in command("verify", state=root, code=3)
    assert "cannot be believed" in command("defects", state=root)
    assert "--no-declared" in command("export", "dcraw", state=root, code=3)
    command("export", "dcraw", "--no-declared", state=root)
    assert "move the file away" in command("mark", 5, 6, state=root, code=3)
    assert path.read_bytes() == damaged
    # A backup of such a state can be restored.
    command("backup", tmp_path / "b", state=root)
    command("restore", tmp_path / "b", state=tmp_path / "again")
    path.unlink()
    command("mark", 5, 6, state=root)
    assert declared(root) == [(5, 6)]


def test_a_rebuild_and_a_lost_ledger_take_nothing_along(root, camera: Camera):
    """No picture could say it again."""
    command("mark", 1, 2, state=root)
    (root / "ledger.sqlite").unlink()
    command("rebuild", camera.folder, state=root)
    assert declared(root) == [(1, 2)]
    assert "ok" in command("verify", state=root)
    command("rebuild", camera.folder, state=root)
    assert declared(root) == [(1, 2)]


def test_a_backup_holds_them(root, tmp_path):
    """And what was declared since is named when it is restored over, with the command that brings it back."""
    command("mark", 1, 2, state=root)
    command("backup", tmp_path / "b", state=root)
    command("mark", 3, 4, state=root)
    said = command("restore", tmp_path / "b", "--force", state=root)
    assert declared(root) == [(1, 2)]
    (told_line,) = (line for line in said.splitlines() if "hotpixd import" in line)
    assert told_line.startswith("1 of its declared defects")
    command("import", told_line.partition("hotpixd import ")[2], state=root)
    assert declared(root) == [(1, 2), (3, 4)]


def test_a_backup_without_any_is_as_ever(root, tmp_path):
    """The control."""
    with State(root, create=False) as state:
        save(Backups(state, live=False).answer, tmp_path / "b", force=False)
    assert b"declared/" not in (tmp_path / "b").read_bytes()
