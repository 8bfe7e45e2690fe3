"""The state directory: made for one, held by one, and emptied only of what no replay needs."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shlex
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import hotpixd
from hotpixd.store import lock
from hotpixd.store.checkpoint import generations, newest
from hotpixd.store.ledger import Received
from hotpixd.store.lock import answering, default_state_dir
from hotpixd.store.state import State, StateError, StateFull, StateLocked, StateMissing, held, swap_in

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(hotpixd.__file__).parents[1])}


@pytest.fixture
def state(tmp_path: Path) -> Iterator[State]:
    with State(tmp_path / "state") as state:
        yield state


def received(state: State, number: int) -> int:
    """Take one shot into custody and acknowledge it."""
    source = state.root.parent / f"IMG_{number}.CR3"
    source.write_text(f"shot {number}")
    key = state.spool.hash_file(source)
    state.spool.take(source, key)
    return state.ledger.receive([Received(key, source.name, str(source), 6, "2026-11-22T20:00:00Z")])[0]


def folded(state: State, number: int, sensor: str = "cam") -> int:
    seq = received(state, number)
    state.ledger.conclude(seq, verdict="folded", sensor_id=sensor)
    return seq


def kept(state: State) -> set[int]:
    """Numbers of the shots in the spool."""
    return {int(state.spool.path(key).read_text().split()[1]) for key in list(state.spool.keys())}


def test_a_new_state_is_private_and_complete(tmp_path: Path) -> None:
    """Folders are made, parents too, with mode 0700."""
    root = tmp_path / "deep" / "state"
    with State(root) as state:
        state.sensor_folder("canon-eos-r6_0123.raw")
        for folder in (root, root / "spool", root / "sensors", root / "sensors" / "canon-eos-r6_0123.raw"):
            assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    with State(root, create=False) as state:
        assert state.ledger.tally() == []


def test_a_reader_does_not_make_a_state(tmp_path: Path) -> None:
    """Reading what was never written is StateMissing, and leaves no folder behind."""
    with pytest.raises(StateMissing, match="no state"):
        State(tmp_path / "state", create=False)
    assert list(tmp_path.iterdir()) == []


def test_a_second_opening_is_refused_with_the_holders_name(state: State) -> None:
    """The sentence names the process and its command; after close the way is free."""
    with pytest.raises(StateLocked, match=rf"in use by process {os.getpid()} \({re.escape(shlex.join(sys.argv))}"):
        State(state.root)
    with pytest.raises(StateLocked):
        State(state.root, create=False)
    state.close()
    state.close()
    State(state.root).close()


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    """While another process lives it holds the state; killed, it holds nothing."""
    script = (
        "import sys; from hotpixd.store.state import State;"
        " state = State(sys.argv[1]); print('open', flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, tmp_path],
        env=ENVIRONMENT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"open\n"
        with pytest.raises(StateLocked, match=f"process {other.pid} "):
            State(tmp_path)
        other.kill()
        other.wait()
    State(tmp_path).close()


def test_a_place_that_cannot_be_used_is_an_error_in_a_sentence(tmp_path: Path) -> None:
    """A file in the way, of the root or of a part of it, and a root below a file."""
    file = tmp_path / "file"
    file.write_text("")
    for root in (file, file / "below"):
        with pytest.raises(StateError, match="file"):
            State(root)
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "spool").write_text("")
    for _ in range(2):  # the lock was let go
        with pytest.raises(StateError, match="spool") as caught:
            State(tmp_path / "state")
        assert not isinstance(caught.value, StateLocked)


def test_a_place_that_cannot_be_written_is_an_error_in_a_sentence(tmp_path: Path) -> None:
    """Somebody else's folder, or a read-only one."""
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    tmp_path.chmod(0o500)
    with pytest.raises(StateError, match="Permission denied"):
        State(tmp_path / "state")


def test_a_state_that_one_may_not_even_look_into_is_an_error_in_a_sentence(tmp_path: Path, monkeypatch) -> None:
    """Whoever reads it is told whose it is, as whoever writes."""
    State(tmp_path / "state").close()
    look = os.stat

    def closed(path: Any, *arguments: Any, **options: Any) -> os.stat_result:
        if os.fspath(path).endswith("ledger.sqlite"):
            raise PermissionError(errno.EACCES, "Permission denied", os.fspath(path))
        return look(path, *arguments, **options)

    monkeypatch.setattr(os, "stat", closed)
    for create in (True, False):
        with pytest.raises(StateError, match=r"you have no right to write .*ledger\.sqlite.* Use it as the user"):
            State(tmp_path / "state", create=create)


def test_what_a_killed_backup_left_is_no_trace_of_shots(tmp_path: Path) -> None:
    """In a state in which there never was any."""
    State(tmp_path / "state").close()
    (tmp_path / "state" / "ledger.sqlite").write_bytes(b"")
    (tmp_path / "state" / "backup-0011.tmp").mkdir()
    State(tmp_path / "state").close()
    assert not (tmp_path / "state" / "backup-0011.tmp").exists()


