"""Test the last lines of jobs: the next command is one that its job accepts."""

import shlex
import sys

import pytest

from jobs.command_line import parse
from orchestrator.closing import next_command, print_closing
from orchestrator.training.page import command_for_next_job
from orchestrator.training.presets import adm_presets, classifier_presets, upsampler_presets
from tests.jobs.test_command_line import ALL_PRESETS


@pytest.mark.parametrize("here", ["digits", "images_cpu", "imagenet64", "released"])
def test_the_next_command_is_accepted(here: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["job.py", here])
    commands = [
        command_for_next_job(presets()["digits"][1]) for presets in (adm_presets, classifier_presets, upsampler_presets)
    ]
    commands += [
        next_command("train_adm", dataset="datasets/my images"),
        next_command("generate_samples", weights="run/weights/posthoc/x.safetensors"),
        next_command("evaluate_samples", samples="s3://bucket/samples"),
    ]
    for command in commands:
        python, script, preset, *words = shlex.split(command)
        assert python == "python" and preset == ("images" if here == "released" else here)
        job = script.removeprefix("jobs/").removesuffix(".py")
        parse("A job.", ALL_PRESETS[job](), [preset, *words])


@pytest.mark.parametrize("words", [["--store", "/my runs"], ["--store=/my runs"]])
def test_the_next_command_has_the_same_store(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["job.py", "digits", *words, "--classes", "10"])
    command = shlex.split(next_command("generate_samples", weights="digits/diffusion"))
    assert command[-4:] == ["--weights", "digits/diffusion", "--store", "/my runs"]


def test_a_line_for_each_place_and_command(capsys: pytest.CaptureFixture[str]) -> None:
    print_closing(["a/report.html"], ["python jobs/doctor.py"])
    assert capsys.readouterr().out == "open  a/report.html\nnext  python jobs/doctor.py\n"
