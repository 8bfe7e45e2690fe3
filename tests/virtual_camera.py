"""A virtual camera as PTP sees it: settings, shutter, card and events, without its connections.

Exposures take real time, scaled, and the camera is busy meanwhile; what is wrong with it is said by its `Behaviour`. It
runs on one thread, that of its event loop, except that files are read or rendered on another.
"""

from __future__ import annotations

import asyncio
import dataclasses
import random
import time
import traceback
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, Final, Literal

from memory_card import (
    STORAGE,
    CaptureSource,
    Card,
    CardFile,
    Files,
    StoredObject,
    UsedUpError,
    folder_files,
    random_files,
    rendered_files,
)
from ptp_wire import (
    ARRAY_OF_U32,
    TEXT,
    U8,
    U16,
    U32,
    Answer,
    DeviceInfo,
    Event,
    Operation,
    Property,
    PropertyCode,
    Reply,
    Request,
    StorageInfo,
    encode,
    nikon_events,
)

PersonaName = Literal["generic", "nikon"]
BusyWith = Literal["captures", "changes", "everything"]

BULB: Final = 0xFFFFFFFF
"""The exposure time that means: while the button is held."""

_EXPOSURE_UNITS_PER_S: Final = 10_000
_ISOS: Final = (100, 200, 400, 800, 1600, 3200, 6400)
_ANYTHING: Final = (0, 0xFFFFFFFF)
"""Handles and formats which mean that it does not matter."""

_SESSION: Final = frozenset({Operation.GET_DEVICE_INFO, Operation.OPEN_SESSION, Operation.CLOSE_SESSION})

_NEVER_BUSY: Final = _SESSION | {
    Operation.CHANGE_CAMERA_MODE,
    Operation.GET_EVENTS,
    Operation.DEVICE_READY,
    Operation.TERMINATE_CAPTURE,
}
"""Answered during an exposure, always. DEVICE_READY then says that the camera is busy."""

_CAPTURES: Final = frozenset(
    {
        Operation.INITIATE_CAPTURE,
        Operation.INITIATE_CAPTURE_IN_MEDIA,
        Operation.INITIATE_CAPTURE_IN_RAM,
        Operation.FOCUS_AND_CAPTURE_IN_RAM,
    }
)

_BUSY: Final[Mapping[BusyWith, frozenset[Operation]]] = {
    "captures": _CAPTURES,
    "changes": _CAPTURES | {Operation.SET_PROPERTY, Operation.DELETE_OBJECT},
    "everything": frozenset(Operation) - _NEVER_BUSY,
}


@dataclass(frozen=True, slots=True)
class Persona:
    """What kind of camera it is."""

    manufacturer: str
    model: str
    vendor_extension: int
    name_prefix: str
    folder_suffix: str
    operations: tuple[Operation, ...]
    properties: Callable[[], tuple[Property, ...]]
    raw_only: tuple[int, ...] = ()
    """Values of the compression at which no JPEG is written."""

    jpeg_only: tuple[int, ...] = ()
    """Values of the compression at which no raw file is written."""

    polled_events: bool = False
    """Whether the client has to ask for events. Else they come on a connection of their own."""


def _generic_properties() -> tuple[Property, ...]:
    """Return the settings of the generic camera. It has no bulb."""
    exposures = (1, 100, 1000, 10_000, 100_000, 300_000)
    return (
        Property("battery", PropertyCode.BATTERY_LEVEL, U8, 77, writable=False),
        Property("quality", PropertyCode.COMPRESSION, U8, 2, (1, 2, 4)),
        Property("exposure", PropertyCode.EXPOSURE_TIME, U32, 10_000, exposures),
        Property("iso", PropertyCode.EXPOSURE_INDEX, U16, 800, _ISOS),
        Property("clock", PropertyCode.DATE_TIME, TEXT, "20261122T000000"),
    )


