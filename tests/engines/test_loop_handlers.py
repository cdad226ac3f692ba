"""Handlers on the loop behave as on the engine of Ignite: filters, handles, custom events and profilers."""

import functools

import pytest
from ignite.engine import Engine, Events
from ignite.engine.events import EventEnum
from ignite.handlers import BasicTimeProfiler, HandlersTimeProfiler


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
def test_filters_match_ignite(event, terms, engine):
    def script(engine):
        engine.calls = []
        engine.add_event_handler(event(**terms), lambda e: e.calls.append((e.state.epoch, e.state.iteration)))
        engine.run(range(4), max_epochs=2)

    ignite_engine = Engine(lambda engine, batch: batch)
    script(ignite_engine)
    script(engine)
    assert engine.calls == ignite_engine.calls


def test_each_event_of_a_combination_fires(engine):
    def script(engine):
        engine.calls = []
        events = Events.STARTED | Events.ITERATION_COMPLETED(every=2) | Events.EPOCH_COMPLETED | Events.COMPLETED
        engine.add_event_handler(events, lambda e: e.calls.append(e.state.iteration))
        engine.run(range(3), max_epochs=2)

    ignite_engine = Engine(lambda engine, batch: batch)
    script(ignite_engine)
    script(engine)
    assert engine.calls == ignite_engine.calls == [0, 2, 3, 4, 6, 6, 6]


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
def test_remove_detaches_the_handler_of_a_handle(bound, event, engine):
    counter = Counter()
    handler = counter.count if bound else lambda: counter.count()
    handle = engine.add_event_handler(event, handler)
    handle.remove()
    engine.run(range(3))
    assert counter.calls == 0


@pytest.mark.parametrize("event", FILTERS.values(), ids=FILTERS)
def test_a_handle_is_a_context_manager(event, engine):
    counter = Counter()
    handler = counter.count
    with engine.add_event_handler(event, handler):
        engine.run(range(3))
    calls = counter.calls
    engine.run(range(3))
    assert calls > 0
    assert counter.calls == calls


@pytest.mark.parametrize("event", list(FILTERS.values())[:4], ids=list(FILTERS)[:4])
def test_has_event_handler_finds_filtered_handlers(event, engine):
    counter = Counter()
    assert not engine.has_event_handler(counter.count)
    engine.add_event_handler(event, counter.count)
    assert engine.has_event_handler(counter.count)
    assert engine.has_event_handler(counter.count, Events.ITERATION_COMPLETED)
    assert not engine.has_event_handler(counter.count, Events.EPOCH_COMPLETED)
    engine.remove_event_handler(counter.count, Events.ITERATION_COMPLETED)
    assert not engine.has_event_handler(counter.count)


def test_removing_an_unknown_handler_raises(engine):
    with pytest.raises(ValueError, match="is not found among|does not exist"):
        engine.remove_event_handler(print, Events.STARTED)


def test_handlers_receive_their_arguments_with_or_without_the_engine(engine):
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


def test_a_handler_with_a_wrong_signature_raises_immediately(engine):
    with pytest.raises(ValueError, match=r"can't be called at STARTED: a handler takes \(engine\), this one takes \(a, b, c\)"):
        engine.add_event_handler(Events.STARTED, lambda a, b, c: None)


def test_handlers_run_in_the_order_in_which_they_were_added(engine):
    order = []
    for number in range(4):
        event = Events.EPOCH_STARTED if number % 2 else Events.EPOCH_STARTED(once=1)
        engine.add_event_handler(event, lambda _, number=number: order.append(number))
    engine.run(range(1))
    assert order == [0, 1, 2, 3]


def test_a_handler_added_during_a_run_is_called_from_the_next_event_on(engine):
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
    TICK = "tick"
    UNREGISTERED = "unregistered"


def test_custom_events_fire_with_their_clock(engine):
    seen = []
    engine.register_events(*Custom, event_to_attr={Custom.TICK: "ticks"})
    engine.state.ticks = 0

    @engine.on(Events.ITERATION_COMPLETED)
    def fire(engine):
        engine.state.ticks += 1
        engine.fire_event(Custom.TICK)

    engine.add_event_handler(Custom.TICK(every=2), lambda e: seen.append(e.state.ticks))
    engine.run(range(4))
    assert seen == [2, 4]


def test_a_custom_string_event_fires(engine):
    seen = []
    engine.register_events("tick")
    engine.add_event_handler("tick", lambda e: seen.append(e.state.iteration))
    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda e: e.fire_event("tick"))
    engine.run(range(2))
    assert seen == [1, 2]


def test_an_unknown_event_raises(engine):
    with pytest.raises(ValueError, match="is not a valid event"):
        engine.add_event_handler("nothing", print)
    with pytest.raises(ValueError, match="is not a valid event"):
        engine.fire_event(Custom.UNREGISTERED)


def test_priority_takes_precedence_over_the_order_of_addition(engine):
    order = []
    engine.add_event_handler_at(10, Events.STARTED, lambda: order.append("late"))
    engine.add_event_handler(Events.STARTED, lambda: order.append("first user"))
    engine.add_event_handler_at(-10, Events.STARTED(lambda engine, event: True), lambda: order.append("early"))
    engine.add_event_handler(Events.STARTED, lambda: order.append("second user"))
    engine.run(range(1))
    assert order == ["early", "first user", "second user", "late"]


def test_a_combination_of_events_has_the_same_priority_at_each_event(engine):
    order = []
    engine.add_event_handler_at(10, Events.STARTED | Events.COMPLETED, lambda: order.append("late"))
    engine.add_event_handler(Events.STARTED | Events.COMPLETED, lambda: order.append("user"))
    engine.run(range(1))
    assert order == ["user", "late"] * 2


def test_state_times_are_available_to_handlers(engine):
    times = []
    engine.add_event_handler(Events.EPOCH_COMPLETED | Events.COMPLETED, lambda e: times.append(dict(e.state.times)))
    engine.run(range(2))
    assert times[0]["EPOCH_COMPLETED"] > 0
    assert times[1]["COMPLETED"] >= times[0]["EPOCH_COMPLETED"]


def test_basic_time_profiler_works(engine):
    profiler = BasicTimeProfiler()
    profiler.attach(engine)
    engine.add_event_handler(Events.ITERATION_STARTED, lambda: sum(range(1000)))
    engine.run(range(3), max_epochs=2)
    results = profiler.get_results()
    assert results["processing_stats"]["total"] > 0
    assert results["event_handlers_stats"]["ITERATION_STARTED"]["total"] > 0
    assert profiler.processing_times.numel() == 6
    assert (profiler.dataflow_times > 0).all()


def test_handlers_time_profiler_works(engine):
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
