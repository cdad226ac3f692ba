"""Learning rates of parameter groups."""

from collections import OrderedDict

import torch

from camshaft.optimizers import group_rates


def two_layers():
    return torch.nn.Sequential(OrderedDict(encoder=torch.nn.Linear(3, 2), head=torch.nn.Linear(2, 1)))


def test_learning_rates_are_labelled_by_group_name_or_index():
    model = two_layers()
    one = torch.optim.SGD(model.parameters(), lr=0.5)
    groups = [{"params": model.encoder.parameters(), "name": "body", "lr": 1}, {"params": model.head.parameters()}]
    two = torch.optim.SGD(groups, lr=torch.tensor(0.25))
    assert group_rates([one]) == [("lr", 0.5)]
    assert group_rates([two]) == [("lr/body", 1.0), ("lr/1", 0.25)]
