"""How PTP (ISO 15740) and PTP/IP (CIPA DC-005) lay out what they send, as far as a camera needs it.

A dataset is a dataclass whose fields name their wire type; `encode` turns it into bytes. All numbers are little-endian.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Final, Protocol


class Operation(IntEnum):
    """What a client may ask. From INITIATE_CAPTURE_IN_RAM on: Nikon's."""

    GET_DEVICE_INFO = 0x1001
    OPEN_SESSION = 0x1002
    CLOSE_SESSION = 0x1003
    GET_STORAGE_IDS = 0x1004
    GET_STORAGE_INFO = 0x1005
    GET_NUMBER_OF_OBJECTS = 0x1006
    GET_OBJECT_HANDLES = 0x1007
    GET_OBJECT_INFO = 0x1008
    GET_OBJECT = 0x1009
    GET_THUMBNAIL = 0x100A
    DELETE_OBJECT = 0x100B
    INITIATE_CAPTURE = 0x100E
    GET_PROPERTY_DESCRIPTION = 0x1014
    GET_PROPERTY = 0x1015
    SET_PROPERTY = 0x1016
    GET_PARTIAL_OBJECT = 0x101B

    INITIATE_CAPTURE_IN_RAM = 0x90C0
    CHANGE_CAMERA_MODE = 0x90C2
    GET_EVENTS = 0x90C7
    DEVICE_READY = 0x90C8
    FOCUS_AND_CAPTURE_IN_RAM = 0x90CB
    INITIATE_CAPTURE_IN_MEDIA = 0x9207
    TERMINATE_CAPTURE = 0x920C


class Reply(IntEnum):
    """How the camera answers."""

    OK = 0x2001
    GENERAL_ERROR = 0x2002
    OPERATION_NOT_SUPPORTED = 0x2005
    INVALID_STORAGE = 0x2008
    INVALID_HANDLE = 0x2009
    PROPERTY_NOT_SUPPORTED = 0x200A
    STORE_FULL = 0x200C
    ACCESS_DENIED = 0x200F
    NO_THUMBNAIL = 0x2010
    STORE_NOT_AVAILABLE = 0x2013
    DEVICE_BUSY = 0x2019
    INVALID_PROPERTY_VALUE = 0x201C
    SESSION_ALREADY_OPEN = 0x201E

    NIKON_INVALID_STATUS = 0xA004


class Event(IntEnum):
    """What the camera says unasked."""

    OBJECT_ADDED = 0x4002
    OBJECT_REMOVED = 0x4003
    PROPERTY_CHANGED = 0x4006
    CAPTURE_COMPLETE = 0x400D

    NIKON_ADDED_IN_RAM = 0xC101


class PropertyCode(IntEnum):
    """What a camera can be set to."""

    BATTERY_LEVEL = 0x5001
    COMPRESSION = 0x5004
    EXPOSURE_TIME = 0x500D
    EXPOSURE_PROGRAM = 0x500E
    EXPOSURE_INDEX = 0x500F
    DATE_TIME = 0x5011
    NIKON_LONG_EXPOSURE_NOISE_REDUCTION = 0xD06B


class ObjectFormat(IntEnum):
    """What an object on the card is."""

    FOLDER = 0x3001
    JPEG = 0x3801
    TIFF_EP = 0x3802
    DNG = 0x3811
    CANON_CR2 = 0xB103


class PacketKind(IntEnum):
    """What a PTP/IP packet carries."""

    INIT_COMMAND_REQUEST = 1
    INIT_COMMAND_ACK = 2
    INIT_EVENT_REQUEST = 3
    INIT_EVENT_ACK = 4
    INIT_FAIL = 5
    REQUEST = 6
    RESPONSE = 7
    EVENT = 8
    START_DATA = 9
    DATA = 10
    CANCEL = 11
    END_DATA = 12


class WireType(Protocol):
    """How one value is laid out."""

    def pack(self, value: Any) -> bytes:
        """Return the value's bytes."""
        ...