def test_a_damaged_ledger_does_not_keep_the_lock(tmp_path: Path) -> None:
    """After the error another try gets the same error, not StateLocked."""
    (tmp_path / "ledger.sqlite").write_bytes(b"x" * 5000)
    for _ in range(2):
        with pytest.raises(StateError, match=r"ledger\.sqlite is damaged") as caught:
            State(tmp_path)
        assert not isinstance(caught.value, StateLocked)


def test_where_the_state_is_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """systemd's directory, the first if there are several; else the user's."""
    monkeypatch.setenv("STATE_DIRECTORY", "/var/lib/hotpixd:/var/lib/other")
    assert default_state_dir() == Path("/var/lib/hotpixd")
    for unset in ("", None):
        if unset is None:
            monkeypatch.delenv("STATE_DIRECTORY")
        else:
            monkeypatch.setenv("STATE_DIRECTORY", unset)
        monkeypatch.setenv("XDG_STATE_HOME", "/home/me/.state")
        assert default_state_dir() == Path("/home/me/.state/hotpixd")


@pytest.mark.parametrize("sensor_id", ["", ".", "..", "a/b", ".hidden", "a b", "a\n", "x" * 300])
def test_a_sensors_id_is_the_name_of_a_folder(state: State, sensor_id: str) -> None:
    """An id that would leave the folder, or hide in it, is refused."""
    with pytest.raises(ValueError, match="sensor's id"):
        state.sensor_folder(sensor_id)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_no_room_for_a_sensors_folder_is_a_full_disk(state: State, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """The daemon waits for room then, as it does when any other file of the state finds none."""
    mkdir = Path.mkdir

    def full(path: Path, *arguments: Any, **options: Any) -> None:
        raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr(Path, "mkdir", full)
    with pytest.raises(StateFull, match="No space left for the sensor cam in"):
        state.sensor_folder("cam")
    monkeypatch.setattr(Path, "mkdir", mkdir)
    assert state.sensor_folder("cam").is_dir()


def test_a_damaged_newer_generation_does_not_count_as_kept(state: State) -> None:
    """After passing over a damaged one, the two kept are the two that are whole."""
    for number in range(1, 5):
        state.checkpoint("cam", number, {"covers": number}, {})
    folder = state.sensor_folder("cam")
    for path in generations(folder):
        path.write_bytes(b"damaged")
    state.checkpoint("cam", 1, {"covers": 9}, {})
    state.checkpoint("cam", 2, {"covers": 10}, {})
    assert [path.name for path in generations(folder)] == ["gen-00000002.hpx", "gen-00000001.hpx"]
    assert newest(folder)[1] == []


def test_the_spool_keeps_what_a_replay_may_ask_for(state: State) -> None:
    """Shots after the older generation's cover, and undecided ones, stay; the rest goes."""
    for number in range(1, 6):
        folded(state, number)
    refused, companion, _ = received(state, 6), received(state, 7), received(state, 8)
    folded(state, 9, sensor="other")
    state.ledger.conclude(refused, verdict="refused", reason="no picture")
    state.ledger.conclude(companion, verdict="companion")
    assert state.settle_spool({}) == 2
    assert kept(state) == {1, 2, 3, 4, 5, 8, 9}
    assert state.settle_spool({"cam": 3, "unknown": 99}) == 3
    assert kept(state) == {4, 5, 8, 9}
    assert state.settle_spool({"cam": 3}) == 0
    replayed = {row.key for row in state.ledger.rows_to_replay({"cam": 3})}
    assert replayed == set(state.spool.keys())
    assert not state.ledger._pending


def test_orphans_of_an_earlier_process_go_and_those_of_this_one_stay(tmp_path: Path) -> None:
    """A file without a row is dropped only if it was there before this process and was not taken again."""
    sources = [tmp_path / f"{n}.CR3" for n in range(3)]
    keys = []
    with State(tmp_path / "state") as state:
        for source in sources:
            source.write_text(f"shot {source.stem}")
            keys.append(state.spool.hash_file(source))
            state.spool.take(source, keys[-1])
        assert state.settle_spool({}) == 0
    with State(tmp_path / "state") as state:
        state.spool.take(sources[1], keys[1])
        assert state.settle_spool({}) == 2
        assert list(state.spool.keys()) == [keys[1]]


def test_the_lock_tells_where_its_holder_answers(tmp_path: Path) -> None:
    """For readers who find the state locked; nothing until it is announced, whatever the command line says."""
    assert answering(tmp_path / "state") is None
    with State(tmp_path / "state") as state:
        with pytest.raises(StateLocked) as locked:
            State(tmp_path / "state")
        assert locked.value.feed is answering(tmp_path / "state") is None
        state.announce(tmp_path / "feed of\u20ac.sock")
        with pytest.raises(StateLocked, match=f"process {os.getpid()} ") as locked:
            State(tmp_path / "state")
        assert locked.value.feed == answering(tmp_path / "state") == tmp_path / "feed of\u20ac.sock"
    # Its name is still in the lock, and nobody has that.
    assert answering(tmp_path / "state") is None
    with State(tmp_path / "state"), pytest.raises(StateLocked) as locked:
        State(tmp_path / "state")
    assert locked.value.feed is None


def test_who_finds_a_state_in_use_for_a_moment_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A question holds nobody up, nor does a daemon that is about to answer; what goes on too long is named."""
    take = partial(lock.take, tmp_path / "lock", brief=True)
    with ThreadPoolExecutor(1) as other:
        asking = take()
        waiting = other.submit(take)
        with pytest.raises(TimeoutError):
            waiting.result(0.3)
        lock.release(asking)
        starting = waiting.result(5)
        waiting = other.submit(take)
        lock.announce(starting, tmp_path / "feed.sock")
        with pytest.raises(StateLocked) as locked:
            waiting.result(5)
        assert locked.value.feed == tmp_path / "feed.sock"
        lock.release(starting)
    monkeypatch.setattr(lock, "_FREE_WITHIN_S", 0.2)
    with State(tmp_path, brief=True), pytest.raises(StateLocked, match=f"process {os.getpid()} "):
        State(tmp_path)


def test_each_of_many_who_ask_has_its_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six scripts that ask without end, each for a second: some were turned away, though nobody held it for long."""
    monkeypatch.setattr(lock, "_FREE_WITHIN_S", 1.0)
    with ThreadPoolExecutor(1) as other:
        asking = lock.take(tmp_path / "lock", brief=True)
        waiting = other.submit(lock.take, tmp_path / "lock", brief=True)
        for number in range(5):
            time.sleep(0.4)
            monkeypatch.setattr(sys, "argv", ["hotpixd", "status", str(number)])
            lock.announce(asking, None, brief=True)
        assert not waiting.done()
        lock.release(asking)
        lock.release(waiting.result(5))


def test_who_has_just_closed_a_state_is_not_taken_for_the_next_who_has_it(tmp_path: Path) -> None:
    """That takes the lock first and then writes its name: a daemon that is ending was asked, and did not answer."""
    with State(tmp_path) as state:
        state.announce(tmp_path / "feed.sock")
    with ThreadPoolExecutor(1) as other, (tmp_path / "lock").open() as next_one:
        fcntl.flock(next_one, fcntl.LOCK_EX)
        waiting = other.submit(lock.take, tmp_path / "lock")
        with pytest.raises(TimeoutError):
            waiting.result(0.3)
        fcntl.flock(next_one, fcntl.LOCK_UN)
        lock.release(waiting.result(5))


def test_who_waited_has_the_state_that_is_there_then(tmp_path: Path) -> None:
    """`restore` and `rebuild` put another one into its place, whose lock is another file: two could have had it."""
    root = tmp_path / "state"
    root.mkdir()
    with ThreadPoolExecutor(1) as other:
        asking = lock.take(root / "lock", brief=True)
        waiting = other.submit(lock.take, root / "lock")
        with pytest.raises(TimeoutError):
            waiting.result(0.3)
        root.rename(tmp_path / "state.old")
        root.mkdir()
        lock.release(asking)
        taken = waiting.result(5)
        assert os.path.samestat(os.fstat(taken), (root / "lock").stat())
        lock.release(taken)


def test_no_state_is_begun_where_one_is_being_put(tmp_path: Path) -> None:
    """Of two `restore` at once each removed what the other had made, and both failed; a daemon lost its new state."""
    root = tmp_path / "new" / "state"
    with held(root) as there:
        assert not there
        with pytest.raises(StateLocked):
            State(root)
        with pytest.raises(StateLocked), held(root):
            pass
    assert not root.exists()
    with held(root):
        State(tmp_path / "made").close()
        assert swap_in(tmp_path / "made", root) is None
    assert [path.name for path in root.parent.iterdir()] == ["state"]
    State(root, create=False).close()


def test_a_state_that_was_closed_is_free_though_a_child_still_has_its_lock(tmp_path: Path):
    """Between fork and exec it does, whatever thread started it."""
    state = State(tmp_path)
    child = os.dup(state._lock)
    state.close()
    State(tmp_path).close()
    os.close(child)


def test_what_a_killed_process_was_about_to_start_is_waited_for(tmp_path: Path):
    """Between fork and exec a child has its parent's lock; on a busy machine that lasted longer than a restart."""
    killed = (
        "import os, signal, sys, time\n"
        "from hotpixd.store.state import State\n"
        "with State(sys.argv[1]):\n"
        "    if os.fork() == 0:\n"
        "        time.sleep(1.0)\n"
        "        os._exit(0)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    root = tmp_path / "state"
    done = subprocess.run([sys.executable, "-c", killed, root], env=ENVIRONMENT)
    assert done.returncode == -signal.SIGKILL
    with State(root) as state:
        assert state.ledger.find("0" * 64) is None
