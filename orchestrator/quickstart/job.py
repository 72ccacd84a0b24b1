"""The quickstart: all jobs on scanned digits, one after another, on a local Ray."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cluster.servers import s3_server
from cluster.session import address, session
from orchestrator import storage
from orchestrator.config import check_or_write_config
from orchestrator.quickstart.config import QuickstartConfig
from orchestrator.quickstart.page import write_report
from orchestrator.tracking import tracked

ROOT = Path(__file__).resolve().parents[2]
BUCKET = "admiral"


def quickstart(config: QuickstartConfig) -> None:
    """Run every stage that has not finished yet, then write the report.

    Raises:
        RuntimeError: a stage failed; it has printed its own message.
    """
    folder = os.path.abspath(config.folder)
    os.makedirs(folder, exist_ok=True)
    os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
    with contextlib.ExitStack() as stack:
        store = stack.enter_context(_local_s3()) if config.storage == "s3" else folder
        stages_uri = storage.join(store, "stages.json")
        done: dict[str, dict[str, Any]] = storage.read_json(stages_uri) if storage.exists(stages_uri) else {}
        check_or_write_config(folder, config, finished=bool(done))
        with session(2 * config.num_workers):
            os.environ["RAY_ADDRESS"] = address()
            for name, command in _stages(config, store):
                if name in done:
                    print(f"{name}: already done")
                    continue
                done[name] = _run(name, [*command, "--store", store, *([] if config.tracking else ["--no-tracking"])])
                storage.write_json(stages_uri, done)
        scale, steps = _winner(store)
        with tracked("quickstart", config, folder) as tracker:
            page = write_report(store, folder, done)
            tracker.record("report.html", Path(page).read_text(encoding="utf-8"))
    print(f"winner  guidance scale {scale:g}, {steps} steps")
    print(f"open    {page}")
    print(f"MLflow  mlflow ui --backend-store-uri {os.environ['MLFLOW_TRACKING_URI']}")


def plan(config: QuickstartConfig) -> tuple[QuickstartConfig, str]:
    """Return the config and the text of a dry run: the commands that the quickstart would run."""
    return config, "\n".join(" ".join(["python", *command]) for _, command in _stages(config))


def _stages(config: QuickstartConfig, store: str | None = None) -> Iterator[tuple[str, list[str]]]:
    """Yield name and command line of every stage.

    The last four use the scale and steps that the search in `store` selected; without a store, placeholders.
    """
    workers = ["--num-workers", str(config.num_workers)]
    count = ["--num-samples", str(config.num_samples)]
    yield "prepare", ["jobs/prepare_dataset.py", "digits"]
    yield "train", ["jobs/train_adm.py", "digits", "--total-images", str(config.total_images), *workers]
    classifier = ["--total-images", str(config.classifier_total_images), *workers]
    yield "train_classifier", ["jobs/train_classifier.py", "digits", *classifier]
    grid_size = len(config.scales) * len(config.num_steps)
    space = ["--space.scales", *map(str, config.scales), "--space.num-steps", *map(str, config.num_steps)]
    space += ["--space.samplers", "ddpm", "--space.no-continuous"]
    halving = ["--rungs", *map(str, config.rungs), "--trials", str(grid_size), "--finalists", "1"]
    yield "search", ["jobs/tune_guidance.py", "digits", *space, *halving, *workers]
    scale, steps = _winner(store) if store else (1.0, config.num_steps[0])
    for name, guidance_scale in (("guided", scale), ("unguided", 0.0)):
        sampling = ["--sampler.num-steps", str(steps), "--guidance.scale", str(guidance_scale)]
        output = ["--output", f"digits/{name}"]
        yield f"generate_{name}", ["jobs/generate_samples.py", "digits", *output, *sampling, *count, *workers]
        evaluation = ["--samples", f"digits/{name}", "--output", f"digits/{name}-evaluation"]
        yield f"evaluate_{name}", ["jobs/evaluate_samples.py", "digits", *evaluation, *workers]


def _winner(store: str) -> tuple[float, int]:
    """Return the guidance scale and the number of steps that the search selected."""
    setting = storage.read_json(storage.join(store, "digits", "search", "search.json"))["winner"]["setting"]
    return setting["guidance"]["scale"], setting["sampler"]["num_steps"]


def _run(name: str, command: list[str]) -> dict[str, Any]:
    """Run a stage as a process; return its seconds and its command line. Raises RuntimeError if it fails."""
    print(f"{name}: python {' '.join(command)}", flush=True)
    begin = time.perf_counter()
    script, *arguments = command
    process = subprocess.run([sys.executable, str(ROOT / script), *arguments], check=False)
    if process.returncode:
        raise RuntimeError(
            f"stage {name} failed with exit code {process.returncode}; fix the error above and run the same command "
            "again, which resumes at this stage"
        )
    return {"seconds": time.perf_counter() - begin, "command": command}


@contextlib.contextmanager
def _local_s3() -> Iterator[str]:
    """Yield the URI of a folder on a local S3 server, whose content is lost at the end of the context."""
    with s3_server() as endpoint:
        os.environ |= {
            "AWS_ACCESS_KEY_ID": "any-key-of-moto",  # must not occur in paths, because its value is redacted
            "AWS_SECRET_ACCESS_KEY": "any-secret-of-moto",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": endpoint,
        }
        storage.make_bucket(f"s3://{BUCKET}")
        yield f"s3://{BUCKET}/quickstart"
