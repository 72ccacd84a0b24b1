"""A small cluster of processes on this machine: `make cluster` starts it, and `make cluster-stop` ends it.

It has an S3 server, an MLflow server, a Ray head without CPUs for work, and two worker nodes. Each node is a process
with its own ports, and Ray asks for a token. One folder holds all files: the variables that a shell needs
(`environment`), the logs and the data.
"""

import argparse
import contextlib
import json
import os
import secrets
import shutil
import stat
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import fsspec
import psutil

from cluster.servers import end_processes, free_port, is_listening, start_server

# Not below ~/.local/state: Ray's sockets lie in this folder, and the path of a socket may have at most 107 characters.
FOLDER = Path.home() / ".admiral" / "cluster"
FOLDER_VARIABLE = "ADMIRAL_LOCAL_CLUSTER"  # environment variable of every process of a cluster: the cluster's folder
BUCKET = "admiral"
NODES = 2
CPUS_OF_NODE = 4  # logical: two training workers and the readers of their data fit on one node
OBJECT_STORE_BYTES = 150_000_000
# With these, Ray notices a dead node within seconds. Its default is a quarter of a minute.
HEALTH_CHECKS = {"health_check_period_ms": 1000, "health_check_timeout_ms": 3000, "health_check_failure_threshold": 3}


class LocalCluster:
    """A cluster of processes whose files lie in one folder."""

    def __init__(self, folder: Path = FOLDER) -> None:
        self.folder = folder.absolute()
        self.environment: dict[str, str] = {}
        self.head = ""  # address of Ray's head
        self.metrics: dict[str, str] = {}  # URL of each node's metrics, by the node's name

    def start(self) -> None:
        """Start the services one after another. If one of them fails, end those that were started before it.

        Raises:
            RuntimeError: a cluster of this folder is running, the folder belongs to another user, or a service did not
                start.
        """
        make_private(self.folder)
        if self.processes():
            raise RuntimeError(f"a cluster of {self.folder} is already running: `make cluster-stop` ends it")
        self._clear(keep_logs=False)
        (self.folder / "logs").mkdir()
        try:
            self._start_s3()
            self._start_mlflow()
            self._start_head()
            for number in range(1, NODES + 1):  # one by one: nodes that start together may pick the same ports
                self._start_node(f"ray node {number}", {"address": self.head, "num-cpus": CPUS_OF_NODE})
        except BaseException:
            self.stop()
            raise
        lines = [f"export {name}={value}\n" for name, value in self.environment.items()]
        write_private(self.folder / "environment", "".join(lines))

    def _start_s3(self) -> None:
        port = free_port()
        self.environment |= {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_ACCESS_KEY_ID": "admiral",
            "AWS_SECRET_ACCESS_KEY": secrets.token_hex(16),
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "ADMIRAL_STORE": f"s3://{BUCKET}/runs",
        }
        self._launch("s3", ["moto.server", "--host", "127.0.0.1", "--port", str(port)], partial(is_listening, port))
        files = fsspec.filesystem(
            "s3",
            key=self.environment["AWS_ACCESS_KEY_ID"],
            secret=self.environment["AWS_SECRET_ACCESS_KEY"],
            endpoint_url=self.environment["AWS_ENDPOINT_URL"],
        )
        files.mkdir(BUCKET)

    def _start_mlflow(self) -> None:
        port = free_port()
        stores = [
            f"--backend-store-uri=sqlite:///{self.folder}/mlflow.db",
            f"--artifacts-destination=s3://{BUCKET}/mlflow",
        ]
        self._launch(
            "mlflow",
            ["mlflow", "server", "--workers=1", "--host=127.0.0.1", f"--port={port}", *stores],
            partial(is_listening, port),
            MLFLOW_S3_ENDPOINT_URL=self.environment["AWS_ENDPOINT_URL"],
            MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false",  # else MLflow starts eight processes for its own jobs
            MLFLOW_DISABLE_TELEMETRY="true",
        )
        self.environment["MLFLOW_TRACKING_URI"] = f"http://127.0.0.1:{port}"

    def _start_head(self) -> None:
        port, dashboard = free_port(), free_port()
        self.head = f"127.0.0.1:{port}"
        self.environment |= {
            "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
        }
        options = {
            "head": True,
            "port": port,
            "num-cpus": 0,  # no work on the head, as on a real cluster
            "include-dashboard": "true",
            "dashboard-port": dashboard,
            "ray-client-server-port": free_port(),
            "temp-dir": self.folder / "ray",
            "system-config": json.dumps(HEALTH_CHECKS),
        }
        self._start_node("ray head", options)

    def _start_node(self, name: str, options: dict[str, object]) -> None:
        port = free_port()
        self.metrics[name] = f"http://127.0.0.1:{port}/metrics"
        options |= {
            "node-ip-address": "127.0.0.1",
            "object-store-memory": OBJECT_STORE_BYTES,
            "dashboard-agent-listen-port": free_port(),
            "metrics-export-port": port,
            "min-worker-port": 0,  # any free ports, because the nodes share one address
            "max-worker-port": 0,
        }
        flags = [f"--{key}" if value is True else f"--{key}={value}" for key, value in options.items()]
        self._launch(
            name,
            ["ray.scripts.scripts", "start", "--block", "--disable-usage-stats", *flags],
            lambda: "Ray runtime started" in self._log(name).read_text(errors="replace"),
            PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",  # a job's `python` is this one
            RAY_JOB_STOP_WAIT_TIME_S="60",  # leaves time for a last checkpoint when a job is stopped
            OMP_NUM_THREADS="1",
        )

    def _launch(self, name: str, module: list[str], is_ready: Callable[[], bool], **environment: str) -> None:
        """Start a Python module as a server. `module` is its name and its arguments."""
        excluded = ("RAY_", "MLFLOW_", "AWS_", "ADMIRAL_")  # variables that would lead to another cluster
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(excluded)}
        settings = inherited | self.environment | {FOLDER_VARIABLE: str(self.folder)} | environment
        start_server([sys.executable, "-m", *module], is_ready, self._log(name), settings)

    def _log(self, name: str) -> Path:
        return self.folder / "logs" / f"{name.replace(' ', '-')}.log"

    def processes(self) -> list[psutil.Process]:
        """Return the running processes of this cluster, except those of Ray's that overwrite their environment."""
        running = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):  # it has ended, or is another user's
                if process.environ().get(FOLDER_VARIABLE) == str(self.folder):
                    running.append(process)
        return running

    def stop(self) -> int:
        """End the processes of this cluster with their descendants, and return their number. Keep only the logs.

        Raises:
            RuntimeError: the folder belongs to another user.
        """
        make_private(self.folder)
        ended = 0
        while running := self.processes():  # repeated, because processes may start others meanwhile
            end_processes(running)
            ended += len(running)
        self._clear(keep_logs=True)
        return ended

    def _clear(self, keep_logs: bool) -> None:
        for path in self.folder.iterdir():
            if path.is_symlink() or not path.is_dir():
                path.unlink()
            elif not (keep_logs and path.name == "logs"):
                shutil.rmtree(path, ignore_errors=True)


