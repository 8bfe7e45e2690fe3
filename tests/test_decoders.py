"""Decoding in jailed processes: the same frames as in this one, and whatever a file does costs that file alone."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from conftest import Camera, environment, feed, run, same, told
from daemons import Daemon, eventually
from hotpixd.core.frame import Frame, ShotKind
from hotpixd.intake import decoders as decoders_module
from hotpixd.intake import jail
from hotpixd.intake.decode import DecodeError, decode
from hotpixd.intake.decoders import Decoders, DecodersFailedError
from hotpixd.intake.files import find_shots
from hotpixd.monitor import Fate, Monitor
from hotpixd.store.state import State
from pictures import colour, jpeg, mosaic, write_dng

HOOKS = str(Path(__file__).with_name("decoder_hooks"))
PATIENCE_S = 2.0


@pytest.fixture
def hostile(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Decoders]]:
    """Return what starts decoders that do as hostile files say, see decoder_hooks; they are closed in the end."""
    monkeypatch.setenv("PYTHONPATH", f"{HOOKS}:{environment()['PYTHONPATH']}")
    started: list[Decoders] = []

    def start(count: int = 1, **options: object) -> Decoders:
        started.append(Decoders(count, **{"patience_s": PATIENCE_S, **options}))  # type: ignore[arg-type]
        return started[-1]

    yield start
    for one in started:
        one.close()


@pytest.fixture(scope="module")
def plain() -> Iterator[Decoders]:
    """Decoders as they are."""
    one = Decoders()
    yield one
    one.close()


@pytest.fixture
def good(tmp_path: Path) -> Path:
    """A raw file."""
    path = tmp_path / "good.dng"
    write_dng(path, mosaic())
    return path


def order(folder: Path, text: str) -> Path:
    """Write a file that makes a decoder misbehave."""
    path = folder / f"{text.split()[0]}-{len(list(folder.iterdir()))}.jpg"
    path.write_bytes(f"HOSTILE {text}\n".encode() + os.urandom(64))
    return path


def workers_of(pid: int) -> list[int]:
    """Return the decoder processes of a process."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            command = (entry / "cmdline").read_bytes()
        except (OSError, ValueError):
            continue
        if parent == pid and b"decode_worker" in command:
            found.append(int(entry.name))
    return found


def open_files() -> int:
    """Return how many descriptors this process has."""
    return len(list(Path("/proc/self/fd").iterdir()))


# --- the same as in this process


def test_frames_are_those_of_this_process(plain: Decoders, tmp_path: Path, good: Path, camera: Camera, pairs: Camera):
    """Of every format, with all that is known of the shot."""
    (tmp_path / "colour.jpg").write_bytes(jpeg(colour()))
    (tmp_path / "grey.jpg").write_bytes(jpeg(colour()[..., 0]))
    for path in [good, *tmp_path.glob("*.jpg"), camera.shots[0], *pairs.shots[:2]]:
        frame = plain.decode(path)
        assert same(frame, decode(path)), path
        assert frame.samples.flags.c_contiguous
        assert frame.samples.flags.writeable
    assert plain.decode(good, ShotKind.DARK).kind is ShotKind.DARK


