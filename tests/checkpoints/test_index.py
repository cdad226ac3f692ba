"""Which checkpoints of a folder are kept."""

import pytest

from camshaft.checkpoints.index import Entry
from camshaft.checkpoints.retention import retained


@pytest.mark.parametrize(
    ("scores", "keep_last", "keep_best", "mode", "expected"),
    [
        ([1, 2, 3, 4], 2, 0, "max", [3, 4]),
        ([4, 3, 2, 1], 1, 1, "max", [1, 4]),
        ([4, 3, 2, 1], 1, 2, "max", [1, 2, 4]),
        ([4, 3, 2, 1], 1, 2, "min", [3, 4]),
        ([5, 5, 5, 1], 1, 1, "max", [1, 4]),
        ([5, 5, 5, 9], 1, 1, "min", [1, 4]),
        ([None, 3, None, None], 1, 2, "max", [2, 4]),
        ([0.0, None, -1.0, None], 1, 1, "max", [1, 4]),
        ([1], 3, 3, "max", [1]),
        ([], 3, 3, "max", []),
    ],
)
def test_the_last_and_the_best_checkpoints_are_kept_in_order(scores, keep_last, keep_best, mode, expected):
    entries = [Entry(f"step-{n:08d}.pt", n, n, 1, score) for n, score in enumerate(scores, start=1)]
    assert [entry.optimizer_step for entry in retained(entries, keep_last, keep_best, mode)] == expected
