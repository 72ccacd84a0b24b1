"""Every command of README and docs works: all as dry runs, and those of the README's table completely."""

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml

from orchestrator import storage
from orchestrator.data.dataset import load_manifest
from orchestrator.data.job import prepare
from orchestrator.data.presets import dataset_presets
from orchestrator.evaluation.extractors import PUBLISHED
from tests import servers
from tests.orchestrator.data.layouts import pictures, write_tar_of_tars, write_tree
from tests.orchestrator.evaluation.golden_inception import write_weights
from tests.small_world import run
from tests.submission import BIN, ROOT, quiet_environment

TEXTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), ROOT / "ray_cluster.yaml"]
MANIFESTS = sorted((ROOT / "cluster" / "deploy").rglob("*.yaml"))
SHARD = 1024  # images of a shard in the manifest that replaces ImageNet


def commands(text: str) -> Iterator[tuple[str, list[str]]]:
    """Yield (job, arguments) of each `[python] jobs/JOB.py ...` in code. Lines that end in a backslash are joined."""
    joined = re.sub(r"\\\n\s*", "", text)
    for match in re.finditer(r"(?:python (?:/opt/admiral/)?|`)jobs/(\w+)\.py([^`\n|]*)", joined):
        yield match[1], shlex.split(match[2], comments=True)


def all_commands() -> list[tuple[str, str, list[str]]]:
    """Return (page, job, arguments) of all commands, without job names that stand alone in a sentence."""
    result = [(path.name, *command) for path in TEXTS for command in commands(path.read_text())]
    for path in MANIFESTS:
        for document in yaml.safe_load_all(path.read_text()):
            result += [(path.name, *command) for command in commands(str(document.get("spec", {}).get("entrypoint")))]
    return [command for command in result if command[2] or command[1] == "doctor"]


def test_commands_are_found() -> None:
    assert len(all_commands()) > 50
    assert list(commands("`python jobs/a.py x --y 1`, `jobs/c.py`, and\npython jobs/b.py \\\n  --z '2 3'  # why")) == [
        ("a", ["x", "--y", "1"]),
        ("c", []),
        ("b", ["--z", "2 3"]),
    ]


# ------------------------------------------------------------------------------------------------ dry runs


@pytest.fixture(scope="module")
def store(small_world: str, tmp_path_factory: pytest.TempPathFactory, s3_server: str) -> Iterator[str]:
    """Yield a store with small outputs of all long steps: trainings, samples, a search, and sources."""
    folder = shutil.copytree(small_world, tmp_path_factory.mktemp("commands") / "store").as_posix()
    _copy_outputs(folder)
    _write_sources(folder)
    with servers.environment(ADMIRAL_STORE=folder), pytest.MonkeyPatch.context() as patch:
        write_weights(Path(folder, "extractors", PUBLISHED["inception"].file), patch)
        yield folder


def _copy_outputs(folder: str) -> None:
    """Copy the digits' outputs to the folders that other commands of the docs read."""
    for source, names in {
        "digits/diffusion": [
            "images/diffusion",
            "imagenet64/diffusion",
            "imagenet64_256/upsampler",
        ],
        "digits/classifier": ["images/classifier", "imagenet64/classifier"],
        "digits/samples": ["images/samples", "imagenet64/samples", "adm256/samples"],
    }.items():
        for name in names:
            shutil.copytree(f"{folder}/{source}", f"{folder}/{name}")
    os.mkdir(f"{folder}/others")
    for name in ("admnet_guided_upsampled_imagenet256.npz", "others/admnet_guided_64x64.npz"):
        shutil.copy(f"{folder}/digits/samples/samples.npz", f"{folder}/{name}")


def _write_sources(folder: str) -> None:
    """Write pictures in class folders and as a tar of tars, and a manifest of ImageNet's size without its shards."""
    images = pictures(600)
    write_tree(f"{folder}/pictures", images)
    rows = [
        f"{image.cls}/{image.name}.png,{'thing' if number % 2 else 'person'}" for number, image in enumerate(images)
    ]
    Path(folder, "people.csv").write_text("\n".join(["key,label", *rows]))
    if not storage.exists("s3://bucket"):
        storage.make_bucket("s3://bucket")
    write_tar_of_tars("s3://bucket/ILSVRC2012_img_train", images)
    _, preset = dataset_presets()["images"]
    prepare(preset.model_copy(update={"store": folder, "source": "pictures"}))
    small = load_manifest(f"{folder}/datasets/images")
    shard = small.splits["train"][0].model_copy(update={"row_groups": (128,) * (SHARD // 128), "rows": SHARD})
    classes = tuple(f"n{number:08d}" for number in range(1000))
    splits = {"train": (shard,) * (1_276_042 // SHARD), "validation": (shard,) * 5}
    large = small.model_copy(update={"name": "imagenet", "classes": classes, "splits": splits})
    storage.write_bytes(f"{folder}/datasets/imagenet/manifest.json", large.model_dump_json().encode())


@pytest.mark.parametrize(("page", "job", "arguments"), all_commands())
def test_every_command_has_a_dry_run(
    page: str, job: str, arguments: list[str], store: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (ROOT / "jobs" / f"{job}.py").exists(), f"{page} names jobs/{job}.py"
    if "--preset" in arguments:
        return  # the page writes this file first: test_documents.py runs these commands
    options = [re.sub(r"^/(?=weights/|others/)|^\$ADMIRAL_STORE/", f"{store}/", argument) for argument in arguments]
    if job.startswith(("train", "generate", "tune")) and "--help" not in arguments:
        options += ["--output", "planned"]  # the outputs under the page's name are small and have other settings
    try:
        run(job, [*options, "--dry-run"])
        assert '"dry_run": true' in capsys.readouterr().out
    except SystemExit as end:
        assert end.code == 0 and "--help" in arguments, f"{page}: {capsys.readouterr().err}"


# ------------------------------------------------------------------------------------------------ complete runs


@pytest.mark.ray
@pytest.mark.slow
def test_readmes_table_runs_from_top_to_bottom(tmp_path: Path) -> None:
    environment = quiet_environment(ADMIRAL_STORE=str(tmp_path), PATH=f"{BIN}{os.pathsep}{os.environ['PATH']}")
    # The table needs the outputs of these jobs.
    preparations = ("prepare_dataset", "train_adm", "train_classifier", "generate_samples")
    rows = re.findall(r"^\|.*\| `(python jobs/\w+\.py digits.*)` \|$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert len(rows) > 8
    for row in (*(f"python jobs/{job}.py digits" for job in preparations), *rows):
        process = subprocess.run(
            ["bash", "-c", row], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )
        print(row, process.stdout[-300:], sep="\n")
        assert process.returncode == 0, f"{row}: {process.stderr[-2000:]}"
    with np.load(tmp_path / "digits/samples/samples.npz") as batch:
        assert batch["arr_0"].shape[1:] == (8, 8, 3) and batch["arr_0"].std() > 50
