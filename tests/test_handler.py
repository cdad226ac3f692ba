"""`Handler`: attaching, detaching, and the errors for methods that can't be called."""

import pytest
from ignite.engine import Engine, Events
from toys import batches, linear, scripted, trainer_of

from camshaft import (
    Evaluation,
    Handler,
    StepEvents,
    on,
)


def test_combining_events_later_does_not_change_a_decorated_method():
    events = Events.EPOCH_STARTED | Events.EPOCH_COMPLETED

    class Decorated(Handler):
        def __init__(self):
            self.calls = 0

        @on(events)
        def count(self, engine):
            self.calls += 1

    _ = events | Events.ITERATION_COMPLETED
    handler, trainer = Decorated(), trainer_of()
    handler.attach(trainer)
    trainer.run(batches(3))
    assert handler.calls == 2


def test_combining_events_later_does_not_change_the_events_of_an_evaluation():
    events = Events.EPOCH_COMPLETED(every=2) | Events.EPOCH_STARTED(once=1)
    evaluator, trainer = scripted([1.0]), trainer_of()
    Evaluation(evaluator, [0], every=events).attach(trainer)
    _ = events | Events.ITERATION_COMPLETED
    runs = []
    evaluator.add_event_handler(Events.COMPLETED, lambda: runs.append(trainer.state.iteration))
    trainer.run(batches(3), max_epochs=2)
    assert runs == [0, 6]


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


def test_a_handler_can_listen_to_several_events():
    trainer = trainer_of()
    counter = Counter().attach(trainer)
    trainer.run(batches(3), max_epochs=3)
    assert (counter.steps, counter.epochs) == (9, 2)


def test_attach_returns_the_handler_itself():
    counter = Counter()
    assert counter.attach(trainer_of()) is counter


@pytest.mark.parametrize("make", [trainer_of, lambda: Engine(lambda engine, batch: None)], ids=["trainer", "ignite"])
def test_detach_removes_every_method(make):
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


def test_attached_detaches_after_an_exception():
    trainer, counter = trainer_of(), Counter()
    with pytest.raises(KeyError, match="out"), counter.attached(trainer):
        raise KeyError("out")
    assert counter.engine is None
    assert trainer.handlers == {}


def test_detaching_a_handler_that_was_never_attached_does_nothing():
    counter = Counter()
    counter.detach()
    assert counter.engine is None


def test_a_detached_handler_can_be_attached_to_another_engine():
    first, second, counter = trainer_of(), trainer_of(), Counter()
    counter.attach(first).detach()
    counter.attach(second)
    first.run(batches(3))
    second.run(batches(2))
    assert counter.steps == 2


def test_attaching_twice_raises():
    trainer = trainer_of()
    counter = Counter().attach(trainer)
    with pytest.raises(RuntimeError, match=r"Counter is attached already; call detach\(\) first"):
        counter.attach(trainer_of())


def test_a_duplicate_name_raises_and_changes_nothing():
    trainer = trainer_of()
    Counter().attach(trainer)
    second = Counter()
    with pytest.raises(ValueError, match="a handler named 'Counter' is attached already.*name='Counter2'"):
        second.attach(trainer)
    trainer.run(batches(3))
    assert second.steps == 0


def test_two_handlers_of_one_class_can_be_attached_under_different_names():
    trainer = trainer_of()
    first, second = Counter().attach(trainer), Counter().attach(trainer, name="second")
    assert trainer.handlers == {"Counter": first, "second": second}
    first.detach()
    trainer.run(batches(3))
    assert (first.steps, second.steps) == (0, 3)


def test_attaching_to_an_object_that_is_not_an_engine_raises():
    with pytest.raises(TypeError, match=r"Counter.attach\(\) needs an Ignite engine, got Linear"):
        Counter().attach(linear())


def test_a_failed_attach_leaves_nothing_behind():
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


def test_an_overridden_method_keeps_its_events():
    class Doubling(Counter):
        def step(self, engine):
            self.steps += 2

    trainer = trainer_of()
    handler = Doubling().attach(trainer)
    trainer.run(batches(3))
    assert (handler.steps, handler.epochs) == (6, 1)


def test_an_overridden_method_with_a_new_decorator_has_the_new_events():
    class Rare(Counter):
        @on(Events.COMPLETED)
        def step(self, engine):
            self.steps += 1

    trainer = trainer_of()
    handler = Rare().attach(trainer)
    trainer.run(batches(3))
    assert handler.steps == 1


