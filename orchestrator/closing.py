"""The last lines of a job: what to open, and the next command with its arguments filled in."""

import argparse
import shlex
import sys
from collections.abc import Iterable

from orchestrator.config import SIZES

# Presets that every job has which may be the next one.
COMMON_PRESETS = ("images", "images_cpu", "digits", *(f"imagenet{size}" for size in SIZES))


def next_command(job: str, **options: str) -> str:
    """Return the command of the next job: this job's preset if all jobs have it, `options`, and this job's --store."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--store")
    store = parser.parse_known_args(sys.argv[1:])[0].store
    preset = next((name for name in sys.argv[1:2] if name in COMMON_PRESETS), COMMON_PRESETS[0])
    if store:
        options["store"] = store
    arguments = ["python", f"jobs/{job}.py", preset]
    for name, value in options.items():
        arguments += [f"--{name.replace('_', '-')}", value]
    return shlex.join(arguments)


def print_closing(uris: Iterable[str], commands: Iterable[str]) -> None:
    """Print one line for each URI to open and for each command to run next."""
    for uri in uris:
        print(f"open  {uri}")
    for command in commands:
        print(f"next  {command}")
