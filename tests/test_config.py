"""The configuration: what is given where, and sentences about everything that is wrong."""

from __future__ import annotations

import dataclasses
import os
import pickle
import re
import subprocess
import sys
from datetime import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

import hotpixd
from hotpixd.config import CameraSection, Config, ConfigError, SourceSection, find_config, load, needs_restart, warnings
from hotpixd.intake.album import Album

EXAMPLE = Path(__file__).parents[1] / "config.example.yaml"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where the configuration is written; only its owner can read it."""
    path = tmp_path / "hotpixd.yaml"
    path.touch(0o600)
    return path


def loaded(path: Path, text: str, environ: dict[str, str] | None = None, **overrides: object) -> Config:
    """Write a configuration and load it."""
    path.write_text(text, encoding="utf-8")
    return load(path, environ=environ or {}, overrides=overrides)


def faults(path: Path, text: str, environ: dict[str, str] | None = None, **overrides: object) -> list[str]:
    """Write a configuration and return what is said to be wrong with it, the file's name left out."""
    with pytest.raises(ConfigError) as error:
        loaded(path, text, environ, **overrides)
    assert str(error.value).splitlines() == list(error.value.messages)
    return [message.removeprefix(f"{path}, ").removeprefix(f"{path}: ") for message in error.value.messages]


def keys(section: Any, above: str = "") -> list[str]:
    """Return the dotted keys of a section as they are indented: "detection.alpha"."""
    found: list[str] = []
    for name, value in section:
        found += [f"{above}{name}"] if not isinstance(value, BaseModel) else keys(value, f"{above}{name}.")
    return found


# Defaults and the example


def test_the_example_holds_the_defaults():
    """What users copy changes nothing until they change it."""
    assert load(EXAMPLE, environ={}, overrides={}) == Config()


def test_the_example_names_every_key_and_no_other():
    """A key that is not documented does not exist for users."""
    tree = yaml.safe_load(EXAMPLE.read_text(encoding="utf-8"))
    named = [f"{top}.{key}" if isinstance(tree[top], dict) else top for top in tree for key in (tree[top] or [""])]
    assert set(named) == set(keys(Config()))


def block(text: str, key: str) -> str:
    """Return the list that stands in the example behind comment signs, to its end or to the prose behind it."""
    return re.split(r"\n#?\n(?!#   -)", text[text.index(f"# {key}:") :], maxsplit=1)[0]


def test_the_source_of_the_example_is_right_once_the_comment_signs_are_gone(path: Path):
    """It names every key of a source with its default, save the directory."""
    text = EXAMPLE.read_text(encoding="utf-8")
    bare = re.sub(r"^# ?", "", block(text, "sources"), flags=re.MULTILINE)
    config = loaded(path, bare)
    first, second = config.sources
    assert first == SourceSection(directory=Path("/media/card"))
    assert set(yaml.safe_load(bare)["sources"][0]) == set(SourceSection.model_fields)
    assert (second.directory, second.kind) == (Path("~/Pictures/darks").expanduser(), "dark")


def test_the_cameras_of_the_example_are_right_once_the_comment_signs_are_gone(path: Path):
    """The first names every key with its default, and the bounds of its numbers; and no line of it is too long."""
    text = EXAMPLE.read_text(encoding="utf-8")
    bare = re.sub(r"^# ?", "", block(text, "cameras"), flags=re.MULTILINE)
    first, second = loaded(path, bare).cameras
    assert first == CameraSection()
    assert set(yaml.safe_load(bare)["cameras"][0]) == set(CameraSection.model_fields)
    assert second.port == "ptpip:192.168.1.1"
    assert second.save_to == Path("~/Pictures/tethered").expanduser()
    for name, low, high in (("verify_after_s", "0.5", "86400"), ("hang_s", "2", "3600")):
        assert f"{low} to {high}" in bare.partition(f"{name}:")[2][:200]
    for word in ("fetch", "leave", "later", "overwritten", "ReadWritePaths=", "systemctl edit hotpixd"):
        assert word in text
    assert max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize("key", keys(Config()))
def test_the_example_states_the_bounds_of_every_number(key: str):
    """They stand in the comment above the key, or in its line, in the words of the model."""
    above, _, name = key.rpartition(".")
    metadata = type(getattr(Config(), above) if above else Config()).model_fields[name].metadata
    text = EXAMPLE.read_text(encoding="utf-8")
    before, _, after = text.partition(f"\n  {name}:" if "." in key else f"\n{name}:")
    paragraph = before.rpartition("\n\n")[2] + after.partition("\n")[0]
    for bound in metadata:
        for limit in ("ge", "gt", "le"):
            if hasattr(bound, limit):
                assert re.search(rf"(?<![\d.]){getattr(bound, limit):.15g}(?![\d.]*\d)", paragraph), (limit, paragraph)


