"""A small Hugging Face hub with one gated dataset repository, whose files are in memory."""

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


class Hub:
    """Serves `files` as hf://datasets/org/set to requests with `token`."""

    def __init__(self, files: dict[str, bytes], token: str) -> None:
        self.files, self.token = files, token
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None:
                """Print nothing."""

            def do_GET(self) -> None:
                hub.respond(self)

            do_POST = do_HEAD = do_GET

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def respond(self, request: BaseHTTPRequestHandler) -> None:
        path = unquote(urlsplit(request.path).path)
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        token = (request.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        if "org/set" in path and token != self.token:
            _send(request, 401, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access restricted"})
        elif path == "/api/datasets/org/set":
            _send_json(request, {"id": "org/set", "sha": "0" * 40})
        elif match := re.fullmatch(r"/api/datasets/org/set/tree/[^/]+/?(.*)", path):
            _send_json(request, self._entries(match[1]))
        elif path.startswith("/api/datasets/org/set/paths-info/"):
            paths = json.loads(body)["paths"]
            siblings = [entry for name in paths for entry in self._entries(name.rpartition("/")[0])]
            _send_json(request, [entry for entry in siblings if entry["path"] in paths])
        elif match := re.fullmatch(r"/datasets/org/set/resolve/[^/]+/(.+)", path):
            _send_file(request, self.files[match[1]])
        else:
            _send(request, 404, b"", {"X-Error-Code": "EntryNotFound"})

    def _entries(self, folder: str) -> list[dict[str, object]]:
        prefix = f"{folder}/" if folder else ""
        below = {name.removeprefix(prefix): data for name, data in self.files.items() if name.startswith(prefix)}
        sizes = {name.split("/")[0]: len(data) for name, data in below.items()}
        return [
            {"type": "file" if name in below else "directory", "path": prefix + name, "oid": "0" * 40, "size": size}
            for name, size in sorted(sizes.items())
        ]


def _send_json(request: BaseHTTPRequestHandler, value: object) -> None:
    _send(request, 200, json.dumps(value).encode(), {"Content-Type": "application/json"})


def _send_file(request: BaseHTTPRequestHandler, data: bytes) -> None:
    headers = {"ETag": '"x"', "X-Repo-Commit": "0" * 40, "Accept-Ranges": "bytes"}
    if span := re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range") or ""):
        begin, end = int(span[1]), min(int(span[2] or len(data) - 1), len(data) - 1)
        headers["Content-Range"] = f"bytes {begin}-{end}/{len(data)}"
        _send(request, 206, data[begin : end + 1], headers)
    else:
        _send(request, 200, data, headers)


def _send(request: BaseHTTPRequestHandler, code: int, body: bytes, headers: dict[str, str]) -> None:
    request.send_response(code)
    for name, value in headers.items():
        request.send_header(name, value)
    request.send_header("Content-Length", str(len(body)))
    request.end_headers()
    if request.command != "HEAD":
        request.wfile.write(body)
