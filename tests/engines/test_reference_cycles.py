"""Trainers and evaluators are freed as soon as they go out of scope, without the cyclic garbage collector."""

import gc
import weakref
from contextlib import suppress

import pytest
import torch
from ignite.engine import Events
from ignite.metrics import Accuracy
from toys import batches, linear, sgd, trainer_of

import camshaft
from camshaft import CheckpointRotation, Evaluation, Phase, Trainer, create_evaluator, create_gan_trainer, create_trainer

mse = torch.nn.functional.mse_loss


@pytest.fixture(autouse=True)
def no_collector():
    trainer_of(amp="fp16")  # torch imports some modules lazily, and their first exceptions keep frames alive
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def assert_freed(make, use=lambda engine: engine.run(batches())):
    """Makes an engine, uses it, and checks that it is freed when the last reference is deleted."""
    engine = make()
    watched = [weakref.ref(engine), *(weakref.ref(phase.module) for phase in getattr(engine, "phases", {}).values())]
    use(engine)
    del engine
    assert [found for reference in watched if (found := reference()) is not None] == []


def make_gan():
    generator, critic = torch.nn.Linear(2, 3), torch.nn.Linear(3, 1)
    penalty = camshaft.GradientPenalty()
    return create_gan_trainer(generator, critic, sgd(generator), sgd(critic), latent=2, penalty=penalty)


def with_every_option():
    model = linear()
    optimizer = sgd(model)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    return create_trainer(
        model, optimizer, mse, amp="fp16", accumulation_steps=2, loss_weight="samples", clip_grad_norm=1.0, scheduler=schedule
    )


def custom_phases():
    model = linear()
    return Trainer([Phase("model", model, sgd(model), lambda engine, batch: model(batch[0]).mean())])


def run_and_fail(engine):
    def fail():
        raise RuntimeError("stop here")

    engine.add_event_handler(Events.ITERATION_COMPLETED(once=2), fail)
    with suppress(RuntimeError):  # pytest.raises would keep the traceback
        engine.run(batches())


def run_and_terminate(engine):
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=2), lambda trainer: trainer.terminate())
    engine.run(batches())


@pytest.mark.parametrize("make", [trainer_of, with_every_option, custom_phases])
@pytest.mark.parametrize(
    "use", [lambda engine: None, lambda engine: engine.run(batches(), max_epochs=2), run_and_fail, run_and_terminate]
)
def test_a_trainer_is_freed(make, use):
    assert_freed(make, use)


def test_a_gan_trainer_is_freed():
    assert_freed(make_gan, lambda trainer: trainer.run([torch.randn(4, 3)] * 3))


def test_a_trainer_with_filtered_handlers_is_freed():
    def use(trainer):
        trainer.add_event_handler(Events.ITERATION_COMPLETED(every=2), lambda engine: None)
        trainer.add_event_handler(camshaft.StepEvents.GRADIENTS_READY(phase="model", every=2), lambda engine: None)
        trainer.explain()
        trainer.run(batches())

    assert_freed(trainer_of, use)


def test_an_evaluator_is_freed():
    assert_freed(lambda: create_evaluator(linear(), metrics={}))


def test_a_trainer_with_an_evaluation_is_freed(tmp_path):
    def use(trainer):
        accuracy = Accuracy(lambda output: (output[0] > 0, output[1] > 0))
        evaluator = create_evaluator(trainer.primary.module, metrics={"accuracy": accuracy})
        Evaluation(evaluator, batches(1)).attach(trainer)
        trainer.run(batches(), max_epochs=2)

    assert_freed(trainer_of, use)


def test_a_trainer_is_freed_while_its_checkpoint_handler_is_in_use(tmp_path):
    kept = []

    def use(trainer):
        kept.append(CheckpointRotation(tmp_path).attach(trainer))
        trainer.run(batches())

    assert_freed(trainer_of, use)
    assert kept[0].last is not None


def test_a_resumed_trainer_is_freed(tmp_path):
    trainer = trainer_of()
    CheckpointRotation(tmp_path).attach(trainer)
    trainer.run(batches(), max_epochs=1)

    def use(resumed):
        CheckpointRotation(tmp_path).attach(resumed).resume("auto")
        resumed.run(batches(), max_epochs=2)

    assert_freed(trainer_of, use)


def test_a_handler_keeps_its_trainer_alive_until_the_first_run(tmp_path):
    rotation = CheckpointRotation(tmp_path).attach(trainer_of())
    assert rotation.resume("auto") is None
    rotation.engine.run(batches())
    assert rotation.engine is None
