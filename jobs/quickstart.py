"""Prepare, train, search, generate and evaluate scanned digits on this machine, and write a page about it."""

from jobs.command_line import main
from orchestrator.presets import quickstart_presets
from orchestrator.quickstart import plan, quickstart

if __name__ == "__main__":
    main(__doc__, quickstart_presets(), quickstart, plan)
