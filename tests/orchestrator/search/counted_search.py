"""Run a search whose workers log every batch that they draw.

Run it with `python -m tests.orchestrator.search.counted_search CONFIG LOG`: the config as JSON, and the log's path.
"""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from orchestrator.search import evaluator
from orchestrator.search import job as search
from orchestrator.search.config import SearchConfig
from orchestrator.search.evaluator import Block, BlockResult


def make_counted_worker(log: str, config: SearchConfig) -> Callable[[Block], BlockResult]:
    """Return the real worker, which logs each batch before it draws it."""
    real = evaluator.make_batch

    def make_logged_batch(networks: Any, generation: Any, number: int) -> Any:
        sampler, scale = generation.sampler, generation.guidance.scale
        with Path(log).open("a") as file:  # one short line: appended whole
            file.write(f"{sampler.name}-{sampler.num_steps}-{scale}-{generation.seed}-{number}\n")
        return real(networks, generation, number)

    evaluator.make_batch = make_logged_batch  # type: ignore[assignment]
    return evaluator.make_worker(config)


if __name__ == "__main__":
    text, log = sys.argv[1:]
    search.make_worker = partial(make_counted_worker, log)
    search.search(SearchConfig.model_validate_json(text))
