"""Callbacks of Keras and Poutyne: when they are called, their model and their state."""

import re

import pytest
import torch
from keras_callbacks import Recorder, Stateful, only, recorded
from toys import batches, linear, model_of, same, scripted, sgd, trainer_of, weights

from camshaft import CheckpointRotation, Evaluation, Events, KerasStyle

# -- when it is called ------------------------------------------------------------------------------------------------


def test_the_methods_are_called_in_the_order_of_a_run():
    batch = ["on_train_batch_begin", "on_backward_end", "on_train_batch_end"]
    epoch = ["on_epoch_begin", *batch, *batch, "on_epoch_end"]
    calls = recorded(max_epochs=2).calls
    assert [call[0] for call in calls] == ["on_train_begin", *epoch, *epoch, "on_train_end"]


@pytest.mark.parametrize(("style", "first"), [("keras", 0), ("poutyne", 1), (None, 0)])
def test_epochs_and_batches_are_counted_as_in_the_library(style, first):
    recorder = recorded(max_epochs=2, style=style)
    for name in ("on_epoch_begin", "on_epoch_end"):
        assert [args[0] for args in recorder.named(name)] == [first, first + 1]
    for name in ("on_train_batch_begin", "on_backward_end", "on_train_batch_end"):
        assert [args[0] for args in recorder.named(name)] == [first, first + 1] * 2


def test_on_backward_end_is_called_once_per_window_with_the_true_gradient():
    trainer, seen = trainer_of(accumulation_steps=2), []
    gradient = lambda t: [p.grad.clone() for p in model_of(t).parameters()]  # noqa: E731
    KerasStyle(only(on_backward_end=lambda batch: seen.append((batch, *gradient(trainer))))).attach(trainer)
    trainer.run(batches(4))
    model, expected = linear(), []
    for first, second in zip(batches(4)[::2], batches(4)[1::2], strict=True):
        optimizer = sgd(model)
        loss = sum(torch.nn.functional.mse_loss(model(x), y) / 2 for x, y in (first, second))
        expected.append(torch.autograd.grad(loss, list(model.parameters())))
        for parameter, grad in zip(model.parameters(), expected[-1], strict=True):
            parameter.grad = grad
        optimizer.step()
    assert [batch for batch, *_ in seen] == [1, 3]
    torch.testing.assert_close([tuple(grads) for _, *grads in seen], expected)


def test_the_optimizer_uses_a_gradient_that_the_callback_changed():
    trainer = trainer_of()
    zero = lambda batch: [p.grad.zero_() for p in model_of(trainer).parameters()]  # noqa: E731
    before = weights(model_of(trainer))
    KerasStyle(only(on_backward_end=zero)).attach(trainer)
    trainer.run(batches(3))
    assert same(weights(model_of(trainer)), before)
    assert "KerasStyle(Only).end_backward  [changes gradients]" in trainer.explain()


@pytest.mark.parametrize(("old", "new"), [("on_batch_begin", "on_train_batch_begin"), ("on_batch_end", "on_train_batch_end")])
def test_an_older_name_is_called_if_the_newer_one_is_missing(old, new):
    trainer, seen = trainer_of(), []
    KerasStyle(only(**{old: lambda batch, logs: seen.append(old)})).attach(trainer, "old")
    both = {old: lambda batch, logs: seen.append("wrong"), new: lambda batch, logs: seen.append(new)}
    KerasStyle(only(**both)).attach(trainer, "both")
    trainer.run(batches(1))
    assert seen == [old, new]


def test_an_epoch_ends_after_its_evaluation_and_before_its_checkpoint(tmp_path):
    trainer, seen = trainer_of(), []
    checkpoints = CheckpointRotation(tmp_path).attach(trainer)
    KerasStyle(only(on_epoch_end=lambda epoch, logs: seen.append((checkpoints.last, logs["val_score"])))).attach(trainer)
    Evaluation(scripted([0.5]), [0]).attach(trainer)
    trainer.run(batches(2))
    assert seen == [(None, 0.5)]
    assert checkpoints.last is not None


# -- model, parameters and the end ------------------------------------------------------------------------------------


def test_set_params_receives_the_length_of_the_run():
    assert recorded(data=3, max_epochs=2).params == {"epochs": 2, "steps": 3, "verbose": 0}


def test_its_model_has_the_attributes_of_keras_and_poutyne_and_those_of_the_network():
    trainer = trainer_of()
    model, network = recorded(trainer, metrics_names=["accuracy"]).model, model_of(trainer)
    assert model.network is network
    assert model.optimizer is trainer.primary.optimizers[0]
    assert (model.device, model.metrics_names, model.stop_training) == (torch.device("cpu"), ["accuracy"], False)
    assert model.weight is network.weight
    assert torch.equal(model(torch.ones(1, 3)), network(torch.ones(1, 3)))


def test_a_missing_attribute_of_its_model_is_an_error_that_lists_the_others():
    model = recorded().model
    with pytest.raises(AttributeError, match="no 'get_weight_copies': it has network, optimizer, device, metrics_names"):
        model.get_weight_copies()


