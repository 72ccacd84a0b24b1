"""Attempts: permanent errors end a training at once, other failures are retried from the last checkpoint."""

import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from cluster.actor import in_short
from cluster.trainer import WorkerContext, _PreemptionNotice, _relayed, _tolerant, run_workers


class Loop:
    """A loop whose first attempts die, some of them after progress. Then it raises or returns."""

    def __init__(self, folder: Path, deaths_with_progress: int, deaths_without: int, error: str = "") -> None:
        self.folder, self.deaths_with_progress, self.deaths_without = folder, deaths_with_progress, deaths_without
        self.error = error

    def __call__(self, context: WorkerContext) -> None:
        attempt = len(list(self.folder.iterdir()))
        (self.folder / f"attempt-{attempt}").touch()
        if attempt < self.deaths_with_progress:
            context.report({"saved": attempt})
        context.report({"attempt": attempt})
        if attempt < self.deaths_with_progress + self.deaths_without:
            self._die_after_reports(context)
        if self.error:
            raise ValueError(self.error)

    def _die_after_reports(self, context: WorkerContext) -> None:
        import time

        time.sleep(1.0)  # a report goes out by itself
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.ray
def test_deaths_are_survived_while_there_is_progress_and_permanent_errors_end_at_once(
    ray_session: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    records: list[dict[str, Any]] = []
    loop = Loop(tmp_path, deaths_with_progress=2, deaths_without=0, error="learning_rate=-1 is negative")
    with pytest.raises(RuntimeError, match="training failed: ValueError: learning_rate=-1 is negative"):
        run_workers(loop, 1, records.append, max_failures=1)
    assert len(list(tmp_path.iterdir())) == 3, "two deaths after progress, then the error once"
    assert [record["attempt"] for record in records if "attempt" in record] == [0, 1, 2]
    assert caplog.text.count("an attempt failed, going on from the last checkpoint") == 2


def until_asked(context: WorkerContext) -> None:
    import time

    context.report({"begun": True})
    while not context.stopping():
        time.sleep(0.05)
    context.report({"stopped": True})


@pytest.mark.ray
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_asks_the_workers_to_stop_and_waits_for_them(ray_session: None, number: signal.Signals) -> None:
    records: list[dict[str, Any]] = []

    def on_record(record: dict[str, Any]) -> None:
        records.append(record)
        if "begun" in record:
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    assert run_workers(until_asked, 1, on_record)
    assert records == [{"begun": True}, {"stopped": True}], "its last record arrived too"
    assert signal.getsignal(number) is before


@pytest.mark.ray
@pytest.mark.slow
def test_deaths_without_progress_end_the_run(ray_session: None, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="training failed: worker 0: "):
        run_workers(Loop(tmp_path, deaths_with_progress=0, deaths_without=9), 1, lambda record: None, max_failures=1)
    assert len(list(tmp_path.iterdir())) == 2


class Records:
    """A relay without Ray, which returns one record for each call. The second call fails."""

    def __init__(self, count: int) -> None:
        self.waiting, self.calls, self.stops, self.empty = list(range(count)), 0, 0, threading.Event()

    def exchange(self, stop: bool) -> list[dict[str, Any]]:
        self.calls += 1
        self.stops += stop
        if self.calls == 2:
            raise ConnectionError("the relay did not answer")
        if self.waiting:
            return [{"number": self.waiting.pop(0)}]
        self.empty.set()
        return []


def test_records_after_a_failed_callback_or_call_still_arrive(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("cluster.trainer.POLL_SECONDS", 0.001)
    seen: list[int] = []

    def on_record(record: dict[str, Any]) -> None:
        seen.append(record["number"])
        if record["number"] == 0:
            raise KeyError("loss")

    relay = Records(4)
    with _relayed(relay, _tolerant(on_record), lambda: False):
        assert relay.empty.wait(60), "no more records arrive"
    assert seen == [0, 1, 2, 3]
    assert "KeyError: 'loss'" in caplog.text and "the training goes on" in caplog.text


def test_the_stop_flag_is_sent_again_if_a_call_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.trainer.POLL_SECONDS", 0.001)
    relay = Records(2)
    with _relayed(relay, lambda record: None, lambda: True):
        assert relay.empty.wait(60)
    assert relay.stops > 2


def test_a_callback_that_fails_in_this_process_loses_one_record(caplog: pytest.LogCaptureFixture) -> None:
    seen: list[dict[str, Any]] = []

    def loop(context: WorkerContext) -> None:
        context.report({})
        context.report({"images": 1})
        assert context.stopping()

    def on_record(record: dict[str, Any]) -> None:
        seen.append(record["images"])

    assert run_workers(loop, 0, on_record, stop=lambda: bool(seen))
    assert seen == [1] and "KeyError" in caplog.text


def test_a_failed_call_does_not_lose_a_later_preemption_notice(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("cluster.trainer.PREEMPTION_SECONDS", 0.001)
    answers, done = iter([None, ConnectionError("no answer"), "node a"]), threading.Event()

    def get_info() -> Any:
        answer = next(answers, done)
        if isinstance(answer, Exception):
            raise answer
        if answer is done:
            done.set()
            threading.Event().wait()  # a barrier that nobody else reaches
        return answer

    notice = _PreemptionNotice(get_info, rank=0)
    assert done.wait(60), "the watching thread died"
    assert notice() and "no answer" in caplog.text


def test_a_preemption_notice_is_returned_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.trainer.PREEMPTION_SECONDS", 0.001)
    answers, asked, done = iter([None, None, "node a", "node a", "node a"]), [], threading.Event()

    def get_info() -> Any:
        try:
            asked.append(next(answers))
        except StopIteration:
            done.set()
            threading.Event().wait()  # a barrier that nobody else reaches
        return asked[-1]

    notice = _PreemptionNotice(get_info, rank=0)
    assert done.wait(60)
    assert notice() and not notice()


@pytest.mark.parametrize(
    ("words", "meaning"),
    [
        ("The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR", "killed"),
        ("The actor died because its node has died. Node Id: 3f", "node was lost"),
        ("RuntimeError: [third_party/gloo/gloo/transport/tcp/pair.cc:537] Read error", "connection"),
        ("ValueError: --batch-size 3", "ValueError: --batch-size 3"),
    ],
)
def test_words_of_libraries_about_lost_workers_become_one_short_reason(words: str, meaning: str) -> None:
    assert meaning in in_short(words) and len(in_short(words)) < 80
