"""Plain training loops, to compare the trainer with."""

from torch.nn.functional import mse_loss
from toys import batches, linear, sgd, weights


def train_and_record_losses(data, epochs=1, lr=0.1):
    """Trains the linear model in a plain loop. Returns the losses and the model."""
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


def train_by_hand(model, data=None, optimizer=None, loss_fn=mse_loss):
    """Trains a model in a plain loop. Returns its weights."""
    optimizer = sgd(model) if optimizer is None else optimizer
    for x, y in batches() if data is None else data:
        optimizer.zero_grad()
        loss_fn(model(x), y).backward()
        optimizer.step()
    return weights(model)
