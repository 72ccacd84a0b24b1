"""The search's records: resumable, and concluded by the objective."""

from typing import Any

import pytest

from orchestrator import storage
from orchestrator.search import SearchConfig, conclude, settings_of


def config(store: str, **changes: Any) -> SearchConfig:
    settings: dict = {
        "store": store, "weights": "w", "classifier": "c", "reference": "d", "output": "search",
        "scales": (0.0, 2.0), "steps": (5, 10),
    }  # fmt: skip
    return SearchConfig(**settings | changes)


def record(store: str, scale: float, steps: int, fd: float) -> None:
    content = {"setting": {"scale": scale, "steps": steps}, "metrics": {"fd_digits": {"value": fd}}}
    storage.write_json(f"{store}/search/trials/{scale}-{steps}.json", content)


def test_every_pair_is_tried(tmp_path: Any) -> None:
    found = [(setting["scale"], setting["steps"]) for setting in settings_of(config(str(tmp_path)))]
    assert found == [(0.0, 5), (2.0, 5), (0.0, 10), (2.0, 10)]


def test_the_winner_has_the_least_of_the_objective_and_failures_are_kept(tmp_path: Any) -> None:
    store = str(tmp_path)
    for scale, steps, fd in ((2.0, 10, 1.5), (0.0, 5, 3.0), (2.0, 5, 1.0)):
        record(store, scale, steps, fd)
    answer = conclude(config(store), {"x.json": "ValueError: out of memory"})
    assert answer["winner"]["setting"] == {"scale": 2.0, "steps": 5}
    assert [trial["setting"]["steps"] for trial in answer["trials"]] == [5, 5, 10]
    assert answer["failed"] == {"x.json": "ValueError: out of memory"}


def test_no_trial_at_all_is_an_error(tmp_path: Any) -> None:
    with pytest.raises(RuntimeError, match="no trial came to an end"):
        conclude(config(str(tmp_path)), {})


def test_an_unknown_objective_names_the_known_ones(tmp_path: Any) -> None:
    record(str(tmp_path), 2.0, 5, 1.0)
    with pytest.raises(ValueError, match=r"objective='fid' is none of \['fd_digits'\]"):
        conclude(config(str(tmp_path), objective="fid"), {})
