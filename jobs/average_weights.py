"""Compute an average of a training's weights of any length after the training (post-hoc EMA)."""

from jobs.command_line import main
from orchestrator.training.averages import average, plan
from orchestrator.training.presets import average_presets

if __name__ == "__main__":
    main(__doc__, average_presets(), average, plan)
