"""Folders, globs and names on a real file system lead to the shots, in the order in which they were taken."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from conftest import nobody
from hotpixd.intake.files import FoundShot, find_shots


def touch(folder: Path, *names: str) -> list[Path]:
    paths = [folder / name for name in names]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    return paths


def found(*wanted: object) -> list[Path]:
    """What some paths lead to; nothing may be missing or unreadable."""
    listing = find_shots(map(str, wanted))
    assert not listing.missing
    assert not listing.unreadable
    return [shot.path for shot in listing.shots]


@pytest.fixture
def public() -> Iterator[Path]:
    """A folder that others than its owner can reach."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        yield folder


def test_a_folder_stands_for_all_pictures_below_it_and_for_nothing_else(tmp_path):
    """Endings decide, in any case; other files of a card are left alone."""
    wanted = touch(tmp_path, "DCIM/100CANON/a.CR2", "DCIM/101CANON/b.jpg", "c.fits", "d.TIFF", "e.png")
    touch(tmp_path, "DCIM/index.ctg", "notes.txt", "MISC/a.xmp", "noending", "movie.mov")
    assert sorted(found(tmp_path)) == sorted(wanted)


def test_numbers_in_names_sort_as_numbers(tmp_path):
    """IMG_9 was taken before IMG_10, and folder 99 before folder 100."""
    wanted = touch(tmp_path, "99X/IMG_9.dng", "99X/IMG_10.dng", "100X/IMG_1.dng", "100X/IMG_02.dng")
    assert found(tmp_path) == wanted


@pytest.mark.parametrize("pattern", ["**/*.dng", "*/*.dng", "10?X/IMG_[0-9]*.dng"])
def test_a_glob_finds_files_in_natural_order(tmp_path, pattern):
    """The program expands patterns itself, ** through all folders."""
    wanted = touch(tmp_path, "100X/IMG_9.dng", "100X/IMG_10.dng", "101X/IMG_1.dng")
    touch(tmp_path, "100X/IMG_9.txt")
    assert found(tmp_path / pattern) == wanted


def test_a_glob_that_matches_folders_takes_what_is_in_them(tmp_path):
    """Each file once, however many ways lead to it."""
    wanted = touch(tmp_path, "100X/a.dng", "100X/b.dng")
    assert found(tmp_path / "**") == wanted
    assert found(tmp_path / "100*", tmp_path, wanted[1]) == wanted


def test_a_name_with_brackets_is_itself_before_it_is_a_pattern(tmp_path):
    """Card readers make such names; the pattern of the same letters would match another file."""
    wanted = touch(tmp_path, "shot[1].dng", "shot1.dng")
    assert found(tmp_path / "shot[1].dng") == wanted[:1]


def test_a_named_file_is_taken_whatever_its_ending(tmp_path):
    """Who names a file means it."""
    wanted = touch(tmp_path, "frame.bin", "noending", ".hidden.dng")
    assert found(*wanted) == wanted


def test_named_files_keep_the_order_in_which_they_were_named(tmp_path):
    """The order of folding is the user's."""
    wanted = touch(tmp_path, "b.dng", "a.dng")
    assert found(*wanted) == wanted


def test_hidden_files_and_folders_are_no_shots(tmp_path):
    """AppleDouble files have the names of pictures; trash folders hold deleted ones."""
    wanted = touch(tmp_path, "IMG_1.JPG")
    touch(tmp_path, "._IMG_1.JPG", ".Trashes/IMG_2.JPG", ".IMG_3.dng.part", ".thumbnails/x.png")
    assert found(tmp_path) == wanted
    assert found(tmp_path / "*") == wanted
    assert found(tmp_path / "**/*") == wanted


@pytest.mark.parametrize(
    ("raw", "jpeg"),
    [("IMG_1.CR2", "IMG_1.JPG"), ("IMG_1.DNG", "IMG_1.JPEG"), ("img_1.x3f", "IMG_1.jpe"), ("IMG_1.RAF", "img_1.jpg")],
)
def test_the_jpeg_of_a_raw_is_its_companion_and_comes_behind_it(tmp_path, raw, jpeg):
    """In any order of names and in either case."""
    touch(tmp_path, raw, jpeg)
    one, two = tmp_path / raw, tmp_path / jpeg
    for wanted in ([tmp_path], [one, two], [two, one]):
        assert list(find_shots(map(str, wanted)).shots) == [FoundShot(one), FoundShot(two, raw=one)]


def test_files_of_one_name_in_two_folders_are_two_shots(tmp_path):
    """Cameras start to count anew in each folder; PNG and TIFF are made by programs, not beside a raw."""
    touch(tmp_path, "a/IMG_1.CR2", "b/IMG_1.JPG", "a/IMG_1.png")
    assert all(shot.raw is None for shot in find_shots([str(tmp_path)]).shots)


