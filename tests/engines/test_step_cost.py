"""The cost of a step, in events, calls, synchronizations and memory. The benchmarks measure time."""

from __future__ import annotations

import gc
import tracemalloc
import weakref
from collections import Counter
from unittest import mock

import pytest
import torch
from ignite.engine import Events
from torch import nn

from camshaft import (
    ExponentialMovingAverage,
    LRHistory,
    NonFiniteGuard,
    Progress,
    StepEvents,
    create_trainer,
)
from camshaft.engines.fire import no_handlers

SYNCING_METHODS = ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__", "nonzero")
"""Tensor methods that make the host wait for the device."""
BATCHES = 12


def make(**options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    if options.pop("scheduled", False):
        options["scheduler"] = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.99)
    data = [(torch.randn(3, 4), torch.randn(3, 2)) for _ in range(BATCHES)]
    return create_trainer(model, optimizer, nn.functional.mse_loss, **options), data


class SyncCounter:
    """Counts the calls, on any tensor, of methods that make the host wait for the device."""

    def __init__(self):
        self.counted = Counter()
        self._patches = [mock.patch.object(torch.Tensor, name, self._counting(name)) for name in SYNCING_METHODS]

    def _counting(self, name):
        original = getattr(torch.Tensor, name)

        def counting(tensor, *args, **kwargs):
            self.counted[name] += 1
            return original(tensor, *args, **kwargs)

        return counting

    def __enter__(self):
        for patch in self._patches:
            patch.start()
        return self.counted

    def __exit__(self, *_):
        for patch in self._patches:
            patch.stop()


def syncs_of_an_epoch(trainer, data):
    """The synchronizations inside the iterations of an epoch. Those before and after are not counted."""
    waits = SyncCounter()
    trainer.add_event_handler(Events.EPOCH_STARTED, waits.__enter__)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, waits.__exit__)
    trainer.run(data)
    return waits.counted


@pytest.fixture
def fired(monkeypatch):
    """The names of the events that trainers fire, in order."""
    from camshaft.engines.loop import LoopEngine

    names, original = [], LoopEngine._fire_event

    def recording(engine, event, *args, **kwargs):
        names.append(getattr(event, "name", event))
        return original(engine, event, *args, **kwargs)

    monkeypatch.setattr(LoopEngine, "_fire_event", recording)
    return names


def test_an_iteration_without_handlers_fires_nothing(fired):
    trainer, data = make()
    trainer.run(data)
    inside = {event.name for event in StepEvents} | {"ITERATION_STARTED", "ITERATION_COMPLETED", "GET_BATCH_STARTED"}
    assert not inside & set(fired)
    assert fired.count("EPOCH_COMPLETED") == 1


def test_only_an_event_with_a_handler_fires(fired):
    trainer, data = make(accumulation_steps=4)
    trainer.add_event_handler(StepEvents.GRADIENTS_CLIPPED, lambda: None)
    trainer.run(data)
    counts = Counter(name for name in fired if name in StepEvents.__members__)
    assert counts == {"GRADIENTS_CLIPPED": BATCHES // 4}


def test_a_removed_handler_leaves_no_cost(fired):
    trainer, data = make()
    handle = trainer.add_event_handler(StepEvents.FORWARD_STARTED, lambda: None)
    handle.remove()
    trainer.run(data)
    assert "FORWARD_STARTED" not in fired


def test_events_without_handlers_fire_one_shared_function():
    trainer, _ = make()
    known = vars(trainer.fire)
    assert {event.value for event in [*StepEvents, *Events]} <= set(known)
    assert {known[event.value] for event in StepEvents} == {no_handlers}


@pytest.mark.parametrize(("event", "calls"), [(StepEvents.GRADIENTS_READY, BATCHES), (StepEvents.GRADIENTS_READY(every=5), 2)])
def test_a_handler_is_called_only_if_its_filter_matches(event, calls):
    trainer, data = make()
    seen = []
    trainer.add_event_handler(event, lambda: seen.append(1))
    trainer.run(data)
    assert len(seen) == calls


def test_a_count_filter_needs_no_function_call():
    trainer, data = make()
    event = StepEvents.GRADIENTS_READY(every=5)
    filter_calls, original = [], event.filter
    trainer.add_event_handler(event, lambda: None)
    listener = trainer._event_handlers[event][0][0]
    listener.test = lambda engine, clock: filter_calls.append(clock) or original(engine, clock)
    trainer.run(data)
    assert filter_calls == []


def test_a_batch_on_the_device_is_not_moved(monkeypatch):
    trainer, data = make()
    moved, original = [], torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *args, **kwargs: moved.append(1) or original(self, *args, **kwargs))
    trainer.run(data)
    assert moved == []


