"""The configuration: YAML, environment and command line in, one frozen tree out, or all that is wrong at once.

What is wrong is said in sentences with the place, the key, the value and what is allowed. Values that may hold
secrets (the URLs and the command of alerts) are never shown.
"""

from __future__ import annotations

import difflib
import ipaddress
import os
import re
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import time
from functools import reduce
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, TypeAlias, Union, get_args, get_origin

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PlainValidator,
    StringConstraints,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

if TYPE_CHECKING:
    from hotpixd.alerts import AlertSettings
    from hotpixd.core.sensor import DetectionSettings
    from hotpixd.intake.camera import CameraSettings
    from hotpixd.intake.directory import DirectorySettings

__all__ = ["Config", "ConfigError", "find_config", "load", "needs_restart", "warnings"]

_FILE_LIMIT = 1 << 20
"""Bytes. A longer file is no configuration but, say, a picture or /dev/zero."""

_FOREIGN_VARIABLES = frozenset(
    (
        "HOTPIXD_BENCHMARK_START",  # benchmarks
        "HOTPIXD_FAILPOINT",  # tests
        "HOTPIXD_LONG",  # tests
        "HOTPIXD_MESSAGE_ID",  # given to the command of alerts, which may start us
        "HOTPIXD_SHARED",  # tests
        "HOTPIXD_TEST_FAULTS",  # tests
    )
)
"""Variables with our prefix that are no keys."""

_PATH_KEYS = frozenset(("directory", "notify_file", "save_to", "socket", "state"))
"""Keys whose values are paths, in whatever section."""

_SECRET = (("alerts", "notify"), ("alerts", "command"))
"""Keys whose values are never shown."""

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")


class ConfigError(Exception):
    """The configuration is wrong.

    Parameters
    ----------
    messages : a sentence for each fault
    """

    def __init__(self, messages: tuple[str, ...]) -> None:
        super().__init__("\n".join(messages))
        self.messages = messages


@dataclass(frozen=True, slots=True)
class _Meant:
    """In an annotation: what is allowed, where bounds and names do not tell."""

    words: str


def _is_path(value: str) -> bool:
    # Absolute by now, as `_located` made it so, unless it is "~nobody" or a URL.
    return value.startswith("/") and "\0" not in value


def _path(value: object) -> Path:
    if isinstance(value, Path | str) and _is_path(str(value)):
        return Path(value)
    raise ValueError


def _times(value: object) -> tuple[time, time]:
    match = re.fullmatch(r"(\d?\d):(\d\d) ?- ?(\d?\d):(\d\d)", value, re.ASCII) if isinstance(value, str) else None
    if match is None:
        raise ValueError
    hour, minute, end_hour, end_minute = map(int, match.groups())
    start, end = time(hour, minute), time(end_hour, end_minute)
    if start == end:
        raise ValueError
    return start, end


def _port(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError
    if value == "auto" or re.fullmatch(r"usb:\d{3},\d{3}", value, re.ASCII):
        return value
    # libgphoto2 resolves no names, and knows no IPv6.
    match = re.fullmatch(r"ptpip:([0-9.]+)((:\d{1,5}){0,2})", value, re.ASCII)
    if match is None or any(not 0 < int(port) < 65536 for port in match[2].split(":")[1:]):
        raise ValueError
    ipaddress.IPv4Address(match[1])
    return value


def _template(value: object) -> str:
    from hotpixd.intake.naming import check_template

    if not isinstance(value, str):
        raise ValueError
    check_template(value)
    return value


def _name_pattern(value: object) -> str:
    from hotpixd.intake.files import check_pattern

    if not isinstance(value, str):
        raise ValueError
    check_pattern(value)
    return value


def _address(value: object) -> str:
    match = re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[0-9.]+):(\d{1,5})", value, re.ASCII) if isinstance(value, str) else None
    if match is None or not 0 < int(match[2]) < 65536:
        raise ValueError
    ipaddress.ip_address(match[1].strip("[]"))
    return match[0]