def test_formats_whose_readers_are_found_later_decode_too(plain: Decoders, tmp_path: Path):
    """FITS and compressed TIFF import their libraries within the jail."""
    fits = pytest.importorskip("astropy.io.fits")
    tifffile = pytest.importorskip("tifffile")
    fits.writeto(tmp_path / "one.fits", mosaic().astype(np.uint16))
    fits.CompImageHDU(mosaic().astype(np.uint16)).writeto(tmp_path / "packed.fits")
    pytest.importorskip("imagecodecs")
    tifffile.imwrite(tmp_path / "deflated.tif", mosaic(), compression="zlib")
    tifffile.imwrite(tmp_path / "lzw.tif", np.dstack([mosaic()] * 3), compression="lzw", photometric="rgb")
    for path in sorted(tmp_path.iterdir()):
        try:
            expected: Frame | str = decode(path)
        except DecodeError as error:
            expected = str(error)
        try:
            frame = plain.decode(path)
        except DecodeError as error:
            assert str(error) == expected, path
        else:
            assert isinstance(expected, Frame), path
            assert same(frame, expected), path


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("options", [{}, {"planarconfig": "separate"}, {"tile": (32, 32)}, {"byteorder": ">"}])
def test_colour_tiffs_decode_whether_or_not_they_are_read_straight_into_the_memory(
    plain: Decoders, tmp_path: Path, dtype: type, options: dict[str, object]
):
    """Found by a user: memory was asked for in three dimensions, and every uncompressed RGB TIFF was refused."""
    tifffile = pytest.importorskip("tifffile")
    samples = colour().astype(dtype) * (257 if dtype is np.uint16 else 1)
    stored = np.moveaxis(samples, -1, 0) if "planarconfig" in options else samples
    tifffile.imwrite(tmp_path / "shot.tif", stored, photometric="rgb", **options)
    frame = plain.decode(tmp_path / "shot.tif")
    assert same(frame, decode(tmp_path / "shot.tif"))
    assert np.array_equal(frame.samples, samples.reshape(len(samples), -1))


def test_refusals_are_those_of_this_process(plain: Decoders, tmp_path: Path, good: Path):
    """With their reasons, word by word."""
    cases = {"empty.jpg": b"", "text.jpg": b"no picture at all", "cut.dng": good.read_bytes()[:4000]}
    for name, content in cases.items():
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(DecodeError) as expected:
            decode(path)
        with pytest.raises(DecodeError) as got:
            plain.decode(path)
        assert str(got.value) == str(expected.value)


def test_samples_stay_while_anybody_looks_at_them_and_their_memory_is_used_again(plain: Decoders, tmp_path: Path):
    """Neither a later frame nor the end of the decoders changes a frame that is held, nor a part of one."""
    paths = []
    for k in range(6):
        paths.append(tmp_path / f"{k}.dng")
        write_dng(paths[-1], mosaic(level=500.0 + 100 * k))
    own = Decoders()
    held = own.decode(paths[0]).samples[10:, ::2]
    kept = own.decode(paths[1])
    counts = []
    for path in paths[2:] * 3:
        assert same(own.decode(path), decode(path))
        gc.collect()
        counts.append(open_files())
    assert len(set(counts[1:])) == 1
    own.close()
    assert np.array_equal(held, decode(paths[0]).samples[10:, ::2])
    assert same(kept, decode(paths[1]))


def test_a_frame_may_be_collected_while_memory_is_looked_for(plain: Decoders, good: Path):
    """The collector runs wherever memory is asked for: giving a frame's back must not wait for who does that."""
    held = [plain.decode(good)]
    with ThreadPoolExecutor(1) as pool, plain._slots._lock:
        pool.submit(held.clear).result(5)
    assert same(plain.decode(good), decode(good))


def test_several_threads_may_decode_at_once(plain: Decoders, camera: Camera):
    """Each gets its own."""
    with ThreadPoolExecutor(4) as pool:
        frames = list(pool.map(plain.decode, camera.shots * 3))
    assert all(same(frame, decode(path)) for frame, path in zip(frames, camera.shots * 3, strict=True))


# --- the jail


def test_a_decoder_can_do_nothing_but_answer(hostile: Callable[..., Decoders], tmp_path: Path):
    """No file but its code, no socket, no process, no signal; the control is the same attempts outside."""
    secret = tmp_path / "secret"
    secret.write_text("x")
    with pytest.raises(DecodeError) as told_us:
        hostile().decode(order(tmp_path, f"attempt {secret}"))
    attempts = json.loads(str(told_us.value))
    done = {name for name, result in attempts.items() if result == "done"}
    assert done == {"import"}
    assert secret.exists()
    assert attempts["memory"] == "MemoryError"


