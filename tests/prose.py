"""Check the wording of all texts, and report the sizes of the packages: part of `make lint`.

    python -m tests.prose

Fails if a text of the project uses a word that has a standard term (CONTRIBUTING.md, "Wording"). Prints the lines of
code of each package and the longest functions, which never makes the check fail.
"""

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("models", "orchestrator", "cluster", "jobs", "tests")
LONGEST = 10  # functions that the report lists

# Wording that a reader would not search for (a pattern), and the standard term of the field.
REPLACED = {
    r"adopt(s|ed|ing)? a dataset": "register in place",
    r"answers? (with|the (URI|path|name))": "return",
    r"at every look|looks at the validation": "evaluation",
    r"\bby heart\b": "memorise",
    r"came of (it|them)": "the result",
    r"\bentrants?\b": "new trials",
    r"freed of (its )?bias": "corrected for bias",
    r"\bheats?\b": "evaluation of a trial at a rung",
    r"\bhears?\b": "receive",
    r"\b(failures|attempts|times|steps|items) in a row\b(?! group)": "consecutive",
    r"\blasting error": "permanent error",
    r"\blearnt\b": "learned",
    r"makes? no step": "is stalled",
    r"\bmade again\b|\bmakes? again\b": "regenerate",
    r"\bover-fit": "overfit",
    r"\bpurses?\b": "budget",
    r"\bput back\b": "restore",
    r"\bset aside\b": "quarantine",
    r"\bsound tar\b": "valid tar archive",
    r"\bstor(y|ies)\b": "workflow",
    r"\bthing\(s\)": "count the noun: 3 checks failed",
    r"\bunless another hand\b": "unless another worker did",
    r"\bwish(es|ed)?\b|\bon wish\b": "requested, accepted value",
    r"\bwhoever\b": "whichever worker, or the one who",
    r"\bwants? (to|so|a|the|its|no)\b": "need, require",
}  # fmt: skip


class Text(NamedTuple):
    """A line that a person reads."""

    path: Path
    line: int
    text: str


def texts(path: Path) -> Iterator[Text]:
    """Yield the lines of a document, or the comments and strings of a module."""
    content = path.read_text()
    if path.suffix != ".py":
        yield from (Text(path, number, line) for number, line in enumerate(content.splitlines(), 1))
        return
    for token in tokenize.generate_tokens(io.StringIO(content).readline):
        if token.type in (tokenize.COMMENT, tokenize.STRING):
            for offset, line in enumerate(token.string.splitlines()):
                yield Text(path, token.start[0] + offset, line)


def nonstandard_terms(text: str) -> list[tuple[str, str]]:
    """Return each wording that has a standard term, with that term."""
    matches = ((re.search(pattern, text, re.IGNORECASE), term) for pattern, term in REPLACED.items())
    return [(match[0], term) for match, term in matches if match]


def pages() -> list[Path]:
    """Return all files of the project whose wording is checked."""
    files = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "Makefile", "ray_cluster.yaml")]
    files += sorted((ROOT / "docs").glob("*.md"))
    for package in PACKAGES:
        files += sorted((ROOT / package).rglob("*.py"))
    quoting = {Path(__file__).resolve(), ROOT / "tests" / "test_prose.py"}
    return [path for path in files if path not in quoting]


def report() -> str:
    """Return lines by package, and the longest functions."""
    rows, functions = [], []
    for package in PACKAGES:
        lines = code = 0
        for path in (ROOT / package).rglob("*.py"):
            content = path.read_text()
            lines += content.count("\n")
            code += sum(bool(line.strip()) and not line.strip().startswith("#") for line in content.splitlines())
            for node in ast.walk(ast.parse(content)):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno:
                    length = node.end_lineno - node.lineno + 1
                    functions.append((length, f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"))
        rows.append(f"{package:14}{lines:8,} lines{code:8,} without blank lines and comments")
    longest = [f"{length:5} lines  {location}" for length, location in sorted(functions, reverse=True)[:LONGEST]]
    return "\n".join([*rows, "longest functions", *longest])


def main() -> int:
    """Print the report and all wording that has a standard term, and return the number of occurrences."""
    print(report())
    count = 0
    for path in pages():
        for text in texts(path):
            for wording, term in nonstandard_terms(text.text):
                count += 1
                print(f"{text.path.relative_to(ROOT)}:{text.line}: {wording!r}; use: {term}")
    return count


if __name__ == "__main__":
    sys.exit(bool(main()))
