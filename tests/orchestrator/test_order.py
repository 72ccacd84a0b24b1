"""The order plan is one sequence for every worker count and every restart; keyed draws never change."""

import hashlib
from collections.abc import Iterator
from itertools import islice

import numpy as np
import pytest

from orchestrator.order import OrderConfig, OrderPlan, Purpose, Unit, index_rng, keyed_rng, sample_rng

# Drawn with numpy 2.4.6.
GOLDEN_RAW = [17076516412300440775, 6113077121411871719, 5205107462394825984]
GOLDEN_NORMALS = [1.3434895277023315, -0.9212364554405212, -2.2203824520111084, -0.3632393181324005]
GOLDEN_UNIFORM = 0.6709134583715431
GOLDEN_PERMUTATION = [5, 4, 7, 3, 1, 6, 2, 0]
GOLDEN_ORDER = [[21, 0, 11, 3], [23, 2, 10, 4], [22, 1, 5, 9]]


def make_plan(num_groups: int, batch_size: int, num_streams: int, window: int = 4, seed: int = 0) -> OrderPlan:
    sizes = tuple(int(n) for n in np.random.default_rng(1).integers(5, 9, num_groups))
    return OrderPlan(sizes, batch_size, OrderConfig(num_streams=num_streams, shuffle_row_groups=window), seed)


def share(plan: OrderPlan, rank: int, world_size: int, position: int) -> Iterator[np.ndarray]:
    """Yield the sample ids [P/W * B/P] of one worker for each step, from its units, as in a training."""
    streams, units = plan.streams(rank, world_size), plan.units(rank, world_size, position)
    first_samples = np.cumsum(plan.row_group_sizes) - plan.row_group_sizes
    waiting: dict[int, list[np.ndarray]] = {stream: [] for stream in streams}
    while True:
        batch = []
        for stream in streams:
            while sum(map(len, waiting[stream])) < plan.rows_per_stream:
                unit: Unit = next(units)
                waiting[unit.stream].append(first_samples[unit.rows[:, 0]] + unit.rows[:, 1])
            ids = np.concatenate(waiting[stream])
            batch.append(ids[: plan.rows_per_stream])
            waiting[stream] = [ids[plan.rows_per_stream :]]
        yield np.concatenate(batch)


def sequence(plan: OrderPlan, world_size: int, position: int, steps: int) -> np.ndarray:
    """Return the unsorted global sequence, int64 [steps, B]."""
    workers = [list(islice(share(plan, rank, world_size, position), steps)) for rank in range(world_size)]
    return np.stack([np.concatenate(parts) for parts in zip(*workers, strict=True)])


def order_hash(sequence: np.ndarray) -> str:
    """Return the SHA-256 of an unsorted sequence of sample ids."""
    return hashlib.sha256(np.ascontiguousarray(sequence, dtype="<i8").tobytes()).hexdigest()


