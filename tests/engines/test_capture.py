"""``capture=True``: the same numbers as without, bit for bit, whatever listens; and an error where a graph would lie.

Graphs are recorded by a stand-in that treats memory as CUDA's do (``tapes.py``); what needs a device is in ``tests/gpu``.
"""

import random

import numpy as np
import pytest
import torch
from captured import OPTIMIZERS, RATE, _taped, assert_same, network, pairs, run  # noqa: F401
from tapes import TapeRecorder
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.optim import Adagrad, AdamW
from toys import batches, linear, same, sgd, trainer_of, weights

from camshaft import (
    CheckpointRotation,
    Events,
    ExponentialMovingAverage,
    FreezeParameters,
    GradientClipping,
    Handler,
    NonFiniteGuard,
    StepEvents,
    TensorBoard,
    create_trainer,
    on,
    seed_everything,
)
from camshaft.cudagraphs import graphs as recordings
from camshaft.testing import assert_resumes_exactly

# -- the numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("clip", [None, 0.5])
def test_optimizers(optimizer, clip):
    graphs = 1 + (clip is not None) + (optimizer != "Adagrad")
    assert_same(graphs, optimizer=optimizer, clip_grad_norm=clip)


@pytest.mark.parametrize("amp", [None, "bf16", "fp16"])
@pytest.mark.parametrize(("steps", "partial", "graphs"), [(1, "step", 2), (2, "step", 4), (3, "step", 4), (3, "drop", 3)])
def test_windows_and_precisions(amp, steps, partial, graphs):
    """A first and a later batch of a window are recorded apart, and so is the last window of an epoch, if it is shorter."""
    assert_same(graphs, amp=amp, accumulation_steps=steps, partial_window=partial)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_last_batch_that_is_smaller(steps):
    assert_same({1: 3, 2: 4, 3: 5}[steps], accumulation_steps=steps, data=pairs((6, 6, 6, 6, 4)), epochs=8)


def test_a_shape_that_comes_too_seldom_runs_without_a_graph():
    assert_same(2, data=pairs((6, 6, 6, 6, 4)), epochs=3)
    assert TapeRecorder.replays == (12 - 3) + (15 - 3)


@pytest.mark.parametrize("weight", ["samples", lambda batch: batch[0].abs().sum(), lambda batch: 2.0 * len(batch[0])])
@pytest.mark.parametrize("steps", [1, 2])
def test_weights_of_batches(weight, steps):
    data = pairs((6, 6, 6, 4, 6))
    expected, found = (run(capture, loss_weight=weight, accumulation_steps=steps, data=data) for capture in (False, True))
    assert same(expected, found)
    assert TapeRecorder.made > 1


@pytest.mark.parametrize("optimizer", ["SGD", "SGD fused", "AdamW fused"])
@pytest.mark.parametrize("every", ["step", "epoch"])
@pytest.mark.filterwarnings("ignore:capture=True. the optimizer step .* more than 16 input signatures")
def test_schedules(optimizer, every):
    """A rate that is read on the device is recorded once, another one anew when it has come often enough."""
    halving = lambda made: torch.optim.lr_scheduler.ExponentialLR(made, 0.5)  # noqa: E731
    graphs = 2 if optimizer != "SGD" else {"step": 1, "epoch": 7}[every]
    assert_same(graphs, optimizer=optimizer, scheduler=halving, schedule_every=every)


def test_a_rate_that_is_a_tensor_already():
    def prepare(trainer):
        trainer.primary.optimizers[0].param_groups[0]["lr"] = torch.tensor(RATE)

    assert_same(2, prepare=prepare)


def test_an_objective_of_ones_own_with_named_losses():
    def compute_loss(model, batch):
        fit = cross_entropy(model(batch["x"]), batch["y"])
        size = sum(p.square().sum() for p in model.parameters())
        return {"loss": fit + 0.125 * size, "fit": fit, "size": size}

    assert_same(2, loss_fn=None, compute_loss=compute_loss, data=[{"x": x, "y": y} for x, y in pairs()])


