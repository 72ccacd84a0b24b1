"""Estimate bits per dimension, with the pictures of progressive coding: a preset's name first, then overrides."""

from jobs.command_line import main
from orchestrator.evaluation.likelihood import estimate, plan
from orchestrator.evaluation.presets import likelihood_presets

if __name__ == "__main__":
    main(__doc__, likelihood_presets(), estimate, plan)
