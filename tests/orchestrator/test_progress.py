"""Test that the progress line counts the work of earlier attempts, but not in its rate."""

import subprocess
import sys

from orchestrator.progress import counted, progress_line
from tests.submission import ROOT


def test_the_rate_excludes_earlier_attempts() -> None:
    with progress_line(100, "samples") as progress:
        progress.finish_item("first", 60, in_rate=False)
        progress.finish_item("second", 10)
        assert progress.done == 70
        bar = progress._bar
        assert (bar.n - bar.initial, bar.total) == (10, 100)


def test_the_line_moves_within_an_item_and_never_back() -> None:
    with progress_line(100, "samples") as progress:
        for item, done, shown in (("a", 8, 8), ("b", 4, 12), ("a", 16, 20), ("a", 8, 20)):
            progress.update_item(item, done)
            assert progress.done == shown
        progress.finish_item("a", 20)
        assert progress.done == 24
        progress.update_item("a", 12)  # a report that arrives late
        progress.finish_item("b", 20, in_rate=False)
        assert progress.done == 40


def test_a_start_leaves_what_came_before_out_of_time_and_rate() -> None:
    with progress_line(1_000, "images", "starting 2 workers") as progress:
        bar = progress._bar
        bar.start_t -= 3600
        progress.start(600)
        progress.update_to(610)
        assert (bar.n, bar.initial, bar.desc) == (610, 600, "")
        assert bar.format_dict["elapsed"] < 60
        progress.start(400)  # a worker was lost, and with it the images after its last checkpoint
        assert (bar.n, bar.initial) == (400, 400)


def test_counts_agree_with_their_nouns() -> None:
    assert [counted(n, noun) for n, noun in ((1, "worker"), (2_000, "worker"), (1, "class"), (0, "class"))] == [
        "1 worker", "2,000 workers", "1 class", "0 classes"
    ]  # fmt: skip


def test_a_closed_terminal_does_not_end_the_job() -> None:
    """tqdm keeps its lock if a write raises, so that its next call would wait forever."""
    code = (
        "import sys\n"
        "from orchestrator.progress import progress_line\n"
        "sys.stdin.read()\n"  # until the test has closed stderr
        "with progress_line(100, 'images') as progress:\n"
        "    for done in range(100):\n"
        "        progress.start(done)\n"
    )
    pipe = subprocess.PIPE
    job = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdin=pipe, stderr=pipe)
    assert job.stdin is not None and job.stderr is not None
    job.stderr.close()
    job.stdin.close()
    try:
        assert job.wait(timeout=60) == 0
    finally:
        job.kill()
