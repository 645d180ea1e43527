"""A loopback proxy in front of a real object store, which does to requests what bad days do.

    with StoreProxy(endpoint, Faults(busy=0.3, cut=0.2)) as proxy:      AWS_ENDPOINT_URL=proxy.endpoint
        proxy.faults = Faults(away=True)

    python -m scalecv.testing.store_proxy --upstream URL --faults '{"busy": 0.3}'

As a command it prints {"endpoint": URL}, then takes faults as JSON, one line each, answers each with what it did so
far, and ends with its standard input. Requests pass as they came, Host included, so their signatures hold.
"""

import argparse
import collections
import contextlib
import http.client
import json
import random
import socket
import struct
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

_OF_ONE_CONNECTION = ("connection", "keep-alive", "transfer-encoding", "te", "trailer", "upgrade", "proxy-connection")
_CHUNK = 64 << 10


@dataclass(frozen=True)
class Faults:
    """What happens to requests; the first eight are shares of them, drawn one after the other."""

    busy: float = 0.0
    """Answered with 503, not passed on."""
    reset: float = 0.0
    """Connection reset, not passed on."""
    stall: float = 0.0
    """Held for stall_s, then passed on."""
    cut: float = 0.0
    """The body of a GET's answer ends in the middle, and with it the connection."""
    flip: float = 0.0
    """One bit of the body of an object is another one."""
    put_unsent: float = 0.0
    """PUT: the connection breaks, the store never hears of it."""
    put_unanswered: float = 0.0
    """PUT: the store has done it, the connection breaks before its answer."""
    stall_s: float = 1.0
    latency_s: float = 0.0
    """Added to every request."""
    bytes_per_s: float | None = None
    """Speed of bodies that are read; None does not slow them."""
    away: bool = False
    """Connections are dropped as they come, and those that are open."""
    seed: int = 0


class StoreProxy:
    """The proxy, served by threads of this process while the `with` block lasts."""

    def __init__(self, upstream: str, faults: Faults | None = None, port: int = 0) -> None:
        self.upstream = urlsplit(upstream)
        self.done: collections.Counter[str] = collections.Counter()
        """What was done so far: requests, and each kind of fault."""
        self._lock = threading.Lock()
        self.faults = faults or Faults()
        self._server = _Server(("127.0.0.1", port), self)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    @property
    def faults(self) -> Faults:
        """What happens to requests now; may be set at any time, which starts the draws anew."""
        return self._faults

    @faults.setter
    def faults(self, faults: Faults) -> None:
        with self._lock:
            self._faults, self._draw = faults, random.Random(faults.seed)  # noqa: S311

    @property
    def endpoint(self) -> str:
        """What AWS_ENDPOINT_URL is to be set to."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def hits(self, kind: str, share: float) -> bool:
        """Whether the next fault of a kind is due; it is counted."""
        with self._lock:
            due = share > 0 and self._draw.random() < share
            if due:
                self.done[kind] += 1
        return due

    def place(self, size: int) -> int:
        """A random place in `size`."""
        with self._lock:
            return self._draw.randrange(size)

    def count(self, kind: str) -> None:
        """One more of a kind."""
        with self._lock:
            self.done[kind] += 1

    def __enter__(self) -> "StoreProxy":
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], proxy: StoreProxy) -> None:
        self.proxy = proxy
        super().__init__(address, _Handler)

    def verify_request(self, request: Any, client_address: Any) -> bool:
        if self.proxy.faults.away:
            self.proxy.count("dropped")
        return not self.proxy.faults.away

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up are what this is for."""


