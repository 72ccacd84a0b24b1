"""Attempts: permanent errors end a training at once, other failures are retried from the last checkpoint."""

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any, cast

import pytest

from cluster.actor import summarize_loss
from cluster.relay import Relay, relay_records
from cluster.trainer import WorkerContext, _preemption_notices, run_workers


class Loop:
    """A loop whose process is killed in every attempt, in the first two after progress."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, context: WorkerContext) -> None:
        attempt = len(list(self.folder.iterdir()))
        (self.folder / f"attempt-{attempt}").touch()
        context.report({"saved": min(attempt, 1)})
        context.report({"attempt": attempt})
        time.sleep(1.0)  # the reports are sent in the background
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.ray
def test_a_training_survives_deaths_of_workers_while_it_makes_progress(
    ray_session: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    records: list[dict[str, Any]] = []
    with pytest.raises(RuntimeError, match="training failed: worker 0: "):
        run_workers(Loop(tmp_path), 1, records.append, max_failures=1)
    assert [record["attempt"] for record in records if "attempt" in record] == [0, 1, 2]
    assert caplog.text.count("an attempt failed, continuing from the last checkpoint") == 2


def wait_for_stop(context: WorkerContext) -> None:
    """Wait for the stop flag, and raise a permanent error. A second attempt would wait again."""
    context.report({"begun": True})
    while not context.stopping():
        time.sleep(0.05)
    context.report({"stopped": True})
    raise ValueError("learning_rate=-1 is negative")


@pytest.mark.ray
def test_a_signal_asks_the_workers_to_stop_and_a_permanent_error_ends_the_training(ray_session: None) -> None:
    """The signal is SIGINT; test_capacity.py tests SIGTERM."""
    records: list[dict[str, Any]] = []

    def on_record(record: dict[str, Any]) -> None:
        records.append(record)
        if "begun" in record:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(RuntimeError, match="training failed: ValueError: learning_rate=-1 is negative"):
        run_workers(wait_for_stop, 1, on_record)
    assert records == [{"begun": True}, {"stopped": True}], "its last record arrived too"
    assert signal.getsignal(signal.SIGINT) is before


class Records:
    """A relay without Ray, which returns one record for each call. The second call fails."""

    def __init__(self, count: int) -> None:
        self.waiting = list(range(count))
        self.calls = 0
        self.stops = 0
        self.empty = threading.Event()

    def exchange(self, stop: bool) -> list[dict[str, Any]]:
        self.calls += 1
        self.stops += stop
        if self.calls == 2:
            raise ConnectionError("the relay did not respond")
        if self.waiting:
            return [{"number": self.waiting.pop(0)}]
        self.empty.set()
        return []


def test_records_after_a_failed_callback_or_call_still_arrive(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("cluster.relay.POLL_SECONDS", 0.001)
    received: list[int] = []

    def on_record(record: dict[str, Any]) -> None:
        received.append(record["number"])
        if record["number"] == 0:
            raise KeyError("loss")

    relay = Records(4)
    with relay_records(cast(Relay, relay), on_record):
        assert relay.empty.wait(60), "no more records arrive"
    assert received == [0, 1, 2, 3]
    assert "KeyError: 'loss'" in caplog.text and "the job continues" in caplog.text


def test_the_stop_flag_is_sent_again_if_a_call_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.relay.POLL_SECONDS", 0.001)
    relay = Records(2)
    with relay_records(cast(Relay, relay), lambda record: None, lambda: True):
        assert relay.empty.wait(60)
    assert relay.stops > 2


def test_a_callback_that_fails_in_this_process_loses_one_record(caplog: pytest.LogCaptureFixture) -> None:
    received: list[dict[str, Any]] = []

    def loop(context: WorkerContext) -> None:
        context.report({})
        context.report({"images": 1})
        assert context.stopping()

    def on_record(record: dict[str, Any]) -> None:
        received.append(record["images"])

    assert run_workers(loop, 0, on_record, stop=lambda: bool(received))
    assert received == [1] and "KeyError" in caplog.text


def test_a_preemption_notice_is_returned_once_and_survives_a_failed_call(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("cluster.trainer.PREEMPTION_SECONDS", 0.001)
    responses, done = iter([None, ConnectionError("no answer"), "node a", "node a"]), threading.Event()

    def get_info() -> Any:
        response = next(responses, done)
        if isinstance(response, Exception):
            raise response
        if response is done:
            done.set()
            threading.Event().wait()  # never returns, like a barrier that no other worker reaches
        return response

    is_new = _preemption_notices(get_info, rank=0)
    assert done.wait(60), "the watching thread died"
    assert is_new() and not is_new() and "no answer" in caplog.text


@pytest.mark.parametrize(
    ("error", "meaning"),
    [
        ("The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR", "killed"),
        ("The actor died because its node has died. Node Id: 3f", "node was lost"),
        ("RuntimeError: [third_party/gloo/gloo/transport/tcp/pair.cc:537] Read error", "connection"),
        ("ValueError: --batch-size 3", "ValueError: --batch-size 3"),
    ],
)
def test_errors_of_libraries_about_lost_workers_become_one_short_reason(error: str, meaning: str) -> None:
    assert meaning in summarize_loss(error) and len(summarize_loss(error)) < 80
