"""A custom handler: one class with methods on several events, whose state survives a resume.

    python examples/custom_handler.py      # takes a few seconds; --quick for a shorter run

Four of the images come from a broken scanner, and one step on such an image ruins the weights. `SpikeGuard` keeps a running
average of the gradient norm, and skips the steps whose norm is many times larger. Its state is saved in every checkpoint.
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
    """Skips an optimizer step whose gradient norm is many times larger than usual.

    Args:
        factor: the limit, as a multiple of the usual norm.
        memory: the decay rate of the running average that is the usual norm.
    """

    saved = ("usual", "skipped")  # these attributes are saved in every checkpoint; no other code is needed

    def __init__(self, factor=8.0, memory=0.95):
        self.factor, self.memory = factor, memory
        self.usual = None  # a tensor on the device, so that nothing here waits for it
        self.skipped = []  # the iterations of skipped steps

    @on(StepEvents.GRADIENTS_CLIPPED)
    def judge(self, engine):
        norm = engine.state.grad_norm  # before clipping
        limit = norm if self.usual is None else self.factor * self.usual
        engine.skip_step_if(norm > limit)
        norm = torch.minimum(norm, limit)
        self.usual = norm if self.usual is None else torch.lerp(norm, self.usual, self.memory)

    @on(StepEvents.OPTIMIZER_STEP_SKIPPED)
    def note(self, engine):
        self.skipped.append(engine.state.iteration)

    @on(Events.EPOCH_COMPLETED(every=2) | Events.COMPLETED)
    def report(self, engine):
        engine.state.metrics["guard/skipped"] = len(self.skipped)  # TensorBoard writes it; EarlyStopping could use it


def digits(broken=4):
    pixels, names = load_digits(return_X_y=True)
    images, names = torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(names)
    test, train = TensorDataset(images[:400], names[:400]), TensorDataset(images[400:].clone(), names[400:])
    noise = torch.randn(broken, 64, generator=torch.Generator().manual_seed(0))
    train.tensors[0][torch.arange(broken) * len(train) // broken] = 1000 * noise
    return train, test


def train(folder, epochs, guard=None, stop_after=None):
    """Trains, or continues the run in this folder if there is one; returns the network."""
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


def summary(guard):
    return f"{len(guard.skipped)} steps skipped, in the iterations {', '.join(map(str, guard.skipped[:5]))}, ..."


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
    print(f"with it:           test accuracy {accuracy_of(model):.1%}; {summary(guard)}")

    train(args.out / "stopped", epochs, SpikeGuard(), stop_after=70)
    resumed = SpikeGuard()  # gets its state from the checkpoint
    resumed_model = train(args.out / "stopped", epochs, resumed)
    print(f"stopped, resumed:  test accuracy {accuracy_of(resumed_model):.1%}; {summary(resumed)}")
    assert torch.equal(resumed.usual, guard.usual), "the resumed guard should have the same state"
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), resumed_model.parameters(), strict=True))
    print("both runs end with the same weights, bit for bit")


if __name__ == "__main__":
    main()
