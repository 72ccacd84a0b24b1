"""Compare the arrays of a golden file with computed ones, one row of the report for each array."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Verdict = Literal["pass", "FAIL", "not covered"]
Compute = Callable[[str], Any]  # array name -> the computed value, or None if the array is an input or unknown
TABLE_TOLERANCE = 1e-12  # relative, for float64 tables without a stated tolerance


@dataclass(frozen=True)
class Row:
    """One comparison: the array, the largest difference, and the tolerance."""

    file: str
    case: str
    verdict: Verdict
    difference: float | None = None
    tolerance: float | None = None
    note: str = ""

    def line(self, case_width: int) -> str:
        """Return the row as a line of text, with the case padded to `case_width` characters."""
        numbers = [f"{'' if n is None else f'{n:.2e}':>9}" for n in (self.difference, self.tolerance)]
        return f"{self.file:32} {self.case:{case_width}} {' '.join(numbers)}  {self.verdict} {self.note}".rstrip()


@dataclass
class GoldenFile:
    """The arrays of one .npz with their tolerances. Collects rows, and records which arrays were used.

    `tolerances`: array name -> "exact" or {"tol": absolute}. If it is None, the folder states none for this file:
    integers are compared exactly, and float64 tables to a relative 1e-12.
    """

    path: Path
    tolerances: dict[str, Any] | None
    floors: dict[str, float] = field(default_factory=dict)  # array name -> smallest tolerance, set by its check
    rows: list[Row] = field(default_factory=list)
    seen: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        with np.load(self.path, allow_pickle=False) as archive:
            self.arrays: dict[str, NDArray[Any]] = {name: archive[name] for name in archive.files}

    def __contains__(self, name: str) -> bool:
        return name in self.arrays

    def array(self, name: str) -> NDArray[Any]:
        """Return an array that serves as an input. Raise ValueError if the file has no array of this name."""
        if name not in self.arrays:
            raise ValueError(f"{self.path.name} has no array {name!r}")
        self.seen.add(name)
        return self.arrays[name]

    def tensor(self, name: str) -> Tensor:
        """Return an input array as a tensor. Raise ValueError if the file has no array of this name."""
        return torch.from_numpy(self.array(name))

    def optional(self, name: str) -> Tensor | None:
        """Return an input array as a tensor, or None if the file has no array of this name."""
        return self.tensor(name) if name in self.arrays else None

    def fail(self, name: str, reason: object) -> None:
        """Add a row that states why `name` could not be compared."""
        self.seen.add(name)
        self.rows.append(Row(self.path.name, name, "FAIL", note=str(reason)))

    def compare(self, compute: Compute) -> list[Row]:
        """Return all rows: one for each array that `compute` covers, that was not used, or that is missing.

        A comparison that raises adds a row with the error; the others still run.
        """
        for name in self.arrays:
            try:
                value = compute(name)
                if value is not None:
                    self._compare_array(name, value)
            except Exception as error:  # noqa: BLE001  # reported as this row's failure
                self.fail(name, f"{type(error).__name__}: {error}")
        for name in self.arrays:
            if name not in self.seen:
                self.rows.append(Row(self.path.name, name, "not covered"))
        for name in self.tolerances or {}:
            if name not in self.arrays:
                self.fail(name, "has a tolerance but is not in the file")
        return self.rows

    def _compare_array(self, name: str, value: Any) -> None:
        value = value.detach().numpy() if isinstance(value, Tensor) else np.asarray(value)
        expected = self.array(name)
        if value.shape != expected.shape:
            raise ValueError(f"shape {value.shape}, golden {expected.shape}")
        entry: Any = "exact" if expected.dtype.kind in "iub" else (self.tolerances or {}).get(name)
        table = entry is None and self.tolerances is None and expected.dtype == np.float64
        if entry is None and not table:
            self.rows.append(Row(self.path.name, name, "not covered", note="no tolerance is given for it"))
            return
        with np.errstate(invalid="ignore"):
            difference = np.abs(np.subtract(value, expected, dtype=np.float64))
        difference = np.where(value == expected, 0.0, difference)  # equal infinities agree
        if table:
            difference = difference / np.where(expected == 0, 1.0, np.abs(expected))
            tolerance = TABLE_TOLERANCE
        else:
            tolerance = 0.0 if entry == "exact" else max(float(entry["tol"]), self.floors.get(name, 0.0))
        largest = float(difference.max(initial=0.0))  # NaN if one element is NaN: no tolerance accepts it
        self.rows.append(Row(self.path.name, name, "pass" if largest <= tolerance else "FAIL", largest, tolerance))
