"""Command lines: a preset first, then overrides; what is wrong is one line."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jobs.command_line import main, parse
from orchestrator import presets
from orchestrator.config import JobConfig
from orchestrator.training import presets as training_presets

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
    "average_weights": presets.average_presets,
    "quickstart": presets.quickstart_presets,
    "doctor": presets.doctor_presets,
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
        parse("A job.", ALL_PRESETS[job](), [name := next(iter(ALL_PRESETS[job]())), "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    _, preset = ALL_PRESETS[job]()[name]
    for field in type(preset).model_fields:
        assert f"--{field.replace('_', '-')}" in text, f"{field} is missing from the help of {job}"


def test_overrides_reach_nested_fields() -> None:
    config = parse("Train.", training_presets.adm_presets(), ["digits", "--model.dropout", "0.25", "--seed", "7"])
    assert config.model.dropout == 0.25
    assert config.seed == 7


def test_an_only_preset_need_not_be_named() -> None:
    assert parse("Look.", presets.doctor_presets(), ["--timeout", "5"]).timeout == 5


def test_a_preset_file_changes_a_preset_and_is_overridden(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("preset: digits\nbatch_size: 32\nmodel: {dropout: 0.25}\nema_rates: [0.9, 0.99]\n")
    for flag in (["--preset", str(file)], [f"--preset={file}"], [f"--preset=file://{file}"]):
        config = parse("Train.", training_presets.adm_presets(), [*flag, "--total-images", "640"])
        assert (config.batch_size, config.model.dropout, config.images) == (32, 0.25, 640)
        assert config.ema_rates == (0.9, 0.99)
        assert config.model.channel_mult == training_presets.adm_presets()["digits"][1].model.channel_mult


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("preset: digits\nbatchsize: 64", "batchsize: Extra inputs are not permitted"),
        ("preset: digits\nmodel: {dropout: 2}", "model.dropout: Input should be less than 1"),
        ("preset: digits\nbatch_size: 63", "batch_size=63 is not a multiple of order.num_streams=4"),
        ("batch_size: 64", "preset: None is none of digits, "),
        ("- a list", "no mapping"),
        ("{", "expected the node content"),
    ],
)
def test_a_wrong_preset_file_is_one_line(
    text: str, wanted: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(SystemExit) as end:
        parse("Train.", training_presets.adm_presets(), ["--preset", str(tmp_path / "mine.yaml")])
    assert end.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith(f"job.py: error: {tmp_path}/mine.yaml: ") and message.count("\n") == 1
    assert wanted in message


def test_a_preset_file_that_is_not_there_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        parse("Train.", training_presets.adm_presets(), ["--preset", "/none/such.yaml"])
    assert end.value.code == 2
    assert "there is no such object" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "wanted"),
    [
        (["digits", "--batchsize", "64"], "--batchsize"),
        (["digits", "--batch-size", "63"], "batch_size=63 is not a multiple of order.num_streams=4"),
        (["digits", "--batch-size", "-8"], "greater than 0"),
        (["digits", "--total-images", "many"], "'many'"),
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
