"""Neighbours and balls: exact decisions for any block size, also for ties."""

import numpy as np
import pytest
from numpy.typing import NDArray

from models import neighbours
from models.neighbours import nearest, squared_radii
from tests.reference_metrics import balls_holding

Array = NDArray[np.float64]
SEED = 21


def generator(*key: int) -> np.random.Generator:
    print("seed", SEED, key)
    return np.random.default_rng([SEED, *key])


def all_squares(a: Array, b: Array) -> Array:
    return np.square(a[:, None] - b[None]).sum(-1)


@pytest.fixture(params=["one block", "blocks of one row"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "blocks of one row":
        monkeypatch.setattr(neighbours, "BLOCK_BYTES", 64)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_nearest_equals_the_direct_computation_even_far_from_the_origin(offset: float) -> None:
    rng = generator(1)
    queries, targets = rng.standard_normal((40, 6)) + offset, rng.standard_normal((70, 6)) + offset
    squares = all_squares(queries, targets)
    result = nearest(queries, targets, 5)
    np.testing.assert_array_equal(result.index, np.argsort(squares, axis=1, kind="stable")[:, :5])
    np.testing.assert_allclose(result.squared, np.sort(squares, axis=1)[:, :5], rtol=1e-14)


@pytest.mark.usefixtures("blocks")
def test_ties_go_to_the_lowest_index_and_a_row_is_not_its_own_neighbour() -> None:
    grid = np.repeat(np.arange(30.0), 3)[:, None]  # each point three times, neighbours at distance 1 on both sides
    result = nearest(grid, grid, 4)
    assert result.index[0].tolist() == [1, 2, 3, 4] and result.squared[0].tolist() == [0, 0, 1, 1]
    assert result.index[45].tolist() == [46, 47, 42, 43]
    crowd = np.zeros((50, 2))  # every row is a candidate
    assert nearest(crowd, crowd, 3).index[10].tolist() == [0, 1, 2]


@pytest.mark.usefixtures("blocks")
def test_balls_count_their_surface_unless_strict() -> None:
    rng = generator(2)
    points, centres = rng.integers(0, 4, (60, 3)).astype(float), rng.integers(0, 4, (50, 3)).astype(float)
    radii = squared_radii(centres, 3)  # small integers: nearly every decision is a tie
    squares = all_squares(points, centres)
    np.testing.assert_array_equal(balls_holding(points, centres, radii), (squares <= radii).sum(1))
    np.testing.assert_array_equal(balls_holding(points, centres, radii, strict=True), (squares < radii).sum(1))
    np.testing.assert_array_equal(balls_holding(points, centres, radii) > 0, (squares <= radii).any(1))
