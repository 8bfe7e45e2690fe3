"""Counters and gauges of a running daemon, for Prometheus and for `status`.

They are kept as plain numbers, and only `serve` imports prometheus_client: that
costs 190 ms, and most daemons are never scraped. `as_dict` tells all of them;
what is scraped is made from it, so both say the same.
"""

from __future__ import annotations

import bisect
import ipaddress
import threading
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, cast

from hotpixd import __version__

if TYPE_CHECKING:
    from prometheus_client.core import Metric
    from prometheus_client.registry import Collector

    from hotpixd.scrape import ScrapeServer

FATES = ("folded", "refused", "known", "companion", "unreadable")
"""What can become of a shot. All are told from the start: a counter that appears with its first event hides it."""

STATUSES = ("starting", "watching", "away", "trouble")
"""How a source can be."""

LATENCY_BUCKETS_S = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
"""Upper bounds. A 24-megapixel shot alone takes 0.3 s, a card of hundreds makes the last ones wait."""


class MetricsError(Exception):
    """The numbers cannot be served; a sentence for people."""


class Metrics:
    """The numbers of one run of the daemon. Its methods may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._shots = dict.fromkeys(FATES, 0)
        self._received_bytes = 0
        self._latencies = [0] * (len(LATENCY_BUCKETS_S) + 1)
        self._latency_sum_s = 0.0
        self._checkpoints = {"count": 0, "seconds": 0.0, "bytes": 0}
        self._now: dict[str, Any] = {
            "queue": 0,
            "alerts_waiting": 0,
            "disk_free_bytes": None,
            "sources": dict.fromkeys(STATUSES, 0),
            "sensors": {},
        }
        self._server: ScrapeServer | None = None

    def shot(self, fate: str, latency_s: float | None, size: int) -> None:
        """Count a shot.

        Parameters
        ----------
        fate : what became of it
        latency_s : from being found complete to being folded, s. None if it was not folded now
        size : bytes of its file
        """
        with self._lock:
            self._shots[fate] = self._shots.get(fate, 0) + 1
            self._received_bytes += size
            if latency_s is not None:
                self._latencies[bisect.bisect_left(LATENCY_BUCKETS_S, latency_s)] += 1
                self._latency_sum_s += latency_s

    def checkpoint(self, seconds: float, bytes_written: int) -> None:
        """Count a checkpoint."""
        with self._lock:
            self._checkpoints["count"] += 1
            self._checkpoints["seconds"] += seconds
            self._checkpoints["bytes"] += bytes_written

    def update(
        self,
        *,
        queue: int,
        sources: Iterable[Mapping[str, Any]],
        sensors: Mapping[str, Mapping[str, Any]],
        alerts_waiting: int,
        disk_free_bytes: int,
    ) -> None:
        """Set what is so now.

        Parameters
        ----------
        queue : shots found but not folded yet
        sources : each with its `status`
        sensors : by id, as in the live state: `frames`, `frames_counted`, `candidate`, `stable`, and, once someone
            has worked them out, `kinds`, the stable defects by kind. One that is not described yet is left out.
        alerts_waiting : messages that are not delivered
        disk_free_bytes : of the state's file system
        """
        by_status = dict.fromkeys(STATUSES, 0)
        for source in sources:
            by_status[source["status"]] = by_status.get(source["status"], 0) + 1
        described = {
            id_: {
                "frames": sensor["frames"],
                "frames_counted": sensor["frames_counted"],
                "candidates": sensor["candidate"],
                "stable": sensor["stable"],
                "kinds": dict(sensor.get("kinds", {})),
            }
            for id_, sensor in sensors.items()
            if sensor
        }
        with self._lock:
            self._now = {
                "queue": queue,
                "alerts_waiting": alerts_waiting,
                "disk_free_bytes": disk_free_bytes,
                "sources": by_status,
                "sensors": described,
            }

    def as_dict(self) -> dict[str, Any]:
        """Return all numbers as plain values; buckets of latencies by their upper bound in s, not cumulative."""
        with self._lock:
            bounds = [*map(str, LATENCY_BUCKETS_S), "+Inf"]
            return {
                "shots": dict(self._shots),
                "received_bytes": self._received_bytes,
                "shot_latency_s": {
                    "count": sum(self._latencies),
                    "sum": self._latency_sum_s,
                    "buckets": dict(zip(bounds, self._latencies, strict=True)),
                },
                "checkpoints": dict(self._checkpoints),
                **self._now,
            }

    def serve(self, listen: str) -> None:
        """Serve the numbers over HTTP, in threads of their own, until `close`.

        Parameters
        ----------
        listen : numeric address and port, "127.0.0.1:9469" or "[::1]:9469"

        Raises
        ------
        MetricsError
            If that is no address, or cannot be had.
        """
        from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest

        from hotpixd.scrape import ScrapeServer

        try:
            host, _, port = listen.rpartition(":")
            address = ipaddress.ip_address(host.strip("[]"))
            number = int(port)
        except ValueError as error:
            raise MetricsError(f"The metrics cannot be served at {listen!r}: that is no address and port.") from error
        registry = CollectorRegistry()
        registry.register(cast("Collector", self))
        ProcessCollector(registry=registry)
        try:
            self._server = ScrapeServer((str(address), number), lambda: generate_latest(registry))
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise MetricsError(f"The metrics cannot be served at {listen!r}: {reason}.") from error
        threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True).start()

    @property
    def port(self) -> int | None:
        """Port at which they are served. None if they are not."""
        return None if self._server is None else self._server.server_port

    def close(self) -> None:
        """Stop serving."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def collect(self) -> Iterator[Metric]:
        """Yield everything as Prometheus wants it; called at each scrape."""
        from prometheus_client.core import (
            CounterMetricFamily,
            GaugeMetricFamily,
            HistogramMetricFamily,
            InfoMetricFamily,
            SummaryMetricFamily,
        )

        numbers = self.as_dict()
        yield InfoMetricFamily("hotpixd_build", "Version that runs.", {"version": __version__})

        shots = CounterMetricFamily("hotpixd_shots", "Shots by what became of them.", labels=["fate"])
        for fate, count in numbers["shots"].items():
            shots.add_metric([fate], count)
        yield shots
        yield CounterMetricFamily("hotpixd_received_bytes", "Bytes of all these shots.", numbers["received_bytes"])

        latency = numbers["shot_latency_s"]
        running, cumulative = 0, []
        for bound, count in latency["buckets"].items():
            running += count
            cumulative.append((bound, running))
        yield HistogramMetricFamily(
            "hotpixd_shot_latency_seconds",
            "Time from finding a shot complete to having folded it.",
            buckets=cumulative,
            sum_value=latency["sum"],
        )

        checkpoints = numbers["checkpoints"]
        yield SummaryMetricFamily(
            "hotpixd_checkpoint_seconds",
            "Time that checkpoints took.",
            count_value=checkpoints["count"],
            sum_value=checkpoints["seconds"],
        )
        yield CounterMetricFamily("hotpixd_checkpoint_bytes", "Bytes that checkpoints wrote.", checkpoints["bytes"])

        yield GaugeMetricFamily("hotpixd_queue_shots", "Shots found, but not folded yet.", numbers["queue"])
        yield GaugeMetricFamily("hotpixd_alerts_waiting", "Messages not delivered yet.", numbers["alerts_waiting"])
        if numbers["disk_free_bytes"] is not None:
            free = numbers["disk_free_bytes"]
            yield GaugeMetricFamily("hotpixd_disk_free_bytes", "Free space on the state's file system.", free)

        sources = GaugeMetricFamily("hotpixd_sources", "Sources by status.", labels=["status"])
        for status, count in numbers["sources"].items():
            sources.add_metric([status], count)
        yield sources

        for key, name, meaning in (
            ("frames", "sensor_frames", "Frames folded into a sensor's statistic."),
            ("frames_counted", "sensor_frames_counted", "Frames of it that were new evidence."),
            ("candidates", "candidates", "Sites of a sensor under suspicion."),
            ("stable", "stable_defects", "Stable defects of a sensor."),
        ):
            family = GaugeMetricFamily(f"hotpixd_{name}", meaning, labels=["sensor"])
            for id_, sensor in numbers["sensors"].items():
                family.add_metric([id_], sensor[key])
            yield family

        defects = GaugeMetricFamily("hotpixd_defects", "Stable defects by kind.", labels=["sensor", "kind"])
        for id_, sensor in numbers["sensors"].items():
            for kind, count in sensor["kinds"].items():
                defects.add_metric([id_, kind], count)
        yield defects
