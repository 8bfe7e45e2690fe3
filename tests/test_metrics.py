"""The numbers of the daemon: counted in plain Python, served to Prometheus over real HTTP, and the same in both."""

from __future__ import annotations

import math
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from conftest import environment
from hotpixd import __version__, metrics
from hotpixd.metrics import LATENCY_BUCKETS_S, Metrics, MetricsError
from hotpixd.monitor import Fate

SENSOR = 'Canon "EOS" R6\\0123'
"""With all that has to be escaped in a label."""


@pytest.fixture
def counted() -> Iterator[Metrics]:
    """Numbers of a short run."""
    with closing(Metrics()) as numbers:
        numbers.shot("folded", 0.3, 1000)
        numbers.shot("folded", 7.0, 2000)
        numbers.shot("folded", 1e6, 0)
        numbers.shot("refused", None, 30)
        numbers.checkpoint(0.5, 10_000)
        numbers.checkpoint(0.25, 20_000)
        numbers.update(
            queue=5,
            sources=[{"name": "/a", "status": "watching"}, {"name": "/b", "status": "watching"}],
            sensors={
                SENSOR: {
                    "frames": 40,
                    "frames_counted": 30,
                    "candidate": 4,
                    "stable": 3,
                    "recovered": 1,
                    "kinds": {"hot": 2, "dead": 1},
                },
                "fresh": {"frames": 1, "frames_counted": 0, "candidate": 0, "stable": 0, "model": "X"},
                "not described yet": {},
            },
            alerts_waiting=2,
            disk_free_bytes=123_456_789_012,
        )
        yield numbers


