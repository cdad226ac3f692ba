"""Which checkpoint is resumed, what a resume restores, and how the run continues."""

import copy

import pytest
import torch
from ignite.engine import Engine, Events
from rotations import rotating
from toys import batches, data_parallel, linear, model_of, same, scripted, sgd, trainer_of, weights

from camshaft import (
    CheckpointRotation,
    EarlyStopping,
    Evaluation,
    ExponentialMovingAverage,
    LRHistory,
    LRScheduling,
    create_trainer,
)
from camshaft.checkpoints import files


def everything(folder, scores):
    """A trainer with momentum, dropout, a schedule, an EMA, a history and early stopping; and its rotation."""
    torch.manual_seed(7)
    model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Dropout(), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    trainer = create_trainer(
        model, optimizer, torch.nn.functional.mse_loss, accumulation_steps=2, amp="bf16", clip_grad_norm=1.0
    )
    LRScheduling(torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=40)).attach(trainer)
    LRHistory().attach(trainer)
    ExponentialMovingAverage(0.9).attach(trainer)
    Evaluation(scripted(scores), [0]).attach(trainer)
    EarlyStopping("val/score", patience=9).attach(trainer)
    return trainer, CheckpointRotation(folder, metric="val/score", keep_best=1).attach(trainer)


def shuffled():
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*batches(1, 28)[0]), batch_size=4, shuffle=True)


def ending(trainer):
    """The final state of a run, for comparison."""
    ema, history = trainer.handlers["ExponentialMovingAverage"], trainer.handlers["LRHistory"]
    momenta = [value for state in trainer.primary.optimizers[0].state.values() for value in state.values()]
    stopping = trainer.handlers["EarlyStopping"]
    return weights(model_of(trainer)) + weights(ema.module) + momenta, history.history, (stopping.best, stopping.stale)


@pytest.mark.parametrize("stop_after", [1, 2, 3])
def test_a_run_resumed_after_an_epoch_equals_the_uninterrupted_one_bit_for_bit(stop_after, tmp_path):
    scores = [1.0, 3.0, 2.0, 2.5]
    whole, _ = everything(tmp_path / "whole", scores)
    torch.manual_seed(11)
    whole.run(shuffled(), max_epochs=4)
    first, _ = everything(tmp_path / "parts", scores)
    torch.manual_seed(11)
    first.run(shuffled(), max_epochs=stop_after)
    second, checkpoints = everything(tmp_path / "parts", scores[stop_after:])
    torch.manual_seed(12345)
    assert checkpoints.resume("auto") == tmp_path / "parts" / f"step-{4 * stop_after:08d}.pt"
    second.run(shuffled(), max_epochs=4)
    expected, found = ending(whole), ending(second)
    assert same(found[0], expected[0])
    assert found[1:] == expected[1:]


def test_auto_in_an_empty_folder_starts_from_scratch(tmp_path):
    trainer, checkpoints = rotating(tmp_path)
    assert checkpoints.resume("auto") is None
    assert trainer.run(batches(2)).optimizer_step == 2


def test_a_resume_restores_clocks_and_metrics(tmp_path):
    trainer, _ = rotating(tmp_path, scores=[0.5])
    trainer.run(batches(3), max_epochs=2)
    fresh, checkpoints = rotating(tmp_path, scores=[0.5])
    checkpoints.resume()
    state = fresh.state
    assert (state.epoch, state.iteration, state.optimizer_step, state.skipped_steps) == (2, 6, 6, 0)
    assert dict(state.metrics) == {"val/score": 0.5}


def resumed(folder, **limit):
    """A trainer that has resumed the end of a run."""
    trainer, _ = rotating(folder)
    trainer.run(batches(3), **limit)
    fresh, checkpoints = rotating(folder)
    checkpoints.resume()
    return fresh


