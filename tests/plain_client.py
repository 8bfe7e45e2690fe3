"""A client of python-gphoto2 in a process of its own: its calls may hang, and hold the GIL while they do.

It does what a program would do at the least, and nothing to be robust. Errors are raised as `CameraRefusedError`.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

from driven import DrivenProcess

_POLL_MS: Final = 20


class CameraRefusedError(Exception):
    """What libgphoto2 says of a failed call."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


class PlainClient:
    """The test's end of a client which has the camera open."""

    def __init__(self, port: str, capture_target: str | None = "card") -> None:
        """Open a camera. The target of captures is libgphoto2's setting; None is its default, the camera's RAM."""
        self._settings = tempfile.TemporaryDirectory(prefix="hotpixd-gphoto2-")
        if capture_target is not None:
            folder = Path(self._settings.name, "gphoto")
            folder.mkdir()
            (folder / "settings").write_text(f"ptp2=capturetarget={capture_target}\n")
        try:
            self._process = DrivenProcess("plain_client:main", port, XDG_CONFIG_HOME=self._settings.name)
        except BaseException:
            self._settings.cleanup()
            raise

    def __enter__(self) -> PlainClient:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.end()
        self._settings.cleanup()

    @property
    def pid(self) -> int:
        """Its process."""
        return self._process.pid

    def kill(self) -> None:
        """End it with SIGKILL."""
        self._process.kill()

    def events(self, wait_s: float = 0.2) -> list[tuple[str, str]]:
        """Return what comes within some time: kind of event, path or text."""
        events: list[tuple[str, str]] = self._process.call("events", wait_s)
        return events

    def added(self, count: int, within_s: float = 5.0) -> list[str]:
        """Wait until so many files were announced, and return their paths."""
        until = time.monotonic() + within_s
        paths: list[str] = []
        while len(paths) < count:
            assert time.monotonic() < until, f"only {paths} of {count} files within {within_s:g} s"
            paths += [path for kind, path in self.events(0.05) if kind == "FILE_ADDED"]
        return paths

    def listing(self, folder: str) -> list[str]:
        """Return the names of the files in a folder."""
        names: list[str] = self._process.call("listing", folder)
        return names

    def download(self, path: str) -> bytes:
        """Return the bytes of a file."""
        data: bytes = self._process.call("download", path)
        return data

    def size_and_time(self, path: str) -> tuple[int, int]:
        """Return what the camera says of a file: bytes, and s since 1970."""
        size, mtime = self._process.call("size_and_time", path)
        return size, mtime

    def delete(self, path: str) -> None:
        """Delete a file."""
        self._process.call("delete", path)

    def get(self, widget: str) -> Any:
        """Return the value of a setting."""
        return self._process.call("get", widget)

    def choices(self, widget: str) -> list[str]:
        """Return the values that a setting can have."""
        choices: list[str] = self._process.call("choices", widget)
        return choices

    def set(self, widget: str, value: Any) -> Any:
        """Change a setting and return what it is then."""
        self._process.call("set", widget, value)
        return self.get(widget)

    def trigger(self) -> None:
        """Take a picture, and do not wait for its files."""
        self._process.call("trigger")

    def capture(self) -> str:
        """Take a picture, and return the path of the file that libgphoto2 names."""
        path: str = self._process.call("capture")
        return path

    def free_kib(self) -> int:
        """Return how much room there is on the card, KiB."""
        free: int = self._process.call("free_kib")
        return free


class _Session:
    """The other end: an open camera."""

    def __init__(self, port: str) -> None:
        import gphoto2  # Here: the test's process is not to load it.

        self._gphoto2: Any = gphoto2
        ports = gphoto2.PortInfoList()
        ports.load()
        models = gphoto2.CameraAbilitiesList()
        models.load()
        self._camera = gphoto2.Camera()
        self._camera.set_abilities(models[models.lookup_model("PTP/IP Camera")])
        self._camera.set_port_info(ports[ports.lookup_path(port)])
        self._camera.init()
        self._kinds = {
            value: name.removeprefix("GP_EVENT_")
            for name, value in vars(gphoto2).items()
            if name.startswith("GP_EVENT_")
        }

    def events(self, wait_s: float) -> list[tuple[str, str]]:
        until = time.monotonic() + wait_s
        events = []
        while time.monotonic() < until:
            kind, data = self._camera.wait_for_event(_POLL_MS)
            if kind == self._gphoto2.GP_EVENT_TIMEOUT:
                time.sleep(0.005)  # Over PTP/IP it need not have waited.
                continue
            events.append((self._kinds[kind], f"{data.folder}/{data.name}" if hasattr(data, "folder") else str(data)))
        return events

    def listing(self, folder: str) -> list[str]:
        files = self._camera.folder_list_files(folder)
        return [files.get_name(index) for index in range(files.count())]

    def download(self, path: str) -> bytes:
        # The file is kept: its data are freed with it.
        file = self._camera.file_get(*os.path.split(path), self._gphoto2.GP_FILE_TYPE_NORMAL)
        return bytes(file.get_data_and_size())

    def size_and_time(self, path: str) -> tuple[int, int]:
        info = self._camera.file_get_info(*os.path.split(path))
        return info.file.size, info.file.mtime

    def delete(self, path: str) -> None:
        self._camera.file_delete(*os.path.split(path))

    def get(self, widget: str) -> Any:
        return self._camera.get_single_config(widget).get_value()

    def choices(self, widget: str) -> list[str]:
        setting = self._camera.get_single_config(widget)
        return [setting.get_choice(index) for index in range(setting.count_choices())]

    def set(self, widget: str, value: Any) -> None:
        setting = self._camera.get_single_config(widget)
        setting.set_value(value)
        self._camera.set_single_config(widget, setting)

    def trigger(self) -> None:
        self._camera.trigger_capture()

    def capture(self) -> str:
        path = self._camera.capture(self._gphoto2.GP_CAPTURE_IMAGE)
        return f"{path.folder}/{path.name}"

    def free_kib(self) -> int:
        storages = self._camera.get_storageinfo()
        return int(storages[0].freekbytes)


def main(connection: Connection, port: str) -> None:
    """Be the client's process, until the test's end of the connection is closed."""
    session: Any = None

    def open_camera() -> None:
        nonlocal session
        session = _Session(port)

    connection.send(_outcome(open_camera))
    while True:
        try:
            method, arguments, options = connection.recv()
        except (EOFError, OSError):
            os._exit(0)  # Not through exit() of libgphoto2, which waits for a camera that hangs.
        connection.send(_outcome(getattr(session, method), *arguments, **options))


def _outcome(function: Callable[..., Any], *arguments: Any, **options: Any) -> tuple[bool, Any]:
    """Call a function; return whether it succeeded, and what it returned or raised."""
    import gphoto2

    try:
        return True, function(*arguments, **options)
    except gphoto2.GPhoto2Error as error:
        return False, CameraRefusedError(error.code)
    except Exception as error:  # The test raises it again.
        return False, error
