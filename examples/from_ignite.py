"""An Ignite script, and the same script converted: five lines differ, and the numbers are the same.

    python examples/from_ignite.py      # a few seconds; --quick for a shorter run

Both train from the same seed. The script prints the lines that differ, and checks that each weight is equal.
"""

import argparse
import difflib
import inspect
from pathlib import Path

import torch
from ignite.engine import Events, create_supervised_evaluator, create_supervised_trainer
from ignite.handlers import Checkpoint
from ignite.metrics import Accuracy, Loss, RunningAverage
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

from camshaft import CheckpointRotation, Evaluation, create_evaluator, create_trainer, seed_everything


def with_ignite(folder, epochs):
    model, optimizer, scheduler, loss_fn, train_loader, val_loader = setting()
    trainer = create_supervised_trainer(model, optimizer, loss_fn)
    evaluator = create_supervised_evaluator(model, metrics={"accuracy": Accuracy(), "loss": Loss(loss_fn)})
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: scheduler.step())
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda engine: evaluator.run(val_loader))
    RunningAverage(output_transform=lambda loss: loss).attach(trainer, "train loss")
    to_save = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "trainer": trainer}
    trainer.add_event_handler(Events.EPOCH_COMPLETED, Checkpoint(to_save, folder, n_saved=3))
    losses = []

    @trainer.on(Events.EPOCH_COMPLETED)
    def report(engine):
        metrics = engine.state.metrics | evaluator.state.metrics
        losses.append(metrics["loss"])
        print(f"epoch {engine.state.epoch:2}  train loss {metrics['train loss']:.4f}  val accuracy {metrics['accuracy']:.2%}")

    trainer.run(train_loader, max_epochs=epochs)
    return model, losses


def with_camshaft(folder, epochs):
    model, optimizer, scheduler, loss_fn, train_loader, val_loader = setting()
    trainer = create_trainer(model, optimizer, loss_fn, scheduler=scheduler)
    evaluator = create_evaluator(model, metrics={"accuracy": Accuracy(), "loss": Loss(loss_fn)})
    Evaluation(evaluator, val_loader).attach(trainer)
    RunningAverage(output_transform=lambda loss: loss).attach(trainer, "train loss")
    checkpoints = CheckpointRotation(folder, keep_last=3).attach(trainer)
    losses = []

    @trainer.on(Events.EPOCH_COMPLETED)
    def report(engine):
        metrics = engine.state.metrics | evaluator.state.metrics
        losses.append(metrics["loss"])
        print(f"epoch {engine.state.epoch:2}  train loss {metrics['train loss']:.4f}  val accuracy {metrics['accuracy']:.2%}")

    checkpoints.resume("auto")
    trainer.run(train_loader, max_epochs=epochs)
    return model, losses


def setting():
    seed_everything(0)
    pixels, digits = load_digits(return_X_y=True)
    dataset = TensorDataset(torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(digits))
    train_set, val_set = random_split(dataset, [0.8, 0.2])
    order = torch.Generator().manual_seed(0)  # otherwise Ignite's evaluation would use the random numbers of the training
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.995)
    train_loader = DataLoader(train_set, 32, shuffle=True, generator=order)
    return model, optimizer, scheduler, nn.CrossEntropyLoss(), train_loader, DataLoader(val_set, 360)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/from_ignite"))
    parser.add_argument("--quick", action="store_true", help="three epochs instead of ten")
    args = parser.parse_args()
    torch.set_num_threads(1)
    epochs = 3 if args.quick else 10

    folder = args.out / str(len(list(args.out.glob("*"))) + 1)  # a new one, or a second run would resume the first

    print("Ignite")
    theirs, their_losses = with_ignite(folder / "ignite", epochs)
    print("\ncamshaft")
    ours, our_losses = with_camshaft(folder / "camshaft", epochs)

    one, other = (inspect.getsource(function).splitlines() for function in (with_ignite, with_camshaft))
    changed = [line for line in difflib.ndiff(one[1:], other[1:]) if line[0] in "+-"]
    print("", *changed, "", sep="\n")
    print(f"{sum(line[0] == '+' for line in changed)} lines in place of {sum(line[0] == '-' for line in changed)}")
    assert their_losses == our_losses, (their_losses, our_losses)
    assert all(torch.equal(a, b) for a, b in zip(theirs.parameters(), ours.parameters(), strict=True))
    print("every validation loss and every weight is the same, bit for bit")


if __name__ == "__main__":
    main()