def scraped(numbers: Metrics, host: str = "127.0.0.1") -> dict[tuple[str, ...], float]:
    """Return what Prometheus would get: values by name and labels."""
    with urllib.request.urlopen(f"http://{host}:{numbers.port}/metrics", timeout=10) as answer:
        assert answer.status == 200
        text = answer.read().decode()
    return {
        (sample.name, *(f"{key}={value}" for key, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_prometheus_gets_what_was_counted(counted: Metrics) -> None:
    """By the names, types and labels that its conventions ask for."""
    counted.serve("127.0.0.1:0")
    got = scraped(counted)
    assert got["hotpixd_build_info", f"version={__version__}"] == 1
    assert got["hotpixd_shots_total", "fate=folded"] == 3
    assert got["hotpixd_shots_total", "fate=refused"] == 1
    assert got["hotpixd_shots_total", "fate=unreadable"] == 0
    assert got["hotpixd_received_bytes_total",] == 3030
    assert got["hotpixd_checkpoint_seconds_count",] == 2
    assert got["hotpixd_checkpoint_seconds_sum",] == 0.75
    assert got["hotpixd_checkpoint_bytes_total",] == 30_000
    assert got["hotpixd_queue_shots",] == 5
    assert got["hotpixd_alerts_waiting",] == 2
    assert got["hotpixd_disk_free_bytes",] == 123_456_789_012
    assert got["hotpixd_sources", "status=watching"] == 2
    assert got["hotpixd_sources", "status=away"] == 0
    assert got["hotpixd_sensor_frames", f"sensor={SENSOR}"] == 40
    assert got["hotpixd_sensor_frames_counted", f"sensor={SENSOR}"] == 30
    assert got["hotpixd_candidates", f"sensor={SENSOR}"] == 4
    assert got["hotpixd_stable_defects", f"sensor={SENSOR}"] == 3
    assert got["hotpixd_defects", "kind=hot", f"sensor={SENSOR}"] == 2
    assert got["hotpixd_sensor_frames", "sensor=fresh"] == 1
    assert not any("sensor=not described yet" in labels for labels in got)
    assert got["process_resident_memory_bytes",] > 0


def test_slow_and_many_clients_take_neither_threads_nor_sockets(counted: Metrics) -> None:
    """A byte now and then, nothing at all, 120 at once: each is hung up on, and a scrape is answered soon after."""
    counted.serve("127.0.0.1:0")
    threads, descriptors = threading.active_count(), len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    with ExitStack() as stack:
        crowd = [stack.enter_context(socket.create_connection(("127.0.0.1", counted.port or 0))) for _ in range(120)]
        begin = time.monotonic()
        while time.monotonic() - begin < 8.0:
            for number, one in enumerate(crowd):
                with suppress(OSError):
                    one.setblocking(False)
                    one.send(b"GET /metrics HTTP/1.1\r\nX: "[number % 20 : number % 20 + 1])
            assert threading.active_count() - threads <= 8
            time.sleep(0.1)
        assert len(os.listdir("/proc/self/fd")) - descriptors <= 120 + 10  # noqa: PTH208
    until = time.monotonic() + 15
    while True:
        with suppress(OSError):
            if scraped(counted)["hotpixd_shots_total", "fate=folded"] == 3:
                break
        assert time.monotonic() < until, "nobody is answered any more"


def test_what_is_no_scrape_is_refused(counted: Metrics) -> None:
    """Another path, another method, garbage, a line without end: an error or nothing, and no word on stderr."""
    counted.serve("127.0.0.1:0")
    for sent in (b"GET /etc/passwd HTTP/1.0\r\n\r\n", b"POST / HTTP/1.0\r\n\r\n", b"\x00\xff\r\n\r\n", b"x" * 100_000):
        with socket.create_connection(("127.0.0.1", counted.port or 0), 10) as raw, suppress(ConnectionError):
            raw.sendall(sent)
            raw.shutdown(socket.SHUT_WR)
            assert b"hotpixd_shots" not in raw.recv(100_000)
    assert scraped(counted)["hotpixd_shots_total", "fate=folded"] == 3


def test_latencies_are_a_cumulative_histogram(counted: Metrics) -> None:
    """Each bucket holds all below its bound, which belongs to it; the last one holds all."""
    counted.shot("folded", LATENCY_BUCKETS_S[0], 0)
    counted.serve("127.0.0.1:0")
    got = scraped(counted)
    name = "hotpixd_shot_latency_seconds"
    buckets = {float(labels[0][3:]): value for (n, *labels), value in got.items() if n == f"{name}_bucket"}
    assert sorted(buckets) == [*LATENCY_BUCKETS_S, math.inf]
    expected = {bound: sum(v <= bound for v in (0.1, 0.3, 7.0, 1e6)) for bound in buckets}
    assert buckets == expected
    assert got[f"{name}_count",] == 4
    assert got[f"{name}_sum",] == pytest.approx(1_000_007.4)


def test_each_scrape_tells_what_is_so_then(counted: Metrics) -> None:
    """A sensor or defect kind that is gone leaves no stale number; counters go on."""
    counted.serve("127.0.0.1:0")
    scraped(counted)
    counted.shot("folded", 0.2, 1)
    counted.update(queue=0, sources=[], sensors={}, alerts_waiting=0, disk_free_bytes=1)
    got = scraped(counted)
    assert got["hotpixd_shots_total", "fate=folded"] == 4
    assert got["hotpixd_queue_shots",] == 0
    assert got["hotpixd_sources", "status=watching"] == 0
    assert not any(labels and labels[-1].startswith("sensor=") for _, *labels in got)


def test_the_plain_values_are_the_same_numbers(counted: Metrics) -> None:
    """`status --json` gives what is scraped, without anything being served."""
    plain = counted.as_dict()
    assert plain["shots"] == {"folded": 3, "refused": 1, "known": 0, "companion": 0, "unreadable": 0}
    assert plain["received_bytes"] == 3030
    assert plain["checkpoints"] == {"count": 2, "seconds": 0.75, "bytes": 30_000}
    assert plain["shot_latency_s"]["count"] == 3
    assert {bound: count for bound, count in plain["shot_latency_s"]["buckets"].items() if count} == {
        "0.5": 1,
        "10.0": 1,
        "+Inf": 1,
    }
    assert plain["queue"] == 5
    assert plain["sources"] == {"starting": 0, "watching": 2, "away": 0, "trouble": 0}
    assert plain["sensors"][SENSOR]["kinds"] == {"hot": 2, "dead": 1}
    assert list(plain["sensors"]) == [SENSOR, "fresh"]
    assert counted.port is None


def test_a_daemon_that_did_nothing_yet_can_be_scraped() -> None:
    """All counters stand at zero from the start, so that their first event shows as an increase."""
    with closing(Metrics()) as numbers:
        numbers.serve("127.0.0.1:0")
        got = scraped(numbers)
    for fate in Fate:
        assert got["hotpixd_shots_total", f"fate={fate}"] == 0
    assert got["hotpixd_shot_latency_seconds_count",] == 0


def test_the_fates_are_those_of_the_monitor() -> None:
    """metrics knows nobody, so it names them itself."""
    assert set(metrics.FATES) == set(Fate)


def test_an_ipv6_address_can_be_given(counted: Metrics) -> None:
    """In brackets, as in a URL."""
    with socket.socket(socket.AF_INET6) as probe:
        try:
            probe.bind(("::1", 0))
        except OSError:
            pytest.skip("no IPv6 here")
    counted.serve("[::1]:0")
    assert scraped(counted, "[::1]")["hotpixd_queue_shots",] == 5


@pytest.mark.parametrize(
    "listen", ["9469", ":9469", "127.0.0.1", "localhost:9469", "127.0.0.1:http", "127.0.0.1:70000"]
)
def test_a_wrong_address_is_a_sentence(listen: str) -> None:
    """And nothing is served at all addresses when one is left out."""
    numbers = Metrics()
    with pytest.raises(MetricsError, match="cannot be served at") as caught:
        numbers.serve(listen)
    assert repr(listen) in str(caught.value)
    assert numbers.port is None


def test_an_address_in_use_is_a_sentence_and_free_after_closing(counted: Metrics) -> None:
    """Closing frees the port: a restart must be able to serve at once."""
    counted.serve("127.0.0.1:0")
    port = counted.port
    with closing(Metrics()) as second:
        with pytest.raises(MetricsError, match="Address already in use"):
            second.serve(f"127.0.0.1:{port}")
        scraped(counted)
        counted.close()
        assert counted.port is None
        second.serve(f"127.0.0.1:{port}")
        assert scraped(second)["hotpixd_queue_shots",] == 0
    counted.close()


def test_nothing_heavy_is_imported_unless_it_is_served() -> None:
    """It costs 190 ms, and serving is off by default."""
    code = """if True:
        import sys
        from hotpixd.metrics import Metrics
        metrics = Metrics()
        metrics.shot("folded", 0.1, 1)
        metrics.as_dict()
        assert not [name for name in sys.modules if name.startswith(("prometheus", "wsgiref", "http"))]
    """
    subprocess.run([sys.executable, "-c", code], check=True, env=environment(), timeout=60)


def test_counting_from_several_threads_loses_nothing() -> None:
    """The loop counts while a scrape and an answer read."""
    with closing(Metrics()) as numbers:
        numbers.serve("127.0.0.1:0")

        def count() -> None:
            for _ in range(2000):
                numbers.shot("folded", 0.2, 3)

        threads = [threading.Thread(target=count) for _ in range(4)]
        for thread in threads:
            thread.start()
        seen: list[dict[str, Any]] = []
        while any(thread.is_alive() for thread in threads):
            seen.append(numbers.as_dict())
            scraped(numbers)
        plain = numbers.as_dict()
    assert plain["shots"]["folded"] == plain["shot_latency_s"]["count"] == 8000
    assert plain["received_bytes"] == 24_000
    for one in seen:
        assert one["shots"]["folded"] == one["shot_latency_s"]["count"]
