"""Train an ADM diffusion model: a preset's name first, then overrides."""

from jobs.command_line import main
from orchestrator.presets import adm_presets
from orchestrator.training import plan, train

if __name__ == "__main__":
    main(__doc__, adm_presets(), train, plan)
