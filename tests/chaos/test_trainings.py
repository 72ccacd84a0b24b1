"""Promises P1, P2, P3, P12 and P8 of a training whose workers are killed while storage fails, held by hashes."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from orchestrator import storage
from orchestrator.training import train
from tests import servers
from tests.chaos.evidence import consumed, noise_hash, order_hash, state_hash
from tests.chaos.killer import Kill, random_plan
from tests.chaos.plain import train_plainly
from tests.chaos.proxy import Proxy
from tests.chaos.trainings import CHECKPOINT, arguments, config_of, prepare_digits, train_here

SEED = 0


@pytest.fixture(scope="module")
def store(s3_server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A bucket that holds the digits."""
    folder = tmp_path_factory.mktemp("tracking")
    with servers.environment(MLFLOW_TRACKING_URI=f"sqlite:///{folder}/mlflow.db"):
        storage.make_bucket("s3://chaos-tests")
        prepare_digits("s3://chaos-tests")
        yield "s3://chaos-tests"


@pytest.fixture(scope="module")
def undisturbed(store: str) -> tuple[str, list[dict[str, Any]]]:
    """The state's hash at the end of a training that nothing befell, in this process, and what its steps consumed."""
    config = config_of(arguments(store, "undisturbed", 0, checkpoints=5))
    train(config)
    return state_hash(config), consumed(config)


@pytest.mark.ray
def test_three_kills_change_no_bit(
    store: str, undisturbed: tuple[str, list[dict[str, Any]]], ray_session: None, ray_proxy: Proxy
) -> None:
    config = config_of(arguments(store, "killed", 2, checkpoints=5))
    plan = [
        Kill("mid-upload", 2 * CHECKPOINT),
        Kill("first step after a resume", 3 * CHECKPOINT),
        Kill("between upload and commit", 4 * CHECKPOINT),
    ]
    account = train_here(config, ray_proxy, plan, SEED)
    print(f"seed {SEED}: {dict(account.kills)}")
    wanted, rows = undisturbed
    assert order_hash(consumed(config)) == order_hash(rows)
    assert noise_hash(consumed(config)) == noise_hash(rows)
    assert state_hash(config) == wanted


def test_order_and_noise_are_the_same_for_every_number_of_workers(
    store: str, undisturbed: tuple[str, list[dict[str, Any]]]
) -> None:
    _, rows = undisturbed
    assert any(row["flip"] for row in rows) and not all(row["flip"] for row in rows)
    assert len({row["noise"] for row in rows}) == len(rows), "every row has noise of its own"
    losses = []
    for workers in (1, 2, 4):  # a single step of reduction=fast: weights are equal, microbatches are not
        argv = arguments(store, f"order-{workers}", workers, checkpoints=1, reduction="fast", images=16)
        config = config_of(argv)
        train_plainly(config, workers)
        seen = consumed(config)
        assert order_hash(seen) == order_hash(rows[: len(seen)])
        assert noise_hash(seen) == noise_hash(rows[: len(seen)])
        losses.append([row["loss"] for row in seen])
    np.testing.assert_allclose(losses[1:], [losses[0]] * 2, rtol=1e-6)


def test_a_plan_of_kills_is_the_same_again() -> None:
    config = config_of(arguments("s3://nowhere", "plan", 2, checkpoints=30))
    plan = random_plan(config, 20, SEED, drivers=True)
    assert plan == random_plan(config, 20, SEED, drivers=True) != random_plan(config, 20, SEED + 1, drivers=True)
    assert {kill.phase for kill in plan[:5]} >= {"mid-step", "mid-upload", "between upload and commit"}
    assert plan[0].phase != "first step after a resume"
    assert [kill.position for kill in plan] == sorted({kill.position for kill in plan})
    with pytest.raises(ValueError, match="do not fit"):
        random_plan(config, 30, SEED, drivers=True)
