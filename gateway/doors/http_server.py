"""The gateway's HTTP server: /metrics, for Prometheus."""

import socket
import threading
from collections.abc import Iterable
from socketserver import TCPServer, ThreadingMixIn
from typing import TYPE_CHECKING
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import CollectorRegistry, make_wsgi_app

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIEnvironment

_IDLE_TIMEOUT_S = 10.0


class HttpServer:
    """Listens once constructed and serves after `start`, in threads of its own. Raises OSError where the port cannot
    be had."""

    def __init__(self, host: str, port: int, registry: CollectorRegistry) -> None:
        server_class = _Server6 if ":" in host else _Server
        self._server = server_class((host, port), _Handler)
        self._server.set_app(self._answer)
        self._metrics = make_wsgi_app(registry)
        self._thread = threading.Thread(target=self._server.serve_forever, name="http", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Blocks until no more is accepted (half a second at most)."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
        self._server.server_close()

    def _answer(self, environ: "WSGIEnvironment", start_response: "StartResponse") -> Iterable[bytes]:
        if environ["PATH_INFO"] == "/metrics":
            answer: Iterable[bytes] = self._metrics(environ, start_response)
            return answer
        start_response("404 Not Found", [("Content-Type", "text/plain")])
        return [b"there is only /metrics\n"]


class _Server(ThreadingMixIn, WSGIServer):
    """A thread a connection, so that a client that hangs holds up nobody."""

    daemon_threads = True
    block_on_close = False

    def server_bind(self) -> None:
        """As WSGIServer does it, but nobody asks DNS for the host's full name, which can take seconds."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])
        self.setup_environ()


class _Server6(_Server):
    address_family = socket.AF_INET6


class _Handler(WSGIRequestHandler):
    timeout = _IDLE_TIMEOUT_S

    def log_message(self, format: str, *args: object) -> None:
        """A line for every scrape would drown the log."""
