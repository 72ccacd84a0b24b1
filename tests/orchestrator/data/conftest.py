"""What the tests of datasets share."""

import pytest

from orchestrator.data.dataset import Manifest
from orchestrator.data.job import prepare
from tests.orchestrator.digits import digits


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """The scanned digits; tests must not change them."""
    return prepare(digits(str(tmp_path_factory.mktemp("store"))))
