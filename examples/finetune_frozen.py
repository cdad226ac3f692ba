"""Learns the digits 5 to 9 from twenty images each, on top of an encoder that has seen only 0 to 4.

    python examples/finetune_frozen.py      # a few seconds; --quick for a shorter run

The encoder is frozen while the new head learns. Later it is unfrozen and trained with a smaller learning rate than the head.
"""

import argparse
from pathlib import Path

import torch
from digits import load_digits
from ignite.metrics import Accuracy
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from camshaft import (
    Events,
    count_parameters,
    create_evaluator,
    create_trainer,
    freeze,
    load_weights,
    save_weights,
    seed_everything,
    unfreeze,
)
from camshaft.handlers import Evaluation, FreezeParameters, TensorBoard


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(
            *(nn.Conv2d(1, 16, kernel_size=5, stride=2, padding=2), nn.ReLU()),
            *(nn.Conv2d(16, 32, kernel_size=3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        )
        self.head = nn.Linear(32 * 7 * 7, 5)

    def forward(self, x):
        return self.head(self.encoder(x))


def subset(dataset, wanted, of_each=None):
    """The images of five digits, numbered from 0; at most ``of_each`` of each."""
    images, digits = dataset.tensors
    chosen = torch.cat([(digits == digit).nonzero()[:of_each, 0] for digit in wanted])
    return TensorDataset(images[chosen], digits[chosen] - min(wanted))


def accuracy_of(model, dataset):
    return create_evaluator(model, metrics={"accuracy": Accuracy()}).run(DataLoader(dataset, 250)).metrics["accuracy"]


def pretrain(dataset, epochs, path):
    """Learns the other five digits, and writes the encoder's weights."""
    model = Network()
    trainer = create_trainer(model, torch.optim.AdamW(model.parameters(), lr=3e-3), nn.CrossEntropyLoss())
    trainer.run(DataLoader(dataset, 64, shuffle=True), max_epochs=epochs)
    return save_weights(model.encoder, path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/finetune_frozen"))
    parser.add_argument("--thaw", type=int, default=6, help="the first epoch in which the encoder trains")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="fewer images to learn from at first, and fewer epochs")
    args = parser.parse_args()
    if args.quick:
        args.thaw, args.epochs = 3, 4
    seed_everything(0)
    torch.set_num_threads(1)

    train_set, _, test_set = load_digits(limit=1500 if args.quick else None)
    old, new, test = subset(train_set, range(5)), subset(train_set, range(5, 10), of_each=20), subset(test_set, range(5, 10))
    encoder = pretrain(old, 3 if args.quick else 5, args.out / "encoder.pt")

    model = Network()
    load_weights(model.encoder, encoder)
    print(f"{count_parameters(model).total:,} parameters; before: {accuracy_of(model, test):.1%} of the new digits right")

    freeze(model, "encoder.0.*")  # the edge detectors of the first layer are useful for all digits: frozen until unfreeze()
    encoder_group = {"params": model.encoder.parameters(), "lr": 5e-4, "name": "encoder"}
    head_group = {"params": model.head.parameters(), "lr": 5e-3, "name": "head"}
    optimizer = torch.optim.AdamW([encoder_group, head_group])
    trainer = create_trainer(model, optimizer, nn.CrossEntropyLoss())
    FreezeParameters("encoder.*", until_epoch=args.thaw).attach(trainer)
    evaluator = create_evaluator(model, metrics={"accuracy": Accuracy()})
    Evaluation(evaluator, DataLoader(test, 250), prefix="test").attach(trainer)
    TensorBoard(args.out, every=1).attach(trainer)

    @trainer.on(Events.EPOCH_COMPLETED)
    def report(engine):
        count = count_parameters(model).trainable
        print(f"epoch {engine.state.epoch:2}  {count:6,} trained  test accuracy {engine.state.metrics['test/accuracy']:.1%}")

    loader = DataLoader(new, 20, shuffle=True)
    trainer.run(loader, max_epochs=args.epochs)
    unfreeze(model, "encoder.0.*")  # by hand, between two runs
    trainer.run(loader, max_epochs=args.epochs + 2)

    path = save_weights(model, args.out / "finetuned.pt")
    fresh = Network()
    load_weights(fresh, path)
    print(f"\n{path}, loaded into a new network: {accuracy_of(fresh, test):.1%} right")
    print(f"both learning rates: tensorboard --logdir {args.out.parent}, train/lr/encoder and train/lr/head")


if __name__ == "__main__":
    main()
