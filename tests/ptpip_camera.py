"""A PTP/IP camera on loopback which libgphoto2's ptp2 driver takes for a real one, in a process of its own.

    with LoopbackCamera("nikon") as camera:
        camera.capture_random({"NEF": 50_000, "JPG": 10_000})
        ...                                 # a client opens "PTP/IP Camera" at camera.port
        camera.shoot()                      # the user presses the button
        camera.behave(card_full=True)
        assert not camera.bulb_open

It is a process because several calls of python-gphoto2 hold the GIL: a camera in the client's process would never get
to answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import inspect
import socket
import struct
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import count
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal

from driven import DrivenProcess
from memory_card import CardFile, Files
from ptp_wire import (
    U32,
    PacketKind,
    Request,
    event_packet,
    packet,
    response,
)
from virtual_camera import (
    PERSONAS,
    Behaviour,
    LoggedOperation,
    PersonaName,
    PowerLostError,
    Status,
    VirtualCamera,
)

__all__ = ["Behaviour", "CardFile", "LoggedOperation", "LoopbackCamera", "PersonaName", "Status"]

_HOST: Final = "127.0.0.1"
_BLOCK_BYTES: Final = 256 * 1024
_INIT_FAILED_BUSY: Final = 2


@dataclass(slots=True)
class _DownloadFault:
    """What happens to the download of files after so many bytes."""

    kind: Literal["cut", "unplug", "stall"]
    bytes_left: int


class _Link:
    """One of a client's two connections."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self._socket = writer.get_extra_info("socket")
        # What is drained is with the kernel: so a cut comes after the bytes it is to come after.
        writer.transport.set_write_buffer_limits(0)

    async def receive(self) -> tuple[int, bytes]:
        """Return the kind and the body of the next packet. IncompleteReadError at the end."""
        length, kind = struct.unpack("<II", await self.reader.readexactly(8))
        return kind, await self.reader.readexactly(length - 8)

    def acknowledge(self) -> None:
        """Acknowledge at once what came: libgphoto2 leaves Nagle's algorithm on, and waits 40 ms otherwise."""
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)

    async def send(self, data: bytes) -> None:
        """Send bytes."""
        self.writer.write(data)
        await self.writer.drain()

    def cut(self) -> None:
        """End the connection with a reset: the client is to notice."""
        if not self.writer.transport.is_closing():
            linger = struct.pack("ii", 1, 0)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.writer.transport.abort()


