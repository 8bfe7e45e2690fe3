"""Backups: made by the daemon while it folds, restored elsewhere, and refused when they are not what they seem."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import stat
import subprocess
import tarfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from blake3 import blake3

from conftest import Camera, environment, feed, run, told
from daemons import Daemon
from hotpixd import backup as backup_module
from hotpixd.backup import BackupError, Backups, restore, save
from hotpixd.store.outbox import Alert, Outbox
from hotpixd.store.state import State, StateError, StateLocked

EMPTY = blake3(b"").hexdigest()


def made(root: Path, file: Path, *, live: bool = False) -> Path:
    """Make a backup in this process."""
    with State(root, create=False) as state:
        save(Backups(state, live=live).answer, file, force=False)
    return file


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, scanned: Path) -> Path:
    """A backup of the twelve shots. Not to be changed."""
    folder = tmp_path_factory.mktemp("whole")
    shutil.copytree(scanned, folder / "state")
    return made(folder / "state", folder / "a.backup")


def test_a_restored_state_tells_what_the_other_told(scanned, tmp_path, whole):
    """Digest, defects, transitions; by the command, with nothing left lying about, and for its owner only."""
    shutil.copytree(scanned, tmp_path / "state")
    (tmp_path / "state" / "series.json").write_text("{}")
    done = run("backup", tmp_path / "b", "--state", tmp_path / "state")
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "state"]
    assert not list((tmp_path / "state").glob("backup-*"))
    assert stat.S_IMODE((tmp_path / "b").stat().st_mode) == 0o600
    again = tmp_path / "elsewhere" / "state"
    done = run("restore", tmp_path / "b", "--state", again)
    assert done.returncode == 0, done.stderr
    assert told(again) == told(scanned)
    assert (again / "series.json").read_text() == "{}"
    assert [path.name for path in again.parent.iterdir()] == ["state"]
    assert stat.S_IMODE(again.stat().st_mode) == 0o700
    assert run("verify", "--state", again).stdout.startswith("ok: ")


def test_a_restored_state_goes_on(camera, scanned, tmp_path):
    """Shots known stay known, new ones are folded: as if there had been no backup."""
    feed(tmp_path / "state", *camera.shots[:7])
    made(tmp_path / "state", tmp_path / "b")
    restore(tmp_path / "again", tmp_path / "b", force=False)
    feed(tmp_path / "again", camera.folder)
    assert told(tmp_path / "again")["digests"] == told(scanned)["digests"]
    assert told(tmp_path / "again")["defects"] == told(scanned)["defects"]


def test_shots_that_wait_are_in_it(camera, scanned, tmp_path):
    """Acknowledged by a scan that was killed, their originals gone: they are in the spool, and so in the backup."""
    shots = tmp_path / "shots"
    shutil.copytree(camera.folder, shots)
    state = tmp_path / "state"
    # The fourth commit of up to four shots does not come any more.
    dead = run("scan", shots, "--state", state, env=environment(HOTPIXD_FAILPOINT="after_receive:kill:3"))
    assert dead.returncode == -9
    shutil.rmtree(shots)
    with State(state, create=False) as opened:
        waiting = len(opened.ledger.rows_to_replay({}))
    assert waiting
    made(state, tmp_path / "b")
    restore(tmp_path / "again", tmp_path / "b", force=False)
    feed(tmp_path / "again", camera.folder)
    assert told(tmp_path / "again")["digests"] == told(scanned)["digests"]


def test_the_daemon_makes_it_while_it_folds(start, camera: Camera, scanned, tmp_path, runtime):
    """Each backup is a state of one moment, and the shots that come meanwhile are not missed."""
    card = tmp_path / "card"
    card.mkdir()
    daemon: Daemon = start("watch", "--plain", card)
    files: list[Path] = []

    def shoot() -> None:
        for shot in camera.shots:
            shutil.copyfile(shot, card / f".{shot.name}")
            (card / f".{shot.name}").rename(card / shot.name)
            time.sleep(0.25)

    shooting = threading.Thread(target=shoot)
    shooting.start()
    daemon.wait_folded(1)
    while shooting.is_alive() or len(files) < 3:
        files.append(tmp_path / f"{len(files)}.backup")
        with contextlib.closing(daemon.client()) as client:
            save(client.ask, files[-1], force=False)
    shooting.join()
    daemon.wait_folded(12)
    files.append(tmp_path / "last.backup")
    done = run("backup", files[-1], "--state", daemon.state, env=daemon.env)
    assert done.returncode == 0, done.stderr
    assert daemon.ask("verify")["ok"]
    assert daemon.stop() == 0
    assert told(daemon.state)["digests"] == told(scanned)["digests"]
    assert not list(daemon.state.glob("backup-*"))
    counts = []
    for number, file in enumerate(files):
        again = tmp_path / f"again-{number}"
        restore(again, file, force=False)
        with State(again, create=False) as state:
            counts.append(sum(tally.folded + tally.received for tally in state.ledger.tally()))
        feed(again, camera.folder)
        assert told(again)["digests"] == told(scanned)["digests"]
    assert counts == sorted(counts)
    assert 1 <= counts[0] < 12


def test_the_daemon_is_not_held_up_by_who_does_not_go_on(start, camera, tmp_path):
    """Who begins a backup and goes away keeps no other from making one for ever, and leaves nothing on the disk."""
    card = tmp_path / "card"
    shutil.copytree(camera.folder, card)
    daemon: Daemon = start("watch", "--plain", card)
    daemon.wait_folded(12)
    client = daemon.client()
    client.ask("backup")
    assert len(list(daemon.state.glob("backup-*.tmp"))) == 1
    refused = run("backup", tmp_path / "b", "--state", daemon.state, env=daemon.env)
    assert refused.returncode == 3
    assert "Another backup" in refused.stderr
    client.ask("backup-end")
    client.close()
    assert run("backup", tmp_path / "b", "--state", daemon.state, env=daemon.env).returncode == 0
    client = daemon.client()
    for wrong in ({"backup": 99, "offset": 0}, {"offset": 0}, {"backup": "x", "offset": "y"}):
        with pytest.raises(ConnectionError, match=r"not being made|no question"):
            client.ask("backup-part", **wrong)
    client.ask("backup")
    daemon.stop()
    assert not list(daemon.state.glob("backup-*"))


def test_who_is_killed_amid_a_backup_does_not_keep_others_from_theirs(start, camera, tmp_path):
    """The next ended with 3 for a minute; a timer, which systemd may stop, does not run it again soon."""
    daemon: Daemon = start("watch", "--plain", camera.folder)
    daemon.wait_folded(12)
    client = daemon.client()
    client.ask("backup")
    # Without a word, as if killed.
    client.close()
    done = run("backup", tmp_path / "b", "--state", daemon.state, env=daemon.env)
    assert done.returncode == 0, done.stderr
    assert not list(daemon.state.glob("backup-*"))
    assert daemon.stop() == 0


def test_a_backup_is_not_given_up_for_another_while_it_is_prepared(scanned, tmp_path):
    """Which reads all of the state: whoever asked second in that time had the first end with 3."""
    shutil.copytree(scanned, tmp_path / "state")
    with State(tmp_path / "state") as state:
        backups = Backups(state, live=True)
        taken = backups.begin()
        with pytest.raises(BackupError, match="Another backup"):
            backups.begin()
        number = backups.prepare(taken)["backup"]
        assert backups.part(number, 0)["data"]
        backups.begin(anyway=True)
        backups.close()
        assert not list(state.root.glob("backup-*"))


def test_a_backup_that_nobody_asks_for_is_given_up(scanned, tmp_path):
    """After a minute another one may begin."""
    shutil.copytree(scanned, tmp_path / "state")
    now = 0.0
    with State(tmp_path / "state") as state:
        backups = Backups(state, live=True, clock=lambda: now)
        backups.answer("backup")
        with pytest.raises(BackupError, match="Another backup"):
            backups.answer("backup")
        now = 61.0
        backups.end_if_idle()
        assert not list(state.root.glob("backup-*"))
        assert backups.answer("backup")["backup"] == 2
        with pytest.raises(BackupError, match="not being made"):
            backups.answer("backup-part", backup=1, offset=0)


def test_a_file_that_is_there_is_not_overwritten(scanned, tmp_path):
    """Unless one says so; and a failed attempt leaves what was there, and nothing else."""
    shutil.copytree(scanned, tmp_path / "state")
    file = tmp_path / "b"
    file.write_text("precious")
    done = run("backup", file, "--state", tmp_path / "state")
    assert (done.returncode, file.read_text()) == (2, "precious")
    assert "--force" in done.stderr
    assert run("backup", file, "--force", "--state", tmp_path / "state").returncode == 0
    assert tarfile.is_tarfile(file)
    assert run("backup", tmp_path, "--state", tmp_path / "state").returncode == 2
    blocks = (tmp_path / "state" / "ledger.sqlite").stat().st_size // 512 + 20
    full = subprocess.run(
        ["sh", "-c", f'ulimit -f {blocks}; exec "$@"', "sh", *backup_command(tmp_path / "c", tmp_path / "state")],
        env=environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert full.returncode == 3, full.stderr
    assert "No space left" in full.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "state"]
    assert not list((tmp_path / "state").glob("backup-*"))


def backup_command(file: Path, state: Path) -> list[str]:
    from conftest import HOTPIXD

    return [*HOTPIXD, "backup", str(file), "--state", str(state)]


def test_a_damaged_newest_generation_is_not_what_is_backed_up(camera, scanned, tmp_path):
    """The one before it is, with the shots that it does not cover; and that is said."""
    state = tmp_path / "state"
    feed(state, *camera.shots[:6])
    feed(state, *camera.shots[6:])
    (sensor,) = (state / "sensors").iterdir()
    newest = max(sensor.iterdir())
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    done = run("backup", tmp_path / "b", "--state", state)
    assert done.returncode == 3
    assert f"{newest} is damaged" in done.stderr
    assert "It is not in the backup." in done.stderr
    with tarfile.open(tmp_path / "b") as tar:
        names = tar.getnames()
    assert [name for name in names if name.endswith(".hpx")] == [f"sensors/{sensor.name}/gen-00000001.hpx"]
    assert sum(name.startswith("spool/") for name in names) == 6
    restore(tmp_path / "again", tmp_path / "b", force=False)
    feed(tmp_path / "again", camera.folder)
    assert told(tmp_path / "again")["digests"] == told(scanned)["digests"]


def test_a_state_with_shots_is_moved_aside_only_when_told(camera, scanned, tmp_path, whole):
    """Never deleted; an empty one gives way."""
    root = tmp_path / "state"
    root.mkdir()
    restore(root, whole, force=False)
    feed(tmp_path / "other", *camera.shots[:3])
    before = told(tmp_path / "other")
    done = run("restore", whole, "--state", tmp_path / "other")
    assert done.returncode == 3
    assert "3 shots" in done.stderr
    assert told(tmp_path / "other") == before
    done = run("restore", whole, "--force", "--state", tmp_path / "other")
    assert done.returncode == 0, done.stderr
    assert told(tmp_path / "other") == told(scanned)
    (old,) = tmp_path.glob("other.old-*")
    assert str(old) in done.stdout
    assert told(old) == before


def test_a_damaged_state_is_replaced_when_told(scanned, tmp_path, whole):
    """It cannot say how many shots it has, but it is not thrown away."""
    root = tmp_path / "state"
    shutil.copytree(scanned, root)
    (root / "ledger.sqlite").write_bytes(b"x" * 10_000)
    done = run("restore", whole, "--state", root)
    assert done.returncode == 3
    assert "--force" in done.stderr
    assert run("restore", whole, "--force", "--state", root).returncode == 0
    assert told(root) == told(scanned)
    (old,) = tmp_path.glob("state.old-*")
    assert (old / "ledger.sqlite").read_bytes() == b"x" * 10_000


def test_a_state_in_use_is_not_replaced(tmp_path, whole, scanned):
    """Whatever one says."""
    root = tmp_path / "state"
    shutil.copytree(scanned, root)
    with State(root), pytest.raises(StateLocked):
        restore(root, whole, force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["state"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_root_restores_for_the_user_whose_state_it_is(tmp_path, whole):
    """As the service's user must be able to open it."""
    root = tmp_path / "state"
    root.mkdir(mode=0o700)
    os.chown(root, 65534, 65534)
    restore(root, whole, force=False)
    assert {path.stat().st_uid for path in (root, *root.rglob("*"))} == {65534}


