"""Every job against object storage that is not there, not theirs, or theirs no more: one line, before any work."""

import re
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos.proxy import Fault, Proxy

JOBS = {
    "prepare_dataset": ["digits"],
    "train_adm": ["digits", "--num-workers", "0"],
    "train_classifier": ["digits", "--num-workers", "0"],
    "train_upsampler": ["digits", "--num-workers", "0"],
    "tune_guidance": ["digits", "--num-workers", "0"],
    "generate_samples": ["digits", "--num-workers", "0"],
    "evaluate_samples": ["digits", "--num-workers", "0"],
    "estimate_likelihood": ["digits"],
    "average_weights": ["digits", "--sigma-rel", "0.075"],
    "convert_weights": ["digits"],
}
WRITING = ("prepare_dataset", "train_adm", "train_classifier", "train_upsampler")  # with a dataset and nothing else


def refusal(job: str, store: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """What the job says on stderr, which must be one line and exit code 1."""
    monkeypatch.setattr(sys, "argv", [f"{job}.py", *JOBS[job], "--store", store])
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")  # nobody gets so far
    with pytest.raises(SystemExit) as end:
        runpy.run_path(f"jobs/{job}.py", run_name="__main__")
    said = capsys.readouterr().err
    assert end.value.code == 1 and said.count("\n") == 1 and store in said, f"{job}: exit {end.value.code}: {said}"
    return said


@pytest.fixture
def proxy(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    proxy = Proxy(s3_server)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
    yield proxy
    proxy.close()


@pytest.mark.parametrize("job", JOBS)
def test_a_missing_bucket(
    job: str, s3_server: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "there is no such bucket" in refusal(job, "s3://never-made", monkeypatch, capsys)


@pytest.mark.parametrize(("fault", "words"), [("denied", "access denied"), ("expired", "expired")])
@pytest.mark.parametrize("job", JOBS)
def test_no_access(
    job: str,
    fault: Fault,
    words: str,
    s3_bucket: str,
    proxy: Proxy,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rule = proxy.add(fault)
    assert words in refusal(job, s3_bucket, monkeypatch, capsys)
    assert len(rule.requests) <= 2, "asked again, although nothing can change"


def test_a_store_that_may_only_be_read(
    s3_bucket: str, proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["prepare_dataset.py", *JOBS["prepare_dataset"], "--store", s3_bucket])
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    runpy.run_path("jobs/prepare_dataset.py", run_name="__main__")
    capsys.readouterr()
    proxy.add("denied", method="PUT|POST")
    for job in WRITING[1:]:
        said = refusal(job, s3_bucket, monkeypatch, capsys)
        assert re.search(r"cannot create: access denied .*config\.json", said)
