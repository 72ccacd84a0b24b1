"""Evaluate the snapshots of a training run, and find the best one."""

from jobs.command_line import main
from orchestrator.run_evaluation.job import evaluate_run, plan
from orchestrator.run_evaluation.presets import run_evaluation_presets

if __name__ == "__main__":
    main(__doc__, run_evaluation_presets(), evaluate_run, plan)
