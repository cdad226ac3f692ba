"""The turns and clocks of a GAN's two networks."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from toy_gan import SAMPLES, data, make, module

from camshaft import (
    R1,
    Events,
    FreezeParameters,
    GradientPenalty,
    StepEvents,
)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_both_networks_have_their_own_clocks(k):
    trainer = make(discriminator_steps=k)
    seen = []
    trainer.add_event_handler(
        StepEvents.OPTIMIZER_STEP_COMPLETED, lambda engine: seen.append((engine.state.phase, engine.state.optimizer_step))
    )
    trainer.run(data(4), max_epochs=2)
    expected = []
    for step in range(1, 9):
        expected.append(("discriminator", step))
        expected += [("generator", step // k)] if step % k == 0 else []
    assert seen == expected
    assert trainer.state.optimizer_step == trainer.phases["generator"].optimizer_step == 8 // k


def test_event_filters_by_phase_count_on_the_clock_of_the_network():
    trainer = make(discriminator_steps=3, accumulation_steps=2)
    seen = []
    for phase in ("discriminator", "generator"):
        for event in (StepEvents.FORWARD_STARTED, StepEvents.GRADIENTS_READY):
            trainer.add_event_handler(
                event(phase=phase, every=2), lambda e, n: seen.append((e.state.iteration, *n)), (phase, event.name)
            )
    trainer.run(data(12))
    passes = [(i, "discriminator", "FORWARD_STARTED") for i in range(2, 13, 2)]
    passes += [(i, "generator", "FORWARD_STARTED") for i in (6, 12)]
    steps = [(i, "discriminator", "GRADIENTS_READY") for i in (4, 8, 12)] + [(12, "generator", "GRADIENTS_READY")]
    assert sorted(seen) == sorted(passes + steps)


def test_the_other_network_gets_no_gradient():
    trainer = make(penalty=GradientPenalty())
    networks = {name: phase.module for name, phase in trainer.phases.items()}

    @trainer.on(StepEvents.FORWARD_STARTED)
    def clear_gradients(engine):
        for network in networks.values():
            network.zero_grad()

    @trainer.on(StepEvents.GRADIENTS_READY)
    def check(engine):
        for name, network in networks.items():
            has_gradient = [p.grad is not None for p in network.parameters()]
            assert all(has_gradient) if name == engine.state.phase else not any(has_gradient)

    trainer.run(data(3))


def test_requires_grad_is_restored_after_an_exception():
    critic = nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 1))
    critic[0].bias.requires_grad_(False)
    trainer = make(critic=critic)

    @trainer.on(StepEvents.FORWARD_COMPLETED(phase="generator"))
    def fail(engine):
        assert not any(p.requires_grad for p in critic.parameters())
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="the disk is full"):
        trainer.run(data(1))
    assert [p.requires_grad for p in critic.parameters()] == [True, False, True, True]


def test_a_trainer_can_run_again_after_an_exception_inside_a_cycle():
    trainer = make(discriminator_steps=2, accumulation_steps=2)
    failures = [OSError("once")]

    @trainer.on(StepEvents.BACKWARD_COMPLETED(phase="generator"))
    def fail(engine):
        if failures:
            raise failures.pop()

    with pytest.raises(OSError, match="once"):
        trainer.run(data(4))
    before = trainer.phases["generator"].optimizer_step
    trainer.run(data(4), max_epochs=trainer.state.epoch + 1)
    assert trainer.phases["generator"].optimizer_step > before


def test_both_networks_train_even_if_a_handler_leaves_one_in_eval_mode():
    generator = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    trainer = make(generator, discriminator_steps=2)
    modes = []
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: generator.eval())
    trainer.add_event_handler(StepEvents.FORWARD_COMPLETED, lambda: modes.append(generator.training))
    trainer.run(data(4))
    assert modes == [True] * 6
    assert generator[1].num_batches_tracked == 6


def test_the_state_has_the_real_and_the_generated_batch_at_each_event():
    trainer, batches = make(), data(1)
    seen = {}

    @trainer.on(StepEvents.BACKWARD_COMPLETED)
    def check(engine):
        seen[engine.state.phase] = engine.state.x, engine.state.y_pred

    trainer.run(batches)
    for real, fake in seen.values():
        assert real is batches[0]
        assert fake.shape == real.shape
        assert not fake.requires_grad
    assert not torch.equal(seen["discriminator"][1], seen["generator"][1])


def test_a_handler_may_change_the_loss_of_one_network():
    trainer = make(discriminator_steps=2)
    before = module(trainer, "generator").weight.clone()

    @trainer.on(StepEvents.FORWARD_COMPLETED(phase="generator"))
    def zero_loss(engine):
        engine.state.loss = engine.state.loss * 0

    trainer.run(data(4))
    assert torch.equal(module(trainer, "generator").weight, before)


def test_the_generator_runs_after_a_partial_window():
    trainer = make(accumulation_steps=4, discriminator_steps=2)
    trainer.run(data(6), max_epochs=2)
    assert trainer.phases["discriminator"].optimizer_step == 4
    assert trainer.phases["generator"].optimizer_step == 2
    assert trainer.phases["generator"].forward_passes == 8


def test_the_last_window_of_data_of_unknown_length_is_closed():
    class Stream:
        def __iter__(self):
            return iter([torch.ones(SAMPLES, 2)] * 5)

    trainer = make(accumulation_steps=2)
    trainer.run(Stream())
    assert [phase.optimizer_step for phase in trainer.phases.values()] == [3, 3]


def test_parameters_frozen_by_a_handler_stay_frozen():
    trainer = make()
    FreezeParameters("0.*", phase="discriminator").attach(trainer)
    before = module(trainer, "discriminator")[0].weight.clone()
    trainer.run(data(3))
    assert torch.equal(module(trainer, "discriminator")[0].weight, before)
    assert not module(trainer, "discriminator")[0].weight.requires_grad


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_the_penalty_is_computed_in_full_precision_under_amp(amp):
    (real,) = batches = data(1)
    critic = nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 1))
    expected = R1()(critic, real, real).item()
    trainer = make(critic=critic, penalty=R1(), amp=amp)
    output = trainer.run(batches).output
    assert output["penalty"].item() == pytest.approx(expected, rel=1e-6)
    assert output["penalty"].dtype == output["discriminator_loss"].dtype == torch.float32


def test_each_network_has_its_own_fp16_scaler():
    trainer = make(amp="fp16", penalty=GradientPenalty())
    scalers = [phase.precision.scaler for phase in trainer.phases.values()]
    assert None not in scalers
    assert scalers[0] is not scalers[1]
    trainer.run(data(12))
    assert all(phase.optimizer_step > 6 for phase in trainer.phases.values())
    assert trainer.primary.optimizer_step + trainer.primary.skipped_steps == 12


def test_the_generator_does_not_run_after_a_step_that_the_scaler_skips():
    trainer = make(amp="fp16")
    for phase in trainer.phases.values():
        phase.precision.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)

    @trainer.on(StepEvents.FORWARD_COMPLETED(phase="discriminator", once=2))
    def overflow(engine):
        engine.state.loss = engine.state.loss * float("inf")

    trainer.run(data(4))
    assert [phase.optimizer_step for phase in trainer.phases.values()] == [3, 3]
    assert [phase.skipped_steps for phase in trainer.phases.values()] == [1, 0]
