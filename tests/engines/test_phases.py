"""Custom phases: alternating schemes that use the same step as the supervised trainer."""

from __future__ import annotations

import pytest
import torch
from ignite.engine import Events
from torch import nn
from torch.nn.functional import mse_loss
from toys import batches, linear, same, sgd, trainer_of, weights
from training_loops import train_and_record_losses

from camshaft import (
    GradientAccumulation,
    GradientClipping,
    LRHistory,
    LRScheduling,
    MixedPrecision,
    Phase,
    StepEvents,
    Trainer,
)


def network() -> nn.Linear:
    return nn.Linear(2, 1)


def phase(name, module=None, objective=None, **settings):
    module = network() if module is None else module
    objective = objective or (lambda engine, batch: module(batch).square().mean())
    return Phase(name, module, torch.optim.SGD(module.parameters(), lr=0.1), objective, **settings)


def data(batches=6):
    return [torch.randn(4, 2) for _ in range(batches)]


def test_one_phase_equals_a_loop_written_by_hand():
    module, batches = network(), data()
    twin = network()
    twin.load_state_dict(module.state_dict())
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    for batch in batches:
        optimizer.zero_grad()
        twin(batch).square().mean().backward()
        optimizer.step()
    Trainer([phase("only", module)]).run(batches)
    assert torch.equal(module.weight, twin.weight)


def test_later_phases_run_at_their_intervals():
    trainer = Trainer([phase("lead"), phase("second", interval=2), phase("third", interval=3)])
    order = []
    trainer.add_event_handler(StepEvents.OPTIMIZER_STEP_COMPLETED, lambda engine: order.append(engine.state.phase))
    trainer.run(data(6))
    expected = ["lead"], ["lead", "second"], ["lead", "third"], ["lead", "second"], ["lead"], ["lead", "second", "third"]
    assert order == sum(expected, [])


def test_each_phase_has_its_own_settings():
    phases = [phase("lead"), phase("follower", interval=2)]
    trainer = Trainer(phases)
    MixedPrecision("bf16", phase="follower").attach(trainer)
    GradientAccumulation(3, phase="follower").attach(trainer)
    GradientClipping(1e-3, phase="lead").attach(trainer)
    schedule = torch.optim.lr_scheduler.StepLR(phases[1].optimizers[0], 1, gamma=0.5)
    LRScheduling(schedule).attach(trainer)
    norms = []
    trainer.add_event_handler(
        StepEvents.GRADIENTS_CLIPPED, lambda engine: norms.append((engine.state.phase, engine.state.grad_norm is None))
    )
    trainer.run(data(4))
    assert [p.forward_passes for p in phases] == [4, 6]
    assert [p.precision.dtype is None for p in phases] == [True, False]
    assert set(norms) == {("lead", False), ("follower", True)}
    assert trainer.learning_rates("follower") == [("follower/lr", 0.1 * 0.5**2)]


def test_the_step_clock_is_that_of_the_running_phase():
    trainer = Trainer([phase("lead"), phase("follower", interval=3)])
    seen = []
    trainer.add_event_handler(
        StepEvents.OPTIMIZER_STEP_STARTED, lambda engine: seen.append((engine.state.phase, engine.state.optimizer_step))
    )
    trainer.run(data(6))
    assert seen == [("lead", n) for n in (1, 2, 3)] + [("follower", 1)] + [("lead", n) for n in (4, 5, 6)] + [("follower", 2)]
    assert trainer.state.optimizer_step == 2


def test_a_skipped_step_does_not_count_towards_the_interval():
    trainer = Trainer([phase("lead"), phase("follower")])

    @trainer.on(StepEvents.GRADIENTS_READY(phase="lead", once=2))
    def skip(engine):
        if trainer.phases["lead"].skipped_steps == 0:
            engine.skip_step_if(torch.tensor(True))

    trainer.run(data(4))
    assert [p.optimizer_step for p in trainer.phases.values()] == [3, 3]
    assert [p.skipped_steps for p in trainer.phases.values()] == [1, 0]


@pytest.mark.parametrize("position", ["lead", "follower"])
def test_frozen_modules_get_no_gradient(position):
    other = network()
    other.bias.requires_grad_(False)
    own = network()

    def through(engine, batch):
        return other(own(batch).expand(-1, 2)).mean()

    frozen = phase(position, own, through, frozen=(other,))
    others = phase("lead", network()) if position == "follower" else phase("follower", network())
    Trainer([frozen, others] if position == "lead" else [others, frozen]).run(data(2))
    assert other.weight.grad is None
    assert own.weight.grad is not None
    assert [p.requires_grad for p in other.parameters()] == [True, False]