def _nikon_properties() -> tuple[Property, ...]:
    """Return the settings of the Nikon."""
    fractions_s = (1 / 4000, 1 / 1000, 1 / 500, 1 / 250, 1 / 125, 1 / 60, 1 / 30, 1 / 15, 1 / 8, 1 / 4, 1 / 2)
    whole_s = (1, 2, 4, 8, 15, 20, 30)
    exposures = (*(round(_EXPOSURE_UNITS_PER_S * exposure_s) for exposure_s in (*fractions_s, *whole_s)), BULB)
    noise_reduction = PropertyCode.NIKON_LONG_EXPOSURE_NOISE_REDUCTION
    return (
        Property("battery", PropertyCode.BATTERY_LEVEL, U8, 77, writable=False),
        Property("quality", PropertyCode.COMPRESSION, U8, 7, (0, 1, 2, 4, 5, 6, 7)),
        Property("exposure", PropertyCode.EXPOSURE_TIME, U32, 10_000, exposures),
        Property("program", PropertyCode.EXPOSURE_PROGRAM, U16, 1, (1, 2, 3, 4)),
        Property("iso", PropertyCode.EXPOSURE_INDEX, U16, 800, _ISOS),
        Property("clock", PropertyCode.DATE_TIME, TEXT, "20261122T000000"),
        Property("noise_reduction", noise_reduction, U8, 0, range(2)),
    )


_STANDARD_OPERATIONS: Final = tuple(code for code in Operation if code < Operation.INITIATE_CAPTURE_IN_RAM)

PERSONAS: Final[Mapping[PersonaName, Persona]] = {
    "generic": Persona(
        manufacturer="Loop",
        model="EOS Loopback",
        vendor_extension=0,
        name_prefix="IMG_",
        folder_suffix="CANON",
        operations=_STANDARD_OPERATIONS,
        properties=_generic_properties,
    ),
    "nikon": Persona(
        manufacturer="Nikon Corporation",
        model="Loopback",
        vendor_extension=0x0000000A,
        name_prefix="DSC_",
        folder_suffix="NIKON",
        operations=tuple(Operation),
        properties=_nikon_properties,
        raw_only=(4,),
        jpeg_only=(0, 1, 2),
        polled_events=True,
    ),
}


@dataclass(frozen=True, slots=True)
class Behaviour:
    """How the camera behaves, and what is wrong with it. Every field can be changed at any time."""

    time_scale: float = 0.01
    """Real s that an exposure of one s takes."""

    bulb_scale: float = 1.0
    """What one real s of an open bulb counts for, in s, in the settings that a renderer is told."""

    processing_s: float = 0.02
    """Real s from the end of an exposure until its files are on the card; the camera is busy until then."""

    busy_while_exposing: BusyWith = "changes"
    """What is answered with DEVICE_BUSY during an exposure. Changes: captures, settings and deletions."""

    settings: Literal["obeyed", "ignored", "refused"] = "obeyed"
    """What becomes of a setting that a client writes. Ignored: answered with OK, like a dial that is in the way."""

    refusal: int = Reply.ACCESS_DENIED
    """The answer to a refused setting."""

    card_full: bool = False
    """Whether captures to the card are refused. The user's shots are not."""

    capacity_bytes: int = 32 << 30

    busy_operations: int = 0
    """So many of the next operations are answered with DEVICE_BUSY. Counts down."""

    die_at_capture: int | None = None
    """The power goes at the so manieth capture from now, 1 being the next. Counts down."""

    die_after_s: float | None = None
    """How long after the start of that exposure, in s of exposure; of a bulb, in real s. None: it is not answered."""

    drop_events: float = 0.0
    """Probability that an event is lost."""

    duplicate_events: float = 0.0
    """Probability that an event comes twice."""

    delay_events_s: float = 0.0
    """Real s from what happens until its event."""

    size_unknown_s: float = 0.0
    """For so long after its appearance, in real s, a file is said to have 0 bytes."""

    names_repeat: bool = False
    """Whether a name comes again after its file was deleted."""

    bulb_closes_on_disconnect: bool = False
    """Whether an open shutter closes when its client is gone. Else the next client can close it."""

    exclusive: bool = False
    """Whether a second client is refused. Else it takes the place of the first."""


@dataclass(frozen=True, slots=True)
class Status:
    """What the camera does, and has done so far."""

    online: bool
    connected: bool
    """Whether a client has a connection, so far as the camera knows."""

    sessions: int
    captures: int
    """Exposures asked for by clients; those that were refused are not counted."""

    shots: int
    """Exposures whose files came to be, the user's among them."""

    downloads: int
    """Files sent to their end."""

    deleted: int
    """Files deleted by clients."""

    exposing: bool
    """From the start of an exposure until its files are on the card."""

    bulb_open: bool
    bulbs: int
    longest_bulb_s: float
    """Of all bulb exposures, one that is open now among them, in real s."""

    settings: Mapping[str, int | str]
    """Values as PTP has them, by the names of the properties."""


