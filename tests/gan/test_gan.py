"""`create_gan_trainer`: losses, output, batches, conditions and handlers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from toy_gan import FORMULAS, SAMPLES, data, make, module

from camshaft import (
    R1,
    R2,
    Events,
    GradientPenalty,
    NonFiniteGuard,
    TensorBoard,
    create_gan_trainer,
)


@pytest.mark.parametrize("loss", FORMULAS)
def test_losses_equal_their_formulas(loss):
    latents, batches = torch.randn(SAMPLES, 3), data(1)
    trainer = make(loss=loss, latent=lambda n, device: latents)
    generator, critic = module(trainer, "generator"), module(trainer, "discriminator")
    trainer.phases["discriminator"].optimizers[0].param_groups[0]["lr"] = 0.0  # keeps the critic as it is for the generator
    with torch.no_grad():
        real, fake = critic(batches[0]), critic(generator(latents))
    output = trainer.run(batches).output
    torch.testing.assert_close(output["discriminator_loss"], FORMULAS[loss][0](real, fake))
    torch.testing.assert_close(output["generator_loss"], FORMULAS[loss][1](fake))


def test_a_custom_pair_of_losses_receives_the_scores():
    pair = FORMULAS["hinge"]
    torch.manual_seed(1)
    expected = make(loss="hinge").run(data(2)).output
    torch.manual_seed(1)
    assert make(loss=pair).run(data(2)).output == expected


def test_the_output_is_detached_and_complete():
    trainer = make(discriminator_steps=2)
    outputs = []
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: outputs.append(engine.state.output))
    trainer.run(data(3))
    assert [list(output) for output in outputs] == [["discriminator_loss", "penalty", "generator_loss"]] * 3
    assert [output["generator_loss"] is None for output in outputs] == [True, False, False]
    assert outputs[1]["generator_loss"] is outputs[2]["generator_loss"]
    assert not any(value.requires_grad for output in outputs for value in output.values() if value is not None)
    assert all(output["penalty"] == 0 for output in outputs)


def test_a_second_run_starts_without_a_generator_loss():
    trainer = make(discriminator_steps=2)
    trainer.run(data(2))
    trainer.state.iteration = trainer.state.epoch = 0
    trainer.state.max_epochs = None
    assert trainer.run(data(1)).output["generator_loss"] is None


def test_penalties_are_summed_and_lazy_ones_apply_every_kth_step():
    critic = nn.Linear(2, 1)
    critic.weight.data = torch.tensor([[3.0, 4.0]])
    trainer = make(critic=critic, penalty=[R1(2.0, every=3), R2(4.0, every=2)])
    trainer.phases["discriminator"].optimizers[0].param_groups[0]["lr"] = 0.0
    penalties = []
    trainer.add_event_handler(
        Events.ITERATION_COMPLETED, lambda engine: penalties.append(engine.state.output["penalty"].item())
    )
    trainer.run(data(6))
    r1, r2 = 3 * 2 / 2 * 25, 2 * 4 / 2 * 25
    assert penalties == pytest.approx([0, r2, r1, r2, 0, r1 + r2])


def test_a_lazy_penalty_applies_to_all_batches_of_its_window():
    trainer = make(penalty=R1(every=2), accumulation_steps=2)
    due = []
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: due.append(engine.state.output["penalty"].item() > 0))
    trainer.run(data(6))
    assert due == [False, False, True, True, False, False]


def test_a_penalty_can_be_a_function():
    trainer = make(penalty=lambda critic, real, fake: critic[0].weight.square().sum())
    weight = module(trainer, "discriminator")[0].weight
    expected = weight.square().sum().item()
    assert trainer.run(data(1)).output["penalty"].item() == pytest.approx(expected)


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: [x], lambda x: (x,), lambda x: (x, torch.zeros(len(x)))])
def test_batches_may_be_x_or_a_sequence_that_starts_with_x(wrap):
    trainer, batches = make(), data(2)
    trainer.run([wrap(x) for x in batches])
    assert trainer.state.x is batches[-1]


def test_prepare_batch_may_return_x_alone():
    trainer = make(prepare_batch=lambda batch, device, non_blocking: batch["image"].to(device))
    assert trainer.run([{"image": x} for x in data(2)]).optimizer_step == 2


class Conditional(nn.Module):
    def __init__(self, size, out):
        super().__init__()
        self.embed, self.last, self.seen = nn.Embedding(4, 3), nn.Linear(size + 3, out), []

    def forward(self, x, y):
        self.seen.append(y)
        return self.last(torch.cat([x, self.embed(y)], dim=1))


def test_conditions_are_passed_to_both_networks_and_the_penalty():
    generator, critic = Conditional(3, 2), Conditional(2, 1)
    labels = torch.randint(4, (SAMPLES,))
    make(generator, critic, conditional=True, penalty=GradientPenalty()).run([(data(1)[0], labels)])
    assert len(generator.seen) == 2
    assert len(critic.seen) == 4
    assert all(torch.equal(y, labels) for y in generator.seen + critic.seen)
    assert critic.embed.weight.grad is not None


@pytest.mark.parametrize("latent", [np.int64(3), (np.int32(3),), [3]])
def test_integers_of_numpy_are_integers(latent):
    trainer = make(latent=latent, discriminator_steps=np.int64(2), penalty=R1(every=np.int64(2)))
    trainer.run(data(4))
    assert trainer.phases["generator"].optimizer_step == 2


def test_latents_of_a_given_size_are_normal_in_the_dtype_of_the_generator():
    seen = []
    generator = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).double()
    generator.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    make(generator, nn.Linear(2, 1).double(), latent=(2, 2)).run([torch.randn(SAMPLES, 2, dtype=torch.float64)])
    assert seen[0].shape == (SAMPLES, 2, 2)
    assert seen[0].dtype == torch.float64
    assert len(seen) == 2
    assert not torch.equal(*seen)


def test_the_last_batch_may_have_one_sample():
    trainer = make(nn.Linear(3, 2), nn.Linear(2, 1), penalty=GradientPenalty())
    assert trainer.run([torch.randn(4, 2), torch.randn(1, 2)]).optimizer_step == 2


@pytest.mark.parametrize("shape", [(), (3, 4), (1, 4, 4), (1, 2, 2, 2)], ids=str)
def test_samples_may_have_any_number_of_dimensions(shape):
    size = torch.Size(shape).numel()
    generator = nn.Sequential(nn.Linear(3, size), nn.Unflatten(1, shape) if shape else nn.Flatten(0))
    critic = (
        nn.Sequential(nn.Flatten(), nn.Linear(size, 1)) if shape else nn.Sequential(nn.Unflatten(0, (-1, 1)), nn.Linear(1, 1))
    )
    trainer = make(generator, critic, penalty=[GradientPenalty(), R1()])
    assert trainer.run([torch.randn(SAMPLES, *shape)] * 2).optimizer_step == 2


def test_tensorboard_shows_the_losses_of_both_networks(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = make(discriminator_steps=2, penalty=GradientPenalty(), clip_grad_norm=1.0)
    TensorBoard(tmp_path, every=1).attach(trainer)
    trainer.run(data(6))
    curves = EventAccumulator(str(tmp_path)).Reload()
    names = {"discriminator_loss", "penalty", "generator_loss", "grad_norm", "discriminator/lr", "generator/lr"}
    assert {f"train/{name}" for name in names} <= set(curves.Tags()["scalars"])
    assert [point.step for point in curves.Scalars("train/generator_loss")] == [1, 2, 3]


def test_explain_names_both_networks():
    text = make(discriminator_steps=5, penalty=GradientPenalty()).explain()
    assert "discriminator: Sequential" in text
    assert "generator: Linear on cpu, SGD, after every 5 steps of discriminator" in text


def test_non_finite_guard_names_the_network_and_the_iteration():
    trainer, batches = make(), data(4)
    NonFiniteGuard().attach(trainer)
    batches[2] = torch.full((SAMPLES, 2), float("nan"))
    before = {}
    trainer.add_event_handler(
        Events.ITERATION_STARTED(once=3),
        lambda: before.update({k: v.clone() for k, v in module(trainer, "discriminator").state_dict().items()}),
    )
    with pytest.raises(FloatingPointError, match="loss of iteration 3 is nan, .* of phase 'discriminator'"):
        trainer.run(batches)
    assert all(torch.equal(before[name], value) for name, value in module(trainer, "discriminator").state_dict().items())


def test_non_finite_guard_names_the_generator():
    trainer = make(loss=(FORMULAS["wgan"][0], lambda f: f.mean() * float("inf")))
    NonFiniteGuard().attach(trainer)
    with pytest.raises(FloatingPointError, match="iteration 1 is .*inf, .* of phase 'generator'"):
        trainer.run(data(1))


def test_a_gan_learns_all_eight_modes_of_a_ring():
    torch.manual_seed(0)
    angles = torch.arange(8) * torch.pi / 4
    modes = torch.stack([angles.cos(), angles.sin()], dim=1)
    generator = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
    critic = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))
    optimizers = [torch.optim.Adam(network.parameters(), lr=1e-3, betas=(0.0, 0.9)) for network in (generator, critic)]
    penalty = GradientPenalty(weight=1.0)
    trainer = create_gan_trainer(generator, critic, *optimizers, latent=4, penalty=penalty, discriminator_steps=3)
    batches = [modes[torch.randint(8, (128,))] + 0.05 * torch.randn(128, 2) for _ in range(300)]
    trainer.run(batches, max_epochs=6)
    with torch.no_grad():
        distances = torch.cdist(generator(torch.randn(2000, 4)), modes)
    near = distances.min(dim=1)
    found = near.indices[near.values < 0.25].bincount(minlength=8)
    assert (found > 2000 / 8 / 4).all(), found
