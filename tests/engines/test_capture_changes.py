"""``capture=True`` where something changes on the way: a graph repeats nothing that isn't so any more."""

import copy
import dataclasses
import random

import numpy as np
import pytest
import torch
from captured import OPTIMIZERS, RATE, _taped, assert_same, network, pairs, run  # noqa: F401
from tapes import TapeRecorder
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD, AdamW
from torch.optim.optimizer import register_optimizer_step_post_hook
from toys import batches, linear, same, sgd, trainer_of, weights

from camshaft import (
    CheckpointRotation,
    Events,
    GradientClipping,
    MixedPrecision,
    StepEvents,
    create_trainer,
    seed_everything,
)
from camshaft.cudagraphs import graphs as recordings
from camshaft.cudagraphs.checks import setting_key
from camshaft.pytree import signature
from camshaft.pytree import tensors as all_tensors

# -- gradients ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_batches_that_train_different_parameters_in_turn(steps):
    def compute_loss(model, batch):
        hidden = model[2](model[1](model[0](batch["x"])))
        return cross_entropy(model[4](hidden), batch["y"]) if batch["task"] == "both" else hidden.square().mean()

    data = [{"x": x, "y": y, "task": task} for (x, y), task in zip(pairs((6,) * 8), ["both", "body"] * 4, strict=True)]
    options = {"loss_fn": None, "compute_loss": compute_loss, "data": data, "accumulation_steps": steps, "optimizer": "SGD"}
    expected, found = (run(capture, **options) for capture in (False, True))
    assert same(expected, found)
    assert TapeRecorder.made > 1


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW fused"])
def test_parameters_whose_first_step_comes_late(optimizer):
    """Their optimizer state is made by it, and not by a graph that would make it anew each time."""

    def prepare(trainer):
        @trainer.on(StepEvents.GRADIENTS_READY)
        def keep_the_last_layer(engine):
            if engine.state.epoch == 1:
                for parameter in trainer.primary.module[4].parameters():
                    parameter.grad = None

    assert_same(2, prepare=prepare, optimizer=optimizer)


def test_a_loss_that_makes_the_gradients_of_others_too():
    model, judge = linear(), nn.Linear(2, 1)
    compute_loss = lambda m, batch: judge(m(batch[0])).mean()  # noqa: E731
    trainer = create_trainer(model, sgd(model), None, compute_loss=compute_loss, capture=True)
    with pytest.raises(ValueError, match=r"gradients of a tensor of shape \(1,?.*, which no optimizer of phase"):
        trainer.run(batches(5))


@pytest.mark.filterwarnings("ignore:.* want a gradient and are in no optimizer")
def test_a_part_of_the_model_that_nobody_trains():
    model = network()
    made = SGD(model[4].parameters(), lr=RATE)
    with pytest.raises(ValueError, match=r"gradients of .*1\.bias.* and 1 more, which no optimizer .* trains. Freeze them"):
        create_trainer(model, made, cross_entropy, capture=True).run(pairs())


# -- memory, modes and settings -------------------------------------------------------------------------------------------


def moves_weights(trainer):
    for parameter in trainer.primary.parameters():
        parameter.data = parameter.data.clone()


def loads_the_optimizer(trainer):
    optimizer = trainer.primary.optimizers[0]
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def forgets_its_moments(trainer):
    trainer.primary.optimizers[0].state.clear()


def keeps_its_statistics(trainer):
    trainer.primary.module[1].eval()


def takes_less_precision(trainer):
    MixedPrecision("bf16").attach(trainer)


