"""The scanned digits as a dataset, for tests."""

from typing import Any

import pyarrow.parquet as pq

from orchestrator import storage
from orchestrator.data.config import PrepareConfig
from orchestrator.data.dataset import Manifest


def digits(store: str, **changes: Any) -> PrepareConfig:
    settings = {"source": "digits", "output": "digits", "name": "digits", "validation_fraction": 0.2}
    return PrepareConfig(store=store, **{**settings, **changes})


def table(manifest: Manifest, split: str) -> dict[str, list[Any]]:
    tables = [pq.read_table(storage.join(manifest.folder, s.path)) for s in manifest.shards(split)]
    return {name: [v for t in tables for v in t[name].to_pylist()] for name in tables[0].column_names}
