"""A hub as the Hugging Face library knows it, in small: one gated dataset repository of files in memory."""

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


class Hub:
    """Serves `files` as hf://datasets/org/set to requests with `token`; `requests` holds (method, path, token)."""

    def __init__(self, files: dict[str, bytes], token: str) -> None:
        self.files, self.token = files, token
        self.requests: list[tuple[str, str, str | None]] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None:
                """Nothing on the console."""

            def do_GET(self) -> None:
                hub.answer(self)

            do_POST = do_HEAD = do_GET

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        path = unquote(urlsplit(request.path).path)
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        token = (request.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        self.requests.append((request.command, path, token))
        if "org/set" in path and token != self.token:
            return self._send(request, 401, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access restricted"})
        if path == "/api/datasets/org/set":
            return self._send(request, 200, json.dumps({"id": "org/set", "sha": "0" * 40}).encode())
        if match := re.fullmatch(r"/api/datasets/org/set/tree/[^/]+/?(.*)", path):
            return self._send(request, 200, json.dumps(self._entries(match[1])).encode())
        if path.startswith("/api/datasets/org/set/paths-info/"):
            wanted = json.loads(body)["paths"]
            near = [entry for name in wanted for entry in self._entries(name.rpartition("/")[0])]
            found = [entry for entry in near if entry["path"] in wanted]
            return self._send(request, 200, json.dumps(found).encode())
        if match := re.fullmatch(r"/datasets/org/set/resolve/[^/]+/(.+)", path):
            return self._send_file(request, self.files[match[1]])
        return self._send(request, 404, b"", {"X-Error-Code": "EntryNotFound"})

    def _entries(self, folder: str) -> list[dict[str, object]]:
        prefix = f"{folder}/" if folder else ""
        below = {name: data for name, data in self.files.items() if name.startswith(prefix)}
        folders = {name.removeprefix(prefix).split("/")[0] for name in below if "/" in name.removeprefix(prefix)}
        entries: list[dict[str, object]] = [
            {"type": "directory", "path": prefix + name, "oid": "0" * 40, "size": 0} for name in sorted(folders)
        ]
        files = {name: data for name, data in below.items() if "/" not in name.removeprefix(prefix)}
        return entries + [
            {"type": "file", "path": name, "oid": "0" * 40, "size": len(data)} for name, data in files.items()
        ]

    def _send_file(self, request: BaseHTTPRequestHandler, data: bytes) -> None:
        headers = {"ETag": '"x"', "X-Repo-Commit": "0" * 40, "Accept-Ranges": "bytes"}
        if span := re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range") or ""):
            begin, end = int(span[1]), min(int(span[2] or len(data) - 1), len(data) - 1)
            headers["Content-Range"] = f"bytes {begin}-{end}/{len(data)}"
            return self._send(request, 206, data[begin : end + 1], headers)
        return self._send(request, 200, data, headers)

    def _send(
        self, request: BaseHTTPRequestHandler, code: int, body: bytes, headers: dict[str, str] | None = None
    ) -> None:
        request.send_response(code)
        for name, value in ({"Content-Type": "application/json"} | (headers or {})).items():
            request.send_header(name, value)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(body)
