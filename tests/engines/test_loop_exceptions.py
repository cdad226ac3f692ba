"""Exceptions in the loop: they reach every handler, and the trainer can run again afterwards."""

import contextlib

import pytest
from ignite.engine import Engine, Events

INSIDE = [
    Events.GET_BATCH_STARTED,
    Events.GET_BATCH_COMPLETED,
    Events.ITERATION_STARTED,
    Events.ITERATION_COMPLETED,
    Events.DATALOADER_STOP_ITERATION,
]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("event", [Events.STARTED, Events.EPOCH_STARTED, *INSIDE[:4], Events.EPOCH_COMPLETED, Events.COMPLETED])
def test_every_handler_of_an_exception_runs_before_it_is_raised(event, error, engine):
    errors = []
    engine.add_event_handler(Events.EXCEPTION_RAISED, lambda e, err: errors.append(("first", err)))
    engine.add_event_handler(Events.EXCEPTION_RAISED, lambda err: errors.append(("second", err)))

    def fail():
        raise error("broken")

    engine.add_event_handler(event, fail)
    with pytest.raises(error, match="broken") as caught:
        engine.run(range(3))
    assert errors == [("first", caught.value), ("second", caught.value)]


def test_a_note_on_the_exception_names_the_epoch_and_the_iteration(engine):
    def fail():
        raise ValueError("broken")

    engine.add_event_handler(Events.ITERATION_COMPLETED(once=5), fail)
    with pytest.raises(ValueError, match="broken") as caught:
        engine.run(range(3), max_epochs=2)
    assert caught.value.__notes__ == ["camshaft: in epoch 2, iteration 5"]


def test_a_failing_exception_handler_hides_neither_the_error_nor_other_handlers(engine):
    errors = []

    def fail_again(error):
        raise OSError("disk full")

    def fail():
        raise ValueError("broken")

    engine.add_event_handler(Events.EXCEPTION_RAISED, fail_again)
    engine.add_event_handler(Events.EXCEPTION_RAISED, lambda error: errors.append(error))
    engine.add_event_handler(Events.ITERATION_STARTED, fail)
    with pytest.raises(ValueError, match="broken") as caught:
        engine.run(range(3))
    assert errors == [caught.value]
    assert any("disk full" in note for note in caught.value.__notes__)


def test_an_exception_of_the_data_is_raised(engine):
    def broken():
        yield 0
        raise OSError("no such file")

    with pytest.raises(OSError, match="no such file") as caught:
        engine.run(broken())
    assert caught.value.__notes__ == ["camshaft: in epoch 1, iteration 1"]


@pytest.mark.parametrize("iteration", [1, 2, 3, 4, 5, 6])
def test_a_run_after_an_exception_matches_one_after_terminate(iteration, engine):
    """Ignite's engine cannot run again after an exception, but it can after ``terminate()``."""

    def script(engine, stop):
        stopped = []

        @engine.on(Events.ITERATION_COMPLETED(once=iteration))
        def once(engine):
            if not stopped:
                stopped.append(True)
                stop(engine)

        with contextlib.suppress(ValueError):
            engine.run(range(3), max_epochs=2)
        engine.calls = []
        engine.add_event_handler(Events.ITERATION_COMPLETED, lambda e: e.calls.append((e.state.epoch, e.state.batch)))
        engine.run(range(3), max_epochs=2)

    def fail(engine):
        raise ValueError("broken")

    ignite_engine = Engine(lambda engine, batch: batch)
    script(ignite_engine, Engine.terminate)
    script(engine, fail)
    assert engine.calls == ignite_engine.calls
    assert engine.calls[-3:] == [(2, 0), (2, 1), (2, 2)]
