"""Optimizer states from a file hold what the optimizer's step reads, or are refused before anything changes."""

import copy

import pytest
import torch
from torch import optim

from camshaft import CheckpointError
from camshaft.checkpoints.optimizer_checks import NEEDED_STATES, check_optimizers


class _Phase:
    def __init__(self, optimizer):
        self.optimizers = (optimizer,)


def stepped(name, **settings):
    """An optimizer that has made a step, and its state."""
    model = torch.nn.Linear(3, 2)
    optimizer = getattr(optim, name)(model.parameters(), lr=0.1, **settings)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return optimizer, optimizer.state_dict()


def check(optimizer, state):
    check_optimizers({"model": _Phase(optimizer)}, {"phases": {"model": {"optimizers": [state]}}})


DENSE = sorted(NEEDED_STATES.keys() - {"SparseAdam"})


@pytest.mark.parametrize("name", DENSE)
def test_the_state_after_a_step_is_accepted(name):
    optimizer, state = stepped(name)
    assert set(NEEDED_STATES[name]) == set(state["state"][0])
    check(optimizer, state)


@pytest.mark.parametrize(("name", "key"), [(name, key) for name in DENSE for key in NEEDED_STATES[name]])
def test_a_state_without_what_the_step_reads_is_refused(name, key):
    optimizer, state = stepped(name)
    state = copy.deepcopy(state)
    del state["state"][1][key]
    with pytest.raises(CheckpointError, match=rf"optimizers\[0\].state\[1\] lacks '{key}', which {name} needs"):
        check(optimizer, state)


@pytest.mark.parametrize(
    ("name", "setting", "key"), [("Adam", "amsgrad", "max_exp_avg_sq"), ("RMSprop", "centered", "grad_avg")]
)
def test_a_setting_that_is_switched_on_needs_its_state(name, setting, key):
    check(*stepped(name, **{setting: True}))
    optimizer, state = stepped(name)
    state["param_groups"][0][setting] = True
    with pytest.raises(CheckpointError, match=f"lacks '{key}'"):
        check(optimizer, state)


def test_an_empty_state_is_filled_by_the_first_step():
    optimizer, state = stepped("Adam")
    check(optimizer, state | {"state": {0: {}}})
