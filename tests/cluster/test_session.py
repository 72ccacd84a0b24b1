"""The session: every worker has the driver's environment, and nobody else can read its secrets."""

import os

import pytest

from cluster.session import receive_secrets


def seen_by_a_worker(names: list[str]) -> dict[str, str | None]:
    import ray

    def look() -> dict[str, str | None]:
        receive_secrets()
        return {name: os.environ.get(name) for name in names}

    return ray.get(ray.remote(look).remote())


@pytest.mark.ray
def test_workers_have_the_drivers_credentials(ray_session: None) -> None:
    names = ["AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "AWS_ENDPOINT_URL", "AWS_DEFAULT_REGION"]
    assert seen_by_a_worker(names) == {name: os.environ[name] for name in names}


@pytest.mark.ray
def test_no_secret_is_in_the_runtime_environment(ray_session: None) -> None:
    import ray

    shown = ray.get_runtime_context().get_runtime_env_string()
    assert os.environ["AWS_SECRET_ACCESS_KEY"] not in shown
    assert os.environ["AWS_ENDPOINT_URL"] in shown, "what is no secret is there"
