"""Comparison of published batches with golden data: each file is accepted, or refused for the stated reason."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orchestrator.evaluation.npz import PublishedBatch, open_batch
from tests.comparison import Row


def compare_batches(folder: Path) -> list[Row]:
    """Return a row for each file of a manifest, which is accepted with its arrays or refused with a reason."""
    manifest = json.loads((folder / "MANIFEST.json").read_text())
    unknown = sorted(path.name for path in folder.glob("*.npz") if path.name not in manifest)
    rows = [Row(name, "*", "not covered", note="not in the manifest") for name in unknown]
    for name, entry in manifest.items():
        try:
            rows.append(_batch_row(folder, name, entry))
        except Exception as error:  # noqa: BLE001  # reported as this row's failure
            rows.append(Row(name, "load", "FAIL", note=f"{type(error).__name__}: {error}"))
    return rows


def _batch_row(folder: Path, name: str, entry: dict[str, Any]) -> Row:
    try:
        batch = open_batch(str(folder / name))
    except ValueError as error:
        is_refused = entry["expect"].startswith("refuse") and name in str(error)
        missing = [reason for reason in _stated_reasons(entry) if not re.search(reason, str(error))]
        note = f"does not match {', '.join(missing)}: " if missing else ""
        note += str(error).replace(f"{folder}/", "")
        return Row(name, "load", "pass" if is_refused and not missing else "FAIL", note=note)
    if entry["expect"].startswith("refuse"):
        return Row(name, "load", "FAIL", note=f"accepted, but: {entry['what']}")
    with np.load(folder / name, allow_pickle=False) as archive:
        arrays = dict(archive)
    if match := re.search(r"equal to (\w+)", entry["expect"]):
        with np.load(folder / f"{match[1]}.npz", allow_pickle=False) as archive:
            arrays["arr_0"] = archive["arr_0"]
    wrong = [key for key, value in _arrays_of(batch).items() if not _same(value, arrays.get(key))]
    return Row(name, "load", "FAIL" if wrong else "pass", note=f"differs in {', '.join(wrong)}" if wrong else "")


# Pattern in the manifest's description of a fault -> pattern that the error message must match.
REASONS = {
    r"\bnan\b|\binf\b": "not finite",
    r"not symmetric": "not symmetric",
    r"negative eigenvalues": "positive semi-definite",
    r"\bcrc\b": "CRC|decompress",
    r"complete zip|empty file|text file": "not an intact",
    r"fewer bytes|size mismatch|header says \d+ images": r"\d+ bytes are stored|early",
    r"pickle": "pickle",
    r"missing key": "has neither|but not",
    r"label -?\d": "labels from",
}


def _stated_reasons(entry: dict[str, Any]) -> list[str]:
    """Return patterns that the error on a refused file must match, from its manifest entry and its arrays."""
    text = f"{entry['what']} {entry['expect']}".lower()
    arrays: dict[str, tuple[list[int], str]] = entry["arrays"]
    shape, dtype = arrays.get("arr_0", ([1, 1, 1, 3], "uint8"))
    if dtype not in ("uint8", "object"):
        return [dtype]  # found before any value is read
    reasons = [reason for pattern, reason in REASONS.items() if re.search(pattern, text)]
    if dtype == "uint8" and (len(shape) != 4 or shape[3] != 3 or 0 in shape):
        reasons.append(re.escape(str(tuple(shape))))
    if arrays and not {"arr_0", "mu"} & set(arrays):
        reasons += list(arrays)
    if "arr_1" in arrays and arrays["arr_1"][0] != shape[:1]:
        reasons.append(f"{arrays['arr_1'][0][0]}.*{shape[0]} images")
    if "mu" in arrays and "sigma" not in arrays:
        reasons.append("'sigma'")
    elif "mu" in arrays and arrays["sigma"][0] != arrays["mu"][0] * 2:
        reasons.append(re.escape(str(tuple(arrays["sigma"][0]))))
    return reasons


def _arrays_of(batch: PublishedBatch) -> dict[str, NDArray[Any] | None]:
    images = batch.rows(0, batch.num_images) if batch.num_images else None
    arrays: dict[str, NDArray[Any] | None] = {"arr_0": images, "arr_1": batch.labels}
    for statistics, suffix in ((batch.pool, ""), (batch.spatial, "_s")):
        arrays[f"mu{suffix}"] = None if statistics is None else statistics.mean
        arrays[f"sigma{suffix}"] = None if statistics is None else statistics.covariance
    return arrays


def _same(value: NDArray[Any] | None, golden: NDArray[Any] | None) -> bool:
    return value is golden is None or (value is not None and golden is not None and np.array_equal(value, golden))