@dataclass(frozen=True, slots=True)
class Integer:
    """An unsigned number."""

    code: int
    """PTP's number for this type, in the description of a property."""

    layout: struct.Struct

    def pack(self, value: int) -> bytes:
        """Return the number's bytes."""
        return self.layout.pack(value)

    def unpack(self, data: bytes) -> int:
        """Return the number at the start of some bytes."""
        return int(self.layout.unpack_from(data)[0])


@dataclass(frozen=True, slots=True)
class Text:
    """A string of at most 254 characters: their count with the closing zero, then UTF-16."""

    code: int = 0xFFFF

    def pack(self, value: str) -> bytes:
        """Return the string's bytes; an empty one is a single zero."""
        return bytes([len(value) + 1]) + f"{value}\0".encode("utf-16le") if value else b"\0"

    def unpack(self, data: bytes) -> str:
        """Return the string at the start of some bytes."""
        return data[1 : 1 + 2 * data[0]].decode("utf-16le").rstrip("\0")


@dataclass(frozen=True, slots=True)
class Array:
    """A count of 32 bits, then the numbers."""

    element: Integer

    def pack(self, value: Sequence[int]) -> bytes:
        """Return the bytes of the count and the numbers."""
        return struct.pack("<I", len(value)) + b"".join(map(self.element.pack, value))


U8: Final = Integer(0x0002, struct.Struct("<B"))
U16: Final = Integer(0x0004, struct.Struct("<H"))
U32: Final = Integer(0x0006, struct.Struct("<I"))
U64: Final = Integer(0x0008, struct.Struct("<Q"))
TEXT: Final = Text()
ARRAY_OF_U16: Final = Array(U16)
ARRAY_OF_U32: Final = Array(U32)

_FORM_NONE: Final = 0
_FORM_RANGE: Final = 1
_FORM_ENUMERATION: Final = 2


def laid_out(wire_type: WireType, default: Any = dataclasses.MISSING) -> Any:
    """Declare a field of a dataset."""
    return dataclasses.field(default=default, metadata={"wire type": wire_type})


def encode(dataset: Any) -> bytes:
    """Return the bytes of a dataset whose fields were declared with `laid_out`."""
    return b"".join(
        field.metadata["wire type"].pack(getattr(dataset, field.name)) for field in dataclasses.fields(dataset)
    )


@dataclass(frozen=True, kw_only=True)
class DeviceInfo:
    """What the camera is and can do."""

    standard_version: int = laid_out(U16, 100)
    vendor_extension: int = laid_out(U32)
    vendor_version: int = laid_out(U16, 0)
    vendor_description: str = laid_out(TEXT, "")
    functional_mode: int = laid_out(U16, 0)
    operations: tuple[int, ...] = laid_out(ARRAY_OF_U16)
    events: tuple[int, ...] = laid_out(ARRAY_OF_U16)
    properties: tuple[int, ...] = laid_out(ARRAY_OF_U16)
    capture_formats: tuple[int, ...] = laid_out(ARRAY_OF_U16, (ObjectFormat.JPEG,))
    image_formats: tuple[int, ...] = laid_out(ARRAY_OF_U16, (ObjectFormat.JPEG, ObjectFormat.FOLDER))
    manufacturer: str = laid_out(TEXT)
    model: str = laid_out(TEXT)
    device_version: str = laid_out(TEXT, "1.0")
    serial_number: str = laid_out(TEXT)


@dataclass(frozen=True, kw_only=True)
class StorageInfo:
    """A card: removable, with folders, readable and objects deletable."""

    storage_type: int = laid_out(U16, 4)
    file_system: int = laid_out(U16, 3)
    access: int = laid_out(U16, 2)
    capacity_bytes: int = laid_out(U64)
    free_bytes: int = laid_out(U64)
    free_images: int = laid_out(U32)
    description: str = laid_out(TEXT, "card")
    label: str = laid_out(TEXT, "LOOPBACK")