@dataclass(frozen=True, slots=True)
class LoggedOperation:
    """An operation that a client asked for."""

    name: str
    params: tuple[int, ...]
    reply: int | None
    """None if the camera died instead."""


class PowerLostError(Exception):
    """The camera died instead of answering."""


@dataclass(frozen=True, slots=True)
class _Mishaps:
    """What befalls an event on its way."""

    drop: float
    """Probability that it is lost."""

    duplicate: float
    """Probability that it comes twice."""

    delay_s: float


@dataclass(slots=True)
class _Exposure:
    """An exposure under way, or its processing."""

    settings: dict[str, Any]
    in_ram: bool
    opened_s: float
    """By the monotonic clock."""

    released: asyncio.Event | None
    """Set when the shutter of a bulb closes; None for a timed exposure."""

    task: asyncio.Task[None] | None = None

    @property
    def bulb_open(self) -> bool:
        """Whether the shutter is held open."""
        return self.released is not None and not self.released.is_set()


class VirtualCamera:
    """The camera without its connections: settings, shutter, card and events."""

    def __init__(self, persona: Persona, serial_number: str, seed: int) -> None:
        self.persona = persona
        self.behaviour = Behaviour()
        self.card = Card(persona.name_prefix, persona.folder_suffix)
        self.send_event: Callable[[int, int], None] = lambda _event, _param: None
        """Sends an event to the client, if there is one. Set by the server."""

        self.cut_power: Callable[[], None] = lambda: None
        """Ends all connections until it is plugged in again. Set by the server."""

        self.problems: list[str] = []
        """What went wrong in the camera itself: a test should fail."""

        self._serial_number = serial_number
        self._generator = random.Random(seed)
        self._properties: dict[int, Property] = {known.code: known for known in persona.properties()}
        self._source: CaptureSource | None = None
        self._log: list[LoggedOperation] = []
        self._queued_events: list[tuple[int, int]] = []
        self._exposure: _Exposure | None = None
        self._background: set[asyncio.Task[None]] = set()
        self._bulbs_s: list[float] = []
        self._shot_numbers = count(1)
        self._sessions = self._captures = self._shots = self._downloads = self._deleted = 0
        self._handlers: dict[int, Callable[[Request], Answer]] = {
            Operation.GET_DEVICE_INFO: self._get_device_info,
            Operation.OPEN_SESSION: self._open_session,
            Operation.CLOSE_SESSION: self._nothing_to_do,
            Operation.GET_STORAGE_IDS: self._get_storage_ids,
            Operation.GET_STORAGE_INFO: self._get_storage_info,
            Operation.GET_NUMBER_OF_OBJECTS: self._get_number_of_objects,
            Operation.GET_OBJECT_HANDLES: self._get_object_handles,
            Operation.GET_OBJECT_INFO: self._get_object_info,
            Operation.GET_OBJECT: self._get_object,
            Operation.GET_PARTIAL_OBJECT: self._get_partial_object,
            Operation.GET_THUMBNAIL: self._get_thumbnail,
            Operation.DELETE_OBJECT: self._delete_object,
            Operation.INITIATE_CAPTURE: self._capture_to_card,
            Operation.GET_PROPERTY_DESCRIPTION: self._get_property_description,
            Operation.GET_PROPERTY: self._get_property,
            Operation.SET_PROPERTY: self._set_property,
            Operation.INITIATE_CAPTURE_IN_RAM: self._capture_to_ram,
            Operation.FOCUS_AND_CAPTURE_IN_RAM: self._capture_to_ram,
            Operation.INITIATE_CAPTURE_IN_MEDIA: self._capture_to_chosen,
            Operation.TERMINATE_CAPTURE: self._terminate_capture,
            Operation.CHANGE_CAMERA_MODE: self._nothing_to_do,
            Operation.DEVICE_READY: self._device_ready,
            Operation.GET_EVENTS: self._get_events,
        }

    # What a test does with it

    def behave(self, **changes: Any) -> None:
        """Change some of its behaviour. TypeError for what is not a field of Behaviour."""
        self.behaviour = dataclasses.replace(self.behaviour, **changes)

    def capture_random(self, sizes: Mapping[str, int], seed: int = 0) -> None:
        """Let shots be random bytes, so many for each extension."""
        self._source = random_files(sizes, seed)

    def capture_folder(self, folder: Path) -> None:
        """Let shots be the files of a folder, in the order of their names; those that share a stem are one shot."""
        self._source = folder_files(folder)

    def capture_rendered(self, name: str) -> None:
        """Let a function make the files of shots."""
        self._source = rendered_files(name)

    async def shoot(
        self,
        files: Files | None = None,
        *,
        stem: str | None = None,
        drop: float | None = None,
        duplicate: float | None = None,
        delay_s: float | None = None,
        mtime_s: float | None = None,
    ) -> list[CardFile]:
        """Put a shot on the card as if the user had pressed the button, and announce it."""
        if files is None:
            files = await self._files_of(self._settings())
        return self._put_shot(files, self._mishaps(drop, duplicate, delay_s), stem=stem, mtime_s=mtime_s)

    def files(self) -> list[CardFile]:
        """Return what is on the card."""
        return [self.card.seen(stored) for stored in self.card.files()]

    def ram_files(self) -> list[CardFile]:
        """Return the shots that are in the camera's RAM only."""
        return [self.card.seen(stored) for stored in self.card.objects.values() if stored.in_ram]

    def read(self, path: str) -> bytes:
        """Return the bytes of a file on the card."""
        return self.card.find(path).data

    def delete(self, path: str, *, event: bool = True) -> None:
        """Delete a file as its user would, in the camera."""
        handle = self.card.find(path).handle
        self.card.remove(handle)
        if event:
            self._announce(Event.OBJECT_REMOVED, handle)

    def format_card(self) -> None:
        """Remove all files and folders, without a word."""
        self.card.objects.clear()

    def number_from(self, number: int, folder_number: int = 100) -> None:
        """Let the next shot have a number, 1 to 9999, in a folder, 100 to 999."""
        self.card.next_number = number
        self.card.folder_number = folder_number

    def turn(self, name: str, value: int | str) -> None:
        """Change a setting on the camera itself, by its value in PTP."""
        changed = next(known for known in self._properties.values() if known.name == name)
        changed.value = value
        self._announce(Event.PROPERTY_CHANGED, changed.code)

    def die(self) -> None:
        """Lose power: what is being exposed is lost, the shutter closes, and it is unplugged."""
        if self._exposure is not None:
            self._close_shutter(self._exposure)
            if self._exposure.task is not None:
                self._exposure.task.cancel()
        self._exposure = None
        self.cut_power()

    def state(self) -> dict[str, Any]:
        """Return the fields of Status that do not concern connections."""
        exposure = self._exposure
        bulb_open = exposure is not None and exposure.bulb_open
        open_s = [time.monotonic() - exposure.opened_s] if exposure is not None and bulb_open else []
        return {
            "sessions": self._sessions,
            "captures": self._captures,
            "shots": self._shots,
            "downloads": self._downloads,
            "deleted": self._deleted,
            "exposing": exposure is not None,
            "bulb_open": bulb_open,
            "bulbs": len(self._bulbs_s) + bulb_open,
            "longest_bulb_s": max([*self._bulbs_s, *open_s], default=0.0),
            "settings": {known.name: known.value for known in self._properties.values()},
        }

    def operations(self, *, clear: bool = False) -> list[LoggedOperation]:
        """Return what clients asked for, the oldest first; it can be forgotten then."""
        log = list(self._log)
        if clear:
            self._log.clear()
        return log

    def take_problems(self) -> list[str]:
        """Return what went wrong in the camera itself, and forget it."""
        taken, self.problems = self.problems, []
        return taken

    # What the server does with it

    def answer(self, request: Request) -> Answer:
        """Do what a client asks for."""
        name = Operation(request.code).name if request.code in tuple(Operation) else f"{request.code:#06x}"
        try:
            answer = self._answer(request)
        except PowerLostError:
            self._log.append(LoggedOperation(name, request.params, None))
            raise
        self._log.append(LoggedOperation(name, request.params, answer.code))
        return answer

    def downloaded(self) -> None:
        """Note that a file was sent to its end."""
        self._downloads += 1

    def client_gone(self) -> None:
        """Note that the client has no connection any more. What is in RAM is lost; the shutter stays as it is."""
        self._queued_events.clear()
        self.card.clear_ram()
        if self.behaviour.bulb_closes_on_disconnect and self._exposure is not None:
            self._close_shutter(self._exposure)

    # Operations: sessions, card, objects

    def _answer(self, request: Request) -> Answer:
        handler = self._handlers.get(request.code)
        if handler is None or request.code not in self.persona.operations:
            return Answer(Reply.OPERATION_NOT_SUPPORTED)
        if self._busy_for(request.code):
            return Answer(Reply.DEVICE_BUSY)
        return handler(request)

    def _busy_for(self, code: int) -> bool:
        if code not in _SESSION and self.behaviour.busy_operations > 0:
            self.behave(busy_operations=self.behaviour.busy_operations - 1)
            return True
        return self._exposure is not None and code in _BUSY[self.behaviour.busy_while_exposing]

    def _nothing_to_do(self, _request: Request) -> Answer:
        return Answer()

    def _get_device_info(self, _request: Request) -> Answer:
        events = [event for event in Event if event < 0xC000 or self.persona.vendor_extension]
        info = DeviceInfo(
            vendor_extension=self.persona.vendor_extension,
            operations=self.persona.operations,
            events=tuple(events),
            properties=tuple(self._properties),
            manufacturer=self.persona.manufacturer,
            model=self.persona.model,
            serial_number=self._serial_number,
        )
        return Answer(data=encode(info))

    def _open_session(self, _request: Request) -> Answer:
        self._sessions += 1
        self._queued_events.clear()
        return Answer()

    def _get_storage_ids(self, _request: Request) -> Answer:
        return Answer(data=ARRAY_OF_U32.pack([STORAGE]))

    def _get_storage_info(self, request: Request) -> Answer:
        if request.param(0) != STORAGE:
            return Answer(Reply.INVALID_STORAGE)
        free_bytes = self._free_bytes()
        info = StorageInfo(
            capacity_bytes=self.behaviour.capacity_bytes, free_bytes=free_bytes, free_images=free_bytes >> 25
        )
        return Answer(data=encode(info))

    def _free_bytes(self) -> int:
        return 0 if self.behaviour.card_full else max(0, self.behaviour.capacity_bytes - self.card.used_bytes())

    def _listed(self, request: Request) -> list[int]:
        """Return the handles that a client asks for, by format and folder. 0xFFFFFFFF as a folder is the root."""
        object_format, parent = request.param(1), request.param(2)
        return [
            stored.handle
            for stored in self.card.objects.values()
            if not stored.in_ram
            and (object_format in _ANYTHING or stored.object_format == object_format)
            and (parent == 0 or stored.parent == (0 if parent == 0xFFFFFFFF else parent))
        ]

    def _get_number_of_objects(self, request: Request) -> Answer:
        return Answer(params=(len(self._listed(request)),))

    def _get_object_handles(self, request: Request) -> Answer:
        return Answer(data=ARRAY_OF_U32.pack(self._listed(request)))

    def _get_object_info(self, request: Request) -> Answer:
        stored = self._asked_for(request)
        if stored is None:
            return Answer(Reply.INVALID_HANDLE)
        unknown = time.monotonic() - stored.appeared_s < self.behaviour.size_unknown_s
        return Answer(data=encode(stored.info(0 if unknown else len(stored.data))))

    def _get_object(self, request: Request) -> Answer:
        stored = self._asked_for(request)
        if stored is None:
            return Answer(Reply.INVALID_HANDLE)
        return Answer(data=stored.data, is_file=True, ends_file=True)

    def _get_partial_object(self, request: Request) -> Answer:
        stored = self._asked_for(request)
        if stored is None:
            return Answer(Reply.INVALID_HANDLE)
        start, end = request.param(1), request.param(1) + request.param(2)
        part = stored.data[start:end]
        return Answer(params=(len(part),), data=part, is_file=True, ends_file=end >= len(stored.data))

    def _get_thumbnail(self, _request: Request) -> Answer:
        return Answer(Reply.NO_THUMBNAIL)

    def _delete_object(self, request: Request) -> Answer:
        handle = request.param(0)
        doomed = [stored.handle for stored in self.card.files()] if handle == 0xFFFFFFFF else [handle]
        if not all(known in self.card.objects for known in doomed):
            return Answer(Reply.INVALID_HANDLE)
        for each in doomed:
            in_ram = self.card.objects[each].in_ram
            self.card.remove(each)
            self._deleted += not in_ram
        return Answer()

    def _asked_for(self, request: Request) -> StoredObject | None:
        return self.card.objects.get(request.param(0))

    # Operations: settings

    def _get_property_description(self, request: Request) -> Answer:
        known = self._properties.get(request.param(0))
        return Answer(Reply.PROPERTY_NOT_SUPPORTED) if known is None else Answer(data=known.described())

    def _get_property(self, request: Request) -> Answer:
        known = self._properties.get(request.param(0))
        return Answer(Reply.PROPERTY_NOT_SUPPORTED) if known is None else Answer(data=known.encoded())

    def _set_property(self, request: Request) -> Answer:
        known = self._properties.get(request.param(0))
        if known is None:
            return Answer(Reply.PROPERTY_NOT_SUPPORTED)
        if self.behaviour.settings == "refused":
            return Answer(self.behaviour.refusal)
        if not known.writable:
            return Answer(Reply.ACCESS_DENIED)
        value = known.wire_type.unpack(request.data)
        if not known.allows(value):
            return Answer(Reply.INVALID_PROPERTY_VALUE)
        if self.behaviour.settings == "obeyed" and value != known.value:
            known.value = value
            self._announce(Event.PROPERTY_CHANGED, known.code)
        return Answer()

    # Operations: shutter and events

    def _capture_to_card(self, _request: Request) -> Answer:
        return self._capture(in_ram=False)

    def _capture_to_ram(self, _request: Request) -> Answer:
        return self._capture(in_ram=True)

    def _capture_to_chosen(self, request: Request) -> Answer:
        """Capture to where Nikon's second parameter says: 0 the card, 1 the camera's RAM."""
        return self._capture(in_ram=request.param(1) == 1)

    def _capture(self, *, in_ram: bool) -> Answer:
        if not in_ram and self._free_bytes() == 0:
            return Answer(Reply.STORE_FULL)
        if self._source is None:
            return Answer(Reply.STORE_NOT_AVAILABLE)
        self._captures += 1
        self._open_shutter(in_ram=in_ram)
        return Answer()

    def _open_shutter(self, *, in_ram: bool) -> None:
        settings = self._settings()
        released = asyncio.Event() if self._value(PropertyCode.EXPOSURE_TIME) == BULB else None
        exposure = _Exposure(settings, in_ram, time.monotonic(), released)
        self._exposure = exposure
        if self._last_capture():
            self._plan_death(exposure)
        exposure.task = self._spawn(self._expose(exposure))

    def _last_capture(self) -> bool:
        """Count down to the capture at which it dies, and tell whether this is it."""
        left = self.behaviour.die_at_capture
        if left is None:
            return False
        self.behave(die_at_capture=left - 1 if left > 1 else None)
        return left <= 1

    def _plan_death(self, exposure: _Exposure) -> None:
        after_s = self.behaviour.die_after_s
        if after_s is None:
            self.die()
            raise PowerLostError
        scale = self.behaviour.time_scale if exposure.released is None else 1.0
        asyncio.get_running_loop().call_later(after_s * scale, self.die)

    async def _expose(self, exposure: _Exposure) -> None:
        """Wait for the end of an exposure, then put its files where they belong."""
        settings = exposure.settings
        if exposure.released is None:
            real_s = settings["exposure_s"] * self.behaviour.time_scale
            await asyncio.sleep(real_s)
        else:
            await exposure.released.wait()
            real_s = self._bulbs_s[-1]
            settings["exposure_s"] = settings["bulb_s"] = real_s * self.behaviour.bulb_scale
        if self._reduces_noise(settings["exposure_s"]):
            await asyncio.sleep(real_s)
        files, _ = await asyncio.gather(self._files_of(settings), asyncio.sleep(self.behaviour.processing_s))
        self._put_shot(files, in_ram=exposure.in_ram)
        self._exposure = None
        self._announce(Event.CAPTURE_COMPLETE)

    def _reduces_noise(self, exposure_s: float) -> bool:
        """Tell whether a dark frame as long as the exposure follows it."""
        return exposure_s >= 1 and bool(self._value(PropertyCode.NIKON_LONG_EXPOSURE_NOISE_REDUCTION))

    def _close_shutter(self, exposure: _Exposure) -> None:
        if exposure.released is not None and exposure.bulb_open:
            self._bulbs_s.append(time.monotonic() - exposure.opened_s)
            exposure.released.set()

    def _terminate_capture(self, _request: Request) -> Answer:
        if self._exposure is None or not self._exposure.bulb_open:
            return Answer(Reply.NIKON_INVALID_STATUS)
        self._close_shutter(self._exposure)
        return Answer()

    def _device_ready(self, _request: Request) -> Answer:
        return Answer(Reply.DEVICE_BUSY if self._exposure is not None else Reply.OK)

    def _get_events(self, _request: Request) -> Answer:
        events, self._queued_events = self._queued_events, []
        return Answer(data=nikon_events(events))

    # Shots

    def _value(self, code: PropertyCode) -> int | str | None:
        known = self._properties.get(code)
        return None if known is None else known.value

    def _settings(self) -> dict[str, Any]:
        units = self._value(PropertyCode.EXPOSURE_TIME)
        assert isinstance(units, int)
        return {
            "exposure_s": 0.0 if units == BULB else units / _EXPOSURE_UNITS_PER_S,
            "iso": self._value(PropertyCode.EXPOSURE_INDEX),
            "bulb_s": None,
            "quality": self._value(PropertyCode.COMPRESSION),
        }

    async def _files_of(self, settings: dict[str, Any]) -> Files:
        """Make the files of the next shot, as far as the quality that is set asks for them."""
        if self._source is None:
            raise UsedUpError("the camera has nothing to capture")
        files = await asyncio.to_thread(self._source, next(self._shot_numbers), settings)
        jpegs = [(extension, data) for extension, data in files if extension.upper() == "JPG"]
        others = [(extension, data) for extension, data in files if extension.upper() != "JPG"]
        if settings["quality"] in self.persona.raw_only:
            return others or jpegs
        if settings["quality"] in self.persona.jpeg_only:
            return jpegs or others
        return files

    def _put_shot(
        self,
        files: Files,
        mishaps: _Mishaps | None = None,
        *,
        in_ram: bool = False,
        stem: str | None = None,
        mtime_s: float | None = None,
    ) -> list[CardFile]:
        folders: list[StoredObject] = []
        if stem is None:
            stem, folders = self.card.begin_shot(names_repeat=self.behaviour.names_repeat)
        put = [self.card.put(f"{stem}.{extension}", data, mtime_s, in_ram=in_ram) for extension, data in files]
        self._shots += 1
        for folder in folders:
            self._announce(Event.OBJECT_ADDED, folder.handle)
        for stored in put:
            self._announce(Event.NIKON_ADDED_IN_RAM if in_ram else Event.OBJECT_ADDED, stored.handle, mishaps)
        return [self.card.seen(stored) for stored in put]

    def _mishaps(
        self, drop: float | None = None, duplicate: float | None = None, delay_s: float | None = None
    ) -> _Mishaps:
        """Return what befalls an event. None: as the camera behaves."""
        usual = self.behaviour
        return _Mishaps(
            usual.drop_events if drop is None else drop,
            usual.duplicate_events if duplicate is None else duplicate,
            usual.delay_events_s if delay_s is None else delay_s,
        )

    def _announce(self, event: Event, param: int = 0, mishaps: _Mishaps | None = None) -> None:
        """Send an event, or not, or twice, or later."""
        mishaps = mishaps or self._mishaps()
        if self._generator.random() < mishaps.drop:
            return
        for _ in range(2 if self._generator.random() < mishaps.duplicate else 1):
            if mishaps.delay_s > 0:
                asyncio.get_running_loop().call_later(mishaps.delay_s, self._emit, event, param)
            else:
                self._emit(event, param)

    def _emit(self, event: Event, param: int) -> None:
        if self.persona.polled_events:
            self._queued_events.append((event, param))
        else:
            self.send_event(event, param)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Start a task whose failure is a problem of the camera."""
        task = asyncio.get_running_loop().create_task(work)
        self._background.add(task)
        task.add_done_callback(self._finished)
        return task

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._background.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None:
            self._exposure = None
            self.problems.append("".join(traceback.format_exception(error)))