def test_the_walls_are_there(plain: Decoders, good: Path):
    """As the kernel tells of the process: a filter, no new rights, limits, and it goes first when memory runs out."""
    plain.decode(good)
    proc = Path(f"/proc/{next(iter(plain._all))._process.pid}")
    status = dict(line.split(":\t", 1) for line in (proc / "status").read_text().splitlines())
    assert status["NoNewPrivs"] == "1"
    assert status["Seccomp"] == "2"
    assert (proc / "oom_score_adj").read_text().strip() == "1000"
    limits = {line[:26].strip(): line[26:].split()[0] for line in (proc / "limits").read_text().splitlines()[1:]}
    assert limits["Max file size"] == limits["Max core file size"] == "0"
    assert int(limits["Max address space"]) < 8 << 30
    assert int(limits["Max cpu time"]) <= 400


def test_what_a_kernel_lacks_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, good: Path
):
    """Decoding goes on without."""
    ready = decoders_module._Worker.ready
    monkeypatch.setattr(decoders_module._Worker, "ready", lambda self, until: [*ready(self, until), "Landlock"])
    own = Decoders(2)
    own.decode(good)
    own.decode(good)
    own.close()
    assert [record.getMessage() for record in caplog.records] == [
        "this kernel has no Landlock: decoders are less well locked in"
    ]


def test_a_filter_exists_for_both_machines_that_people_have():
    """Programs of the filter end in an answer whatever the call; all jumps stay within it."""
    for machine in ("x86_64", "aarch64"):
        program = jail._program(machine)
        assert len(program) % 8 == 0
        count = len(program) // 8
        for at in range(count):
            code, yes, no, _ = jail.struct.unpack_from("=HBBI", program, 8 * at)
            if code in (jail._JUMP_EQUAL, jail._JUMP_AT_LEAST, jail._JUMP_SET):
                assert at + 1 + max(yes, no) < count
        assert jail.struct.unpack_from("=HBBI", program, 8 * (count - 1)) == (jail._RETURN, 0, 0, jail._ALLOW)


# --- what a file can do


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("hang", "it took too long"),
        ("sleep", "it took too long"),
        ("lock", "it took too long"),
        ("crash", "it was killed by SIGSEGV"),
        ("exit", "it ended with code 0"),
        ("say nonsense", "it made no sense"),
        ('say {"frame": {}}', "it made no sense"),
        ('say {"place": [1e9, 3], "dtype": "uint8"}', "it made no sense"),
        ('say {"place": [100000, 100000000], "dtype": "uint8"}', "it made no sense"),
        ('say {"place": [4, 4], "dtype": "float64"}', "it made no sense"),
        ("say []", "it made no sense"),
        ("say " + "x" * 3000, "it made no sense"),
    ],
)
def test_a_file_that_ends_decoders_is_refused_after_two(
    hostile: Callable[..., Decoders], tmp_path: Path, good: Path, what: str, reason: str
):
    """And says how. The next file has a decoder again."""
    own = hostile()
    began = time.monotonic()
    with pytest.raises(DecodeError, match="ended two decoders") as refused:
        own.decode(order(tmp_path, what))
    assert reason in str(refused.value)
    assert time.monotonic() - began < 2 * PATIENCE_S + 8
    assert same(own.decode(good), decode(good))
    assert len(own._all) == 1


def test_a_file_that_fills_memory_is_refused(hostile: Callable[..., Decoders], tmp_path: Path, good: Path):
    """Its decoder is told that there is no more; the machine's memory is not touched."""
    own = hostile(memory=1 << 28, patience_s=20.0)
    with pytest.raises(DecodeError, match=r"ended two decoders \(it takes more memory"):
        own.decode(order(tmp_path, "fill"))
    assert same(own.decode(good), decode(good))


