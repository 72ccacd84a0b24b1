"""Train the noisy classifier that guides sampling."""

from jobs.command_line import main
from orchestrator.training.job import plan, train
from orchestrator.training.presets import classifier_presets

if __name__ == "__main__":
    main(__doc__, classifier_presets(), train, plan)
