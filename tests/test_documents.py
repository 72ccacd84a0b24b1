"""Every command line of a job in README, docs and manifests is one that the jobs take."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from jobs.command_line import parse
from tests.jobs.test_command_line import ALL_PRESETS

ROOT = Path(__file__).resolve().parents[1]
TEXTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), ROOT / "ray_cluster.yaml"]
MANIFESTS = sorted((ROOT / "cluster" / "deploy").rglob("*.yaml"))


def commands(text: str) -> Iterator[tuple[str, list[str]]]:
    """(job, arguments) of each `python jobs/JOB.py ...` in code, with lines that end in a backslash joined."""
    joined = re.sub(r"\\\n\s*", "", text)
    for found in re.finditer(r"python (?:/opt/admiral/)?jobs/(\w+)\.py([^`\n|]*)", joined):
        yield found[1], shlex.split(found[2], comments=True)


def all_commands() -> list[tuple[str, str, list[str]]]:
    found = [(path.name, *command) for path in TEXTS if path.exists() for command in commands(path.read_text())]
    for path in MANIFESTS:
        for document in yaml.safe_load_all(path.read_text()):
            found += [(path.name, *command) for command in commands(str(document.get("spec", {}).get("entrypoint")))]
    return found


@pytest.mark.parametrize(("where", "job", "arguments"), all_commands())
def test_the_job_takes_the_command(
    where: str, job: str, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert (ROOT / "jobs" / f"{job}.py").exists(), f"{where} names jobs/{job}.py"
    if not arguments and len(ALL_PRESETS[job]()) > 1:
        return  # the job's name alone, in a sentence
    if "--preset" in arguments:
        return  # a file of the reader's
    try:
        parse("", ALL_PRESETS[job](), arguments)
    except SystemExit as end:
        said = capsys.readouterr().err
        assert end.code == 0 or "there is no such object" in said, f"{where}: {said}"  # a search's answer, yet to come


def test_commands_are_found() -> None:
    assert len(all_commands()) > 15
    assert list(commands("`python jobs/a.py x --y 1`, and\npython jobs/b.py \\\n  --z '2 3'  # why")) == [
        ("a", ["x", "--y", "1"]),
        ("b", ["--z", "2 3"]),
    ]
