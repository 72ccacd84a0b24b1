"""Convert weights between .pt, safetensors and diffusers."""

from jobs.command_line import main
from orchestrator.weights.job import convert, plan
from orchestrator.weights.presets import conversion_presets

if __name__ == "__main__":
    main(__doc__, conversion_presets(), convert, plan)