@pytest.mark.parametrize(
    ("change", "graphs"),
    [
        (moves_weights, 4),
        (loads_the_optimizer, 4),
        (forgets_its_moments, 4),
        (keeps_its_statistics, 4),
        (takes_less_precision, 3),
    ],
)
@pytest.mark.parametrize("moment", [Events.EPOCH_STARTED(once=3), Events.ITERATION_COMPLETED(once=17)], ids=["epoch", "batch"])
@pytest.mark.parametrize("optimizer", ["SGD", "AdamW fused"])
def test_graphs_of_what_has_changed_are_made_anew(change, graphs, moment, optimizer):
    prepare = lambda trainer: trainer.add_event_handler(moment, change)  # noqa: E731
    assert_same(graphs, prepare=prepare, optimizer=optimizer)


class Scaled(nn.ReLU):
    def __init__(self):
        super().__init__()
        self.factors, self.unknown = [1.0, {"of": 1.0}], float("nan")

    def forward(self, x):
        return super().forward(x) * self.factors[0]


class Smoothing(nn.CrossEntropyLoss):
    def forward(self, y_pred, y):
        return super().forward(y_pred, y) * (1.0 if self.training else 0.5)


def drops_nothing(trainer):
    trainer.primary.module[3].p = 0.0


def has_a_hook(trainer):
    trainer.primary.module[2].register_forward_hook(lambda module, inputs, output: output * 0.5)


def has_another_layer(trainer):
    trainer.primary.module.add_module("another", nn.Softplus())


def has_another_buffer(trainer):
    trainer.primary.module[1].running_mean = torch.ones(8)


def weighs_the_classes(trainer):
    trainer.primary.objective.loss_fn.weight = torch.tensor([0.5, 1.0, 2.0])


def smooths_the_labels(trainer):
    trainer.primary.objective.loss_fn.label_smoothing = 0.25


def squashes_otherwise(trainer):
    trainer.primary.module[2] = nn.Tanh()


def masks_a_gradient(trainer):
    trainer.primary.module[4].weight.register_hook(lambda gradient: gradient * 0.5)


def looks_at_gradients_afterwards(trainer):
    def halve(parameter):
        parameter.grad.mul_(0.5)

    trainer.primary.module[4].weight.register_post_accumulate_grad_hook(halve)


def has_another_loss(trainer):
    trainer.primary.objective.loss_fn = nn.functional.multi_margin_loss


def evaluates_the_loss(trainer):
    trainer.primary.objective.loss_fn.eval()


def is_put_into_a_list(trainer):
    trainer.primary.module[2].factors[0] = 0.5


@pytest.mark.parametrize(
    "change",
    [
        drops_nothing,
        has_a_hook,
        has_another_layer,
        has_another_buffer,
        weighs_the_classes,
        smooths_the_labels,
        squashes_otherwise,
        masks_a_gradient,
        looks_at_gradients_afterwards,
        has_another_loss,
        evaluates_the_loss,
        is_put_into_a_list,
    ],
)
def test_graphs_are_made_anew_where_a_setting_has_changed_between_epochs(change):
    def prepare(trainer):
        trainer.primary.module[2] = Scaled()
        trainer.add_event_handler(Events.EPOCH_STARTED(once=3), change)

    expected, found = (run(capture, prepare=prepare, loss_fn=Smoothing()) for capture in (False, True))
    assert same(expected, found)
    assert TapeRecorder.made == 4


def test_graphs_that_are_thrown_away_over_and_over_are_warned_of():
    prepare = lambda trainer: trainer.add_event_handler(Events.ITERATION_COMPLETED(every=4), moves_weights)  # noqa: E731
    expected = run(False, prepare=prepare, epochs=10)
    with pytest.warns(
        UserWarning, match="invalidated 10 times, most recently because a parameter or a gradient has moved"
    ) as caught:
        found = run(True, prepare=prepare, epochs=10)
    assert len(caught) == 1
    assert same(expected, found)


def test_a_network_that_is_evaluated_between_epochs_keeps_its_graphs():
    prepare = lambda trainer: trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: trainer.primary.module.eval())  # noqa: E731
    assert_same(2, prepare=prepare)


