"""Check every node of the cluster, the store and the tracking server."""

from jobs.command_line import main
from orchestrator.doctor import doctor_presets, examine, plan

if __name__ == "__main__":
    main(__doc__, doctor_presets(), examine, plan)