@pytest.mark.parametrize(
    ("limit", "said"),
    [
        (
            {"max_epochs": 2},
            "2 of 2 epochs are done; raise max_epochs, use another folder, or set trainer.state.max_epochs = None",
        ),
        (
            {"max_iters": 6},
            "6 of 6 iterations are done; raise max_iters, use another folder, or set trainer.state.max_epochs = t",
        ),
    ],
    ids=["epochs", "iterations"],
)
def test_a_resumed_run_that_is_finished_does_nothing_and_warns(limit, said, tmp_path, caplog):
    fresh, fired = resumed(tmp_path, **limit), []
    fresh.add_event_handler(Events.STARTED, lambda: fired.append(True))
    assert fresh.run(batches(3), **limit).optimizer_step == 6
    assert fired == []
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert f"nothing to do: {said}" in caplog.text


@pytest.mark.parametrize("limit", [{"max_epochs": 2}, {"max_iters": 6}], ids=["epochs", "iterations"])
@pytest.mark.parametrize("asked_before", [True, False])
def test_without_limits_a_resumed_trainer_starts_a_new_run_from_its_weights(limit, asked_before, tmp_path):
    fresh = resumed(tmp_path, **limit)
    model, expected = fresh.primary.module, copy.deepcopy(fresh.primary.module)
    if asked_before:
        fresh.run(batches(3), **limit)
    fresh.state.max_epochs = fresh.state.max_iters = None
    state = fresh.run(batches(2), max_epochs=1)
    assert (state.epoch, state.iteration, state.optimizer_step) == (1, 2, 2)
    trainer_of(expected).run(batches(2))
    assert same(weights(model), weights(expected))


def test_best_and_a_path_resume_that_checkpoint(tmp_path):
    trainer, _ = rotating(tmp_path, scores=[1, 5, 2], keep_last=9)
    trainer.run(batches(2), max_epochs=3)
    best, checkpoints = rotating(tmp_path, scores=[1])
    assert checkpoints.resume("best").name == "step-00000004.pt"
    assert best.state.optimizer_step == 4
    path, checkpoints = rotating(tmp_path, scores=[1])
    assert checkpoints.resume(tmp_path / "step-00000002.pt") == tmp_path / "step-00000002.pt"
    assert path.state.optimizer_step == 2


def test_a_trainer_is_restored_by_a_rotation_that_is_not_attached(tmp_path):
    trainer, _ = rotating(tmp_path, scores=[1, 5, 2], keep_last=9)
    trainer.run(batches(2), max_epochs=3)
    reader, fresh = CheckpointRotation(tmp_path, metric="val/score"), trainer_of()
    assert reader.resume("best", fresh).name == "step-00000004.pt"
    assert fresh.state.optimizer_step == 4
    with pytest.raises(TypeError, match="trainer must be a trainer from create_trainer.., got Engine"):
        reader.resume("best", Engine(lambda engine, batch: None))


@pytest.mark.parametrize(("mode", "expected"), [("min", 2), ("max", 4)])
@pytest.mark.parametrize("index", ["kept", "lost"])
def test_a_reader_without_a_metric_uses_the_mode_of_the_run(mode, expected, index, tmp_path):
    trainer, checkpoints = rotating(tmp_path, scores=[1, 5, 2], keep_last=9, mode=mode)
    trainer.run(batches(2), max_epochs=3)
    if index == "lost":
        (tmp_path / "checkpoints.json").unlink()
    reader, fresh = CheckpointRotation(tmp_path), trainer_of()
    assert reader.best.name == reader.resume("best", fresh).name == f"step-{expected:08d}.pt"


def test_a_reader_with_a_metric_uses_its_own_mode(tmp_path):
    trainer, _ = rotating(tmp_path, scores=[1, 5, 2], keep_last=9)
    trainer.run(batches(2), max_epochs=3)
    assert CheckpointRotation(tmp_path, metric="val/score", mode="min").best.name == "step-00000002.pt"


def flip(path, at=0.5):
    data = bytearray(path.read_bytes())
    data[int(len(data) * at)] ^= 1
    path.write_bytes(data)


def test_auto_passes_over_a_bad_file_and_warns(tmp_path):
    trainer, checkpoints = rotating(tmp_path)
    trainer.run(batches(2), max_epochs=3)
    flip(checkpoints.last)
    fresh, checkpoints = rotating(tmp_path)
    with pytest.warns(RuntimeWarning, match="resumed from .*step-00000004.pt; passed over: .*step-00000006.pt is damaged"):
        assert checkpoints.resume().name == "step-00000004.pt"
    assert fresh.state.optimizer_step == 4


