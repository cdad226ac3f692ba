"""A trainer with handlers is freed as soon as it goes out of scope, without the cyclic garbage collector."""

import gc
import weakref
from contextlib import suppress

import pytest
import torch
from ignite.engine import Events
from test_registry import ON_ANY_ENGINE, SHIPPED, make
from toys import batches, linear, sgd, trainer_of

from camshaft import create_evaluator, create_gan_trainer


def gan_trainer():
    generator, critic = torch.nn.Linear(2, 3), torch.nn.Linear(3, 1)
    return create_gan_trainer(generator, critic, sgd(generator), sgd(critic), latent=2)


def evaluator():
    return create_evaluator(linear())


ENGINES = {
    "trainer": (trainer_of, lambda: batches(2)),
    "GAN trainer": (gan_trainer, lambda: [x for x, _ in batches(2)]),
    "evaluator": (evaluator, lambda: batches(2)),
}


@pytest.fixture(autouse=True)
def no_collector():
    gan_trainer().run(
        [x for x, _ in batches(1)]
    )  # torch imports some modules lazily, and their first exceptions keep frames alive
    trainer_of(amp="fp16")
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def run_and_fail(engine, data):
    def fail():
        raise RuntimeError("stop here")

    engine.add_event_handler(Events.ITERATION_COMPLETED(once=2), fail)
    with suppress(RuntimeError):  # pytest.raises would keep the traceback
        engine.run(data)


def run_twice(engine, data):
    engine.run(data, max_epochs=2)
    engine.state.max_epochs = None
    engine.run(data, max_epochs=3)


USES = {"two runs": run_twice, "a run that fails": run_and_fail}


def after_use(kind, name, use, folder):
    """Attaches a handler to a new engine, uses the engine, and returns the handler and a weak reference to the engine."""
    make_engine, data = ENGINES[kind]
    engine = make_engine()
    handler = make(name, engine, folder).attach(engine)
    engine.add_event_handler(Events.EPOCH_COMPLETED, lambda e: e.state.metrics.update(score=1.0))
    USES[use](engine, data())
    return handler, weakref.ref(engine)


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("kind", ["trainer", "GAN trainer"])
@pytest.mark.parametrize("name", SHIPPED)
def test_a_trainer_is_freed_while_its_handler_is_still_referenced(name, kind, use, tmp_path):
    handler, trainer = after_use(kind, name, use, tmp_path)
    assert trainer() is None
    assert handler.engine is None


@pytest.mark.parametrize("name", [name for name in SHIPPED if name != "CheckpointRotation"])  # it and its writer are a cycle
def test_a_handler_is_freed_with_its_trainer(name, tmp_path):
    handler, trainer = after_use("trainer", name, "two runs", tmp_path)
    watched = weakref.ref(handler)
    del handler
    assert (trainer(), watched()) == (None, None)


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("name", [name for name in ON_ANY_ENGINE if name != "Evaluation"])  # which needs the trainer's model
def test_an_evaluator_is_freed_while_its_handler_is_still_referenced(name, use, tmp_path):
    handler, engine = after_use("evaluator", name, use, tmp_path)
    assert engine() is None
    assert handler.engine is None
