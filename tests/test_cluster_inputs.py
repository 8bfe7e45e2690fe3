"""Shots that lie elsewhere: in a bucket, behind a web server, behind ssh. Real servers, on loopback."""

from __future__ import annotations

import getpass
import http.server
import io
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("distributed", reason="the extra `cluster` is not installed")

from clusters import cluster_feed, comparable, fates, killed_at_last, until
from conftest import feed, run, told
from hotpixd.cluster.connection import connected
from hotpixd.cluster.inputs import find_inputs
from hotpixd.core.frame import ShotKind
from hotpixd.intake.files import find_shots

SSHD = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, camera, pairs) -> Path:
    """What the servers offer: raw files, pairs, a broken one, and names that no listing may be confused by."""
    folder = tmp_path_factory.mktemp("store")
    shutil.copytree(camera.folder, folder / "DCIM 1")
    shutil.copytree(pairs.folder, folder / "pairs")
    (folder / "pairs" / "frame_0002.dng").write_bytes(b"no picture")
    (folder / "DCIM 1" / "b_10.dng").write_bytes((pairs.folder / "frame_0001.dng").read_bytes())
    (folder / "DCIM 1" / "b_9.dng").write_bytes((pairs.folder / "frame_0002.dng").read_bytes())
    (folder / "notes.txt").write_text("no picture")
    (folder / "._a.jpg").write_bytes(b"")
    (folder / ".Trashes").mkdir()
    (folder / ".Trashes" / "b.jpg").write_bytes(b"")
    return folder


@pytest.fixture(scope="module")
def here(store: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """What one machine makes of it."""
    root = tmp_path_factory.mktemp("here") / "state"
    outcomes = feed(root, store)
    return without_place(fates(outcomes)), comparable(root)


def without_place(found: list[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
    return sorted((path.rpartition("/")[2], fate, reason) for path, fate, reason in found)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


class _Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves files, tears every fifth answer off in its middle, and says nothing."""

    torn = 0

    def copyfile(self, source: Any, outputfile: Any) -> None:
        type(self).torn += 1
        if self.torn % 5 == 0 and not isinstance(source, io.BytesIO):
            outputfile.write(source.read(10_000))
            self.close_connection = True
            return
        super().copyfile(source, outputfile)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def web(store: Path) -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=store))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/"
    server.shutdown()


@pytest.fixture(scope="module")
def bucket(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server that speaks S3, with the store in a bucket."""
    pytest.importorskip("s3fs", reason="s3fs is not installed")
    pytest.importorskip("moto", reason="moto is not installed")
    port = free_port()
    given = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    log = (tmp_path_factory.mktemp("moto") / "log").open("wb")
    order = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(order, stdout=log, stderr=log)
    with killed_at_last(server), pytest.MonkeyPatch.context() as patch:
        for name, value in given.items():
            patch.setenv(name, value)
        until(lambda: listens(port))
        import fsspec

        system = fsspec.filesystem("s3", skip_instance_cache=True)
        system.mkdir("shots")
        system.put(f"{store}/", "shots/deep/", recursive=True)
        yield "s3://shots/deep"


@pytest.fixture(scope="module")
def shell(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An ssh server of ours, with keys of ours."""
    pytest.importorskip("sshfs", reason="sshfs is not installed")
    if SSHD is None or os.geteuid() != 0:
        pytest.skip("no sshd that this user may start")
    place = tmp_path_factory.mktemp("ssh")
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", place / name], check=True)
    (place / "allowed").write_text((place / "user.pub").read_text())
    port = free_port()
    settings = (
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {place}/host\nAuthorizedKeysFile {place}/allowed\n"
        f"StrictModes no\nUsePAM no\nPidFile {place}/pid\nSubsystem sftp internal-sftp\nPermitRootLogin yes\n"
    )
    (place / "sshd_config").write_text(settings)
    Path("/run/sshd").mkdir(exist_ok=True)
    server = subprocess.Popen([SSHD, "-D", "-e", "-f", place / "sshd_config"], stderr=subprocess.DEVNULL)
    # fsspec's own way to say what does not belong into a URL, here and on workers.
    given = f'{{"client_keys": ["{place}/user"], "known_hosts": null}}'
    with killed_at_last(server), pytest.MonkeyPatch.context() as patch:
        import fsspec.config

        patch.setenv("FSSPEC_SSH", given)
        patch.setitem(fsspec.config.conf, "ssh", {"client_keys": [f"{place}/user"], "known_hosts": None})
        until(lambda: listens(port))
        yield f"ssh://{getpass.getuser()}@127.0.0.1:{port}{store}"


@pytest.mark.parametrize("server", ["web", "bucket", "shell"])
def test_it_does_not_matter_where_shots_lie(server, request, here, tmp_path):
    """Order, companions, refusals, statistics: as from a folder; and a second run reads nothing that it knows."""
    url = request.getfixturevalue(server)
    with connected("local:2") as client:
        outcomes = cluster_feed(client, tmp_path / "state", url, chunk_shots=4)
        assert without_place(fates(outcomes)) == here[0]
        assert comparable(tmp_path / "state") == here[1]
        again = cluster_feed(client, tmp_path / "state", url, chunk_shots=4)
    assert {str(outcome.fate) for outcome in again} <= {"known", "refused"}
    assert comparable(tmp_path / "state") == here[1]


def test_a_torn_transfer_is_tried_again(web, camera, tmp_path):
    """The control of the web server above: it does tear, and all of the folder is folded."""
    with connected("local:1") as client:
        outcomes = cluster_feed(client, tmp_path / "state", f"{web}DCIM%201/")
    assert {str(outcome.fate) for outcome in outcomes} == {"folded"}
    assert _Quiet.torn >= 5


def test_the_command_takes_urls(web, here, tmp_path):
    """As a user types it."""
    done = run("scan", web, "--cluster", "local:1", "--state", tmp_path / "state")
    assert done.returncode == 1
    assert "refused frame_0002.dng" in done.stdout
    assert told(tmp_path / "state")["digests"] == here[1]["digests"]


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://127.0.0.1:9/", "nothing is at http://127.0.0.1:9/"),
        ("nosuch://a/b", "nosuch://a/b cannot be listed"),
        ("{web}nothing-is-here/", "nothing is at"),
    ],
)
def test_what_cannot_be_listed_is_told_of(web, tmp_path, url, words):
    """In a sentence with the URL; no state is begun."""
    done = run("scan", url.format(web=web), "--cluster", "local:1", "--state", tmp_path / "state")
    assert done.returncode == 2
    assert words in done.stderr
    assert not (tmp_path / "state").exists()


def test_the_order_is_that_of_a_folder(web, store):
    """Folders and numbers in natural order, hidden names left out, raws before companions."""
    expected = [(str(s.path.relative_to(store)), s.raw and s.raw.name) for s in find_shots([str(store)]).shots]
    found = find_inputs([web], ShotKind.DARK).listing.shots
    names = [(str(s.origin).removeprefix(web).replace("%20", " "), s.raw and s.raw.name) for s in found]
    assert names == expected
    assert {s.kind for s in found} == {ShotKind.DARK}
    ignored = find_inputs([web, f"{web}pairs/frame_0001.dng"], None, ("Pair?", "B_*", "frame_0001.dng"))
    kept = [name for name, _ in names if name.startswith("DCIM 1/frame") and "0001" not in name]
    assert [str(s.origin).removeprefix(web).replace("%20", " ") for s in ignored.listing.shots] == kept
    assert not ignored.listing.missing
    assert names.index(("DCIM 1/b_9.dng", None)) < names.index(("DCIM 1/b_10.dng", None))