def make_private(folder: Path) -> None:
    """Create the folder if it does not exist, and let only this user enter it.

    Raises:
        RuntimeError: it is a link, a file, or the folder of another user, who could read and replace its files.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
        raise RuntimeError(f"{folder} must be a folder of the user {os.geteuid()}; remove it, or pass another --folder")
    folder.chmod(0o700)


def write_private(path: Path, text: str) -> None:
    """Write a new file that only this user may read. Delete an old one first, which others may have open."""
    path.unlink(missing_ok=True)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)


def main() -> None:
    """Run `python -m cluster.local start` or `stop`."""
    parser = argparse.ArgumentParser(description="Start or stop a cluster of processes on this machine.")
    parser.add_argument("action", choices=["start", "stop"])
    parser.add_argument("--folder", type=Path, default=FOLDER, help="the cluster's folder; its path must be short")
    arguments = parser.parse_args()
    cluster = LocalCluster(arguments.folder)
    try:
        if arguments.action == "stop":
            print(f"ended {cluster.stop()} processes of {cluster.folder} and their descendants")
            return
        cluster.start()
    except RuntimeError as error:
        sys.exit(f"cluster: error: {error}")
    print(f"dashboard  {cluster.environment['RAY_API_SERVER_ADDRESS']}")
    print(f"token      {cluster.environment['RAY_AUTH_TOKEN']} (the dashboard asks for it)")
    print(f"MLflow     {cluster.environment['MLFLOW_TRACKING_URI']}")
    print(f"store      {cluster.environment['ADMIRAL_STORE']} on {cluster.environment['AWS_ENDPOINT_URL']}")
    print(f"metrics    {' '.join(cluster.metrics.values())}")
    print(f"to use it  . {cluster.folder}/environment")
    print("           ray job submit --working-dir . -- python jobs/prepare_dataset.py digits")


if __name__ == "__main__":
    main()
