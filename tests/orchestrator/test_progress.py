"""The line: what was done before counts, and is no part of the rate."""

from orchestrator.progress import Progress, progress_line


def test_what_was_done_before_is_no_part_of_the_rate() -> None:
    with progress_line(100, "samples") as progress:
        progress.skip(60)
        progress.update_to(progress.done + 10)
        assert progress.done == 70
        bar = progress._bar
        assert (bar.n - bar.initial, bar.total) == (10, 100)
        assert isinstance(progress, Progress)
