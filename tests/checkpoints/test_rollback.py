"""Loading a checkpoint is all or nothing: after an error the trainer is as it was, and can still be trained."""

import pytest
import torch
from toys import batches, linear, model_of, same, sgd, trainer_of, weights

from camshaft import Events, ExponentialMovingAverage, Handler, LRHistory, StepEvents, create_trainer


class Fails(Handler):
    """A handler whose state can't be restored."""

    def state_dict(self):
        return {"steps": 1}

    def load_state_dict(self, state):
        raise KeyError("steps")


class Brittle(torch.optim.Adam):
    """An optimizer that fails after it has loaded."""

    is_brittle = False

    def load_state_dict(self, state):
        super().load_state_dict(state)
        if self.is_brittle:
            raise TypeError("half loaded")


class Stubborn(torch.nn.Linear):
    """A module that fails after it has loaded."""

    is_stubborn = False

    def _load_from_state_dict(self, *args):
        super()._load_from_state_dict(*args)
        if self.is_stubborn:
            self.is_stubborn = False
            raise RuntimeError("half loaded")


def trained(model, optimizer, epochs=1):
    trainer = create_trainer(model, optimizer, torch.nn.functional.mse_loss, amp="fp16", accumulation_steps=2)
    LRHistory().attach(trainer)
    ExponentialMovingAverage(0.5).attach(trainer)
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=3 * epochs - 1), lambda engine: engine.terminate())
    trainer.run(batches(3), max_epochs=epochs)
    return trainer


def everything(trainer):
    content = trainer.checkpoint()
    content.pop("rng")
    return content


def assert_same(found, expected):
    if isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected)
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        for key in expected:
            assert_same(found[key], expected[key])
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    else:
        assert found == expected


def copied(value):
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: copied(item) for key, item in value.items()}
    return type(value)(copied(item) for item in value) if isinstance(value, (list, tuple)) else value


def adam(model):
    return Brittle(model.parameters(), lr=0.1)


def a_handler_fails(trainer):
    Fails().attach(trainer)


def an_optimizer_fails(trainer):
    trainer.primary.optimizers[0].is_brittle = True


def a_module_fails(trainer):
    trainer.primary.module.is_stubborn = True


@pytest.mark.parametrize("breaks", [a_handler_fails, an_optimizer_fails, a_module_fails])
@pytest.mark.parametrize("has_run", [False, True])
def test_a_load_that_fails_changes_nothing(breaks, has_run):
    torch.manual_seed(0)
    other = Stubborn(3, 2)
    source = trained(other, adam(other), epochs=2)
    Fails().attach(source)
    content = copied(source.checkpoint())
    model = Stubborn(3, 2)
    if has_run:
        trainer = trained(model, adam(model))
    else:
        trainer = create_trainer(model, adam(model), torch.nn.functional.mse_loss, amp="fp16", accumulation_steps=2)
        LRHistory().attach(trainer)
        ExponentialMovingAverage(0.5).attach(trainer)
    breaks(trainer)
    if breaks is not a_handler_fails:
        content["handlers"].pop("Fails")
    before, status = copied(everything(trainer)), trainer.run_state.status
    with pytest.raises((KeyError, TypeError, RuntimeError)):
        trainer.restore(content)
    assert trainer.run_state.status is status
    assert_same(everything(trainer), before)


def test_a_trainer_trains_on_after_a_load_that_failed():
    plain, trainer = trainer_of(linear()), trainer_of(linear())
    source = trainer_of(linear())
    source.run(batches(3))
    Fails().attach(source)
    content = source.checkpoint()
    handler = Fails().attach(trainer)
    with pytest.raises(KeyError):
        trainer.restore(content)
    handler.detach()
    plain.run(batches(3))
    trainer.run(batches(3))
    assert same(weights(model_of(trainer)), weights(model_of(plain)))


def test_the_format_is_checked_before_anything_changes():
    trainer = trainer_of()
    before = weights(model_of(trainer))
    with pytest.raises(ValueError, match="format 1: format 7"):
        trainer.restore({"format": 7})
    assert same(weights(model_of(trainer)), before)


def test_a_schedule_still_belongs_to_its_optimizer_after_a_load_that_failed():
    model = linear()
    optimizer = sgd(model)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    trainer = trainer_of(model, optimizer, scheduler=schedule)
    group = optimizer.param_groups[0]
    source = trainer_of(linear(), scheduler=None)
    source.run(batches(2))
    Fails().attach(source)
    Fails().attach(trainer)
    with pytest.raises(KeyError):
        trainer.restore(source.checkpoint())
    assert optimizer.param_groups[0] is group


@pytest.mark.parametrize("amp", [None, "fp16"])
def test_nothing_of_a_step_that_failed_is_left_after_a_restore(amp):
    def fail(engine):
        engine.skip_step_if(torch.tensor(True))
        raise RuntimeError("stop here")

    trainer = trainer_of(linear(), amp=amp)
    content = copied(trainer.checkpoint())
    trainer.add_event_handler(StepEvents.GRADIENTS_READY(once=2), fail)
    with pytest.raises(RuntimeError, match="stop here"):
        trainer.run(batches(4))
    trainer.restore(content)
    trainer.state.max_epochs = None
    trainer.run(batches(1))
    assert (trainer.state.optimizer_step, trainer.state.skipped_steps) == (1, 0)


def test_the_epoch_is_the_checkpoints_after_a_resume_that_failed():
    trained = trainer_of()
    trained.add_event_handler(Events.ITERATION_COMPLETED(once=4), lambda engine: engine.terminate())
    trained.run(batches(3), max_epochs=3)
    trainer = trainer_of()
    trainer.restore(trained.checkpoint())
    handle = trainer.add_event_handler(Events.STARTED, lambda: 1 / 0)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            trainer.run(batches(3))
    handle.remove()
    state = trainer.run(batches(3))
    assert (state.epoch, state.iteration) == (3, 9)


def test_an_open_window_keeps_its_settings_after_a_load_that_failed():
    trainer, source = trainer_of(accumulation_steps=4), trainer_of(accumulation_steps=4)
    Fails().attach(source)
    content = source.checkpoint()
    window = trainer.primary.window
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=2), lambda engine: engine.terminate())
    trainer.run(batches(4))
    window.configure(2, "samples")
    before = dict(vars(window))
    Fails().attach(trainer)
    with pytest.raises(KeyError):
        trainer.restore(content)
    assert vars(window) == before