def test_a_fault_in_a_decoder_costs_one_file_and_is_told(
    hostile: Callable[..., Decoders], tmp_path: Path, good: Path, caplog: pytest.LogCaptureFixture
):
    """With its traceback in the log."""
    own = hostile()
    with pytest.raises(DecodeError, match="KeyError: 'a slip of the pen'"):
        own.decode(order(tmp_path, "fault"))
    assert "a slip of the pen" in caplog.text
    assert "Traceback" in caplog.text
    assert same(own.decode(good), decode(good))


def test_a_decoder_that_dies_alone_is_nobodys_fault(plain: Decoders, good: Path):
    """Killed while it waits: the next file does not even count that as a try."""
    plain.decode(good)
    for pid in [one._process.pid for one in plain._all]:
        os.kill(pid, signal.SIGKILL)
    time.sleep(0.2)
    assert same(plain.decode(good), decode(good))


def test_a_decoder_that_is_killed_at_work_is_no_files_fault(hostile: Callable[..., Decoders], tmp_path: Path):
    """As the kernel does when memory runs out: what the file does itself counts from then on."""
    own = hostile(patience_s=1.0)
    path = order(tmp_path, "sleep")
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(own.decode, path)
        os.kill(_busy(own), signal.SIGKILL)
        with pytest.raises(DecodeError, match=r"ended two decoders \(it took too long\)"):
            waiting.result(30)


@pytest.mark.parametrize(("at_work", "starting"), [(5, 0), (0, 5), (3, 2), (6, 0), (7, 0)])
def test_decoders_that_are_killed_again_and_again_are_started_again(
    monkeypatch: pytest.MonkeyPatch, good: Path, at_work: int, starting: int
):
    """Memory is short for a while. But a file must not keep all others from being decoded: it may be what fills it."""
    monkeypatch.setattr(decoders_module, "_AFTER_KILLS_S", (0.0,) * 5)
    left = {"decode": at_work, "ready": starting}

    def killed_first(name: str) -> Callable[..., object]:
        method = getattr(decoders_module._Worker, name)

        def kill(worker: decoders_module._Worker, *given: object, **named: object) -> object:
            if left[name]:
                left[name] -= 1
                worker.kill()
            return method(worker, *given, **named)

        return kill

    for name in left:
        monkeypatch.setattr(decoders_module._Worker, name, killed_first(name))
    with contextlib.closing(Decoders(1)) as own:
        if at_work == 7:
            with pytest.raises(DecodeError, match=r"ended two decoders \(it was killed by SIGKILL"):
                own.decode(good)
        assert same(own.decode(good), decode(good))
    assert not any(left.values())


def _busy(own: Decoders) -> int:
    """Wait until one of the workers does a job; return its process."""
    for _ in range(200):
        for worker in own._all:
            if worker.amid_a_job:
                time.sleep(0.2)
                return worker._process.pid
        time.sleep(0.05)
    raise AssertionError("no decoder works")


def test_no_descriptor_or_process_is_left_behind(hostile: Callable[..., Decoders], tmp_path: Path, good: Path):
    """After crashes by the dozen."""
    own = hostile()
    own.decode(good)
    files, processes = open_files(), len(workers_of(os.getpid()))
    for _ in range(6):
        with pytest.raises(DecodeError):
            own.decode(order(tmp_path, "crash"))
    own.decode(good)
    gc.collect()
    assert open_files() <= files
    assert len(workers_of(os.getpid())) <= processes


def test_decoders_that_cannot_be_started_are_no_files_fault(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, good: Path
):
    """The shot is not refused: something is wrong with this machine."""
    monkeypatch.setattr(decoders_module.sys, "executable", "/bin/false")
    own = Decoders(0)
    with pytest.raises(DecodersFailedError, match="do not start: it ended with code 1"):
        own.decode(good)
    own.close()


def test_closing_ends_what_hangs(hostile: Callable[..., Decoders], tmp_path: Path):
    """At once, and who waits for the frame is told."""
    own = hostile(patience_s=60.0)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(own.decode, order(tmp_path, "hang"))
        _busy(own)
        began = time.monotonic()
        own.close()
        with pytest.raises(DecodersFailedError):
            waiting.result(10)
    assert time.monotonic() - began < 5


