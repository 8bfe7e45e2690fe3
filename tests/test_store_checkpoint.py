"""Generations: what was written comes back to the bit, or an error says that it does not."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from hotpixd.store import checkpoint
from hotpixd.store.checkpoint import (
    GenerationError,
    GenerationNewer,
    generations,
    newest,
    prune,
    read_generation,
    verify,
    write_generation,
)
from hotpixd.store.durable import StateFull

DTYPES = ["u1", "i1", "?", "<u2", "<i2", "<f2", "<u4", "<i4", "<f4", "<u8", "<i8", "<f8"]


def statistic(side: int = 64, seed: int = 1) -> dict[str, NDArray[np.generic]]:
    """Arrays like those of a sensor: sums, squares, mostly empty counts."""
    rng = np.random.default_rng(seed)
    counts = (rng.random((side, side)) < 0.01).astype(np.uint8)
    return {
        "sums": rng.integers(0, 1 << 20, (side, side), np.uint32),
        "squares": rng.integers(0, 1 << 17, (side, side), np.uint64),
        "counts": counts,
        "empty": np.zeros((side, side), np.uint32),
    }


def assert_same(a: dict[str, NDArray[np.generic]], b: dict[str, NDArray[np.generic]]) -> None:
    assert list(a) == list(b)
    for name in a:
        assert a[name].dtype == b[name].dtype
        assert a[name].shape == b[name].shape
        assert a[name].tobytes() == b[name].tobytes()


def test_a_generation_comes_back_as_written(tmp_path: Path) -> None:
    """Number, header and arrays survive; the arrays are writable."""
    header = {"covers": 17, "counts": {"light": 3}, "note": "ü\udcff", "unknown": None}
    path = write_generation(tmp_path, 12, header, statistic())
    assert path.name == "gen-00000012.hpx"
    generation = read_generation(path)
    assert generation.number == 12
    assert generation.header == header
    assert_same(generation.arrays, statistic())
    assert all(array.flags.writeable for array in generation.arrays.values())
    assert verify(path) == header
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.sampled_from(DTYPES).flatmap(
            lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=40))
        ),
        max_size=4,
    )
)
def test_any_plain_array_comes_back_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, arrays: list[NDArray[np.generic]]
) -> None:
    """Every dtype and shape: NaN payloads, negative zeros, empty and zero-dimensional arrays included."""
    folder = tmp_path_factory.mktemp("any")
    named = {f"array {k}": array for k, array in enumerate(arrays)}
    assert_same(read_generation(write_generation(folder, 1, {}, named)).arrays, named)


@pytest.mark.parametrize("elements", [1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, 5 << 20])
def test_arrays_of_many_chunks_keep_their_order(tmp_path: Path, elements: int) -> None:
    """Around the 4 MiB of a chunk, and beyond those in flight, nothing is lost or swapped."""
    arrays = {"ramp": np.arange(elements, dtype=np.uint32), "back": np.arange(elements, 0, -1)}
    assert_same(read_generation(write_generation(tmp_path, 1, {}, arrays)).arrays, arrays)


def test_zeros_cost_next_to_nothing(tmp_path: Path) -> None:
    """Planes that are zero throughout are not stored."""
    path = write_generation(tmp_path, 1, {}, {"zeros": np.zeros(8 << 20, np.uint64)})
    assert path.stat().st_size < 400
    assert not read_generation(path).arrays["zeros"].any()


def test_writing_takes_little_memory_beside_the_arrays(tmp_path: Path) -> None:
    """256 MB of arrays are streamed with less than 40 MB more."""
    arrays = {"noise": np.random.default_rng(1).integers(0, 1 << 63, 32 << 20, np.uint64)}
    write_generation(tmp_path, 1, {}, {"warm": arrays["noise"][: 4 << 20]})
    before = resident_mb("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    write_generation(tmp_path, 2, {}, arrays)
    assert resident_mb("VmHWM") - before < 40


def resident_mb(field: str) -> float:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) / 1e3


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_generation(tmp_path_factory.mktemp("small"), 1, {"covers": 3}, statistic(16))


def test_any_flipped_byte_is_noticed(small: Path, tmp_path: Path) -> None:
    """Every byte of a file, with one bit and with all bits flipped: GenerationError, and nothing else."""
    content = small.read_bytes()
    damaged = tmp_path / small.name
    for place in range(len(content)):
        for flip in (1 << place % 8, 0xFF):
            damaged.write_bytes(content[:place] + bytes([content[place] ^ flip]) + content[place + 1 :])
            with pytest.raises(GenerationError, match="gen-00000001"):
                read_generation(damaged)
        with pytest.raises(GenerationError):
            verify(damaged)


def test_any_truncation_or_growth_is_noticed(small: Path, tmp_path: Path) -> None:
    """Every length from nothing to one byte short, zeros instead of the rest, and bytes too many."""
    content = small.read_bytes()
    damaged = tmp_path / small.name
    for length in range(len(content)):
        damaged.write_bytes(content[:length])
        with pytest.raises(GenerationError):
            read_generation(damaged)
        damaged.write_bytes(content[:length].ljust(len(content), b"\0"))
        if damaged.read_bytes() != content:
            with pytest.raises(GenerationError):
                read_generation(damaged)
    damaged.write_bytes(content + b"\0")
    with pytest.raises(GenerationError):
        read_generation(damaged)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_contents_that_lie_under_a_right_digest_are_refused(
    small: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """A file that proves itself but contradicts itself ends in GenerationError, without a huge allocation."""
    content = bytearray(small.read_bytes()[:-32])
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(8, len(content) - 1))
        content[place] = data.draw(st.integers(0, 255))
    sealed = bytes(content) + checkpoint.blake3(bytes(content)).digest()
    path = tmp_path_factory.mktemp("lie") / small.name
    path.write_bytes(sealed)
    try:
        read_generation(path)  # a change may be a valid one by luck
    except GenerationError as error:
        assert path.name in str(error)


def test_a_header_that_claims_too_much_allocates_nothing(tmp_path: Path) -> None:
    """A shape of 10**15 elements in a small file is refused before memory is asked for."""
    text = b'{"number": 1, "header": {}, "arrays": [["a", "<u8", [1000000000, 1000000]]]}'
    content = b"HPXGEN01" + len(text).to_bytes(4, "little") + text + bytes(5)
    path = tmp_path / "gen-00000001.hpx"
    path.write_bytes(content + checkpoint.blake3(content).digest())
    with pytest.raises(GenerationError, match="larger than the file"):
        read_generation(path)


def test_a_generation_under_another_name_is_refused(small: Path, tmp_path: Path) -> None:
    """A renamed old generation must not pass for a newer one."""
    other = tmp_path / "gen-00000009.hpx"
    other.write_bytes(small.read_bytes())
    with pytest.raises(GenerationError, match="generation 1 under another name"):
        read_generation(other)


def test_a_newer_format_is_named_as_such(small: Path, tmp_path: Path) -> None:
    """The version is part of the magic. With its digest right it is newer, else a damaged one of ours."""
    path = tmp_path / small.name
    content = small.read_bytes().replace(b"HPXGEN01", b"HPXGEN02")
    path.write_bytes(content)
    with pytest.raises(GenerationError, match="damaged"):
        read_generation(path)
    path.write_bytes(content[:-32] + blake3(content[:-32]).digest())
    with pytest.raises(GenerationNewer, match="newer hotpixd"):
        read_generation(path)


def test_what_is_no_file_is_an_error_in_a_sentence(tmp_path: Path) -> None:
    """Missing files, folders and foreign files are GenerationErrors with their name."""
    foreign = tmp_path / "gen-00000002.hpx"
    foreign.write_bytes(b"x" * 1000)
    folder = tmp_path / "gen-00000003.hpx"
    folder.mkdir()
    for path in (tmp_path / "gen-00000001.hpx", foreign, folder):
        with pytest.raises(GenerationError, match=path.name):
            read_generation(path)


def test_the_newest_whole_generation_is_found(tmp_path: Path) -> None:
    """Damaged ones are passed over and named; without a whole one there is none."""
    assert newest(tmp_path) == (None, [])
    assert newest(tmp_path / "missing") == (None, [])
    for number in (1, 2, 3):
        write_generation(tmp_path, number, {"covers": number}, statistic(8))
    with (tmp_path / "gen-00000003.hpx").open("r+b") as file:
        file.truncate(100)
    found, skipped = newest(tmp_path)
    assert found is not None
    assert found.number == 2
    assert [Path("gen-00000003.hpx").name in str(error) for error in skipped] == [True]
    for path in generations(tmp_path):
        path.write_bytes(b"")
    found, skipped = newest(tmp_path)
    assert found is None
    assert len(skipped) == 3


def test_a_damaged_generation_is_replaced_by_its_number(tmp_path: Path) -> None:
    """The next write takes the number of the damaged one."""
    write_generation(tmp_path, 1, {}, statistic(8)).write_bytes(b"damaged")
    write_generation(tmp_path, 1, {"covers": 5}, statistic(8))
    found, skipped = newest(tmp_path)
    assert found is not None
    assert found.header == {"covers": 5}
    assert skipped == []


def test_pruning_keeps_the_two_newest(tmp_path: Path) -> None:
    """Older generations and unfinished writes go; files of others stay."""
    for number in (1, 2, 10, 9):
        write_generation(tmp_path, number, {}, {})
    (tmp_path / "gen-00000011.hpx.tmp").write_bytes(b"half")
    (tmp_path / "notes.txt").write_text("mine")
    prune(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["gen-00000009.hpx", "gen-00000010.hpx", "notes.txt"]
    assert [p.name for p in generations(tmp_path)] == ["gen-00000010.hpx", "gen-00000009.hpx"]


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 4))[:, ::2],
        np.zeros(3, ">u4"),
        np.zeros(3, object),
        np.zeros(3, "c16"),
        np.zeros(3, "S4"),
    ],
)
def test_arrays_that_cannot_be_stored_are_refused(tmp_path: Path, array: NDArray[np.generic]) -> None:
    """Strided, big-endian and other than plain numbers: ValueError with the array's name, no file."""
    with pytest.raises(ValueError, match="'sums'"):
        write_generation(tmp_path, 1, {}, {"sums": array})
    assert list(tmp_path.iterdir()) == []


