"""Test that a training continues with other settings, to a larger length, or from a checkpoint in a new run."""

from typing import Any

import pytest
import torch
from mlflow import MlflowClient

from orchestrator import storage
from orchestrator.config import read_config
from orchestrator.metrics_log import MetricsLog, Record
from orchestrator.training import checkpoints, job
from orchestrator.training.checkpoints import positions, read_newest
from orchestrator.training.continuing import check_and_write_config
from orchestrator.training.job import plan, train, train_loop
from tests.orchestrator.training.runs import adm, context, final_state


def test_a_failed_start_does_not_bind_the_folder_to_its_config(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    messages = iter(["CUDA out of memory", "DefaultCPUAllocator: can't allocate memory"])

    def out_of_memory(*_: object, **__: object) -> None:
        raise RuntimeError(next(messages))

    with monkeypatch.context() as patch:
        patch.setattr(job, "take_step", out_of_memory)
        for _ in range(2):
            with pytest.raises(RuntimeError, match=r"out of memory.* --microbatch-size 16"):
                train(adm(store, "smaller", batch_size=32))
    train(adm(store, "smaller", batch_size=16, microbatch_size=4))
    assert read_config(f"{store}/smaller")["batch_size"] == 16


def test_out_of_memory_with_single_images_advises_no_smaller_microbatch(
    store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def out_of_memory(*_: object) -> None:
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(job, "take_step", out_of_memory)
    with pytest.raises(RuntimeError, match="microbatches of 1 image: pass --recompute true"):
        train(adm(store, "smallest", microbatch_size=1))


def test_weights_without_checkpoints_bind_the_folder_and_are_not_continued(store: str) -> None:
    """Users delete the checkpoints of finished trainings, because they are large."""
    train(adm(store, "slim", snapshot_every=32))
    storage.delete(f"{store}/slim/checkpoints/")
    train(adm(store, "slim", snapshot_every=32))  # it is trained already
    with pytest.raises(ValueError, match=r"learning_rate: 0\.001 before, 0\.002 now"):
        train(adm(store, "slim", learning_rate=2e-3))
    for start in (plan, train):
        with pytest.raises(ValueError, match=r"--output slim: .* weights at 96 images, but no checkpoint"):
            start(adm(store, "slim", total_images=128))
    assert read_config(f"{store}/slim")["total_images"] == 96


def test_changes_of_results_are_refused_after_the_first_checkpoint(store: str) -> None:
    train_loop(adm(store, "taken"), context(1))
    train(adm(store, "taken"))
    for start in (train, plan):
        with pytest.raises(ValueError, match=r"learning_rate: 0\.001 before, 0\.002 now.*--branch NEW-OUTPUT"):
            start(adm(store, "taken", learning_rate=2e-3))


def test_operational_settings_change_at_a_restart(store: str) -> None:
    train_loop(adm(store, "changed", eval_every=16, eval_images=20), context(2))
    changes: dict[str, Any] = {
        "microbatch_size": 4, "checkpoint_every": 16, "log_every": 16, "snapshot_every": 64,
        "eval_every": 32, "eval_images": 30, "max_nonfinite_steps": 1, "max_failures": 1,
    }  # fmt: skip
    train(adm(store, "changed", **changes))
    assert final_state(adm(store, "changed"))["validation.best"].shape == (30,)
    train(adm(store, "changed", total_images=128))  # without evaluation
    assert "validation.best" not in final_state(adm(store, "changed", total_images=128))


def test_exact_reduction_warns_of_another_number_of_threads(store: str, caplog: pytest.LogCaptureFixture) -> None:
    exact: dict[str, Any] = {"reduction": "exact", "total_images": 16}
    train(adm(store, "threads", **exact))
    check_and_write_config(adm(store, "threads", **exact, num_workers=2))
    assert not caplog.records
    check_and_write_config(adm(store, "threads", **exact, num_threads=2))
    assert "--num-threads 2" in caplog.text and "last bits" in caplog.text


def test_a_longer_training_has_the_bits_of_one_that_was_as_long_from_the_start(store: str) -> None:
    straight, longer = adm(store, "straight"), adm(store, "longer", total_images=48)
    train(straight)
    train(longer)
    train_loop(adm(store, "longer"), context(1))  # it is stopped after one step, and continued below
    train(adm(store, "longer", log_every=16))
    for name, tensor in final_state(straight).items():
        assert torch.equal(tensor, final_state(adm(store, "longer"))[name]), name
    with pytest.raises(ValueError, match=r"--total-images 64: .* is already at 96 images"):
        train(adm(store, "longer", total_images=64))


def test_a_linear_learning_rate_is_extended_only_on_request(store: str, capsys: pytest.CaptureFixture[str]) -> None:
    schedule: dict[str, Any] = {"lr_schedule": "linear"}
    train(adm(store, "falling", total_images=48, **schedule))
    with pytest.raises(ValueError, match=r"--total-images 96: .* falls to zero at 48.*--extend.*to 0\.0005"):
        train(adm(store, "falling", **schedule))
    with pytest.raises(ValueError, match=r"learning_rate: 0\.001 before, 0\.002 now"):
        train(adm(store, "falling", **schedule, extend=True, learning_rate=2e-3))
    train(adm(store, "falling", **schedule, extend=True))
    assert "changes from 0 to 0.0005, and then falls linearly to zero at 96" in capsys.readouterr().out
    stored = read_config(f"{store}/falling")
    assert stored["total_images"] == 96 and stored["extended"] == [{"at": 48, "total_images": 48}]
    train(adm(store, "falling", **schedule))  # the folder has the extended length now


def test_a_branch_continues_a_checkpoint_with_other_settings(
    store: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    parent = adm(store, "parent", keep_checkpoints=9)
    train(parent)
    changes: dict[str, Any] = {"learning_rate": 1e-4, "ema_rates": (0.9, 0.7), "model": parent.model.model_copy(
        update={"dropout": 0.3})}  # fmt: skip
    child = adm(store, "parent", branch="child", branch_at=32, tracking=True, **changes)
    train(child)
    train(child)  # the same command finds the finished branch
    with pytest.raises(ValueError, match=r"--branch child is not a branch of .* at 64 images"):
        train(child.model_copy(update={"branch_at": 64}))
    stored = read_config(f"{store}/child")
    assert stored["parent"] == {"run": f"{store}/parent", "images": 32} and stored["learning_rate"] == 1e-4
    at_start, source = (tensors_at(f"{store}/{name}", 32) for name in ("child", "parent"))
    for name, tensor in source.items():
        if not name.startswith("ema-0.5"):
            assert torch.equal(tensor, at_start[name]), name
    for name in (name.removeprefix("ema-0.7.") for name in at_start if name.startswith("ema-0.7.")):
        assert torch.equal(at_start[f"ema-0.7.{name}"], source[f"model.{name}"]), "a new average begins at the weights"
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (run,) = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    assert run.data.tags["admiral.parent"] == f"{store}/parent at 32 images"


def test_a_branch_does_not_compare_its_losses_with_those_of_its_parent(store: str) -> None:
    """The best evaluation of the parent has other noise, and so other losses of the same images."""
    evaluation: dict[str, Any] = {"eval_every": 32, "eval_images": 20, "keep_checkpoints": 9}
    train(adm(store, "judged", **evaluation))
    train(adm(store, "judged", branch="other-noise", branch_at=64, seed=1, **evaluation))
    assert "validation.best" not in tensors_at(f"{store}/other-noise", 64)
    assert "validation.best" in tensors_at(f"{store}/other-noise", 96)


def tensors_at(run: str, position: int) -> dict[str, torch.Tensor]:
    return {name: tensor for part in read_newest(run, position) for name, tensor in part.tensors.items()}


def test_an_unchanged_branch_has_the_bits_of_its_parent(store: str) -> None:
    train(adm(store, "origin", keep_checkpoints=9))
    train(adm(store, "origin", branch="copy", branch_at=32))
    for name, tensor in final_state(adm(store, "origin")).items():
        assert torch.equal(tensor, final_state(adm(store, "copy"))[name]), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"branch_at": 33}, r"--branch-at 33: the checkpoints of .* are at 32 images"),
        ({"branch": "digits-of-old"}, "--branch digits-of-old is not a branch of"),
        ({"batch_size": 24, "total_images": 96}, "--batch-size 24: .* at 32 images, .* multiple"),
        ({"power_emas": (0.1,), "snapshot_every": 32}, "--branch child-of-few: .* lacks power-0"),
        ({"output": "nothing"}, "has no checkpoint; train it first"),
    ],
)
def test_impossible_branches_are_refused(store: str, changes: dict[str, Any], message: str) -> None:
    for name in ("few", "digits-of-old"):
        if not positions(f"{store}/{name}"):
            train_loop(adm(store, name, total_images=32), context())
    settings = {"output": "few", "branch": "child-of-few"} | changes
    with pytest.raises(ValueError, match=message):
        train(adm(store, **settings))
    assert not positions(f"{store}/child-of-few")


