"""Samples are functions of (config, seed, index); shards are whole or absent."""

import numpy as np
import pytest
import torch

from models.diffusion import DiffusionConfig
from models.guidance import GuidanceConfig
from models.samplers import SamplerConfig
from models.unet import ClassifierConfig, UNetConfig
from orchestrator import storage
from orchestrator.checkpoints import build, save_weights
from orchestrator.generation import generate, missing_shards, plan
from orchestrator.samples import pixel_hashes, read_range
from orchestrator.sampling import GenerationConfig

UNET = UNetConfig(
    image_size=8, model_channels=32, num_res_blocks=1, channel_mult=(1,), attention_resolutions=(), num_classes=10
)
CLASSIFIER = ClassifierConfig(
    image_size=8, model_channels=32, num_res_blocks=1, channel_mult=(1,), attention_resolutions=(), num_classes=10,
    num_head_channels=16,
)  # fmt: skip
CLASSES = tuple("0123456789")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A store with the weights of a diffusion model and a classifier, none of their tensors zero."""
    folder = str(tmp_path_factory.mktemp("store"))
    for name, architecture in (("unet", UNET), ("classifier", CLASSIFIER)):
        torch.manual_seed(1)
        weights = {
            key: tensor + 0.02 * torch.randn_like(tensor) for key, tensor in build(architecture).state_dict().items()
        }
        uri = storage.join(folder, f"{name}.safetensors")
        save_weights(uri, weights, architecture, DiffusionConfig(), CLASSES)
    return folder


def config(store: str, output: str, **changes: object) -> GenerationConfig:
    settings: dict = {
        "store": store, "weights": "unet.safetensors", "classifier": "classifier.safetensors", "output": output,
        "num_samples": 21, "sampler": SamplerConfig(name="ddpm", num_steps=4), "guidance": GuidanceConfig(scale=2.0),
        "batch_size": 4, "shard_size": 8, "num_workers": 0,
    }  # fmt: skip
    return GenerationConfig(**settings | changes)


def test_every_index_once_in_order_and_balanced(store: str) -> None:
    folder = generate(config(store, "whole"))
    images, labels = read_range(folder, 0, 21)
    assert images.shape == (21, 8, 8, 3) and images.dtype == np.uint8
    assert labels.tolist() == [index % 10 for index in range(21)]
    names = storage.list_names(storage.join(folder, "shards"))
    assert names == ["000000-000008.parquet", "000008-000016.parquet", "000016-000021.parquet"]
    assert len(set(pixel_hashes(images))) == 21, "two samples are equal"


def test_an_index_depends_on_seed_and_index_only(store: str) -> None:
    whole = read_range(generate(config(store, "whole")), 0, 21)[0]
    fewer = read_range(generate(config(store, "fewer", num_samples=6)), 0, 6)[0]
    assert np.array_equal(whole[:6], fewer), "the number of samples changed one of them"
    shards = read_range(generate(config(store, "shards", shard_size=4)), 0, 21)[0]
    assert np.array_equal(whole, shards), "the size of shards changed a sample"
    other = read_range(generate(config(store, "other", seed=1)), 0, 21)[0]
    assert not np.array_equal(whole, other)


def test_only_missing_shards_are_made_again(store: str, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = config(store, "resumed")
    folder = generate(wanted)
    before = pixel_hashes(read_range(folder, 0, 21)[0])
    storage.delete(storage.join(folder, "shards", "000008-000016.parquet"))
    storage.delete(storage.join(folder, "manifest.json"))
    assert [shard.name for shard in missing_shards(wanted)] == ["000008-000016.parquet"]
    assert "1 of 3 shards are missing" in plan(wanted)
    generate(wanted)
    assert pixel_hashes(read_range(folder, 0, 21)[0]) == before
    generate(wanted)
    assert "complete: 21 samples" in capsys.readouterr().out


def test_the_same_folder_with_other_settings_is_refused(store: str) -> None:
    generate(config(store, "claimed", num_samples=4))
    with pytest.raises(ValueError, match=r"guidance\.scale: 2\.0 there, 3\.0 here"):
        generate(config(store, "claimed", num_samples=4, guidance=GuidanceConfig(scale=3.0)))


def test_guidance_without_a_classifier_is_refused(store: str) -> None:
    with pytest.raises(ValueError, match="needs a classifier"):
        config(store, "unguided", classifier=None)


def test_uniform_labels_are_drawn_by_seed(store: str) -> None:
    first = read_range(generate(config(store, "uniform", labels="uniform")), 0, 21)[1]
    again = read_range(generate(config(store, "again", labels="uniform", num_samples=8)), 0, 8)[1]
    assert np.array_equal(first[:8], again) and set(first) <= set(range(10)) and len(set(first)) > 3


def test_a_cascade_keeps_both_stages(store: str) -> None:
    upsampler = UNET.model_copy(update={"image_size": 16, "low_res_size": 8})
    torch.manual_seed(2)
    weights = {key: tensor + 0.02 * torch.randn_like(tensor) for key, tensor in build(upsampler).state_dict().items()}
    save_weights(storage.join(store, "upsampler.safetensors"), weights, upsampler, DiffusionConfig(), CLASSES)
    cascade = {"upsampler": "upsampler.safetensors", "upsampling": SamplerConfig(name="ddpm", num_steps=3)}
    folder = generate(config(store, "cascade", num_samples=10, **cascade))
    base, labels = read_range(folder, 0, 10)
    large, large_labels = read_range(storage.join(folder, "upsampled"), 0, 10)
    assert large.shape == (10, 16, 16, 3) and np.array_equal(labels, large_labels)
    assert np.array_equal(base, read_range(generate(config(store, "whole")), 0, 10)[0]), "the base samples changed"
    assert storage.read_json(storage.join(folder, "upsampled", "manifest.json"))["num_samples"] == 10

    with pytest.raises(ValueError, match="is no upsampler of images of 8 pixels"):
        generate(config(store, "wrong", upsampler="unet.safetensors"))


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_half_precision_draws_nearly_the_same_images(store: str, sampler: str) -> None:
    chain = SamplerConfig(name=sampler, num_steps=4)
    exact = read_range(generate(config(store, f"{sampler}-float32", num_samples=8, sampler=chain)), 0, 8)[0]
    half = generate(config(store, f"{sampler}-bfloat16", num_samples=8, sampler=chain, dtype="bfloat16"))
    difference = np.abs(exact.astype(int) - read_range(half, 0, 8)[0])
    assert 0 < difference.mean() < 4, f"mean difference {difference.mean()} grey levels"


@pytest.mark.slow
def test_compiled_networks_draw_the_same_images(store: str) -> None:
    exact = read_range(generate(config(store, "eager", num_samples=4)), 0, 4)[0]
    compiled = read_range(generate(config(store, "compiled", num_samples=4, compile=True)), 0, 4)[0]
    assert np.abs(exact.astype(int) - compiled).max() <= 1, "rounding may tip a truncated grey level, no more"
