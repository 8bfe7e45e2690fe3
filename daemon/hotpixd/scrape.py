"""An HTTP server for one text, which no client can use to take threads, sockets or time from the process."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from socketserver import ThreadingMixIn
from typing import Any

_MOST_REQUESTS = 8
"""Requests at the same time; each has a thread."""

_REQUEST_S = 5.0
"""Time that a request has, from connecting to the last byte of its answer."""

_THROTTLE_S = 0.02
"""Pause before each connection: accepting them as fast as they come would take the time of the whole process."""


class ScrapeServer(ThreadingMixIn, HTTPServer):
    """Serves one text. Who is slow is hung up on; who comes too often waits.

    Parameters
    ----------
    address : numeric, and port
    text : returns what is served, in any thread
    """

    daemon_threads = True
    block_on_close = False
    allow_reuse_address = True

    def __init__(self, address: tuple[str, int], text: Callable[[], bytes]) -> None:
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self.text = text
        self._since: dict[socket.socket, float] = {}
        self._changing = threading.Lock()
        super().__init__(address, _Handler)

    def verify_request(self, request: Any, client_address: Any) -> bool:  # noqa: ARG002 - as in the base class
        """Tell whether a connection is served; it is closed otherwise."""
        time.sleep(_THROTTLE_S)
        self.service_actions()
        with self._changing:
            if len(self._since) >= _MOST_REQUESTS:
                return False
            self._since[request] = time.monotonic()
            return True

    def service_actions(self) -> None:
        """Hang up on those who take too long; called twice a second, and for each connection."""
        with self._changing:
            for request, since in self._since.items():
                if time.monotonic() - since > _REQUEST_S:
                    with suppress(OSError):
                        request.shutdown(socket.SHUT_RDWR)

    def shutdown_request(self, request: Any) -> None:
        """Close a connection."""
        with self._changing:
            self._since.pop(request, None)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: it is the client who has gone, or was hung up on."""


class _Handler(BaseHTTPRequestHandler):
    server: ScrapeServer
    server_version = "hotpixd"
    sys_version = ""

    def do_GET(self) -> None:
        if self.path.partition("?")[0] not in ("/", "/metrics"):
            self.send_error(404)
            return
        text = self.server.text()
        self.send_response(200)
        self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, format: str, *arguments: object) -> None:
        """Say nothing: what a client sends is none of the log's business."""
