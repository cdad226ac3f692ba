"""How `explain(speed=True)` measures the effect of a setting."""

import pytest
import torch

from camshaft.reports.timing import MAX_ROUNDS, MIN_ROUNDS, Speedup, measured, paired

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("quartiles", "worth"),
    [((1.2, 1.5, 1.9), True), ((0.9, 1.5, 1.9), False), ((1.01, 1.02, 1.03), False), ((0.4, 0.5, 0.6), False)],
)
def test_a_speedup_within_the_noise_is_not_worth_it(quartiles, worth):
    assert Speedup(*quartiles, before=2e-4, after=1e-4).is_worth_it is worth


def test_a_speedup_as_text():
    text = str(Speedup(1.5, 2.0, 2.25, before=2e-4, after=1e-4))
    assert text == "measured 2.00 times as fast (quartiles 1.50 to 2.25), 200 us becomes 100 us"


def test_both_functions_are_called_equally_often_in_random_order():
    calls = []
    paired(lambda: calls.append("yours"), lambda: calls.append("other"), CPU)
    pairs = [tuple(calls[at : at + 2]) for at in range(0, len(calls), 2)]
    assert MIN_ROUNDS + 2 <= len(pairs) <= MAX_ROUNDS + 2
    assert set(pairs[2:]) == {("yours", "other"), ("other", "yours")}


def test_a_failed_measurement_is_reported_in_one_line():
    def fail():
        raise RuntimeError("the first line\nthe second line")

    assert measured(fail) == "not measured: RuntimeError: the first line"
