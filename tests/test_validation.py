"""The checks of arguments: what they accept, what they return, and the texts of their errors."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from camshaft.validation import as_integer, check_choice, check_count, check_non_negative, check_optional_count, check_positive


@pytest.mark.parametrize("value", [3, np.int64(3), np.uint8(3), torch.tensor(3)])
def test_check_count_returns_pythons_integer(value):
    assert type(check_count(value, "steps")) is int
    assert check_count(value, "steps") == check_optional_count(value, "steps") == as_integer(value) == 3


@pytest.mark.parametrize("value", [0, -1, True, np.True_, 2.0, np.float32(2), "2", None, [2], torch.tensor(2.5)])
def test_check_count_refuses_anything_else(value):
    with pytest.raises(ValueError, match=r"^steps must be a positive integer, got "):
        check_count(value, "steps")


def test_check_count_has_another_minimum():
    assert check_count(0, "keep_last", minimum=0) == 0
    with pytest.raises(ValueError, match="keep_last must be an integer of at least 2, got 1"):
        check_count(1, "keep_last", minimum=2)


def test_check_optional_count_allows_none():
    assert check_optional_count(None, "max_epochs") is None


@pytest.mark.parametrize("value", [2, 2.0, np.float32(2), np.int64(2)])
def test_numbers_are_returned_as_floats(value):
    assert [type(check(value, "hours")) for check in (check_positive, check_non_negative)] == [float, float]
    assert check_positive(value, "hours") == check_non_negative(value, "hours") == 2.0


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), True, "1", None, 1j])
def test_check_positive_refuses_anything_else(value):
    with pytest.raises(ValueError, match=r"^hours must be a positive number, got "):
        check_positive(value, "hours")


@pytest.mark.parametrize("value", [-1e-9, float("nan"), float("inf"), False, "1", None])
def test_check_non_negative_refuses_anything_else(value):
    with pytest.raises(ValueError, match=r"^min_delta must be a finite number of at least 0, got "):
        check_non_negative(value, "min_delta")


@pytest.mark.parametrize("value", ["all", None, 1, ["min"]])
def test_check_choice_names_every_choice(value):
    check_choice("last", "which", ("first", "best", "last"))
    with pytest.raises(ValueError, match=r"^which must be 'first', 'best' or 'last', got "):
        check_choice(value, "which", ("first", "best", "last"))
