"""The loop does what Ignite's own does: the same script on both gives the same log of events."""

import contextlib
import functools
import itertools

import pytest
import torch
from ignite.engine import Engine, Events
from ignite.engine.events import EventEnum
from ignite.handlers import BasicTimeProfiler, HandlersTimeProfiler

from camshaft import create_trainer
from camshaft.engines.loop import LoopEngine

LOGGED = [event for event in Events if event is not Events.EXCEPTION_RAISED]


def make_loop():
    return LoopEngine(lambda engine, batch: batch)


def make_trainer():
    """A trainer that takes any batch, ``None`` included."""
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return create_trainer(model, optimizer, None, compute_loss=lambda model, batch: model(torch.ones(1, 1)).sum())


MAKERS = {"loop": make_loop, "trainer": make_trainer}


@pytest.fixture(params=MAKERS)
def engine(request):
    return MAKERS[request.param]()


class Endless:
    """An iterable without a length."""

    def __init__(self, length):
        self.length = length

    def __iter__(self):
        return iter(range(self.length))


def logged(engine, script):
    """Runs a script on an engine; gives every event with the clocks at which it fired, and where the state ended."""
    log = []
    for event in LOGGED:
        engine.add_event_handler(
            event, lambda e, *_, name=event.name, **__: log.append((name, e.state.epoch, e.state.iteration))
        )
    script(engine)
    state = engine.state
    return log, (state.epoch, state.iteration, state.epoch_length, state.max_epochs, state.max_iters)


def both(script, engine):
    """The script's logs on Ignite's engine and on ours."""
    return logged(Engine(lambda engine, batch: batch), script), logged(engine, script)


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
def test_a_run_fires_ignites_events_in_ignites_order(name, engine):
    stock, ours = both(RUNS[name], engine)
    assert ours == stock


def at(event, what):
    """A script that does something at an event of the second epoch."""

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
def test_stopping_inside_an_epoch_is_ignites(what, event, engine):
    stock, ours = both(at(event, STOPS[what]), engine)
    assert ours == stock


@pytest.mark.parametrize("event", [Events.EPOCH_STARTED, Events.EPOCH_COMPLETED], ids=lambda event: event.name)
@pytest.mark.parametrize("what", ["terminate", "terminate without COMPLETED"])
def test_terminating_at_an_epochs_bounds_is_ignites(what, event, engine):
    stock, ours = both(at(event, STOPS[what]), engine)
    assert ours == stock


def test_terminate_at_started_makes_no_iteration(engine):
    def script(engine):
        engine.add_event_handler(Events.STARTED, lambda e: e.terminate())
        engine.run(range(3), max_epochs=2)

    stock, ours = both(script, engine)
    assert ours == stock
    assert ours[1][:2] == (0, 0)


def test_terminate_epoch_at_started_is_an_error(engine):
    engine.add_event_handler(Events.STARTED, lambda e: e.terminate_epoch())
    with pytest.raises(RuntimeError, match="should not be called on"):
        engine.run(range(3))


def test_terminate_single_epoch_tells_the_iteration_of_the_epoch(engine):
    counts = []
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=5), lambda e: e.terminate_epoch())
    engine.add_event_handler(Events.TERMINATE_SINGLE_EPOCH, lambda e, iter_counter: counts.append(iter_counter))
    engine.run(range(3), max_epochs=2)
    assert counts == [2]


@pytest.mark.parametrize("event", [*INSIDE[:4], Events.EPOCH_STARTED, Events.EPOCH_COMPLETED], ids=lambda event: event.name)
def test_an_interrupted_run_goes_on_where_it_was(event, engine):
    def script(engine):
        at(event, lambda e: e.interrupt())(engine)
        engine.my_stop = engine.state.iteration
        engine.run(range(3), max_epochs=3)

    stock, ours = both(script, engine)
    assert ours == stock
    assert ours[1][1] == 12