def test_another_run_goes_on_with_the_graphs():
    trainer = trainer_of(capture=True)
    trainer.run(batches(5), max_epochs=2)
    made = TapeRecorder.made
    trainer.run(batches(5), max_epochs=2)
    assert (made, TapeRecorder.made) == (2, 2)
    assert TapeRecorder.replays == 2 * (20 - 3)


class Running(nn.Module):
    """Puts something new into one of its attributes at each pass."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.count, self.last = kind, 0, torch.zeros(2)
        self.register_buffer("mean", torch.zeros(2))
        self.layer = linear()

    def forward(self, x):
        y_pred = self.layer(x)
        if self.kind == "mean":
            self.mean = 0.5 * self.mean + 0.5 * y_pred.detach().mean(0)
        elif self.kind == "last":
            self.last = y_pred.detach()
        elif self.kind == "count":
            self.count += 1
        return y_pred


@pytest.mark.parametrize("kind", ["mean", "last", "count"])
def test_a_model_that_changes_other_than_in_place(kind):
    with pytest.raises(RuntimeError, match=rf"assigns something new to model\.{kind}, which a graph can't repeat. Change"):
        trainer_of(Running(kind), capture=True).run(batches(5))


# -- checkpoints ----------------------------------------------------------------------------------------------------------


def test_an_earlier_state_is_restored_in_the_same_process():
    model = network()
    trainer = create_trainer(model, OPTIMIZERS["AdamW fused"](model.parameters()), cross_entropy, capture=True)
    seed_everything(1)
    trainer.run(pairs(), max_epochs=2)
    saved = copy.deepcopy(trainer.checkpoint())
    ends = []
    for _ in range(2):
        trainer.restore(copy.deepcopy(saved))
        trainer.run(pairs(), max_epochs=4)
        ends.append(weights(model))
    assert same(*ends)


@pytest.mark.filterwarnings("ignore:capture=True")
def test_a_checkpoint_of_a_run_without_graphs(tmp_path):
    def trainer_over(capture):
        model = network()
        made = AdamW(model.parameters(), lr=RATE, fused=True, capturable=capture)
        return create_trainer(model, made, cross_entropy, capture=capture), made

    seed_everything(1)
    first, _ = trainer_over(False)
    checkpoints = CheckpointRotation(tmp_path).attach(first)
    first.run(pairs(), max_epochs=1)
    path = checkpoints.save()
    first.run(pairs(), max_epochs=3)
    second, made = trainer_over(True)
    CheckpointRotation(tmp_path).attach(second).resume(path)
    second.run(pairs(), max_epochs=3)
    assert made.param_groups[0]["capturable"] is True
    assert TapeRecorder.made == 2
    assert same(weights(first.primary.module), weights(second.primary.module))


# -- batches --------------------------------------------------------------------------------------------------------------


def test_the_state_has_the_loaders_tensors():
    data, seen = batches(8), []
    trainer = trainer_of(capture=True)
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: seen.append((trainer.state.x, trainer.state.y)))
    trainer.run(data)
    assert all(x is given_x and y is given_y for (x, y), (given_x, given_y) in zip(seen, data, strict=True))


def test_other_named_losses_stay_as_they_are():
    trainer, seen = trainer_of(capture=True), []
    trainer.add_event_handler(Events.ITERATION_STARTED, lambda: trainer.state.losses.update(mine=trainer.state.iteration))
    trainer.add_event_handler(StepEvents.BACKWARD_COMPLETED, lambda: seen.append(trainer.state.losses["mine"]))
    trainer.run(batches(8))
    assert seen == list(range(1, 9))


def differentiated(model, batch):
    x = batch["x"].detach().requires_grad_(True)
    y_pred = model(x)
    (slope,) = torch.autograd.grad(y_pred.sum(), x, create_graph=True)
    return slope.square().mean() + cross_entropy(y_pred, batch["y"])


def test_an_objective_that_differentiates_its_inputs():
    smooth = lambda trainer: trainer.primary.module.__setitem__(2, nn.Tanh())  # noqa: E731
    options = {"loss_fn": None, "compute_loss": differentiated, "prepare": smooth}
    expected, found = (run(capture, data=[{"x": x, "y": y} for x, y in pairs()], **options) for capture in (False, True))
    assert same(expected, found)
    assert TapeRecorder.made == 2


def test_inputs_that_a_gradient_is_made_of():
    assert_same(2, prepare_batch=lambda batch, **_: (batch[0].clone().requires_grad_(), batch[1]))


def test_an_input_made_by_something_that_is_trained():
    gain = torch.ones(4, requires_grad=True)
    with pytest.raises(ValueError, match=r"prepare_batch returns a tensor of shape \(6, 4\) with an autograd graph"):
        run(True, prepare_batch=lambda batch, **_: (batch[0] * gain, batch[1]))


def test_batches_without_tensors():
    data = pairs()
    compute_loss = lambda model, index: cross_entropy(model(data[index][0]), data[index][1])  # noqa: E731
    assert_same(1 + 3, loss_fn=None, compute_loss=compute_loss, data=[0, 1, 2] * 2)


def test_values_that_are_equal_and_not_the_same():
    compute_loss = lambda model, batch: model(batch[0]).square().mean() * (0.5 if batch[1] is True else 0.25)  # noqa: E731
    (x, _), *_ = pairs()
    assert_same(4, loss_fn=None, compute_loss=compute_loss, data=[(x, True), (x, 1), (x, 1.0)] * 2)


@dataclasses.dataclass
class Sample:
    x: torch.Tensor
    weight: int = 1


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (torch.zeros(2, 3), torch.zeros(3, 2)),
        (torch.zeros(2, 3), torch.zeros(3, 2).T),
        (torch.zeros(2, 3), torch.zeros(2, 3).double()),
        (torch.zeros(2, 3), torch.zeros(2, 3, device="meta")),
        (torch.zeros(2, 3), torch.zeros(2, 3, requires_grad=True)),
        (torch.zeros(2, 3).to_sparse(), torch.zeros(2, 3)),
        ([torch.zeros(2)], (torch.zeros(2),)),
        ({"a": torch.zeros(2)}, {"b": torch.zeros(2)}),
        (Sample(torch.zeros(2)), Sample(torch.zeros(2), 2)),
        (Sample(torch.zeros(2)), Sample(torch.zeros(3))),
        (1, 1.0),
        ("a", None),
    ],
    ids=str,
)
def test_batches_of_different_forms(one, other):
    tensors = []
    assert signature(one, tensors) != signature(other, [])
    assert signature(one, []) == signature(copy.deepcopy(one), [])
    assert len(tensors) == len(list(all_tensors(one)))


# -- optimizers and clippings ---------------------------------------------------------------------------------------------


def test_several_clippings():
    def prepare(trainer):
        GradientClipping(0.5, norm_type=1.0).attach(trainer)
        GradientClipping(0.5).attach(trainer, "second")
        GradientClipping(0.25).attach(trainer, "third")
        GradientClipping(clip_value=0.0625).attach(trainer, "fourth")

    assert_same(2 + 4, prepare=prepare)


def test_parameters_by_name():
    model = network()
    made = AdamW(model.named_parameters(), lr=RATE, fused=True, capturable=True)
    create_trainer(model, made, cross_entropy, capture=True).run(pairs())
    assert TapeRecorder.made == 2


def test_hooks_of_all_optimizers_are_called_at_each_step():
    calls = []
    hook = register_optimizer_step_post_hook(lambda *_: calls.append(1))
    try:
        run(True, epochs=2)
    finally:
        hook.remove()
    assert (TapeRecorder.made, len(calls)) == (1, 14)


def test_what_a_graph_keeps_of_a_setting():
    setting = torch.tensor([0.5, 0.25])
    before = setting_key(setting)
    setting.fill_(1)
    assert before == (0.5, 0.25)
    assert setting_key(setting) == (1.0, 1.0)
    assert setting_key(["a"]) == "['a']"
    assert setting_key((0.9, 0.99)) == (0.9, 0.99)


def test_a_warm_up_of_a_rate_that_is_a_number_ends_in_a_graph():
    """Forms that came too seldom make room for those that stay."""

    def prepare(trainer):
        def warm_up(engine):
            engine.primary.optimizers[0].param_groups[0]["lr"] = RATE * min(1.0, engine.state.iteration / 32)

        trainer.add_event_handler(Events.ITERATION_STARTED, warm_up)

    with pytest.warns(UserWarning, match="the optimizer step of phase 'model' has more than 16 input signatures"):
        assert_same(2, prepare=prepare, optimizer="SGD", epochs=8)


def test_the_weight_of_a_batch_that_failed_is_not_counted():
    def compute_loss(model, batch):
        if batch[0].isnan().any():
            raise ZeroDivisionError
        return cross_entropy(model(batch[0]), batch[1])

    data = pairs((6, 4))
    data[1][0][0] = float("nan")
    weighed = []
    for capture in (False, True):
        model = network()
        options = {"compute_loss": compute_loss, "accumulation_steps": 4, "loss_weight": "samples"}
        trainer = create_trainer(model, sgd(model), None, capture=capture, **options)
        with pytest.raises(ZeroDivisionError):
            trainer.run(data)
        weighed.append(trainer.primary.window.weight)
    assert weighed == [6, 6]


# -- the host -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("draw", [random.random, np.random.rand, lambda: torch.rand(1)], ids=["python", "numpy", "torch"])
def test_the_generators_of_the_host(draw):
    before = recordings.host_generators()
    assert recordings.host_generators() == before
    draw()
    assert recordings.host_generators() != before


# -- between the events of a step -----------------------------------------------------------------------------------------


def weights_elsewhere(trainer):
    for parameter in trainer.primary.parameters():
        parameter.data = parameter.data * 0.75


def gradients_elsewhere(trainer):
    for parameter in trainer.primary.parameters():
        parameter.grad.data = parameter.grad.data * 0.5


def another_penalty(trainer):
    sum(p.square().sum() for p in trainer.primary.parameters()).backward()


BEFORE = ("ITERATION_STARTED", "FORWARD_STARTED", "BACKWARD_COMPLETED", "OPTIMIZER_STEP_COMPLETED", "ITERATION_COMPLETED")
AFTER = ("BACKWARD_COMPLETED", "GRADIENTS_READY", "GRADIENTS_CLIPPED", "OPTIMIZER_STEP_STARTED")


@pytest.mark.parametrize(
    ("change", "moment"),
    [(weights_elsewhere, moment) for moment in dict.fromkeys((*BEFORE, *AFTER))]
    + [(gradients_elsewhere, moment) for moment in AFTER]
    + [(another_penalty, moment) for moment in ("FORWARD_STARTED", "BACKWARD_COMPLETED", "GRADIENTS_READY")],
)
@pytest.mark.parametrize("steps", [1, 2])
def test_whatever_a_handler_puts_elsewhere_counts(change, moment, steps):
    event = getattr(StepEvents, moment, None) or getattr(Events, moment)
    prepare = lambda trainer: trainer.add_event_handler(event(every=9), change)  # noqa: E731
    options = {"prepare": prepare, "accumulation_steps": steps, "clip_grad_norm": 0.5, "optimizer": "SGD"}
    expected, found = (run(capture, **options) for capture in (False, True))
    assert same(expected, found)
    assert TapeRecorder.made > 2


@pytest.mark.parametrize("moment", ["FORWARD_STARTED", "BACKWARD_COMPLETED", "GRADIENTS_READY", "ITERATION_COMPLETED"])
@pytest.mark.parametrize("steps", [1, 2])
def test_parameters_that_join_on_the_way(moment, steps):
    def grows(trainer):
        optimizer = trainer.primary.optimizers[0]
        if len(optimizer.param_groups) == 1:
            trainer.primary.module[0].requires_grad_(True)
            optimizer.add_param_group({"params": [*trainer.primary.module[0].parameters()]})

    def prepare(trainer):
        trainer.add_event_handler((getattr(StepEvents, moment, None) or getattr(Events, moment))(once=17), grows)

    def go(capture):
        model = network()
        model[0].requires_grad_(False)
        made = SGD([*model[1].parameters(), *model[4].parameters()], lr=RATE, momentum=0.5)
        trainer = create_trainer(model, made, cross_entropy, capture=capture, accumulation_steps=steps, clip_grad_norm=0.5)
        prepare(trainer)
        torch.manual_seed(3)
        trainer.run(pairs(), max_epochs=6)
        return weights(model)

    assert same(go(False), go(True))
    assert TapeRecorder.made > 2


def test_a_part_that_is_unfrozen_and_that_nobody_trains():
    model = network()
    model[0].requires_grad_(False)
    trainer = create_trainer(model, SGD(model[4].parameters(), lr=RATE), cross_entropy, capture=True)
    trainer.add_event_handler(Events.EPOCH_STARTED(once=3), lambda: model[0].requires_grad_(True))
    model[1].requires_grad_(False)
    with pytest.raises(
        ValueError, match=r"also computes gradients of .*0\.weight.* which no optimizer of phase 'model' trains"
    ):
        trainer.run(pairs(), max_epochs=4)


def test_an_optimizer_that_lets_go_of_its_gradients_in_its_own_way():
    class Zeroes(SGD):
        def zero_grad(self, set_to_none=False):
            super().zero_grad(set_to_none=False)

    def go(capture):
        model = network()
        trainer = create_trainer(model, Zeroes(model.parameters(), lr=RATE), cross_entropy, capture=capture)
        torch.manual_seed(3)
        trainer.run(pairs(), max_epochs=3)
        return weights(model)

    assert same(go(False), go(True))
    assert TapeRecorder.made == 1  # the step of a class that isn't torch's runs as ever


def test_an_interrupted_run_goes_on_with_what_has_changed_meanwhile():
    def go(capture):
        model = network()
        trainer = create_trainer(model, OPTIMIZERS["SGD"](model.parameters()), cross_entropy, capture=capture)
        trainer.add_event_handler(Events.ITERATION_COMPLETED(once=10), trainer.interrupt)
        torch.manual_seed(3)
        trainer.run(pairs(), max_epochs=4)
        model[3].p = 0.0
        trainer.run(pairs(), max_epochs=4)
        return weights(model)

    assert same(go(False), go(True))
    assert TapeRecorder.made == 4


@pytest.mark.parametrize("order", [(6, 4) * 4, (4, 6) * 4, (4,) * 8])
def test_gradients_of_others_are_found_in_whatever_order_batches_come(order):
    judge = nn.Linear(3, 3)

    def compute_loss(model, batch):
        x, y = batch
        return cross_entropy(judge(model(x)) if len(x) == 4 else model(x), y)

    with pytest.raises(ValueError, match="also computes gradients of"):
        run(True, loss_fn=None, compute_loss=compute_loss, data=pairs(order))


def test_a_model_that_cannot_be_recorded_is_as_it_was():
    model = Running("mean")
    trainer = trainer_of(model, capture=True)
    seen = []
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: seen.append(model.mean.clone()))
    with pytest.raises(RuntimeError, match="assigns something new"):
        trainer.run(batches(5))
    assert torch.equal(model.mean, seen[-1])
    assert all(p.grad is None for p in model.parameters())


def test_sparse_batches():
    with pytest.raises(
        ValueError, match=r"a batch has a sparse or nested tensor of shape \(6, 4\), whose memory layout varies"
    ):
        run(True, data=[(x.to_sparse(), y) for x, y in pairs()], model_transform=None, loss_fn=cross_entropy)
