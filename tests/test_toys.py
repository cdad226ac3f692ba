"""The shared test data is the same on every call."""

import torch
from toys import batches, data_parallel, linear, same, weights


def test_batches_and_models_are_the_same_on_every_call():
    assert same([t for pair in batches() for t in pair], [t for pair in batches() for t in pair])
    assert same(weights(linear()), weights(linear()))


def test_a_data_parallel_model_stays_on_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    model = data_parallel(linear())
    assert model.device_ids == []
    assert model.module.weight.device.type == "cpu"
