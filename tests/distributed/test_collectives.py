"""Actions of rank 0, whose results and errors every rank gets."""

import pytest


def test_every_rank_gets_the_result_of_an_action_of_rank_zero(results):
    first, second = results("actions_on_rank_zero")
    assert first["result"] == second["result"] == {"rank": 0}
    assert (first["ran on"], second["ran on"]) == ([0], [])


@pytest.mark.parametrize(
    ("kind", "own", "other"),
    [
        ("checkpoint", "CheckpointError: a.pt is damaged", "CheckpointError: a.pt is damaged"),
        ("os", "OSError: [Errno 28] No space left on device: 'a.pt'", "OSError: [Errno 28] No space left on device: 'a.pt'"),
        ("local", "LocalError: no a.pt", "FileNotFoundError: no a.pt"),
        ("arguments", "LocatedError: a word in line 3", "ValueError: a word in line 3"),
        ("no text", "ValueError: ", "ValueError: ValueError"),
    ],
)
def test_every_rank_raises_the_error_of_an_action_of_rank_zero(results, kind, own, other):
    first, second = results("actions_on_rank_zero")
    assert first[kind] == f"{own}, then 0"
    assert second[kind] == f"{other} (on rank 0), then 0"


def test_a_result_that_cannot_be_pickled_is_an_error_on_every_rank(results):
    first, second = results("actions_on_rank_zero")
    assert "pickle" in first["not picklable"]
    assert second["not picklable"] == f"{first['not picklable']} (on rank 0)"
