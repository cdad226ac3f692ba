"""The events of a step, their two clocks and filters, and the handlers that open at them."""

import pytest
import torch
from ignite.engine import Engine, Events
from toys import batches, linear, model_of, scripted, sgd, trainer_of

from camshaft import (
    CheckpointRotation,
    EarlyStopping,
    Evaluation,
    ExponentialMovingAverage,
    GradientClipping,
    Handler,
    LRHistory,
    LRScheduling,
    NonFiniteGuard,
    Phase,
    StepEvents,
    TensorBoard,
    Trainer,
    on,
)

ON_ITERATIONS = ["FORWARD_STARTED", "FORWARD_COMPLETED", "BACKWARD_STARTED", "BACKWARD_COMPLETED"]
ON_STEPS = ["GRADIENTS_READY", "GRADIENTS_CLIPPED", "OPTIMIZER_STEP_STARTED", "OPTIMIZER_STEP_COMPLETED"]


def skip_all(engine):
    engine.skip_step_if(torch.tensor(True))


def log_of(trainer, *, events=StepEvents, **run):
    log = []
    for event in events:
        trainer.add_event_handler(
            event,
            lambda e, name=event.name: log.append((name, e.state.iteration, e.state.optimizer_step, e.state.skipped_steps)),
        )
    trainer.run(batches(3), **run)
    return log


def two_phases(interval=1):
    """Two linear models that take turns on the same batches."""
    first, second = linear(), linear()

    def objective(model):
        return lambda engine, batch: torch.nn.functional.mse_loss(model(batch[0]), batch[1])

    return Trainer(
        [
            Phase("first", first, sgd(first), objective(first)),
            Phase("second", second, sgd(second), objective(second), interval=interval),
        ]
    )


# -- order and clocks -------------------------------------------------------------------------------------------------


def test_a_step_fires_every_event_in_the_order_of_the_enum():
    log = log_of(trainer_of())
    names = [name for name, *_ in log]
    assert names == (ON_ITERATIONS + ON_STEPS) * 3
    assert [event.name for event in StepEvents] == [*ON_ITERATIONS, *ON_STEPS, "OPTIMIZER_STEP_SKIPPED"]


def test_the_step_clock_is_the_step_being_made_inside_it_and_those_completed_elsewhere():
    expected = []
    for iteration in (1, 2, 3):
        expected += [(name, iteration, iteration - 1, 0) for name in ON_ITERATIONS]
        expected += [(name, iteration, iteration, 0) for name in ON_STEPS]
    assert log_of(trainer_of()) == expected


def test_in_a_window_only_its_last_batch_moves_the_step_clock():
    log = log_of(trainer_of(accumulation_steps=2))
    ready = [(iteration, step) for name, iteration, step, _ in log if name == "GRADIENTS_READY"]
    forward = [(iteration, step) for name, iteration, step, _ in log if name == "FORWARD_STARTED"]
    assert ready == [(2, 1), (3, 2)]
    assert forward == [(1, 0), (2, 0), (3, 1)]


def test_a_skipped_step_gives_its_number_back_before_it_says_so():
    trainer = trainer_of()
    trainer.add_event_handler(StepEvents.GRADIENTS_READY(event_filter=lambda e, _: e.state.iteration == 2), skip_all)
    log = log_of(trainer)
    assert [entry[1:] for entry in log if entry[0] == "OPTIMIZER_STEP_SKIPPED"] == [(2, 1, 1)]
    assert [entry[1:] for entry in log if entry[0] == "OPTIMIZER_STEP_COMPLETED"] == [(1, 1, 0), (3, 2, 1)]
    assert [entry[1:] for entry in log if entry[0] == "GRADIENTS_READY"] == [(1, 1, 0), (2, 2, 0), (3, 2, 1)]


def test_a_skipped_step_fires_neither_start_nor_completion():
    trainer = trainer_of()
    trainer.add_event_handler(StepEvents.GRADIENTS_CLIPPED, skip_all)
    names = [entry[0] for entry in log_of(trainer)]
    assert names == ([*ON_ITERATIONS, "GRADIENTS_READY", "GRADIENTS_CLIPPED", "OPTIMIZER_STEP_SKIPPED"]) * 3


