"""Test that nothing a job prints or writes contains a secret of its environment or its options."""

from pathlib import Path

import fsspec
import pytest

from tests import servers
from tests.small_world import IN_PROCESS, run

STORE = "memory://canary-store@host/store"  # a URI that contains a token; one with a password is refused
ENVIRONMENT = {
    "ADMIRAL_STORE": STORE,
    "AWS_ACCESS_KEY_ID": "canary-access",
    "AWS_SECRET_ACCESS_KEY": "canary-secret",
    "AWS_SECURITY_TOKEN": "canary-security",
    "AWS_BEARER_TOKEN_BEDROCK": "canary-bearer",
    "AWS_ENDPOINT_URL": "https://key:canary-endpoint@host:9000",
    "HF_TOKEN": "canary-hugging-face",
    "MLFLOW_TRACKING_PASSWORD": "canary-tracking",
    "HTTPS_PROXY": "http://user:canary-proxy@proxy:3128",
}
SHORT = ["--total-images", "128", "--batch-size", "32", *IN_PROCESS]
STEPS = [
    ("prepare_dataset", []),
    ("train_adm", ["--checkpoint-every", "128", *SHORT]),
    ("train_classifier", SHORT),
    ("generate_samples", ["--num-samples", "8", "--batch-size", "8", "--sampler.num-steps", "2", *IN_PROCESS]),
    ("evaluate_samples", ["--num-memorization-samples", "4", *IN_PROCESS]),
    (
        "tune_guidance",
        ["--space.num-steps", "2", "3", "--rungs", "64", "128", "--trials", "2", "--round-size", "2", *IN_PROCESS],
    ),
    ("evaluate_run", ["--num-samples", "64", "--sampler.num-steps", "2", *IN_PROCESS]),
    ("average_weights", []),
]
NAMES_PLACES = "index.json"  # it names the store, because shards are read from there


@pytest.mark.slow
def test_jobs_print_and_write_no_secret(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    tracking = {"MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db"}
    files = fsspec.filesystem("memory")
    with servers.environment(**ENVIRONMENT, **tracking):
        for job, arguments in STEPS:
            run(job, ["digits", *arguments])
        with pytest.raises(SystemExit):
            run("prepare_dataset", ["digits", "--store", "memory://someone:canary-word@host/store"])
        with pytest.raises(SystemExit):
            run("train_adm", ["digits", "--dataset", "https://someone:canary-word@host/x"])
    captured = capfd.readouterr()
    contents = {"stdout": captured.out.encode(), "stderr": captured.err.encode()}
    contents |= {path: files.cat_file(path) for path in files.find("/") if not path.endswith(NAMES_PLACES)}
    contents |= {str(path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert len(contents) > 40, "there was something to search"
    assert not [name for name, content in contents.items() if b"canary" in content]