def test_against_the_loop_by_hand():
    model = network()
    optimizer = AdamW(model.parameters(), lr=torch.tensor(0.001), fused=True)
    torch.manual_seed(3)
    for _ in range(6):
        for x, y in pairs():
            optimizer.zero_grad()
            cross_entropy(model(x), y).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
    captured = network()
    made = AdamW(captured.parameters(), lr=0.001, fused=True, capturable=True)
    torch.manual_seed(3)
    create_trainer(captured, made, cross_entropy, capture=True, clip_grad_norm=0.5).run(pairs(), max_epochs=6)
    assert same(weights(model), weights(captured))
    assert made.param_groups[0]["lr"] == 0.001


# -- what listens ---------------------------------------------------------------------------------------------------------


def test_the_events_outside_fire_in_their_order():
    def cycle(capture):
        trainer = trainer_of(capture=capture, accumulation_steps=2)
        fired = []
        for event in StepEvents:
            if event.name not in ("FORWARD_COMPLETED", "BACKWARD_STARTED"):
                trainer.add_event_handler(event, lambda engine, e=event: fired.append((e.name, engine.state.optimizer_step)))
        trainer.run(batches(5), max_epochs=4)
        return fired

    assert cycle(True) == cycle(False)
    assert TapeRecorder.made > 0


class Listens(Handler):
    @on(StepEvents.BACKWARD_STARTED)
    def listen(self, engine):
        """Never called."""


@pytest.mark.parametrize(
    "add",
    [
        lambda trainer: trainer.add_event_handler(StepEvents.FORWARD_COMPLETED, print),
        lambda trainer: trainer.on(StepEvents.BACKWARD_STARTED(every=10))(print),
        lambda trainer: trainer.on(StepEvents.GRADIENTS_READY | StepEvents.FORWARD_COMPLETED)(print),
        lambda trainer: trainer.on(StepEvents.FORWARD_COMPLETED(phase="model"))(print),
        lambda trainer: Listens().attach(trainer),
    ],
)
def test_nobody_listens_inside_a_graph(add):
    with pytest.raises(ValueError, match=r"(FORWARD_COMPLETED|BACKWARD_STARTED) is inside the CUDA graph of capture=True"):
        add(trainer_of(capture=True))


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
def test_what_a_handler_does_to_the_gradients_counts(change, moment, steps):
    def prepare(trainer):
        @trainer.on(StepEvents[moment](every=3))
        def changes(engine):
            change(engine)

    options = {"prepare": prepare, "clip_grad_norm": 0.5, "accumulation_steps": steps, "optimizer": "SGD"}
    expected, found = (run(capture, **options) for capture in (False, True))
    assert same(expected, found)
    assert TapeRecorder.made >= 3


def test_handlers_of_the_package(tmp_path):
    averages = []

    def prepare(trainer):
        NonFiniteGuard("skip").attach(trainer)
        TensorBoard(tmp_path / str(len(averages)), every=2).attach(trainer)
        averages.append(ExponentialMovingAverage(0.5).attach(trainer))

    assert_same(5, prepare=prepare, accumulation_steps=2, clip_grad_norm=0.5, clip_grad_value=0.125)
    assert same(*(weights(average.module) for average in averages))


def test_a_non_finite_gradient_is_refused_and_forgotten():
    data = pairs()
    data[5][0][0] = float("nan")
    trainers = []

    def prepare(trainer):
        NonFiniteGuard("skip").attach(trainer)
        trainers.append(trainer)
        for part in trainer.primary.module:  # a running mean would keep the NaN
            part.track_running_stats = False

    expected, found = (run(capture, prepare=prepare, data=data) for capture in (False, True))
    finite = [[torch.nan_to_num(value) for value in values] for values in (expected, found)]
    assert same(*finite)
    assert [trainer.state.skipped_steps for trainer in trainers] == [6, 6]
    assert TapeRecorder.made == 2


@pytest.mark.parametrize("until", [{"until_step": 17}, {"until_epoch": 4}])
def test_parameters_that_train_later(until):
    """The graphs that don't train them are thrown away then."""
    prepare = lambda trainer: FreezeParameters("0.*", **until).attach(trainer)  # noqa: E731
    assert_same(4, prepare=prepare)


