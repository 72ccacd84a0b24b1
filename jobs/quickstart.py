"""Prepare, train, search, generate and evaluate on scanned digits on this machine, and write a report."""

from jobs.command_line import main
from orchestrator.quickstart.job import plan, quickstart
from orchestrator.quickstart.presets import quickstart_presets

if __name__ == "__main__":
    main(__doc__, quickstart_presets(), quickstart, plan)