def test_training_mode_is_set_only_once():
    trainer, data = make()
    model, calls = trainer.primary.module.eval(), []
    with mock.patch.object(nn.Sequential, "train", lambda self, mode=True: calls.append(1) or nn.Module.train(self, mode)):
        trainer.run(data, max_epochs=2)
    assert model.training
    assert len(calls) == 1


def test_a_step_does_not_synchronize_with_the_device():
    trainer, data = make(clip_grad_norm=1.0, scheduled=True, accumulation_steps=2)
    LRHistory().attach(trainer)
    assert syncs_of_an_epoch(trainer, data) == {}


def test_averaging_weights_does_not_synchronize_with_the_device():
    trainer, data = make()
    ExponentialMovingAverage(0.9).attach(trainer)
    assert syncs_of_an_epoch(trainer, data) == {}


def test_the_counter_detects_a_synchronization():
    trainer, data = make()
    trainer.add_event_handler(StepEvents.BACKWARD_COMPLETED, lambda engine: float(engine.state.loss))
    assert syncs_of_an_epoch(trainer, data)["__float__"] == BATCHES


@pytest.mark.parametrize("amp", ["fp16", None])
def test_scaler_and_guard_share_one_transfer_per_optimizer_step(amp):
    trainer, data = make(amp=amp, accumulation_steps=3, clip_grad_norm=1.0)
    NonFiniteGuard("skip").attach(trainer)
    waits = syncs_of_an_epoch(trainer, data)
    assert waits["tolist"] == BATCHES // 3


def test_the_progress_bar_reads_the_loss_only_when_it_refreshes():
    trainer, data = make()
    Progress(every_seconds=1e9, file=mock.MagicMock()).attach(trainer)
    assert sum(syncs_of_an_epoch(trainer, data).values()) <= 1


@pytest.mark.slow
def test_memory_does_not_grow_over_ten_thousand_iterations():
    trainer, data = make(clip_grad_norm=1.0, scheduled=True, accumulation_steps=2)
    ExponentialMovingAverage(0.9).attach(trainer)
    NonFiniteGuard().attach(trainer)
    held = {}

    @trainer.on(Events.ITERATION_COMPLETED(once=[1_000, 10_999]))
    def record(engine):
        gc.collect()
        held[engine.state.iteration] = tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        trainer.run(data, max_iters=11_000)
    finally:
        tracemalloc.stop()
    assert held[10_999] - held[1_000] < 40_000  # one number kept per step would make 120,000


def test_the_learning_rate_history_uses_sixteen_bytes_per_step():
    trainer, data = make()
    history = LRHistory().attach(trainer)
    trainer.run(data, max_epochs=100)
    held = [*history._steps.values(), *history._rates.values()]
    assert sum(column.itemsize * len(column) for column in held) == 16 * BATCHES * 100


def test_the_autograd_graph_is_freed_after_each_iteration():
    trainer, data = make(clip_grad_norm=1.0)
    ExponentialMovingAverage(0.9).attach(trainer)
    NonFiniteGuard().attach(trainer)
    graph, alive = [], []

    @trainer.on(StepEvents.FORWARD_COMPLETED)
    def record(engine):
        alive.extend(reference() is not None for reference in graph)
        state = engine.state
        graph[:] = [weakref.ref(state.loss), weakref.ref(state.y_pred)]

    trainer.run(data)
    assert alive == [False] * 2 * (BATCHES - 1)
    assert [reference() for reference in graph] == [None] * 2


def test_the_state_between_iterations_has_no_graph():
    trainer, data = make()
    requires_grad = []

    @trainer.on(Events.ITERATION_COMPLETED)
    def record(engine):
        state = engine.state
        requires_grad.extend(tensor.requires_grad for tensor in (state.x, state.y, state.y_pred, state.loss, state.output))

    trainer.run(data)
    assert requires_grad == [False] * 5 * BATCHES
