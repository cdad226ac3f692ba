"""The loop behaves as that of Ignite: the same script fires the same events on both engines."""

import itertools

import pytest
from ignite.engine import Engine, Events
from loop_engines import make_loop

from camshaft.engines.loop import LoopEngine

LOGGED = [event for event in Events if event is not Events.EXCEPTION_RAISED]


class Endless:
    """An iterable without a length."""

    def __init__(self, length):
        self.length = length

    def __iter__(self):
        return iter(range(self.length))


def run_and_record(engine, script):
    """Runs a script on an engine. Returns every event with its epoch and iteration, and the final state."""
    log = []
    for event in LOGGED:
        engine.add_event_handler(
            event, lambda e, *_, name=event.name, **__: log.append((name, e.state.epoch, e.state.iteration))
        )
    script(engine)
    state = engine.state
    return log, (state.epoch, state.iteration, state.epoch_length, state.max_epochs, state.max_iters)


def run_on_both(script, engine):
    """The records of a script on Ignite's engine and on another engine."""
    return run_and_record(Engine(lambda engine, batch: batch), script), run_and_record(engine, script)


RUNS = {
    "two epochs": lambda e: e.run(range(3), max_epochs=2),
    "shorter epochs than data": lambda e: e.run(range(5), max_epochs=3, epoch_length=3),
    "longer epochs than data": lambda e: e.run(range(3), max_epochs=2, epoch_length=4),
    "twice the data": lambda e: e.run(range(2), max_epochs=2, epoch_length=4),
    "max_iters in an epoch": lambda e: e.run(range(3), max_iters=5),
    "max_iters at an epoch's end": lambda e: e.run(range(3), max_iters=6),
    "max_iters of one": lambda e: e.run(range(3), max_iters=1),
    "max_iters with epoch_length": lambda e: e.run(range(3), max_iters=7, epoch_length=4),
    "no data": lambda e: e.run(epoch_length=2, max_epochs=2),
    "no data, max_iters": lambda e: e.run(epoch_length=2, max_iters=3),
    "unknown length": lambda e: e.run(Endless(3), max_epochs=2),
    "unknown length, max_iters": lambda e: e.run(Endless(3), max_iters=5),
    "unknown length, epoch_length": lambda e: e.run(Endless(5), max_epochs=2, epoch_length=3),
    "a generator": lambda e: e.run((i for i in range(4)), max_epochs=1),
    "a generator over epochs": lambda e: e.run((i for i in range(6)), max_epochs=2, epoch_length=3),
    "an infinite generator": lambda e: e.run(itertools.count(), max_epochs=2, epoch_length=3),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_fires_the_same_events_as_ignite(name, engine):
    expected, found = run_on_both(RUNS[name], engine)
    assert found == expected


def at(event, what):
    """A script that acts on an event of the second epoch."""

    def script(engine):
        done = []

        def act(engine, *_):
            if engine.state.epoch == 2 and not done:
                done.append(True)
                what(engine)

        engine.add_event_handler(event, act)
        engine.run(range(3), max_epochs=3, epoch_length=4)

    return script


INSIDE = [
    Events.GET_BATCH_STARTED,
    Events.GET_BATCH_COMPLETED,
    Events.ITERATION_STARTED,
    Events.ITERATION_COMPLETED,
    Events.DATALOADER_STOP_ITERATION,
]


STOPS = {
    "terminate": lambda e: e.terminate(),
    "terminate without COMPLETED": lambda e: e.terminate(skip_completed=True),
    "terminate_epoch": lambda e: e.terminate_epoch(),
    "terminate_epoch without EPOCH_COMPLETED": lambda e: e.terminate_epoch(skip_epoch_completed=True),
}


@pytest.mark.parametrize("event", INSIDE, ids=lambda event: event.name)
@pytest.mark.parametrize("what", STOPS)
def test_stopping_inside_an_epoch_matches_ignite(what, event, engine):
    expected, found = run_on_both(at(event, STOPS[what]), engine)
    assert found == expected


@pytest.mark.parametrize("event", [Events.EPOCH_STARTED, Events.EPOCH_COMPLETED], ids=lambda event: event.name)
@pytest.mark.parametrize("what", ["terminate", "terminate without COMPLETED"])
def test_terminating_at_the_start_or_end_of_an_epoch_matches_ignite(what, event, engine):
    expected, found = run_on_both(at(event, STOPS[what]), engine)
    assert found == expected


def test_terminate_on_started_runs_no_iteration(engine):
    def script(engine):
        engine.add_event_handler(Events.STARTED, lambda e: e.terminate())
        engine.run(range(3), max_epochs=2)

    expected, found = run_on_both(script, engine)
    assert found == expected
    assert found[1][:2] == (0, 0)


def test_terminate_epoch_on_started_raises(engine):
    engine.add_event_handler(Events.STARTED, lambda e: e.terminate_epoch())
    with pytest.raises(RuntimeError, match="should not be called on"):
        engine.run(range(3))


def test_terminate_single_epoch_passes_the_iteration_of_the_epoch(engine):
    counts = []
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=5), lambda e: e.terminate_epoch())
    engine.add_event_handler(Events.TERMINATE_SINGLE_EPOCH, lambda e, iter_counter: counts.append(iter_counter))
    engine.run(range(3), max_epochs=2)
    assert counts == [2]


