"""Every shipped handler is attached, runs, is saved, loaded in a new trainer that continues, and detached."""

import ast
import doctest
import io
import re
from pathlib import Path

import pytest
import torch
from ignite.engine import Engine, Events
from toys import batches, evaluator_of, linear, model_of, same, scripted, sgd, trainer_of, weights

import camshaft.handlers
from camshaft import CheckpointRotation
from camshaft.handlers import (
    EarlyStopping,
    Evaluation,
    FreezeParameters,
    KerasStyle,
    LRScheduling,
    Progress,
    TensorBoard,
)


def schedule(trainer):
    return torch.optim.lr_scheduler.ExponentialLR(trainer.primary.optimizers[0], 0.5)


class EpochCounter:
    """A Keras callback with state."""

    epochs = 0

    def on_epoch_end(self, epoch, logs):
        self.epochs += 1

    def state_dict(self):
        return {"epochs": self.epochs}

    def load_state_dict(self, state):
        self.epochs = state["epochs"]


SPECIAL = {
    "CheckpointRotation": lambda trainer, folder: CheckpointRotation(folder / "others"),
    "EarlyStopping": lambda trainer, folder: EarlyStopping("score"),
    "Evaluation": lambda trainer, folder: Evaluation(evaluator_of(model_of(trainer)), batches(1)),
    "FreezeParameters": lambda trainer, folder: FreezeParameters("bias", until_step=2),
    "KerasStyle": lambda trainer, folder: KerasStyle(EpochCounter()),
    "LRScheduling": lambda trainer, folder: LRScheduling(schedule(trainer)),
    "Progress": lambda trainer, folder: Progress(file=io.StringIO()),
    "TensorBoard": lambda trainer, folder: TensorBoard(folder / "board", every=1),
}
"""Handlers that need a trainer, a folder or a metric of this test. Any other is made by the call in its docstring's example."""

SHIPPED = [name for name in camshaft.handlers.__all__ if name not in ("Handler", "on")]

ON_ANY_ENGINE = ("EarlyStopping", "EmptyCache", "Evaluation", "Progress", "StopOnSignal")
"""Handlers that can be attached to any Ignite engine, because they need only Ignite's own events."""


def make(name, trainer, folder):
    """A handler of the shipped class with this name."""
    if name in SPECIAL:
        return SPECIAL[name](trainer, folder)
    cls = getattr(camshaft.handlers, name)
    calls = [node for node in ast.walk(example_of(cls)) if isinstance(node, ast.Call)]
    own = [ast.unparse(call) for call in calls if isinstance(call.func, ast.Name) and call.func.id == name]
    return eval(own[0], dict(vars(camshaft))) if own else cls()


def example_of(cls):
    """The code of the example in a class's docstring."""
    found = doctest.DocTestParser().get_examples(cls.__doc__ or "")
    return ast.parse("".join(example.source for example in found))


def test_every_file_of_the_folder_is_listed_in_its_init():
    folder = Path(camshaft.handlers.__file__).parent
    classes = [node.name for path in folder.glob("[a-z]*.py") for node in ast.parse(path.read_text()).body if is_handler(node)]
    assert sorted(classes) == SHIPPED


def is_handler(node):
    return isinstance(node, ast.ClassDef) and any(ast.unparse(base) == "Handler" for base in node.bases)


def prepared(name, folder):
    """A trainer with one shipped handler, a metric for those that need one, and a handler that saves checkpoints."""
    trainer = trainer_of(optimizer=None)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda e: e.state.metrics.update(score=1.0))
    handler = make(name, trainer, folder).attach(trainer)
    checkpoints = CheckpointRotation(folder / "checkpoints").attach(trainer, "saves the test")
    return trainer, handler, checkpoints


def ending(trainer):
    return weights(model_of(trainer)), trainer.state.optimizer_step, trainer.primary.optimizers[0].param_groups[0]["lr"]


def comparable(value):
    """A state with lists in place of its tensors."""
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {key: comparable(item) for key, item in value.items()}
    return [comparable(item) for item in value] if isinstance(value, (list, tuple)) else value


