"""With several nodes, stores and tracking files of one node are refused."""

from collections.abc import Callable
from pathlib import Path

import pytest

from cluster import nodes
from cluster.nodes import Node, refuse_unshared

HEAD, WORKER = Node("a" * 20, "10.0.0.1", True, {}), Node("b" * 20, "10.0.0.2", False, {"CPU": 8, "GPU": 1})
SERVER = "http://mlflow:5000"


@pytest.fixture
def two_nodes(monkeypatch: pytest.MonkeyPatch) -> dict[Node, str]:
    """Return the disks of a head and a worker, which a test may change."""
    disks = {HEAD: "", WORKER: ""}

    def on_each(targets: list[Node], function: Callable[[Node], bool], timeout: float) -> dict[Node, bool]:
        return {node: function(node) and not disks[node] for node in targets}

    monkeypatch.setattr(nodes, "nodes", lambda: list(disks))
    monkeypatch.setattr(nodes, "on_each", on_each)
    return disks


def test_a_shared_store_and_a_server_are_fine(two_nodes: dict[Node, str], tmp_path: Path) -> None:
    refuse_unshared((str(tmp_path), SERVER))
    refuse_unshared((f"file://{tmp_path}", SERVER))
    refuse_unshared(("s3://bucket/root", SERVER))
    assert not list(tmp_path.iterdir()), "nothing stays behind"


def test_a_store_that_one_node_does_not_see_is_refused(two_nodes: dict[Node, str], tmp_path: Path) -> None:
    two_nodes[WORKER] = "of its own"
    with pytest.raises(ValueError, match=r"is not the same folder on 10\.0\.0\.2 .*set ADMIRAL_STORE"):
        refuse_unshared((str(tmp_path), SERVER))
    assert not list(tmp_path.iterdir())


def test_a_tracking_file_is_refused(two_nodes: dict[Node, str]) -> None:
    with pytest.raises(ValueError, match="file of one machine, and the cluster has 2: set"):
        refuse_unshared(("s3://bucket/root", "sqlite:////shared/mlflow.db"))


def test_one_machine_may_use_files(tmp_path: Path) -> None:
    refuse_unshared((str(tmp_path), f"sqlite:///{tmp_path}/mlflow.db"))