def test_numbers_out_of_range_are_refused(tmp_path: Path) -> None:
    """Zero means that there is no generation."""
    for number in (0, -1, 10**8):
        with pytest.raises(ValueError, match="numbered"):
            write_generation(tmp_path, number, {}, {})


def test_too_little_space_is_said_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With 1 MB free no generation is begun, so the ledger keeps what is left."""
    real = os.statvfs(tmp_path)

    class Nearly:
        f_bavail = 1_000_000 // real.f_frsize
        f_frsize = real.f_frsize

    monkeypatch.setattr(checkpoint.os, "statvfs", lambda _: Nearly)
    with pytest.raises(StateFull, match="1 MB are free"):
        write_generation(tmp_path, 1, {}, statistic())
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error amid the chunks removes the unfinished file and stops the threads."""
    real = checkpoint.write_all
    left = [3]

    def failing(fd: int, data: bytes) -> None:
        left[0] -= 1
        if not left[0]:
            raise OSError(28, "No space left on device")
        real(fd, data)

    monkeypatch.setattr(checkpoint, "write_all", failing)
    with pytest.raises(StateFull):
        write_generation(tmp_path, 1, {}, {"noise": np.arange(20 << 20, dtype=np.uint32)})
    assert list(tmp_path.iterdir()) == []
