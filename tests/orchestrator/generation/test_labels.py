"""Test that label policies are pure functions of the index with the requested distribution."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orchestrator.generation.labels import Labels, read_labels

CLASSES = ("cat", "dog", "7", "eel")
INDICES = np.arange(4_000)


def read(policy: str, seed: int = 3, classes: tuple[str, ...] = CLASSES) -> Labels:
    return read_labels(policy, classes, seed, str)


def test_balanced_labels_alternate_and_uniform_labels_depend_on_their_index() -> None:
    assert read("balanced")(INDICES).tolist() == [index % 4 for index in INDICES]
    drawn = read("uniform")(INDICES)
    counts = np.bincount(drawn, minlength=4)
    assert ((counts - 1_000) ** 2 / 1_000).sum() < 16.3, f"{counts} (chi-square, 3 degrees of freedom, 0.1%)"
    assert np.array_equal(read("uniform")(INDICES[500:510]), drawn[500:510]), "a label depends on its neighbours"
    assert not np.array_equal(read("uniform", seed=4)(INDICES), drawn)


def test_listed_classes_are_taken_in_turn_and_names_come_before_numbers() -> None:
    assert read("dog, 7,0")(np.arange(7)).tolist() == [1, 2, 0, 1, 2, 0, 1]


def test_a_file_may_contain_a_list_or_a_distribution(tmp_path: Path) -> None:
    in_turn = tmp_path / "list.json"
    in_turn.write_text('["eel", 0, "cat"]')
    assert read(str(in_turn))(np.arange(4)).tolist() == [3, 0, 0, 3]
    weights = tmp_path / "weights.json"
    weights.write_text('{"eel": 3, "dog": 1, "cat": 0}')
    labels = read(str(weights))
    counts = np.bincount(labels(INDICES), minlength=4)
    assert counts[0] == counts[2] == 0
    assert abs(counts[3] - 3_000) < 4 * np.sqrt(4_000 * 0.75 * 0.25), f"{counts} for weights 0, 1, 0, 3"
    assert labels.sha256 and labels.sha256 != read(str(in_turn)).sha256


def test_the_last_class_with_weight_gets_the_remainder_of_rounding(tmp_path: Path) -> None:
    weights = tmp_path / "weights.json"
    weights.write_text(json.dumps({"cat": 0.1, "dog": 0.2, "7": 0.3}))
    assert read(str(weights)).cumulative[2:] == (1.0, 1.0)


def test_without_classes_there_is_no_label() -> None:
    assert read("balanced", classes=())(INDICES[:3]).tolist() == [-1, -1, -1]
    with pytest.raises(ValueError, match="needs samples that are conditioned on classes"):
        read("3", classes=())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"fox": 1}, "no class 'fox'; it has 4 classes, from 'cat' to 'eel'"),
        ([4], "no class '4'"),
        ({"cat": -1, "dog": 2}, "must be numbers of at least 0"),
        ({"cat": 0}, "not all 0"),
        ({"cat": "much"}, "must be numbers"),
        ([], "must contain a list of classes"),
        (3, "must contain a list of classes"),
    ],
)
def test_a_wrong_file_is_one_clear_error(tmp_path: Path, content: Any, message: str) -> None:
    file = tmp_path / "labels.json"
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        read(str(file))