def test_interrupting_where_the_data_stops_asks_for_each_batch_once(engine):
    """Ignite's engine fires GET_BATCH_STARTED twice for the batch after the interruption."""
    asked = []
    engine.add_event_handler(Events.GET_BATCH_STARTED, lambda e: asked.append(e.state.iteration))
    engine.add_event_handler(Events.DATALOADER_STOP_ITERATION, lambda e: e.interrupt())
    engine.run(range(2), epoch_length=3)
    assert engine.state.iteration == 2
    engine.run()
    assert asked == [0, 1, 2]


def test_interrupting_at_every_iteration_visits_every_batch_once(engine):
    def script(engine):
        engine.seen = []
        engine.add_event_handler(Events.ITERATION_COMPLETED, lambda e: (e.seen.append(e.state.batch), e.interrupt()))
        for _ in range(7):
            engine.run(range(3), max_epochs=2)

    stock, ours = both(script, engine)
    assert ours == stock
    assert engine.seen == [0, 1, 2, 0, 1, 2]


def test_set_data_changes_the_batches_and_not_the_epoch(engine):
    seen = []
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=2), lambda e: e.set_data([10, 11, 12]))
    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda e: seen.append(e.state.batch))
    engine.run([0, 1, 2, 3], max_epochs=2)
    assert seen == [0, 1, 10, 11, 12, 10, 11, 12]


def test_a_batch_set_at_iteration_started_is_the_one_processed():
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
def test_a_second_run_is_ignites(name, engine):
    stock, ours = both(REPEATED[name], engine)
    assert ours == stock


@pytest.mark.parametrize("second", [2, 3], ids=["same max_epochs", "one more"])
@pytest.mark.parametrize("stop", [2, 3, 5, 6])
def test_a_run_after_terminate_is_ignites(stop, second, engine):
    def script(engine):
        engine.add_event_handler(Events.ITERATION_COMPLETED(once=stop), lambda e: e.state.times and terminate_once(e))
        engine.run(range(3), max_epochs=2)
        engine.run(range(3), max_epochs=second)

    def terminate_once(engine):
        if not hasattr(engine, "was_terminated"):
            engine.was_terminated = True
            engine.terminate()

    stock, ours = both(script, engine)
    assert ours == stock


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("event", [Events.STARTED, Events.EPOCH_STARTED, *INSIDE[:4], Events.EPOCH_COMPLETED, Events.COMPLETED])
def test_an_exception_leaves_the_run_after_every_handler(event, error, engine):
    heard = []
    engine.add_event_handler(Events.EXCEPTION_RAISED, lambda e, err: heard.append(("first", err)))
    engine.add_event_handler(Events.EXCEPTION_RAISED, lambda err: heard.append(("second", err)))

    def fail():
        raise error("broken")

    engine.add_event_handler(event, fail)
    with pytest.raises(error, match="broken") as caught:
        engine.run(range(3))
    assert heard == [("first", caught.value), ("second", caught.value)]


def test_the_exceptions_note_names_epoch_and_iteration(engine):
    def fail():
        raise ValueError("broken")

    engine.add_event_handler(Events.ITERATION_COMPLETED(once=5), fail)
    with pytest.raises(ValueError, match="broken") as caught:
        engine.run(range(3), max_epochs=2)
    assert caught.value.__notes__ == ["camshaft: in epoch 2, iteration 5"]


def test_a_failing_exception_handler_keeps_neither_the_others_nor_the_error_back(engine):
    heard = []

    def fail_again(error):
        raise OSError("disk full")

    def fail():
        raise ValueError("broken")

    engine.add_event_handler(Events.EXCEPTION_RAISED, fail_again)
    engine.add_event_handler(Events.EXCEPTION_RAISED, lambda error: heard.append(error))
    engine.add_event_handler(Events.ITERATION_STARTED, fail)
    with pytest.raises(ValueError, match="broken") as caught:
        engine.run(range(3))
    assert heard == [caught.value]
    assert any("disk full" in note for note in caught.value.__notes__)


def test_an_exception_of_the_data_leaves_the_run(engine):
    def broken():
        yield 0
        raise OSError("no such file")

    with pytest.raises(OSError, match="no such file") as caught:
        engine.run(broken())
    assert caught.value.__notes__ == ["camshaft: in epoch 1, iteration 1"]


