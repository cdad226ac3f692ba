"""`capture=True` gives the same numbers as a run without graphs, bit for bit.

The graphs are those of a stand-in that treats memory as CUDA graphs do (``fake_graphs.py``).
Tests on a device are in ``tests/gpu``.
"""

import pytest
import torch
from captured_runs import LEARNING_RATE, OPTIMIZERS, assert_same, labelled_batches, network, train
from fake_graphs import FakeCapturer
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim import Adagrad, AdamW
from toys import batches, linear, same, trainer_of, weights

from camshaft import (
    CheckpointRotation,
    Events,
    create_trainer,
    seed_everything,
)
from camshaft.testing import assert_resumes_exactly


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("clip", [None, 0.5])
def test_every_optimizer(optimizer, clip):
    graphs = 1 + (clip is not None) + (optimizer != "Adagrad")
    assert_same(graphs, optimizer=optimizer, clip_grad_norm=clip)


@pytest.mark.parametrize("amp", [None, "bf16", "fp16"])
@pytest.mark.parametrize(("steps", "partial", "graphs"), [(1, "step", 2), (2, "step", 4), (3, "step", 4), (3, "drop", 3)])
def test_every_window_and_precision(amp, steps, partial, graphs):
    """The first batch of a window, later batches, and a shorter last window each have their own graphs."""
    assert_same(graphs, amp=amp, accumulation_steps=steps, partial_window=partial)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_smaller_last_batch(steps):
    assert_same({1: 3, 2: 4, 3: 5}[steps], accumulation_steps=steps, data=labelled_batches((6, 6, 6, 6, 4)), epochs=8)


def test_a_rare_shape_runs_without_a_graph():
    assert_same(2, data=labelled_batches((6, 6, 6, 6, 4)), epochs=3)
    assert FakeCapturer.replays == (12 - 3) + (15 - 3)


@pytest.mark.parametrize("weight", ["samples", lambda batch: batch[0].abs().sum(), lambda batch: 2.0 * len(batch[0])])
@pytest.mark.parametrize("steps", [1, 2])
def test_weighted_batches(weight, steps):
    data = labelled_batches((6, 6, 6, 4, 6))
    expected, found = (train(capture, loss_weight=weight, accumulation_steps=steps, data=data) for capture in (False, True))
    assert same(expected, found)
    assert FakeCapturer.captures > 1


@pytest.mark.parametrize("optimizer", ["SGD", "SGD fused", "AdamW fused"])
@pytest.mark.parametrize("every", ["step", "epoch"])
@pytest.mark.filterwarnings("ignore:capture=True. the optimizer step .* more than 16 input signatures")
def test_learning_rate_schedules(optimizer, every):
    """A learning rate on the device needs one graph. A rate that is a number needs one graph per value that is used often."""
    halving = lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)  # noqa: E731
    graphs = 2 if optimizer != "SGD" else {"step": 1, "epoch": 7}[every]
    assert_same(graphs, optimizer=optimizer, scheduler=halving, schedule_every=every)


def test_a_learning_rate_that_is_a_tensor():
    def prepare(trainer):
        trainer.primary.optimizers[0].param_groups[0]["lr"] = torch.tensor(LEARNING_RATE)

    assert_same(2, prepare=prepare)


def test_a_custom_objective_with_named_losses():
    def compute_loss(model, batch):
        fit = cross_entropy(model(batch["x"]), batch["y"])
        size = sum(p.square().sum() for p in model.parameters())
        return {"loss": fit + 0.125 * size, "fit": fit, "size": size}

    assert_same(2, loss_fn=None, compute_loss=compute_loss, data=[{"x": x, "y": y} for x, y in labelled_batches()])


def test_a_captured_run_equals_a_loop_written_by_hand():
    model = network()
    optimizer = AdamW(model.parameters(), lr=torch.tensor(0.001), fused=True)
    torch.manual_seed(3)
    for _ in range(6):
        for x, y in labelled_batches():
            optimizer.zero_grad()
            cross_entropy(model(x), y).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
    captured = network()
    optimizer = AdamW(captured.parameters(), lr=0.001, fused=True, capturable=True)
    torch.manual_seed(3)
    create_trainer(captured, optimizer, cross_entropy, capture=True, clip_grad_norm=0.5).run(labelled_batches(), max_epochs=6)
    assert same(weights(model), weights(captured))
    assert optimizer.param_groups[0]["lr"] == 0.001


def test_tensors_kept_from_an_iteration_do_not_change():
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
def test_a_resumed_captured_run_is_bit_identical(steps, amp):
    def make_run(folder):
        seed_everything(0)
        model = network()
        optimizer = AdamW(model.parameters(), lr=0.01, fused=True, capturable=True)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 30)
        trainer = create_trainer(
            model,
            optimizer,
            cross_entropy,
            capture=True,
            amp=amp,
            accumulation_steps=steps,
            clip_grad_norm=0.5,
            scheduler=cosine,
        )
        CheckpointRotation(folder).attach(trainer)
        return trainer, lambda: trainer.run(labelled_batches(), max_epochs=4)

    assert_resumes_exactly(make_run, stops=[1, 3, 4, 5, 7, 8, 12, 20, 27])
    assert FakeCapturer.captures > 0


def test_explain_shows_what_is_captured():
    model = linear()
    assert "SGD, as CUDA graphs\n" in trainer_of(capture=True).explain()
    assert (
        "as CUDA graphs (except the optimizer step)" in trainer_of(model, Adagrad(model.parameters()), capture=True).explain()
    )
    assert "graph" not in trainer_of().explain()


def test_the_speed_report_suggests_capture():
    assert "create_trainer(..., capture=True)\n      each operation of a step" in trainer_of().explain(speed=True)
    assert "create_trainer(..., capture=True)" in trainer_of(capture=True).explain(speed=True).split("enabled already:")[1]