_FilePath: TypeAlias = Annotated[Path, PlainValidator(_path), _Meant("a path")]
_Text: TypeAlias = Annotated[str, StringConstraints(min_length=1)]
_NotifyUrl: TypeAlias = Annotated[
    str, StringConstraints(pattern=rf"^{_URL.pattern}"), _Meant("a URL such as ntfy://ntfy.sh/topic")
]
_QuietHours: TypeAlias = Annotated[
    tuple[time, time], PlainValidator(_times), _Meant('two times of day such as "22:00-07:00"')
]
_Listen: TypeAlias = Annotated[
    str, PlainValidator(_address), _Meant('a numeric address with a port, such as "127.0.0.1:9469" or "[::1]:9469"')
]
_Port: TypeAlias = Annotated[
    str,
    PlainValidator(_port),
    _Meant('auto, or a port such as "usb:001,005" or "ptpip:192.168.1.1" (a numeric IPv4 address)'),
]
_Template: TypeAlias = Annotated[
    str,
    PlainValidator(_template),
    _Meant(
        'a path below save_to such as "{date:%Y-%m-%d}/{name}", made of {name}, {stem}, {ext}, {date}, {make}, {model},'
        " {serial}, with {name} or {stem} in it"
    ),
]
_NamePattern: TypeAlias = Annotated[
    str,
    PlainValidator(_name_pattern),
    _Meant('a pattern for the name of a file or folder, without "/", such as "keogram*"'),
]
_Topic: TypeAlias = Literal[
    "stable", "recovered", "source", "silence", "refused", "scene", "disk", "checkpoint", "clock", "damage"
]
_Kind: TypeAlias = Literal["hot", "warm", "bright", "stuck", "dead", "dim", "unstable"]


