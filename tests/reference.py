"""Comparison of Admiral with golden data: `python -m tests.reference [DIR]`; DIR is tests/golden by default.

DIR is a folder of golden data or contains several. The folders determine what is compared, with which settings and
tolerances; their content determines their kind. This prints a row for every comparison, and exits with 1 if one fails
or if no check knows an array or a file.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from tests import reference_diffusion, reference_metrics
from tests.comparison import Row

# Kinds of folders: (does a folder hold this kind?, all of its rows)
KINDS: list[tuple[Callable[[Path], bool], Callable[[Path], list[Row]]]] = [
    (reference_diffusion.recognises, reference_diffusion.compare),
    (reference_metrics.recognises, reference_metrics.compare),
]


def compare_folder(folder: Path) -> list[Row]:
    """Return the rows of one folder of golden data, or a single "not covered" if no kind recognises it."""
    for recognises, compare in KINDS:
        if recognises(folder):
            return compare(folder)
    return [Row(folder.name, "*", "not covered", note="no check recognises this folder")]


def compare_all(root: Path) -> list[Row]:
    """Return the rows of `root` if it contains golden data, and otherwise those of all its folders."""
    if any(recognises(root) for recognises, _ in KINDS):
        return compare_folder(root)
    folders = sorted(path for path in root.iterdir() if path.is_dir())
    if not folders:
        return compare_folder(root)
    return [row for folder in folders for row in compare_folder(folder)]


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare Admiral with golden data.")
    parser.add_argument("folder", nargs="?", type=Path, default=Path(__file__).parent / "golden")
    folder = parser.parse_args().folder
    if not folder.is_dir():
        parser.error(f"{folder} is not a folder")
    rows = compare_all(folder)
    width = max(len(row.case) for row in rows)
    for row in rows:
        print(row.line(width))
    verdicts = Counter(row.verdict for row in rows)
    print(", ".join(f"{verdicts[verdict]} {verdict}" for verdict in ("pass", "FAIL", "not covered")))
    return 0 if set(verdicts) == {"pass"} else 1


if __name__ == "__main__":
    sys.exit(main())
