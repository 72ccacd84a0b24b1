"""A fixture of all tests of trainings."""

import pytest

from orchestrator.data.job import prepare
from tests.orchestrator.digits import digits


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a store with the prepared digits."""
    folder = str(tmp_path_factory.mktemp("store"))
    prepare(digits(folder))
    return folder
