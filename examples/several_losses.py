"""One network with two tasks: it classifies a digit and reconstructs it from sixteen numbers. Each loss has its own curve.

    python examples/several_losses.py      # half a minute on a CPU; --quick for a shorter run

`compute_loss` returns a mapping. There is one backward pass, for "loss"; all other entries are logged by name. No
`retain_graph`, no second `backward()`, no `.item()`.
"""

import argparse
from pathlib import Path

import torch
from digits import load_digits, picture
from ignite.metrics import Accuracy, MeanSquaredError
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from torch.utils.data import DataLoader

from camshaft import Events, create_evaluator, create_trainer, seed_everything
from camshaft.handlers import CheckpointRotation, Evaluation, TensorBoard


class TwoTasks(nn.Module):
    def __init__(self, code=16):
        super().__init__()
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, code))
        self.classifier = nn.Sequential(nn.ReLU(), nn.Linear(code, 10))
        self.decoder = nn.Sequential(nn.ReLU(), nn.Linear(code, 256), nn.ReLU(), nn.Linear(256, 784))

    def forward(self, images):
        code = self.encoder(images)
        return {"scores": self.classifier(code), "drawing": self.decoder(code).reshape(images.shape)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/several_losses"))
    parser.add_argument("--drawing", type=float, default=3.0, help="the weight of the reconstruction loss")
    parser.add_argument("--quick", action="store_true", help="few images and three epochs")
    args = parser.parse_args()
    seed_everything(0)
    torch.set_num_threads(1)

    train_set, val_set, _ = load_digits(limit=1000 if args.quick else None)
    model = TwoTasks()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)

    def compute_loss(model, batch):
        images, digits = batch
        y_pred = model(images)
        named = cross_entropy(y_pred["scores"], digits)
        drawn = binary_cross_entropy_with_logits(y_pred["drawing"], images)
        return {"loss": named + args.drawing * drawn, "classification": named, "reconstruction": drawn}

    trainer = create_trainer(model, optimizer, None, compute_loss=compute_loss, clip_grad_norm=5.0)

    def both_tasks(x, y, y_pred, loss=None):
        return {"digit": (y_pred["scores"], y), "image": (y_pred["drawing"].sigmoid().flatten(1), x.flatten(1))}

    metrics = {
        "accuracy": Accuracy(output_transform=lambda output: output["digit"]),
        "squared error": MeanSquaredError(output_transform=lambda output: output["image"]),
    }
    evaluator = create_evaluator(model, metrics=metrics, output_transform=both_tasks)

    @torch.inference_mode()
    def drawings(engine):
        """The digits in the first row, and their reconstructions in the second."""
        images = val_set.tensors[0][:8]
        y_pred = model(images)
        names = [str(digit) for digit in y_pred["scores"].argmax(1).tolist()]
        return {"val/drawings": picture(torch.cat([images, y_pred["drawing"].sigmoid()]), ["" for _ in names] + names)}

    Evaluation(evaluator, DataLoader(val_set, 250)).attach(trainer)
    TensorBoard(args.out, images=drawings, hparams={"drawing": args.drawing}).attach(trainer)
    CheckpointRotation(args.out / "checkpoints", keep_last=1, keep_best=1, metric="val/accuracy").attach(trainer)

    @trainer.on(Events.EPOCH_COMPLETED)
    def report(engine):
        losses = "  ".join(f"{name} {loss:.3f}" for name, loss in engine.state.losses.items())
        print(f"epoch {engine.state.epoch:2}  {losses}  val accuracy {engine.state.metrics['val/accuracy']:.1%}")

    trainer.run(DataLoader(train_set, 64, shuffle=True), max_epochs=3 if args.quick else 15)
    print(f"a curve for each loss, and the drawings: tensorboard --logdir {args.out.parent}")


if __name__ == "__main__":
    main()
