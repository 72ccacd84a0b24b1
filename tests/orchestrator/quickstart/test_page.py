"""The report of the quickstart."""

from typing import Any

from orchestrator.quickstart.page import trade_off


def trial(scale: float, precision: tuple[float, float] | None, recall: tuple[float, float] | None) -> dict[str, Any]:
    found = {
        name: {"value": 0.5, "interval": i and list(i)} for name, i in (("precision", precision), ("recall", recall))
    }
    return {"setting": {"guidance": {"scale": scale}, "sampler": {"num_steps": 10}}, "rungs": {"256": found}}


def test_a_change_is_significant_only_if_the_intervals_do_not_overlap() -> None:
    apart = trade_off([trial(0, (0.1, 0.2), (0.7, 0.8)), trial(8, (0.3, 0.4), (0.5, 0.6))], 10)
    assert apart["precision_rises"] and apart["recall_falls"]
    overlapping = trade_off([trial(0, (0.1, 0.3), (0.5, 0.8)), trial(8, (0.2, 0.4), (0.4, 0.6))], 10)
    assert not overlapping["precision_rises"] and not overlapping["recall_falls"]
    without = trade_off([trial(0, None, None), trial(8, None, None)], 10)
    assert not without["precision_rises"] and not without["recall_falls"]