@pytest.mark.parametrize(
    ("method", "iterations"),
    [("on_train_begin", 0), ("on_epoch_begin", 3), ("on_train_batch_end", 5), ("on_epoch_end", 6)],
)
def test_it_ends_the_run_by_stop_training(method, iterations):
    trainer, recorder, calls = trainer_of(), Recorder(), []

    def stop(*args):
        calls.append(args)
        recorder.model.stop_training = method == "on_train_begin" or len(calls) == {"on_train_batch_end": 5}.get(method, 2)

    setattr(recorder, method, stop)
    KerasStyle(recorder).attach(trainer)
    state = trainer.run(batches(3), max_epochs=4)
    assert (state.iteration, state.stop_reason) == (iterations, "Recorder has set model.stop_training")
    assert len(recorder.named("on_train_end")) == 1


def test_the_next_run_ignores_an_earlier_stop():
    trainer, recorder = trainer_of(), Recorder()
    stops = iter([False, True])
    recorder.on_epoch_end = lambda epoch, logs: setattr(recorder.model, "stop_training", next(stops, False))
    KerasStyle(recorder).attach(trainer)
    assert trainer.run(batches(2), max_epochs=9).epoch == 2
    assert trainer.run(batches(2), max_epochs=5).epoch == 5
    assert trainer.state.stop_reason is None


# -- state ------------------------------------------------------------------------------------------------------------


def test_its_state_is_loaded_after_on_train_begin_of_the_resumed_run(tmp_path):
    first, second, callback = trainer_of(), trainer_of(), Stateful()
    for trainer, counter in ((first, Stateful()), (second, callback)):
        KerasStyle(counter).attach(trainer)
        CheckpointRotation(tmp_path).attach(trainer)
    first.run(batches(2), max_epochs=2)
    second.handlers["CheckpointRotation"].resume()
    assert callback.epochs == 2
    second.run(batches(2), max_epochs=5)
    assert callback.epochs == 5


def test_a_second_run_starts_from_the_initial_state():
    trainer, callback = trainer_of(), Stateful()
    KerasStyle(callback).attach(trainer)
    for max_epochs in (2, 3):
        trainer.state.max_epochs = None
        trainer.run(batches(2), max_epochs=max_epochs)
        assert callback.epochs == max_epochs


@pytest.mark.parametrize("stop", [1, 2, 3, 5])
def test_an_epoch_that_is_resumed_in_the_middle_has_its_full_mean(stop, tmp_path):
    whole = recorded(data=4, max_epochs=2).named("on_epoch_end")
    first, recorder = trainer_of(), Recorder()
    KerasStyle(Recorder()).attach(first)
    CheckpointRotation(tmp_path).attach(first)
    first.add_event_handler(Events.ITERATION_COMPLETED(once=stop), lambda e: e.terminate())
    first.run(batches(4), max_epochs=2)
    second = trainer_of()
    KerasStyle(recorder).attach(second)
    CheckpointRotation(tmp_path).attach(second).resume()
    second.run(batches(4), max_epochs=2)
    assert recorder.named("on_epoch_end") == whole[stop // 4 :]
    assert recorder.named("on_train_batch_begin")[0][0] == stop % 4


def test_a_state_that_a_checkpoint_cannot_hold_is_an_error(tmp_path):
    callback = Stateful()
    callback.state_dict = lambda: {"epochs": object()}
    trainer = trainer_of()
    KerasStyle(callback).attach(trainer)
    CheckpointRotation(tmp_path).attach(trainer)
    with pytest.raises(TypeError, match=re.escape("Stateful.state_dict()['epochs'] is a builtins.object")):
        trainer.run(batches(2))


def test_several_callbacks_have_different_names():
    trainer = trainer_of()
    KerasStyle(Recorder()).attach(trainer)
    KerasStyle(Stateful()).attach(trainer)
    assert list(trainer.handlers) == ["KerasStyle/Recorder", "KerasStyle/Stateful"]
    with pytest.raises(ValueError, match="'KerasStyle/Stateful' is attached already"):
        KerasStyle(Stateful()).attach(trainer)


# -- mistakes ---------------------------------------------------------------------------------------------------------


def test_an_object_with_none_of_the_methods_is_an_error():
    with pytest.raises(TypeError, match="at least one of the methods on_train_begin, .*, on_train_end; got Only with none"):
        KerasStyle(only(on_test_begin=lambda logs: None))


def test_a_class_instead_of_an_object_is_an_error():
    with pytest.raises(TypeError, match=r"must be an object, got the class Stateful; make one: KerasStyle\(Stateful\(...\)\)"):
        KerasStyle(Stateful)


def test_an_unknown_style_is_an_error():
    with pytest.raises(ValueError, match="style must be 'keras', 'poutyne' or None, got 'torch'"):
        KerasStyle(Recorder(), style="torch")
