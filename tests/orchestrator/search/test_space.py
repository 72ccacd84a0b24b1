"""The space of settings and its proposals: parameters with an effect only, bounds, determinism, learning."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from models.guidance import WHOLE_CHAIN
from orchestrator.search.config import SearchConfig
from orchestrator.search.space import GridProposals, OptunaProposals, Setting, Space, SpaceConfig, narrow_scales
from tests.orchestrator.search.passes import PASSES

ALL = SpaceConfig(
    scales=(0.0, 1.0, 4.0),
    continuous=False,
    num_steps=(10, 20),
    samplers=("ddpm", "ddim", "dpm_solver", "heun"),
    etas=(0.0, 1.0),
    intervals=((0.0, 1.0), (0.2, 0.8)),
)


def space(config: SpaceConfig = ALL, most: float = np.inf) -> Space:
    return Space(config, ("long", "short"), PASSES, most)


def test_parameters_without_an_effect_are_not_varied() -> None:
    grid = space().grid()
    assert len(grid) == len(set(grid))
    assert {setting.sampler.eta for setting in grid if setting.sampler.name != "ddim"} == {0.0}
    assert {setting.guidance.interval for setting in grid if setting.guidance.scale == 0} == {WHOLE_CHAIN}
    assert {setting.guidance.interval for setting in grid if setting.guidance.scale > 0} == {WHOLE_CHAIN, (0.2, 0.8)}
    # weights x steps x (ddpm, ddim with two etas, dpm_solver, heun) x (unguided, two scales with two intervals)
    assert len(grid) == 2 * 2 * 5 * (1 + 2 * 2)


def test_kinds_of_guidance_have_their_own_parameters_and_costs() -> None:
    config = SpaceConfig(
        guidance=("classifier", "classifier_free", "auto"), weak_weights=("weak",), scales=(0.0, 1.0),
        continuous=False, num_steps=(10,), samplers=("ddim", "edm"), s_churn=(0.0, 5.0),
    )  # fmt: skip
    grid = Space(config, ("w",), PASSES, np.inf).grid()
    assert len(grid) == (1 + 2) * (1 + 3), "ddim, edm with two churns; unguided, and three kinds"
    for setting in grid:
        assert (setting.guidance.kind == "none") == (setting.guidance.scale == 0)
        assert (setting.guidance.weak_weights == "weak") == (setting.guidance.kind == "auto")
        assert setting.sampler.s_churn == 0 or setting.sampler.name == "edm"
        passes = {"none": 1, "classifier": 2, "classifier_free": 2, "auto": 1.25}[setting.guidance.kind]
        assert setting.evaluations == passes * (10 if setting.sampler.name == "ddim" else 19)
    with pytest.raises(ValidationError, match="weak_weights"):
        SpaceConfig(guidance=("auto",))
    with pytest.raises(ValidationError, match="weak_weights"):
        SpaceConfig(weak_weights=("weak",))


def test_evaluations_count_the_classifier_only_where_it_guides() -> None:
    for setting in space().grid():
        unguided = 2 * setting.sampler.num_steps - 1 if setting.sampler.name == "heun" else setting.sampler.num_steps
        if setting.guidance.interval != WHOLE_CHAIN:
            assert unguided < setting.evaluations < 2 * unguided
        else:
            assert setting.evaluations == (2 * unguided if setting.guidance.scale else unguided)
    (tenth,) = space(SpaceConfig(scales=(1.0,), continuous=False, num_steps=(10,), intervals=((0.0, 0.5),))).grid()[:1]
    assert tenth.evaluations == 10 + 6, "guided at 0, 100, ..., 500"


def test_a_bound_on_evaluations_is_kept_without_sampling() -> None:
    bounded = space(most=25)
    assert {setting.evaluations <= 25 for setting in bounded.grid()} == {True}
    proposals = OptunaProposals(bounded, seed=0, num_objectives=1, round_size=8)
    assert all(setting.evaluations <= 25 for setting in proposals.ask(8))


def propose_three_rounds(seed: int, config: SpaceConfig = ALL) -> list[Setting]:
    """Return the proposals of three rounds with the same outcomes."""
    proposals = OptunaProposals(space(config), seed, num_objectives=1, round_size=6)
    settings = []
    for _ in range(3):
        for setting in proposals.ask(6):
            settings.append(setting)
            proposals.tell(setting, [abs(setting.guidance.scale - 1.0) + 1 / setting.sampler.num_steps], 0.0)
    return settings


def test_the_same_seed_and_outcomes_give_the_same_proposals() -> None:
    continuous = ALL.model_copy(update={"continuous": True})
    for config in (ALL, continuous):
        first = propose_three_rounds(3, config)
        assert first == propose_three_rounds(3, config) != propose_three_rounds(4, config)
        assert len(set(first)) == 18


def test_proposals_improve_with_outcomes() -> None:
    settings = propose_three_rounds(5, SpaceConfig(scales=(0.0, 1.0, 2.0, 4.0, 8.0), num_steps=(10,)))
    first, last = (np.mean([abs(s.guidance.scale - 1) for s in part]) for part in (settings[:6], settings[12:]))
    assert last < first / 1.5


def test_the_first_round_covers_the_space() -> None:
    wide = space(SpaceConfig(num_steps=(5, 10, 20, 40), samplers=("ddpm", "ddim")))
    settings = OptunaProposals(wide, 0, 1, round_size=8).ask(8)
    assert {setting.sampler.num_steps for setting in settings} == {5, 10, 20, 40}
    assert {setting.sampler.name for setting in settings} == {"ddpm", "ddim"}
    scales = sorted(setting.guidance.scale for setting in settings)
    assert scales[0] < 0.5 and scales[-1] > 4 and all(b > a for a, b in pairwise(scales))


def test_an_exhausted_space_proposes_what_is_left() -> None:
    config = SpaceConfig(scales=(0.0, 1.0), continuous=False, num_steps=(10,))
    assert len(OptunaProposals(Space(config, ("w",), PASSES, np.inf), 0, 1, 6).ask(6)) == 2


def test_a_grid_is_proposed_once_as_a_whole() -> None:
    grid = space().grid()
    proposals = GridProposals(grid, proxy=False)
    assert proposals.ask(5) == grid and not proposals.ask(5)


def test_few_steps_narrow_the_scales_of_more_steps_by_sampler() -> None:
    """With 5 steps ddpm is best at scale 4 and ddim at 1; 8 times as many steps lower the best scale 2.3 times."""
    scales = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0)
    config = SpaceConfig(scales=scales, continuous=False, num_steps=(5, 10, 40), samplers=("ddpm", "ddim"))
    proposals = GridProposals(Space(config, ("w",), PASSES, np.inf).grid(), proxy=True)
    first = proposals.ask(100)
    assert {setting.sampler.num_steps for setting in first} == {5} and len(first) == 12
    for setting in first:
        proposals.tell(setting, [abs(setting.guidance.scale - (4.5 if setting.sampler.name == "ddpm" else 1.1))], 0.0)
    rest = proposals.ask(100)
    scales_of: dict[tuple[str, int], list[float]] = {}
    for setting in rest:
        scales_of.setdefault((setting.sampler.name, setting.sampler.num_steps), []).append(setting.guidance.scale)
    assert scales_of == {
        ("ddpm", 10): [1.0, 2.0, 4.0], ("ddpm", 40): [0.5, 1.0, 2.0, 4.0],
        ("ddim", 10): [0.0, 0.5, 1.0], ("ddim", 40): [0.0, 0.5, 1.0],
    }  # fmt: skip
    assert not proposals.ask(100)


def test_few_steps_narrow_the_scales_of_each_guide() -> None:
    """The classifier is best at scale 4, and classifier-free guidance at 0.5."""
    config = SpaceConfig(
        guidance=("classifier", "classifier_free"), scales=(0.0, 0.5, 1.0, 2.0, 4.0, 8.0), continuous=False,
        num_steps=(5, 10),
    )  # fmt: skip
    grid = Space(config, ("w",), PASSES, np.inf).grid()
    best = {"none": -3.0, "classifier": 4.4, "classifier_free": 0.6}
    few = [setting for setting in grid if setting.sampler.num_steps == 5]
    measured = {setting: abs(setting.guidance.scale - best[setting.guidance.kind]) for setting in few}
    scales: dict[str, list[float]] = {}
    for setting in narrow_scales(measured, [setting for setting in grid if setting not in measured]):
        scales.setdefault(setting.guidance.kind, []).append(setting.guidance.scale)
    assert scales == {"none": [0.0], "classifier": [1.0, 2.0, 4.0], "classifier_free": [0.5, 1.0]}


@pytest.mark.parametrize("fixed", [{"scales": (2.0,)}, {"guidance": ("none",)}])
def test_a_fixed_scale_makes_the_space_a_grid(fixed: dict[str, Any]) -> None:
    space = SpaceConfig(num_steps=(10, 25, 50), **fixed)
    config = SearchConfig(weights=("w",), classifier="c", reference="r", output="o", space=space)
    grid = Space(space, ("w",), PASSES, np.inf).grid()
    assert config.proposes_grid(grid) and config.num_trials(grid) == len(grid) == 3


def test_if_the_fewest_steps_fail_more_steps_are_still_tried() -> None:
    (few, more) = space(SpaceConfig(scales=(0.0,), continuous=False, num_steps=(5, 10))).grid()[:2]
    assert narrow_scales({few: np.inf}, [more]) == [more]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scales": (1.0, 0.5)}, "scales"),
        ({"num_steps": (10, 10)}, "num_steps"),
        ({"scales": (-1.0, 1.0)}, "scales"),
        ({"intervals": ((0.8, 0.2),)}, "0 <= low < high <= 1"),
        ({"samplers": ("euler",)}, "ddpm"),
    ],
)
def test_a_wrong_space_is_one_clear_error(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        SpaceConfig(**changes)


def test_steps_that_a_sampler_cannot_space_are_an_error() -> None:
    with pytest.raises(ValueError, match="ddim"):
        Space(SpaceConfig(num_steps=(999,), samplers=("ddim",)), ("w",), PASSES, np.inf).grid()
