"""The last lines of a job: what to open, and the next command with its arguments filled in."""

import argparse
import shlex
import sys
from collections.abc import Iterable

from orchestrator.config import SIZES

# Presets of all jobs that may follow.
EVERYWHERE = ("images", "images_cpu", "digits", *(f"imagenet{size}" for size in SIZES))


def next_command(job: str, **options: str) -> str:
    """Return the command of the next job: this job's preset if the next one has it, these options, and its --store."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--store")
    store = parser.parse_known_args(sys.argv[1:])[0].store
    preset = next((name for name in sys.argv[1:2] if name in EVERYWHERE), EVERYWHERE[0])
    options |= {"store": store} if store else {}
    given = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", value)]
    return shlex.join(["python", f"jobs/{job}.py", preset, *given])


def print_closing(opened: Iterable[str], following: Iterable[str]) -> None:
    """Print one line for each place to open and for each command to run next."""
    for place in opened:
        print(f"open  {place}")
    for command in following:
        print(f"next  {command}")
