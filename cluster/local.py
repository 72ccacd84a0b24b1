"""One machine standing in for a cluster: `make cluster` starts it, `make cluster-stop` ends exactly what was started.

An S3 server, PostgreSQL with MLflow over it, a Ray head without CPUs for work and two worker nodes, each a process of
its own with real ports on the loopback address, token authentication on. All of it lives in one folder: what was
started (processes.json), how to talk to it (environment), logs, and the data, which go with it.
"""

import argparse
import contextlib
import json
import os
import pwd
import secrets
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import botocore.session
import psutil

from cluster.servers import free_port, is_listening

# The user's own. Not below ~/.local/state: Ray's sockets lie beneath it, and their paths may have 107 characters.
FOLDER = Path.home() / ".admiral" / "cluster"
BUCKET = "admiral"
NODES = 2
CPUS_OF_NODE = 4  # logical: the two training workers of a small job and what reads their data fit one node
OBJECT_STORE_BYTES = 150_000_000
START_SECONDS = 120  # for one service
STOP_SECONDS = 20  # for all that was started, then it is killed
# How soon a dead node is seen: within seconds, not Ray's quarter of a minute.
HEALTH_CHECKS = {"health_check_period_ms": 1000, "health_check_timeout_ms": 3000, "health_check_failure_threshold": 3}


