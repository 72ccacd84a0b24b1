"""Generate samples with or without guidance."""

from functools import partial

from jobs.command_line import main
from orchestrator.generation.job import generate, plan
from orchestrator.generation.presets import generation_presets
from orchestrator.training.presets import trained_networks

if __name__ == "__main__":
    main(__doc__, generation_presets(), generate, partial(plan, trained=trained_networks()))
