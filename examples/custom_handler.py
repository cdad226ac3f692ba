"""A handler of one's own: one class over several events, whose state survives a resume.

    python examples/custom_handler.py      # some seconds; --quick for a shorter run

Four of the images come from a broken scanner, and a batch with one of them throws the network far away. `SpikeGuard` knows
how long the gradient usually is and refuses the steps in which it is many times longer. What it knows travels in checkpoints.
"""

import argparse
from pathlib import Path

import torch
from ignite.metrics import Accuracy
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from camshaft import Events, Handler, StepEvents, create_evaluator, create_trainer, on, seed_everything
from camshaft.handlers import CheckpointRotation, TensorBoard


class SpikeGuard(Handler):
    """Refuses a step whose gradient is many times longer than usual.

    Args:
        factor: how many times.
        memory: how much of what was usual stays with each step.
    """

    saved = ("usual", "refused")  # these attributes are in every checkpoint; nothing else is to be written

    def __init__(self, factor=8.0, memory=0.95):
        self.factor, self.memory = factor, memory
        self.usual = None  # a tensor on the device: nothing here waits for it
        self.refused = []  # iterations

    @on(StepEvents.GRADIENTS_CLIPPED)
    def judge(self, engine):
        norm = engine.state.grad_norm  # before clipping
        limit = norm if self.usual is None else self.factor * self.usual
        engine.skip_step_if(norm > limit)
        norm = torch.minimum(norm, limit)
        self.usual = norm if self.usual is None else torch.lerp(norm, self.usual, self.memory)

    @on(StepEvents.OPTIMIZER_STEP_SKIPPED)
    def note(self, engine):
        self.refused.append(engine.state.iteration)

    @on(Events.EPOCH_COMPLETED(every=2) | Events.COMPLETED)
    def report(self, engine):
        engine.state.metrics["guard/refused"] = len(self.refused)  # TensorBoard writes it, early stopping could judge it


def digits(broken=4):
    pixels, names = load_digits(return_X_y=True)
    images, names = torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(names)
    test, train = TensorDataset(images[:400], names[:400]), TensorDataset(images[400:].clone(), names[400:])
    noise = torch.randn(broken, 64, generator=torch.Generator().manual_seed(0))
    train.tensors[0][torch.arange(broken) * len(train) // broken] = 1000 * noise
    return train, test


def train(folder, epochs, guard=None, stop_after=None):
    """Trains, or goes on where a run in this folder was stopped; gives the network."""
    seed_everything(0)
    train_set, _ = digits()
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    trainer = create_trainer(model, optimizer, nn.CrossEntropyLoss(), clip_grad_norm=100.0)
    TensorBoard(folder).attach(trainer)
    checkpoints = CheckpointRotation(folder / "checkpoints", keep_last=1).attach(trainer)
    if guard is not None:
        guard.attach(trainer)
    if stop_after is not None:
        trainer.add_event_handler(Events.ITERATION_COMPLETED(once=stop_after), trainer.terminate)
    checkpoints.resume("auto")
    trainer.run(DataLoader(train_set, 32, shuffle=True), max_epochs=epochs)
    return model


def accuracy_of(model):
    evaluator = create_evaluator(model, metrics={"accuracy": Accuracy()})
    return evaluator.run(DataLoader(digits()[1], 200)).metrics["accuracy"]


def told(guard):
    return f"{len(guard.refused)} steps refused, those of the iterations {', '.join(map(str, guard.refused[:5]))}, ..."


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/custom_handler"))
    parser.add_argument("--quick", action="store_true", help="three epochs instead of ten")
    args = parser.parse_args()
    torch.set_num_threads(1)
    epochs = 3 if args.quick else 10

    print(f"without the guard: test accuracy {accuracy_of(train(args.out / 'without', epochs)):.1%}")

    guard = SpikeGuard()
    model = train(args.out / "with", epochs, guard)
    print(f"with it:           test accuracy {accuracy_of(model):.1%}; {told(guard)}")

    train(args.out / "stopped", epochs, SpikeGuard(), stop_after=70)
    resumed = SpikeGuard()  # knows nothing, until the checkpoint tells it
    twin = train(args.out / "stopped", epochs, resumed)
    print(f"stopped, resumed:  test accuracy {accuracy_of(twin):.1%}; {told(resumed)}")
    assert torch.equal(resumed.usual, guard.usual), "the resumed guard should know what the other one knows"
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), twin.parameters(), strict=True))
    print("both end with the same weights, bit for bit")


if __name__ == "__main__":
    main()
