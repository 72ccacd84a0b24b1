"""Prepare a dataset: shuffled Parquet shards and a manifest."""

from jobs.command_line import main
from orchestrator.data.job import plan, prepare_and_track
from orchestrator.data.presets import dataset_presets

if __name__ == "__main__":
    main(__doc__, dataset_presets(), prepare_and_track, plan)