def test_special_files_are_refused(plain: Decoders, tmp_path: Path):
    """Without waiting for anybody at the other end."""
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(DecodeError, match="not a regular file"):
        plain.decode(tmp_path / "pipe.jpg")


# --- in the whole


def test_hostile_files_among_good_ones_cost_only_themselves(
    hostile: Callable[..., Decoders], tmp_path: Path, camera: Camera
):
    """The statistic is that of the good ones alone, and every refusal has its reason."""
    alone = tmp_path / "alone"
    feed(alone, *camera.shots)
    root, inbox = tmp_path / "state", tmp_path / "inbox"
    inbox.mkdir()
    orders = ["crash", "exit", "fault", "hang", "say {}"]
    for k, shot in enumerate(camera.shots):
        os.link(shot, inbox / f"{k:02d}.dng")
        if k < len(orders):
            order(inbox, orders[k]).rename(inbox / f"{k:02d}_bad.jpg")
    with State(root) as state, Monitor(state, decoders=hostile(2)) as monitor:
        outcomes = list(monitor.process(find_shots([str(inbox)]).shots))
        monitor.checkpoint()
    assert [o.fate for o in outcomes].count(Fate.FOLDED) == len(camera.shots)
    refused = {o.path.name: o.reason or "" for o in outcomes if o.fate is Fate.REFUSED}
    assert len(refused) == len(orders)
    assert all(reason for reason in refused.values())
    mine, theirs = told(root), told(alone)
    assert mine["least"] == theirs["least"]
    for (id_, now), (_, then) in zip(mine["transitions"].items(), theirs["transitions"].items(), strict=True):
        # The same, at other places of the ledger.
        assert [(t.site, t.change, t.detail) for t in now] == [(t.site, t.change, t.detail) for t in then], id_


def test_the_name_of_a_hostile_file_does_nothing_to_a_terminal(tmp_path: Path):
    """A scan says at which file a decoder has ended."""
    order(tmp_path, "crash").rename(tmp_path / "a\x1b[31m\nshot.jpg")
    env = environment(PYTHONPATH=f"{HOOKS}:{environment()['PYTHONPATH']}")
    done = run("scan", tmp_path, "--state", tmp_path / "state", env=env)
    assert done.returncode == 1
    assert r"a decoder ended at 'a\x1b[31m\nshot.jpg': it was killed by SIGSEGV" in done.stderr
    assert "\x1b" not in done.stdout + done.stderr


def test_the_daemon_goes_on_while_a_file_hangs(start: Callable[..., Daemon], tmp_path: Path, camera: Camera):
    """It answers, and feeds the watchdog; in the end the hanging file is refused and those behind it are folded."""
    inbox = tmp_path / "inbox"
    inbox.mkdir()
    path = f"{HOOKS}:{environment()['PYTHONPATH']}"
    daemon = start("watch", "--plain", inbox, PYTHONPATH=path, DECODER_TEST_PATIENCE_S="6")

    def shots() -> dict[str, int]:
        with contextlib.closing(daemon.client()) as client:
            return dict(client.ask("status")["shots"])

    began = time.monotonic()
    order(inbox, "hang")
    eventually(lambda: shots()["received"] == 1, "the file that hangs is at a decoder")
    for shot in camera.shots:
        os.link(shot, inbox / shot.name)
    slowest = 0.0
    now = shots()
    while now["refused"] == 0 or now["folded"] < len(camera.shots):
        assert time.monotonic() - began < 60, now
        asked = time.monotonic()
        now = shots()
        slowest = max(slowest, time.monotonic() - asked)
    assert now["refused"] == 1
    # It hung for twice its patience, and its successors waited.
    assert time.monotonic() - began > 12
    assert slowest < 3.0
