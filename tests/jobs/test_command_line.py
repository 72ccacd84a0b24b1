"""Test the command line: a preset comes first, then options; an error is one line."""

import re
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jobs.command_line import main, parse
from jobs.options import options_of
from orchestrator.ablations.presets import ablation_presets
from orchestrator.config import JobConfig
from orchestrator.data.presets import dataset_presets
from orchestrator.doctor import doctor_presets
from orchestrator.evaluation.presets import evaluation_presets, likelihood_presets
from orchestrator.generation.presets import generation_presets
from orchestrator.quickstart.presets import quickstart_presets
from orchestrator.run_evaluation.presets import run_evaluation_presets
from orchestrator.search.presets import search_presets
from orchestrator.training.presets import adm_presets, average_presets, classifier_presets, upsampler_presets
from orchestrator.weights.presets import conversion_presets

ALL_PRESETS: dict[str, Callable[[], Any]] = {
    "prepare_dataset": dataset_presets,
    "train_adm": adm_presets,
    "train_classifier": classifier_presets,
    "tune_guidance": search_presets,
    "evaluate_run": run_evaluation_presets,
    "run_ablations": ablation_presets,
    "generate_samples": generation_presets,
    "evaluate_samples": evaluation_presets,
    "train_upsampler": upsampler_presets,
    "estimate_likelihood": likelihood_presets,
    "convert_weights": conversion_presets,
    "average_weights": average_presets,
    "quickstart": quickstart_presets,
    "doctor": doctor_presets,
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
    page = capsys.readouterr().out
    explained = dict(re.findall(r"^  (--[a-z][\w.-]*).*\n((?:      .*\n?)+)", page, flags=re.MULTILINE))
    _, preset = ALL_PRESETS[job]()[name]
    options = options_of(type(preset))
    assert explained.keys() == {option.flag for option in options.values()}
    for flag, text in explained.items():
        assert len(re.findall(r"[A-Za-z]{2,}", text.split("Accepted:")[0])) >= 2, f"{flag} of {job}: {text}"
    assert max(map(len, page.splitlines())) <= 120


def test_help_of_a_long_list_of_options_has_groups() -> None:
    for _, config in (adm_presets()["digits"], classifier_presets()["digits"]):
        groups = Counter(option.group for option in options_of(type(config)).values())
        assert max(count for group, count in groups.items() if not group.startswith("--")) <= 12
        assert "Options" not in groups


def test_help_without_a_preset_lists_the_presets(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("Train.", adm_presets(), ["--help"])
    page = capsys.readouterr().out
    assert all(name in page for name in adm_presets()) and "--preset FILE" in page


def test_overrides_reach_nested_fields() -> None:
    config = parse("Train.", adm_presets(), ["digits", "--model.dropout", "0.25", "--seed", "7"])
    assert config.model.dropout == 0.25
    assert config.seed == 7


def test_an_only_preset_need_not_be_named() -> None:
    assert parse("Check.", doctor_presets(), ["--timeout", "5"]).timeout == 5


def test_a_preset_file_changes_a_preset_and_is_overridden(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("preset: digits\nbatch_size: 32\nmodel: {dropout: 0.25}\nema_rates: [0.9, 0.99]\n")
    for flag in (["--preset", str(file)], [f"--preset={file}"], [f"--preset=file://{file}"]):
        config = parse("Train.", adm_presets(), [*flag, "--total-images", "640"])
        assert (config.batch_size, config.model.dropout, config.total_images) == (32, 0.25, 640)
        assert config.ema_rates == (0.9, 0.99)
        assert config.model.channel_mult == adm_presets()["digits"][1].model.channel_mult


@pytest.mark.parametrize(
    "text",
    [
        "preset: digits\norder.num_streams: 8\norder.shuffle_row_groups: 2",
        "preset: digits\norder.num_streams: 8\norder: {shuffle_row_groups: 2}",
        '{\n\t"preset": "digits",\n\t"order": {"num_streams": 8, "shuffle_row_groups": 2}\n}',
    ],
)
def test_a_preset_file_may_have_dotted_names_and_tabs_of_json(text: str, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text(text)
    config = parse("Train.", adm_presets(), ["--preset", str(tmp_path / "mine")])
    assert (config.order.num_streams, config.order.shuffle_row_groups) == (8, 2)


def refusal(presets: dict[str, Any], argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Return the error that `argv` leads to, which must be one line on stderr, with exit code 2."""
    with pytest.raises(SystemExit) as end:
        parse("A job.", presets, argv)
    captured = capsys.readouterr()
    assert end.value.code == 2 and not captured.out
    assert captured.err.startswith("job.py: error: ") and captured.err.count("\n") == 1 and captured.err.endswith("\n")
    return captured.err


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("preset: digits\nbatchsize: 64", "unknown field batchsize; did you mean batch_size?"),
        ("preset: digits\nlearning_rat: 1", "unknown field learning_rat; did you mean learning_rate?"),
        ("preset: digits\nlearning-rate: 1", "unknown field learning-rate; did you mean learning_rate?"),
        ("preset: digits\nmodel: {dropuot: 0}", "unknown field model.dropuot; did you mean model.dropout?"),
        ("preset: digits\nmodel: {learning_rat: 0}", "unknown field model.learning_rat; "),
        ("preset: digits\nqqq: 1", "unknown field qqq; PRESET --help lists"),
        ("preset: digits\norder: {model.dropout: 0}", "unknown field order.model.dropout; "),
        ("preset: digits\norder.num_stream: 8", "unknown field order.num_stream; did you mean order.num_streams?"),
        ("preset: digits\ndtype: ''", "accepted: float32, bfloat16 or float16\n"),
        ("preset: digits\n1: 1", "unknown field 1; "),
        (
            "preset: digits\nmodel: {dropout: 2}",
            "model.dropout=2 is not accepted; accepted: a number of at least 0",
        ),
        ("preset: digits\nmodel: 3", "model=a value is not accepted; accepted: the fields model.*"),
        ("preset: digits\norder: {num_streams: 3}", "order.num_streams=3 is not a power of two"),
        ("preset: digits\nbatch_size: 63", "batch_size=63 is not a multiple of order.num_streams=4"),
        ("preset: digitz\nbatch_size: 64", "unknown preset digitz; did you mean digits?"),
        ("preset: [digits]", "unknown preset "),
        ("batch_size: 64", ", imagenet64, "),
        ("- a list", "mapping"),
        ("{", "line 1, column 2: expected the node content"),
        ("preset: digits\n  seed: 1", "line 2, column 7: "),
    ],
)
def test_a_wrong_preset_file_is_one_line(
    text: str, key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    message = refusal(adm_presets(), ["--preset", str(tmp_path / "mine.yaml")], capsys)
    assert message.startswith(f"job.py: error: {tmp_path}/mine.yaml: ") and key in message


@pytest.mark.parametrize(
    ("argv", "key"),
    [
        (["digits", "--batchsize", "64"], "unknown option --batchsize; did you mean --batch-size?"),
        (["digits", "--qqq", "1"], "unknown option --qqq; --help lists all options"),
        (["digits", "--batch-size", "63"], "--batch-size 63 is not a multiple of --order.num-streams 4; use 60 or 64"),
        (["digits", "--batch-size", "-8"], "--batch-size -8 is not accepted; accepted: a whole number greater than 0"),
        (["digits", "--total-images", "many"], "--total-images many is not accepted; accepted: a whole number"),
        (["digits", "--total-images"], "--total-images needs a value; accepted: a whole number"),
        (["digits", "--dtype="], "--dtype needs a value; accepted: float32"),
        (["digits", "--total-images", "--seed", "1"], "--total-images needs a value"),
        (["digits", "--num-workers", "3"], "--num-workers 3 does not divide --order.num-streams 4"),
        (["digits", "--seed", "1", "extra"], "extra is not an option"),
        (["digits", "--tracking", "maybe"], "--tracking maybe is not accepted; accepted: true or false"),
        (["digits", "--dtype", "half"], "--dtype half is not accepted; accepted: float32, bfloat16 or float16"),
        (["digits", "--ema-rates", "0.9", "x"], "--ema-rates x is not accepted; accepted: one or more values"),
        (["digits", "--preview.eta", "0.5"], "--preview.eta 0.5 has no effect with --preview.name ddpm"),
        (["digits", "--preview.eta", "-1"], "--preview.eta -1 is not accepted; accepted: a number of at least 0"),
        (["digits", "--model.image-size", "9"], "--model.image-size 9 cannot be halved"),
        (["no-such-preset"], f"unknown preset no-such-preset; the presets are {', '.join(adm_presets())}\n"),
        (["imagenet46"], "unknown preset imagenet46; did you mean imagenet64?"),
        (["--batch-size", "64"], ", imagenet64, "),
        ([], ", imagenet64, "),
        (["--preset", "/none/such.yaml"], "/none/such.yaml does not exist"),
        (["--preset"], "--preset needs a value"),
    ],
)
def test_a_wrong_command_line_is_one_line(argv: list[str], key: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert key in refusal(adm_presets(), argv, capsys)


# ------------------------------------------------------------------------------------------------ unknown names


@pytest.mark.parametrize(
    ("job", "option", "suggestion"),
    [
        ("train_adm", "--no-random-flop", "--no-random-flip"),
        ("train_adm", "--learning-rat", "--learning-rate"),
        ("train_adm", "--no-learning-rate", "--learning-rate"),
        ("train_adm", "--order.num-stream", "--order.num-streams"),
        ("train_adm", "--dropout", "--model.dropout"),
        ("tune_guidance", "--space.no-continous", "--space.no-continuous"),
        ("generate_samples", "--scale", "--guidance.scale"),
        ("generate_samples", "--sampler", "--sampler.name"),
        ("doctor", "--timeuot", "--timeout"),
    ],
)
def test_an_unknown_option_is_refused_with_a_similar_one(
    job: str, option: str, suggestion: str, capsys: pytest.CaptureFixture[str]
) -> None:
    presets = ALL_PRESETS[job]()
    message = refusal(presets, [next(iter(presets)), option], capsys)
    assert f"unknown option {option}; did you mean {suggestion}?" in message


def test_every_spelling_of_an_option_is_accepted() -> None:
    argv = ["--batch_size=32", "--loss-scale.floor", "-3", "--no_random_flip", "--order.num_streams", "8"]
    config = parse("Train.", adm_presets(), ["digits", *argv])
    assert (config.batch_size, config.loss_scale.floor, config.random_flip) == (32, -3, False)
    assert config.order.num_streams == 8
    for option in ("--space.no-continuous", "--space.no_continuous"):
        assert not parse("Search.", search_presets(), ["digits", option]).space.continuous


@pytest.mark.parametrize("option", ["-h", "--help"])
@pytest.mark.parametrize("first", [[], ["digits"], ["digits", "--qqq"]])
def test_help_comes_before_everything_else(first: list[str], option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        parse("Train.", adm_presets(), [*first, option])
    assert not end.value.code and capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "values"),
    [
        (["--tracking", "false"], {"tracking": False}),
        (["--tracking=False"], {"tracking": False}),
        (["--no-tracking"], {"tracking": False}),
        (["--tracking", "--seed", "3"], {"tracking": True, "seed": 3}),
        (["--recompute", "none"], {"recompute": None}),
        (["--recompute", "true"], {"recompute": True}),
        (["--snapshot-every", "none", "--power-emas"], {"snapshot_every": None, "power_emas": ()}),
        (["--ema-rates", "0.9", "0.99", "--seed=4"], {"ema_rates": (0.9, 0.99), "seed": 4}),
        (["--seed", "1", "--seed", "2"], {"seed": 2}),
        (["--learning-rate", "1e-3"], {"learning_rate": 1e-3}),
    ],
)
def test_values_of_options_are_parsed(argv: list[str], values: dict[str, Any]) -> None:
    config = parse("Train.", adm_presets(), ["digits", *argv])
    assert {name: getattr(config, name) for name in values} == values


def test_pairs_and_texts_with_dashes_are_parsed() -> None:
    config = parse("Search.", search_presets(), ["digits", "--space.intervals", "0", "1", "0.2", "0.8"])
    assert config.space.intervals == ((0.0, 1.0), (0.2, 0.8))
    preset = conversion_presets()["digits"][1].model_copy(update={"weights": "a.pt"})
    flags = "--image_size 64 --num_channels 64"
    assert parse("Convert.", {"a": ("a file", preset)}, ["a", "--flags", flags]).flags == flags


# ------------------------------------------------------------------------------------------------ the run


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ValueError("dataset=x is not there;\nprepare it first"), 1, "dataset=x is not there; prepare it first"),
        (KeyboardInterrupt(), 130, "interrupted; the same command resumes the job"),
    ],
)
def test_a_job_that_fails_or_is_interrupted_prints_one_line(
    error: BaseException, code: int, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(config: JobConfig) -> None:
        raise error

    monkeypatch.setattr(sys, "argv", ["job.py", "plain"])
    with pytest.raises(SystemExit) as end:
        main("A job.", {"plain": ("nothing", JobConfig())}, run, lambda config: (config, ""))
    assert end.value.code == code
    assert capsys.readouterr().err == f"job.py: error: {message}\n"


def test_a_dry_run_prints_config_and_plan_and_runs_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(config: JobConfig) -> None:
        raise AssertionError("a dry run ran")

    monkeypatch.setattr(sys, "argv", ["job.py", "plain", "--dry-run"])
    main("A job.", {"plain": ("nothing", JobConfig())}, run, lambda config: (config, "reads nothing"))
    text = capsys.readouterr().out
    assert '"dry_run": true' in text and text.endswith("reads nothing\n")


def test_help_marks_what_may_change_at_any_restart(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("", adm_presets(), ["digits", "--help"])
    page = re.sub(r"[\s│|]+", " ", capsys.readouterr().out)
    for option, marked in (("microbatch-size", True), ("cost.gpu", True), ("learning-rate", False), ("seed", False)):
        text = page.partition(f" --{option} ")[2].partition(" --")[0]
        assert text and ("[operational]" in text) == marked, option
