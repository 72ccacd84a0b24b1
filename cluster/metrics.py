"""Metrics for Prometheus at Ray's endpoint on every node: `ray_admiral_NAME{job="..."}`."""

import re
import sys
import threading
from collections.abc import Mapping
from typing import Any

_gauges: dict[str, Any] = {}
_lock = threading.Lock()


def publish(job: str, values: Mapping[str, float]) -> None:
    """Set a job's metrics at this node's endpoint until this process ends. Without Ray, do nothing."""
    ray = sys.modules.get("ray")  # a process that has not imported Ray is not connected to it
    if ray is None or not ray.is_initialized():
        return
    for name, value in values.items():
        _gauge(name).set(float(value), tags={"job": job})


def _gauge(name: str) -> Any:
    """Return the gauge of a metric, which is created once for each process."""
    from ray.util.metrics import Gauge

    metric = f"admiral_{re.sub('[^a-zA-Z0-9_]', '_', name)}"
    with _lock:
        if metric not in _gauges:
            _gauges[metric] = Gauge(metric, description=f"Admiral's {name.replace('_', ' ')}", tag_keys=("job",))
        return _gauges[metric]