def test_a_plan_needs_no_dataset_and_no_weights(store: str) -> None:
    config, text = plan(adm(store, "planned", dataset="none", init_from="nowhere.safetensors", num_gpus=1))
    assert "FLOPs" in text and f"not there yet: {store}/none, {store}/nowhere.safetensors" in text
    assert not storage.exists(f"{store}/planned")
    model = config.model.model_copy(update={"num_classes": None})
    resolved, text = plan(adm(store, "planned", classes="dataset", model=model))
    assert resolved.model.num_classes == 10 and "10 classes" in text and "not there yet" not in text


def test_a_plan_refuses_weights_that_do_not_fit(store: str) -> None:
    train(adm(store, "source", total_images=16))
    wide = adm(store, "wide", init_from="source").model.model_copy(update={"model_channels": 64})
    for start in (plan, train):
        with pytest.raises(ValueError, match=r"--model\.model-channels"):
            start(adm(store, "wide", init_from="source", model=wide))


def test_the_page_of_a_killed_run_is_written_on_request(store: str, capsys: pytest.CaptureFixture[str]) -> None:
    killed, records = adm(store, "killed"), list[dict[str, Any]]()
    check_and_write_config(killed)
    train_loop(killed, context(3, records))
    metrics_log = MetricsLog(f"{store}/killed")
    metrics_log.append(*(Record(0, record["images"], record["metrics"]) for record in records if "metrics" in record))
    report_config = adm(store, "killed", report=True, total_images=16, learning_rate=1.0)
    preset = report_config.model_copy(update={"num_workers": 64, "microbatch_size": 3})  # they do not fit the run
    assert train(report_config.starting_from(preset)) == f"{store}/killed"
    page = storage.read_bytes(f"{store}/killed/report.html").decode()
    assert "32 of 96 images" in page and "data:image/png;base64," in page and "images-000000000048" in page
    assert f"open  {store}/killed/report.html" in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match="--output nowhere"):
        train(adm(store, "nowhere", report=True))


def test_files_without_a_tensor_of_the_new_state_are_skipped(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Test this for averages that a branch drops, and for losses of an evaluation that a restart drops.

    The checkpoints of large models have whole files of such tensors.
    """
    monkeypatch.setattr(checkpoints, "FILE_BYTES", 1000)
    train_loop(adm(store, "files", eval_every=16, eval_images=150), context(4))
    train(adm(store, "files", ema_rates=(0.9, 0.5)))
    train(adm(store, "files", branch="fewer", branch_at=64, ema_rates=(0.7,)))
    names = final_state(adm(store, "fewer"))
    averages = {".".join(name.split(".")[:2]) for name in names if name.startswith("ema-")}
    assert averages == {"ema-0.7"}
