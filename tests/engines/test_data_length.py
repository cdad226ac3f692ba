"""Data whose length is wrong, datasets that raise StopIteration, and losses that train nothing are clear errors."""

import logging

import pytest
import torch
from ignite.metrics import Loss
from torch.utils.data import DataLoader, Dataset
from toys import batches, linear, sgd, trainer_of

from camshaft import Events, create_evaluator, create_trainer

mse = torch.nn.functional.mse_loss


class Lying:
    """Batches with a length that is not theirs."""

    def __init__(self, number, length):
        self.number, self.length = number, length

    def __iter__(self):
        return iter(batches(self.number))

    def __len__(self):
        return self.length


class Stops(Dataset):
    """A dataset that raises StopIteration for one sample."""

    def __init__(self, at):
        self.at = at

    def __len__(self):
        return 8

    def __getitem__(self, index):
        if index == self.at:
            raise StopIteration
        return torch.ones(3), torch.ones(2)


def evaluator():
    return create_evaluator(linear(), metrics={"loss": Loss(mse)})


@pytest.mark.parametrize("make", [trainer_of, evaluator])
@pytest.mark.parametrize("epochs", [1, 2])
def test_a_length_that_is_too_large(make, epochs):
    with pytest.raises(RuntimeError, match="the data ended after 3 batches, but its length is 5"):
        make().run(Lying(3, length=5), max_epochs=epochs)


def test_a_length_that_is_too_small():
    with pytest.raises(RuntimeError, match="returns more batches than its length, 3"):
        trainer_of().run(Lying(5, length=3), max_epochs=2)


@pytest.mark.parametrize("make", [trainer_of, evaluator])
def test_an_epoch_length_of_the_users_own_is_no_mistake(make):
    assert make().run(batches(3), max_epochs=2, epoch_length=5).iteration == 10
    assert make().run(batches(5), max_epochs=2, epoch_length=3).iteration == 6


@pytest.mark.parametrize("make", [trainer_of, evaluator])
@pytest.mark.parametrize("at", [2, 7])
def test_stop_iteration_out_of_a_dataset(make, at):
    with pytest.raises(RuntimeError, match=r"its length is 4: .*a StopIteration has come out of the dataset"):
        make().run(DataLoader(Stops(at), batch_size=2))


def test_data_that_grows_between_epochs():
    data = batches(3)
    trainer = trainer_of()
    trainer.add_event_handler(Events.EPOCH_COMPLETED(once=1), lambda: data.append(data[0]))
    assert trainer.run(data, max_epochs=2).iteration == 6


@pytest.mark.parametrize("of", ["another model", "a leaf of its own", "meta"])
@pytest.mark.parametrize("window", [1, 2])
def test_a_loss_that_trains_nothing(of, window):
    model, other = linear(), linear()
    losses = {
        "another model": lambda model, batch: other(batch[0]).mean(),
        "a leaf of its own": lambda model, batch: torch.ones((), requires_grad=True) * 2,
        "meta": lambda model, batch: torch.ones((), device="meta", requires_grad=True) * 2,
    }
    trainer = create_trainer(model, sgd(model), None, compute_loss=losses[of], accumulation_steps=window)
    with pytest.raises(RuntimeError, match=r"compute_loss .* trains nothing: .* no parameter of the optimizer has a gradient"):
        trainer.run(batches(4))


def test_a_loss_that_trains_a_part_of_the_model_is_fine():
    model = torch.nn.ModuleDict({"one": linear(), "two": linear()})
    trainer = create_trainer(model, sgd(model), None, compute_loss=lambda model, batch: model["one"](batch[0]).mean())
    assert trainer.run(batches(3)).optimizer_step == 3


def fail_at(trainer, iteration):
    def fail():
        raise RuntimeError("stop here")

    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=iteration), fail)


@pytest.mark.parametrize("failed_at", [1, 2, 5])
def test_a_run_after_an_exception_says_what_it_skips(failed_at, caplog):
    trainer = trainer_of()
    fail_at(trainer, failed_at)
    with pytest.raises(RuntimeError, match="stop here"):
        trainer.run(batches(3), max_epochs=4)
    with caplog.at_level(logging.WARNING, logger="camshaft"):
        trainer.run(batches(3), max_epochs=4)
    epoch, position = divmod(failed_at - 1, 3)
    assert f"the last run failed in epoch {epoch + 1}, after {position + 1} of 3 batches: the rest of that epoch" in caplog.text
    assert trainer.state.epoch == 4


def test_a_run_after_an_exception_at_the_end_of_an_epoch_skips_nothing(caplog):
    trainer = trainer_of()
    fail_at(trainer, 3)
    with pytest.raises(RuntimeError, match="stop here"):
        trainer.run(batches(3), max_epochs=2)
    with caplog.at_level(logging.WARNING, logger="camshaft"):
        trainer.run(batches(3), max_epochs=2)
    assert "failed" not in caplog.text
