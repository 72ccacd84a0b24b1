"""A fixture of all tests of datasets."""

import pytest

from orchestrator.data.dataset import Manifest
from orchestrator.data.job import prepare
from tests.orchestrator.digits import digits


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Return the manifest of the prepared digits, which tests must not change."""
    return prepare(digits(str(tmp_path_factory.mktemp("store"))))