class _Section(BaseModel):
    # Strict: with true for a number, or "no" for a text, something else was meant.
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, hide_input_in_errors=True)

    @model_validator(mode="before")
    @classmethod
    def _null_is_the_default(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {key: value for key, value in values.items() if value is not None or key not in cls.model_fields}


class SourceSection(_Section):
    """A directory to watch."""

    directory: _FilePath
    """A card's mount point, a tether folder, or a folder of such; absolute. It need not be there yet."""

    kind: Literal["auto", "light", "dark"] = "auto"
    """What its shots are; auto: the file's header or samples say."""

    camera: _Text | None = None
    """Name for a camera whose files hold no serial number. None: such files count as of one camera per model."""

    ignore: Annotated[tuple[_NamePattern, ...], Field(strict=False)] = ()
    """Shell patterns: files of such a name below the directory, and folders with all in them, are no shots."""

    settle_s: Annotated[float, Field(ge=0.1, le=600)] = 1.0
    """A file is complete when it has not changed for so long, where no event says so earlier."""

    scan_every_s: Annotated[float | None, Field(ge=0.1, le=86400)] = None
    """Between two listings of the directory. None: chosen by its file system."""

    events: bool = True
    """Whether the kernel's events make it sooner."""

    def settings(self) -> DirectorySettings:
        """Return what the watcher of this directory takes."""
        # Within: neither watchdog nor numpy is needed to check a configuration.
        from hotpixd.core.frame import ShotKind
        from hotpixd.intake.directory import DirectorySettings

        return DirectorySettings(
            directory=self.directory,
            kind=None if self.kind == "auto" else ShotKind(self.kind),
            camera=self.camera,
            ignore=self.ignore,
            settle_s=self.settle_s,
            scan_every_s=self.scan_every_s,
            use_events=self.events,
        )


class CameraSection(_Section):
    """Cameras to tether."""

    port: _Port = "auto"
    """auto: every camera on USB, as they come and go; else one port of libgphoto2."""

    kind: Literal["auto", "light", "dark"] = "auto"
    """What its shots are; auto: the file's header or samples say."""

    save_to: _FilePath | None = None
    """Folder for the photos. None: they stay on the card, and in the state as long as it needs them."""

    save_as: _Template = "{name}"
    """Path below that folder. No file is ever overwritten."""

    delete: bool = False
    """Whether files are deleted from the card once they are safe, saved and listed anew."""

    existing: Literal["fetch", "leave", "later"] = "fetch"
    """What is done with files that are on the card when the camera comes for the first time: ever, or for later, since
    the daemon was started."""

    verify_after_s: Annotated[float, Field(ge=0.5, le=86400)] = 60.0
    """Quiet time after shots, until the card is listed anew for those of which the camera did not tell."""

    hang_s: Annotated[float, Field(ge=2, le=3600)] = 30.0
    """Time without any success after which the connection is made anew."""

    def settings(self) -> CameraSettings:
        """Return what tethers these cameras."""
        from hotpixd.core.frame import ShotKind
        from hotpixd.intake.album import Album
        from hotpixd.intake.camera import CameraSettings

        return CameraSettings(
            port=self.port,
            kind=None if self.kind == "auto" else ShotKind(self.kind),
            album=None if self.save_to is None else Album(self.save_to, self.save_as),
            delete=self.delete,
            existing=self.existing,
            verify_after_s=self.verify_after_s,
            hang_s=self.hang_s,
        )


class DetectionSection(_Section):
    """What it takes to call a site defective; see `core.sensor.DetectionSettings`."""

    alpha: Annotated[float, Field(gt=0, le=0.5)] = 0.01
    """Chance that any defect ever declared stable on a sensor is false."""

    min_frames: Annotated[int, Field(ge=1, le=10_000)] = 4
    """Counted frames before anything is stable."""

    floor_sigma: Annotated[float, Field(ge=0, le=100)] = 3.0
    """Least excess that matters, in sigma of a single frame's noise; below it a defect is warm."""

    scene_lift_raw: Annotated[float, Field(gt=1, le=1000)] = 3.5
    """A light frame that repeats the extremes of an earlier one more often than this times chance is not counted."""

    scene_lift_rendered: Annotated[float, Field(gt=1, le=1000)] = 2.5
    """The same for rendered pictures."""

    scene_memory: Annotated[int, Field(ge=1, le=64)] = 8
    """Counted light frames a new one is compared with."""

    spread_limit: Annotated[float, Field(gt=0, le=1)] = 0.12
    """Mean excess of the adjacent sites over a site's own, above which it is a point source."""

    epoch_frames: Annotated[int, Field(ge=10, le=1_000_000)] = 1000
    """Counted frames after which the evidence of sites not yet stable starts anew."""

    def settings(self) -> DetectionSettings:
        """Return what the core takes."""
        # Within: the kernels of core take a second to import.
        from hotpixd.core.sensor import DetectionSettings

        return DetectionSettings(**self.model_dump())


class CheckpointSection(_Section):
    """How often the statistic is written. Nothing is lost in between: a crash costs folding again."""

    every_s: Annotated[float, Field(ge=1, le=86400)] = 60.0
    """Folding time after which."""

    every_shots: Annotated[int, Field(ge=1, le=1_000_000)] = 1024
    """Shots after which."""

    idle_s: Annotated[float, Field(ge=1, le=86400)] = 30.0
    """Time without a shot after which."""


class FeedSection(_Section):
    """The socket at which dashboard and status ask."""

    socket: _FilePath | None = None
    """Where it is. None: in the runtime directory."""

    group: _Text | None = None
    """Name of the group that may connect. None: the daemon's own."""


class AlertsSection(_Section):
    """Who is told what, and when."""

    notify: Annotated[tuple[_NotifyUrl, ...], Field(strict=False, repr=False)] = ()
    """Apprise URLs, those of `notify_file` among them."""

    notify_file: _FilePath | None = None
    """File with more URLs, one a line."""

    command: Annotated[tuple[_Text, ...], Field(strict=False, repr=False)] = ()
    """Program and arguments that take a message as JSON on stdin. Empty: none."""

    topics: Annotated[frozenset[_Topic], Field(strict=False)] = frozenset(get_args(_Topic))
    """Which alerts are sent."""

    kinds: Annotated[frozenset[_Kind], Field(strict=False)] = frozenset(get_args(_Kind)) - {"warm"}
    """Kinds of defects that alert."""

    min_excess_sigma: Annotated[float, Field(ge=0, le=10_000)] = 0.0
    """Excess below which no defect alerts, in sigma of a single frame's noise."""

    gather_s: Annotated[float, Field(ge=0, le=3600)] = 30.0
    """Alerts of this long go into one message."""

    quiet_hours: _QuietHours | None = None
    """From when to when messages wait, local time; may pass midnight."""

    give_up_after_h: Annotated[float, Field(gt=0, le=8760)] = 72.0
    """Hours after which a message that cannot be delivered is given up."""

    disk_free_mb: Annotated[float, Field(ge=0, le=1e9)] = 500.0
    """Free space below which an alert is raised; MB. 0: never."""

    silence_times: Annotated[float, Field(ge=0, le=1000)] = 5.0
    """Usual intervals without a shot after which an alert is raised, while a shoot is on. 0: never."""

    silence_least_s: Annotated[float, Field(ge=0, le=86_400)] = 600.0
    """Seconds without a shot before which none is."""

    checkpoint_after_min: Annotated[float, Field(ge=0, le=100_000)] = 60.0
    """Minutes that a shot may be without a checkpoint that covers it. 0: no alert about that."""

    clock_step_s: Annotated[float, Field(ge=0, le=1e9)] = 60.0
    """Jump of this computer's clock above which an alert is raised; s. 0: never."""

    def settings(self) -> AlertSettings:
        """Return what sends the alerts takes."""
        from hotpixd.alerts import AlertSettings

        return AlertSettings(**{name: getattr(self, name) for name in type(self).model_fields if name != "notify_file"})


class MetricsSection(_Section):
    """Numbers for Prometheus."""

    listen: _Listen | None = None
    """Address and port of their HTTP server. None: there is none."""


class Config(_Section):
    """All that can be set."""

    state: _FilePath | None = None
    """State directory. None: $STATE_DIRECTORY, else the user's."""

    cores: Annotated[int | None, Field(ge=1, le=256)] = None
    """Threads for decoding and folding. None: all of the machine, at most 4."""

    statistic: Literal["memory", "disk"] = "memory"
    """Where sums and counts are while it runs."""

    jpeg: Literal["rgb", "luma"] = "rgb"
    """What of JPEGs is folded."""

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """What is logged: this and worse."""

    sources: Annotated[tuple[SourceSection, ...], Field(strict=False)] = ()
    """What is watched."""

    cameras: Annotated[tuple[CameraSection, ...], Field(strict=False)] = ()
    """What is tethered."""

    detection: DetectionSection = DetectionSection()
    checkpoint: CheckpointSection = CheckpointSection()
    feed: FeedSection = FeedSection()
    alerts: AlertsSection = AlertsSection()
    metrics: MetricsSection = MetricsSection()

    @field_validator("sources")
    @classmethod
    def _apart(cls, sources: tuple[SourceSection, ...]) -> tuple[SourceSection, ...]:
        for index, source in enumerate(sources):
            for earlier, other in enumerate(sources[:index]):
                if source.directory.is_relative_to(other.directory) or other.directory.is_relative_to(source.directory):
                    words = (
                        f"sources[{index}].directory must lie apart from sources[{earlier}].directory "
                        f"{_shown(str(other.directory))}, got {_shown(str(source.directory))}."
                    )
                    raise PydanticCustomError("overlap", "{words}", {"words": words, "index": index})
        return sources

    @field_validator("cameras")
    @classmethod
    def _one_each(cls, cameras: tuple[CameraSection, ...]) -> tuple[CameraSection, ...]:
        for index, camera in enumerate(cameras):
            if camera.delete and camera.save_to is None:
                words = (
                    f"cameras[{index}].delete needs save_to: without a folder that they are saved in, the photos"
                    " would be nowhere any more."
                )
                raise PydanticCustomError("overlap", "{words}", {"words": words, "index": index})
            if camera.save_as != "{name}" and camera.save_to is None:
                words = f"cameras[{index}].save_as needs save_to: the folder that its path is below."
                raise PydanticCustomError("overlap", "{words}", {"words": words, "index": index})
            for earlier, other in enumerate(cameras[:index]):
                one, two = camera.port, other.port
                # All on USB are those of auto.
                on_usb = {port.partition(":")[0] for port in (one, two)}
                if one == two or on_usb == {"usb", "auto"}:
                    why = "" if one == two else "; auto takes all on USB"
                    words = (
                        f"cameras[{index}].port must be another than that of cameras[{earlier}], {_shown(two)}, got"
                        f" {_shown(one)}{why}."
                    )
                    raise PydanticCustomError("overlap", "{words}", {"words": words, "index": index})
        return cameras


def find_config(environ: Mapping[str, str]) -> Path | None:
    """Return the configuration file of a service, of the user, or of the machine: the first that exists."""
    folders = []
    if given := environ.get("CONFIGURATION_DIRECTORY", "").split(":")[0]:
        folders.append(Path(given, "hotpixd.yaml"))
    user = environ.get("XDG_CONFIG_HOME") or Path(environ.get("HOME") or Path.home(), ".config")
    folders += [Path(user, "hotpixd", "config.yaml"), Path("/etc/hotpixd/hotpixd.yaml")]
    # Not Path.exists: that raises where it may not look.
    return next((path for path in folders if os.path.exists(path)), None)  # noqa: PTH110


def load(path: Path | None, *, environ: Mapping[str, str], overrides: Mapping[str, object]) -> Config:
    """Read the configuration: the command line wins over the environment, that over the file, that over defaults.

    Relative paths are taken from the file's folder; in the environment and on the command line from the working
    directory.

    Parameters
    ----------
    path : the YAML file; None: there is none
    environ : variables HOTPIXD_<SECTION>__<KEY> are parsed as YAML; one that is no YAML is text
    overrides : values of the command line by dotted key; None: not given

    Raises
    ------
    ConfigError
        With a sentence for everything that is wrong.
    """
    return _drafted(path, environ, overrides).config()


def warnings(config: Config, path: Path | None) -> list[str]:
    """Return sentences about what is allowed but may not be wanted, here and now.

    Parameters
    ----------
    path : the file it was loaded from, if there was one
    """
    return [
        *_source_warnings(config),
        *_camera_warnings(config),
        *_alert_warnings(config, path),
        *_access_warnings(config),
    ]


def needs_restart(old: Config, new: Config) -> tuple[str, ...]:
    """Return the dotted keys that differ and take effect at the next start only."""
    at_start = ("state", "cores", "statistic", "jpeg", "detection", "feed", "metrics")
    changed = (key for key in _keys() if key[0] in at_start and reduce(getattr, key, old) != reduce(getattr, key, new))
    return tuple(map(".".join, changed))


def _source_warnings(config: Config) -> Iterator[str]:
    for source in config.sources:
        if not os.path.isdir(source.directory):  # noqa: PTH112 - Path's raises where it may not look
            what = "is not a directory" if os.path.lexists(source.directory) else "is not there"
            yield f"the source {_shown(str(source.directory))} {what} now; it will be waited for."


def _camera_warnings(config: Config) -> Iterator[str]:
    for camera in config.cameras:
        if camera.save_to is not None and not os.path.isdir(camera.save_to):  # noqa: PTH112
            folder = _shown(str(camera.save_to))
            yield f"the folder {folder} of save_to is not there now; it is not made, but waited for."


def _alert_warnings(config: Config, path: Path | None) -> Iterator[str]:
    alerts = config.alerts
    if alerts.notify and path is not None and _everybody_reads(path):
        from hotpixd.alerts import holds_secret

        text = path.read_text(encoding="utf-8", errors="replace")
        if any(url in text and holds_secret(url) for url in alerts.notify):
            yield (
                f"alerts.notify holds passwords or tokens, and everybody on this machine can read {path}: "
                "put those URLs into a file of their own and name it as alerts.notify_file."
            )
    if alerts.notify_file is not None and _everybody_reads(alerts.notify_file):
        yield f"everybody on this machine can read {alerts.notify_file}: chmod o-r."
    if alerts.command and shutil.which(alerts.command[0]) is None:
        yield "the program of alerts.command is not found here."


def _access_warnings(config: Config) -> Iterator[str]:
    import grp

    if config.feed.group is not None:
        try:
            grp.getgrnam(config.feed.group)
        except KeyError:
            yield f"the group {config.feed.group!r} of feed.group is not known here."
    if config.metrics.listen is not None:
        address = config.metrics.listen.rpartition(":")[0].strip("[]")
        if not ipaddress.ip_address(address).is_loopback:
            yield f"everybody in the network can read the numbers that metrics.listen serves at {address}."


def _everybody_reads(path: Path) -> bool:
    return bool(path.stat().st_mode & stat.S_IROTH)


# Layers: file, environment and command line are put over one another as plain values, each with its place.

_Key: TypeAlias = tuple[str | int, ...]


class _Place(NamedTuple):
    """Where a value was given."""

    label: str
    """File, variable, or "command line"."""

    line: int = 0
    """From 1; 0 if the label says it all."""

    column: int = 0

    def __str__(self) -> str:
        column = f", column {self.column}" if self.column else ""
        return f"{self.label}, line {self.line}{column}" if self.line else self.label


@dataclass(slots=True)
class _Draft:
    """Values that were given, before anyone has judged them."""

    values: dict[str, Any] = field(default_factory=dict)
    places: dict[_Key, _Place] = field(default_factory=dict)
    faults: list[tuple[_Place, str]] = field(default_factory=list)

    def place(self, key: _Key) -> _Place:
        """Return where a value was given, or else what it belongs to."""
        while key and key not in self.places:
            key = key[:-1]
        return self.places.get(key, _Place("configuration"))

    def put(self, key: tuple[str, ...], value: Any, place: _Place) -> None:
        """Put a value over what was given for the key so far."""
        at = self.values
        for section in key[:-1]:
            if at.get(section) is None:
                at[section] = {}
            at = at[section]
            if not isinstance(at, dict):
                # The file is wrong there, and that is said anyway.
                return
        at[key[-1]] = value
        self.places = {old: where for old, where in self.places.items() if old[: len(key)] != key}
        self.places[key] = place

    def config(self) -> Config:
        """Judge the values; everything that is wrong is raised at once."""
        config = Config()
        try:
            config = Config.model_validate(self.values)
        except ValidationError as error:
            for fault in error.errors(include_url=False):
                key = (*fault["loc"], *([fault["ctx"]["index"]] if fault["type"] == "overlap" else []))
                sentence = _sentence(fault["type"], key, fault["input"], fault["msg"])
                self.faults.append((self.place(key), sentence))
        if self.faults:
            raise ConfigError(tuple(f"{place}: {sentence}" for place, sentence in sorted(self.faults)))
        return config

    def text(self, path: Path, place: _Place) -> str:
        """Return the text of a file; empty, and a fault, if it cannot be had."""
        try:
            with path.open("rb") as file:
                content = file.read(_FILE_LIMIT + 1)
            if len(content) <= _FILE_LIMIT:
                return content.decode("utf-8-sig")
            reason = f"is longer than {_FILE_LIMIT} bytes"
        except OSError as error:
            reason = f"cannot be read: {error.strerror}"
        except UnicodeDecodeError as error:
            reason = f"is not UTF-8 at byte {error.start}"
        subject = "this file" if place.label == str(path) else f"the file {_shown(str(path))}"
        self.faults.append((place, f"{subject} {reason}."))
        return ""


def _drafted(path: Path | None, environ: Mapping[str, str], overrides: Mapping[str, object]) -> _Draft:
    draft = _Draft()
    here = Path()
    credentials = environ.get("CREDENTIALS_DIRECTORY")
    if path is not None:
        reader = _Reader(str(path))
        values = reader.value_of(draft.text(path, _Place(str(path))))
        draft.faults += reader.faults
        if isinstance(values, dict):
            draft.values = _located(values, path.absolute().parent, credentials)
            draft.places = reader.places
        elif values is not None:
            draft.faults.append((_Place(str(path)), _sentence("", (), values)))
    variables = {"HOTPIXD_" + "__".join(key).upper(): key for key in _keys()}
    for name, key in variables.items():
        if name in environ:
            reader = _Reader(name, yaml_only=False)
            draft.put(key, _located(reader.value_of(environ[name]), here, credentials, key[-1]), _Place(name))
            draft.faults += reader.faults
    for name in environ:
        if name.startswith("HOTPIXD_") and name not in variables and name not in _FOREIGN_VARIABLES:
            draft.faults.append((_Place(name), f"there is no key for this variable{_did_you_mean(name, variables)}"))
    for dotted, value in overrides.items():
        if value is not None:
            key = tuple(dotted.split("."))
            draft.put(key, _located(value, here, credentials, key[-1]), _Place("command line"))
    _read_notify_file(draft)
    return draft


def _located(value: Any, folder: Path, credentials: str | None, key: str = "") -> Any:
    """Make the paths among some values absolute; a notify_file with a plain name may be a credential of systemd."""
    if isinstance(value, dict):
        return {name: _located(inner, folder, credentials, name) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_located(inner, folder, credentials) for inner in value]
    if isinstance(value, Path):
        return os.path.abspath(folder / value)  # noqa: PTH100 - Path.absolute keeps ".."
    # A URL where a path belongs is left to be refused, without its secrets.
    if key not in _PATH_KEYS or not isinstance(value, str) or not value or _URL.match(value):
        return value
    if credentials and key == "notify_file" and "/" not in value and os.path.exists(f"{credentials}/{value}"):  # noqa: PTH110
        return str(Path(credentials, value))
    expanded = os.path.expanduser(value)  # noqa: PTH111 - Path's raises where there is no such user
    return expanded if expanded.startswith("~") else os.path.abspath(folder / expanded)  # noqa: PTH100


def _read_notify_file(draft: _Draft) -> None:
    """Put the URLs of the notify_file behind those given."""
    alerts = draft.values.get("alerts")
    if not isinstance(alerts, dict):
        return
    name, urls = alerts.get("notify_file"), alerts.get("notify") or []
    if not (isinstance(name, str) and _is_path(name) and isinstance(urls, list)):
        return
    urls = list(urls)
    for number, line in enumerate(draft.text(Path(name), draft.place(("alerts", "notify_file"))).splitlines(), 1):
        if line.strip() and not line.lstrip().startswith("#"):
            draft.places["alerts", "notify", len(urls)] = _Place(name, number)
            urls.append(line.strip())
    alerts["notify"] = urls


class _Loader(yaml.SafeLoader):
    """Parses, but does not say what words mean: YAML 1.1 takes 22:00 for 1320, 0123 for 83 and 1e-3 for a text."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 - as in the base class

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        what = "aliases (*)" if isinstance(event, yaml.AliasEvent) else "tags (!)" if event.tag else None
        if what:
            raise yaml.composer.ComposerError(problem=f"{what} are not understood here", problem_mark=event.start_mark)
        return super().compose_node(parent, index)


_WORDS = {"": None, "~": None, "null": None} | dict.fromkeys(("true", "yes", "on"), True)
_WORDS |= dict.fromkeys(("false", "no", "off"), False)
_INTEGER = re.compile(r"[+-]?(0|[1-9][0-9]{0,14})")
_NUMBER = re.compile(r"[+-]?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?")


class _Reader:
    """Turns YAML into plain values, and remembers where each one is."""

    def __init__(self, label: str, *, yaml_only: bool = True) -> None:
        self.places: dict[_Key, _Place] = {}
        self.faults: list[tuple[_Place, str]] = []
        self._label = label
        self._yaml_only = yaml_only

    def value_of(self, text: str) -> Any:
        """Return what a text says; if it is no YAML that is a fault, or else (a variable) it is plain text."""
        try:
            root = yaml.compose(text, _Loader)
            return None if root is None else self._value(root, ())
        except RecursionError:
            self.faults.append((_Place(self._label), "this is nested too deeply."))
        except yaml.YAMLError as error:
            if not self._yaml_only:
                return text
            self.faults.append(self._not_yaml(error, text))
        return None

    def _not_yaml(self, error: yaml.YAMLError, text: str) -> tuple[_Place, str]:
        if isinstance(error, yaml.reader.ReaderError):
            before = text[: error.position]
            place = _Place(self._label, before.count("\n") + 1, error.position - before.rfind("\n"))
            return place, f"this is no plain YAML: the character U+{ord(text[error.position]):04X} is not allowed."
        assert isinstance(error, yaml.MarkedYAMLError)
        # Without the lines around, and without names from them: they may hold secrets.
        words = re.sub(r" '[^'<\\]{2,}'", "", ", ".join(filter(None, (error.context, error.problem))))
        return self._place(error.problem_mark or error.context_mark), f"this is no plain YAML: {words}."

    def _place(self, mark: yaml.Mark | None) -> _Place:
        return _Place(self._label, mark.line + 1, mark.column + 1) if mark and self._yaml_only else _Place(self._label)

    def _value(self, node: yaml.Node, key: _Key) -> Any:
        place = self._place(node.start_mark)
        self.places.setdefault(key, place)
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, key)
        if isinstance(node, yaml.SequenceNode):
            return [self._value(inner, (*key, index)) for index, inner in enumerate(node.value)]
        assert isinstance(node, yaml.ScalarNode)
        return self._scalar(node, place)

    def _mapping(self, node: yaml.MappingNode, key: _Key) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for name_node, value_node in node.value:
            place = self._place(name_node.start_mark)
            if not isinstance(name_node, yaml.ScalarNode):
                self.faults.append((place, "a key must be a word, got a list or a section."))
                continue
            name = str(self._text(name_node.value, place))
            if name in values:
                self.faults.append((place, f"{_dotted((*key, name))} is there twice."))
                continue
            self.places.setdefault((*key, name), place)
            values[name] = self._value(value_node, (*key, name))
        return values

    def _scalar(self, node: yaml.ScalarNode, place: _Place) -> Any:
        text = self._text(node.value, place)
        # Within quotes everything is text.
        if node.style is not None:
            return text
        if text.lower() in _WORDS:
            return _WORDS[text.lower()]
        if _INTEGER.fullmatch(text):
            return int(text)
        return float(text) if _NUMBER.fullmatch(text) else text

    def _text(self, text: str, place: _Place) -> str:
        if any("\ud800" <= character <= "\udfff" for character in text):
            self.faults.append((place, "half a character (U+D800 to U+DFFF) is no text."))
            return ""
        return text


# What is said to people.

_TEXT = "a non-empty text"


def _keys(section: type[_Section] = Config, above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Go through the keys of the tree, those within lists left out."""
    for name, inner in section.model_fields.items():
        if isinstance(inner.annotation, type) and issubclass(inner.annotation, _Section):
            yield from _keys(inner.annotation, (*above, name))
        else:
            yield (*above, name)


def _sentence(fault: str, key: _Key, value: object, message: str = "") -> str:
    """Say what is wrong with a value, by the kind of fault that pydantic names."""
    match fault:
        case "overlap":
            return message
        case "extra_forbidden":
            return f"{_dotted(key)} is no key{_did_you_mean(str(key[-1]), _expected(key[:-1])[0].model_fields, key)}"
        case "missing":
            return f"{_dotted(key)} is missing; it must be {_allowed(*_expected(key))}."
    annotation, metadata = _expected(key)
    allowed = _allowed(annotation, metadata)
    quotes = "; put it in quotes" if allowed == _TEXT and isinstance(value, int | float) else ""
    return f"{_dotted(key)} must be {allowed}, got {_shown(value, key)}{quotes}."


def _did_you_mean(name: str, known: Iterable[str], key: _Key = ()) -> str:
    # Of a variable that names a section only, one of its keys.
    within = [other for other in known if other.startswith(f"{name}__")]
    if close := within or difflib.get_close_matches(name, known, 1):
        return f"; did you mean {close[0]}?"
    if elsewhere := [other for other in _keys() if key and other[-1] == name]:
        return f" here; did you mean {_dotted(elsewhere[0])}?"
    return f"; those known here are {', '.join(known)}." if key else "."


def _dotted(key: _Key) -> str:
    """Return a key as people write it; what stands within a secret value is left out."""
    if key[:2] in _SECRET:
        key = (*key[:2], *(step for step in key[2:3] if isinstance(step, int)))
    text = ""
    for step in key:
        if isinstance(step, int):
            text += f"[{step}]"
        else:
            text += ("." if text else "") + (step if re.fullmatch(r"[\w-]{1,40}", step) else _shown(step))
    return text or "the configuration"


def _shown(value: object, key: _Key = ()) -> str:
    """Return a value as it may be shown: of URLs and structures only their kind."""
    match value:
        case None:
            return "nothing"
        case bool():
            return str(value).lower()
        case dict() | BaseModel():
            return "a section"
        case list() | tuple():
            return "a list"
        case str() if url := _URL.search(value):
            return f"{url[0]}..."
        case _ if key[:2] in _SECRET:
            return "a value that is not shown here, as it may be secret"
        case str() if len(value) > 100:
            return f"{value[:97]!r}..."
    return repr(value)


def _expected(key: _Key) -> tuple[Any, tuple[Any, ...]]:
    """Return type and metadata of what belongs at a key."""
    annotation: Any = Config
    metadata: tuple[Any, ...] = ()
    for step in key:
        if isinstance(step, int):
            annotation, metadata = get_args(annotation)[0], ()
        else:
            inner = annotation.model_fields[step]
            annotation, metadata = inner.annotation, tuple(inner.metadata)
        annotation, metadata = _bare(annotation, metadata)
    return annotation, metadata


def _bare(annotation: Any, metadata: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...]]:
    """Take off "or None" and what is annotated."""
    if get_origin(annotation) in (Union, UnionType):
        annotation = next(kind for kind in get_args(annotation) if kind is not type(None))
    if get_origin(annotation) is Annotated:
        annotation, *more = get_args(annotation)
        metadata += tuple(more)
    return annotation, metadata


def _allowed(annotation: Any, metadata: tuple[Any, ...]) -> str:
    """Say what is allowed where a value of this type belongs."""
    for meant in metadata:
        if isinstance(meant, _Meant):
            return meant.words
    if get_origin(annotation) is Literal:
        return f"one of {', '.join(get_args(annotation))}"
    if get_origin(annotation) in (tuple, frozenset):
        inner, within = _bare(get_args(annotation)[0], ())
        return f"a list, each item {_allowed(inner, within)}"
    if issubclass(annotation, _Section):
        return f"a section with the keys {', '.join(annotation.model_fields)}"
    if annotation in (bool, str):
        return "true or false" if annotation is bool else _TEXT
    words = "a whole number" if annotation is int else "a number"
    bounds = {name: getattr(kind, name) for kind in metadata for name in ("ge", "gt", "le") if hasattr(kind, name)}
    low = f"above {bounds['gt']:.15g}, up" if "gt" in bounds else f"from {bounds['ge']:.15g}"
    return f"{words} {low} to {bounds['le']:.15g}"
