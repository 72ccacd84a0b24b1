"""Fixtures for all tests, such as one local Ray and one S3 server for the whole session."""

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

import cluster.servers
from tests import servers
from tests.chaos.proxy import Proxy
from tests.small_world import build

# Set before Ray, torch, MLflow and botocore start: no other cluster, no metadata service, no telemetry, one thread.
os.environ.pop("RAY_ADDRESS", None)
os.environ.update(AWS_EC2_METADATA_DISABLED="true", MLFLOW_DISABLE_TELEMETRY="true", OMP_NUM_THREADS="1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files that need Ray first: they take longest, and pytest-xdist distributes files in this order."""
    on_ray = {item.path for item in items if item.get_closest_marker("ray")}
    items.sort(key=lambda item: item.path not in on_ray)


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """Yield the endpoint of an S3 server, to which the standard AWS variables refer for the rest of the session."""
    with cluster.servers.s3_server() as endpoint, servers.environment(AWS_ENDPOINT_URL=endpoint, **servers.S3_SETTINGS):
        yield endpoint


@pytest.fixture
def s3_bucket(s3_server: str) -> str:
    """Return the URI of a new bucket."""
    import s3fs

    name = f"test-{uuid.uuid4().hex[:12]}"
    s3fs.S3FileSystem(endpoint_url=s3_server).mkdir(name)
    return f"s3://{name}"


@pytest.fixture(scope="session")
def _empty_tracking(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a SQLite file with MLflow's tables. They are created only once, because that takes seconds."""
    from mlflow import MlflowClient

    file = tmp_path_factory.mktemp("tracking") / "mlflow.db"
    MlflowClient(f"sqlite:///{file}").search_experiments()
    return file


@pytest.fixture
def sqlite_tracking(_empty_tracking: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Set MLFLOW_TRACKING_URI to a new SQLite file and return it."""
    shutil.copy(_empty_tracking, tmp_path / "mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri := f"sqlite:///{tmp_path}/mlflow.db")
    return uri


@pytest.fixture(scope="session")
def ray_proxy(s3_server: str) -> Iterator[Proxy]:
    """Yield the fault proxy between the workers of `ray_session` and the S3 server; it has no rules at first."""
    proxy = Proxy(s3_server)
    yield proxy
    proxy.close()


@pytest.fixture(scope="session")
def ray_session(ray_proxy: Proxy) -> Iterator[None]:
    """Start a local Ray for all tests marked `ray`; its workers use the S3 server through `ray_proxy`."""
    from cluster.session import session

    with contextlib.ExitStack() as stack:
        with servers.environment(AWS_ENDPOINT_URL=ray_proxy.endpoint):
            stack.enter_context(session(4))
        yield


@pytest.fixture(scope="session")
def small_world(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a store with a dataset, three trainings, samples and a search. Tests must not change it."""
    folder = str(tmp_path_factory.mktemp("small-world"))
    build(folder)
    return folder
