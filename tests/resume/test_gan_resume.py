"""A GAN that is stopped after any iteration and resumed gives the same result as an uninterrupted run, bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from camshaft import (
    R1,
    CheckpointRotation,
    Events,
    ExponentialMovingAverage,
    GradientPenalty,
    LRHistory,
    create_gan_trainer,
    seed_everything,
)

ITERATIONS = 14


def make_run(folder, **settings):
    """Makes a run of two epochs of 7 batches, with three critic steps per generator step."""
    seed_everything(1)
    generator = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2))
    critic = nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Dropout(0.2), nn.Linear(6, 1))
    optimizers = [torch.optim.Adam(network.parameters(), lr=1e-2, betas=(0.0, 0.9)) for network in (generator, critic)]
    schedulers = [torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.9) for optimizer in optimizers]
    trainer = create_gan_trainer(
        generator,
        critic,
        *optimizers,
        latent=3,
        penalty=[GradientPenalty(), R1(every=4)],
        discriminator_steps=3,
        clip_grad_norm=1.0,
        generator_scheduler=schedulers[0],
        discriminator_scheduler=schedulers[1],
        **settings,
    )
    LRHistory().attach(trainer)
    ExponentialMovingAverage(0.8).attach(trainer)
    checkpoints = CheckpointRotation(folder, keep_last=2).attach(trainer)
    data = TensorDataset(torch.randn(30, 2, generator=torch.Generator().manual_seed(5)))
    loader = DataLoader(data, batch_size=4, shuffle=True, drop_last=True)
    return trainer, checkpoints, lambda: trainer.run(loader, max_epochs=2)


def full_state(trainer):
    """The content of a checkpoint without the position in the data, and the last output."""
    content = trainer.checkpoint()
    return {name: content[name] for name in ("clocks", "phases", "handlers", "losses", "rng")} | {
        "output": trainer.state.output
    }


def differences(one, other, where=""):
    if isinstance(one, dict):
        assert list(one) == list(other), where
        return [name for key in one for name in differences(one[key], other[key], f"{where}/{key}")]
    if isinstance(one, (list, tuple)):
        assert len(one) == len(other), where
        return [name for n, (a, b) in enumerate(zip(one, other, strict=True)) for name in differences(a, b, f"{where}/{n}")]
    same = torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
    return [] if same else [where]


@pytest.mark.parametrize("settings", [{}, {"accumulation_steps": 2}, {"amp": "bf16"}], ids=["plain", "accumulation", "bf16"])
@pytest.mark.parametrize("stop", range(1, ITERATIONS))
def test_a_gan_resumed_after_any_iteration_is_bit_identical(tmp_path, stop, settings):
    uninterrupted, _, run = make_run(tmp_path / "uninterrupted", **settings)
    run()
    stopped, _, run = make_run(tmp_path / "stopped", **settings)
    stopped.add_event_handler(Events.ITERATION_COMPLETED(once=stop), stopped.terminate)
    run()
    assert stopped.state.iteration == stop
    resumed, checkpoints, run = make_run(tmp_path / "stopped", **settings)
    torch.manual_seed(99)
    assert checkpoints.resume("auto") is not None
    run()
    assert resumed.state.iteration == ITERATIONS
    assert differences(full_state(uninterrupted), full_state(resumed)) == []


def test_the_generator_loss_is_restored_inside_a_cycle(tmp_path):
    outputs = []
    stopped, _, run = make_run(tmp_path)
    stopped.add_event_handler(Events.ITERATION_COMPLETED(once=4), stopped.terminate)
    run()
    resumed, checkpoints, run = make_run(tmp_path)
    resumed.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: outputs.append(engine.state.output))
    checkpoints.resume("auto")
    run()
    assert torch.equal(outputs[0]["generator_loss"], stopped.state.output["generator_loss"])


def test_file_names_contain_the_step_of_the_discriminator(tmp_path):
    trainer, checkpoints, run = make_run(tmp_path)
    run()
    assert checkpoints.last.name == f"step-{ITERATIONS:08d}.pt"
    assert trainer.state.optimizer_step == ITERATIONS // 3
