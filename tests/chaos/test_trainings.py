"""Promises P1, P2, P3, P8 and P12: hashes of trainings whose workers are killed."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from orchestrator import storage
from orchestrator.training.config import AdmConfig
from orchestrator.training.job import train
from tests import servers
from tests.chaos.audit import consumed, noise_hash, order_hash, state_hash
from tests.chaos.killer import Kill, killing, random_plan
from tests.chaos.plain import train_plainly
from tests.chaos.proxy import Proxy
from tests.chaos.trainings import (
    BATCH,
    CHECKPOINT,
    arguments,
    config_of,
    prepare_digits,
    start_job,
    train_by_processes,
)

SEED = 0


@pytest.fixture(scope="module")
def store(s3_server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Return a bucket with the digits dataset."""
    folder = tmp_path_factory.mktemp("tracking")
    with servers.environment(MLFLOW_TRACKING_URI=f"sqlite:///{folder}/mlflow.db"):
        storage.make_bucket("s3://chaos-tests")
        prepare_digits("s3://chaos-tests")
        yield "s3://chaos-tests"


@pytest.fixture(scope="module")
def undisturbed(store: str) -> tuple[str, list[dict[str, Any]]]:
    """Train without kills in this process; return the hash of the final state and the consumed rows."""
    config = config_of(arguments(store, "undisturbed", 0, checkpoints=5))
    train(config)
    return state_hash(config), consumed(config)


PLAN = [
    Kill("mid-upload", 2 * CHECKPOINT),
    Kill("first step after a resume", 3 * CHECKPOINT),
    Kill("between upload and commit", 4 * CHECKPOINT),
]


def test_three_kills_do_not_change_a_bit(
    store: str, undisturbed: tuple[str, list[dict[str, Any]]], ray_proxy: Proxy
) -> None:
    config = config_of(arguments(store, "killed", 2, checkpoints=5))
    with servers.environment(AWS_ENDPOINT_URL=ray_proxy.endpoint):
        train_by_processes(config, ray_proxy, PLAN, SEED)
    _assert_equal_trainings(config, *undisturbed)


@pytest.mark.ray
@pytest.mark.slow
def test_three_kills_under_ray_do_not_change_a_bit(
    store: str, undisturbed: tuple[str, list[dict[str, Any]]], ray_session: None, ray_proxy: Proxy
) -> None:
    config = config_of(arguments(store, "killed-under-ray", 2, checkpoints=5))
    with killing(ray_proxy, config, PLAN, seed=SEED):
        train(config)
    _assert_equal_trainings(config, *undisturbed)


def _assert_equal_trainings(config: AdmConfig, expected_hash: str, expected_rows: list[dict[str, Any]]) -> None:
    assert order_hash(consumed(config)) == order_hash(expected_rows)
    assert noise_hash(consumed(config)) == noise_hash(expected_rows)
    assert state_hash(config) == expected_hash


def test_order_noise_and_losses_are_the_same_for_every_number_of_workers(
    store: str, undisturbed: tuple[str, list[dict[str, Any]]]
) -> None:
    _, rows = undisturbed
    assert any(row["flip"] for row in rows) and not all(row["flip"] for row in rows)
    assert len({row["noise"] for row in rows}) == len(rows), "two rows share their noise"
    changes = {"reduction": "fast", "model.dropout": 0.0}  # fast: microbatches depend on the number of workers
    configs = [config_of(arguments(store, f"order-{w}", w, checkpoints=1, **changes)) for w in (1, 2, 4)]
    single = configs[0]
    train_plainly(single, 1, steps=3)  # the others start from its weights, so that all are equal
    for config in configs[1:]:
        _copy(single.path(single.output), config.path(config.output), ["config.json", "checkpoints/"])
    losses = []
    for config in configs:
        train_plainly(config, config.num_workers)
        last_step = consumed(config, first=3 * BATCH)
        assert order_hash(last_step) == order_hash(rows[3 * BATCH : 4 * BATCH])
        assert noise_hash(last_step) == noise_hash(rows[3 * BATCH : 4 * BATCH])
        losses.append([row["loss"] for row in last_step])
    np.testing.assert_allclose(losses[1:], [losses[0]] * 2, rtol=1e-6)
    assert order_hash(consumed(single)) == order_hash(rows[: 4 * BATCH])


def _copy(source: str, target: str, names: list[str]) -> None:
    for name in storage.list_names(source, recursive=True):
        if name.startswith(tuple(names)):
            storage.write_bytes(storage.join(target, name), storage.read_bytes(storage.join(source, name)))


@pytest.mark.slow
def test_a_second_driver_of_a_run_is_refused(store: str, undisturbed: tuple[str, list[dict[str, Any]]]) -> None:
    argv = arguments(store, "shared", 0, checkpoints=5)
    jobs = [start_job(argv) for _ in range(2)]
    outputs = {job.pid: job.communicate(timeout=300)[0] for job in jobs}
    trained, refused = sorted(jobs, key=lambda job: job.returncode)
    assert trained.returncode == 0, outputs[trained.pid][-3000:]
    assert refused.returncode == 1 and f"is being trained by pid {trained.pid}" in outputs[refused.pid]
    config = config_of(argv)
    expected_hash, rows = undisturbed
    assert state_hash(config) == expected_hash and order_hash(consumed(config)) == order_hash(rows)


def test_the_same_seed_gives_the_same_plan_of_kills() -> None:
    config = config_of(arguments("s3://nowhere", "plan", 2, checkpoints=30))
    plan = random_plan(config, 20, SEED, drivers=True)
    assert plan == random_plan(config, 20, SEED, drivers=True) != random_plan(config, 20, SEED + 1, drivers=True)
    assert {kill.phase for kill in plan[:5]} >= {"mid-step", "mid-upload", "between upload and commit"}
    assert plan[0].phase != "first step after a resume"
    assert [kill.position for kill in plan] == sorted({kill.position for kill in plan})
    with pytest.raises(ValueError, match="30 kills"):
        random_plan(config, 30, SEED, drivers=True)
