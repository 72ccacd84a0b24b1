"""Estimate bits per dimension of a diffusion model, with pictures of progressive coding."""

from functools import partial

from jobs.command_line import main
from orchestrator.evaluation.likelihood import estimate, plan
from orchestrator.evaluation.presets import likelihood_presets
from orchestrator.training.presets import trained_networks

if __name__ == "__main__":
    main(__doc__, likelihood_presets(), estimate, partial(plan, trained=trained_networks()))
