"""Test that no secret of the environment or the command line is printed, logged or written."""

import io
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator import redaction
from orchestrator.redaction import MASK, redact, redact_output, redact_patterns, redact_tree

ROOT = Path(__file__).resolve().parents[2]
CANARY = "canary-5f3a/9c+xyz"
VARIABLES = [
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_SECURITY_TOKEN",
    "AWS_BEARER_TOKEN_BEDROCK",
    "AWS_CONTAINER_AUTHORIZATION_TOKEN",
    "MLFLOW_FLASK_SERVER_SECRET_KEY",
    "HF_TOKEN",
    "RAY_AUTH_TOKEN",
    "PGPASSWORD",
    "WANDB_API_KEY",
]
ADDRESSES = ["MLFLOW_TRACKING_URI", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "ADMIRAL_STORE", "HTTPS_PROXY"]


@pytest.mark.parametrize("name", VARIABLES)
def test_the_value_of_a_secret_variable_is_redacted(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, CANARY)
    for form in (CANARY, "canary-5f3a%2F9c%2Bxyz", f"{{'key': '{CANARY}'}}", f"x{CANARY}y"):
        assert "5f3a" not in redact(f"the server said {form}.")
    assert redact_tree({"a": [CANARY, 1, None]}) == {"a": [MASK, 1, None]}


@pytest.mark.parametrize("name", ADDRESSES)
def test_user_and_password_of_an_address_are_redacted(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "http://someone:canary-5f3a@host:5000/path")
    text = redact("cannot reach http://someone:canary-5f3a@host:5000/path as someone:canary-5f3a (canary-5f3a)")
    assert "5f3a" not in text and "host:5000/path" in text


@pytest.mark.parametrize(
    "text",
    [
        "https://user:canary@host/x",
        "s3://AKIA:canary/can+ary@bucket/x",  # keys of AWS may have slashes
        "https://canary@huggingface.co/data",
        "postgresql+psycopg2://mlflow:can@ary@host/mlflow",
        "postgresql://host/db?user=a&password=canary",
        "https://bucket.s3.amazonaws.com/x?X-Amz-Credential=canary&X-Amz-Signature=canary",
        "HF_TOKEN=canary python jobs/train_adm.py",
        "--hf-token canary --seed 1",
        "--source.api-key=canary",
        "Authorization: Bearer canary-canary",
    ],
)
def test_secrets_outside_of_variables_are_redacted(text: str) -> None:
    assert "canary" not in redact_patterns(text) and "ary@" not in redact_patterns(text)


@pytest.mark.parametrize(
    "text",
    [
        "s3://bucket/a@b/c and /home/me@work/run",
        "http://host:5000/a@b and s3://arn:aws:s3:eu-west-1:123456789012:accesspoint/x/a@b",
        "--num-workers 2 --seed 1 --order.num-streams 8",
        "AWS_SHARED_CREDENTIALS_FILE is not set",
        "num_tokens=5, key=value",
        "python jobs/generate_samples.py digits --output it's",
    ],
)
def test_text_without_secrets_is_unchanged(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/home/me@work")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "python jobs")
    assert redact(text) == text


def test_log_lines_are_redacted(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    factory = logging.getLogRecordFactory()
    monkeypatch.setenv("HF_TOKEN", CANARY)
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(redaction.sys, name, io.StringIO())
    try:
        redact_output()
        redact_output()
        logging.getLogger("someone.else").warning("denied: %s at %s", CANARY, "http://u:p@host")
    finally:
        logging.setLogRecordFactory(factory)
    assert caplog.messages == [f"denied: {MASK} at http://{MASK}@host"]


PROGRAM = """
import os, sys, warnings
from orchestrator.redaction import redact_output
redact_output()
secret = os.environ["AWS_BEARER_TOKEN_BEDROCK"]
print("printed", secret, "https://me:canary@host/x")
warnings.warn(f"warned of {secret}")
sys.stderr.write(f"written {secret}\\n")
raise RuntimeError(f"raised with {secret}")
"""


def test_the_output_of_a_process_is_redacted() -> None:
    """The output includes tracebacks, which the interpreter itself writes."""
    command = [sys.executable, "-c", PROGRAM]
    environment = os.environ | {"AWS_BEARER_TOKEN_BEDROCK": CANARY, "PYTHONWARNINGS": "default"}
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    output = process.stdout + process.stderr
    assert "canary" not in output
    for phrase in ("printed ***", "://***@host", "warned of ***", "written ***", "RuntimeError: raised with ***"):
        assert phrase in output


def test_the_command_line_is_redacted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        redaction.sys, "argv", ["jobs/x.py", "digits", "--store", "s3://u:canary@host/it's", "--seed", "1"]
    )
    assert redaction.command() == """python jobs/x.py digits --store 's3://***@host/it'"'"'s' --seed 1"""