def test_auto_raises_if_no_file_is_usable(tmp_path):
    trainer, _ = rotating(tmp_path)
    trainer.run(batches(2), max_epochs=2)
    for path in tmp_path.glob("*.pt"):
        flip(path)
    fresh, checkpoints = rotating(tmp_path)
    before = weights(model_of(fresh))
    with pytest.raises(RuntimeError, match="no checkpoint in .* can be used: .*step-00000004.*step-00000002"):
        checkpoints.resume()
    assert same(weights(model_of(fresh)), before)


@pytest.mark.parametrize("which", ["best", "path"])
def test_best_and_a_path_never_fall_back(which, tmp_path):
    trainer, checkpoints = rotating(tmp_path, scores=[1, 2])
    trainer.run(batches(2), max_epochs=2)
    flip(checkpoints.best)
    _, again = rotating(tmp_path, scores=[1])
    with pytest.raises(RuntimeError, match="step-00000004.pt is damaged"):
        again.resume("best" if which == "best" else tmp_path / "step-00000004.pt")


@pytest.mark.parametrize("at", [0.01, 0.2, 0.5, 0.9, 0.99, 0.9999])
def test_a_flipped_bit_anywhere_is_detected(at, tmp_path):
    _, checkpoints = rotating(tmp_path)
    path = checkpoints.save()
    flip(path, at)
    with pytest.raises(RuntimeError, match="damaged|can't be read"):
        rotating(tmp_path)[1].resume(path)


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.9, 0.999])
def test_a_truncated_file_is_detected(keep, tmp_path):
    _, checkpoints = rotating(tmp_path)
    path = checkpoints.save()
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    with pytest.raises(RuntimeError, match="damaged or no checkpoint"):
        rotating(tmp_path)[1].resume(path)


def test_a_missing_path_and_a_missing_best_checkpoint_raise(tmp_path):
    _, checkpoints = rotating(tmp_path)
    with pytest.raises(FileNotFoundError, match="nothing.pt does not exist; which must be"):
        checkpoints.resume(tmp_path / "nothing.pt")
    with pytest.raises(RuntimeError, match="there is no best checkpoint in"):
        checkpoints.resume("best")


def test_a_checkpoint_of_another_model_changes_nothing(tmp_path):
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 2)
    _, checkpoints = rotating(tmp_path, create_trainer(model, sgd(model), torch.nn.functional.mse_loss))
    path = checkpoints.save()
    trainer, checkpoints = rotating(tmp_path)
    before = weights(model_of(trainer))
    with pytest.raises(ValueError, match=r"another model.*weight \(\(2, 4\) in the checkpoint, \(2, 3\) here\)"):
        checkpoints.resume(path)
    assert same(weights(model_of(trainer)), before)


def test_a_file_with_code_in_it_is_refused(tmp_path):
    files.save_durably({"phases": linear}, tmp_path / "evil.pt")
    with pytest.raises(RuntimeError, match="evil.pt holds more than tensors and plain values"):
        rotating(tmp_path)[1].resume(tmp_path / "evil.pt")


def test_a_checkpoint_holds_only_plain_values_and_no_prefixes_of_wrappers(tmp_path):
    model = data_parallel(linear())
    trainer, checkpoints = rotating(tmp_path, create_trainer(model, sgd(model), torch.nn.functional.mse_loss))
    trainer.run(batches(1))
    content = torch.load(checkpoints.last, weights_only=True)
    assert list(content["phases"]["model"]["module"]) == ["weight", "bias"]
    plain, again = rotating(tmp_path)
    again.resume(checkpoints.last)
    assert same(weights(model_of(plain)), weights(model.module))


def test_a_model_with_a_child_called_module_resumes(tmp_path):
    def outer():
        model = torch.nn.Sequential()
        model.add_module("module", linear())
        return create_trainer(model, sgd(model), torch.nn.functional.mse_loss)

    trainer, checkpoints = rotating(tmp_path, outer())
    trainer.run(batches(2))
    fresh, again = rotating(tmp_path, outer())
    again.resume(checkpoints.last)
    assert same(weights(model_of(fresh)), weights(model_of(trainer)))
