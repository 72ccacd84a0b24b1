"""Measure the cost of an unreachable tracking server for a training step. Run by hand:

    python -m tests.benchmarks.tracking_away [--pairs 20] [--steps 100]

Each step is a matrix product and logs ten numbers, which is far more than trainings log. A pair is one window with a
reachable server and one with a server that resets all connections, in random order. Prints the milliseconds of a step,
the median ratio with a 95% interval, and the number of records in MLflow at the end.
"""

import tempfile
import time
from dataclasses import dataclass

import numpy as np
import torch
import tyro
from mlflow import MlflowClient

from orchestrator.config import experiment_name
from orchestrator.tracking import Tracker
from tests import servers
from tests.benchmarks.pool_efficiency import median_interval
from tests.chaos.proxy import Proxy


@dataclass(frozen=True)
class Options:
    """The measurement."""

    pairs: int = 20  # alternating windows
    steps: int = 100  # of a window


def main(options: Options) -> None:
    """Print the results."""
    rng, seconds, step = np.random.default_rng(0), dict[str, list[float]](reachable=[], unreachable=[]), 0
    with tempfile.TemporaryDirectory() as folder, servers.mlflow_server(folder) as (uri, _):
        proxy = Proxy(uri)
        tracker = Tracker("benchmark", f"{folder}/run", proxy.endpoint)
        for pair in range(-1, options.pairs):  # the first pair is a warm-up
            for name in rng.permutation(list(seconds)):
                rule = proxy.add("reset") if name == "unreachable" else None
                duration = window(tracker, range(step, step + options.steps))
                step += options.steps
                if rule is not None:
                    proxy.remove(rule)
                while tracker.unsent:  # so that the next window does not send these
                    time.sleep(0.1)
                if pair >= 0:
                    seconds[name].append(duration / options.steps)
        tracker.finish("FINISHED")
        client = MlflowClient(uri)
        (run,) = client.search_runs([client.get_experiment_by_name(experiment_name()).experiment_id])
        num_stored = len(client.get_metric_history(run.info.run_id, "number_0"))
        proxy.close()
    for name, values in seconds.items():
        print(f"{name:11} {np.median(values) * 1e3:7.2f} ms a step")
    ratios = np.sort(np.array(seconds["unreachable"]) / np.array(seconds["reachable"]))
    low, high = median_interval(ratios)
    interval = f"95% interval {low:.3f} to {high:.3f}"
    print(f"unreachable/reachable over {options.pairs} pairs: {np.median(ratios):.3f}, {interval}")
    print(f"{num_stored:,} of {step:,} records of each number are in MLflow")


def window(tracker: Tracker, steps: range) -> float:
    """Return the seconds of these steps, each of which logs its numbers."""
    matrix = torch.ones(700, 700)
    begin = time.perf_counter()
    for step in steps:
        (matrix @ matrix).sum().item()
        tracker.metrics({f"number_{i}": float(i) for i in range(10)}, step=step)
    return time.perf_counter() - begin


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(tyro.cli(Options, description=__doc__))
