"""What all nodes of a cluster must see alike: the store, and where the numbers go."""

import uuid
from functools import partial

from cluster.nodes import Node, nodes, on_each
from orchestrator import storage
from orchestrator.config import JobConfig

SECONDS = 60.0  # that a node has to look for a file; one that says nothing is not blamed


def refuse_unshared(config: JobConfig, tracking_uri: str) -> None:
    """On several machines, refuse a tracking file and a store that lies on one node's own disk.

    Raises:
        ValueError: the message says what to set instead.
    """
    there = nodes()
    machines = len({node.address for node in there})
    if machines < 2:
        return
    if tracking_uri.startswith("sqlite:"):
        raise ValueError(
            f"MLFLOW_TRACKING_URI={tracking_uri} is a file of one machine, and the cluster has {machines}: "
            "set it to a server's address (docs/cluster.md says how to start one)"
        )
    root = config.path("")
    if "://" in root and not root.startswith("file://"):
        return
    mark = storage.join(root, f"seen-by-all-nodes-{uuid.uuid4().hex}")
    storage.write_bytes(mark, b"")
    try:
        answers = on_each(there, partial(_sees, mark), SECONDS)
    finally:
        storage.delete(mark)
    if blind := [str(node) for node, sees in answers.items() if sees is False]:
        raise ValueError(
            f"store={root} is not the same folder on {', '.join(blind)}: set ADMIRAL_STORE to object storage, or to a "
            "path that all nodes share"
        )


def _sees(mark: str, node: Node) -> bool:
    return storage.exists(mark)