def test_ignites_events_see_the_steps_completed():
    trainer, seen = trainer_of(accumulation_steps=2), []
    for event in (Events.ITERATION_STARTED, Events.ITERATION_COMPLETED, Events.EPOCH_COMPLETED, Events.COMPLETED):
        trainer.add_event_handler(event, lambda e: seen.append(e.state.optimizer_step))
    trainer.run(batches(4), max_epochs=1)
    assert seen == [0, 0, 0, 1, 1, 1, 1, 2, 2, 2]


def test_the_partial_window_of_unknown_data_closes_before_epoch_completed():
    trainer, log = trainer_of(accumulation_steps=2), []
    trainer.add_event_handler(StepEvents.OPTIMIZER_STEP_COMPLETED, lambda e: log.append(("step", e.state.optimizer_step)))
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda e: log.append(("iteration", e.state.iteration)))
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda e: log.append(("epoch", e.state.optimizer_step)))
    trainer.run(iter(batches(3)))
    assert log == [("iteration", 1), ("step", 1), ("iteration", 2), ("iteration", 3), ("step", 2), ("epoch", 2)]


def test_what_each_moment_promises_is_there():
    trainer, seen = trainer_of(clip_grad_norm=0.01), {}
    model = model_of(trainer)

    def look(engine):
        state, grad = engine.state, model.weight.grad
        seen[engine.last_event_name.name] = {
            "x": state.x is not None,
            "y_pred": state.y_pred is not None,
            "grad": grad is not None,
            "norm": None if state.grad_norm is None else float(state.grad_norm),
            "weight": model.weight.detach().clone(),
        }

    for event in StepEvents:
        trainer.add_event_handler(event, look)
    trainer.run(batches(1))
    assert seen["FORWARD_STARTED"]["x"]
    assert seen["FORWARD_COMPLETED"]["y_pred"]
    assert seen["BACKWARD_STARTED"]["grad"] is False
    assert seen["BACKWARD_COMPLETED"]["grad"] is True
    assert seen["GRADIENTS_READY"]["norm"] is None
    assert seen["GRADIENTS_CLIPPED"]["norm"] > 0.01
    assert torch.equal(seen["OPTIMIZER_STEP_STARTED"]["weight"], seen["FORWARD_STARTED"]["weight"])
    assert not torch.equal(seen["OPTIMIZER_STEP_COMPLETED"]["weight"], seen["FORWARD_STARTED"]["weight"])
    assert seen["OPTIMIZER_STEP_COMPLETED"]["grad"] is True


def test_a_replaced_loss_is_the_one_that_goes_backward_and_out():
    trainer = trainer_of()
    model, gradients = model_of(trainer), []

    @trainer.on(StepEvents.FORWARD_COMPLETED)
    def double(engine):
        engine.state.loss = engine.state.loss * 2

    trainer.add_event_handler(StepEvents.GRADIENTS_READY, lambda: gradients.append(model.weight.grad.clone()))
    (x, y) = batches(1)[0]
    twin = linear()
    loss = torch.nn.functional.mse_loss(twin(x), y) * 2
    loss.backward()
    output = trainer.run([(x, y)]).output
    assert torch.equal(gradients[0], twin.weight.grad)
    assert torch.equal(output, loss.detach())


# -- filters ----------------------------------------------------------------------------------------------------------


def clock_values(event, filtered, number=6):
    """The values of its clock at which a filtered event was heard, over ``number`` batches; a step is skipped where need be."""
    trainer, heard = trainer_of(), []
    if event.name == "OPTIMIZER_STEP_SKIPPED":
        trainer.add_event_handler(StepEvents.GRADIENTS_READY, skip_all)
    trainer.add_event_handler(filtered, lambda e: heard.append(e.clock(event)))
    trainer.run(batches(number))
    return heard


