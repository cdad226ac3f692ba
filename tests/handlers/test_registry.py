"""Every shipped handler goes through its whole life: attach, run, save, load in a fresh trainer, run on, detach."""

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
    """A callback in Keras's style, with a state."""

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
"""Handlers that need a trainer, a folder or a name of this test; every other is made as its docstring's example makes it."""

SHIPPED = [name for name in camshaft.handlers.__all__ if name not in ("Handler", "on")]


def make(name, trainer, folder):
    """A handler of a shipped class."""
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
    """A trainer with one shipped handler, a metric for those that want one, and a rotation to save with."""
    trainer = trainer_of(optimizer=None)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda e: e.state.metrics.update(score=1.0))
    handler = make(name, trainer, folder).attach(trainer)
    checkpoints = CheckpointRotation(folder / "checkpoints").attach(trainer, "the test's own")
    return trainer, handler, checkpoints


def ending(trainer):
    return weights(model_of(trainer)), trainer.state.optimizer_step, trainer.primary.optimizers[0].param_groups[0]["lr"]


def comparable(value):
    """A state with its tensors as lists."""
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {key: comparable(item) for key, item in value.items()}
    return [comparable(item) for item in value] if isinstance(value, (list, tuple)) else value


@pytest.mark.parametrize("name", SHIPPED)
def test_a_run_in_two_halves_ends_like_a_whole_one(name, tmp_path):
    whole, expected, _ = prepared(name, tmp_path / "whole")
    whole.run(batches(3), max_epochs=2)
    first, _, _ = prepared(name, tmp_path / "halves")
    first.run(batches(3), max_epochs=1)
    second, handler, checkpoints = prepared(name, tmp_path / "halves")
    assert checkpoints.resume() is not None
    second.run(batches(3), max_epochs=2)
    assert same(ending(second)[0], ending(whole)[0])
    assert ending(second)[1:] == ending(whole)[1:]
    assert comparable(handler.state_dict()) == comparable(expected.state_dict())


@pytest.mark.parametrize("name", SHIPPED)
def test_detached_it_leaves_the_engine_as_it_was(name, tmp_path):
    trainer = trainer_of()
    before, text = trainer.primary.window.settings, trainer.explain()
    handler = make(name, trainer, tmp_path).attach(trainer)
    assert handler.engine is trainer
    handler.detach()
    assert (handler.engine, trainer.handlers, trainer.explain()) == (None, {}, text)
    assert (trainer.primary.window.settings, trainer.primary.precision.dtype) == (before, None)
    assert all(parameter.requires_grad for parameter in model_of(trainer).parameters())


@pytest.mark.parametrize("name", SHIPPED)
def test_a_run_after_detaching_is_the_plain_one(name, tmp_path):
    trainer, plain = trainer_of(), trainer_of()
    make(name, trainer, tmp_path).attach(trainer).detach()
    trainer.run(batches(3))
    plain.run(batches(3))
    assert same(weights(model_of(trainer)), weights(model_of(plain)))


CHANGES = {"FreezeParameters": "weights", "GradientClipping": "gradients"}


@pytest.mark.parametrize("name", SHIPPED)
def test_explain_says_what_it_changes_and_nothing_else(name, tmp_path):
    trainer = trainer_of()
    make(name, trainer, tmp_path).attach(trainer)
    found = set(re.findall(r"\[changes (.*)\]", trainer.explain()))
    assert found == ({CHANGES[name]} if name in CHANGES else set())


@pytest.mark.parametrize("name", SHIPPED)
def test_its_state_holds_tensors_and_plain_values_alone(name, tmp_path):
    trainer, handler, _ = prepared(name, tmp_path)
    trainer.run(batches(3))
    torch.save(handler.state_dict(), tmp_path / "state.pt")
    assert comparable(torch.load(tmp_path / "state.pt", weights_only=True)) == comparable(handler.state_dict())
    handler.detach()


@pytest.mark.parametrize("name", SHIPPED)
def test_on_a_plain_ignite_engine_it_works_or_says_what_it_needs(name, tmp_path):
    """Whatever opens at Ignite's own events alone works; whatever needs more is refused at once, by name."""
    engine, trainer = Engine(lambda engine, batch: 0.5), trainer_of()
    handler = make(name, trainer, tmp_path)
    engine.add_event_handler(Events.EPOCH_STARTED, lambda e: e.state.metrics.update(score=1.0))
    if name in ("EarlyStopping", "EmptyCache", "Evaluation", "Progress", "StopOnSignal"):
        handler.attach(engine)
        assert engine.run(range(2), max_epochs=2).iteration == 4
        handler.detach()
    else:
        with pytest.raises((TypeError, ValueError), match=rf"{name}.*create_trainer\(\)"):
            handler.attach(engine)
        assert handler.engine is None


@pytest.mark.parametrize("name", SHIPPED)
def test_two_of_a_class_clash_by_name(name, tmp_path):
    trainer = trainer_of()
    make(name, trainer, tmp_path).attach(trainer)
    with pytest.raises(ValueError, match="is attached already"):
        make(name, trainer, tmp_path).attach(trainer)
    assert len(trainer.handlers) == 1


def test_all_of_them_together_run_and_resume(tmp_path):
    def all_of_them():
        model = linear()
        trainer = trainer_of(model, sgd(model, momentum=0.9))
        for name in reversed(SHIPPED):
            if name != "Evaluation":
                make(name, trainer, tmp_path).attach(trainer)
        Evaluation(scripted([1.0]), [0]).attach(trainer)
        trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda e: e.state.metrics.update(score=1.0))
        return trainer

    first = all_of_them()
    first.run(batches(4), max_epochs=2)
    second = all_of_them()
    assert second.handlers["CheckpointRotation"].resume() == first.handlers["CheckpointRotation"].last
    second.run(batches(4), max_epochs=3)
    assert second.state.iteration == 12
    assert (
        second.state.optimizer_step + second.state.skipped_steps == 3
    )  # four batches a step; the scaler's first scale is too large