class _Broken(Exception):
    """The connection is to end without a further word."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, format: str, *args: Any) -> None:
        """Silent."""

    def setup(self) -> None:
        super().setup()
        self.upstream: http.client.HTTPConnection | None = None

    def finish(self) -> None:
        if self.upstream:
            self.upstream.close()
        with contextlib.suppress(OSError):
            super().finish()

    def do(self) -> None:
        """Pass one request on, with the faults that are due."""
        try:
            self._pass_on()
        except (_Broken, OSError, http.client.HTTPException):
            self.close_connection = True

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = do  # noqa: N815 - the names that http.server looks for

    def _pass_on(self) -> None:
        proxy, faults = self.server.proxy, self.server.proxy.faults
        proxy.count("requests")
        body = self._body()
        if faults.away:
            proxy.count("dropped")
            self._reset()
        time.sleep(faults.latency_s)
        if proxy.hits("busy", faults.busy):
            self._answer(503, b"<Error><Code>SlowDown</Code></Error>")
            return
        if proxy.hits("reset", faults.reset):
            self._reset()
        if proxy.hits("stall", faults.stall):
            time.sleep(faults.stall_s)
        is_put = self.command == "PUT"
        if is_put and proxy.hits("put_unsent", faults.put_unsent):
            self._reset()
        status, headers, data = self._ask(body)
        if is_put and proxy.hits("put_unanswered", faults.put_unanswered):
            self._reset()
        is_object = self.command == "GET" and status in (200, 206) and "list-type" not in self.path
        if is_object and data and proxy.hits("flip", faults.flip):
            changed = bytearray(data)
            changed[proxy.place(len(data))] ^= 1 << proxy.place(8)
            data = bytes(changed)
        cuts = self.command == "GET" and len(data) > 1 and proxy.hits("cut", faults.cut)
        self._tell(status, headers, data, len(data) // 2 if cuts else len(data), faults.bytes_per_s)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            while self.rfile.readline().strip():
                pass
            return b"".join(parts)
        length = int(self.headers.get("Content-Length", 0))
        if length and self.headers.get("Expect", "").lower() == "100-continue":
            self.send_response_only(100)
            self.end_headers()
        data = self.rfile.read(length)
        if len(data) < length:
            raise _Broken
        return data

    def handle_expect_100(self) -> bool:
        return True  # said when the body is read

    def _ask(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        """The store's answer; asked once more where it had closed an idle connection."""
        upstream = self.server.proxy.upstream
        for attempt in (1, 2):
            if self.upstream is None:
                kind = http.client.HTTPSConnection if upstream.scheme == "https" else http.client.HTTPConnection
                self.upstream = kind(upstream.hostname or "", upstream.port, timeout=120)
            try:
                self.upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
                for name, value in self.headers.items():
                    if name.lower() not in (*_OF_ONE_CONNECTION, "expect", "content-length"):
                        self.upstream.putheader(name, value)
                if body or self.command in ("PUT", "POST"):
                    self.upstream.putheader("Content-Length", str(len(body)))
                self.upstream.endheaders(body or None)
                answer = self.upstream.getresponse()
                return answer.status, answer.getheaders(), answer.read()
            except (OSError, http.client.HTTPException):
                self.upstream.close()
                self.upstream = None
                if attempt == 2:
                    raise
        raise _Broken

    def _tell(
        self, status: int, headers: list[tuple[str, str]], data: bytes, length: int, bytes_per_s: float | None
    ) -> None:
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in (*_OF_ONE_CONNECTION, "content-length"):
                self.send_header(name, value)
        told = dict((name.lower(), value) for name, value in headers).get("content-length")
        if self.command == "HEAD" and told is not None:
            self.send_header("Content-Length", told)
        elif status not in (204, 304):
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        step = _CHUNK if bytes_per_s is None else max(1, int(bytes_per_s / 10))
        for first in range(0, length if self.command != "HEAD" else 0, step):
            self.wfile.write(data[first : min(first + step, length)])
            if bytes_per_s is not None:
                time.sleep(0.1)
        if length < len(data):
            raise _Broken

    def _answer(self, status: int, data: bytes) -> None:
        self._tell(status, [("Content-Type", "application/xml")], data, len(data), None)

    def _reset(self) -> None:
        """End the connection with a reset, as a firewall or a dying host does."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        raise _Broken


def _lines() -> Iterator[Faults]:
    for line in sys.stdin:
        if line.strip():
            yield Faults(**json.loads(line))


def main() -> None:
    """The command: see the head of this file."""
    ask = argparse.ArgumentParser(prog="python -m scalecv.testing.store_proxy")
    ask.add_argument("--upstream", required=True, help="the store, such as http://127.0.0.1:8333")
    ask.add_argument("--faults", default="{}", help=f"JSON with some of {', '.join(asdict(Faults()))}")
    ask.add_argument("--port", type=int, default=0)
    given = ask.parse_args()
    with StoreProxy(given.upstream, Faults(**json.loads(given.faults)), given.port) as proxy:
        sys.stdout.write(json.dumps({"endpoint": proxy.endpoint}) + "\n")
        sys.stdout.flush()
        for faults in _lines():
            proxy.faults = faults
            sys.stdout.write(json.dumps(dict(proxy.done)) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