def test_frozen_modules_are_restored_after_an_exception():
    other = network()

    def fail(engine, batch):
        raise OSError("no more")

    with pytest.raises(OSError, match="no more"):
        Trainer([phase("lead"), phase("follower", network(), fail, frozen=(other,))]).run(data(1))
    assert all(p.requires_grad for p in other.parameters())


def test_the_state_has_the_named_losses_of_every_phase():
    module = network()

    def objective(engine, batch):
        loss = module(batch).square().mean()
        return {"loss": loss, "size": loss.sqrt()}

    trainer = Trainer([phase("lead"), phase("follower", module, objective, interval=2)], output=lambda e: dict(e.state.losses))
    outputs = []
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: outputs.append(engine.state.output))
    trainer.run(data(2))
    assert outputs[0] == {}
    assert list(outputs[1]) == ["size"]
    assert not outputs[1]["size"].requires_grad


def test_named_losses_are_restored_from_a_checkpoint():
    def make():
        module = network()
        follower = phase("follower", module, lambda engine, batch: {"loss": module(batch).mean(), "part": torch.tensor(3.0)})
        return Trainer([phase("lead"), follower])

    first, second = make(), make()
    first.run(data(2))
    second.restore(first.checkpoint())
    assert second.state.losses == {"part": torch.tensor(3.0)}


def test_later_phases_run_after_a_resume_at_the_end_of_data_of_unknown_length():
    class Stream:
        def __iter__(self):
            return iter([torch.full((4, 2), float(n)) for n in range(3)])

    def make():
        torch.manual_seed(0)
        seen = []
        follower = network()

        def objective(engine, batch):
            seen.append(batch[0, 0].item())
            return follower(batch).mean()

        trainer = Trainer([phase("lead"), phase("follower", follower, objective)])
        GradientAccumulation(2, phase="lead").attach(trainer)
        return trainer, seen

    stopped, _ = make()
    stopped.add_event_handler(StepEvents.BACKWARD_COMPLETED(phase="lead", once=3), lambda: stopped.terminate())
    stopped.run(Stream())
    resumed, seen = make()
    resumed.restore(stopped.checkpoint())
    resumed.run(Stream(), max_epochs=1)
    assert seen == [2.0]
    assert resumed.phases["follower"].optimizer_step == 2


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: phase("x", interval=0), ValueError, "interval must be a positive integer, got 0"),
        (lambda: Phase("x", 3, None, len), TypeError, "model of phase 'x' must be a torch.nn.Module, got int"),
        (lambda: phase("x", network(), 3), TypeError, "objective of phase 'x' must be callable, got int"),
        (lambda: Trainer([]), TypeError, "phases must be a sequence of at least one Phase"),
        (lambda: Trainer([phase("a"), phase("a")]), ValueError, "every phase needs a name of its own"),
    ],
)
def test_invalid_phases_raise(make, error, text):
    with pytest.raises(error, match=text):
        make()


def test_two_phases_with_the_same_parameters_raise():
    shared = network()
    with pytest.raises(ValueError, match="phases 'a' and 'b' hold the same parameters"):
        Trainer([phase("a", shared), phase("b", shared)])


@pytest.mark.parametrize("result", [None, 1.0, {"size": 2}, torch.ones(3, requires_grad=True), torch.tensor(1.0)], ids=str)
def test_a_loss_that_cannot_be_differentiated_names_the_phase_or_the_objective(result):
    def objective(engine, batch):
        return result

    with pytest.raises((TypeError, ValueError), match="phase 'follower'|objective.* returned a mapping without 'loss'"):
        Trainer([phase("lead"), phase("follower", network(), objective)]).run(data(1))


class Counted(torch.optim.SGD):
    """An optimizer that overrides ``zero_grad``."""

    zeroed = 0

    def zero_grad(self, set_to_none=True):
        self.zeroed += 1
        super().zero_grad(set_to_none)


def test_an_overridden_zero_grad_is_called():
    model = torch.nn.Linear(4, 2)
    optimizer = Counted(model.parameters(), lr=0.1)
    trainer = Trainer([Phase("model", model, optimizer, lambda engine, batch: model(batch).square().mean())])
    trainer.run([torch.ones(3, 4)] * 5)
    assert optimizer.zeroed == 5


