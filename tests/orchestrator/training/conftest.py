"""Shared by the tests of trainings: a store that holds the digits."""

import pytest

from orchestrator.data.job import prepare
from tests.orchestrator.digits import digits


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("store"))
    prepare(digits(folder))
    return folder