@pytest.mark.parametrize("name", SHIPPED)
def test_an_interrupted_and_resumed_run_equals_an_uninterrupted_one(name, tmp_path):
    complete, expected, _ = prepared(name, tmp_path / "complete")
    complete.run(batches(3), max_epochs=2)
    first, _, _ = prepared(name, tmp_path / "resumed")
    first.run(batches(3), max_epochs=1)
    second, handler, checkpoints = prepared(name, tmp_path / "resumed")
    assert checkpoints.resume() is not None
    second.run(batches(3), max_epochs=2)
    assert same(ending(second)[0], ending(complete)[0])
    assert ending(second)[1:] == ending(complete)[1:]
    assert comparable(handler.state_dict()) == comparable(expected.state_dict())


@pytest.mark.parametrize("name", SHIPPED)
def test_detaching_restores_the_engine(name, tmp_path):
    trainer = trainer_of()
    before, text = trainer.primary.window.settings, trainer.explain()
    handler = make(name, trainer, tmp_path).attach(trainer)
    assert handler.engine is trainer
    handler.detach()
    assert (handler.engine, trainer.handlers, trainer.explain()) == (None, {}, text)
    assert (trainer.primary.window.settings, trainer.primary.precision.dtype) == (before, None)
    assert all(parameter.requires_grad for parameter in model_of(trainer).parameters())


@pytest.mark.parametrize("name", SHIPPED)
def test_a_run_after_detaching_equals_one_without_the_handler(name, tmp_path):
    trainer, plain = trainer_of(), trainer_of()
    make(name, trainer, tmp_path).attach(trainer).detach()
    trainer.run(batches(3))
    plain.run(batches(3))
    assert same(weights(model_of(trainer)), weights(model_of(plain)))


CHANGES = {"FreezeParameters": "weights", "GradientClipping": "gradients"}


@pytest.mark.parametrize("name", SHIPPED)
def test_explain_says_exactly_what_it_changes(name, tmp_path):
    trainer = trainer_of()
    make(name, trainer, tmp_path).attach(trainer)
    found = set(re.findall(r"\[changes (.*)\]", trainer.explain()))
    assert found == ({CHANGES[name]} if name in CHANGES else set())


@pytest.mark.parametrize("name", SHIPPED)
def test_its_state_holds_only_tensors_and_plain_values(name, tmp_path):
    trainer, handler, _ = prepared(name, tmp_path)
    trainer.run(batches(3))
    torch.save(handler.state_dict(), tmp_path / "state.pt")
    assert comparable(torch.load(tmp_path / "state.pt", weights_only=True)) == comparable(handler.state_dict())
    handler.detach()


@pytest.mark.parametrize("name", SHIPPED)
def test_on_a_plain_ignite_engine_it_works_or_attach_says_what_it_needs(name, tmp_path):
    engine, trainer = Engine(lambda engine, batch: 0.5), trainer_of()
    handler = make(name, trainer, tmp_path)
    engine.add_event_handler(Events.EPOCH_STARTED, lambda e: e.state.metrics.update(score=1.0))
    if name in ON_ANY_ENGINE:
        handler.attach(engine)
        assert engine.run(range(2), max_epochs=2).iteration == 4
        handler.detach()
    else:
        with pytest.raises((TypeError, ValueError), match=rf"{name}.*create_trainer\(\)"):
            handler.attach(engine)
        assert handler.engine is None


@pytest.mark.parametrize("name", SHIPPED)
def test_a_second_handler_of_a_class_needs_another_name(name, tmp_path):
    trainer = trainer_of()
    make(name, trainer, tmp_path).attach(trainer)
    with pytest.raises(ValueError, match="is attached already"):
        make(name, trainer, tmp_path).attach(trainer)
    assert len(trainer.handlers) == 1


def test_all_handlers_together_run_and_resume(tmp_path):
    def with_all_handlers():
        model = linear()
        trainer = trainer_of(model, sgd(model, momentum=0.9))
        for name in reversed(SHIPPED):
            if name != "Evaluation":
                make(name, trainer, tmp_path).attach(trainer)
        Evaluation(scripted([1.0]), [0]).attach(trainer)
        trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda e: e.state.metrics.update(score=1.0))
        return trainer

    first = with_all_handlers()
    first.run(batches(4), max_epochs=2)
    second = with_all_handlers()
    assert second.handlers["CheckpointRotation"].resume() == first.handlers["CheckpointRotation"].last
    second.run(batches(4), max_epochs=3)
    assert second.state.iteration == 12
    # Four batches per step, and the first scale of the gradient scaler is too large.
    assert second.state.optimizer_step + second.state.skipped_steps == 3