@pytest.mark.parametrize(
    "text", ["", "# nothing\n", "---\n", "{}", "detection:\nalerts:\nsources:\n", "cores: null\nalerts: {notify: }\n"]
)
def test_what_is_not_given_has_its_default(path: Path, text: str):
    """An empty file, a section without keys, a key without value."""
    assert loaded(path, text) == Config()


def test_without_a_file_there_are_the_defaults():
    """`hotpixd watch DIR` needs none."""
    assert load(None, environ={"PATH": "/bin"}, overrides={}) == Config()


def test_the_defaults_of_detection_are_those_of_the_core():
    """Names and values: one of them changed alone is an error here."""
    from hotpixd.core.sensor import DetectionSettings

    assert Config().detection.settings() == DetectionSettings()
    assert set(type(Config().detection).model_fields) == {field.name for field in dataclasses.fields(DetectionSettings)}


def test_the_defaults_of_alerts_are_those_of_the_sender():
    """The same for what sends alerts."""
    alerts = pytest.importorskip("hotpixd.alerts")
    assert Config().alerts.settings() == alerts.AlertSettings()


def test_a_source_becomes_what_the_watcher_takes(path: Path):
    """With "auto" as no kind at all."""
    pytest.importorskip("hotpixd.intake.directory")
    text = "sources: [{directory: /a}, {directory: /b, kind: dark, camera: X, ignore: [thumbs, keo*], events: no}]"
    config = loaded(path, text)
    first, second = (source.settings() for source in config.sources)
    assert (first.directory, first.kind, first.camera, first.use_events) == (Path("/a"), None, None, True)
    assert (second.kind, second.camera, second.use_events) == ("dark", "X", False)
    assert (first.ignore, second.ignore) == ((), ("thumbs", "keo*"))


def test_a_camera_becomes_what_tethers_it(path: Path, tmp_path: Path):
    """Defaults and all; a folder for photos is taken from the file's folder, as all its paths are."""
    from hotpixd.intake.camera import CameraSettings

    assert CameraSection().settings() == CameraSettings()
    text = """
cameras:
  - {port: "usb:001,005", kind: dark, save_to: photos, save_as: "{stem}-{serial}.{ext}", delete: yes, existing: leave,
     verify_after_s: 5, hang_s: 1e1}
  - {port: "ptpip:192.168.1.1:15740:15740", save_to: ~/x/../y}
"""
    first, second = (camera.settings() for camera in loaded(path, text).cameras)
    assert (first.port, first.kind, first.delete, first.existing) == ("usb:001,005", "dark", True, "leave")
    assert (first.verify_after_s, first.hang_s) == (5.0, 10.0)
    assert first.album == Album(tmp_path / "photos", "{stem}-{serial}.{ext}")
    assert (second.kind, second.album) == (None, Album(Path("~/y").expanduser(), "{name}"))


# Values


def test_values_are_read(path: Path):
    """Every type of value, as people write it."""
    config = loaded(
        path,
        """
        state: /var/lib/hotpixd
        cores: 3
        log_level: debug
        sources:
          - {directory: /media/card, camera: 0123, settle_s: 2, scan_every_s: 1e1, events: off}
        detection: {alpha: 1e-3}
        feed: {group: "users"}
        alerts:
          notify: [ntfy://ntfy.sh/topic, "mailto://user:pass@host"]
          command: [/bin/notify, "5"]
          topics: [stable]
          kinds: []
          quiet_hours: 22:00-07:30
        metrics: {listen: "[::1]:9469"}
        """,
    )
    source = config.sources[0]
    assert (config.state, config.cores, config.log_level) == (Path("/var/lib/hotpixd"), 3, "debug")
    # Not 83, as YAML 1.1 would have it.
    assert (source.camera, source.settle_s, source.scan_every_s, source.events) == ("0123", 2.0, 10.0, False)
    assert config.detection.alpha == 0.001
    assert config.feed.group == "users"
    assert config.alerts.notify == ("ntfy://ntfy.sh/topic", "mailto://user:pass@host")
    assert config.alerts.command == ("/bin/notify", "5")
    assert (config.alerts.topics, config.alerts.kinds) == (frozenset({"stable"}), frozenset())
    assert config.alerts.quiet_hours == (time(22), time(7, 30))
    assert config.metrics.listen == "[::1]:9469"


def test_the_tree_is_frozen_and_can_be_compared_and_hashed(path: Path):
    """It is handed to several threads; a reload compares."""
    config = loaded(path, "sources: [{directory: /a}]")
    with pytest.raises(ValueError, match="frozen"):
        config.detection.alpha = 0.5  # type: ignore[misc]
    assert config == loaded(path, "sources: [{directory: /a/}]")
    assert len({config, pickle.loads(pickle.dumps(config))}) == 1


