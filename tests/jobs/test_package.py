"""Test that `ray job submit --working-dir .` sends the code and nothing else."""

import re
import subprocess
import zipfile
from pathlib import Path

from ray._private.runtime_env.packaging import create_package

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 2_000_000  # bytes; the job server refuses fifty times as much


def test_a_submitted_job_carries_the_code_and_nothing_else(tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in tracked:
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_bytes((ROOT / name).read_bytes())
    for clutter in (
        ".venv/lib/torch.so",
        "runs/digits/weights.safetensors",
        "build/x",
        ".mypy_cache/x",
        "jobs/__pycache__/x.pyc",
    ):
        (checkout / clutter).parent.mkdir(parents=True, exist_ok=True)
        (checkout / clutter).write_bytes(b"x" * 1_000_000)
    package = tmp_path / "package.zip"
    create_package(str(checkout), package, include_gitignore=True, excludes=[])
    with zipfile.ZipFile(package) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
    sent = {name.split("/", 1)[0] for name in names if "/" in name}
    assert sent == {"models", "orchestrator", "cluster", "jobs"}
    assert {"jobs/train_adm.py", "orchestrator/quickstart/page.html", "constraints.txt"} <= names
    size = package.stat().st_size
    assert size < LIMIT
    stated = re.search(r"about (\d+) KB", (ROOT / "docs" / "cluster.md").read_text())
    assert stated and abs(size / 1000 - int(stated[1])) < 0.25 * size / 1000, (
        f"docs/cluster.md: it is {size / 1000:.0f} KB"
    )