@pytest.mark.parametrize("iteration", [1, 2, 3, 4, 5, 6])
def test_a_run_after_an_exception_is_like_one_after_terminate(iteration, engine):
    """Ignite's engine can't be run again after an exception; after ``terminate()`` it can."""

    def script(engine, stop):
        stopped = []

        @engine.on(Events.ITERATION_COMPLETED(once=iteration))
        def once(engine):
            if not stopped:
                stopped.append(True)
                stop(engine)

        with contextlib.suppress(ValueError):
            engine.run(range(3), max_epochs=2)
        engine.noted = []
        engine.add_event_handler(Events.ITERATION_COMPLETED, lambda e: e.noted.append((e.state.epoch, e.state.batch)))
        engine.run(range(3), max_epochs=2)

    def fail(engine):
        raise ValueError("broken")

    stock = Engine(lambda engine, batch: batch)
    script(stock, Engine.terminate)
    script(engine, fail)
    assert engine.noted == stock.noted
    assert engine.noted[-3:] == [(2, 0), (2, 1), (2, 2)]


@pytest.mark.parametrize(
    "terms",
    [
        {"every": 1},
        {"every": 2},
        {"every": 3},
        {"once": 4},
        {"once": [2, 5]},
        {"before": 3},
        {"after": 3},
        {"before": 6, "after": 2},
        {"every": 2, "after": 3},
        {"every": 2, "before": 5},
        {"event_filter": lambda engine, event: event in (1, 6)},
        {"event_filter": lambda engine, event: engine.state.epoch == 2},
        {"event_filter": functools.partial(lambda wanted, engine, event: event == wanted, 5)},
    ],
    ids=lambda terms: ",".join(f"{k}={v}" if not callable(v) else k for k, v in terms.items()),
)
@pytest.mark.parametrize("event", [Events.ITERATION_COMPLETED, Events.GET_BATCH_STARTED, Events.EPOCH_STARTED])
def test_filters_are_ignites(event, terms, engine):
    def script(engine):
        engine.noted = []
        engine.add_event_handler(event(**terms), lambda e: e.noted.append((e.state.epoch, e.state.iteration)))
        engine.run(range(4), max_epochs=2)

    stock = Engine(lambda engine, batch: batch)
    script(stock)
    script(engine)
    assert engine.noted == stock.noted


def test_events_joined_by_or_are_each_heard(engine):
    def script(engine):
        engine.noted = []
        events = Events.STARTED | Events.ITERATION_COMPLETED(every=2) | Events.EPOCH_COMPLETED | Events.COMPLETED
        engine.add_event_handler(events, lambda e: e.noted.append(e.state.iteration))
        engine.run(range(3), max_epochs=2)

    stock = Engine(lambda engine, batch: batch)
    script(stock)
    script(engine)
    assert engine.noted == stock.noted == [0, 2, 3, 4, 6, 6, 6]


class Counter:
    def __init__(self):
        self.calls = 0

    def count(self):
        self.calls += 1


FILTERS = {
    "unfiltered": Events.ITERATION_COMPLETED,
    "every": Events.ITERATION_COMPLETED(every=2),
    "once": Events.ITERATION_COMPLETED(once=1),
    "callable": Events.ITERATION_COMPLETED(lambda engine, event: True),
    "list": Events.EPOCH_COMPLETED | Events.ITERATION_COMPLETED(every=2),
}


@pytest.mark.parametrize("event", FILTERS.values(), ids=FILTERS)
@pytest.mark.parametrize("bound", [True, False], ids=["bound method", "function"])
def test_a_handle_removes_its_handler(bound, event, engine):
    counter = Counter()
    handler = counter.count if bound else lambda: counter.count()
    handle = engine.add_event_handler(event, handler)
    handle.remove()
    engine.run(range(3))
    assert counter.calls == 0


@pytest.mark.parametrize("event", FILTERS.values(), ids=FILTERS)
def test_a_handle_is_a_context(event, engine):
    counter = Counter()
    handler = counter.count
    with engine.add_event_handler(event, handler):
        engine.run(range(3))
    calls = counter.calls
    engine.run(range(3))
    assert calls > 0
    assert counter.calls == calls


