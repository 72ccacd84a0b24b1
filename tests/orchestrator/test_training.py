"""Training in this process: resumes are exact, bad gradients are bounded, schedules count images."""

import numpy as np
import pytest
import torch

from cluster.trainer import WorkerContext
from models.diffusion import DiffusionConfig
from models.unet import ClassifierConfig, UNetConfig
from orchestrator import checkpoints, storage
from orchestrator.checkpoints import load_network
from orchestrator.order import OrderConfig
from orchestrator.preparation import PrepareConfig, prepare
from orchestrator.training import train, train_loop
from orchestrator.training_config import AdmConfig, NoisyClassifierConfig
from orchestrator.training_state import TrainingState, learning_rate

UNET = UNetConfig(
    image_size=8,
    in_channels=1,
    out_channels=2,
    model_channels=32,
    num_res_blocks=1,
    channel_mult=(1,),
    attention_resolutions=(),
    num_classes=10,
    dropout=0.1,
)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A store that holds the digits."""
    folder = str(tmp_path_factory.mktemp("store"))
    prepare(PrepareConfig(store=folder, source="digits", output="digits", name="digits", validation_fraction=0.2))
    return folder


def adm(store: str, output: str, **changes: object) -> AdmConfig:
    settings: dict = {
        "store": store, "dataset": "digits", "output": output, "model": UNET,
        "diffusion": DiffusionConfig(schedule="cosine"), "order": OrderConfig(num_streams=2, window=2),
        "images": 96, "batch_size": 16, "learning_rate": 1e-3, "ema_rates": (0.9, 0.5), "flip": False,
        "checkpoint_images": 32, "log_images": 32, "num_workers": 0,
    }  # fmt: skip
    return AdmConfig(**settings | changes)


def context(stop_after: int | None = None, records: list | None = None) -> WorkerContext:
    """This process as the only worker; it is asked to stop after so many questions."""
    asked = iter(range(10**9))

    def stopping() -> bool:
        return stop_after is not None and next(asked) + 1 >= stop_after

    report = records.append if records is not None else lambda record: None
    return WorkerContext(0, 1, torch.device("cpu"), report, stopping, streams_on_cluster=False)


def final_state(config: AdmConfig) -> dict[str, torch.Tensor]:
    found = checkpoints.latest_checkpoint(config.path(config.output))
    assert found is not None and found.position == config.images
    return found.tensors


def test_a_stopped_and_resumed_training_ends_with_the_same_bits(store: str) -> None:
    whole, parts = adm(store, "whole"), adm(store, "parts")
    train_loop(whole, context())
    for stop_after in (1, 2, 1):
        train_loop(parts, context(stop_after))
    train_loop(parts, context())
    first, second = final_state(whole), final_state(parts)
    assert first.keys() == second.keys()
    for kind in ("model.", "ema-0.9.", "ema-0.5.", "optimizer.exp_avg_sq."):
        assert any(name.startswith(kind) for name in first), f"no {kind} in the checkpoint"
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), f"{name} differs after the resumes"


def test_the_job_trains_writes_weights_and_is_found_finished(store: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = adm(store, "job")
    run = train(config)
    network = load_network(run)
    assert network.architecture == UNET and network.classes == tuple("0123456789")
    assert len(storage.list_names(storage.join(run, "weights"))) == 2, "one file for each average"
    train(config)
    assert "trained already" in capsys.readouterr().out


def test_another_config_in_the_same_folder_is_refused(store: str) -> None:
    train(adm(store, "claimed"))
    with pytest.raises(ValueError, match=r"learning_rate: 0\.001 there, 0\.002 here"):
        train(adm(store, "claimed", learning_rate=2e-3))


def test_a_model_for_other_classes_is_refused(store: str) -> None:
    with pytest.raises(ValueError, match=r"model\.num_classes=7, but digits has 10 classes"):
        train(adm(store, "classes", model=UNET.model_copy(update={"num_classes": 7})))


def test_gradients_that_are_not_finite_are_skipped_then_end_the_run(
    store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = adm(store, "poisoned", max_bad_steps=2)
    fresh = TrainingState(config, torch.device("cpu")).tensors()
    monkeypatch.setattr("orchestrator.losses.from_uint8", lambda images, channels: _poison(images, channels))
    with pytest.raises(ArithmeticError, match="not finite in 3 steps in a row"):
        train_loop(config, context())
    found = checkpoints.latest_checkpoint(config.path(config.output))
    assert found is not None
    for name, tensor in found.tensors.items():
        assert torch.equal(tensor, fresh[name]), f"{name} moved by a skipped step"


def _poison(images: torch.Tensor, channels: int) -> torch.Tensor:
    return torch.full((len(images), channels, 8, 8), float("nan"))


def test_the_noisy_classifier_learns(store: str) -> None:
    model = ClassifierConfig(
        image_size=8, in_channels=1, model_channels=32, num_res_blocks=1, channel_mult=(1,), attention_resolutions=(),
        num_head_channels=16, num_classes=10,
    )  # fmt: skip
    config = NoisyClassifierConfig(
        store=store, dataset="digits", output="classifier", model=model, diffusion=DiffusionConfig(schedule="cosine"),
        order=OrderConfig(num_streams=2, window=2), crop="random", flip=False, images=4800, batch_size=32,
        learning_rate=2e-3, log_images=1600, num_workers=0,
    )  # fmt: skip
    records: list = []
    train_loop(config, context(records=records))
    accuracy = [record["metrics"]["accuracy_q0"] for record in records if "metrics" in record]
    assert accuracy[-1] > 0.5 > accuracy[0], f"accuracy at little noise went {accuracy}"


def test_the_learning_rate_warms_up_and_anneals(store: str) -> None:
    config = adm(store, "lr", images=160, warmup_images=64, anneal=True, learning_rate=1.0)
    found = [learning_rate(config, position) for position in range(0, 160, 16)]
    warm = np.minimum(1, np.arange(1, 11) / 4)
    assert found == pytest.approx(list(warm * (1 - np.arange(10) / 10)))


def test_previews_show_samples(store: str) -> None:
    records: list = []
    config = adm(store, "previews", preview_images=48)
    train_loop(config, context(records=records))
    pictures = {record["picture"]: record["png"] for record in records if "picture" in record}
    assert sorted(pictures) == [
        f"samples/{name}/images-0000000000{at}.png" for name in ("ema-0.5", "ema-0.9") for at in (48, 96)
    ]
    assert all(png.startswith(b"\x89PNG") for png in pictures.values())
