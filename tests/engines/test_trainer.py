"""`Trainer`: its clocks, stop reasons and skipped steps."""

import pytest
import torch
from ignite.engine import Events
from torch.nn.functional import mse_loss
from toys import batches, linear, model_of, same, sgd, trainer_of, weights
from training_loops import train_and_record_losses

from camshaft import (
    FreezeParameters,
    StepEvents,
    create_trainer,
)


def test_the_output_is_the_detached_loss():
    trainer, outputs = trainer_of(), []
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda e: outputs.append(e.state.output))
    trainer.run(batches(3))
    assert [float(output) for output in outputs] == train_and_record_losses(batches(3))[0]
    assert not any(output.requires_grad for output in outputs)


def test_the_trainer_equals_a_loop_written_by_hand():
    trainer = trainer_of()
    trainer.run(batches(3), max_epochs=2)
    assert same(weights(model_of(trainer)), weights(train_and_record_losses(batches(3), epochs=2)[1]))


def test_the_clocks_are_zero_before_the_first_run():
    state = trainer_of().state
    assert (state.iteration, state.epoch, state.optimizer_step, state.skipped_steps) == (0, 0, 0, 0)


def test_a_second_run_resets_the_clocks():
    trainer = trainer_of()
    trainer.run(batches(3))
    trainer.run(batches(2))
    assert (trainer.state.optimizer_step, trainer.state.iteration) == (2, 2)


def test_a_continued_run_keeps_the_clocks():
    trainer = trainer_of()
    trainer.run(batches(3), max_epochs=1)
    trainer.run(batches(3), max_epochs=3)
    assert (trainer.state.optimizer_step, trainer.state.epoch) == (9, 3)


def test_a_completed_run_has_no_stop_reason():
    trainer = trainer_of()
    trainer.run(batches(3))
    assert trainer.state.stop_reason is None


@pytest.mark.filterwarnings("ignore:Data iterator can not provide data")
def test_data_that_can_be_iterated_over_only_once_ends_the_run():
    trainer, epochs = trainer_of(), []
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda e: epochs.append(e.state.iteration))
    state = trainer.run((batch for batch in batches(3)), max_epochs=4)
    assert epochs == [3]
    assert state.stop_reason.startswith("the data ended after iteration 3: it can be iterated over only once")


def test_the_stop_reason_of_terminate_is_the_iteration_or_the_given_reason():
    plain, reasoned = trainer_of(), trainer_of()
    plain.add_event_handler(Events.ITERATION_COMPLETED(once=2), lambda e: e.terminate())
    reasoned.add_event_handler(Events.ITERATION_COMPLETED(once=2), lambda e: e.terminate(reason="lunch"))
    assert plain.run(batches(3)).stop_reason == "terminate() was called in epoch 1, iteration 2"
    assert reasoned.run(batches(3)).stop_reason == "lunch"


def test_the_first_stop_reason_is_kept_until_the_next_run():
    trainer = trainer_of()

    @trainer.on(Events.ITERATION_COMPLETED(once=2))
    def stop_once(engine):
        if not hasattr(engine, "stopped"):
            engine.stopped = True
            engine.terminate(reason="first")
            engine.terminate(reason="second")

    assert trainer.run(batches(3)).stop_reason == "first"
    assert trainer.run(batches(3)).stop_reason is None


def test_a_skipped_step_has_no_effect():
    trainer = trainer_of()
    skip = StepEvents.GRADIENTS_READY(lambda engine, _: engine.state.iteration == 2)
    trainer.add_event_handler(skip, lambda e: e.skip_step_if(torch.tensor(True)))
    trainer.run(batches(3))
    data = batches(3)
    assert same(weights(model_of(trainer)), weights(train_and_record_losses([data[0], data[2]])[1]))
    assert (trainer.state.optimizer_step, trainer.state.skipped_steps) == (2, 1)


def test_a_true_flag_skips_the_step_and_calls_its_function():
    trainer, called = trainer_of(), []

    @trainer.on(StepEvents.GRADIENTS_READY)
    def ask(engine):
        engine.skip_step_if(torch.tensor(False), lambda: called.append("false"))
        engine.skip_step_if(torch.tensor(engine.state.iteration == 1), lambda: called.append("true"))

    trainer.run(batches(2))
    assert called == ["true"]
    assert trainer.state.skipped_steps == 1


def test_a_step_can_be_skipped_because_of_its_gradient_norm():
    trainer = trainer_of(clip_grad_norm=1.0)
    trainer.add_event_handler(StepEvents.GRADIENTS_CLIPPED, lambda e: e.skip_step_if(e.state.grad_norm > 0))
    assert trainer.run(batches(3)).skipped_steps == 3


def test_the_autograd_graph_is_freed_after_each_iteration():
    trainer, alive = trainer_of(), []

    @trainer.on(Events.ITERATION_COMPLETED)
    def record(engine):
        state = engine.state
        alive.append([t.grad_fn for t in (state.loss, state.y_pred, state.output) if t.grad_fn is not None])

    trainer.run(batches(3))
    assert alive == [[], [], []]


def test_named_parts_of_the_loss_are_in_the_state():
    model = linear()

    def compute_loss(model, batch):
        x, y = batch
        loss = mse_loss(model(x), y)
        return {"loss": loss + 1, "fit": loss}

    trainer = create_trainer(model, sgd(model), None, compute_loss=compute_loss)
    state = trainer.run(batches(1))
    assert float(state.losses["fit"]) == train_and_record_losses(batches(1))[0][0]
    assert float(state.output) == pytest.approx(float(state.losses["fit"]) + 1)
    assert (state.x, state.y, state.y_pred) == (None, None, None)


def test_parameters_can_be_frozen_for_one_run():
    trainer = trainer_of()
    before = model_of(trainer).bias.detach().clone()
    with FreezeParameters("bias").attached(trainer):
        trainer.run(batches(3))
    assert torch.equal(model_of(trainer).bias, before)
    trainer.run(batches(3))
    assert not torch.equal(model_of(trainer).bias, before)
