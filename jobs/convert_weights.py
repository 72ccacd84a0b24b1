"""Convert weights between .pt, safetensors and diffusers: a preset's name first, then overrides."""

import sys

from jobs.command_line import main
from orchestrator.weights.job import convert, plan
from orchestrator.weights.presets import conversion_presets


def joined(argv: list[str]) -> list[str]:
    """Return the arguments with `--flags VALUE` as `--flags=VALUE`, because the value itself begins with dashes."""
    for index, word in enumerate(argv[:-1]):
        if word == "--flags":
            return [*argv[:index], f"--flags={argv[index + 1]}", *argv[index + 2 :]]
    return argv


if __name__ == "__main__":
    sys.argv = joined(sys.argv)
    main(__doc__, conversion_presets(), convert, plan)
