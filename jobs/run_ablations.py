"""Train and evaluate the rows of a table of ablations."""

from jobs.command_line import main
from orchestrator.ablations.job import plan, run_ablations
from orchestrator.ablations.presets import ablation_presets

if __name__ == "__main__":
    main(__doc__, ablation_presets(), run_ablations, plan)
