"""Train an ADM upsampler, the second stage of a cascade."""

from jobs.command_line import main
from orchestrator.training.job import plan, train
from orchestrator.training.presets import upsampler_presets

if __name__ == "__main__":
    main(__doc__, upsampler_presets(), train, plan)
