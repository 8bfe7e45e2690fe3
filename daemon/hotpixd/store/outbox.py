"""The outbox: alerts, the messages they were gathered into, and which channels those still have to reach.

An alert is raised once per key, however often a replay raises it. Its column
`message` says what becomes of it: NULL while it is being gathered, 0 if it is
not to be sent, else the message it is part of (below 0: one composed while this
ledger could not be written). What a message consists of and
where it goes is committed before it is sent, so that it is sent again after a
crash under the same id and with the same text.

All writes wait for the ledger's next commit, in the order in which they were
made: an alert is on the disk together with what it tells of, or not at all.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from hotpixd.store.durable import StateFull
from hotpixd.store.ledger import Ledger

DeliveryState = Literal["due", "sent", "given up"]


@dataclass(frozen=True, slots=True)
class Alert:
    """Something a person wants to know."""

    key: str
    """What it tells of: raised a second time under the same key it is no other alert."""

    at: str
    """When it was raised, UTC, ISO 8601."""

    topic: str
    """What sort of thing: one of `alerts.TOPICS`."""

    subject: str
    """What it is about, such as one source: of a subject's alerts the last one says how it is now."""

    text: str
    """A sentence on one line."""

    detail: Mapping[str, Any]
    """The same for programs, as JSON can hold it."""

    id: int = 0
    """Its row; grows. 0 until it is written."""


@dataclass(frozen=True, slots=True)
class Delivery:
    """A message that a channel has not taken yet."""

    message: int
    channel: str

    tries: int
    """How often it was tried in vain."""

    newest_at: str
    """When the last of its alerts was raised, UTC, ISO 8601."""


class Outbox:
    """The outbox of a ledger. Use it from the ledger's thread.

    Parameters
    ----------
    below : messages are numbered downwards from this negative number. None: upwards from 1
    """

    def __init__(self, ledger: Ledger, *, below: int | None = None) -> None:
        self._ledger = ledger
        self._below = below

    def add(self, alerts: Iterable[Alert], *, send: Collection[str]) -> list[Alert]:
        """Write the alerts whose key is new, and return those.

        While the disk is full it cannot be told which are new: all are returned then, and once there is room
        the new ones are written.

        Parameters
        ----------
        send : topics of which alerts are gathered for the next message; the others are only kept
        """
        by_key = {alert.key: alert for alert in alerts}
        rows = [(*_columns(alert), None if alert.topic in send else 0) for alert in by_key.values()]
        known = self._known(by_key)
        self._ledger.later(
            "INSERT OR IGNORE INTO alert(key, raised_at, topic, subject, text, detail, message)"
            " VALUES (?, ?, ?, ?, ?, ?, ?)",
            rows,
        )
        return [alert for key, alert in by_key.items() if key not in known]

    def _known(self, keys: Iterable[str]) -> set[str]:
        query = "SELECT key FROM alert WHERE key IN (SELECT value FROM json_each(?))"
        try:
            return {key for (key,) in self._ledger.rows(query, (json.dumps(list(keys)),))}
        except StateFull:
            # Reading brings what waits into the database. The next commit says that the disk is full; here it
            # must not cost an alert, as nobody raises those of a transition again.
            return set()

    @property
    def gathers(self) -> bool:
        """Whether alerts wait to become a message."""
        return bool(self._ledger.rows("SELECT 1 FROM alert WHERE message IS NULL LIMIT 1"))

    def compose(self, channels: Iterable[str]) -> int:
        """Make one message of all alerts gathered, due on these channels, and return its number."""
        if self._below is not None:
            self._below -= 1
            message = self._below
        else:
            ((message,),) = self._ledger.rows("SELECT max(coalesce(max(message), 0), 0) + 1 FROM alert")
        self._ledger.later("UPDATE alert SET message = ? WHERE message IS NULL", [(message,)])
        self.add_deliveries(message, channels)
        return int(message)

    def take_over(self, other: Outbox) -> set[int]:
        """Write all that is in another outbox into this one as well; return the numbers of its messages."""
        columns = "raised_at, topic, subject, text, detail, message"
        alerts = other._ledger.rows(f"SELECT key, {columns} FROM alert ORDER BY id")
        deliveries = other._ledger.rows("SELECT message, channel, tries, state FROM delivery")
        self._ledger.later(f"INSERT OR IGNORE INTO alert(key, {columns}) VALUES (?, ?, ?, ?, ?, ?, ?)", alerts)
        self._ledger.later(
            "INSERT OR IGNORE INTO delivery(message, channel, tries, state) VALUES (?, ?, ?, ?)", deliveries
        )
        return {message for message, *_ in deliveries}

    def add_deliveries(self, message: int, channels: Iterable[str]) -> None:
        """Make a message due on further channels."""
        rows = [(message, channel) for channel in channels]
        self._ledger.later("INSERT INTO delivery(message, channel) VALUES (?, ?)", rows)

    def channels(self, message: int) -> set[str]:
        """Return the channels that a message was ever due on."""
        query = "SELECT channel FROM delivery WHERE message = ?"
        return {channel for (channel,) in self._ledger.rows(query, (message,))}

    def due(self) -> list[Delivery]:
        """Return all deliveries not made yet, oldest message first."""
        query = """
            SELECT message, channel, tries, (SELECT max(raised_at) FROM alert WHERE alert.message = delivery.message)
            FROM delivery WHERE state = 'due' ORDER BY message, channel"""
        return [Delivery(*row) for row in self._ledger.rows(query)]

    def give_up(self) -> int:
        """Give up all that waits to be sent, and return how many alerts those are."""
        waiting = "message IS NULL OR message IN (SELECT message FROM delivery WHERE state = 'due')"
        ((count,),) = self._ledger.rows(f"SELECT count(*) FROM alert WHERE {waiting}")
        self._ledger.later("UPDATE alert SET message = ? WHERE message IS NULL", [(0,)])
        self._ledger.later("UPDATE delivery SET state = ? WHERE state = 'due'", [("given up",)])
        return int(count)

    def record(self, message: int, channel: str, tries: int, state: DeliveryState) -> None:
        """Write down what came of trying to deliver a message."""
        statement = "UPDATE delivery SET tries = ?, state = ? WHERE message = ? AND channel = ?"
        self._ledger.later(statement, [(tries, state, message, channel)])

    def alerts(self, message: int) -> list[Alert]:
        """Return the alerts of a message, in the order in which they were raised."""
        return self._alerts("WHERE message = ? ORDER BY id", message)

    def last(self, subject: str) -> Alert | None:
        """Return the latest alert about a subject, if there was any."""
        return next(iter(self._alerts("WHERE subject = ? ORDER BY id DESC LIMIT 1", subject)), None)

    def _alerts(self, condition: str, value: object) -> list[Alert]:
        query = f"SELECT key, raised_at, topic, subject, text, detail, id FROM alert {condition}"
        return [
            Alert(key, at, topic, subject, text, json.loads(detail), id_)
            for key, at, topic, subject, text, detail, id_ in self._ledger.rows(query, (value,))
        ]


def _columns(alert: Alert) -> tuple[str, ...]:
    detail = json.dumps(dict(alert.detail), allow_nan=False)
    return alert.key, alert.at, alert.topic, alert.subject, alert.text, detail
