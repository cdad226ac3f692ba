"""Reads event files with TensorBoard's own reader, and computes the curves by hand."""

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from toys import linear, sgd

MSE = torch.nn.functional.mse_loss


def read(folder):
    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "histograms": 0, "tensors": 0})
    return accumulator.Reload()


def curve(folder, tag):
    """(step, value) of a scalar."""
    return [(event.step, event.value) for event in read(folder).Scalars(tag)]


def by_hand(data, lr=0.1):
    """The loss and gradient norm of each step of a hand-written loop."""
    model = linear()
    optimizer, losses, norms = sgd(model, lr), [], []
    for x, y in data:
        optimizer.zero_grad()
        loss = MSE(model(x), y)
        loss.backward()
        losses.append(float(loss.detach()))
        norms.append(float(torch.cat([p.grad.flatten() for p in model.parameters()]).norm()))
        optimizer.step()
    return losses, norms
