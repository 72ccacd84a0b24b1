"""An HTTP proxy for an S3 server that injects faults by rules, and can record and hold requests.

Like real object storage, it never stores a partial upload: a body is forwarded completely or not at all.
"""

import asyncio
import contextlib
import random
import re
import socket
import threading
from collections import Counter
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeVar

T = TypeVar("T")
Fault = Literal[
    "503",  # 503 "slow down" instead of a response
    "denied",  # 403: the credentials do not allow this
    "expired",  # 400: the credentials have expired
    "redirect",  # 301: the bucket is in another region
    "lost redirect",  # the same, without the name of the region
    "skewed",  # 403: the clock of the client is wrong
    "quota",  # 403: the storage quota is exceeded
    "archived",  # 403: the object must be restored from an archive first
    "unsupported",  # 501: the server does not know this header or operation
    "bad header",  # 400: the server does not accept this header
    "unconditional",  # the server ignores If-None-Match
    "reset",  # the connection ends without a response
    "stall",  # no response, as long as the client waits
    "half",  # the connection ends after half of the upload
    "slow",  # the upload runs at SLOW_BYTES per second
    "swallow",  # the server handles the request, and its response is lost
    "cut",  # half of the response is sent
    "hold",  # forwarded when the rule is released, unless the client has closed the connection
]
SLOW_BYTES = 8 << 20  # per second
REFUSALS = {  # status line, code and message of S3
    "503": ("503 Slow Down", "SlowDown", "Please reduce your request rate."),
    "denied": ("403 Forbidden", "AccessDenied", "Access Denied"),
    "expired": ("400 Bad Request", "ExpiredToken", "The provided token has expired."),
    "redirect": (
        "301 Moved Permanently\r\nx-amz-bucket-region: eu-west-1",
        "PermanentRedirect",
        "The bucket you are attempting to access must be addressed using the specified endpoint.",
    ),
    "lost redirect": ("301 Moved Permanently", "PermanentRedirect", "The bucket you are attempting to access must ..."),
    "skewed": ("403 Forbidden", "RequestTimeTooSkewed", "The difference between the request time and ..."),
    "quota": ("403 Forbidden", "QuotaExceeded", ""),
    "archived": ("403 Forbidden", "InvalidObjectState", "The action is not valid for the object's storage class"),
    "unsupported": ("501 Not Implemented", "NotImplemented", "A header you provided implies functionality ..."),
    "bad header": ("400 Bad Request", "InvalidArgument", "Unsupported header 'x-amz-checksum-crc32'"),
}


class Request(NamedTuple):
    method: str
    target: str  # path and query
    part: str = ""  # the Range header


@dataclass
class Rule:
    """A fault and the requests that it affects; the first rule that matches and is not used up applies."""

    fault: Fault
    method: str = ".*"  # regular expression for the whole method
    target: str = ".*"  # regular expression to search in path and query
    header: str = ""  # case-insensitive regular expression to search in the header
    times: int | None = None  # number of requests to affect; None = no limit
    probability: float = 1.0  # that the rule affects a request that matches
    requests: list[Request] = field(default_factory=list)  # requests that it affected
    _has_affected: threading.Event = field(default_factory=threading.Event)
    _released: threading.Event = field(default_factory=threading.Event)

    def wait(self, seconds: float) -> Request | None:
        """Wait for the first affected request and return it; return None after a timeout."""
        return self.requests[0] if self._has_affected.wait(seconds) else None

    def release(self) -> None:
        """Forward held requests, unless their client has closed the connection."""
        self._released.set()


