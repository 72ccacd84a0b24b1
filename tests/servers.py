"""Servers for tests on free ports, and changes of the environment."""

import contextlib
import http.server
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from cluster.servers import end_processes, free_port, is_listening, start_server

S3_SETTINGS = {
    "AWS_ACCESS_KEY_ID": "test-access-key",
    "AWS_SECRET_ACCESS_KEY": "test-secret-key",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


@contextlib.contextmanager
def mlflow_server(folder: str, port: int | None = None) -> Iterator[tuple[str, Callable[[], None]]]:
    """Yield the URI of an MLflow server that keeps everything in `folder`, and a function that kills it at once."""
    port = port or free_port()
    command = [
        sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
        "--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", f"{folder}/artifacts",
    ]  # fmt: skip
    settings = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    server = start_server(command, partial(is_listening, port), environment=settings)

    def kill() -> None:
        end_processes([server], seconds=0)

    try:
        yield f"http://127.0.0.1:{port}", kill
    finally:
        kill()


@dataclass
class MetadataService:
    """The state of a fake metadata service of an EC2 instance."""

    endpoint: str = ""
    failures: int = 0  # number of the next requests for credentials that get a 503
    served: int = 0  # number of requests that got credentials


@contextlib.contextmanager
def metadata_service() -> Iterator[MetadataService]:
    """Start a fake of the service from which an EC2 instance gets its credentials."""
    service = MetadataService()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_PUT(self) -> None:
            self._respond("token", is_failing=False)  # if this failed, botocore would continue without a token

        def do_GET(self) -> None:
            if self.path.endswith("/security-credentials/"):
                self._respond("role")
                return
            keys = {"AccessKeyId": "key-of-the-role", "SecretAccessKey": "secret", "Token": "token", "Code": "Success"}
            service.served += service.failures == 0
            self._respond(json.dumps({**keys, "Type": "AWS-HMAC", "Expiration": "2099-01-01T00:00:00Z"}))

        def _respond(self, body: str, is_failing: bool | None = None) -> None:
            if is_failing is None:
                is_failing = service.failures > 0
                service.failures = max(0, service.failures - 1)
            self.send_response(503 if is_failing else 200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    service.endpoint = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield service
    finally:
        server.shutdown()
        server.server_close()


@contextlib.contextmanager
def environment(**settings: str) -> Iterator[None]:
    """Set environment variables, and restore their earlier values at the end."""
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
