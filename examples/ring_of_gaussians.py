"""A small GAN learns the eight modes of a ring of Gaussians, and plots its progress: python examples/ring_of_gaussians.py"""

import argparse
from pathlib import Path

import torch
from torch import nn

from camshaft import Events, GradientPenalty, create_gan_trainer, seed_everything
from camshaft.handlers import ExponentialMovingAverage

MODES, LATENT, STD = 8, 4, 0.05


def ring():
    angles = 2 * torch.pi * torch.arange(MODES) / MODES
    return torch.stack([angles.cos(), angles.sin()], dim=1)


def draw_real(count):
    return ring()[torch.randint(MODES, (count,))] + STD * torch.randn(count, 2)


def make_network(inputs, outputs, width=64):
    return nn.Sequential(
        *(nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()),
        nn.Linear(width, outputs),
    )


def modes_found(samples):
    """The number of modes with at least a quarter of their expected samples within three standard deviations."""
    nearest = torch.cdist(samples, ring()).min(dim=1)
    counts = nearest.indices[nearest.values < 3 * STD].bincount(minlength=MODES)
    return int((counts > len(samples) / MODES / 4).sum())


def plot(snapshots, path):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.6 * len(snapshots), 2.9), layout="constrained")
    for axes, (step, samples) in zip(figure.subplots(1, len(snapshots), squeeze=False).flat, snapshots, strict=True):
        axes.scatter(*draw_real(1000).T, s=2, color="lightgray", label="real")
        axes.scatter(*samples.T, s=2, color="tab:blue", label="generated")
        axes.set(title=f"step {step}: {modes_found(samples)} of {MODES}", xlim=(-1.6, 1.6), ylim=(-1.6, 1.6), aspect="equal")
        axes.set(xticks=[], yticks=[])
    figure.savefig(path, dpi=130)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/ring"), help="the output folder")
    parser.add_argument("--quick", action="store_true", help="few steps, as a quick check")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main():
    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    seed_everything(args.seed)

    generator, critic = make_network(LATENT, 2), make_network(2, 1)
    optimizers = [torch.optim.Adam(network.parameters(), lr=1e-3, betas=(0.0, 0.9)) for network in (generator, critic)]
    trainer = create_gan_trainer(
        generator, critic, *optimizers, latent=LATENT, loss="wgan", penalty=GradientPenalty(weight=1.0), discriminator_steps=3
    )
    average = ExponentialMovingAverage(0.99).attach(trainer)
    latents, snapshots = torch.randn(1000, LATENT), []

    @trainer.on(Events.EPOCH_COMPLETED)
    def look(engine):
        with torch.no_grad():
            snapshots.append((engine.state.optimizer_step, average.module(latents)))
        estimate = -engine.state.output["discriminator_loss"]
        print(
            f"generator step {snapshots[-1][0]:5}  {modes_found(snapshots[-1][1])} modes  Wasserstein estimate {estimate:.3f}"
        )

    epochs, length = (2, 15) if args.quick else (6, 900)
    trainer.run([draw_real(128) for _ in range(length)], max_epochs=epochs)

    plot(snapshots, args.out / "ring.png")
    print(f"the generator's samples over time: {args.out / 'ring.png'}")


if __name__ == "__main__":
    main()