def test_a_hook_of_the_optimizer_is_called_at_each_step():
    calls = []

    def prepare(trainer):
        trainer.primary.optimizers[0].register_step_post_hook(lambda *_: calls.append(1))

    assert_same(1, prepare=prepare)
    assert len(calls) == 2 * 6 * 7


def test_batches_that_train_other_parameters():
    """Graphs know the gradients of one set of parameters; a batch that trains another set runs without them."""

    def compute_loss(model, batch):
        x, y = batch
        return cross_entropy(model(x), y) if len(x) == 6 else model[0](x).square().mean()

    options = {"loss_fn": None, "compute_loss": compute_loss, "data": pairs((6, 6, 6, 6, 4)), "epochs": 9}
    assert_same(3, **options)  # one that is thrown away


# -- what is kept ---------------------------------------------------------------------------------------------------------


def test_what_was_kept_of_an_iteration_stays_as_it_was():
    losses, outputs = [], []
    trainer = trainer_of(capture=True, optimizer=None)

    @trainer.on(Events.ITERATION_COMPLETED)
    def keep(engine):
        losses.append((engine.state.loss, float(engine.state.loss)))
        outputs.append((engine.state.y_pred, engine.state.y_pred.clone()))

    trainer.run(batches(8), max_epochs=2)
    assert [float(loss) for loss, _ in losses] == [value for _, value in losses]
    assert len({value for _, value in losses}) == 16
    assert all(torch.equal(output, copy) for output, copy in outputs)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("amp", [None, "fp16"])
def test_a_resumed_run_is_the_same_bit_for_bit(steps, amp):
    def make_run(folder):
        seed_everything(0)
        model = network()
        made = AdamW(model.parameters(), lr=0.01, fused=True, capturable=True)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(made, 30)
        trainer = create_trainer(
            model, made, cross_entropy, capture=True, amp=amp, accumulation_steps=steps, clip_grad_norm=0.5, scheduler=cosine
        )
        CheckpointRotation(folder).attach(trainer)
        return trainer, lambda: trainer.run(pairs(), max_epochs=4)

    assert_resumes_exactly(make_run, stops=[1, 3, 4, 5, 7, 8, 12, 20, 27])
    assert TapeRecorder.made > 0


# -- errors ---------------------------------------------------------------------------------------------------------------


def test_a_device_without_graphs(monkeypatch):
    monkeypatch.delitem(recordings.CAPTURERS, "cpu")
    with pytest.raises(
        ValueError, match="capture=True records CUDA graphs: the model must be on a CUDA device, but it is on cpu"
    ):
        trainer_of(capture=True)


def test_an_argument_that_is_no_flag():
    with pytest.raises(TypeError, match="capture must be True or False, got 'graph'"):
        trainer_of(capture="graph")


def test_an_optimizer_that_was_not_made_for_it():
    model = linear()
    with pytest.raises(ValueError, match=r"make it with AdamW\(\.\.\., capturable=True\)"):
        trainer_of(model, AdamW(model.parameters()), capture=True)


def failing(loss_fn, data=None):
    trainer_of(loss_fn=loss_fn, capture=True).run(data or batches(5), max_epochs=2)


def test_a_loss_that_waits_for_the_device():
    with pytest.raises(
        RuntimeError, match=r"the forward and backward pass of phase 'model' can't be captured.*not permitted"
    ) as caught:
        failing(lambda y_pred, y: mse_loss(y_pred, y) * y_pred.max().item())
    assert "in epoch 1, iteration 4" in "".join(caught.value.__notes__)


@pytest.mark.parametrize("draw", [random.random, lambda: float(np.random.rand())])
def test_a_loss_that_draws_on_the_host(draw):
    with pytest.raises(RuntimeError, match="draws random numbers on the host, which a graph would repeat"):
        failing(lambda y_pred, y: mse_loss(y_pred, y) * draw())


