"""Test training in this process: resuming, non-finite gradients, schedules, checkpoints and snapshots."""

import errno
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest
import torch

from cluster.collectives import Group
from models.diffusion import DiffusionConfig
from models.unet import ClassifierConfig
from orchestrator import storage
from orchestrator.data.dataset import load_manifest
from orchestrator.order import OrderConfig
from orchestrator.training import checkpoint_writer, checkpoints
from orchestrator.training.averages import average
from orchestrator.training.checkpoint_writer import CheckpointWriter
from orchestrator.training.checkpoints import UnusableCheckpoints
from orchestrator.training.config import AverageConfig, LossScaleConfig, NoisyClassifierConfig
from orchestrator.training.gradients import _dropout_seed
from orchestrator.training.job import _read_microbatches, train, train_loop
from orchestrator.training.snapshots import power_snapshots
from orchestrator.training.state import TrainingState, learning_rate
from orchestrator.training.validation import Validation
from orchestrator.weights.network import load_network, weights_about
from tests.orchestrator.training.runs import UNET, adm, context, final_state, newest_checkpoint


@pytest.fixture
def unhurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every checkpoint wait for the one before it, so that steps of milliseconds skip none."""
    save = CheckpointWriter.save
    monkeypatch.setattr(CheckpointWriter, "save", lambda self, state, needed, last: save(self, state, True, last))


def test_a_stopped_and_resumed_training_ends_with_the_same_bits(store: str) -> None:
    straight, resumed = adm(store, "whole"), adm(store, "parts")
    train_loop(straight, context())
    for stop_after in (1, 2, 1):
        train_loop(resumed, context(stop_after))
    train_loop(resumed, context())
    first, second = final_state(straight), final_state(resumed)
    assert first.keys() == second.keys()
    for kind in ("model.", "ema-0.9.", "ema-0.5.", "optimizer.exp_avg_sq."):
        assert any(name.startswith(kind) for name in first), f"no {kind} in the checkpoint"
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), f"{name} differs after the resumes"


def test_a_checkpoint_of_another_state_is_refused(store: str) -> None:
    learning = adm(store, "learning", timesteps="loss_second_moment")
    train_loop(learning, context(1))
    run = learning.path("learning")
    for changes in ({"timesteps": "uniform"}, {"diffusion": DiffusionConfig(schedule="cosine", num_timesteps=500)}):
        other = TrainingState(learning.model_copy(update=changes), torch.device("cpu"))
        with pytest.raises(ValueError, match=r"has timesteps\.(counts|history) \(1000.*, which does not fit"):
            other.restore(run, Group(0, 1))
    train_loop(adm(store, "uniform"), context(1))
    with pytest.raises(ValueError, match=r"lacks timesteps\.counts, which this model has"):
        TrainingState(learning, torch.device("cpu")).restore(learning.path("uniform"), Group(0, 1))


def test_the_job_trains_writes_weights_and_is_not_repeated(store: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = adm(store, "job", preview_every=48, checkpoint_every=48)
    run = train(config)
    printed = capsys.readouterr().out
    assert f"open  {run}/report.html" in printed and "next  python jobs/generate_samples.py" in printed
    page = storage.read_bytes(storage.join(run, "report.html")).decode()
    assert page.count("data:image/png;base64,") == 3, "the curves, and a picture of each average"
    assert "ema-0.5 after 96 images" in page and "images-000000000048" in page and "96 of 96 images" in page
    samples = storage.join(run, "samples")
    pictures = [f"{ema}/images-0000000000{at}.png" for ema in ("ema-0.5", "ema-0.9") for at in (48, 96)]
    assert sorted(storage.list_names(samples, recursive=True)) == pictures
    assert all(storage.read_bytes(storage.join(samples, name)).startswith(b"\x89PNG") for name in pictures)
    network = load_network(run)
    assert network.architecture == UNET and network.classes == tuple("0123456789")
    assert len(storage.list_names(storage.join(run, "weights"))) == 2, "one file for each average"
    train(config)
    assert "trained already" in capsys.readouterr().out


def test_a_model_for_other_classes_is_refused(store: str) -> None:
    with pytest.raises(ValueError, match=r"model\.num_classes=7, but digits has 10 classes"):
        train(adm(store, "classes", model=UNET.model_copy(update={"num_classes": 7})))


def test_gradients_that_are_not_finite_are_skipped_then_end_the_run(
    store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = adm(store, "poisoned", max_nonfinite_steps=2)
    fresh = TrainingState(config, torch.device("cpu")).tensors()
    monkeypatch.setattr("orchestrator.training.losses.from_uint8", _poison)
    with pytest.raises(ArithmeticError, match="not finite in 3 consecutive steps"):
        train_loop(config, context())
    checkpoint = newest_checkpoint(config.path(config.output))
    assert checkpoint is not None
    for name, tensor in checkpoint.tensors.items():
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
        order=OrderConfig(num_streams=2, shuffle_row_groups=2), crop="random", random_flip=False, total_images=4800,
        batch_size=32, learning_rate=2e-3, log_every=1600, num_workers=0,
    )  # fmt: skip
    records: list = []
    train_loop(config, context(records=records))
    accuracy = [record["metrics"]["accuracy_q0"] for record in records if "metrics" in record]
    assert accuracy[-1] > 0.5 > accuracy[0], f"accuracy at little noise went {accuracy}"
    last = [record["metrics"] for record in records if "metrics" in record][-1]
    for quartile in range(4):
        assert last[f"accuracy_top5_q{quartile}"] > last[f"accuracy_q{quartile}"]


def test_the_learning_rate_warms_up_and_falls_to_zero() -> None:
    config = adm("none", "lr", total_images=160, warmup_images=64, lr_schedule="linear", learning_rate=1.0)
    rates = [learning_rate(config, position) for position in range(0, 160, 16)]
    warm = np.minimum(1, np.arange(1, 11) / 4)
    assert rates == pytest.approx(list(warm * (1 - np.arange(10) / 10)))


def numbers(records: list, name: str) -> list[float]:
    return [record["metrics"][name] for record in records if name in record.get("metrics", {})]


def test_microbatches_add_up_to_the_whole_batch(store: str) -> None:
    one_step = {"model": UNET.model_copy(update={"dropout": 0.0}), "total_images": 16}
    unsplit = adm(store, "whole-batch", **one_step)
    train_loop(unsplit, context())
    gradients = {name: t for name, t in final_state(unsplit).items() if name.startswith("optimizer.exp_avg.")}
    assert gradients
    for rows in (4, 6, 17):
        split = adm(store, f"cut-{rows}", microbatch_size=rows, **one_step)
        train_loop(split, context())
        tensors = final_state(split)
        for name, tensor in gradients.items():
            assert torch.allclose(tensors[name], tensor, rtol=1e-4, atol=1e-7), (rows, name)


def test_every_microbatch_has_its_own_dropout_mask(store: str) -> None:
    config = adm(store, "dropout", microbatch_size=4)
    manifest = load_manifest(config.path("digits"))

    def seeds(rank: int, world_size: int) -> list[int]:
        worker = replace(context(), rank=rank, world_size=world_size)
        result = []
        for position in (0, 16):
            _, share = next(_read_microbatches(config, worker, manifest, position))
            result += [_dropout_seed(config, position, batch) for batch in share]
        return result

    assert len(set(seeds(0, 1))) == 8
    assert sorted(seeds(0, 2) + seeds(1, 2)) == sorted(seeds(0, 1)), "of streams, not of workers"


def test_half_precision_gives_nearly_the_losses_of_float32(store: str) -> None:
    losses = {}
    for dtype in ("float32", "bfloat16", "float16"):
        records: list = []
        train_loop(adm(store, dtype, dtype=dtype, total_images=160, log_every=80), context(records=records))
        losses[dtype] = numbers(records, "loss")
    assert numbers(records, "log2_loss_scale")[0] == pytest.approx(20 + 5 * 1e-3)
    for dtype in ("bfloat16", "float16"):
        assert losses[dtype] == pytest.approx(losses["float32"], rel=0.02)
        assert losses[dtype] != losses["float32"], "autocast changed nothing"


def test_the_loss_scale_backs_off_to_its_floor_and_is_kept(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    scaling = LossScaleConfig(initial=3.0, backoff=2.0, floor=0.5)
    config = adm(store, "scale", dtype="float16", loss_scale=scaling, total_images=64, checkpoint_every=16)
    with monkeypatch.context() as patch:
        patch.setattr("orchestrator.training.losses.from_uint8", _poison)
        train_loop(config, context(stop_after=2))
    checkpoint = newest_checkpoint(config.path(config.output))
    assert checkpoint is not None and checkpoint.position == 32
    assert checkpoint.facts.items() >= {"log2_loss_scale": 0.5, "bad_steps": 2, "updates": 0}.items()
    train_loop(config, context())
    checkpoint = newest_checkpoint(config.path(config.output))
    assert checkpoint is not None and checkpoint.facts["log2_loss_scale"] == pytest.approx(0.5 + 2e-3)
    assert checkpoint.facts["bad_steps"] == 0 and checkpoint.facts["updates"] == 2


def test_old_checkpoints_are_removed_and_snapshots_are_kept(store: str, unhurried: None) -> None:
    config = adm(store, "kept", checkpoint_every=16, keep_checkpoints=2, keep_every=32, snapshot_every=48)
    train_loop(config, context())
    run = config.path(config.output)
    folders = {name.split("/")[0] for name in storage.list_names(storage.join(run, "checkpoints"), recursive=True)}
    assert folders == {f"images-{position:012d}" for position in (32, 64, 80, 96)}
    names = storage.list_names(storage.join(run, "weights"))
    expected = [f"images-{at:012d}-ema-{rate}.safetensors" for at in (48, 96) for rate in (0.5, 0.9)]
    assert names == expected
    assert weights_about(storage.join(run, "weights", names[0]))["training"]["images"] == 48


def test_a_preemption_notice_writes_a_checkpoint(store: str) -> None:
    config = adm(store, "preempted", checkpoint_every=10**6)
    notices = iter([False, True, False, False])
    train_loop(config, replace(context(stop_after=4), preempted=lambda: next(notices)))
    run = config.path(config.output)
    folders = {name.split("/")[0] for name in storage.list_names(storage.join(run, "checkpoints"), recursive=True)}
    assert folders == {"images-000000000032", "images-000000000064"}


def test_a_full_disk_does_not_end_the_training(
    store: str, unhurried: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = adm(store, "full", total_images=128, checkpoint_every=32)
    real = storage.open_output

    @contextmanager
    def full(uri: str) -> Iterator[BinaryIO]:
        if "images-000000000064" in uri:
            raise OSError(errno.ENOSPC, "No space left on device", uri)
        with real(uri) as file:
            yield file

    monkeypatch.setattr(storage, "open_output", full)
    train_loop(config, context())
    assert final_state(config)
    (warning,) = [record.getMessage() for record in caplog.records if "could not be written" in record.getMessage()]
    assert "No space left on device" in warning

    monkeypatch.setattr(storage, "open_output", lambda uri: full("images-000000000064"))  # fails always
    with pytest.raises(RuntimeError, match=r"could not be written: .*No space left"):
        train_loop(adm(store, "fuller", total_images=128, checkpoint_every=32), context())


def test_a_checkpoint_that_comes_due_while_one_is_written_is_skipped(
    store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = adm(store, "skipped", checkpoint_every=16, total_images=64)
    monkeypatch.setattr(checkpoint_writer, "PATIENCE_SECONDS", 1e9)
    save, warning, skipped = checkpoints.save_checkpoint, checkpoint_writer.log.warning, list[int]()
    two_skipped = threading.Event()

    def save_slowly(run: str, checkpoint: checkpoints.Checkpoint) -> str:
        assert checkpoint.position > 16 or two_skipped.wait(60), "no checkpoints are skipped during the first write"
        return save(run, checkpoint)

    def warn(message: str, *arguments: int) -> None:
        warning(message, *arguments)
        if message.startswith("no checkpoint at"):
            skipped.append(arguments[0])
            if len(skipped) == 2:
                two_skipped.set()

    monkeypatch.setattr(checkpoints, "save_checkpoint", save_slowly)
    monkeypatch.setattr(checkpoint_writer.log, "warning", warn)
    train_loop(config, context())
    assert skipped == [32, 48] and final_state(config)


def test_old_checkpoints_that_cannot_be_removed_stay_and_the_training_continues(
    store: str, unhurried: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(uri: str) -> None:
        raise PermissionError(errno.EACCES, "cannot delete: access denied", uri)

    monkeypatch.setattr(storage, "delete", refuse)
    config = adm(store, "undeletable", checkpoint_every=16, keep_checkpoints=1)
    train_loop(config, context())
    assert final_state(config)
    assert len(storage.list_names(storage.join(config.path("undeletable"), "checkpoints"))) == 6
    assert "old checkpoints" in caplog.text and "access denied" in caplog.text
    assert "could not be written" not in caplog.text


@pytest.mark.parametrize("total_images", [16, 96])
def test_a_state_that_is_not_finite_is_not_committed(store: str, total_images: int) -> None:
    config = adm(store, f"infinite-{total_images}", learning_rate=1e39, total_images=total_images)
    with pytest.raises(RuntimeError, match=r"is not finite at (16|32) images"):
        train(config)
    names = storage.list_names(config.path(config.output), recursive=True)
    assert not [name for name in names if name.endswith(".safetensors") or "commit" in name]


def test_no_weights_are_written_from_a_checkpoint_that_is_not_finite(store: str) -> None:
    config = adm(store, "poisoned-checkpoint")
    state = TrainingState(config, torch.device("cpu"))
    state.position = config.length
    state.averages["ema-0.9"]["out.2.bias"].fill_(torch.nan)
    checkpoints.save_checkpoint(
        config.path(config.output), checkpoints.Checkpoint(state.position, state.tensors(), state.facts())
    )
    with pytest.raises(RuntimeError, match=r"ema-0\.9\.out\.2\.bias is not finite at 96 images"):
        train(config)
    assert not storage.list_names(storage.join(config.path(config.output), "weights"))


def test_a_run_without_a_usable_checkpoint_stops_unless_it_may_restart_from_scratch(
    store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "FILE_BYTES", 500_000)  # several files, of which the last one is damaged
    undamaged, config = adm(store, "undamaged"), adm(store, "damaged")
    train_loop(undamaged, context())
    train_loop(config, context(stop_after=3))
    for folder in Path(config.path("damaged"), "checkpoints").iterdir():
        *_, last = sorted(folder.glob("state-*"))
        last.write_bytes(last.read_bytes()[:-1])
    with pytest.raises(UnusableCheckpoints, match="--restart-from-scratch"):
        train_loop(config, context())
    train_loop(config.model_copy(update={"restart_from_scratch": True}), context())
    for name, tensor in final_state(undamaged).items():
        assert torch.equal(tensor, final_state(config)[name]), f"{name} was left by the damaged checkpoint"


def test_posthoc_ema_gives_an_average_of_another_length(store: str) -> None:
    config = adm(
        store, "power", power_emas=(0.05, 0.1, 0.075), total_images=640, snapshot_every=32, checkpoint_every=320
    )
    train_loop(config, context())
    run = config.path(config.output)
    direct = load_network(storage.join(run, "weights", "power", "images-000000000640-0.075.safetensors")).module
    for _, sigma_rel, uri in power_snapshots(run):
        if sigma_rel == 0.075:
            storage.delete(uri)
    reconstructed = load_network(average(AverageConfig(store=store, weights="power", sigma_rel=0.075))).module
    raw, expected, actual = final_state(config), direct.state_dict(), reconstructed.state_dict()
    distance = sum(float((raw[f"model.{name}"] - tensor).square().sum()) for name, tensor in expected.items())
    error = sum(float((actual[name] - tensor).square().sum()) for name, tensor in expected.items())
    assert error**0.5 < 0.05 * distance**0.5
    with pytest.raises(ValueError, match=r"sigma_rel=0\.28: the profile from the 40 snapshots"):
        average(AverageConfig(store=store, weights="power", sigma_rel=0.28, images=640))
    with pytest.raises(ValueError, match="has no snapshot there; the nearest is at 32"):
        average(AverageConfig(store=store, weights="power", images=40))
    named = AverageConfig(store=store, weights="power", sigma_rel=0.06, output="mine.safetensors")
    assert average(named) == average(named) == f"{store}/mine.safetensors"
    with pytest.raises(ValueError, match=r"--output .* exists and holds the average posthoc-0\.06 at 640"):
        average(named.model_copy(update={"sigma_rel": 0.05}))


def test_validation_uses_the_same_noise_every_time(store: str) -> None:
    records: list = []
    config = adm(store, "validated", eval_every=32, eval_images=50, learning_rate=1e-12)
    train_loop(config, context(records=records))
    losses = numbers(records, "val_loss")
    assert len(losses) == 3
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5), "nothing but the weights may change"


def test_overfitting_is_distinguished_from_chance(store: str, caplog: pytest.LogCaptureFixture) -> None:
    config = adm(store, "overfit", eval_every=32, eval_images=200)
    manifest = load_manifest(config.path("digits"))
    validation, state = Validation(config, manifest, Group(0, 1)), TrainingState(config, torch.device("cpu"), 200)
    losses = torch.rand(200, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1
    noise = torch.randn(200, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    noise = 0.1 * (noise - noise.mean())
    assert validation._compare_with_best(state, losses) == 0
    assert validation._compare_with_best(state, losses + noise + 0.01) == pytest.approx(0.01) and not state.overfits
    assert not caplog.records
    assert validation._compare_with_best(state, losses + noise + 0.05) == pytest.approx(0.05) and state.overfits
    assert "is overfitting: at 0 images its validation loss is 0.05 +- 0.0075 above that at 0 images" in caplog.text
    assert validation._compare_with_best(state, losses - 0.01) == 0 and not state.overfits
    with pytest.raises(ValueError, match="has no validation split; prepare it with"):
        splits = {"train": manifest.splits["train"]}
        Validation(config, manifest.model_copy(update={"splits": splits}), Group(0, 1))


def test_a_dataset_that_cannot_fill_the_batches_is_refused_before_anything_starts(store: str) -> None:
    streams = OrderConfig(num_streams=1024)
    with pytest.raises(ValueError, match=r"num_streams=1024 is more than the .* row groups"):
        train(adm(store, "streams", order=streams, batch_size=1024))
    assert not storage.exists(adm(store, "streams").path("streams"))
