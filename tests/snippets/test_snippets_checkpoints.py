"""docs/from-your-loop/checkpoints.md: what the copied code loses, and what a checkpoint keeps."""

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


def test_saving_where_the_folder_is_made_saves_once():
    copied(FOLDER)
    assert printed(FOLDER, "copied") == "['epoch_1.pt']\n"


def test_the_rotation_saves_every_epoch():
    page = instead(FOLDER)
    assert [entry.epoch for entry in page.checkpoints.index.entries] == [1, 2, 3]


def test_beginning_with_the_saved_epoch_trains_it_twice():
    assert copied(START_EPOCH).trained == [1, 2, 2, 3, 4]


def test_resume_goes_on_with_the_next_epoch():
    assert instead(START_EPOCH).trained == [1, 2, 3, 4]


def test_model_and_optimizer_alone_give_other_weights_and_an_earlier_schedule():
    page = copied(RESUME)
    assert not same(page.whole, page.resumed)
    assert page.scheduler.last_epoch == 2


def test_resume_gives_the_weights_of_the_run_that_was_never_stopped():
    page = instead(RESUME)
    assert same(page.whole, page.resumed)
    assert page.scheduler.last_epoch == 4


def test_a_whole_model_runs_code_and_needs_its_source():
    copied(WHOLE_MODEL)
    assert "this line was run by torch.load\nNo module named 'models'\n" in printed(WHOLE_MODEL, "copied")


def test_weights_load_from_a_file_of_weights_and_from_a_checkpoint():
    page = instead(WHOLE_MODEL)
    assert same(page.model, page.fresh)
    assert not same(page.model, page.make_run()[0])
    assert printed(WHOLE_MODEL, "instead") == "the same weights: True\n" * 2


def test_a_file_that_holds_code_is_refused(tmp_path):
    stranger = copied(WHOLE_MODEL).Stranger()
    torch.save(stranger, tmp_path / "net.pth")
    with pytest.raises(RuntimeError, match=r"net\.pth"):
        instead(WHOLE_MODEL).load_weights(torch.nn.Linear(2, 2), tmp_path / "net.pth")


def test_a_state_dict_that_was_not_copied_goes_on_training():
    page = copied(BEST)
    assert page.best > 0.5
    assert page.accuracy_of(page.model) < page.best - 0.3


def test_the_best_checkpoint_has_the_best_weights():
    page = instead(BEST)
    assert page.accuracy_of(page.model) == pytest.approx(page.best)


def test_more_than_patience_stops_an_epoch_late_and_saves_nothing_of_it():
    assert copied(EARLY_STOP).epoch == 5
    assert "['model']" in printed(EARLY_STOP, "copied")


def test_early_stopping_stops_on_time_and_is_saved():
    page = instead(EARLY_STOP)
    assert page.trainer.state.epoch == 4
    assert page.saved == {"best": 0.9, "stale": 2}
