"""Test that `ray job submit --working-dir .` sends the code and nothing else."""

import re
import subprocess
import zipfile
from pathlib import Path

from ray._private.runtime_env.packaging import create_package

ROOT = Path(__file__).resolve().parents[2]
CLUTTER = (
    ".venv/lib/torch.so", "venv/lib/site.py", "env/bin/python", "runs/digits/weights.safetensors", "another-store/x.pt",
    "mlruns/0/meta.yaml", "wandb/run/x.json", "build/x", ".mypy_cache/x", "jobs/__pycache__/x.pyc", "node_modules/x.py",
    "256x256_diffusion.pt", "model.safetensors", "samples.npz", "train.tar", "imagenet.tar.gz", "features.npy", "x.zip",
    "scratch.py", "mlflow.db", "core", "notebook.ipynb", ".env", "jobs/weights.pt", "jobs/.env",
    "orchestrator/evaluation/batch.npz", "models/inception.pth", "cluster/logs.txt",
)  # fmt: skip


def test_a_submitted_job_carries_the_code_and_nothing_else(tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in tracked:
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_bytes((ROOT / name).read_bytes())
    for name in CLUTTER:
        assert name not in tracked
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_bytes(b"x" * 100_000)
    (checkout / ".gitignore").unlink()  # it is the allow-list alone that decides
    package = tmp_path / "package.zip"
    create_package(str(checkout), package, include_gitignore=True, excludes=[])
    with zipfile.ZipFile(package) as archive:
        sent = {name for name in archive.namelist() if not name.endswith("/")}
    packages = ("cluster/", "jobs/", "models/", "orchestrator/")
    code = {
        name
        for name in tracked
        if name.startswith(packages) and "deploy" not in name and name.endswith((".py", ".html", ".yaml"))
    }
    assert sent == {*code, "constraints.txt"}
    size = package.stat().st_size / 1000
    stated = re.search(r"about (\d+) KB", (ROOT / "docs" / "cluster.md").read_text())
    assert stated and abs(size - int(stated[1])) < 0.1 * size, f"docs/cluster.md: it is {size:.0f} KB"
