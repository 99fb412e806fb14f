"""What the tests of the model share."""

import jaxtyping
import pytest


@pytest.fixture
def unchecked():
    """No shape checks by jaxtyping: what a user sees."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
