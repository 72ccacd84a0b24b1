"""Command lines: a preset first, then overrides; what is wrong is one line."""

import sys
from collections.abc import Callable
from typing import Any

import pytest

from jobs.command_line import main, parse
from orchestrator import presets, training_presets
from orchestrator.config import JobConfig

ALL_PRESETS: dict[str, Callable[[], Any]] = {
    "prepare_dataset": presets.dataset_presets,
    "train_adm": training_presets.adm_presets,
    "train_classifier": training_presets.classifier_presets,
    "tune_guidance": presets.search_presets,
    "generate_samples": presets.generation_presets,
    "evaluate_samples": presets.evaluation_presets,
    "train_upsampler": training_presets.upsampler_presets,
    "estimate_likelihood": presets.likelihood_presets,
    "convert_weights": presets.conversion_presets,
    "quickstart": presets.quickstart_presets,
}


@pytest.fixture(autouse=True)
def _program_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["job.py"])


@pytest.mark.parametrize("job", ALL_PRESETS)
def test_every_preset_parses_to_itself(job: str) -> None:
    for name, (_, preset) in ALL_PRESETS[job]().items():
        assert parse("A job.", ALL_PRESETS[job](), [name]) == preset


@pytest.mark.parametrize("job", ALL_PRESETS)
def test_help_explains_every_option(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        parse("A job.", ALL_PRESETS[job](), ["digits", "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    _, preset = ALL_PRESETS[job]()["digits"]
    for field in type(preset).model_fields:
        assert f"--{field.replace('_', '-')}" in text, f"{field} is missing from the help of {job}"


def test_overrides_reach_nested_fields() -> None:
    config = parse("Train.", training_presets.adm_presets(), ["digits", "--model.dropout", "0.25", "--order.seed", "7"])
    assert config.model.dropout == 0.25
    assert config.order.seed == 7


@pytest.mark.parametrize(
    ("argv", "wanted"),
    [
        (["digits", "--batchsize", "64"], "--batchsize"),
        (["digits", "--batch-size", "63"], "batch_size=63 is not a multiple of order.num_streams=4"),
        (["digits", "--batch-size", "-8"], "greater than 0"),
        (["digits", "--images", "many"], "'many'"),
        (["digits", "--num-workers", "3"], "num_workers=3 does not divide order.num_streams=4"),
        (["no-such-preset"], "no-such-preset"),
    ],
)
def test_a_wrong_command_line_is_one_line(argv: list[str], wanted: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        parse("Train.", training_presets.adm_presets(), argv)
    assert end.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("job.py: error: ") and message.count("\n") == 1
    assert wanted in message


def test_a_failing_job_is_one_line_and_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(config: JobConfig) -> None:
        raise ValueError("dataset=x is not there;\nprepare it first")

    monkeypatch.setattr(sys, "argv", ["job.py", "plain"])
    with pytest.raises(SystemExit) as end:
        main("A job.", {"plain": ("nothing", JobConfig())}, run, lambda config: "")
    assert end.value.code == 1
    assert capsys.readouterr().err == "job.py: error: dataset=x is not there; prepare it first\n"


def test_an_interrupted_job_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def run(config: JobConfig) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["job.py", "plain"])
    with pytest.raises(SystemExit) as end:
        main("A job.", {"plain": ("nothing", JobConfig())}, run, lambda config: "")
    assert end.value.code == 130
    assert capsys.readouterr().err == "job.py: error: interrupted; the same command goes on from here\n"


def test_a_dry_run_prints_config_and_plan_and_runs_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(config: JobConfig) -> None:
        raise AssertionError("a dry run ran")

    monkeypatch.setattr(sys, "argv", ["job.py", "plain", "--dry-run"])
    main("A job.", {"plain": ("nothing", JobConfig())}, run, lambda config: "reads nothing")
    assert '"dry_run": true' in (text := capsys.readouterr().out) and text.endswith("reads nothing\n")
