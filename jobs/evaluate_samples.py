"""Evaluate samples against a dataset or a published reference batch."""

from jobs.command_line import main
from orchestrator.evaluation.job import evaluate, plan
from orchestrator.evaluation.presets import evaluation_presets

if __name__ == "__main__":
    main(__doc__, evaluation_presets(), evaluate, plan)
