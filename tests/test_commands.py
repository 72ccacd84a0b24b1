"""Every command of README and docs does what it says: what is long as a dry run, the digits' in full."""

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
SHARD = 1024  # images of a shard in what stands for ImageNet


def commands(text: str) -> Iterator[tuple[str, list[str]]]:
    """(job, arguments) of each `[python] jobs/JOB.py ...` in code, with lines that end in a backslash joined."""
    joined = re.sub(r"\\\n\s*", "", text)
    for found in re.finditer(r"(?:python (?:/opt/admiral/)?|`)jobs/(\w+)\.py([^`\n|]*)", joined):
        yield found[1], shlex.split(found[2], comments=True)


def all_commands() -> list[tuple[str, str, list[str]]]:
    """(page, job, arguments), but for a job's name alone in a sentence."""
    found = [(path.name, *command) for path in TEXTS for command in commands(path.read_text())]
    for path in MANIFESTS:
        for document in yaml.safe_load_all(path.read_text()):
            found += [(path.name, *command) for command in commands(str(document.get("spec", {}).get("entrypoint")))]
    return [command for command in found if command[2] or command[1] == "doctor"]


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
    """What the long steps would have left, as small as it can be: every training, samples, a search, and sources."""
    folder = shutil.copytree(small_world, tmp_path_factory.mktemp("commands") / "store").as_posix()
    _copy_outputs(folder)
    _write_sources(folder)
    with servers.environment(ADMIRAL_STORE=folder), pytest.MonkeyPatch.context() as patch:
        write_weights(Path(folder, "extractors", PUBLISHED["inception"].file), patch)
        yield folder


def _copy_outputs(folder: str) -> None:
    """Under the names that other commands of the docs leave."""
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
    """Pictures in folders of classes and as the tar of tars, and a manifest of ImageNet's size, without its shards."""
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


@pytest.mark.parametrize(("where", "job", "arguments"), all_commands())
def test_the_command_can_be_planned(
    where: str, job: str, arguments: list[str], store: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (ROOT / "jobs" / f"{job}.py").exists(), f"{where} names jobs/{job}.py"
    if "--preset" in arguments:
        return  # a file that the page writes first: test_documents.py runs these
    words = [re.sub(r"^/(?=weights/|others/)|^\$ADMIRAL_STORE/", f"{store}/", word) for word in arguments]
    if job.startswith(("train", "generate", "tune")) and "--help" not in arguments:
        words += ["--output", "planned"]  # what stands under the page's name was made in small, by other settings
    try:
        run(job, [*words, "--dry-run"])
        assert '"dry_run": true' in capsys.readouterr().out
    except SystemExit as end:
        assert end.code == 0 and "--help" in arguments, f"{where}: {capsys.readouterr().err}"


# ------------------------------------------------------------------------------------------------ in full


@pytest.mark.ray
@pytest.mark.slow
def test_readmes_table_runs_from_top_to_bottom(tmp_path: Path) -> None:
    environment = quiet_environment(ADMIRAL_STORE=str(tmp_path), PATH=f"{BIN}{os.pathsep}{os.environ['PATH']}")
    before = ("prepare_dataset", "train_adm", "train_classifier", "generate_samples")  # what the table starts from
    rows = re.findall(r"^\|.*\| `(python jobs/\w+\.py digits.*)` \|$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert len(rows) > 8
    for row in (*(f"python jobs/{job}.py digits" for job in before), *rows):
        done = subprocess.run(
            ["bash", "-c", row], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )
        print(row, done.stdout[-300:], sep="\n")
        assert done.returncode == 0, f"{row}: {done.stderr[-2000:]}"
    with np.load(tmp_path / "digits/samples/samples.npz") as batch:
        assert batch["arr_0"].shape[1:] == (8, 8, 3) and batch["arr_0"].std() > 50