@pytest.mark.parametrize("event", [*INSIDE[:4], Events.EPOCH_STARTED, Events.EPOCH_COMPLETED], ids=lambda event: event.name)
def test_an_interrupted_run_continues_at_the_next_batch(event, engine):
    def script(engine):
        at(event, lambda e: e.interrupt())(engine)
        engine.my_stop = engine.state.iteration
        engine.run(range(3), max_epochs=3)

    expected, found = run_on_both(script, engine)
    assert found == expected
    assert found[1][1] == 12


def test_interrupting_at_the_end_of_the_data_requests_each_batch_once(engine):
    """Ignite's engine fires GET_BATCH_STARTED twice for the batch after the interruption."""
    requests = []
    engine.add_event_handler(Events.GET_BATCH_STARTED, lambda e: requests.append(e.state.iteration))
    engine.add_event_handler(Events.DATALOADER_STOP_ITERATION, lambda e: e.interrupt())
    engine.run(range(2), epoch_length=3)
    assert engine.state.iteration == 2
    engine.run()
    assert requests == [0, 1, 2]


def test_interrupting_at_every_iteration_processes_every_batch_once(engine):
    def script(engine):
        engine.seen = []
        engine.add_event_handler(Events.ITERATION_COMPLETED, lambda e: (e.seen.append(e.state.batch), e.interrupt()))
        for _ in range(7):
            engine.run(range(3), max_epochs=2)

    expected, found = run_on_both(script, engine)
    assert found == expected
    assert engine.seen == [0, 1, 2, 0, 1, 2]


def test_set_data_changes_the_batches_but_not_the_epoch(engine):
    seen = []
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=2), lambda e: e.set_data([10, 11, 12]))
    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda e: seen.append(e.state.batch))
    engine.run([0, 1, 2, 3], max_epochs=2)
    assert seen == [0, 1, 10, 11, 12, 10, 11, 12]


def test_a_batch_replaced_on_iteration_started_is_processed():
    engine = LoopEngine(lambda engine, batch: batch + 100)
    seen = []

    @engine.on(Events.ITERATION_STARTED)
    def change(engine):
        engine.state.batch = engine.state.batch * 2

    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda e: seen.append(e.state.output))
    engine.run(range(3))
    assert seen == [100, 102, 104]


def test_data_that_ends_early_warns(engine):
    with pytest.warns(UserWarning, match="can not provide data anymore.*3 vs Total iterations to run : 6"):
        engine.run(iter(range(3)), max_epochs=3, epoch_length=2)
    assert engine.state.iteration == 3


REPEATED = {
    "again from the start": lambda e: (e.run(range(3), max_epochs=2), e.run(range(3), max_epochs=2)),
    "on to a later epoch": lambda e: (e.run(range(3), max_epochs=2), e.run(range(3), max_epochs=4)),
    "on to a later iteration": lambda e: (e.run(range(3), max_iters=4), e.run(range(3), max_iters=8)),
    "max_epochs reset": lambda e: (e.run(range(3), max_epochs=2), setattr(e.state, "max_epochs", None), e.run(range(2))),
}


@pytest.mark.parametrize("name", REPEATED)
def test_a_second_run_matches_ignite(name, engine):
    expected, found = run_on_both(REPEATED[name], engine)
    assert found == expected


@pytest.mark.parametrize("second", [2, 3], ids=["same max_epochs", "one more"])
@pytest.mark.parametrize("stop", [2, 3, 5, 6])
def test_a_run_after_terminate_matches_ignite(stop, second, engine):
    def script(engine):
        engine.add_event_handler(Events.ITERATION_COMPLETED(once=stop), lambda e: e.state.times and terminate_once(e))
        engine.run(range(3), max_epochs=2)
        engine.run(range(3), max_epochs=second)

    def terminate_once(engine):
        if not hasattr(engine, "was_terminated"):
            engine.was_terminated = True
            engine.terminate()

    expected, found = run_on_both(script, engine)
    assert found == expected


WRONG = {
    "both limits": (lambda e: e.run(range(3), max_epochs=1, max_iters=1), ValueError, "mutually exclusive"),
    "no iterable": (lambda e: e.run(3), TypeError, "should be iterable"),
    "no data, no length": (lambda e: e.run(), ValueError, "epoch_length should be provided"),
    "empty data": (lambda e: e.run([]), ValueError, "zero size"),
}


@pytest.mark.parametrize("name", WRONG)
def test_invalid_arguments_raise_the_errors_of_ignite(name, engine):
    call, error, text = WRONG[name]
    with pytest.raises(error, match=text):
        call(engine)


def test_a_smaller_max_epochs_raises(engine):
    engine.run(range(3), max_epochs=3)
    with pytest.raises(ValueError, match="should be greater than or equal to the start"):
        engine.run(range(3), max_epochs=2)


def test_load_state_dict_continues_at_the_iteration():
    engine = make_loop()
    engine.load_state_dict({"epoch_length": 3, "max_epochs": 3, "iteration": 3})
    seen = []
    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda e: seen.append((e.state.epoch, e.state.iteration)))
    engine.run(range(3))
    assert seen == [(2, 4), (2, 5), (2, 6), (3, 7), (3, 8), (3, 9)]


def test_engines_can_be_nested(engine):
    inner, seen = make_loop(), []
    inner.add_event_handler(Events.ITERATION_COMPLETED, lambda: seen.append(1))
    engine.add_event_handler(Events.EPOCH_COMPLETED, lambda: inner.run(range(2)))
    engine.run(range(3), max_epochs=2)
    assert len(seen) == 4


def test_running_inside_its_own_run_raises(engine):
    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda e: e.run(range(2)))
    with pytest.raises(ValueError, match="already executing"):
        engine.run(range(3), max_epochs=2)