@pytest.mark.parametrize("event", list(FILTERS.values())[:4], ids=list(FILTERS)[:4])
def test_has_event_handler_knows_filtered_ones(event, engine):
    counter = Counter()
    assert not engine.has_event_handler(counter.count)
    engine.add_event_handler(event, counter.count)
    assert engine.has_event_handler(counter.count)
    assert engine.has_event_handler(counter.count, Events.ITERATION_COMPLETED)
    assert not engine.has_event_handler(counter.count, Events.EPOCH_COMPLETED)
    engine.remove_event_handler(counter.count, Events.ITERATION_COMPLETED)
    assert not engine.has_event_handler(counter.count)


def test_removing_an_unknown_handler_is_an_error(engine):
    with pytest.raises(ValueError, match="is not found among|does not exist"):
        engine.remove_event_handler(print, Events.STARTED)


def test_handlers_get_their_arguments_with_or_without_the_engine(engine):
    got = []
    engine.add_event_handler(Events.STARTED, lambda e, a, b=0: got.append((e is engine, a, b)), 1, b=2)
    engine.add_event_handler(Events.STARTED, lambda a, b=0: got.append((a, b)), 3, b=4)
    engine.add_event_handler(Events.EPOCH_STARTED(once=1), lambda *args, **kwargs: got.append((len(args), kwargs)), 5, c=6)
    engine.add_event_handler(Events.STARTED, lambda: got.append(()))

    @engine.on(Events.STARTED, 7)
    def decorated(number):
        got.append(number)

    engine.run(range(1))
    assert got == [(True, 1, 2), (3, 4), (), 7, (2, {"c": 6})]


def test_a_handler_with_a_wrong_signature_is_an_error_at_once(engine):
    with pytest.raises(ValueError, match=r"can't be called at STARTED: a handler takes \(engine\), this one takes \(a, b, c\)"):
        engine.add_event_handler(Events.STARTED, lambda a, b, c: None)


def test_handlers_run_in_the_order_of_addition(engine):
    order = []
    for number in range(4):
        event = Events.EPOCH_STARTED if number % 2 else Events.EPOCH_STARTED(once=1)
        engine.add_event_handler(event, lambda _, number=number: order.append(number))
    engine.run(range(1))
    assert order == [0, 1, 2, 3]


def test_a_handler_added_in_the_run_is_heard_from_the_next_event_on(engine):
    seen = []

    @engine.on(Events.ITERATION_COMPLETED(once=2))
    def add(engine):
        engine.add_event_handler(Events.ITERATION_STARTED, lambda e: seen.append(e.state.iteration))

    engine.run(range(4))
    assert seen == [3, 4]


def test_a_handler_that_removes_itself_runs_once(engine):
    seen = []

    def once(engine):
        seen.append(engine.state.iteration)
        engine.remove_event_handler(once, Events.ITERATION_COMPLETED)

    engine.add_event_handler(Events.ITERATION_COMPLETED, once)
    engine.run(range(3))
    assert seen == [1]


class Custom(EventEnum):
    HALF = "half"
    WHOLE = "whole"


def test_events_of_ones_own_fire_with_their_clock(engine):
    seen = []
    engine.register_events(*Custom, event_to_attr={Custom.HALF: "halves"})
    engine.state.halves = 0

    @engine.on(Events.ITERATION_COMPLETED)
    def fire(engine):
        engine.state.halves += 1
        engine.fire_event(Custom.HALF)

    engine.add_event_handler(Custom.HALF(every=2), lambda e: seen.append(e.state.halves))
    engine.run(range(4))
    assert seen == [2, 4]


def test_a_text_event_of_ones_own_fires(engine):
    seen = []
    engine.register_events("tick")
    engine.add_event_handler("tick", lambda e: seen.append(e.state.iteration))
    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda e: e.fire_event("tick"))
    engine.run(range(2))
    assert seen == [1, 2]


def test_an_unknown_event_is_an_error(engine):
    with pytest.raises(ValueError, match="is not a valid event"):
        engine.add_event_handler("nothing", print)
    with pytest.raises(ValueError, match="is not a valid event"):
        engine.fire_event(Custom.WHOLE)