FILTERS = {
    "every": ({"every": 2}, [2, 4, 6]),
    "every=1": ({"every": 1}, [1, 2, 3, 4, 5, 6]),
    "once": ({"once": 3}, [3]),
    "once of several": ({"once": [1, 5]}, [1, 5]),
    "before": ({"before": 3}, [1, 2]),
    "after": ({"after": 4}, [5, 6]),
    "before and after": ({"before": 5, "after": 2}, [3, 4]),
    "every and after": ({"every": 2, "after": 3}, [4, 6]),
    "callable": ({"event_filter": lambda engine, clock: clock % 3 == 1}, [1, 4]),
}


@pytest.mark.parametrize("event", StepEvents, ids=lambda event: event.name)
@pytest.mark.parametrize("name", FILTERS)
def test_every_event_takes_every_filter_on_its_own_clock(name, event):
    terms, expected = FILTERS[name]
    assert clock_values(event, event(**terms)) == expected


@pytest.mark.parametrize("event", StepEvents, ids=lambda event: event.name)
def test_every_event_joins_with_or(event):
    trainer, heard = trainer_of(), []
    trainer.add_event_handler(event(once=2) | Events.COMPLETED, lambda e: heard.append(e.state.iteration))
    if event is StepEvents.OPTIMIZER_STEP_SKIPPED:
        trainer.add_event_handler(StepEvents.GRADIENTS_READY, skip_all)
    trainer.run(batches(3))
    assert heard == [2, 3]


def test_accumulation_slows_the_step_clock_and_not_the_iterations():
    trainer, heard = trainer_of(accumulation_steps=2), []
    trainer.add_event_handler(StepEvents.BACKWARD_COMPLETED(every=4), lambda e: heard.append(("batch", e.state.iteration)))
    trainer.add_event_handler(StepEvents.GRADIENTS_READY(every=2), lambda e: heard.append(("step", e.state.iteration)))
    trainer.run(batches(8))
    assert heard == [("batch", 4), ("step", 4), ("batch", 8), ("step", 8)]


