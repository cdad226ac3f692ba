"""The engines that the tests of the loop run on."""

import pytest
from loop_engines import MAKERS


@pytest.fixture(params=MAKERS)
def engine(request):
    """The bare loop, and then a trainer."""
    return MAKERS[request.param]()