@pytest.mark.parametrize("num_streams", [2**k for k in range(11)])
def test_every_divisor_gives_the_same_sequence(num_streams: int) -> None:
    """All numbers of workers W have the same hash, and a restart with any W at a random step continues the sequence."""
    plan = make_plan(5 * num_streams + num_streams // 2, 2 * num_streams, num_streams, window=2)
    steps = plan.batches_per_epoch + 3  # into the next epoch
    expected = sequence(plan, 1, 0, steps)
    rng = np.random.default_rng(num_streams)
    for world_size in (2**k for k in range(num_streams.bit_length())):
        digest = order_hash(sequence(plan, world_size, 0, steps))
        print(f"P={num_streams:4} W={world_size:4} {digest[:32]} of {expected.size:,} samples")
        assert digest == order_hash(expected), f"{world_size=}"
        step = int(rng.integers(1, steps))
        resumed = sequence(plan, world_size, step * plan.batch_size, steps - step)
        assert np.array_equal(resumed, expected[step:]), f"{world_size=} {step=}"


def test_a_restart_at_any_step_continues_the_sequence() -> None:
    plan = make_plan(24, 12, 4, window=2)
    steps = 2 * plan.batches_per_epoch + 2
    expected = sequence(plan, 1, 0, steps)
    for step in range(steps):
        for world_size in (1, 2, 4):
            resumed = sequence(plan, world_size, step * 12, steps - step)
            assert np.array_equal(resumed, expected[step:]), f"step={step} world_size={world_size}"


def test_no_sample_twice_in_an_epoch_and_epochs_differ() -> None:
    plan = make_plan(37, 16, 4)
    per_epoch = plan.batches_per_epoch
    ids = sequence(plan, 1, 0, 3 * per_epoch).reshape(3, -1)
    assert ids.shape[1] == plan.images_per_epoch
    sets = [set(epoch.tolist()) for epoch in ids]
    assert all(len(samples) == plan.images_per_epoch for samples in sets)
    assert all(0 <= i < sum(plan.row_group_sizes) for samples in sets for i in samples)
    assert sets[0] != sets[1], "epochs omit different samples"
    assert len(set.union(*sets)) > plan.images_per_epoch


def test_no_row_group_in_two_streams_or_windows() -> None:
    plan = make_plan(37, 16, 4, window=3)
    epoch_rows = 0
    owners: dict[int, tuple[int, int]] = {}
    for unit in plan.units(0, 1):
        if unit.epoch == 1:
            break
        epoch_rows += len(unit.rows)
        for group in unit.row_groups:
            assert owners.setdefault(group, (unit.stream, unit.first)) == (unit.stream, unit.first)
    assert epoch_rows == plan.images_per_epoch, "never more than the epoch's batches need"


def test_units_come_in_the_order_of_first_need() -> None:
    plan = make_plan(64, 16, 4, window=2)
    needs = [(unit.epoch, unit.first // plan.rows_per_stream, unit.stream) for unit in islice(plan.units(0, 1), 100)]
    assert needs == sorted(needs)


def test_resuming_reads_only_open_windows() -> None:
    plan = make_plan(64, 16, 4, window=2)
    step = plan.batches_per_epoch // 2
    firsts: dict[int, Unit] = {}
    for unit in islice(plan.units(0, 1, 16 * step), 8):
        firsts.setdefault(unit.stream, unit)
    assert sorted(firsts) == [0, 1, 2, 3]
    assert {unit.first for unit in firsts.values()} == {plan.rows_per_stream * step}
    assert all(len(unit.rows) <= 2 * max(plan.row_group_sizes) for unit in firsts.values())


def test_a_window_mixes_its_row_groups_only() -> None:
    plan = make_plan(16, 8, 2, window=4)
    for unit in islice(plan.units(0, 1), 4):
        assert len(unit.row_groups) <= 4
        assert not np.array_equal(unit.rows, unit.rows[np.lexsort(unit.rows.T[::-1])]), "shuffled"


def test_another_seed_is_another_order() -> None:
    first, second = (sequence(make_plan(16, 8, 2, seed=seed), 1, 0, 5) for seed in (0, 1))
    assert not np.array_equal(first, second)


def test_equal_row_groups_give_all_full_batches_and_unequal_ones_fewer() -> None:
    even = OrderPlan((90,) * 16, 64, OrderConfig(num_streams=4))
    assert even.batches_per_epoch == 90 * 16 // 64
    digits = OrderPlan((90,) * 13 + (89,) * 3, 64, OrderConfig(num_streams=4))
    assert digits.batches_per_epoch == 1437 // 64
    # N = 4 and B = 2 would give two batches, but the stream with the row group of one row has only one row
    assert OrderPlan((3, 1), 2, OrderConfig(num_streams=2)).batches_per_epoch == 1


def test_a_position_determines_epoch_and_batch() -> None:
    plan = OrderPlan((10,) * 8, 16, OrderConfig(num_streams=4))
    assert plan.images_per_epoch == 80
    assert plan.locate(0) == (0, 0) and plan.locate(64) == (0, 4) and plan.locate(80) == (1, 0)
    assert list(islice(plan.steps(64), 3)) == [(0, 64), (1, 80), (1, 96)]


def test_open_bytes_are_bounded() -> None:
    plan = OrderPlan((10, 12) * 8, 16, OrderConfig(num_streams=4, shuffle_row_groups=2))
    assert plan.open_bytes(1, 100) == 4 * 2 * 12 * 100
    assert plan.open_bytes(4, 100) == 2 * 12 * 100
    # Images of 256 pixels in row groups of 128 are accepted for 8 workers, but are too large for one.
    large = OrderPlan((128,) * 1024, 256, OrderConfig(num_streams=64, shuffle_row_groups=4))
    assert large.open_bytes(8, 3 * 256**2) == 8 * 4 * 128 * 3 * 256**2
    with pytest.raises(ValueError, match=r"6\.0 GiB of open images.*num_workers, or lower order.shuffle_row_groups=4"):
        large.open_bytes(1, 3 * 256**2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: OrderPlan((4,) * 9, 9, OrderConfig(num_streams=3)), "num_streams=3 is not a power of two"),
        (
            lambda: OrderPlan((4,) * 8, 6, OrderConfig(num_streams=4)),
            "batch_size=6 must be a positive multiple",
        ),
        (lambda: OrderPlan((4,) * 2, 8, OrderConfig(num_streams=4)), "more than the 2 row groups"),
        (lambda: OrderPlan((4,) * 4, 64, OrderConfig(num_streams=4)), "use batch_size <= 16"),
        (lambda: make_plan(16, 8, 4).locate(12), "position=12 is not a multiple of batch_size=8"),
        (lambda: make_plan(16, 8, 4).locate(-8), "position=-8"),
        (lambda: make_plan(16, 8, 4).streams(0, 3), "world_size=3 does not divide num_streams=4"),
        (lambda: make_plan(16, 8, 4).streams(2, 2), "rank=2 is not in"),
        (lambda: keyed_rng(Purpose.NOISE, -1), "must be a seed and at most two integers"),
        (lambda: keyed_rng(Purpose.NOISE, 1, 2, 3, 4), "must be a seed and at most two integers"),
    ],
)
def test_impossible_values_are_refused(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        call()  # type: ignore[operator]


def test_keys_do_not_collide() -> None:
    """Plain lists collide, because numpy splits integers into as many words as they need and pads with zeros."""
    assert np.random.default_rng([1]).random() == np.random.default_rng([1, 0]).random()
    values = [0, 1, 2**32 - 1, 2**32, 2**32 + 1, 2**63]
    draws = {
        int(keyed_rng(purpose, seed, first, second).bit_generator.random_raw())
        for purpose in (Purpose.FLIP, Purpose.NOISE)
        for seed in values
        for first in values
        for second in values
    }
    assert len(draws) == 2 * len(values) ** 3
    assert len({int(purpose) for purpose in Purpose}) == len(Purpose)


def test_keyed_draws_are_the_golden_ones() -> None:
    """If a version of numpy changes a distribution, this test must fail."""
    rng = sample_rng(7, 3, 1234567, Purpose.NOISE)
    assert rng.bit_generator.random_raw(3).tolist() == GOLDEN_RAW
    normals = sample_rng(7, 3, 1234567, Purpose.NOISE).standard_normal(4, dtype=np.float32)
    np.testing.assert_array_equal(normals, np.array(GOLDEN_NORMALS, dtype=np.float32))
    assert index_rng(7, 49_999, Purpose.STEP, timestep=250).random() == GOLDEN_UNIFORM
    assert keyed_rng(Purpose.ROW_GROUPS, 7, 3).permutation(8).tolist() == GOLDEN_PERMUTATION


def test_the_order_plan_is_the_golden_one() -> None:
    plan = OrderPlan((3,) * 8, 4, OrderConfig(num_streams=2, shuffle_row_groups=2), seed=5)
    assert sequence(plan, 1, 0, 3).tolist() == GOLDEN_ORDER