def test_nothing_is_told_twice_after_a_restore(scanned, tmp_path):
    """What waited when a daemon made the backup, it has sent since. For a state at rest nobody has: there it waits."""
    shutil.copytree(scanned, tmp_path / "state")
    with State(tmp_path / "state") as state:
        outbox = Outbox(state.ledger)
        alert = Alert("k", "2026-11-24T00:00:00+00:00", "disk", "disk", "The disk is full.", {})
        outbox.add([alert], send={"disk"})
        outbox.compose(["ntfy"])
        outbox.add([Alert("l", alert.at, "disk", "disk", "It is fuller.", {})], send={"disk"})
    for live, due, gathers in ((True, 0, False), (False, 1, True)):
        file = made(tmp_path / "state", tmp_path / f"{live}.backup", live=live)
        said = restore(tmp_path / f"{live}", file, force=False)
        assert any("2 alerts were on the way" in sentence for sentence in said) is live
        with State(tmp_path / f"{live}") as state:
            outbox = Outbox(state.ledger)
            assert (len(outbox.due()), outbox.gathers) == (due, gathers)
            assert len(state.ledger.alerts(10)) == 2


# --- files that are no backup, or not whole


def test_a_damaged_backup_is_refused_wherever_it_is_damaged(whole, tmp_path):
    """One bit of each region, and every length; nothing is made of it."""
    content = whole.read_bytes()
    places = [*range(0, 1024, 37), *range(1024, len(content) - 2048, len(content) // 60)]
    refused = 0
    for place in places:
        wrong = bytearray(content)
        wrong[place] ^= 0x10
        refused += _refused(bytes(wrong), tmp_path) is not None
    # Padding and fields of a header that nobody reads, such as the name of its owner, may say anything.
    assert refused >= 0.9 * len(places)
    for length in (0, 1, 511, 512, 600, len(content) // 2, len(content) - 1025):
        assert _refused(content[:length], tmp_path) is not None, length


def _refused(content: bytes, folder: Path) -> str | None:
    """Try to restore some bytes; return the sentence, None if it was taken (whole, then)."""
    file = folder / "wrong.backup"
    file.write_bytes(content)
    try:
        restore(folder / "made", file, force=False)
    except StateError as error:
        assert not (folder / "made").exists()
        assert not (folder / "made.restoring").exists()
        return str(error)
    with State(folder / "made", create=False) as state:
        state.ledger.check()
    shutil.rmtree(folder / "made")
    return None


def hostile(members: list[tuple[tarfile.TarInfo, bytes]], manifest: object) -> bytes:
    """A tar file with a manifest and whatever else."""
    out = io.BytesIO()
    text = json.dumps(manifest).encode()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as tar:
        first = tarfile.TarInfo("manifest.json")
        first.size = len(text)
        tar.addfile(first, io.BytesIO(text))
        for entry, content in members:
            tar.addfile(entry, io.BytesIO(content))
    return out.getvalue()


def said_to_hold(*names: str, size: int = 0, digest: str = EMPTY, version: object = 1) -> dict[str, object]:
    members = [[name, size, digest] for name in names]
    return {"hotpixd backup": version, "version": "0", "made_at": "then", "live": False, "members": members}


@pytest.mark.parametrize(
    "name",
    ["../evil", "/etc/evil", "spool/../../evil", "sensors/../x/gen-00000001.hpx", "sensors/./gen-00000001.hpx", "lock",
     "spool/" + "g" * 64, "ledger.sqlite-wal", "sensors/a/b/gen-00000001.hpx", "", "a\x1b[31m",
     "spool/" + "a" * 64 + "\n"],
)  # fmt: skip
def test_names_that_do_not_belong_into_a_state_are_refused(name, tmp_path):
    """None may leave its folder, or hide a log beside the ledger; the sentence has no control characters."""
    entries = [(tarfile.TarInfo("ledger.sqlite"), b""), (tarfile.TarInfo(name), b"")]
    sentence = _refused(hostile(entries, said_to_hold("ledger.sqlite", name)), tmp_path)
    assert sentence is not None
    assert sentence.isprintable()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["wrong.backup"]


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE,
             tarfile.GNUTYPE_SPARSE, tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.AREGTYPE],
)  # fmt: skip
def test_what_is_no_plain_file_is_refused(kind, tmp_path):
    """Links, devices, sparse files, and the ways of tar to say more than its header does."""
    entry = tarfile.TarInfo("ledger.sqlite")
    entry.type, entry.linkname = kind, "/etc/passwd"
    out = hostile([(entry, b"")], said_to_hold("ledger.sqlite"))
    sentence = _refused(out, tmp_path)
    assert sentence is not None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["wrong.backup"]


@pytest.mark.parametrize(
    "manifest",
    [
        said_to_hold("ledger.sqlite", version=2),
        said_to_hold("ledger.sqlite", "ledger.sqlite"),
        said_to_hold("series.json"),
        said_to_hold("ledger.sqlite", size=10**15),
        said_to_hold("ledger.sqlite", size=-5),
        said_to_hold("ledger.sqlite", digest="00"),
        {**said_to_hold("ledger.sqlite"), "members": "x"},
        {**said_to_hold("ledger.sqlite"), "members": [["ledger.sqlite"]]},
        {"members": []},
        [],
        [[[[]]]],
        None,
        "x",
    ],
)
def test_a_manifest_that_lies_is_refused(manifest, tmp_path):
    """Sizes beyond the file, doubled names, another format, another shape."""
    assert _refused(hostile([(tarfile.TarInfo("ledger.sqlite"), b"")], manifest), tmp_path) is not None


def test_more_than_the_manifest_says_is_refused(whole, tmp_path):
    """A member smuggled in behind the others."""
    content = whole.read_bytes()[:-1024]
    entry = tarfile.TarInfo("ledger.sqlite-wal")
    sentence = _refused(content + entry.tobuf(tarfile.USTAR_FORMAT) + bytes(1024), tmp_path)
    assert sentence is not None
    assert "more than its manifest" in sentence


def test_a_whole_file_with_a_state_that_is_not_whole_is_refused(camera, tmp_path):
    """Its digests are right, but its generation is of other shots than its ledger."""
    feed(tmp_path / "a", *camera.shots[:4])
    feed(tmp_path / "b", *camera.shots[4:8])
    (one,), (other,) = ((tmp_path / n / "sensors").glob("*/*.hpx") for n in "ab")
    shutil.copyfile(other, one)
    names = ["ledger.sqlite", str(one.relative_to(tmp_path / "a"))]
    entries, described = [], []
    for name in names:
        content = (tmp_path / "a" / name).read_bytes()
        entry = tarfile.TarInfo(name)
        entry.size = len(content)
        entries.append((entry, content))
        described.append([name, len(content), blake3(content).hexdigest()])
    sentence = _refused(hostile(entries, {**said_to_hold(), "members": described}), tmp_path)
    assert sentence is not None
    assert "not of one state" in sentence


@pytest.mark.parametrize(
    ("make", "code", "sentence"),
    [
        (lambda p: p.mkdir(), 2, "{} is a folder; name a backup's file."),
        (os.mkfifo, 3, "The backup {} is no file."),
        (lambda _: None, 2, "There is no file {}."),
    ],
    ids=["folder", "fifo", "nothing"],
)
def test_what_is_no_file_is_refused_at_once(make: Callable[[Path], object], code: int, sentence: str, tmp_path):
    """A pipe with the name of a backup must not make anybody wait. Of a folder it once said "Is a directory: 3"."""
    make(tmp_path / "b")
    done = run("restore", tmp_path / "b", "--state", tmp_path / "state")
    assert done.returncode == code
    assert done.stderr == f"hotpixd: {sentence.format(tmp_path / 'b')}\n"
    assert not (tmp_path / "state").exists()


def test_a_restore_that_is_killed_leaves_what_was_there(scanned, camera, tmp_path, whole, monkeypatch):
    """Until the very last step; what it left half done is in nobody's way."""
    feed(tmp_path / "state", *camera.shots[:3])
    before = told(tmp_path / "state")

    def dies(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(backup_module, "swap_in", dies)
        patched.setattr(backup_module.shutil, "rmtree", lambda *_, **__: None)
        restore(tmp_path / "state", whole, force=True)
    assert told(tmp_path / "state") == before
    assert (tmp_path / "state.restoring").exists()
    restore(tmp_path / "state", whole, force=True)
    assert told(tmp_path / "state") == told(scanned)
    assert not (tmp_path / "state.restoring").exists()
