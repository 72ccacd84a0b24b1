"""Conversions: bit-equal round trips, repetition, and .pt files that the zoo does not contain."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from models.diffusion import DiffusionConfig
from models.samplers import SamplerConfig
from models.unet import Architecture, ClassifierConfig, UNetConfig
from models.zoo import ZOO, Entry
from orchestrator import storage
from orchestrator.generation.config import GenerationConfig
from orchestrator.generation.samples import Samples
from orchestrator.generation.sampling import load_networks, make_batch
from orchestrator.weights.config import ConversionConfig
from orchestrator.weights.job import convert, plan
from orchestrator.weights.network import load_network, save_weights
from tests.orchestrator.networks import CLASSES, UNET
from tests.small_world import run

COSINE = DiffusionConfig(schedule="cosine")


@pytest.fixture(autouse=True)
def _tiny_model_in_the_zoo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ZOO, "tiny", Entry("tiny.pt", UNET, COSINE))


@pytest.fixture
def weights(tmp_path: Path) -> dict[str, Tensor]:
    """Write the released file tiny.pt, with unusual float32 values among the others, and return its tensors."""
    torch.manual_seed(0)
    weights = {key: torch.randn_like(tensor) for key, tensor in UNET.build().state_dict().items()}
    weights["out.2.bias"] = torch.tensor([0.0, -0.0, 1e-45, torch.inf, torch.finfo().max, torch.nan])
    torch.save(weights, tmp_path / "tiny.pt")
    return weights


def assert_same_bits(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name].view(torch.int32), tensor.view(torch.int32)), f"{name} differs"


def test_pt_to_safetensors_to_pt_is_equal_to_the_bit(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    store = str(tmp_path)
    first = convert(ConversionConfig(store=store, weights="tiny.pt", output="middle.safetensors"))
    network = load_network(first)
    assert network.architecture == UNET and network.diffusion == COSINE and network.classes == CLASSES
    convert(ConversionConfig(store=store, weights="middle.safetensors", output="back/tiny.pt"))
    assert_same_bits(torch.load(tmp_path / "back" / "tiny.pt", weights_only=True), weights)
    second = convert(ConversionConfig(store=store, weights="back/tiny.pt", output="again.safetensors"))
    assert storage.read_bytes(second) == storage.read_bytes(first)


def test_a_training_run_is_converted(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    save_weights(str(tmp_path / "run" / "weights" / "images-64-ema.safetensors"), weights, UNET, COSINE, CLASSES)
    convert(ConversionConfig(store=str(tmp_path), weights="run", output="run.pt"))
    assert_same_bits(torch.load(tmp_path / "run.pt", weights_only=True), weights)


@pytest.mark.parametrize("output", ["out.safetensors", "out.pt", "out"])
def test_an_equal_output_is_accepted_and_another_refused(
    tmp_path: Path, weights: dict[str, Tensor], output: str
) -> None:
    config = ConversionConfig(
        store=str(tmp_path), weights="tiny.pt", output=output, format=None if "." in output else "diffusers"
    )
    assert convert(config) == convert(config)
    weights["out.2.bias"][0] = 1.0
    torch.save(weights, tmp_path / "tiny.pt")
    with pytest.raises(ValueError, match="pass another --output"):
        convert(config)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"output": "folder"}, "--output folder.*--format diffusers"),
        ({"output": "w.pt", "format": "diffusers"}, "--output w.pt.*--format diffusers"),
        ({"weights": "other.pt"}, "other.pt.*--flags.*--model.*--recipe"),
        ({"weights": "other.pt", "recipe": "huge"}, "no released model 'huge'"),
        ({"weights": "run", "recipe": "tiny"}, "--recipe tiny is for .pt files"),
        ({"weights": "run", "flags": "--num_channels 64"}, "--flags is for .pt files"),
        ({"weights": "run", "model": {"image_size": 8}}, r"--model\.\* is for .pt files"),
        ({"weights": "other.pt", "flags": "--lr 1", "recipe": "tiny"}, "--recipe tiny and --flags"),
        ({"weights": "other.pt", "flags": "--lr 1", "model": {"image_size": 8}}, r"--flags and --model\.\*"),
        ({"weights": "other.pt", "flags": "--num_channel 64"}, "--num_channels"),
        ({"weights": "other.pt", "flags": "--lr 1", "diffusion": COSINE}, r"--diffusion\.\*.*--model\.\*"),
        ({"flags_from": "improved-diffusion"}, "--flags-from improved-diffusion.*--flags"),
        ({"weights": "other.pt", "model": {"model_channels": 64}}, "--model.image-size"),
        ({"weights": "other.pt", "model": {"image_size": 64, "model_channels": 65}}, "model_channels=65"),
        ({"weights": "other.pt", "model": {"image_size": 64, "num_heads": 3}}, "num_heads=3"),
        ({"weights": "other.pt", "model": {"image_size": 64, "pool": "attention"}}, "num_head_channels"),
        (
            {"weights": "other.pt", "model": {"image_size": 64, "out_channels": 3}},
            "--model.out-channels 3.*fixed_large",
        ),
    ],
)
def test_contradicting_options_are_refused(changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        ConversionConfig.model_validate({"weights": "tiny.pt", "output": "w.safetensors"} | changes)


def test_a_dry_run_names_input_output_and_a_missing_file() -> None:
    config = ConversionConfig(store="/nowhere", weights="any.pt", recipe="tiny", output="w.safetensors")
    lines = [line.split() for line in plan(config)[1].splitlines()]
    assert lines == [["reads", "/nowhere/any.pt"], ["writes", "/nowhere/w.safetensors"],
                     ["not", "there", "yet:", "/nowhere/any.pt"]]  # fmt: skip


def test_samples_are_the_same_from_either_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    torch.save({key: 0.1 * torch.randn_like(t) for key, t in UNET.build().state_dict().items()}, tmp_path / "tiny.pt")
    convert(ConversionConfig(store=str(tmp_path), weights="tiny.pt", output="tiny.safetensors"))
    batches: list[Samples] = []
    for name in ("tiny.pt", "tiny.safetensors"):
        sampler = SamplerConfig(name="ddim", num_steps=4)
        config = GenerationConfig(store=str(tmp_path), weights=name, output="samples", batch_size=4, sampler=sampler)
        batches.extend(make_batch(load_networks(config, "cpu"), config, 0))
    assert batches[0].labels.tolist() == [0, 1, 2, 3]
    assert batches[0].images.std() > 10, "the samples are flat"
    assert (batches[0].images == batches[1].images).all()


# ------------------------------------------------------------------- files that the zoo does not contain

FOREIGN = UNetConfig(
    image_size=64,
    model_channels=32,
    num_res_blocks=1,
    channel_mult=(1, 2, 3, 4),
    attention_resolutions=(16, 8),
    num_classes=7,
    resblock_updown=False,
)
FOREIGN_FLAGS = (
    "--num_channels 32 --num_res_blocks 1 --learn_sigma True --class_cond True --noise_schedule cosine "
    "--lr 1e-4 --batch_size=64"
)
FOREIGN_OPTIONS = FOREIGN.model_dump(
    include={"image_size", "model_channels", "num_res_blocks", "attention_resolutions", "resblock_updown"}
)
MODEL_OPTIONS = [
    "--model.image-size", "64", "--model.model-channels", "32", "--model.num-res-blocks", "1",
    "--model.no-resblock-updown", "--model.attention-resolutions", "16", "8", "--diffusion.schedule", "cosine",
]  # fmt: skip
CLASSIFIER = ClassifierConfig(
    image_size=64, model_channels=64, num_res_blocks=1, num_head_channels=64, num_classes=7, channel_mult=(1, 2, 3, 4)
)


def write_foreign(folder: Path, architecture: Architecture = FOREIGN) -> dict[str, Tensor]:
    """Write ema_0.9999_100000.pt as the published code does, and return its tensors."""
    torch.manual_seed(0)
    weights = {name: torch.randn_like(tensor) for name, tensor in architecture.build().state_dict().items()}
    torch.save(weights, folder / "ema_0.9999_100000.pt")
    return weights


def foreign_config(store: Path, **options: Any) -> ConversionConfig:
    settings = {"store": str(store), "weights": "ema_0.9999_100000.pt", "output": "out.safetensors"}
    return ConversionConfig.model_validate(settings | options)


@pytest.mark.parametrize(
    "options",
    [{"flags": FOREIGN_FLAGS}, {"model": FOREIGN_OPTIONS, "diffusion": COSINE}],
    ids=["flags", "model options"],
)
def test_a_foreign_file_is_converted_by_flags_or_options(
    tmp_path: Path, options: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    weights = write_foreign(tmp_path)
    network = load_network(convert(foreign_config(tmp_path, **options)))
    assert network.architecture == FOREIGN and network.diffusion == COSINE and len(network.classes) == 7
    assert_same_bits(dict(network.module.state_dict()), weights)
    printed = capsys.readouterr().out
    for field in ("classes: 7", "num_heads=4", "use_new_attention_order=False", "schedule=cosine", "image_size=64"):
        assert field in printed
    if "flags" in options:
        assert "from --flags" in printed and "--lr, --batch_size" in printed
    else:
        assert "from --model.* and --diffusion.*" in printed


@pytest.mark.parametrize("arguments", [["--flags", FOREIGN_FLAGS], [f"--flags={FOREIGN_FLAGS}"], MODEL_OPTIONS])
def test_the_command_line_takes_flags_and_model_options(tmp_path: Path, arguments: list[str]) -> None:
    write_foreign(tmp_path)
    options = ["--weights", "ema_0.9999_100000.pt", "--output", "out.safetensors", "--store", str(tmp_path)]
    run("convert_weights", ["released", *arguments, *options])
    network = load_network(str(tmp_path / "out.safetensors"))
    assert network.architecture == FOREIGN and network.diffusion == COSINE


@pytest.mark.parametrize(
    "options",
    [
        {"flags": "--classifier_width 64 --classifier_depth 1 --noise_schedule cosine"},
        {"model": CLASSIFIER.model_dump(exclude={"num_classes", "channel_mult"}), "diffusion": COSINE},
    ],
)
def test_a_foreign_classifier_is_recognised(tmp_path: Path, options: dict[str, Any]) -> None:
    write_foreign(tmp_path, CLASSIFIER)
    network = load_network(convert(foreign_config(tmp_path, **options)))
    assert network.architecture == CLASSIFIER and network.diffusion.schedule == "cosine"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"flags": FOREIGN_FLAGS.replace("32", "64")}, r"num_channels \(--model.model-channels\) is 32 in"),
        (
            {"flags": FOREIGN_FLAGS.replace("--class_cond True", "")},
            r"label_emb.weight: \(7, 128\) / missing.*class_cond",
        ),
        ({"model": FOREIGN_OPTIONS | {"num_classes": 1000}}, r"--model.num-classes\) is 7 in the file, 1000 here"),
        ({"recipe": "tiny"}, "num_channels|channel_mult"),
    ],
)
def test_a_mismatch_names_the_option_and_writes_nothing(tmp_path: Path, options: dict[str, Any], expected: str) -> None:
    write_foreign(tmp_path)
    with pytest.raises(ValueError, match=expected):
        convert(foreign_config(tmp_path, **options))
    assert not storage.exists(str(tmp_path / "out.safetensors"))


@pytest.mark.parametrize(
    "options", [{"flags": "--num_channels 32 --channel_mult 1 --class_cond True"}, {"recipe": "adm-64"}]
)
def test_options_that_contradict_a_released_name_are_refused(
    tmp_path: Path, weights: dict[str, Tensor], options: dict[str, str]
) -> None:
    with pytest.raises(ValueError, match=r"--(flags|recipe adm-64) contradicts.*tiny\.pt"):
        convert(foreign_config(tmp_path, weights="tiny.pt", **options))


def test_a_dry_run_names_the_flags_that_are_ignored() -> None:
    assert "--lr, --batch_size" in plan(foreign_config(Path("/nowhere"), flags=FOREIGN_FLAGS))[1]
