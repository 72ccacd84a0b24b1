"""Search for the best guidance, sampler and number of steps."""

from functools import partial

from jobs.command_line import main
from orchestrator.search.job import plan, search
from orchestrator.search.presets import search_presets
from orchestrator.training.presets import trained_networks

if __name__ == "__main__":
    main(__doc__, search_presets(), search, partial(plan, trained=trained_networks()))