class Proxy:
    """A proxy that listens on a free local port until `close` is called."""

    def __init__(self, endpoint: str, seed: int = 0) -> None:
        host, port = endpoint.removeprefix("http://").split(":")
        self._server, self._seed = (host, int(port)), seed
        self._rules: list[Rule] = []
        self._lock = threading.Lock()
        self._times_seen = Counter[tuple[str, str]]()
        self._num_affected = Counter[str]()
        self._open: set[asyncio.StreamWriter] = set()
        self.requests: list[Request] = []  # all requests in order of arrival
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="fault proxy", daemon=True).start()
        listener = socket.create_server(("127.0.0.1", 0))
        listener.setsockopt(
            socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16
        )  # a small buffer, so that slow uploads are slow for the client
        self.endpoint = f"http://127.0.0.1:{listener.getsockname()[1]}"
        self._listening = self._run(asyncio.start_server(self._serve, sock=listener))

    def add(self, fault: Fault, method: str = ".*", target: str = ".*", **further: Any) -> Rule:
        """Add a rule, which affects requests from now on."""
        rule = Rule(fault, method, target, **further)
        with self._lock:
            self._rules.append(rule)
            self._num_affected[fault] += 0
        return rule

    def remove(self, rule: Rule) -> None:
        """Remove a rule, and forward the requests that it holds."""
        with self._lock:
            self._rules.remove(rule)
        rule.release()

    def clear(self) -> None:
        """Remove all rules."""
        for rule in list(self._rules):
            self.remove(rule)

    def faults(self) -> dict[str, int]:
        """Return the number of affected requests by fault, including those of removed rules."""
        return dict(self._num_affected)

    def close(self) -> None:
        """Stop listening, and end all connections."""

        async def stop() -> None:
            self._listening.close()
            for writer in self._open:
                writer.transport.abort()
            await asyncio.gather(*(asyncio.all_tasks() - {asyncio.current_task()}), return_exceptions=True)

        for rule in self._rules:
            rule.release()
        self._run(stop())
        self._loop.call_soon_threadsafe(self._loop.stop)

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout=30)

    def _matching_rule(self, request: Request, head: str) -> Rule | None:
        """Return the rule that applies to a request, if any.

        The random draw depends on the seed, the request within its bucket, and the number of its repetitions.
        """
        with self._lock:
            self.requests.append(request)
            self._times_seen[request[:2]] += 1
            for number, rule in enumerate(self._rules):
                if rule.times is not None and len(rule.requests) >= rule.times:
                    continue
                if not (re.fullmatch(rule.method, request.method) and re.search(rule.target, request.target)):
                    continue
                if not re.search(rule.header, head, re.IGNORECASE):
                    continue
                within = request.target.split("/", 2)[-1]
                key = f"{self._seed} {number} {request.method} {within} {self._times_seen[request[:2]]}"
                if random.Random(key).random() < rule.probability:
                    rule.requests.append(request)
                    self._num_affected[rule.fault] += 1
                    rule._has_affected.set()
                    return rule
        return None

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Handle a connection, which has one request."""
        self._open.add(writer)
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            method, target, _ = head.split(b"\r\n", 1)[0].decode().split(" ")
            part = re.search(rb"\r\nrange: *([^\r]*)", head, re.IGNORECASE)
            rule = self._matching_rule(Request(method, target, part[1].decode() if part else ""), head.decode())
            await self._respond(rule, head, reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the client has closed the connection
        finally:
            self._open.discard(writer)
            writer.transport.abort()

    async def _respond(
        self, rule: Rule | None, head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        fault = rule.fault if rule else None
        lines = head.split(b"\r\n")[:-2]
        fields = dict(line.lower().split(b": ", 1) for line in lines[1:] if b": " in line)
        length = int(fields.get(b"content-length", 0))
        if fields.get(b"expect") == b"100-continue":
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = await reader.readexactly(length // 2)
        if fault == "half":
            return
        while rule is not None and fault == "hold" and not rule._released.is_set():
            await asyncio.sleep(0.01)
        while (missing := length - len(body)) > 0:
            chunk = await reader.readexactly(min(missing, 1 << 18 if fault == "slow" else missing))
            if fault == "slow":
                await asyncio.sleep(len(chunk) / SLOW_BYTES)
            body += chunk
        if fault == "hold" and await _is_gone(reader):
            return
        if fault in REFUSALS:
            await _send(writer, _refusal(*REFUSALS[fault], head.startswith(b"HEAD")))
        elif fault == "stall":
            await reader.read()
        elif fault != "reset":
            dropped = (b"expect:", b"connection:", *([b"if-none-match:"] if fault == "unconditional" else []))
            kept = [line for line in lines if not line.lower().startswith(dropped)]
            response = await self._forward(b"\r\n".join([*kept, b"Connection: close", b"", body]))
            if fault != "swallow":
                await _send(writer, response[: len(response) // 2 + 100] if fault == "cut" else response)

    async def _forward(self, message: bytes) -> bytes:
        reader, writer = await asyncio.open_connection(*self._server)
        try:
            writer.write(message)
            return await reader.read()
        finally:
            writer.transport.abort()


async def _is_gone(reader: asyncio.StreamReader) -> bool:
    """Return whether the client has closed the connection; a waiting client sends nothing."""
    try:
        async with asyncio.timeout(0.05):
            return await reader.read(1) == b""
    except TimeoutError:
        return False


async def _send(writer: asyncio.StreamWriter, message: bytes) -> None:
    writer.write(message)
    await writer.drain()
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()


def _refusal(status: str, code: str, message: str, head_only: bool) -> bytes:
    body = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()
    head = f"HTTP/1.1 {status}\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    return head if head_only else head + body