def test_a_method_may_omit_the_engine_argument():
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
def test_on_rejects_arguments_that_are_not_events(event):
    with pytest.raises(TypeError, match="expected an event such as Events.EPOCH_COMPLETED"):
        on(event)


def test_on_without_events_raises():
    with pytest.raises(TypeError, match=r"on\(\) needs at least one event"):
        on()


def test_a_handler_can_be_attached_to_any_ignite_engine_that_has_its_events():
    class Epochs(Handler):
        seen = ()

        @on(Events.EPOCH_COMPLETED(every=2))
        def see(self, engine):
            self.seen = (*self.seen, engine.state.epoch)

    engine = Engine(lambda engine, batch: None)
    handler = Epochs().attach(engine)
    engine.run([0], max_epochs=5)
    assert handler.seen == (2, 4)


def test_attaching_a_handler_of_step_events_to_a_plain_engine_names_the_event():
    with pytest.raises(ValueError, match=r"Counter runs on OPTIMIZER_STEP_COMPLETED.*create_trainer\(\)"):
        Counter().attach(Engine(lambda engine, batch: None))


def test_a_handler_without_events_raises_and_shows_how_to_add_one():
    class Report(Handler):
        def report(self, engine):
            print(engine.state.epoch)

    with pytest.raises(ValueError, match=r"Report runs on no event; mark a method .*@on\(Events.EPOCH_COMPLETED\)$"):
        Report().attach(trainer_of())


@pytest.mark.parametrize("names", [(), ("epochs",)], ids=["stateless", "with a state"])
def test_a_handler_with_methods_of_a_keras_callback_is_pointed_to_keras_style(names):
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
def test_a_handler_without_events_may_define_other_hooks(body):
    handler = type("Quiet", (Handler,), body)()
    assert handler.attach(trainer_of()).name == "Quiet"


@pytest.mark.parametrize("attribute", ["saved", "changes"])
@pytest.mark.parametrize(
    ("value", "what"),
    [("weights", r"; write \('weights',\), with a comma"), (5, ", got 5"), ((Handler,), ", got .*Handler")],
    ids=["text", "number", "class"],
)
def test_saved_and_changes_must_be_tuples_of_names(attribute, value, what):
    handler = type("Wrong", (Counter,), {attribute: value})()
    with pytest.raises(TypeError, match=f"Wrong.{attribute} must be a tuple of names{what}"):
        handler.attach(trainer_of())


def test_changes_rejects_unknown_names():
    class Wrong(Counter):
        changes = ("weights", "gradient")

    with pytest.raises(ValueError, match="Wrong.changes may name 'loss', 'gradients', 'weights', got 'gradient'"):
        Wrong().attach(trainer_of())


SIGNATURE_ERROR = "can't be called at ITERATION_COMPLETED: a handler takes"


@pytest.mark.parametrize("event", [Events.ITERATION_COMPLETED, Events.ITERATION_COMPLETED(every=2) | Events.COMPLETED])
def test_a_function_with_a_batch_argument_is_pointed_to_the_state(event):
    def look(engine, batch):
        print(batch)

    with pytest.raises(ValueError, match=rf"look {SIGNATURE_ERROR} \(engine\), this one takes \(engine, batch\); the batch is"):
        trainer_of().on(event)(look)


@pytest.mark.parametrize("engine", [trainer_of, lambda: Engine(lambda engine, batch: None)], ids=["trainer", "Ignite's"])
def test_a_method_with_a_batch_argument_is_pointed_to_the_state(engine):
    class Look(Handler):
        @on(Events.ITERATION_COMPLETED)
        def look(self, engine, batch):
            print(batch)

    engine = engine()
    with pytest.raises(ValueError, match=rf"Look.look {SIGNATURE_ERROR} \(engine\), .*; the batch is engine.state.batch"):
        Look().attach(engine)
    assert engine.handlers == {}


def test_an_unknown_argument_of_a_function_is_named():
    with pytest.raises(
        ValueError, match=rf"<lambda> {SIGNATURE_ERROR} \(engine, 3, size=4\), this one takes \(engine, number\)"
    ):
        trainer_of().add_event_handler(Events.ITERATION_COMPLETED, lambda engine, number: None, 3, size=4)


@pytest.mark.parametrize("event", [Events.EXCEPTION_RAISED, Events.TERMINATE_SINGLE_EPOCH], ids=lambda event: event.name)
def test_the_arguments_that_an_event_passes_are_named(event):
    with pytest.raises(ValueError, match=rf"at {event.name}: a handler takes \(engine, \w+\), this one takes \(a, b, c\)"):
        trainer_of().add_event_handler(event, lambda a, b, c: None)
