"""Loaders that save their own position."""

from functools import partial

import pytest
from runs import NoisyDataset, make_small

from camshaft.testing import assert_resumes_exactly

pytestmark = [
    pytest.mark.filterwarnings("ignore:.set_vital. is deprecated"),
    pytest.mark.usefixtures("collected"),
]
stateful = pytest.importorskip("torchdata.stateful_dataloader")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_torchdata_loader(workers):
    data = partial(stateful.StatefulDataLoader, NoisyDataset(36, noise=False), batch_size=4, shuffle=True, num_workers=workers)
    assert_resumes_exactly(partial(make_small, data=data), stops=[5, 9, 10] if workers else [1, 5, 8, 9, 10, 17])