class Server:
    """The camera's plug: at most one client, with a connection for operations and one for events."""

    def __init__(self, camera: VirtualCamera) -> None:
        self._camera = camera
        camera.send_event = self._send_event
        camera.cut_power = self.unplug
        # Bound but never listening, it keeps the port for us while the camera is unplugged.
        self._reservation = _bound_socket(0)
        self.port: int = self._reservation.getsockname()[1]
        self._listener: asyncio.Server | None = None
        self._operations: _Link | None = None
        self._events: _Link | None = None
        self._numbers = count(1)
        self._fault: _DownloadFault | None = None
        self._resumed = asyncio.Event()
        self._awake = asyncio.Event()
        self._awake.set()
        self._served: set[asyncio.Task[Any] | None] = set()

    # What a test does with it

    async def plug(self) -> None:
        """Let clients connect."""
        if self._listener is None:
            self._listener = await asyncio.start_server(self._greet, sock=_bound_socket(self.port))

    def unplug(self, after_bytes: int | None = None) -> None:
        """Refuse clients and cut their connections, at once or after so many bytes of files."""
        if after_bytes is not None:
            self._fault = _DownloadFault("unplug", after_bytes)
            return
        if self._listener is not None:
            self._listener.close()
        self._listener = None
        self._drop_client()

    def cut_download(self, after_bytes: int) -> None:
        """Cut the connection after so many bytes of files, once."""
        self._fault = _DownloadFault("cut", after_bytes)

    def stall_download(self, after_bytes: int) -> None:
        """Send nothing any more after so many bytes of files, until `resume`; the connection stays."""
        self._resumed.clear()
        self._fault = _DownloadFault("stall", after_bytes)

    def hang(self) -> None:
        """Answer nothing until `resume`; connections stay, and new ones can be made."""
        self._awake.clear()

    def resume(self) -> None:
        """Go on after a stall or a hang."""
        self._fault = None
        self._resumed.set()
        self._awake.set()

    def status(self) -> Status:
        """Return what the camera does."""
        online = self._listener is not None
        return Status(online=online, connected=self._operations is not None, **self._camera.state())

    async def close(self) -> None:
        """End all connections and wait until they are ended."""
        self.unplug()
        self.resume()
        self._reservation.close()
        await asyncio.gather(*filter(None, self._served))

    # Connections

    async def _greet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve a connection to its end."""
        link = _Link(reader, writer)
        task = asyncio.current_task()
        self._served.add(task)
        try:
            kind, _ = await link.receive()
            if kind == PacketKind.INIT_COMMAND_REQUEST:
                await self._serve_operations(link)
            elif kind == PacketKind.INIT_EVENT_REQUEST:
                await self._serve_events(link)
        except (ConnectionError, asyncio.IncompleteReadError, PowerLostError):
            pass  # It ended.
        except Exception:
            # A fault of this code: the test is told when it closes the camera.
            self._camera.problems.append(traceback.format_exc())
        finally:
            link.cut()
            self._served.discard(task)

    async def _serve_operations(self, link: _Link) -> None:
        if self._operations is not None and self._camera.behaviour.exclusive:
            await link.send(packet(PacketKind.INIT_FAIL, U32.pack(_INIT_FAILED_BUSY)))
            return
        self._drop_client()
        self._operations = link
        try:
            name = self._camera.persona.model.encode("utf-16le") + bytes(2)
            identity = U32.pack(next(self._numbers)) + b"hotpixd-loopback" + name + U32.pack(0x00010000)
            await link.send(packet(PacketKind.INIT_COMMAND_ACK, identity))
            while True:
                kind, body = await link.receive()
                if kind == PacketKind.REQUEST:
                    await self._serve(link, Request.decode(body))
        finally:
            if self._operations is link:
                self._drop_client()

    async def _serve_events(self, link: _Link) -> None:
        """Keep the connection for events until the client closes it."""
        if self._events is not None:
            self._events.cut()
        self._events = link
        try:
            await link.send(packet(PacketKind.INIT_EVENT_ACK))
            while True:
                await link.receive()
        finally:
            # The one for operations is not read during a stall or a hang: there the end would not be noticed.
            if self._events is link:
                self._drop_client()

    def _drop_client(self) -> None:
        """End both connections of the client, if there is one."""
        links = [link for link in (self._operations, self._events) if link is not None]
        self._operations = self._events = None
        for link in links:
            link.cut()
        if links:
            self._resumed.set()
            self._camera.client_gone()

    def _send_event(self, event: int, param: int) -> None:
        if self._events is not None:
            self._events.writer.write(event_packet(event, param))

    # Operations

    async def _serve(self, link: _Link, request: Request) -> None:
        if request.sends_data:
            request = dataclasses.replace(request, data=await self._received_data(link))
        await self._awake.wait()
        if self._operations is not link:
            return  # Nobody waits for it any more.
        answer = self._camera.answer(request)
        if answer.data is not None:
            await self._send_data(link, request.transaction, answer.data, is_file=answer.is_file)
            if answer.ends_file:
                self._camera.downloaded()
        await link.send(response(request.transaction, answer))

    async def _received_data(self, link: _Link) -> bytes:
        """Return the data that the client sends with an operation."""
        data = b""
        while True:
            link.acknowledge()
            kind, body = await link.receive()
            if kind in (PacketKind.DATA, PacketKind.END_DATA):
                data += body[4:]
            if kind == PacketKind.END_DATA:
                return data

    async def _send_data(self, link: _Link, transaction: int, data: bytes, *, is_file: bool) -> None:
        """Send data in blocks, as far as no fault is in the way."""
        await link.send(packet(PacketKind.START_DATA, struct.pack("<IQ", transaction, len(data))))
        sent = 0
        while True:
            size = min(_BLOCK_BYTES, len(data) - sent)
            if is_file and self._fault is not None:
                size = min(size, self._fault.bytes_left)
            last = sent + size == len(data)
            kind = PacketKind.END_DATA if last else PacketKind.DATA
            await link.send(packet(kind, U32.pack(transaction) + data[sent : sent + size]))
            sent += size
            if is_file and self._fault is not None:
                await self._pass_fault(link, self._fault, size)
            if last:
                return

    async def _pass_fault(self, link: _Link, fault: _DownloadFault, size: int) -> None:
        """Let a fault happen if so many bytes more make it due."""
        fault.bytes_left -= size
        if fault.bytes_left > 0:
            return
        self._fault = None
        if fault.kind == "stall":
            await self._resumed.wait()
            return
        if fault.kind == "unplug":
            self.unplug()
        link.cut()
        raise ConnectionResetError


def _bound_socket(port: int) -> socket.socket:
    # The protocol is named: asyncio sends small packets without delay only if it knows that this is TCP.
    bound = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    bound.bind((_HOST, port))
    return bound


class LoopbackCamera:
    """A camera in another process, as a test drives it.

    Leaving its context ends the process, whatever state it is in, and fails if the camera itself went wrong.
    """

    def __init__(
        self, persona: PersonaName = "generic", serial_number: str = "LB0001", *, seed: int = 0, **behaviour: Any
    ) -> None:
        self._process: DrivenProcess | None = DrivenProcess("ptpip_camera:main", persona, serial_number, seed)
        number = self._process.greeting
        self.port = f"ptpip:{_HOST}:{number}:{number}"
        """What libgphoto2 calls the port. The number is there twice: events would come from 15740 otherwise."""

        if behaviour:
            self.behave(**behaviour)

    def __enter__(self) -> LoopbackCamera:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, origin: TracebackType | None
    ) -> None:
        self.close(check=error is None)

    def close(self, *, check: bool = True) -> None:
        """End its process. AssertionError if something went wrong in it, unless that is of no interest."""
        process, self._process = self._process, None
        if process is None:
            return
        try:
            problems = process.call("take_problems") if check else []
        finally:
            process.end()
        assert not problems, "\n".join(problems)

    @property
    def pid(self) -> int:
        """Its process."""
        return self._running.pid

    def call(self, method: str, *arguments: Any, **options: Any) -> Any:
        """Call a method of the camera or of its server, and return or raise what it does."""
        return self._running.call(method, *arguments, **options)

    @property
    def _running(self) -> DrivenProcess:
        assert self._process is not None, "the camera was closed"
        return self._process

    # Behaviour and captures

    def behave(self, **changes: Any) -> None:
        """Change some of its Behaviour."""
        self.call("behave", **changes)

    def capture_random(self, sizes: Mapping[str, int], seed: int = 0) -> None:
        """Let shots be random bytes, so many for each extension: {"DNG": 50_000, "JPG": 10_000}."""
        self.call("capture_random", dict(sizes), seed)

    def capture_folder(self, folder: Path) -> None:
        """Let shots be the files of a folder, in the order of their names; those that share a stem are one shot.

        They get the camera's names. A capture more than there are shots fails the test.
        """
        self.call("capture_folder", folder)

    def capture_rendered(self, name: str) -> None:
        """Let a function make the files of shots: "module:function", imported in the camera's process.

        It is called with the number of the shot, from 1, and its settings: exposure_s, iso, quality, and bulb_s, which
        is None for a timed exposure. It returns [(extension, bytes), ...].
        """
        self.call("capture_rendered", name)

    def number_from(self, number: int, folder_number: int = 100) -> None:
        """Let the next shot have a number, 1 to 9999, in a folder, 100 to 999."""
        self.call("number_from", number, folder_number)

    def shoot(
        self,
        files: Files | None = None,
        *,
        stem: str | None = None,
        drop: float | None = None,
        duplicate: float | None = None,
        delay_s: float | None = None,
        mtime_s: float | None = None,
    ) -> list[CardFile]:
        """Press the button: put a shot on the card, without an exposure, and announce it.

        Its files are given as (extension, bytes), else they come from what was set to be captured. Its events are lost
        with a probability, come twice with another, and come late. Its name and time can be given.
        """
        options = {"stem": stem, "drop": drop, "duplicate": duplicate, "delay_s": delay_s, "mtime_s": mtime_s}
        shot: list[CardFile] = self.call("shoot", files, **options)
        return shot

    def turn(self, setting: str, value: int | str) -> None:
        """Change a setting on the camera itself: by a name as in Status.settings, to a value as PTP has it."""
        self.call("turn", setting, value)

    # The card

    def files(self) -> list[CardFile]:
        """Return what is on the card, in the order in which it came."""
        files: list[CardFile] = self.call("files")
        return files

    def ram_files(self) -> list[CardFile]:
        """Return the shots that are in the camera's RAM only."""
        files: list[CardFile] = self.call("ram_files")
        return files

    def read(self, path: str) -> bytes:
        """Return the bytes of a file, by its path or name. KeyError if there is none."""
        data: bytes = self.call("read", path)
        return data

    def delete(self, path: str, *, event: bool = True) -> None:
        """Delete a file in the camera, by its path or name. KeyError if there is none."""
        self.call("delete", path, event=event)

    def format_card(self) -> None:
        """Remove all files and folders, without an event."""
        self.call("format_card")

    # Faults

    def unplug(self, after_bytes: int | None = None) -> None:
        """Pull the plug, at once or after so many bytes of files. An exposure goes on."""
        self.call("unplug", after_bytes)

    def plug(self) -> None:
        """Put the plug in again, or switch on."""
        self.call("plug")

    def die(self) -> None:
        """Lose power: what is being exposed is lost, the shutter closes, and it is unplugged."""
        self.call("die")

    def cut_download(self, after_bytes: int) -> None:
        """Cut the connection after so many bytes of files from now, once. The client may connect again."""
        self.call("cut_download", after_bytes)

    def stall_download(self, after_bytes: int) -> None:
        """Send nothing any more after so many bytes of files from now, once. The connection stays."""
        self.call("stall_download", after_bytes)

    def hang(self) -> None:
        """Answer nothing until `resume`. Connections stay, and new ones can be made."""
        self.call("hang")

    def resume(self) -> None:
        """Go on after a stall or a hang."""
        self.call("resume")

    # What it has seen

    @property
    def status(self) -> Status:
        """What it does, and has done so far."""
        status: Status = self.call("status")
        return status

    @property
    def bulb_open(self) -> bool:
        """Whether the shutter is held open."""
        return self.status.bulb_open

    def operations(self, *, clear: bool = False) -> list[LoggedOperation]:
        """Return what clients asked for, the oldest first, and forget it if wanted."""
        operations: list[LoggedOperation] = self.call("operations", clear=clear)
        return operations


def main(connection: Connection, persona: PersonaName, serial_number: str, seed: int) -> None:
    """Be the camera's process, until the test's end of the connection is closed."""
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_be_driven(connection, persona, serial_number, seed))


async def _be_driven(connection: Connection, persona: PersonaName, serial_number: str, seed: int) -> None:
    camera = VirtualCamera(PERSONAS[persona], serial_number, seed)
    server = Server(camera)
    await server.plug()
    connection.send((True, server.port))
    while True:
        try:
            method, arguments, options = await asyncio.to_thread(connection.recv)
        except (EOFError, OSError):
            return await server.close()
        connection.send(await _outcome(server if hasattr(server, method) else camera, method, arguments, options))


async def _outcome(target: Any, method: str, arguments: tuple[Any, ...], options: dict[str, Any]) -> tuple[bool, Any]:
    """Call a method; return whether it succeeded, and what it returned or raised."""
    try:
        returned = getattr(target, method)(*arguments, **options)
        return True, await returned if inspect.isawaitable(returned) else returned
    except Exception as error:  # The test raises it again.
        return False, error
