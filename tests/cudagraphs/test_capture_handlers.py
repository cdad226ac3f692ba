"""Handlers, hooks and clipping with `capture=True`."""

import pytest
import torch
from captured_runs import LEARNING_RATE, assert_same, labelled_batches, network, train
from fake_graphs import FakeCapturer
from torch.nn.functional import cross_entropy
from torch.optim import SGD
from toys import batches, same, trainer_of, weights

from camshaft import (
    Events,
    ExponentialMovingAverage,
    FreezeParameters,
    GradientClipping,
    NonFiniteGuard,
    StepEvents,
    TensorBoard,
    create_trainer,
)


def test_events_outside_the_graphs_fire_in_order():
    def cycle(capture):
        trainer = trainer_of(capture=capture, accumulation_steps=2)
        fired = []
        for event in StepEvents:
            if event.name not in ("FORWARD_COMPLETED", "BACKWARD_STARTED"):
                trainer.add_event_handler(event, lambda engine, e=event: fired.append((e.name, engine.state.optimizer_step)))
        trainer.run(batches(5), max_epochs=4)
        return fired

    assert cycle(True) == cycle(False)
    assert FakeCapturer.captures > 0


def halve_in_place(trainer):
    for parameter in trainer.primary.parameters():
        parameter.grad.mul_(0.5)


def halve(trainer):
    for parameter in trainer.primary.parameters():
        parameter.grad = parameter.grad * 0.5


def drop_biases(trainer):
    for parameter in trainer.primary.parameters():
        if parameter.dim() == 1:
            parameter.grad = None


@pytest.mark.parametrize("change", [halve_in_place, halve, drop_biases])
@pytest.mark.parametrize("moment", ["BACKWARD_COMPLETED", "GRADIENTS_READY", "GRADIENTS_CLIPPED", "OPTIMIZER_STEP_STARTED"])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_changes_of_gradients_by_handlers_take_effect(change, moment, steps):
    def prepare(trainer):
        @trainer.on(StepEvents[moment](every=3))
        def changes(engine):
            change(engine)

    options = {"prepare": prepare, "clip_grad_norm": 0.5, "accumulation_steps": steps, "optimizer": "SGD"}
    expected, found = (train(capture, **options) for capture in (False, True))
    assert same(expected, found)
    assert FakeCapturer.captures >= 3


def test_handlers_of_the_package_work(tmp_path):
    averages = []

    def prepare(trainer):
        NonFiniteGuard("skip").attach(trainer)
        TensorBoard(tmp_path / str(len(averages)), every=2).attach(trainer)
        averages.append(ExponentialMovingAverage(0.5).attach(trainer))

    assert_same(8, prepare=prepare, accumulation_steps=2, clip_grad_norm=0.5, clip_grad_value=0.125)
    assert same(*(weights(average.module) for average in averages))


@pytest.mark.parametrize("attribute", ["weights", "average"])
def test_an_average_follows_tensors_that_move(attribute):
    averages = []

    def prepare(trainer):
        averages.append(ExponentialMovingAverage(0.5).attach(trainer))
        model = trainer.primary.module

        def move(engine):
            for parameter in (model if attribute == "weights" else averages[-1].module).parameters():
                parameter.data = parameter.data.clone()

        trainer.add_event_handler_at(-10_000, StepEvents.OPTIMIZER_STEP_COMPLETED(every=13), move)  # just before the average

    expected, found = (train(capture, prepare=prepare) for capture in (False, True))
    assert same(expected, found)
    assert same(*(weights(average.module) for average in averages))


def test_a_non_finite_value_is_skipped_by_the_check_in_a_graph():
    trainers = []
    data = labelled_batches((6,) * 8)
    data[6][0][0, 0] = torch.inf

    def prepare(trainer):
        NonFiniteGuard("raise").attach(trainer)
        trainers.append(trainer)

    for capture in (False, True):
        with pytest.raises(FloatingPointError, match="the loss of iteration 7 is nan, at optimizer step 7"):
            train(capture, prepare=prepare, data=data, epochs=1)
    assert same(*(weights(trainer.primary.module)[:1] for trainer in trainers))
    assert FakeCapturer.captures == 3


def test_a_step_with_a_non_finite_gradient_is_skipped():
    data = labelled_batches()
    data[5][0][0] = float("nan")
    trainers = []

    def prepare(trainer):
        NonFiniteGuard("skip").attach(trainer)
        trainers.append(trainer)
        for part in trainer.primary.module:  # a running mean would keep the NaN
            part.track_running_stats = False

    expected, found = (train(capture, prepare=prepare, data=data) for capture in (False, True))
    finite = [[torch.nan_to_num(value) for value in values] for values in (expected, found)]
    assert same(*finite)
    assert [trainer.state.skipped_steps for trainer in trainers] == [6, 6]
    assert FakeCapturer.captures == 3  # the passes, the check, the step


@pytest.mark.parametrize("until", [{"until_step": 17}, {"until_epoch": 4}])
def test_parameters_can_be_unfrozen_later(until):
    """Graphs that do not train the parameters are discarded when they are unfrozen."""
    prepare = lambda trainer: FreezeParameters("0.*", **until).attach(trainer)  # noqa: E731
    assert_same(4, prepare=prepare)


