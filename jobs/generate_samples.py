"""Generate samples, guided or not, as shards: a preset's name first, then overrides."""

from jobs.command_line import main
from orchestrator.generation.job import generate, plan
from orchestrator.generation.presets import generation_presets

if __name__ == "__main__":
    main(__doc__, generation_presets(), generate, plan)