def test_a_jpeg_is_no_companion_if_its_raw_is_not_scanned(tmp_path):
    """Only what was asked for counts."""
    touch(tmp_path, "IMG_1.CR2", "IMG_1.JPG")
    assert list(find_shots([str(tmp_path / "IMG_1.JPG")]).shots) == [FoundShot(tmp_path / "IMG_1.JPG")]


def test_what_leads_to_nothing_is_named(tmp_path):
    """A missing path, a pattern without a match and a dangling link; the rest is listed all the same."""
    (present,) = touch(tmp_path, "a.dng")
    (tmp_path / "dangling.dng").symlink_to(tmp_path / "gone.dng")
    missing = [str(tmp_path / name) for name in ("nothing", "*.nef", "dangling.dng")]
    listing = find_shots([missing[0], str(present), *missing[1:]])
    assert listing.missing == tuple(missing)
    assert [shot.path for shot in listing.shots] == [present]


def test_an_empty_folder_is_not_missing(tmp_path):
    """It is there; it only holds no pictures."""
    assert found(tmp_path) == []


@pytest.mark.parametrize("wanted", [".", "night*", "**/*.jpg"])
def test_what_is_to_be_ignored_is_left_out_and_not_missing(tmp_path, wanted):
    """By the name of a file or of a folder below what was named, in any case; such a folder need not be readable.

    An all-sky camera's owner had sensors made of the thumbnails, keograms and star trails beside the shots.
    """
    shots = touch(tmp_path, "thumbnails/night1/a.jpg", "thumbnails/night1/keo.jpg")
    touch(
        tmp_path, "thumbnails/night1/Keogram-1.jpg", "thumbnails/night1/Thumbnails/a.jpg", "thumbnails/startrails.jpg"
    )
    ignore = ("thumbnails", "KEOGRAM*", "startrail[sz].jpg")
    listing = find_shots([str(tmp_path / "thumbnails" / wanted)], ignore=ignore)
    assert [shot.path for shot in listing.shots] == shots
    kept, *others = (str(tmp_path / "thumbnails" / name) for name in ("night1/a.jpg", "night1/Keogram-1.jpg"))
    assert find_shots([kept, *others], ignore=ignore) == find_shots([kept])


def test_a_folder_that_cannot_be_listed_is_named_with_the_reason(public):
    """And its neighbours are listed."""
    touch(public, "open/a.dng", "shut/b.dng")
    (public / "shut").chmod(0)
    with nobody():
        listing = find_shots([str(public)])
    (public / "shut").chmod(0o755)
    assert listing.unreadable == ((public / "shut", "Permission denied"),)
    assert [shot.path for shot in listing.shots] == [public / "open/a.dng"]


def test_links_to_files_are_followed_and_links_to_folders_only_if_named(tmp_path):
    """A link to a folder above would be walked for ever."""
    (shot,) = touch(tmp_path, "store/a.dng")
    card = tmp_path / "card"
    card.mkdir()
    (card / "b.dng").symlink_to(shot)
    (card / "up").symlink_to(tmp_path)
    (card / "folder.dng").symlink_to(tmp_path)
    assert found(card) == [card / "b.dng"]
    (tmp_path / "link").symlink_to(card)
    assert found(tmp_path / "link") == [tmp_path / "link/b.dng"]


def test_a_link_to_itself_is_passed_over(tmp_path):
    """One such file once ended the whole scan: its status cannot be read."""
    wanted = touch(tmp_path, "a.dng", "z.dng")
    (tmp_path / "loop.jpg").symlink_to(tmp_path / "loop.jpg")
    assert found(tmp_path) == wanted


def test_a_link_into_a_folder_closed_to_us_is_passed_over(public):
    """Its status cannot be read either."""
    wanted = touch(public, "a.dng")
    touch(public, "shut/b.dng")
    (public / "b.dng").symlink_to(public / "shut/b.dng")
    (public / "shut").chmod(0)
    with nobody():
        listing = find_shots([str(public)])
    (public / "shut").chmod(0o755)
    assert [shot.path for shot in listing.shots] == wanted


def test_pipes_and_folders_with_names_of_pictures_are_no_shots(tmp_path):
    """Opening a pipe would wait for ever."""
    os.mkfifo(tmp_path / "pipe.jpg")
    wanted = touch(tmp_path, "album.jpg/a.jpg")
    assert found(tmp_path) == wanted


def test_every_name_that_a_file_can_have_is_found(tmp_path):
    """Newlines, escape codes, blanks, letters of all kinds, and bytes that are not UTF-8."""
    names = [
        "new\nline.dng",
        "\x1b[31mred.dng",
        " .dng",
        "größe ☃.dng",
        os.fsdecode(b"latin\xff.dng"),
        "٣.dng",
        "-k.dng",
    ]
    wanted = touch(tmp_path, *names)
    assert sorted(found(tmp_path)) == sorted(wanted)
    assert sorted(found(tmp_path / "*.dng")) == sorted(wanted)
    for path in wanted:
        assert found(path) == [path]
