"""docs/from-your-loop/checkpoints.md: the copied code and its replacements."""

import pytest
import torch
from snippet_pages import copied, instead, printed

FOLDER = "`if not os.path.isdir(path): os.mkdir(path)` and `torch.save` in one block"
START_EPOCH = 'Resume training with `start_epoch = checkpoint["epoch"]`'
RESUME = "Resume with model and optimizer alone: the loss jumps after loading"
WHOLE_MODEL = "`torch.save(net)` and `torch.load`: whole model, weights, or full checkpoint"
BEST = "Save the best model: `best_weights = model.state_dict()`"
EARLY_STOP = "Early stopping with `if stale > patience: break`"


def same(left, right):
    return all(map(torch.equal, left.state_dict().values(), right.state_dict().values()))


def test_saving_only_when_the_folder_is_created_saves_once():
    copied(FOLDER)
    assert printed(FOLDER, "copied") == "['epoch_1.pt']\n"


def test_checkpoint_rotation_saves_every_epoch():
    page = instead(FOLDER)
    assert [entry.epoch for entry in page.checkpoints.index.entries] == [1, 2, 3]


def test_starting_with_the_saved_epoch_trains_it_twice():
    assert copied(START_EPOCH).trained == [1, 2, 2, 3, 4]


def test_resume_continues_with_the_next_epoch():
    assert instead(START_EPOCH).trained == [1, 2, 3, 4]


def test_restoring_only_model_and_optimizer_gives_other_weights_and_an_earlier_schedule():
    page = copied(RESUME)
    assert not same(page.whole, page.resumed)
    assert page.scheduler.last_epoch == 2


def test_resume_gives_the_weights_of_an_uninterrupted_run():
    page = instead(RESUME)
    assert same(page.whole, page.resumed)
    assert page.scheduler.last_epoch == 4


def test_loading_a_pickled_model_runs_code_and_needs_its_source():
    copied(WHOLE_MODEL)
    assert "this line was run by torch.load\nNo module named 'models'\n" in printed(WHOLE_MODEL, "copied")


def test_weights_are_loaded_from_a_weights_file_and_from_a_checkpoint():
    page = instead(WHOLE_MODEL)
    assert same(page.model, page.fresh)
    assert not same(page.model, page.make_run()[0])
    assert printed(WHOLE_MODEL, "instead") == "the same weights: True\n" * 2


def test_a_file_with_code_raises(tmp_path):
    stranger = copied(WHOLE_MODEL).Stranger()
    torch.save(stranger, tmp_path / "net.pth")
    with pytest.raises(RuntimeError, match=r"net\.pth"):
        instead(WHOLE_MODEL).load_weights(torch.nn.Linear(2, 2), tmp_path / "net.pth")


def test_a_state_dict_that_was_not_copied_changes_with_training():
    page = copied(BEST)
    assert page.best > 0.5
    assert page.accuracy_of(page.model) < page.best - 0.3


def test_the_best_checkpoint_has_the_best_weights():
    page = instead(BEST)
    assert page.accuracy_of(page.model) == pytest.approx(page.best)


def test_comparing_with_more_than_patience_stops_an_epoch_late():
    assert copied(EARLY_STOP).epoch == 5
    assert "['model']" in printed(EARLY_STOP, "copied")


def test_early_stopping_stops_in_time_and_saves_its_state():
    page = instead(EARLY_STOP)
    assert page.trainer.state.epoch == 4
    assert page.saved == {"best": 0.9, "stale": 2}