def test_an_optimizer_hook_is_called_at_each_step():
    calls = []

    def prepare(trainer):
        trainer.primary.optimizers[0].register_step_post_hook(lambda *_: calls.append(1))

    assert_same(1, prepare=prepare)
    assert len(calls) == 2 * 6 * 7


def test_batches_that_train_other_parameters_run_without_graphs():
    """A graph computes the gradients of one set of parameters. Batches that train another set run without it."""

    def compute_loss(model, batch):
        x, y = batch
        return cross_entropy(model(x), y) if len(x) == 6 else model[0](x).square().mean()

    options = {"loss_fn": None, "compute_loss": compute_loss, "data": labelled_batches((6, 6, 6, 6, 4)), "epochs": 9}
    assert_same(3, **options)  # one of them is discarded


def test_a_custom_clipping_function_is_called_at_each_step():
    calls = []
    prepare = lambda trainer: GradientClipping(function=lambda parameters: calls.append(1)).attach(trainer)  # noqa: E731
    assert_same(3, prepare=prepare)
    assert len(calls) == 2 * 6 * 7


def replace_weights(trainer):
    for parameter in trainer.primary.parameters():
        parameter.data = parameter.data * 0.75


def replace_gradients(trainer):
    for parameter in trainer.primary.parameters():
        parameter.grad.data = parameter.grad.data * 0.5


def add_penalty_gradients(trainer):
    sum(p.square().sum() for p in trainer.primary.parameters()).backward()


BEFORE = ("ITERATION_STARTED", "FORWARD_STARTED", "BACKWARD_COMPLETED", "OPTIMIZER_STEP_COMPLETED", "ITERATION_COMPLETED")


AFTER = ("BACKWARD_COMPLETED", "GRADIENTS_READY", "GRADIENTS_CLIPPED", "OPTIMIZER_STEP_STARTED")


@pytest.mark.parametrize(
    ("change", "moment"),
    [(replace_weights, moment) for moment in dict.fromkeys((*BEFORE, *AFTER))]
    + [(replace_gradients, moment) for moment in AFTER]
    + [(add_penalty_gradients, moment) for moment in ("FORWARD_STARTED", "BACKWARD_COMPLETED", "GRADIENTS_READY")],
)
@pytest.mark.parametrize("steps", [1, 2])
def test_tensors_replaced_by_handlers_take_effect(change, moment, steps):
    event = getattr(StepEvents, moment, None) or getattr(Events, moment)
    prepare = lambda trainer: trainer.add_event_handler(event(every=9), change)  # noqa: E731
    options = {"prepare": prepare, "accumulation_steps": steps, "clip_grad_norm": 0.5, "optimizer": "SGD"}
    expected, found = (train(capture, **options) for capture in (False, True))
    assert same(expected, found)
    assert FakeCapturer.captures > 2


@pytest.mark.parametrize("moment", ["FORWARD_STARTED", "BACKWARD_COMPLETED", "GRADIENTS_READY", "ITERATION_COMPLETED"])
@pytest.mark.parametrize("steps", [1, 2])
def test_parameters_can_be_added_during_a_run(moment, steps):
    def add_parameters(trainer):
        optimizer = trainer.primary.optimizers[0]
        if len(optimizer.param_groups) == 1:
            trainer.primary.module[0].requires_grad_(True)
            optimizer.add_param_group({"params": [*trainer.primary.module[0].parameters()]})

    def prepare(trainer):
        trainer.add_event_handler((getattr(StepEvents, moment, None) or getattr(Events, moment))(once=17), add_parameters)

    def train_with(capture):
        model = network()
        model[0].requires_grad_(False)
        optimizer = SGD([*model[1].parameters(), *model[4].parameters()], lr=LEARNING_RATE, momentum=0.5)
        trainer = create_trainer(model, optimizer, cross_entropy, capture=capture, accumulation_steps=steps, clip_grad_norm=0.5)
        prepare(trainer)
        torch.manual_seed(3)
        trainer.run(labelled_batches(), max_epochs=6)
        return weights(model)

    assert same(train_with(False), train_with(True))
    assert FakeCapturer.captures > 2


def test_an_unfrozen_submodule_without_an_optimizer_raises():
    model = network()
    model[0].requires_grad_(False)
    trainer = create_trainer(model, SGD(model[4].parameters(), lr=LEARNING_RATE), cross_entropy, capture=True)
    trainer.add_event_handler(Events.EPOCH_STARTED(once=3), lambda: model[0].requires_grad_(True))
    model[1].requires_grad_(False)
    with pytest.raises(
        ValueError, match=r"also computes gradients of .*0\.weight.* which no optimizer of phase 'model' trains"
    ):
        trainer.run(labelled_batches(), max_epochs=4)


def test_an_optimizer_with_its_own_zero_grad_works():
    class Zeroes(SGD):
        def zero_grad(self, set_to_none=False):
            super().zero_grad(set_to_none=False)

    def train_with(capture):
        model = network()
        trainer = create_trainer(model, Zeroes(model.parameters(), lr=LEARNING_RATE), cross_entropy, capture=capture)
        torch.manual_seed(3)
        trainer.run(labelled_batches(), max_epochs=3)
        return weights(model)

    assert same(train_with(False), train_with(True))
    assert FakeCapturer.captures == 1  # the step of a custom optimizer runs eagerly