def test_a_place_beats_the_order_of_addition(engine):
    order = []
    engine.add_event_handler_at(10, Events.STARTED, lambda: order.append("late"))
    engine.add_event_handler(Events.STARTED, lambda: order.append("first user"))
    engine.add_event_handler_at(-10, Events.STARTED(lambda engine, event: True), lambda: order.append("early"))
    engine.add_event_handler(Events.STARTED, lambda: order.append("second user"))
    engine.run(range(1))
    assert order == ["early", "first user", "second user", "late"]


def test_an_event_list_keeps_its_place_at_each_event(engine):
    order = []
    engine.add_event_handler_at(10, Events.STARTED | Events.COMPLETED, lambda: order.append("late"))
    engine.add_event_handler(Events.STARTED | Events.COMPLETED, lambda: order.append("user"))
    engine.run(range(1))
    assert order == ["user", "late"] * 2


def test_times_are_there_for_handlers(engine):
    times = []
    engine.add_event_handler(Events.EPOCH_COMPLETED | Events.COMPLETED, lambda e: times.append(dict(e.state.times)))
    engine.run(range(2))
    assert times[0]["EPOCH_COMPLETED"] > 0
    assert times[1]["COMPLETED"] >= times[0]["EPOCH_COMPLETED"]


def test_ignites_basic_profiler_works(engine):
    profiler = BasicTimeProfiler()
    profiler.attach(engine)
    engine.add_event_handler(Events.ITERATION_STARTED, lambda: sum(range(1000)))
    engine.run(range(3), max_epochs=2)
    results = profiler.get_results()
    assert results["processing_stats"]["total"] > 0
    assert results["event_handlers_stats"]["ITERATION_STARTED"]["total"] > 0
    assert profiler.processing_times.numel() == 6
    assert (profiler.dataflow_times > 0).all()


def test_ignites_handlers_profiler_works(engine):
    def busy(engine):
        sum(range(1000))

    profiler = HandlersTimeProfiler()
    profiler.attach(engine)
    engine.add_event_handler(Events.ITERATION_STARTED, busy)
    engine.run(range(3), max_epochs=2)
    results = {row[0]: row for row in profiler.get_results()}
    name = next(name for name in results if "busy" in name)
    assert results[name][1] == "ITERATION_STARTED"
    assert results[name][2] > 0


WRONG = {
    "both limits": (lambda e: e.run(range(3), max_epochs=1, max_iters=1), ValueError, "mutually exclusive"),
    "no iterable": (lambda e: e.run(3), TypeError, "should be iterable"),
    "no data, no length": (lambda e: e.run(), ValueError, "epoch_length should be provided"),
    "empty data": (lambda e: e.run([]), ValueError, "zero size"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_ignites_errors(name, engine):
    call, error, text = WRONG[name]
    with pytest.raises(error, match=text):
        call(engine)


def test_a_going_backwards_max_epochs_is_an_error(engine):
    engine.run(range(3), max_epochs=3)
    with pytest.raises(ValueError, match="should be greater than or equal to the start"):
        engine.run(range(3), max_epochs=2)


def test_ignites_state_dict_round_trip_goes_on_at_the_iteration():
    engine = make_loop()
    engine.load_state_dict({"epoch_length": 3, "max_epochs": 3, "iteration": 3})
    seen = []
    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda e: seen.append((e.state.epoch, e.state.iteration)))
    engine.run(range(3))
    assert seen == [(2, 4), (2, 5), (2, 6), (3, 7), (3, 8), (3, 9)]


def test_engines_nest(engine):
    inner, seen = make_loop(), []
    inner.add_event_handler(Events.ITERATION_COMPLETED, lambda: seen.append(1))
    engine.add_event_handler(Events.EPOCH_COMPLETED, lambda: inner.run(range(2)))
    engine.run(range(3), max_epochs=2)
    assert len(seen) == 4


def test_running_inside_its_own_run_is_an_error(engine):
    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda e: e.run(range(2)))
    with pytest.raises(ValueError, match="already executing"):
        engine.run(range(3), max_epochs=2)
