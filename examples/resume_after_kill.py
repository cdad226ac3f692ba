"""Trains, is killed with SIGKILL, resumes, and ends bit for bit like an uninterrupted run.

    python examples/resume_after_kill.py            # half a minute at most; --quick for a shorter run

Three runs of the same `train()`: an uninterrupted one, one in a separate process that kills itself in the middle of an epoch
and of an accumulation window, and one in a new process that runs the same command again.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from camshaft import Events, create_trainer, seed_everything
from camshaft.handlers import CheckpointRotation, LRHistory


def train(folder, epochs, kill_at=None):
    seed_everything(0)
    pixels, digits = load_digits(return_X_y=True)
    dataset = TensorDataset(torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(digits))
    loader = DataLoader(dataset, batch_size=32, shuffle=True)

    model = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Dropout(0.2), nn.Linear(64, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    steps = epochs * -(-len(loader) // 4)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=steps)
    trainer = create_trainer(model, optimizer, nn.CrossEntropyLoss(), accumulation_steps=4, scheduler=scheduler)
    LRHistory().attach(trainer)
    checkpoints = CheckpointRotation(folder, every=Events.ITERATION_COMPLETED(every=10)).attach(trainer)

    if kill_at is not None:

        @trainer.on(Events.ITERATION_STARTED(once=kill_at))
        def die():
            print(f"  iteration {kill_at}: kill -9", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)

    if checkpoints.resume("auto"):  # the only line that a script needs
        print(f"  resuming from {checkpoints.last.name}, iteration {trainer.state.iteration}")
    trainer.run(loader, max_epochs=epochs)
    print(f"  ended after iteration {trainer.state.iteration}, weights {fingerprint(model)}")
    return checkpoints.last


def fingerprint(model):
    """Eight hexadecimal digits that depend on every bit of every weight."""
    return f"{zlib.crc32(b''.join(tensor.numpy().tobytes() for tensor in model.state_dict().values())):08x}"


def train_in_another_process(*arguments):
    return subprocess.run([sys.executable, __file__, *map(str, arguments)]).returncode


def differences(one, other, name):
    """The names of the entries in which two checkpoints differ by at least one bit."""
    if isinstance(one, torch.Tensor):
        return [] if torch.equal(one, other) else [name]
    if isinstance(one, (dict, list, tuple)) and len(one) == len(other):
        keys = one if isinstance(one, dict) else range(len(one))
        return [found for key in keys for found in differences(one[key], other[key], f"{name}/{key}")]
    return [] if one == other else [name]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two epochs instead of six")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)  # for the runs in separate processes
    parser.add_argument("--kill-at", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)  # the same order of additions in every run
    epochs = 2 if options.quick else 6
    if options.child is not None:
        train(options.child, epochs, options.kill_at)
        return

    with tempfile.TemporaryDirectory() as folder:
        undisturbed, killed = Path(folder, "undisturbed"), Path(folder, "killed")
        command = ["--child", killed, *(["--quick"] if options.quick else [])]
        print("an uninterrupted run", flush=True)
        end = train(undisturbed, epochs)
        print("the same run, killed in the middle", flush=True)
        code = train_in_another_process(*command, "--kill-at", 57 * epochs // 2 + 12)
        assert code == -signal.SIGKILL, f"it was to be killed, and exited with {code}"
        print("the same command again", flush=True)
        assert train_in_another_process(*command) == 0

        one, other = (torch.load(path, weights_only=True) for path in (end, killed / end.name))
        found = [name for part in ("clocks", "phases", "handlers", "rng") for name in differences(one[part], other[part], part)]
        if found:
            sys.exit(f"the two runs differ in {', '.join(found)}")
        print("weights, optimizer, schedule, learning rates, random state and clocks: both runs are equal, bit for bit")


if __name__ == "__main__":
    main()
