"""Training loops written by hand, for comparison."""

from torch.nn.functional import mse_loss
from toys import batches, linear, sgd, weights


def hand_losses(data, epochs=1, lr=0.1):
    """The losses of a loop written by hand over the linear model, and the model afterwards."""
    model = linear()
    optimizer = sgd(model, lr)
    losses = []
    for _ in range(epochs):
        for x, y in data:
            optimizer.zero_grad()
            loss = mse_loss(model(x), y)
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    return losses, model


def by_hand(model, data=None, optimizer=None, loss_fn=mse_loss):
    """The loop without anything."""
    optimizer = sgd(model) if optimizer is None else optimizer
    for x, y in batches() if data is None else data:
        optimizer.zero_grad()
        loss_fn(model(x), y).backward()
        optimizer.step()
    return weights(model)
