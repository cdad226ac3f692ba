"""Fixtures for the tests of the loop."""

import pytest
from loop_engines import MAKERS


@pytest.fixture(params=MAKERS)
def engine(request):
    """Runs a test on the bare loop and on a trainer."""
    return MAKERS[request.param]()
