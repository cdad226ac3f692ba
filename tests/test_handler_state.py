"""The attributes of a handler that are saved in checkpoints."""

import pytest
import torch
from toys import batches, trainer_of

from camshaft import (
    CheckpointRotation,
    Handler,
)


class Holder(Handler):
    """A handler with one saved attribute."""

    saved = ("value",)

    def __init__(self, value=None):
        self.value = value


@pytest.mark.parametrize(
    "value",
    [3, 2.5, "text", True, None, b"bytes", [1, [2, {"a": (3, None)}]], {"a": 1, 2: "b"}, (1, 2), {"t": torch.arange(3)}],
    ids=repr,
)
def test_saved_attributes_are_restored(value, tmp_path):
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


def test_an_attribute_with_a_state_dict_is_saved_with_it(tmp_path):
    trainer = trainer_of()
    holder = Holder(torch.nn.Linear(2, 2)).attach(trainer)
    path = CheckpointRotation(tmp_path).attach(trainer).save()
    fresh = trainer_of()
    other = Holder(torch.nn.Linear(2, 2)).attach(fresh)
    CheckpointRotation(tmp_path).attach(fresh).resume(path)
    assert torch.equal(other.value.weight, holder.value.weight)


def test_state_is_saved_under_the_handlers_name(tmp_path):
    trainer = trainer_of()
    Holder(1).attach(trainer)
    Holder(2).attach(trainer, name="other")
    path = CheckpointRotation(tmp_path).attach(trainer).save()
    fresh = trainer_of()
    other, first = Holder().attach(fresh, name="other"), Holder().attach(fresh)
    CheckpointRotation(tmp_path).attach(fresh).resume(path)
    assert (first.value, other.value) == (1, 2)


@pytest.mark.parametrize(("value", "where"), [(object(), "Holder.value"), ({"a": [lambda: 0]}, r"Holder.value\['a'\]\[0\]")])
def test_an_attribute_that_cannot_be_saved_is_named(value, where):
    holder = Holder(value).attach(trainer_of())
    with pytest.raises(TypeError, match=f"{where} is a .*which a checkpoint can't carry safely"):
        holder.state_dict()


def test_a_saved_attribute_that_does_not_exist_is_named():
    class Forgetful(Handler):
        saved = ("steps",)

    trainer = trainer_of()
    handler = Forgetful().attach(trainer)
    with pytest.raises(AttributeError, match=r"Forgetful.saved names 'steps', which is not set .*set it in __init__"):
        trainer.checkpoint()
    handler.steps = 3  # as a handler of STARTED could do
    assert trainer.checkpoint()["handlers"]["Forgetful"] == {"steps": 3}


def test_handlers_added_or_removed_since_the_checkpoint_give_one_warning_that_names_them(tmp_path):
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


def resumed_without_its_handler(folder):
    """A trainer resumed from a checkpoint that has the state of a handler named ``late``, which isn't attached."""
    trainer = trainer_of()
    Holder(1).attach(trainer, name="late")
    path = CheckpointRotation(folder).attach(trainer).save()
    fresh = trainer_of()
    CheckpointRotation(folder).attach(fresh).resume(path)
    return fresh


@pytest.mark.filterwarnings("ignore:resume. the handlers are not those")
def test_a_handler_attached_after_the_resume_is_restored(tmp_path):
    fresh = resumed_without_its_handler(tmp_path)
    assert Holder("mine").attach(fresh, name="late").value == 1
    assert Holder("mine").attach(fresh, name="other").value == "mine"


@pytest.mark.filterwarnings("ignore:resume. the handlers are not those")
def test_unused_state_is_discarded_when_the_run_starts(tmp_path):
    fresh = resumed_without_its_handler(tmp_path)
    fresh.run(batches(1))
    assert Holder("mine").attach(fresh, name="late").value == "mine"
