"""Digits on one process or many: `torchrun --nproc_per_node=2 examples/ddp_mnist.py`; the same command resumes the run."""

import argparse
from pathlib import Path

import ignite.distributed as idist
import torch
from digits import load_digits
from ignite.metrics import Accuracy
from mnist import make_model
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler

from camshaft import Events, create_evaluator, create_trainer, save_weights, seed_everything
from camshaft.handlers import CheckpointRotation, Evaluation, Progress, StopOnSignal, TensorBoard


def loader_of(dataset, batch_size, shuffle=False):
    """A loader of this process's share of the data; every process gets the same number of batches."""
    sampler = DistributedSampler(dataset, idist.get_world_size(), idist.get_rank(), shuffle=shuffle)
    return DataLoader(dataset, batch_size, sampler=sampler)


def train(_, args):
    seed_everything(args.seed + idist.get_rank())  # different dropout masks per process; DDP copies the weights of rank 0
    train_set, val_set, _ = load_digits(limit=320 if args.quick else None)
    train_loader = loader_of(train_set, args.batch_size // idist.get_world_size(), shuffle=True)
    val_loader = loader_of(val_set, 250)

    model = idist.auto_model(make_model())  # on its device, and in DistributedDataParallel if there are several processes
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    trainer = create_trainer(model, optimizer, nn.CrossEntropyLoss(), accumulation_steps=2, clip_grad_norm=1.0)
    evaluator = create_evaluator(model, metrics={"accuracy": Accuracy()})

    # on every rank; only rank 0 writes
    Evaluation(evaluator, val_loader, prefix="val").attach(trainer)
    TensorBoard(args.out).attach(trainer)
    Progress(disable=args.quick).attach(trainer)
    StopOnSignal().attach(trainer)
    checkpoints = CheckpointRotation(args.out / "checkpoints", keep_last=2, every=Events.ITERATION_COMPLETED(every=20))
    checkpoints.attach(trainer)

    resumed = checkpoints.resume("auto")
    state = trainer.run(train_loader, max_epochs=args.epochs)
    if idist.get_rank() == 0:
        print("resumed from", resumed) if resumed else print("new run")
        accuracy = state.metrics["val/accuracy"]
        processes = "1 process" if idist.get_world_size() == 1 else f"{idist.get_world_size()} processes"
        print(f"{processes}, {state.optimizer_step} steps: val accuracy {accuracy:.2%}")
        save_weights(model, args.out / "weights.pt")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/ddp_mnist"), help="the folder to write to and to resume from")
    parser.add_argument("--quick", action="store_true", help="few images, as a quick check")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=64, help="total over all processes")
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    several = torch.distributed.is_torchelastic_launched()
    backend = ("nccl" if torch.cuda.is_available() else "gloo") if several else None
    with idist.Parallel(backend=backend) as parallel:
        parallel.run(train, args)


if __name__ == "__main__":
    main()