@dataclass(frozen=True, kw_only=True)
class ObjectInfo:
    """A file or folder."""

    storage: int = laid_out(U32)
    object_format: int = laid_out(U16)
    protection: int = laid_out(U16, 0)
    size_bytes: int = laid_out(U32)
    thumbnail_format: int = laid_out(U16, 0)
    thumbnail_bytes: int = laid_out(U32, 0)
    thumbnail_width: int = laid_out(U32, 0)
    thumbnail_height: int = laid_out(U32, 0)
    width: int = laid_out(U32, 0)
    height: int = laid_out(U32, 0)
    bit_depth: int = laid_out(U32, 0)
    parent: int = laid_out(U32)
    association: int = laid_out(U16, 0)
    """1 for a folder."""

    association_description: int = laid_out(U32, 0)
    sequence: int = laid_out(U32, 0)
    name: str = laid_out(TEXT)
    captured: str = laid_out(TEXT)
    modified: str = laid_out(TEXT)
    keywords: str = laid_out(TEXT, "")


@dataclass(slots=True)
class Property:
    """A setting of the camera."""

    name: str
    """What tests call it."""

    code: PropertyCode
    wire_type: Integer | Text
    value: int | str
    choices: tuple[int, ...] | range = ()
    """A range is described as such: libgphoto2 wants one for a switch. Empty: anything goes."""

    writable: bool = True
    """By a client. The camera itself can always change it."""

    def encoded(self) -> bytes:
        """Return the bytes of the value."""
        wire_type: WireType = self.wire_type
        return wire_type.pack(self.value)

    def described(self) -> bytes:
        """Return the description: type, factory value, value and choices."""
        head = struct.pack("<HHB", self.code, self.wire_type.code, self.writable) + self.encoded() * 2
        if not self.choices or not isinstance(self.wire_type, Integer):
            return head + U8.pack(_FORM_NONE)
        if isinstance(self.choices, range):
            bounds = (self.choices[0], self.choices[-1], self.choices.step)
            return head + U8.pack(_FORM_RANGE) + b"".join(map(self.wire_type.pack, bounds))
        form = U8.pack(_FORM_ENUMERATION) + U16.pack(len(self.choices))
        return head + form + b"".join(map(self.wire_type.pack, self.choices))

    def allows(self, value: int | str) -> bool:
        """Tell whether it can be set to a value."""
        return not self.choices or value in self.choices


@dataclass(frozen=True, slots=True)
class Request:
    """An operation that a client asks for."""

    code: int
    transaction: int
    params: tuple[int, ...]
    sends_data: bool
    """Whether data of the client's follow."""

    data: bytes = b""
    """Those data."""

    @classmethod
    def decode(cls, body: bytes) -> Request:
        """Read the body of a request packet."""
        data_phase, code, transaction = struct.unpack_from("<IHI", body)
        count = (len(body) - 10) // 4
        return cls(code, transaction, struct.unpack_from(f"<{count}I", body, 10), data_phase == 2)

    def param(self, index: int, default: int = 0) -> int:
        """Return a parameter, or a default if the client left it out."""
        return self.params[index] if index < len(self.params) else default


@dataclass(frozen=True, slots=True)
class Answer:
    """What the camera answers to a request."""

    code: int = Reply.OK
    params: tuple[int, ...] = ()
    data: bytes | None = None
    """None if the operation has no data to send."""

    is_file: bool = False
    """Whether the data are of a file."""

    ends_file: bool = False
    """Whether they are the last of it."""


def packet(kind: PacketKind, body: bytes = b"") -> bytes:
    """Return a PTP/IP packet: its length, its kind, its body."""
    return struct.pack("<II", 8 + len(body), kind) + body


def response(transaction: int, answer: Answer) -> bytes:
    """Return the packet that ends an operation."""
    body = struct.pack("<HI", answer.code, transaction) + b"".join(map(U32.pack, answer.params))
    return packet(PacketKind.RESPONSE, body)


def event_packet(event: int, *params: int) -> bytes:
    """Return the packet of an event."""
    return packet(PacketKind.EVENT, struct.pack("<HI", event, 0) + b"".join(map(U32.pack, params)))


def nikon_events(events: Sequence[tuple[int, int]]) -> bytes:
    """Return what Nikon's GetEvent answers: a count, then code and parameter of each."""
    return struct.pack("<H", len(events)) + b"".join(struct.pack("<HI", code, param) for code, param in events)