def test_a_layer_added_later_gets_no_gradient_in_other_phases():
    body, critic = network(), nn.Sequential(nn.Linear(1, 1))
    lead = phase("critic", critic, lambda engine, x: critic(x[:, :1]).mean())
    trainer = Trainer([lead, phase("body", body, lambda engine, x: critic(body(x)).mean(), frozen=(critic,))])
    trainer.add_event_handler(Events.EPOCH_STARTED(once=2), lambda: critic.append(nn.Linear(1, 1)))
    trainer.add_event_handler(StepEvents.FORWARD_STARTED(phase="body"), lambda: critic.zero_grad())
    grads = []
    trainer.add_event_handler(StepEvents.BACKWARD_COMPLETED(phase="body"), lambda: grads.append(critic[-1].weight.grad))
    trainer.run([torch.ones(3, 2)] * 2, max_epochs=2)
    assert grads == [None] * 4


def two_phases(interval=1, **second_options):
    first, second = linear(), linear()

    def objective(model):
        return lambda engine, batch: mse_loss(model(batch[0]), batch[1])

    return Trainer(
        [
            Phase("first", first, sgd(first), objective(first)),
            Phase("second", second, sgd(second), objective(second), interval=interval, **second_options),
        ]
    )


def test_each_of_two_phases_equals_a_separate_loop():
    trainer = two_phases(interval=2)
    trainer.run(batches(5))
    data = batches(5)
    assert same(weights(trainer.phases["first"].module), weights(train_and_record_losses(data)[1]))
    assert same(weights(trainer.phases["second"].module), weights(train_and_record_losses([data[1], data[3]])[1]))
    assert trainer.phases["first"].optimizer_step == 5
    assert trainer.phases["second"].optimizer_step == trainer.state.optimizer_step == 2


def test_a_handler_of_one_phase_does_not_affect_the_other():
    trainer = two_phases()
    GradientClipping(1e-3, phase="first").attach(trainer)
    norms = {}
    trainer.add_event_handler(StepEvents.GRADIENTS_CLIPPED, lambda e: norms.update({e.state.phase: e.state.grad_norm}))
    trainer.run(batches(1))
    assert float(norms["first"]) > 1e-3
    assert norms["second"] is None


def test_the_learning_rates_of_two_phases_are_labelled_by_phase():
    trainer = two_phases(interval=2)
    history = LRHistory().attach(trainer)
    trainer.run(batches(4))
    assert {name: [step for step, _ in points] for name, points in history.history.items()} == {
        "first/lr": [1, 2, 3, 4],
        "second/lr": [1, 2],
    }


def test_accumulation_can_be_set_for_the_first_phase_alone():
    trainer = two_phases()
    GradientAccumulation(2, phase="first").attach(trainer)
    trainer.run(batches(4))
    assert [phase.optimizer_step for phase in trainer.phases.values()] == [2, 2]
    assert [phase.forward_passes for phase in trainer.phases.values()] == [4, 2]


def test_frozen_modules_require_gradients_again_after_the_phase():
    critic, generator = linear(), linear()
    seen = []

    def generator_loss(engine, batch):
        seen.append(critic.weight.requires_grad)
        return critic(generator(batch[0]).repeat(1, 2)[:, :3]).mean()

    phases = [
        Phase("critic", critic, sgd(critic), lambda engine, batch: mse_loss(critic(batch[0]), batch[1])),
        Phase("generator", generator, sgd(generator), generator_loss, frozen=[critic]),
    ]
    Trainer(phases).run(batches(2))
    assert seen == [False, False]
    assert critic.weight.requires_grad


def invalid_phases():
    model = linear()
    phase = Phase("a", model, sgd(model), lambda engine, batch: None)
    other = linear()
    return {
        "none": ([], TypeError, "at least one Phase"),
        "no phase": ([model], TypeError, "at least one Phase"),
        "one name": ([phase, Phase("a", other, sgd(other), print)], ValueError, r"name of its own, got \['a', 'a'\]"),
        "shared": ([phase, Phase("b", model, sgd(model), print)], ValueError, "'a' and 'b' hold the same parameters"),
    }


@pytest.mark.parametrize("name", invalid_phases())
def test_a_trainer_of_invalid_phases_raises(name):
    phases, error, text = invalid_phases()[name]
    with pytest.raises(error, match=text):
        Trainer(phases)


def test_a_handler_for_an_unknown_phase_raises():
    with pytest.raises(ValueError, match=r"phase must be one of \['model'\], got 'critic'"):
        GradientClipping(1.0, phase="critic").attach(trainer_of())
