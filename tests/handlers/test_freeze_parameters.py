"""Frozen parameters don't change until they are unfrozen, even with momentum and weight decay."""

import pytest
import torch
from ignite.engine import Events
from toys import batches, model_of, sgd

from camshaft import CheckpointRotation, FreezeParameters, StepEvents, create_trainer


def two_layers(**options):
    torch.manual_seed(7)
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 2))
    optimizer = sgd(model, momentum=0.9, weight_decay=0.1)
    return create_trainer(model, optimizer, torch.nn.functional.mse_loss, **options)


def moves(trainer, layer="0.weight", **run):
    """The optimizer steps that changed a parameter."""
    parameter = dict(model_of(trainer).named_parameters())[layer]
    before, moved = [parameter.detach().clone()], []

    @trainer.on(StepEvents.OPTIMIZER_STEP_COMPLETED)
    def look(engine):
        if not torch.equal(parameter, before[0]):
            moved.append(engine.state.optimizer_step)
            before[0] = parameter.detach().clone()

    trainer.run(batches(3), **run)
    return moved


@pytest.mark.parametrize(
    ("until", "expected"),
    [
        ({}, []),
        ({"until_epoch": 1}, [1, 2, 3, 4, 5, 6, 7, 8, 9]),
        ({"until_epoch": 2}, [4, 5, 6, 7, 8, 9]),
        ({"until_epoch": 3}, [7, 8, 9]),
        ({"until_step": 1}, [1, 2, 3, 4, 5, 6, 7, 8, 9]),
        ({"until_step": 5}, [5, 6, 7, 8, 9]),
        ({"until_step": 7}, [7, 8, 9]),
    ],
    ids=str,
)
def test_they_are_trained_from_the_given_epoch_or_step(until, expected):
    trainer = two_layers()
    FreezeParameters("0.*", **until).attach(trainer)
    assert moves(trainer, max_epochs=3) == expected


def test_the_other_parameters_are_trained():
    trainer = two_layers()
    FreezeParameters("0.*").attach(trainer)
    assert moves(trainer, "1.weight") == [1, 2, 3]


def test_earlier_momentum_does_not_change_them():
    trainer = two_layers()
    trainer.run(batches(3))
    trainer.state.max_epochs = None
    FreezeParameters("0.*").attach(trainer)
    assert moves(trainer) == []


def test_until_step_counts_windows_and_not_batches():
    trainer = two_layers(accumulation_steps=2)
    FreezeParameters("0.*", until_step=2).attach(trainer)
    assert moves(trainer, max_epochs=2) == [2, 3, 4]


def test_parameters_that_were_frozen_before_stay_frozen():
    trainer = two_layers()
    model_of(trainer)[0].bias.requires_grad_(False)
    FreezeParameters("0.*", until_epoch=2).attach(trainer)
    trainer.run(batches(3), max_epochs=2)
    assert model_of(trainer)[0].weight.requires_grad
    assert not model_of(trainer)[0].bias.requires_grad


def test_detaching_unfreezes_them():
    trainer = two_layers()
    with FreezeParameters("*.weight").attached(trainer):
        assert not model_of(trainer)[0].weight.requires_grad
    assert all(p.requires_grad for p in model_of(trainer).parameters())


@pytest.mark.parametrize("until", [{"until_epoch": 3}, {"until_step": 7}], ids=str)
def test_after_a_resume_they_are_unfrozen_at_the_same_point(until, tmp_path):
    first = two_layers()
    FreezeParameters("0.*", **until).attach(first)
    CheckpointRotation(tmp_path).attach(first)
    first.run(batches(3), max_epochs=2)
    second = two_layers()
    FreezeParameters("0.*", **until).attach(second)
    CheckpointRotation(tmp_path).attach(second).resume()
    frozen = []
    second.add_event_handler(Events.ITERATION_STARTED, lambda: frozen.append(not model_of(second)[0].weight.requires_grad))
    second.run(batches(3), max_epochs=4)
    assert frozen == [False] * 6


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: FreezeParameters("0.*", until_epoch=0), "until_epoch must be a positive integer, got 0"),
        (lambda: FreezeParameters("0.*", until_step=1.5), "until_step must be a positive integer, got 1.5"),
        (lambda: FreezeParameters("0.*", until_step=1, until_epoch=1), "exclude each other"),
        (
            lambda: FreezeParameters("encoder.*").attach(two_layers()),
            "pattern 'encoder.*' matches no parameter; the model has",
        ),
        (lambda: FreezeParameters().attach(two_layers()), "name at least one pattern"),
    ],
)
def test_wrong_arguments_are_errors(make, text):
    with pytest.raises(ValueError, match=text):
        make()