def test_a_batch_that_is_partly_elsewhere():
    trainer = trainer_of(capture=True, prepare_batch=lambda batch, **_: ((batch[0], torch.empty(2, device="meta")), batch[1]))
    trainer.primary.objective.model_transform = None
    trainer.primary.objective.model = lambda x: trainer.primary.module(x[0])
    with pytest.raises(ValueError, match=r"whole batch on cpu, but a tensor of shape \(2,\) is on meta"):
        trainer.run(batches(5))


def test_something_in_a_batch_that_cannot_be_compared():
    compute_loss = lambda model, batch: mse_loss(model(batch["x"]), batch["y"])  # noqa: E731
    model = linear()
    trainer = create_trainer(model, sgd(model), None, compute_loss=compute_loss, capture=True)
    with pytest.raises(TypeError, match="a set in a batch can't be compared with that of the next; make it a tensor"):
        trainer.run([{"x": x, "y": y, "tags": {1}} for x, y in batches()])


def test_too_many_forms_run_without_a_graph_and_say_so_once():
    data = pairs(tuple(range(2, 30)) + (6,) * 6)
    with pytest.warns(
        UserWarning, match=r"forward and backward pass of phase 'model' has more than 16 input signatures"
    ) as caught:
        found = run(True, data=data, epochs=2)
    assert len(caught) == 1
    assert same(run(False, data=data, epochs=2), found)
    assert TapeRecorder.made == 2


def test_the_cycle_says_what_is_captured():
    model = linear()
    assert "SGD, as CUDA graphs\n" in trainer_of(capture=True).explain()
    assert (
        "as CUDA graphs (except the optimizer step)" in trainer_of(model, Adagrad(model.parameters()), capture=True).explain()
    )
    assert "graph" not in trainer_of().explain()


def test_a_clipping_of_ones_own_is_called_at_each_step():
    calls = []
    prepare = lambda trainer: GradientClipping(function=lambda parameters: calls.append(1)).attach(trainer)  # noqa: E731
    assert_same(3, prepare=prepare)
    assert len(calls) == 2 * 6 * 7


def test_what_would_make_a_run_faster_names_it():
    assert "create_trainer(..., capture=True)\n      each operation of a step" in trainer_of().explain(speed=True)
    assert "create_trainer(..., capture=True)" in trainer_of(capture=True).explain(speed=True).split("taken already:")[1]


def test_a_model_on_two_devices():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2, device="meta"))
    with pytest.raises(ValueError, match=r"capture=True is for a model on one device, but 1\.weight is on meta"):
        trainer_of(model, capture=True)


def test_one_group_of_the_optimizer_was_not_made_for_it():
    model = linear()
    groups = [{"params": [model.weight], "capturable": True}, {"params": [model.bias]}]
    with pytest.raises(ValueError, match=r"make it with AdamW\(\.\.\., capturable=True\)"):
        trainer_of(model, AdamW(groups, fused=True), capture=True)


def waits(y_pred, y):
    return mse_loss(y_pred, y) * y_pred.max().item()


def test_an_error_names_what_spoilt_the_recording_and_not_what_came_before():
    try:
        raise KeyError("some other trouble")
    except KeyError:
        with pytest.raises(RuntimeError, match="can't be captured as a CUDA graph: operation not permitted"):
            failing(waits)


class SpoiltTwice(TapeRecorder):
    """Where a recording fails, its end fails too."""

    def __call__(self, work):
        try:
            return super().__call__(work)
        except RuntimeError:
            raise RuntimeError("the end of a recording that was spoilt")  # noqa: B904


class Full(TapeRecorder):
    """A device whose memory gives out."""

    def __call__(self, work):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")


def test_the_end_of_a_recording_hides_nothing(monkeypatch):
    monkeypatch.setitem(recordings.CAPTURERS, "cpu", SpoiltTwice)
    with pytest.raises(RuntimeError, match="can't be captured as a CUDA graph: operation not permitted"):
        failing(waits)


def test_memory_that_gives_out_is_said_as_it_is(monkeypatch):
    monkeypatch.setitem(recordings.CAPTURERS, "cpu", Full)
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate 2 GiB"):
        failing(mse_loss)
