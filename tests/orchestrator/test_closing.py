"""Test the last lines of jobs: the next command is one that its job accepts."""

import shlex
import sys

import pytest

from jobs.command_line import parse
from orchestrator.closing import next_command, print_closing
from orchestrator.training.page import command_for_next_job
from orchestrator.training.presets import adm_presets, classifier_presets, upsampler_presets
from tests.jobs.test_command_line import ALL_PRESETS


@pytest.mark.parametrize("preset_name", ["digits", "images_cpu", "imagenet64", "released"])
def test_the_next_command_is_accepted(preset_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["job.py", preset_name])
    commands = [
        command_for_next_job(presets()["digits"][1]) for presets in (adm_presets, classifier_presets, upsampler_presets)
    ]
    commands += [
        next_command("train_adm", dataset="datasets/my images"),
        next_command("generate_samples", weights="run/weights/posthoc/x.safetensors"),
        next_command("evaluate_samples", samples="s3://bucket/samples"),
    ]
    for command in commands:
        python, script, preset, *options = shlex.split(command)
        assert python == "python" and preset == ("images" if preset_name == "released" else preset_name)
        job = script.removeprefix("jobs/").removesuffix(".py")
        parse("A job.", ALL_PRESETS[job](), [preset, *options])


@pytest.mark.parametrize("options", [["--store", "/my runs"], ["--store=/my runs"]])
def test_the_next_command_has_the_same_store(options: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["job.py", "digits", *options, "--classes", "10"])
    command = shlex.split(next_command("generate_samples", weights="digits/diffusion"))
    assert command[-4:] == ["--weights", "digits/diffusion", "--store", "/my runs"]


def test_every_page_and_command_has_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    print_closing(["a/report.html"], ["python jobs/doctor.py"])
    assert capsys.readouterr().out == "open  a/report.html\nnext  python jobs/doctor.py\n"