def test_paths_are_made_absolute(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """From the file's folder; of the environment and the command line from the working directory."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setenv("HOME", "/home/ann")
    config = loaded(
        path,
        "state: ../state\nsources: [{directory: cards}, {directory: ~/tether/}]\nfeed: {socket: x/../feed.sock}",
        {"HOTPIXD_FEED__SOCKET": "env.sock"},
        state=Path("given"),
    )
    assert config.state == work / "given"
    assert [source.directory for source in config.sources] == [tmp_path / "cards", Path("/home/ann/tether")]
    assert config.feed.socket == work / "env.sock"
    assert loaded(path, "feed: {socket: x/../feed.sock}").feed.socket == tmp_path / "feed.sock"


def test_a_path_that_is_no_utf8_comes_through(path: Path):
    """As the command line and the environment may hold any bytes."""
    name = os.fsdecode(b"/caf\xe9")
    assert loaded(path, "", state=Path(name)).state == Path(name)
    assert loaded(path, "", {"HOTPIXD_STATE": name}).state == Path(name)


# Precedence


def test_command_line_over_environment_over_file_over_defaults(path: Path):
    """Key by key."""
    text = "log_level: error\ncores: 1\ndetection: {alpha: 0.1, min_frames: 9}"
    environ = {"HOTPIXD_LOG_LEVEL": "warning", "HOTPIXD_CORES": "2", "HOTPIXD_DETECTION__ALPHA": "0.2"}
    config = loaded(path, text, environ, log_level="debug", cores=None)
    assert (config.log_level, config.cores) == ("debug", 2)
    assert (config.detection.alpha, config.detection.min_frames, config.detection.floor_sigma) == (0.2, 9, 3.0)


def test_the_command_line_replaces_the_sources(path: Path):
    """`hotpixd watch DIR...` watches these and no others."""
    config = loaded(path, "sources: [{directory: /a}, {directory: /b}]", sources=[{"directory": Path("/c")}])
    assert config.sources == (SourceSection(directory=Path("/c")),)


def test_variables_are_yaml_or_else_text(path: Path):
    """Lists in brackets; an address in brackets is no list; nothing brings the default back."""
    environ = {
        "HOTPIXD_SOURCES": "[{directory: /a, kind: dark}]",
        "HOTPIXD_METRICS__LISTEN": "[::1]:9469",
        "HOTPIXD_ALERTS__NOTIFY": "[ntfy://h/t]",
        "HOTPIXD_CORES": "",
        "HOTPIXD_FAILPOINT": "",
    }
    config = loaded(path, "cores: 3", environ)
    assert config.sources == (SourceSection(directory=Path("/a"), kind="dark"),)
    assert (config.metrics.listen, config.alerts.notify, config.cores) == ("[::1]:9469", ("ntfy://h/t",), None)


def test_a_variable_without_a_key_is_an_error(path: Path):
    """A slip must not go unnoticed. Variables that are not ours are left alone."""
    environ = {"HOTPIXD_DETECTION_ALPHA": "0.1", "HOTPIXD_ALERTS": "{}", "PATH": "/bin", "hotpixd_x": "1"}
    assert faults(path, "", environ) == [
        "HOTPIXD_ALERTS: there is no key for this variable; did you mean HOTPIXD_ALERTS__NOTIFY?",
        "HOTPIXD_DETECTION_ALPHA: there is no key for this variable; did you mean HOTPIXD_DETECTION__ALPHA?",
    ]


def test_errors_name_variable_or_command_line(path: Path):
    """In the place of a line, though the file holds the key too."""
    text = "log_level: info\ndetection: {alpha: 0.1}\nsources: [{directory: /a}]"
    environ = {"HOTPIXD_DETECTION__ALPHA": "2", "HOTPIXD_SOURCES": "[{directory: /a, kind: x}]"}
    assert faults(path, text, environ, log_level="loud") == [
        "HOTPIXD_DETECTION__ALPHA: detection.alpha must be a number above 0, up to 0.5, got 2.",
        "HOTPIXD_SOURCES: sources[0].kind must be one of auto, light, dark, got 'x'.",
        "command line: log_level must be one of debug, info, warning, error, got 'loud'.",
    ]


# Faults


def test_everything_wrong_is_said_at_once_in_order_of_lines(path: Path):
    """With line, column, key, value and what is allowed."""
    text = """\
stat: /x
cores: 0
alpha: 0.1
sources:
  - directory: /media/card
    kind: drak
  - directory: ~nobody-of-this-name/x
    setle_s: 3
  - kind: dark
detection:
  min_frames: 2.5
  epoch_frames: 20
  min_frames: 3
checkpoint: 5
feed: {group: 100}
alerts:
  topics: [stable, disc]
  command: notify-send
  quiet_hours: 22:00-22:00
  gather_s: yes
metrics:
  listen: localhost:80
"""
    topics = "stable, recovered, source, silence, refused, scene, disk, checkpoint, clock, damage"
    assert faults(path, text) == [
        "line 1, column 1: stat is no key; did you mean state?",
        "line 2, column 1: cores must be a whole number from 1 to 256, got 0.",
        "line 3, column 1: alpha is no key here; did you mean detection.alpha?",
        "line 6, column 5: sources[0].kind must be one of auto, light, dark, got 'drak'.",
        "line 7, column 5: sources[1].directory must be a path, got '~nobody-of-this-name/x'.",
        "line 8, column 5: sources[1].setle_s is no key; did you mean settle_s?",
        "line 9, column 5: sources[2].directory is missing; it must be a path.",
        "line 11, column 3: detection.min_frames must be a whole number from 1 to 10000, got 2.5.",
        "line 13, column 3: detection.min_frames is there twice.",
        "line 14, column 1: checkpoint must be a section with the keys every_s, every_shots, idle_s, got 5.",
        "line 15, column 8: feed.group must be a non-empty text, got 100; put it in quotes.",
        f"line 17, column 20: alerts.topics[1] must be one of {topics}, got 'disc'.",
        "line 18, column 3: alerts.command must be a list, each item a non-empty text, got a value that is not shown "
        "here, as it may be secret.",
        "line 19, column 3: alerts.quiet_hours must be two times of day such as \"22:00-07:00\", got '22:00-22:00'.",
        "line 20, column 3: alerts.gather_s must be a number from 0 to 3600, got true.",
        "line 22, column 3: metrics.listen must be a numeric address with a port, such as "
        '"127.0.0.1:9469" or "[::1]:9469", got \'localhost:80\'.',
    ]


def test_an_unknown_key_like_no_other_lists_those_there_are(path: Path):
    """Where nothing can be guessed."""
    assert faults(path, "feed: {port: 80}") == [
        "line 1, column 8: feed.port is no key; those known here are socket, group."
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "a: [1",
            "line 1, column 6: this is no plain YAML: while parsing a flow sequence, expected ',' or ']', but got",
        ),
        ("cores: 1\n\tstate: /x", "line 2, column 1: this is no plain YAML: "),
        ("state: \x01", "line 1, column 8: this is no plain YAML: the character U+0001 is not allowed."),
        ("cores: 1\n---\ncores: 2", "line 2, column 1: this is no plain YAML: expected a single document"),
        ("- cores", "the configuration must be a section with the keys state, cores, "),
        ("[" * 50_000, "this is nested too deeply."),
        (
            "feed: &a {group: x}\nmetrics: *a",
            "line 2, column 10: this is no plain YAML: aliases (*) are not understood here.",
        ),
        ("feed: &a [*a]", "line 1, column 11: this is no plain YAML: aliases (*) are"),
        (
            "cores: !!python/name:os.system 1",
            "line 1, column 8: this is no plain YAML: tags (!) are not understood here.",
        ),
        ("cores: !x 1", "line 1, column 8: this is no plain YAML: tags (!) are not understood here."),
        ("? [a, b]\n: 1", "line 1, column 3: a key must be a word, got a list or a section."),
        ('"\\ud800": 1', "line 1, column 1: half a character (U+D800 to U+DFFF) is no text."),
        ('state: "/a\\0b"', "line 1, column 1: state must be a path, got '/a\\x00b'."),
        ("state: ''", "line 1, column 1: state must be a path, got ''."),
        ("cores: 0x10", "line 1, column 1: cores must be a whole number from 1 to 256, got '0x10'."),
        (f"cores: {'9' * 5000}", "line 1, column 1: cores must be a whole number from 1 to 256, got inf."),
        ("detection: {alpha: .nan}", "line 1, column 13: detection.alpha must be a number above 0, up to 0.5, got"),
        ("alerts: {kinds: {hot: 1}}", "line 1, column 10: alerts.kinds must be a list, each item one of hot, warm"),
        ("alerts: {kinds: [[hot]]}", "line 1, column 18: alerts.kinds[0] must be one of hot, warm"),
        ("alerts: {kinds: [null]}", "line 1, column 18: alerts.kinds[0] must be one of hot, "),
        ("on: 1", "line 1, column 1: on is no key; those known here are state, "),
        ("feed: {group: ''}", "line 1, column 8: feed.group must be a non-empty text, got ''."),
        ("sources: [5]", "line 1, column 11: sources[0] must be a section with the keys directory, "),
        (
            "sources:\n- directory: /a\n  ignore: [keo*, thumbnails/]",
            'line 3, column 18: sources[0].ignore[1] must be a pattern for the name of a file or folder, without "/",',
        ),
        ("sources: [{directory: /a, ignore: ['']}]", "line 1, column 36: sources[0].ignore[0] must be a pattern for"),
        ("sources: [{directory: /a, ignore: [5]}]", "line 1, column 36: sources[0].ignore[0] must be a pattern for"),
        (
            "sources: [{directory: /a, ignore: keo*}]",
            "line 1, column 27: sources[0].ignore must be a list, each item a",
        ),
        ("metrics: {listen: 127.0.0.1:65536}", "line 1, column 11: metrics.listen must be a numeric address"),
        ("metrics: {listen: 127.0.0.256:80}", "line 1, column 11: metrics.listen must be a numeric address"),
    ],
)
def test_a_fault_is_said_at_its_place(path: Path, text: str, said: str):
    """One sentence for one fault, whatever the YAML."""
    sentences = [fault for fault in faults(path, text) if fault.startswith(said)]
    assert len(sentences) == 1, faults(path, text)


@pytest.mark.parametrize(
    ("directories", "said"),
    [
        (("/a", "/a/"), "sources[1].directory must lie apart from sources[0].directory '/a', got '/a'."),
        (("/a", "/b", "/a/b"), "sources[2].directory must lie apart from sources[0].directory '/a', got '/a/b'."),
        (("/a/b", "/c/../a"), "sources[1].directory must lie apart from sources[0].directory '/a/b', got '/a'."),
    ],
)
def test_sources_lie_apart(path: Path, directories: tuple[str, ...], said: str):
    """Else a shot would be met twice, and be dark or light by chance. /a and /ab are apart."""
    text = "sources:\n" + "".join(f"- directory: {directory}\n" for directory in directories)
    assert faults(path, text) == [f"line {len(directories) + 1}, column 3: {said}"]
    loaded(path, "sources: [{directory: /a}, {directory: /ab}]")


TEMPLATES = (
    'a path below save_to such as "{date:%Y-%m-%d}/{name}", made of {name}, {stem}, {ext}, {date}, {make}, {model}, '
    "{serial}, with {name} or {stem} in it"
)
PORTS = 'auto, or a port such as "usb:001,005" or "ptpip:192.168.1.1" (a numeric IPv4 address)'


@pytest.mark.parametrize(
    ("key", "value", "allowed", "got"),
    [
        ("port", "5", PORTS, "5"),
        ("port", "usb", PORTS, "'usb'"),
        ("port", "usb:1,5", PORTS, "'usb:1,5'"),
        ("port", "serial:/dev/ttyS0", PORTS, "'serial:/dev/ttyS0'"),
        ("port", "'ptpip:'", PORTS, "'ptpip:'"),
        ("port", "ptpip:camera.local", PORTS, "'ptpip:camera.local'"),
        ("port", '"ptpip:[::1]"', PORTS, "'ptpip:[::1]'"),
        ("port", "ptpip:192.168.1.256", PORTS, "'ptpip:192.168.1.256'"),
        ("port", "ptpip:192.168.1.1:65536", PORTS, "'ptpip:192.168.1.1:65536'"),
        ("port", "'usb:001,005\n'", PORTS, "'usb:001,005 '"),
        ("kind", "drak", "one of auto, light, dark", "'drak'"),
        ("save_to", "yes", "a path", "true"),
        ("save_to", "~nobody-of-this-name/x", "a path", "'~nobody-of-this-name/x'"),
        ("save_to", "''", "a path", "''"),
        ("save_as", "3", TEMPLATES, "3"),
        ("save_as", "'{nme}'", TEMPLATES, "'{nme}'"),
        ("save_as", "'{date}.jpg'", TEMPLATES, "'{date}.jpg'"),
        ("save_as", "'../{name}'", TEMPLATES, "'../{name}'"),
        ("save_as", "'x/../{name}'", TEMPLATES, "'x/../{name}'"),
        ("save_as", "/x/{name}", TEMPLATES, "'/x/{name}'"),
        ("save_as", "'{name}/'", TEMPLATES, "'{name}/'"),
        ("save_as", "'{name'", TEMPLATES, "'{name'"),
        ("save_as", "'{name.x}'", TEMPLATES, "'{name.x}'"),
        ("save_as", "'{name:d}'", TEMPLATES, "'{name:d}'"),
        ("save_as", "'{name:{size}}'", TEMPLATES, "'{name:{size}}'"),
        ("save_as", "''", TEMPLATES, "''"),
        ("delete", "please", "true or false", "'please'"),
        ("existing", "skip", "one of fetch, leave, later", "'skip'"),
        ("verify_after_s", "0.4", "a number from 0.5 to 86400", "0.4"),
        ("verify_after_s", "never", "a number from 0.5 to 86400", "'never'"),
        ("hang_s", "1", "a number from 2 to 3600", "1"),
    ],
)
def test_a_fault_of_a_camera_names_key_value_and_what_is_allowed(
    path: Path, key: str, value: str, allowed: str, got: str
):
    """At its line, whatever of it is wrong."""
    sentence = f"cameras[1].{key} must be {allowed}, got {got}."
    assert faults(path, f"cameras:\n- kind: auto\n- {key}: {value}\n") == [f"line 3, column 3: {sentence}"]


def test_a_slip_in_a_key_of_a_camera_is_told(path: Path):
    """With the key that was meant."""
    assert faults(path, "cameras: [{saveto: /x}]\ncamera: []") == [
        "line 1, column 12: cameras[0].saveto is no key; did you mean save_to?",
        "line 2, column 1: camera is no key; did you mean cameras?",
    ]


def test_deleting_from_a_card_takes_a_folder_to_save_in(path: Path):
    """Else the photos would be nowhere any more, once the state needs them no longer."""
    assert faults(path, "cameras:\n- delete: false\n  port: usb:001,005\n- port: usb:001,006\n  delete: true\n") == [
        "line 4, column 3: cameras[1].delete needs save_to: without a folder that they are saved in, the photos would "
        "be nowhere any more."
    ]
    assert loaded(path, "cameras: [{delete: true, save_to: /photos}]").cameras[0].delete


@pytest.mark.parametrize(
    ("ports", "said"),
    [
        (("auto", "auto"), "'auto', got 'auto'."),
        (("auto", "usb:001,005"), "'auto', got 'usb:001,005'; auto takes all on USB."),
        (("usb:001,005", "auto"), "'usb:001,005', got 'auto'; auto takes all on USB."),
        (("usb:001,005", "usb:001,005"), "'usb:001,005', got 'usb:001,005'."),
        (("ptpip:10.0.0.1", "ptpip:10.0.0.1"), "'ptpip:10.0.0.1', got 'ptpip:10.0.0.1'."),
    ],
)
def test_no_two_cameras_are_at_one_port(path: Path, ports: tuple[str, str], said: str):
    """Two workers would take the camera from each other. The network is no part of auto."""
    text = "".join(f'- port: "{port}"\n' for port in ports)
    assert faults(path, f"cameras:\n{text}") == [
        f"line 3, column 3: cameras[1].port must be another than that of cameras[0], {said}"
    ]
    others = (
        "cameras: [{port: 'usb:001,005'}, {port: 'usb:001,006'}, {port: 'ptpip:10.0.0.1'}, {port: 'ptpip:10.0.0.2'}]"
    )
    assert len(loaded(path, others).cameras) == 4
    assert len(loaded(path, "cameras: [{port: auto}, {port: 'ptpip:10.0.0.1'}]").cameras) == 2


def test_files_that_cannot_be_read_are_said_to_be(tmp_path: Path):
    """Missing, a folder, not UTF-8, endless; and the rest is judged all the same."""
    picture = tmp_path / "picture.jpg"
    picture.write_bytes(b"\xff\xd8\xff\xe0")
    for file, reason in (
        (tmp_path / "none.yaml", "cannot be read: No such file or directory"),
        (tmp_path, "cannot be read: Is a directory"),
        (picture, "is not UTF-8 at byte 0"),
        (Path("/dev/zero"), "is longer than 1048576 bytes"),
    ):
        with pytest.raises(ConfigError) as error:
            load(file, environ={"HOTPIXD_CORES": "x"}, overrides={})
        assert f"{file}: this file {reason}." in error.value.messages
        assert "HOTPIXD_CORES: cores must be a whole number from 1 to 256, got 'x'." in error.value.messages


def test_a_byte_order_mark_and_windows_line_ends_do_no_harm(path: Path):
    """Written with an editor of Windows, on the card of a Pi."""
    path.write_bytes(b"\xef\xbb\xbfcores: 2\r\nlog_level: debug\r\n")
    assert load(path, environ={}, overrides={}).cores == 2


# Secrets


@pytest.mark.parametrize(
    "text",
    [
        "alerts: {notify: [mailto:ann:hunter2@host]}",
        "alerts: {notify: [hunter2]}",
        "alerts: {notify: json://ann:hunter2@host}",
        "alerts: {notify: {json://ann:hunter2@host: 1}}",
        "alerts: {notify: {hunter2: 1, hunter2: 1}}",
        "alerts: {command: curl -u ann:hunter2}",
        "alerts: {'json://ann:hunter2@host': 1}",
        "metrics: {listen: json://ann:hunter2@host}",
        "metrics: {listen: ' mailto://ann:hunter 2@host'}",
        "alerts: {notify_file: json://ann:hunter2@host}",
        "state: json://ann:hunter2@host",
        "alerts:\n  notify:\n   - json://ann:hunter2@host\n  - x",
        "alerts: {notify: [*hunter2]}",
        "alerts: {notify: [&hunter2 a, &hunter2 b]}",
        "alerts: {notify: [!hunter2!x a]}",
    ],
)
def test_no_secret_is_shown(path: Path, text: str):
    """Neither in sentences nor in what Python prints of the tree or the error."""
    path.write_text(text, encoding="utf-8")
    environ = {"HOTPIXD_ALERTS__GATHER_S": "json://ann:hunter2@host"}
    with pytest.raises(ConfigError) as error:
        load(path, environ=environ, overrides={})
    assert "HOTPIXD_ALERTS__GATHER_S: alerts.gather_s must be a number from 0 to 3600, got json://...." in str(
        error.value
    )
    assert "hunter" not in str(error.value) + repr(error.value)
    config = loaded(path, "alerts: {notify: [json://ann:hunter2@host], command: [x, hunter2]}")
    assert "hunter2" not in repr(config) + str(config)


def test_urls_of_the_notify_file_come_behind_the_others(path: Path, tmp_path: Path):
    """One per line; blank lines and comments are none."""
    (tmp_path / "urls").write_text("# mine\n\n ntfy://h/b \nmqtt://h/c # not a comment\n", encoding="utf-8")
    config = loaded(path, "alerts: {notify: [ntfy://h/a], notify_file: urls}")
    assert config.alerts.notify == ("ntfy://h/a", "ntfy://h/b", "mqtt://h/c # not a comment")
    assert config.alerts.notify_file == tmp_path / "urls"
    assert loaded(path, "alerts: {notify_file: urls}", {"HOTPIXD_ALERTS__NOTIFY": "[ntfy://h/d]"}).alerts.notify == (
        "ntfy://h/d",
        *config.alerts.notify[1:],
    )


def test_faults_of_the_notify_file_name_its_line_and_no_secret(path: Path, tmp_path: Path):
    """One that is missing is an error too: alerts that reach nobody are worse."""
    urls = tmp_path / "urls"
    urls.write_text("ntfy://h/b\nann:hunter2@host\n", encoding="utf-8")
    text = "alerts:\n  notify_file: urls\n"
    assert faults(path, text) == [
        f"{urls}, line 2: alerts.notify[1] must be a URL such as ntfy://ntfy.sh/topic, got a value that is not shown "
        "here, as it may be secret."
    ]
    urls.unlink()
    assert faults(path, text) == [f"line 2, column 3: the file '{urls}' cannot be read: No such file or directory."]


def test_a_plain_name_is_a_credential_of_systemd_if_there_is_one(path: Path, tmp_path: Path):
    """Else a file beside the configuration."""
    (tmp_path / "urls").write_text("ntfy://h/file", encoding="utf-8")
    credentials = tmp_path / "credentials"
    credentials.mkdir()
    environ = {"CREDENTIALS_DIRECTORY": str(credentials)}
    assert loaded(path, "alerts: {notify_file: urls}", environ).alerts.notify == ("ntfy://h/file",)
    (credentials / "urls").write_text("ntfy://h/credential", encoding="utf-8")
    assert loaded(path, "alerts: {notify_file: urls}", environ).alerts.notify == ("ntfy://h/credential",)
    assert loaded(path, "alerts: {notify_file: ./urls}", environ).alerts.notify == ("ntfy://h/file",)


# Warnings


def test_nothing_to_warn_of_in_the_defaults():
    """And none without a file."""
    assert warnings(Config(), None) == []
    assert warnings(load(EXAMPLE, environ={}, overrides={}), EXAMPLE) == []


def test_what_may_not_be_wanted_is_said(path: Path, tmp_path: Path):
    """A directory that is not there, a program, a group, numbers served to everybody."""
    (tmp_path / "here").mkdir()
    (tmp_path / "file").touch()
    config = loaded(
        path,
        """
        sources: [{directory: here}, {directory: gone}, {directory: file}]
        cameras: [{save_to: here}, {port: ptpip:10.0.0.1, save_to: none}]
        feed: {group: no-such-group}
        alerts: {command: [/no/such/program]}
        metrics: {listen: "0.0.0.0:9469"}
        """,
    )
    assert warnings(config, path) == [
        f"the source '{tmp_path}/gone' is not there now; it will be waited for.",
        f"the source '{tmp_path}/file' is not a directory now; it will be waited for.",
        f"the folder '{tmp_path}/none' of save_to is not there now; it is not made, but waited for.",
        "the program of alerts.command is not found here.",
        "the group 'no-such-group' of feed.group is not known here.",
        "everybody in the network can read the numbers that metrics.listen serves at 0.0.0.0.",
    ]
    assert warnings(loaded(path, 'metrics: {listen: "[::1]:1"}\nalerts: {command: [sh]}'), path) == []


@pytest.mark.parametrize(
    ("url", "secret"),
    [
        *(("ntfy://ntfy.sh/t", False), ("ntfys://tk_abcdef@ntfy.sh/t", True), ("tgram://123:abc/4", True)),
        *(("json://h:1", False), ("json://user@h:1", False), ("json://user:pw@h:1", True)),
        *(("kodi://h", False), ("mailto://h?to=a@example.org", False), ("nothing://that.apprise/knows", False)),
    ],
)
def test_a_readable_file_with_secrets_is_warned_of(path: Path, url: str, secret: bool):
    """Not if its owner alone can read it, and not of secrets that are elsewhere."""
    config = loaded(path, f"alerts: {{notify: ['{url}']}}")
    assert warnings(config, path) == []
    path.chmod(0o644)
    assert [url in warning for warning in warnings(config, path)] == [False] * secret
    elsewhere = loaded(path, "", {"HOTPIXD_ALERTS__NOTIFY": f"['{url}']"})
    assert warnings(elsewhere, path) == []


def test_a_readable_notify_file_is_warned_of(path: Path, tmp_path: Path):
    """It is there to hold secrets."""
    urls = tmp_path / "urls"
    urls.touch(0o600)
    config = loaded(path, "alerts: {notify_file: urls}")
    assert warnings(config, path) == []
    urls.chmod(0o604)
    assert warnings(config, path) == [f"everybody on this machine can read {urls}: chmod o-r."]


# Finding and reloading


def test_the_first_configuration_there_is_counts(tmp_path: Path):
    """The service's, then the user's."""
    service, user = tmp_path / "etc", tmp_path / "home" / ".config"
    environ = {"CONFIGURATION_DIRECTORY": f"{service}:/else", "HOME": str(tmp_path / "home")}
    for file in (user / "hotpixd" / "config.yaml", service / "hotpixd.yaml"):
        assert find_config(environ) != file
        file.parent.mkdir(parents=True)
        file.touch()
        assert find_config(environ) == file
    xdg = tmp_path / "xdg" / "hotpixd" / "config.yaml"
    xdg.parent.mkdir(parents=True)
    xdg.touch()
    assert find_config({"XDG_CONFIG_HOME": str(tmp_path / "xdg"), "HOME": environ["HOME"]}) == xdg


def test_what_a_reload_cannot_change_is_named(path: Path):
    """Sources, cameras, alerts, checkpoints and the log's level are applied at once."""
    before = loaded(path, "")
    after = loaded(
        path,
        """
        state: /x
        cores: 1
        log_level: debug
        sources: [{directory: /a}]
        cameras: [{port: auto, save_to: /b}]
        detection: {alpha: 0.1, min_frames: 5}
        checkpoint: {every_s: 5}
        feed: {socket: /s}
        alerts: {gather_s: 1}
        metrics: {listen: "127.0.0.1:1"}
        """,
    )
    assert needs_restart(before, before) == ()
    assert needs_restart(before, loaded(path, "alerts: {gather_s: 1}\nlog_level: error\ncameras: [{}]")) == ()
    assert needs_restart(before, after) == (
        "state",
        "cores",
        "detection.alpha",
        "detection.min_frames",
        "feed.socket",
        "metrics.listen",
    )


# Whatever is given

_SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.dates() | st.datetimes() | st.binary()
)
_NAMES = st.text() | st.sampled_from(sorted({part for key in keys(Config()) for part in key.split(".")}))
_JUNK = st.recursive(
    _SCALARS | st.sampled_from(["/a", "info", "json://u:p@h", "22:00-07:00", "[::1]:80", "~x", "<<", "*a"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_NAMES | _SCALARS, inner, max_size=6),
    max_leaves=20,
)


def survives(text: str, environ: dict[str, str], folder: Path) -> None:
    """Load some text; a tree or a `ConfigError` with sentences is what may come of it."""
    path = folder / "junk.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        assert isinstance(load(path, environ=environ, overrides={}), Config)
    except ConfigError as error:
        assert error.messages
        for message in error.messages:
            assert re.fullmatch(r".+: .+[.?]", message), message
            assert message.isprintable()


@settings(max_examples=150, deadline=None)
@given(tree=_JUNK)
def test_junk_of_any_shape_is_a_config_error(tmp_path_factory: pytest.TempPathFactory, tree: object):
    """Known and unknown keys with values of any type, dumped as YAML."""
    survives(yaml.dump(tree, allow_unicode=True), {}, tmp_path_factory.getbasetemp())


@settings(max_examples=200, deadline=None)
@given(
    text=st.text() | st.text(alphabet="ab:,-#&*!|>%@'\"[]{}?~ \t\n0159.<", max_size=60),
    name=st.sampled_from(keys(Config())),
)
def test_junk_that_is_hardly_yaml_is_a_config_error(tmp_path_factory: pytest.TempPathFactory, text: str, name: str):
    """In a file and in a variable."""
    variable = "HOTPIXD_" + name.upper().replace(".", "__")
    survives(text, {variable: text.replace("\0", "")}, tmp_path_factory.getbasetemp())


@settings(max_examples=60, deadline=None)
@given(kept=st.sets(st.sampled_from(keys(Config()))))
def test_any_part_of_the_defaults_written_out_is_the_defaults(tmp_path_factory: pytest.TempPathFactory, kept: set[str]):
    """What is read is what was written."""
    tree: dict[str, Any] = {}
    for key in kept:
        section, _, name = key.rpartition(".")
        value = getattr(getattr(Config(), section) if section else Config(), name)
        plain = sorted(value) if isinstance(value, frozenset) else list(value) if isinstance(value, tuple) else value
        (tree.setdefault(section, {}) if section else tree)[name] = plain
    path = tmp_path_factory.getbasetemp() / "defaults.yaml"
    assert loaded(path, yaml.safe_dump(tree)) == Config()


def test_to_check_a_configuration_takes_no_heavy_library(path: Path):
    """Neither kernels nor decoders nor senders: the answer is there at once."""
    loaded(path, "sources: [{directory: /a}]")
    code = (
        "import sys, pathlib, hotpixd.config as c; "
        f"c.warnings(c.load(pathlib.Path({str(path)!r}), environ={{}}, overrides={{}}), None); "
        "print(*sorted({'numpy', 'numba', 'apprise', 'watchdog'} & set(sys.modules)))"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(hotpixd.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.split() == []