WRONG = {
    "nothing": ({}, ValueError, "Only one of the input arguments should be specified"),
    "every of zero": ({"every": 0}, ValueError, "should be integer and greater than zero"),
    "two filters": ({"every": 2, "once": 1}, ValueError, "Only one of the input arguments|every and once"),
    "not callable": ({"event_filter": 3}, TypeError, "should be a callable"),
    "phase of a number": ({"phase": 1}, TypeError, "phase must be the name of a phase, got 1"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_filter_is_an_error_at_once(name):
    terms, error, text = WRONG[name]
    with pytest.raises(error, match=text):
        StepEvents.GRADIENTS_READY(**terms)


def test_a_later_or_does_not_change_a_handler_that_has_been_marked():
    events = Events.EPOCH_STARTED | Events.EPOCH_COMPLETED

    class Marked(Handler):
        def __init__(self):
            self.calls = 0

        @on(events)
        def count(self, engine):
            self.calls += 1

    _ = events | Events.ITERATION_COMPLETED
    handler, trainer = Marked(), trainer_of()
    handler.attach(trainer)
    trainer.run(batches(3))
    assert handler.calls == 2


def test_a_later_or_does_not_change_an_evaluations_events():
    events = Events.EPOCH_COMPLETED(every=2) | Events.EPOCH_STARTED(once=1)
    evaluator, trainer = scripted([1.0]), trainer_of()
    Evaluation(evaluator, [0], every=events).attach(trainer)
    _ = events | Events.ITERATION_COMPLETED
    runs = []
    evaluator.add_event_handler(Events.COMPLETED, lambda: runs.append(trainer.state.iteration))
    trainer.run(batches(3), max_epochs=2)
    assert runs == [0, 6]


# -- phases -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("event", [e for e in StepEvents if "SKIPPED" not in e.name], ids=lambda event: event.name)
def test_a_phase_filter_hears_one_network(event):
    trainer, heard = two_phases(), []
    trainer.add_event_handler(event(phase="second"), lambda e: heard.append((e.state.phase, e.state.iteration)))
    trainer.run(batches(3))
    assert heard == [("second", 1), ("second", 2), ("second", 3)]


@pytest.mark.parametrize("event", [StepEvents.FORWARD_STARTED, StepEvents.OPTIMIZER_STEP_COMPLETED], ids=lambda e: e.name)
def test_a_phase_filter_counts_on_that_networks_own_clock(event):
    trainer, heard = two_phases(interval=2), []
    trainer.add_event_handler(event(phase="second", every=2), lambda e: heard.append(e.state.iteration))
    trainer.add_event_handler(event(phase="first", once=3), lambda e: heard.append(e.state.iteration))
    trainer.run(batches(8))
    assert heard == [3, 4, 8]


def test_without_a_phase_filter_both_are_heard_on_the_clock_of_the_one_that_fires():
    trainer, heard = two_phases(interval=2), []
    event = StepEvents.OPTIMIZER_STEP_COMPLETED
    trainer.add_event_handler(event(every=2), lambda e: heard.append((e.state.phase, e.state.optimizer_step)))
    trainer.run(batches(4))
    assert heard == [("first", 2), ("first", 4), ("second", 2)]


# -- handlers ---------------------------------------------------------------------------------------------------------


class Counter(Handler):
    """Counts steps and epochs."""

    saved = ("steps", "epochs")

    def __init__(self):
        self.steps = self.epochs = 0

    @on(StepEvents.OPTIMIZER_STEP_COMPLETED)
    def step(self, engine):
        self.steps += 1

    @on(Events.EPOCH_COMPLETED(every=2) | Events.COMPLETED)
    def epoch(self, engine):
        self.epochs += 1


def test_one_class_spans_many_events():
    trainer = trainer_of()
    counter = Counter().attach(trainer)
    trainer.run(batches(3), max_epochs=3)
    assert (counter.steps, counter.epochs) == (9, 2)


def test_attach_returns_the_handler_itself():
    counter = Counter()
    assert counter.attach(trainer_of()) is counter


@pytest.mark.parametrize("make", [trainer_of, lambda: Engine(lambda engine, batch: None)], ids=["trainer", "ignite"])
def test_detach_takes_every_method_off(make):
    class Everywhere(Handler):
        calls = 0

        @on(Events.STARTED, Events.ITERATION_COMPLETED(every=2) | Events.ITERATION_STARTED(once=1), Events.COMPLETED)
        def count(self, engine):
            self.calls += 1

        @on(Events.EPOCH_COMPLETED(lambda engine, epoch: True))
        def count_too(self, engine):
            self.calls += 1

    engine, handler = make(), Everywhere()
    with handler.attached(engine):
        engine.run(batches(2))
    assert handler.calls == 5
    engine.run(batches(2))
    assert handler.calls == 5


def test_attached_detaches_after_an_exception_too():
    trainer, counter = trainer_of(), Counter()
    with pytest.raises(KeyError, match="out"), counter.attached(trainer):
        raise KeyError("out")
    assert counter.engine is None
    assert trainer.handlers == {}


def test_detach_of_one_never_attached_does_nothing():
    counter = Counter()
    counter.detach()
    assert counter.engine is None


def test_a_detached_handler_can_be_attached_elsewhere():
    first, second, counter = trainer_of(), trainer_of(), Counter()
    counter.attach(first).detach()
    counter.attach(second)
    first.run(batches(3))
    second.run(batches(2))
    assert counter.steps == 2


def test_attaching_twice_is_an_error():
    trainer = trainer_of()
    counter = Counter().attach(trainer)
    with pytest.raises(RuntimeError, match=r"Counter is attached already; call detach\(\) first"):
        counter.attach(trainer_of())


def test_a_name_clash_is_an_error_and_changes_nothing():
    trainer = trainer_of()
    Counter().attach(trainer)
    second = Counter()
    with pytest.raises(ValueError, match="a handler named 'Counter' is attached already.*name='Counter2'"):
        second.attach(trainer)
    trainer.run(batches(3))
    assert second.steps == 0


def test_two_of_one_class_live_side_by_side_under_names():
    trainer = trainer_of()
    first, second = Counter().attach(trainer), Counter().attach(trainer, name="second")
    assert trainer.handlers == {"Counter": first, "second": second}
    first.detach()
    trainer.run(batches(3))
    assert (first.steps, second.steps) == (0, 3)


def test_attaching_to_something_else_than_an_engine_is_an_error():
    with pytest.raises(TypeError, match=r"Counter.attach\(\) needs an Ignite engine, got Linear"):
        Counter().attach(linear())


def test_a_failing_attach_leaves_nothing_behind():
    class Failing(Counter):
        def on_attach(self, engine):
            raise ValueError("not today")

    trainer, handler = trainer_of(), Failing()
    with pytest.raises(ValueError, match="not today"):
        handler.attach(trainer)
    assert handler.engine is None
    assert trainer.handlers == {}
    trainer.run(batches(3))
    assert handler.steps == 0


def test_a_subclass_that_overrides_a_method_keeps_its_events():
    class Doubling(Counter):
        def step(self, engine):
            self.steps += 2

    trainer = trainer_of()
    handler = Doubling().attach(trainer)
    trainer.run(batches(3))
    assert (handler.steps, handler.epochs) == (6, 1)


def test_a_subclass_that_marks_a_method_anew_has_the_new_events():
    class Rare(Counter):
        @on(Events.COMPLETED)
        def step(self, engine):
            self.steps += 1

    trainer = trainer_of()
    handler = Rare().attach(trainer)
    trainer.run(batches(3))
    assert handler.steps == 1


def test_a_method_may_leave_the_engine_out():
    class Brief(Handler):
        calls = 0

        @on(Events.ITERATION_COMPLETED)
        def count(self):
            self.calls += 1

    trainer = trainer_of()
    brief = Brief().attach(trainer)
    trainer.run(batches(3))
    assert brief.calls == 3


@pytest.mark.parametrize("event", ["EPOCH_COMPLETED", 3, None, Counter])
def test_on_something_else_than_an_event_is_an_error(event):
    with pytest.raises(TypeError, match="expected an event such as Events.EPOCH_COMPLETED"):
        on(event)


def test_on_nothing_is_an_error():
    with pytest.raises(TypeError, match=r"on\(\) needs at least one event"):
        on()


def test_a_handler_attaches_to_any_ignite_engine_whose_events_it_uses():
    class Epochs(Handler):
        seen = ()

        @on(Events.EPOCH_COMPLETED(every=2))
        def see(self, engine):
            self.seen = (*self.seen, engine.state.epoch)

    engine = Engine(lambda engine, batch: None)
    handler = Epochs().attach(engine)
    engine.run([0], max_epochs=5)
    assert handler.seen == (2, 4)


def test_a_handler_of_step_events_on_a_plain_engine_is_an_error_that_names_the_event():
    with pytest.raises(ValueError, match=r"Counter runs on OPTIMIZER_STEP_COMPLETED.*create_trainer\(\)"):
        Counter().attach(Engine(lambda engine, batch: None))


def test_a_handler_that_opens_at_no_event_is_an_error_that_shows_how():
    class Report(Handler):
        def report(self, engine):
            print(engine.state.epoch)

    with pytest.raises(ValueError, match=r"Report runs on no event; mark a method .*@on\(Events.EPOCH_COMPLETED\)$"):
        Report().attach(trainer_of())


@pytest.mark.parametrize("names", [(), ("epochs",)], ids=["stateless", "with a state"])
def test_a_handler_with_the_methods_of_a_keras_callback_is_sent_to_keras_style(names):
    class Epochs(Handler):
        saved = names
        epochs = 0

        def on_epoch_end(self, epoch, logs):
            self.epochs += 1

    with pytest.raises(ValueError, match=r"Epochs runs on no event.* Nothing calls on_epoch_end\(\).*KerasStyle\(callback\)"):
        Epochs().attach(trainer_of())


@pytest.mark.parametrize(
    "body",
    [{"on_attach": lambda self, engine: None}, {"listeners": lambda self: iter(())}, {"state_dict": lambda self: {"a": 1}}],
    ids=lambda body: next(iter(body)),
)
def test_a_handler_without_events_may_act_otherwise(body):
    handler = type("Quiet", (Handler,), body)()
    assert handler.attach(trainer_of()).name == "Quiet"


@pytest.mark.parametrize("attribute", ["saved", "changes"])
@pytest.mark.parametrize(
    ("value", "what"),
    [("weights", r"; write \('weights',\), with a comma"), (5, ", got 5"), ((Handler,), ", got .*Handler")],
    ids=["text", "number", "class"],
)
def test_names_of_a_handler_are_a_tuple(attribute, value, what):
    handler = type("Wrong", (Counter,), {attribute: value})()
    with pytest.raises(TypeError, match=f"Wrong.{attribute} must be a tuple of names{what}"):
        handler.attach(trainer_of())


def test_a_handler_changes_what_there_is():
    class Wrong(Counter):
        changes = ("weights", "gradient")

    with pytest.raises(ValueError, match="Wrong.changes may name 'loss', 'gradients', 'weights', got 'gradient'"):
        Wrong().attach(trainer_of())


TAKES = "can't be called at ITERATION_COMPLETED: a handler takes"


@pytest.mark.parametrize("event", [Events.ITERATION_COMPLETED, Events.ITERATION_COMPLETED(every=2) | Events.COMPLETED])
def test_a_function_that_wants_the_batch_too_is_told_where_it_is(event):
    def look(engine, batch):
        print(batch)

    with pytest.raises(ValueError, match=rf"look {TAKES} \(engine\), this one takes \(engine, batch\); the batch is"):
        trainer_of().on(event)(look)


@pytest.mark.parametrize("engine", [trainer_of, lambda: Engine(lambda engine, batch: None)], ids=["trainer", "Ignite's"])
def test_a_method_that_wants_the_batch_too_is_told_where_it_is(engine):
    class Look(Handler):
        @on(Events.ITERATION_COMPLETED)
        def look(self, engine, batch):
            print(batch)

    engine = engine()
    with pytest.raises(ValueError, match=rf"Look.look {TAKES} \(engine\), .*; the batch is engine.state.batch"):
        Look().attach(engine)
    assert engine.handlers == {}


def test_what_else_a_function_is_to_be_given_is_named():
    with pytest.raises(ValueError, match=rf"<lambda> {TAKES} \(engine, 3, size=4\), this one takes \(engine, number\)"):
        trainer_of().add_event_handler(Events.ITERATION_COMPLETED, lambda engine, number: None, 3, size=4)


@pytest.mark.parametrize("event", [Events.EXCEPTION_RAISED, Events.TERMINATE_SINGLE_EPOCH], ids=lambda event: event.name)
def test_what_an_event_tells_is_named(event):
    with pytest.raises(ValueError, match=rf"at {event.name}: a handler takes \(engine, \w+\), this one takes \(a, b, c\)"):
        trainer_of().add_event_handler(event, lambda a, b, c: None)


# -- saved ------------------------------------------------------------------------------------------------------------


class Holder(Handler):
    """Holds whatever it is given."""

    saved = ("value",)

    def __init__(self, value=None):
        self.value = value


@pytest.mark.parametrize(
    "value",
    [3, 2.5, "text", True, None, b"bytes", [1, [2, {"a": (3, None)}]], {"a": 1, 2: "b"}, (1, 2), {"t": torch.arange(3)}],
    ids=repr,
)
def test_saved_attributes_come_back(value, tmp_path):
    trainer = trainer_of()
    Holder(value).attach(trainer)
    path = CheckpointRotation(tmp_path).attach(trainer).save()
    fresh = trainer_of()
    holder = Holder().attach(fresh)
    CheckpointRotation(tmp_path).attach(fresh).resume(path)
    if isinstance(value, dict) and "t" in value:
        assert torch.equal(holder.value["t"], value["t"])
    else:
        assert holder.value == value
        assert type(holder.value) is type(value)


def test_an_object_with_state_dict_is_saved_by_it(tmp_path):
    trainer = trainer_of()
    holder = Holder(torch.nn.Linear(2, 2)).attach(trainer)
    path = CheckpointRotation(tmp_path).attach(trainer).save()
    fresh = trainer_of()
    other = Holder(torch.nn.Linear(2, 2)).attach(fresh)
    CheckpointRotation(tmp_path).attach(fresh).resume(path)
    assert torch.equal(other.value.weight, holder.value.weight)


def test_state_travels_under_the_handlers_name(tmp_path):
    trainer = trainer_of()
    Holder(1).attach(trainer)
    Holder(2).attach(trainer, name="other")
    path = CheckpointRotation(tmp_path).attach(trainer).save()
    fresh = trainer_of()
    other, first = Holder().attach(fresh, name="other"), Holder().attach(fresh)
    CheckpointRotation(tmp_path).attach(fresh).resume(path)
    assert (first.value, other.value) == (1, 2)


@pytest.mark.parametrize(("value", "where"), [(object(), "Holder.value"), ({"a": [lambda: 0]}, r"Holder.value\['a'\]\[0\]")])
def test_what_a_checkpoint_can_not_carry_is_named(value, where):
    holder = Holder(value).attach(trainer_of())
    with pytest.raises(TypeError, match=f"{where} is a .*which a checkpoint can't carry safely"):
        holder.state_dict()


def test_a_saved_attribute_that_is_not_set_is_named():
    class Forgetful(Handler):
        saved = ("steps",)

    trainer = trainer_of()
    handler = Forgetful().attach(trainer)
    with pytest.raises(AttributeError, match=r"Forgetful.saved names 'steps', which is not set .*set it in __init__"):
        trainer.checkpoint()
    handler.steps = 3  # as a handler of STARTED might
    assert trainer.checkpoint()["handlers"]["Forgetful"] == {"steps": 3}


def test_handlers_added_or_removed_since_are_one_warning_that_names_them(tmp_path):
    trainer = trainer_of()
    Holder(1).attach(trainer, name="old")
    path = CheckpointRotation(tmp_path).attach(trainer).save()
    fresh = trainer_of()
    added = Holder("mine").attach(fresh, name="new")
    checkpoints = CheckpointRotation(tmp_path).attach(fresh)
    with pytest.warns(UserWarning, match="new since: new; gone: old") as caught:
        checkpoints.resume(path)
    assert len(caught) == 1
    assert added.value == "mine"


def resumed_without_its_holder(folder):
    """A trainer resumed from a checkpoint that has the state of a handler named ``late``, which isn't attached."""
    trainer = trainer_of()
    Holder(1).attach(trainer, name="late")
    path = CheckpointRotation(folder).attach(trainer).save()
    fresh = trainer_of()
    CheckpointRotation(folder).attach(fresh).resume(path)
    return fresh


@pytest.mark.filterwarnings("ignore:resume. the handlers are not those")
def test_a_handler_that_is_attached_after_the_resume_goes_on_all_the_same(tmp_path):
    fresh = resumed_without_its_holder(tmp_path)
    assert Holder("mine").attach(fresh, name="late").value == 1
    assert Holder("mine").attach(fresh, name="other").value == "mine"


@pytest.mark.filterwarnings("ignore:resume. the handlers are not those")
def test_what_nobody_claimed_before_the_run_is_forgotten(tmp_path):
    fresh = resumed_without_its_holder(tmp_path)
    fresh.run(batches(1))
    assert Holder("mine").attach(fresh, name="late").value == "mine"


# -- the order that is structural -------------------------------------------------------------------------------------


def is_users(function):
    """Whether a handler isn't one of the trainer's own functions."""
    return not getattr(function, "__module__", "").startswith("camshaft.")


def order_at(trainer, event):
    """The owners of an event's handlers, in the order in which they run."""
    entries = [getattr(entry[0], "handler", entry[0]) for entry in trainer._event_handlers[event]]
    owners = [getattr(function, "__self__", None) for function in entries]
    shown = [owner for owner, function in zip(owners, entries, strict=True) if owner is not None or is_users(function)]
    names = ["user" if owner is None else owner.name for owner in shown]
    return list(dict.fromkeys(names))


def attachments(trainer, folder):
    """Everything that shares a moment, as functions that attach it."""
    optimizer = trainer.primary.optimizers[0]
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
    exponential = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    events = (StepEvents.GRADIENTS_READY, StepEvents.OPTIMIZER_STEP_COMPLETED, Events.EPOCH_COMPLETED, Events.COMPLETED)
    return [
        lambda: Evaluation(scripted([1.0]), [0]).attach(trainer),
        lambda: LRScheduling(plateau, metric="val/score").attach(trainer, "plateau"),
        lambda: LRScheduling(exponential).attach(trainer, "schedule"),
        lambda: [trainer.add_event_handler(event, lambda engine: None) for event in events],
        lambda: NonFiniteGuard().attach(trainer),
        lambda: GradientClipping(1.0).attach(trainer),
        lambda: LRHistory().attach(trainer),
        lambda: ExponentialMovingAverage().attach(trainer),
        lambda: EarlyStopping("val/score").attach(trainer),
        lambda: TensorBoard(folder / "board").attach(trainer),
        lambda: CheckpointRotation(folder / "checkpoints").attach(trainer),
    ]


@pytest.mark.parametrize("seed", range(6))
def test_the_package_keeps_its_own_in_place_however_they_were_attached(seed, tmp_path):
    trainer = trainer_of()
    todo = attachments(trainer, tmp_path)
    for number in torch.randperm(len(todo), generator=torch.Generator().manual_seed(seed)).tolist():
        todo[number]()
    at_step = [name for name in order_at(trainer, StepEvents.OPTIMIZER_STEP_COMPLETED) if name != "TensorBoard"]
    at_epoch = [name for name in order_at(trainer, Events.EPOCH_COMPLETED) if name != "TensorBoard"]
    assert order_at(trainer, StepEvents.GRADIENTS_READY) == ["user", "NonFiniteGuard", "GradientClipping"]
    assert at_step == ["LRHistory", "ExponentialMovingAverage", "user", "schedule"]
    assert at_epoch == ["Evaluation/val", "plateau", "user", "EarlyStopping", "CheckpointRotation"]


@pytest.mark.parametrize("reverse", [False, True])
def test_at_an_epochs_end_logging_comes_after_judging_and_before_saving(reverse, tmp_path):
    """Seen from the run itself: what the log and the checkpoint hold is what the earlier ones of that moment left."""
    trainer, order = trainer_of(), []

    def spy(cls, method):
        def spied(self, *args, **kwargs):
            order.append(cls.__name__)
            return getattr(cls, method)(self, *args, **kwargs)

        return type(cls.__name__, (cls,), {method: spied})

    evaluation = spy(Evaluation, "evaluate")(scripted([1.0]), [0])
    judge = spy(EarlyStopping, "judge")("val/score")
    board = spy(TensorBoard, "write_metrics")(tmp_path / "board")
    save = spy(CheckpointRotation, "save_if_requested_after_epoch")(tmp_path / "checkpoints")
    handlers = [evaluation, judge, board, save]
    for handler in reversed(handlers) if reverse else handlers:
        handler.attach(trainer)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: order.append("user"))
    done = []
    trainer.add_event_handler(Events.COMPLETED, lambda: done.append(list(order)))
    trainer.run(batches(3))
    epoch = [name for name in done[0] if name != "TensorBoard" or "user" in order]
    assert epoch[:5] == ["Evaluation", "user", "EarlyStopping", "TensorBoard", "CheckpointRotation"]


def test_users_handlers_of_a_class_share_the_users_place_in_order_of_attachment():
    order = []

    class Noted(Handler):
        @on(StepEvents.GRADIENTS_READY)
        def note(self, engine):
            order.append(self.name)

    trainer = trainer_of(clip_grad_norm=1.0)
    Noted().attach(trainer, "a")
    trainer.add_event_handler(StepEvents.GRADIENTS_READY, lambda e: order.append(e.state.grad_norm))
    Noted().attach(trainer, "b")
    trainer.run(batches(1))
    assert order == ["a", None, "b"]
