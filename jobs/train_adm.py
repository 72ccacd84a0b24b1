"""Train an ADM diffusion model."""

from jobs.command_line import main
from orchestrator.training.job import plan, train
from orchestrator.training.presets import adm_presets

if __name__ == "__main__":
    main(__doc__, adm_presets(), train, plan)