class LocalCluster:
    """What stands, or is about to, in one folder."""

    def __init__(self, folder: Path = FOLDER) -> None:
        self.folder = folder
        self.environment: dict[str, str] = {}
        self.metrics: dict[str, str] = {}  # node -> where Prometheus would read it

    # -------------------------------------------------------------------------------------------- start

    def start(self) -> None:
        """Start every service, one after another; whatever fails ends those before it.

        Raises:
            RuntimeError: there is a cluster already, the folder is another user's, a program is missing, or a service
                did not start.
        """
        make_private(self.folder)
        if self._alive():
            raise RuntimeError(f"a cluster of {self.folder} is running already: `make cluster-stop` ends it")
        self._remove(keep_logs=False)
        (self.folder / "logs").mkdir()
        try:
            self._start_s3()
            self._start_postgresql()
            self._start_mlflow()
            self._start_head()
            for number in range(1, NODES + 1):
                self._start_node(number)
            self._wait("mlflow", lambda: _answers(f"{self.environment['MLFLOW_TRACKING_URI']}/health"))
            self._write_environment()
        except BaseException:
            self.stop()
            raise

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
        self._launch("s3", [sys.executable, "-m", "moto.server", "--host", "127.0.0.1", "--port", str(port)])
        self._wait("s3", lambda: is_listening(port))
        client = botocore.session.get_session().create_client(
            "s3",
            endpoint_url=self.environment["AWS_ENDPOINT_URL"],
            region_name=self.environment["AWS_DEFAULT_REGION"],
            aws_access_key_id=self.environment["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=self.environment["AWS_SECRET_ACCESS_KEY"],
        )
        client.create_bucket(Bucket=BUCKET)

    def _start_postgresql(self) -> None:
        """As a user of its own where we are root: PostgreSQL refuses to run as root.

        That user may not enter our folder, so its data lies in a folder of its own, to which ours has a link.
        """
        programs = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
        if not programs:
            raise RuntimeError("PostgreSQL is not installed: `make cluster` does it, or apt-get install postgresql")
        user = pwd.getpwnam("postgres") if os.geteuid() == 0 else pwd.getpwuid(os.geteuid())
        home = Path(tempfile.mkdtemp(prefix="admiral-postgresql-")) if os.geteuid() == 0 else self.folder / "data"
        home.mkdir(mode=0o700, exist_ok=True)
        (self.folder / "postgresql").symlink_to(home)
        self.database_password, password_file = secrets.token_hex(16), home / "password"
        write_private(password_file, self.database_password)
        for path in (home, password_file):
            os.chown(path, user.pw_uid, user.pw_gid)
        as_user: dict[str, Any] = (
            {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []} if os.geteuid() == 0 else {}
        )
        options = ["--username", "mlflow", "--auth", "scram-sha-256", "--pwfile", str(password_file)]
        command = [str(programs[-1] / "initdb"), "--pgdata", str(home / "data"), "--encoding", "UTF8", *options]
        with (self.folder / "logs" / "initdb.log").open("w") as log:
            subprocess.run(command, check=True, stdout=log, stderr=log, cwd="/", **as_user)
        password_file.unlink()
        port = free_port()
        settings = {"listen_addresses": "127.0.0.1", "port": port, "unix_socket_directories": ""}
        flags = [flag for name, value in settings.items() for flag in ("-c", f"{name}={value}")]
        command = [str(programs[-1] / "postgres"), "-D", str(home / "data"), *flags]
        self._launch("postgresql", command, **as_user)
        self._wait("postgresql", lambda: is_listening(port))
        # SQLAlchemy 2.1 takes a bare postgresql:// for another driver than the one installed.
        self._database = f"postgresql+psycopg2://mlflow:{self.database_password}@127.0.0.1:{port}/postgres"

    def _start_mlflow(self) -> None:
        """Its start takes longest, so Ray starts meanwhile. The database's password stays out of the command line."""
        port = free_port()
        self.environment["MLFLOW_TRACKING_URI"] = f"http://127.0.0.1:{port}"
        place = ["--artifacts-destination", f"s3://{BUCKET}/mlflow", "--host", "127.0.0.1", "--port", str(port)]
        command = [sys.executable, "-m", "mlflow", "server", "--workers", "1", *place]
        environment = {
            "MLFLOW_BACKEND_STORE_URI": self._database,
            "MLFLOW_S3_ENDPOINT_URL": self.environment["AWS_ENDPOINT_URL"],
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # its own job queue: eight processes that nobody here asks
            "MLFLOW_DISABLE_TELEMETRY": "true",
        }
        self._launch("mlflow", command, environment)

    def _start_head(self) -> None:
        self._port, dashboard = free_port(), free_port()
        self.environment |= {
            "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
        }
        options = {
            "port": self._port,
            "num-cpus": 0,  # no work on the head, as on a real cluster
            "dashboard-port": dashboard,
            "ray-client-server-port": free_port(),
            "temp-dir": self.folder / "ray",
            "system-config": json.dumps(HEALTH_CHECKS),
        }
        self._start_ray("ray head", ["--head", "--include-dashboard=true"], options)
        self._wait("ray head", lambda: is_listening(dashboard))

    def _start_node(self, number: int) -> None:
        options = {"address": f"127.0.0.1:{self._port}", "num-cpus": CPUS_OF_NODE}
        self._start_ray(f"ray node {number}", [], options)

    def _start_ray(self, name: str, flags: list[str], options: dict[str, object]) -> None:
        """A node, until it says that it runs: two that start at the same moment take each other's ports."""
        port = free_port()
        self.metrics[name] = f"http://127.0.0.1:{port}/metrics"
        options |= {
            "node-ip-address": "127.0.0.1",
            "object-store-memory": OBJECT_STORE_BYTES,
            "dashboard-agent-listen-port": free_port(),
            "metrics-export-port": port,
            "min-worker-port": 0,  # any free ports, for the nodes share one address
            "max-worker-port": 0,
        }
        flags = ["--block", "--disable-usage-stats", *flags, *(f"--{key}={value}" for key, value in options.items())]
        environment = {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",  # a job's `python` is ours
            "RAY_JOB_STOP_WAIT_TIME_S": "60",  # time for a last checkpoint when a job is stopped
            "OMP_NUM_THREADS": "1",
        }
        self._launch(name, [sys.executable, "-m", "ray.scripts.scripts", "start", *flags], environment)
        self._wait(name, lambda: "Ray runtime started" in self._log(name).read_text(errors="replace"))

    def _write_environment(self) -> None:
        """What a shell needs to talk to the cluster; only its owner may read it."""
        lines = [f"export {name}={value}\n" for name, value in self.environment.items()]
        write_private(self.folder / "environment", "".join(lines))

    # -------------------------------------------------------------------------------------------- processes

    def _launch(self, name: str, command: list[str], environment: dict[str, str] | None = None, **options: Any) -> None:
        """Start a process that leads a session of its own, and write it down at once."""
        theirs = ("RAY_", "MLFLOW_", "AWS_", "ADMIRAL_")
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(theirs)}
        with self._log(name).open("w") as log:
            process: subprocess.Popen = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                env=inherited | self.environment | (environment or {}),
                start_new_session=True,
                **options,
            )
        records = [
            *self.processes(),
            {"name": name, "pid": process.pid, "born": psutil.Process(process.pid).create_time()},
        ]
        (self.folder / "processes.json").write_text(json.dumps(records, indent=2))

    def processes(self) -> list[dict]:
        """What was started: name, pid, and when it was born, which tells it from a later process of the same pid."""
        path = self.folder / "processes.json"
        return json.loads(path.read_text()) if path.exists() else []

    def _alive(self) -> list[psutil.Process]:
        found = []
        for record in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process = psutil.Process(record["pid"])
                if process.create_time() == record["born"] and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def _log(self, name: str) -> Path:
        return self.folder / "logs" / f"{name.replace(' ', '-')}.log"

    def _wait(self, name: str, ready: Callable[[], bool]) -> None:
        deadline = time.monotonic() + START_SECONDS
        (record,) = (record for record in self.processes() if record["name"] == name)
        while time.monotonic() < deadline and any(process.pid == record["pid"] for process in self._alive()):
            if ready():
                return
            time.sleep(0.1)
        last = self._log(name).read_text(errors="replace").strip().splitlines()[-5:]
        raise RuntimeError(f"{name} did not start; its log ends with: {' | '.join(last)}")

    def stop(self) -> int:
        """End what processes.json names with all that these started, last first; return how many there were.

        What is in the folder goes too, but for the logs.

        Raises:
            RuntimeError: the folder is another user's.
        """
        make_private(self.folder)
        leaders = self._alive()[::-1]
        family = [*leaders, *(child for leader in leaders for child in leader.children(recursive=True))]
        for leader in leaders:
            with contextlib.suppress(ProcessLookupError):
                os.kill(leader.pid, signal.SIGTERM)
        _, left = psutil.wait_procs(family, timeout=STOP_SECONDS)
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._remove(keep_logs=True)
        return len(leaders)

    def _remove(self, keep_logs: bool) -> None:
        shutil.rmtree((self.folder / "postgresql").resolve(), ignore_errors=True)  # what the link points to
        for path in self.folder.glob("*"):
            if path.is_symlink() or not path.is_dir():
                path.unlink()
            elif not (keep_logs and path.name == "logs"):
                shutil.rmtree(path, ignore_errors=True)


def make_private(folder: Path) -> None:
    """Make a folder that only this user may enter, or close one that is there to all others.

    Raises:
        RuntimeError: it is a link, a file, or another user's, who could read and replace what is in it.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        raise RuntimeError(f"{folder} must be a folder of the user {os.geteuid()}; remove it, or pass another --folder")
    folder.chmod(0o700)


def write_private(path: Path, text: str) -> None:
    """Write a new file that only this user may read, in place of one that others may have open."""
    path.unlink(missing_ok=True)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)


def _answers(url: str) -> bool:
    with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5) as answer:
        return answer.status == 200
    return False


def main() -> None:
    """`python -m cluster.local start` or `stop`."""
    parser = argparse.ArgumentParser(description="A cluster on this machine.")
    parser.add_argument("action", choices=["start", "stop"])
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where it lives; a short path")
    arguments = parser.parse_args()
    cluster = LocalCluster(arguments.folder)
    try:
        if arguments.action == "stop":
            print(f"{cluster.stop()} processes of {cluster.folder} and what they started are ended")
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
