"""The fuzzer's corpus, and some seconds of random changes to it, without the fuzzer: every target keeps its promise."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent / "fuzz"))
sys.path.append(str(Path(__file__).parent / "faults"))

import targets

pytest.importorskip("astropy")

CORPUS = Path(__file__).parent / "fuzz" / "corpus"
SECONDS = 1.5
LEAST = 10
"""Changed cases of each target, however slow the machine is."""


@pytest.fixture(scope="module", autouse=True)
def files() -> Iterator[None]:
    """Remove what the targets leave."""
    yield
    targets.remove_files()


def cases(name: str) -> list[bytes]:
    return [path.read_bytes() for path in sorted((CORPUS / name).iterdir())]


def changed(rng: random.Random, whole: list[bytes]) -> bytes:
    """Return a case with a few changes, or the begin of one and the end of another."""
    content = bytearray(rng.choice(whole))
    for _ in range(rng.randrange(1, 8)):
        at = rng.randrange(len(content) + 1)
        match rng.randrange(6):
            case 0:
                del content[at : at + rng.randrange(1, 20)]
            case 1:
                content[at:at] = rng.randbytes(rng.randrange(1, 12))
            case 2:
                content[at : at + 4] = rng.choice(
                    (b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\x80\0\0\0")
                )
            case 3:
                content[at : at + 1] = rng.choice((b"{", b"]", b'"', b"\n", b"-", b"9", b"e", b"\xc3", b"\\"))
            case 4:
                other = rng.choice(whole)
                content[at:] = other[rng.randrange(len(other) + 1) :]
            case _ if at < len(content):
                content[at] ^= 1 << rng.randrange(8)
    return bytes(content)


def test_the_corpus_is_small_and_of_every_target():
    """It belongs into the repository."""
    assert {folder.name for folder in CORPUS.iterdir()} == targets.TARGETS.keys()
    assert sum(path.stat().st_size for path in CORPUS.rglob("*")) < 200_000


@pytest.mark.parametrize("name", targets.TARGETS)
def test_the_corpus_ends_well(name):
    """What was found once stays mended."""
    assert cases(name)
    for case in cases(name):
        targets.TARGETS[name](case)


@pytest.mark.parametrize("name", targets.TARGETS)
def test_random_changes_end_well(name):
    """Always the same ones, as many as fit into the time."""
    rng, whole, until = random.Random(name), cases(name), time.monotonic() + SECONDS
    done = 0
    while time.monotonic() < until or done < LEAST:
        case = changed(rng, whole)
        try:
            targets.TARGETS[name](case)
        except Exception as error:
            raise AssertionError(f"{name} fails with {case!r}") from error
        done += 1


def test_a_target_sees_what_breaks_its_promise(monkeypatch):
    """A reader that lets an error through is found by the corpus alone."""

    def careless(path: Path) -> None:
        raise IndexError(path)

    monkeypatch.setattr(targets, "decode", careless)
    with pytest.raises(IndexError):
        targets.TARGETS["decode"](cases("decode")[0])


def test_changes_of_a_whole_thing_are_those_that_were_asked_for():
    """Three bytes are a place, one is a value, one says whether to put, to flip, to remove or to add."""
    assert targets.patched(b"abcd", b"\0\0\2X\0") == b"abXd"
    assert targets.patched(b"abcd", b"\0\0\1\0\1") == b"accd"
    assert targets.patched(b"abcd", b"\0\0\1\2\2") == b"ad"
    assert targets.patched(b"abcd", b"\0\0\1-\x0b") == b"a--bcd"
