"""Checkpoints: which are kept, in what order they are written, what a failing disk does, and how a run goes on."""

import copy
import errno
import json
import os

import pytest
import torch
from ignite.engine import Events
from toys import batches, linear, model_of, same, scripted, sgd, trainer_of, weights

from camshaft import (
    CheckpointRotation,
    EarlyStopping,
    Evaluation,
    ExponentialMovingAverage,
    LRHistory,
    LRScheduling,
    StepEvents,
    create_trainer,
    save_weights,
)
from camshaft.checkpoints import files, writer

NAN = float("nan")


def rotating(folder, trainer=None, scores=None, **options):
    """A trainer with a rotation; scores make an evaluation whose metric the rotation follows."""
    trainer = trainer_of() if trainer is None else trainer
    if scores is not None:
        Evaluation(scripted(scores), [0]).attach(trainer)
        options = {"metric": "val/score", "keep_best": 1} | options
    return trainer, CheckpointRotation(folder, **options).attach(trainer)


def steps_in(folder):
    """The optimizer steps whose files a folder holds."""
    return sorted(int(path.stem.removeprefix("step-")) for path in folder.glob("step-*.pt"))


def indexed(folder):
    return [entry["optimizer_step"] for entry in json.loads((folder / "checkpoints.json").read_text())["checkpoints"]]


# -- when, and which are kept -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("keep", "expected"), [(1, [10]), (2, [8, 10]), (3, [6, 8, 10]), (9, [2, 4, 6, 8, 10])])
def test_the_last_are_kept(keep, expected, tmp_path):
    trainer, checkpoints = rotating(tmp_path, keep_last=keep)
    trainer.run(batches(2), max_epochs=5)
    assert steps_in(tmp_path) == indexed(tmp_path) == expected
    assert checkpoints.last == tmp_path / "step-00000010.pt"


@pytest.mark.parametrize(
    ("scores", "options", "kept", "best"),
    [
        ([1, 5, 2, 3, 4], {}, [4, 10], 4),
        ([1, 5, 2, 3, 4], {"keep_best": 2}, [4, 10], 4),
        ([1, 5, 4, 3, 2], {"keep_best": 2}, [4, 6, 10], 4),
        ([3, 1, 2, 4, 5], {"mode": "min"}, [4, 10], 4),
        ([1, 2, 3, 4, 5], {"keep_best": 2}, [8, 10], 10),
        ([2, 2, 2, 2, 2], {}, [2, 10], 2),
        ([NAN, 1, NAN, 0, float("inf")], {}, [4, 10], 4),
        ([NAN, float("inf"), NAN, NAN, NAN], {}, [10], None),
        ([0.12345, 0.12344, 0.12346, 0.1, 0.1], {}, [6, 10], 6),
    ],
)
def test_the_best_are_kept_beside_the_last(scores, options, kept, best, tmp_path):
    trainer, checkpoints = rotating(tmp_path, scores=scores, keep_last=1, **options)
    trainer.run(batches(2), max_epochs=5)
    assert steps_in(tmp_path) == kept
    assert checkpoints.best == (None if best is None else tmp_path / f"step-{best:08d}.pt")


def test_the_best_file_holds_the_weights_that_were_scored(tmp_path):
    trainer, checkpoints = rotating(tmp_path, scores=[1, 5, 2], keep_last=1)
    seen = []
    trainer.add_event_handler(Events.EPOCH_COMPLETED(once=2), lambda: seen.append(weights(model_of(trainer))))
    trainer.run(batches(2), max_epochs=3)
    content = torch.load(checkpoints.best, weights_only=True)
    assert same(list(content["phases"]["model"]["module"].values()), seen[0])


def test_a_best_score_in_mid_epoch_is_still_the_best_after_the_epochs_own_save(tmp_path):
    trainer = trainer_of()
    evaluation = Evaluation(scripted([1.0, 9.0, 2.0, 3.0]), [0], every=Events.ITERATION_COMPLETED(every=2))
    evaluation.attach(trainer)
    checkpoints = CheckpointRotation(tmp_path, keep_last=1, keep_best=1, metric="val/score").attach(trainer)
    trainer.run(batches(4), max_epochs=2)
    assert checkpoints.best == tmp_path / "step-00000004.pt"
    assert steps_in(tmp_path) == [4, 8]


@pytest.mark.parametrize(
    ("every", "expected"),
    [
        (Events.ITERATION_COMPLETED(every=4), [4, 8, 10]),
        (StepEvents.OPTIMIZER_STEP_COMPLETED(every=3), [3, 6, 9, 10]),
        (Events.EPOCH_COMPLETED(every=2), [10]),
        (Events.EPOCH_COMPLETED | Events.ITERATION_COMPLETED(once=2), [2, 5, 10]),
        (Events.COMPLETED, [10]),
    ],
    ids=["iterations", "steps", "epochs", "both", "end"],
)
def test_it_saves_at_its_events_and_at_the_end(every, expected, tmp_path):
    trainer, _ = rotating(tmp_path, every=every, keep_last=99)
    trainer.run(batches(5), max_epochs=2)
    assert steps_in(tmp_path) == expected


def test_nothing_new_is_not_saved_twice(tmp_path, monkeypatch):
    trainer, _ = rotating(tmp_path)
    saved = counted_saves(monkeypatch)
    trainer.run(batches(2), max_epochs=3)
    assert len(saved) == 3


def counted_saves(monkeypatch):
    """Notes the path of every checkpoint that is written."""
    saved, real = [], writer.save_durably
    monkeypatch.setattr(writer, "save_durably", lambda content, path: (saved.append(path.name), real(content, path)))
    return saved


def test_a_request_inside_a_window_waits_for_its_end(tmp_path):
    trainer, _ = rotating(
        tmp_path, trainer_of(accumulation_steps=3), every=Events.ITERATION_COMPLETED(once=[1, 5]), keep_last=9
    )
    at = []
    trainer.add_event_handler(Events.ITERATION_STARTED, lambda e: at.append((e.state.iteration, steps_in(tmp_path))))
    trainer.run(batches(9))
    assert dict(at)[3] == []
    assert dict(at)[4] == [1]
    assert dict(at)[6] == [1]
    assert dict(at)[7] == [1, 2]


def test_saving_comes_after_every_other_handler_of_the_moment(tmp_path):
    trainer, checkpoints = rotating(tmp_path, every=Events.ITERATION_COMPLETED(once=2))
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=2), lambda e: e.state.metrics.__setitem__("late", 3.0))
    trainer.add_event_handler(Events.ITERATION_STARTED(once=3), lambda e: e.terminate(skip_completed=True))
    trainer.run(batches(4))
    assert torch.load(checkpoints.last, weights_only=True)["metrics"] == {"late": 3.0}


def test_terminate_saves_once_more_with_the_open_windows_gradients(tmp_path):
    trainer, checkpoints = rotating(tmp_path, trainer_of(accumulation_steps=4))
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=6), lambda e: e.terminate())
    trainer.run(batches(8))
    window = torch.load(checkpoints.last, weights_only=True)["phases"]["model"]["window"]
    assert window["batches"] == 2
    assert torch.equal(window["gradients"][0], model_of(trainer).weight.grad)


def test_an_exception_writes_nothing(tmp_path):
    trainer, _ = rotating(tmp_path)

    @trainer.on(Events.ITERATION_COMPLETED(once=3))
    def fail():
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        trainer.run(batches(2), max_epochs=2)
    assert steps_in(tmp_path) == [2]


def test_every_minutes_asks_too(tmp_path):
    trainer, _ = rotating(tmp_path, every=Events.COMPLETED, every_minutes=1e-9, keep_last=9)
    trainer.run(batches(3))
    assert steps_in(tmp_path) == [1, 2, 3]


def test_save_outside_a_run_writes_at_once_and_inside_waits_for_the_end_of_the_window(tmp_path):
    trainer, checkpoints = rotating(tmp_path, trainer_of(accumulation_steps=2), every=Events.COMPLETED, keep_last=9)
    assert checkpoints.save() == tmp_path / "step-00000000.pt"
    returned = []
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=1), lambda: returned.append(checkpoints.save()))
    trainer.run(batches(4))
    assert returned == [None]
    assert steps_in(tmp_path) == [0, 1, 2]


def test_a_newer_file_of_the_same_number_replaces_the_older(tmp_path):
    trainer, checkpoints = rotating(tmp_path)
    checkpoints.save()
    with torch.no_grad():
        model_of(trainer).weight.fill_(5)
    checkpoints.save()
    content = torch.load(tmp_path / "step-00000000.pt", weights_only=True)
    assert content["phases"]["model"]["module"]["weight"].unique().tolist() == [5]
    assert indexed(tmp_path) == [0]


# -- the folder -------------------------------------------------------------------------------------------------------


def test_foreign_files_stay_untouched(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    save_weights(linear(), tmp_path / "step-00000001.pt")  # looks like one of ours, and isn't
    save_weights(linear(), tmp_path / "step-best.pt")
    mine = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    trainer, _ = rotating(tmp_path, keep_last=1)
    trainer.run(batches(2), max_epochs=3)
    assert {name: (tmp_path / name).read_bytes() for name in mine} == mine
    assert steps_in_index_and_folder(tmp_path) == ([6], [1, 6])


def steps_in_index_and_folder(folder):
    in_folder = [int(p.stem[5:]) for p in folder.glob("step-0*.pt")]
    return indexed(folder), sorted(in_folder)


def test_after_a_restart_it_finds_its_own_files_and_rotates_them(tmp_path):
    trainer, _ = rotating(tmp_path, scores=[1, 5, 2], keep_last=2)
    trainer.run(batches(2), max_epochs=3)
    second, checkpoints = rotating(tmp_path, scores=[3, 4], keep_last=2)
    assert (checkpoints.last.name, checkpoints.best.name) == ("step-00000006.pt", "step-00000004.pt")
    checkpoints.resume()
    second.run(batches(2), max_epochs=5)
    assert steps_in(tmp_path) == indexed(tmp_path) == [4, 8, 10]


@pytest.mark.parametrize("damage", [None, "", "{", '{"checkpoints": 3}', "[]"], ids=["gone", "empty", "half", "odd", "list"])
def test_without_its_index_the_files_tell(damage, tmp_path):
    trainer, _ = rotating(tmp_path, scores=[1, 5, 2], keep_last=2)
    trainer.run(batches(2), max_epochs=3)
    index = tmp_path / "checkpoints.json"
    index.unlink() if damage is None else index.write_text(damage)
    second, checkpoints = rotating(tmp_path, scores=[3], keep_last=1)
    assert (checkpoints.last.name, checkpoints.best.name) == ("step-00000006.pt", "step-00000004.pt")
    checkpoints.resume()
    second.run(batches(2), max_epochs=4)
    assert steps_in(tmp_path) == indexed(tmp_path) == [4, 8]


def test_a_file_that_the_user_has_deleted_is_no_trouble(tmp_path):
    trainer, checkpoints = rotating(tmp_path, keep_last=2)
    trainer.add_event_handler(Events.EPOCH_STARTED(once=3), lambda: (tmp_path / "step-00000002.pt").unlink())
    trainer.run(batches(2), max_epochs=4)
    assert steps_in(tmp_path) == [6, 8]
    assert checkpoints.last.name == "step-00000008.pt"


def test_litter_of_a_killed_save_is_cleared_at_attach(tmp_path):
    (tmp_path / ".camshaft-abc.tmp").write_bytes(b"half a checkpoint")
    rotating(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".camshaft.lock"]


def test_the_folder_is_made(tmp_path):
    trainer, checkpoints = rotating(tmp_path / "a" / "b")
    trainer.run(batches(1))
    assert checkpoints.last.parent == tmp_path / "a" / "b"


def test_a_folder_that_is_a_file_is_an_error_at_attach(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="dirname: checkpoints can't be written there"):
        rotating(tmp_path / "file")


def test_the_index_says_what_each_file_is(tmp_path):
    trainer, _ = rotating(tmp_path, scores=[0.5])
    trainer.run(batches(2))
    (entry,) = json.loads((tmp_path / "checkpoints.json").read_text())["checkpoints"]
    assert entry.pop("time").startswith("20")
    assert isinstance(entry.pop("written"), int)
    assert entry == {
        "file": "step-00000002.pt",
        "optimizer_step": 2,
        "iteration": 2,
        "epoch": 1,
        "score": 0.5,
        "metrics": {"val/score": 0.5},
    }


# -- the order of a save, and a disk that fails -----------------------------------------------------------------------


def spied_disk(monkeypatch):
    """Notes what reaches the disk, in order."""
    log = []

    def spy(module, name, describe):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, **kwargs: (log.append(describe(*args)), real(*args, **kwargs))[1])

    kind = {True: "fsync folder", False: "fsync file"}
    spy(os, "fsync", lambda descriptor: kind[os.path.isdir(f"/proc/self/fd/{descriptor}")])
    spy(os, "replace", lambda source, target: f"rename to {os.path.basename(target)}")
    spy(files.Path, "unlink", lambda path, *_: f"delete {path.name}")
    return log


def test_a_save_is_written_renamed_indexed_and_only_then_deletes(tmp_path, monkeypatch):
    trainer, _ = rotating(tmp_path, keep_last=1)
    trainer.run(batches(2))
    log = spied_disk(monkeypatch)
    trainer.run(batches(2), max_epochs=2)
    assert log == [
        "fsync file",
        "rename to step-00000004.pt",
        "fsync folder",
        "fsync file",
        "rename to checkpoints.json",
        "fsync folder",
        "delete step-00000002.pt",
    ]


def full_disk(monkeypatch, call, times=99):
    """Has one of the system's calls fail as on a full disk, so many times."""
    real, left = getattr(os, call), [times]

    def fail(*args, **kwargs):
        if left[0] > 0:
            left[0] -= 1
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args, **kwargs)

    monkeypatch.setattr(os, call, fail)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_save_that_fails_is_one_warning_and_training_goes_on(call, tmp_path, monkeypatch):
    trainer, checkpoints = rotating(tmp_path, keep_last=1)
    trainer.run(batches(2))
    full_disk(monkeypatch, call, times=1)
    with pytest.warns(
        RuntimeWarning, match="step-00000004.pt could not be written .No space left.*untouched; training continues"
    ):
        trainer.run(batches(2), max_epochs=2)
    assert trainer.state.optimizer_step == 4
    assert not list(tmp_path.glob(".camshaft-*"))
    assert checkpoints.last.is_file()


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_the_older_files_outlive_a_disk_that_fails(call, tmp_path, monkeypatch):
    trainer, checkpoints = rotating(tmp_path, keep_last=1)
    trainer.run(batches(2))
    before = (tmp_path / "step-00000002.pt").read_bytes()
    full_disk(monkeypatch, call)
    with (
        pytest.warns(RuntimeWarning, match="could not be written"),
        pytest.raises(OSError, match="3 saves in a row have failed"),
    ):
        trainer.run(batches(2), max_epochs=9)
    assert trainer.state.epoch == 4
    assert steps_in(tmp_path) == [2]
    assert (tmp_path / "step-00000002.pt").read_bytes() == before
    monkeypatch.undo()
    fresh, again = rotating(tmp_path)
    assert again.resume() == checkpoints.last
    assert fresh.state.optimizer_step == 2


def test_a_save_that_succeeds_between_failures_starts_the_count_anew(tmp_path, monkeypatch):
    trainer, _ = rotating(tmp_path)
    real = writer.save_durably

    def flaky(content, path):
        if trainer.state.epoch in (2, 3, 5, 6):
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(content, path)

    monkeypatch.setattr(writer, "save_durably", flaky)
    with pytest.warns(RuntimeWarning, match="could not be written") as caught:
        trainer.run(batches(1), max_epochs=7)
    assert len(caught) == 4
    assert steps_in(tmp_path) == [1, 4, 7]


def test_an_index_that_can_not_be_written_deletes_nothing(tmp_path, monkeypatch):
    trainer, _ = rotating(tmp_path, keep_last=1)
    trainer.run(batches(2))
    real = os.replace

    def fail_for_index(source, target):
        if str(target).endswith(".json"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(source, target)

    monkeypatch.setattr(os, "replace", fail_for_index)
    with pytest.warns(RuntimeWarning, match="could not be written"):
        trainer.run(batches(2), max_epochs=2)
    assert steps_in(tmp_path) == [2, 4]


def test_an_attribute_that_can_not_be_saved_is_the_users_error(tmp_path):
    from camshaft import Handler

    class Odd(Handler):
        saved = ("thing",)
        thing = object()

    trainer, _ = rotating(tmp_path)
    Odd().attach(trainer)
    with pytest.raises(TypeError, match=r"Odd.thing is a builtins.object, which a checkpoint can't carry safely"):
        trainer.run(batches(1))


def test_written_in_the_background_the_files_are_the_same(tmp_path):
    for name, background in (("front", False), ("back", True)):
        trainer, _ = rotating(tmp_path / name, keep_last=2, background=background)
        trainer.run(batches(2), max_epochs=3)
    front, back = ([torch.load(p, weights_only=True) for p in sorted((tmp_path / n).glob("*.pt"))] for n in ("front", "back"))
    assert steps_in(tmp_path / "front") == steps_in(tmp_path / "back") == [4, 6]
    for a, b in zip(front, back, strict=True):
        assert same(list(a["phases"]["model"]["module"].values()), list(b["phases"]["model"]["module"].values()))


def test_a_background_save_that_fails_is_said_and_the_third_raises(tmp_path, monkeypatch):
    trainer, checkpoints = rotating(tmp_path, background=True)
    checkpoints.save()
    full_disk(monkeypatch, "fsync")
    with pytest.warns(RuntimeWarning, match="training continues"), pytest.raises(OSError, match="3 saves in a row have failed"):
        trainer.run(batches(1), max_epochs=9)


# -- resuming ---------------------------------------------------------------------------------------------------------


def everything(folder, scores):
    """A trainer with momentum, dropout, a schedule, an average, a history and early stopping; and its rotation."""
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
    """Everything that a run leaves, comparable."""
    ema, history = trainer.handlers["ExponentialMovingAverage"], trainer.handlers["LRHistory"]
    momenta = [value for state in trainer.primary.optimizers[0].state.values() for value in state.values()]
    stopping = trainer.handlers["EarlyStopping"]
    return weights(model_of(trainer)) + weights(ema.module) + momenta, history.history, (stopping.best, stopping.stale)


@pytest.mark.parametrize("stop_after", [1, 2, 3])
def test_resumed_at_an_epochs_end_it_ends_bit_for_bit_like_the_run_that_was_not_stopped(stop_after, tmp_path):
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


def test_auto_in_an_empty_folder_starts_afresh(tmp_path):
    trainer, checkpoints = rotating(tmp_path)
    assert checkpoints.resume("auto") is None
    assert trainer.run(batches(2)).optimizer_step == 2


def test_a_resume_sets_clocks_and_metrics(tmp_path):
    trainer, _ = rotating(tmp_path, scores=[0.5])
    trainer.run(batches(3), max_epochs=2)
    fresh, checkpoints = rotating(tmp_path, scores=[0.5])
    checkpoints.resume()
    state = fresh.state
    assert (state.epoch, state.iteration, state.optimizer_step, state.skipped_steps) == (2, 6, 6, 0)
    assert dict(state.metrics) == {"val/score": 0.5}


def resumed(folder, **limit):
    """A trainer that has been set back to the end of a run."""
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
def test_a_resumed_run_that_is_finished_does_nothing_and_says_so(limit, said, tmp_path, caplog):
    fresh, fired = resumed(tmp_path, **limit), []
    fresh.add_event_handler(Events.STARTED, lambda: fired.append(True))
    assert fresh.run(batches(3), **limit).optimizer_step == 6
    assert fired == []
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert f"nothing to do: {said}" in caplog.text


@pytest.mark.parametrize("limit", [{"max_epochs": 2}, {"max_iters": 6}], ids=["epochs", "iterations"])
@pytest.mark.parametrize("asked_before", [True, False])
def test_without_limits_a_resumed_trainer_makes_a_run_of_its_own_from_its_weights(limit, asked_before, tmp_path):
    fresh = resumed(tmp_path, **limit)
    model, expected = fresh.primary.module, copy.deepcopy(fresh.primary.module)
    if asked_before:
        fresh.run(batches(3), **limit)
    fresh.state.max_epochs = fresh.state.max_iters = None
    state = fresh.run(batches(2), max_epochs=1)
    assert (state.epoch, state.iteration, state.optimizer_step) == (1, 2, 2)
    trainer_of(expected).run(batches(2))
    assert same(weights(model), weights(expected))


def test_best_and_a_path_load_what_they_name(tmp_path):
    trainer, _ = rotating(tmp_path, scores=[1, 5, 2], keep_last=9)
    trainer.run(batches(2), max_epochs=3)
    best, checkpoints = rotating(tmp_path, scores=[1])
    assert checkpoints.resume("best").name == "step-00000004.pt"
    assert best.state.optimizer_step == 4
    path, checkpoints = rotating(tmp_path, scores=[1])
    assert checkpoints.resume(tmp_path / "step-00000002.pt") == tmp_path / "step-00000002.pt"
    assert path.state.optimizer_step == 2


def flip(path, at=0.5):
    data = bytearray(path.read_bytes())
    data[int(len(data) * at)] ^= 1
    path.write_bytes(data)


def test_auto_passes_over_a_bad_file_and_says_so(tmp_path):
    trainer, checkpoints = rotating(tmp_path)
    trainer.run(batches(2), max_epochs=3)
    flip(checkpoints.last)
    fresh, checkpoints = rotating(tmp_path)
    with pytest.warns(RuntimeWarning, match="resumed from .*step-00000004.pt; passed over: .*step-00000006.pt is damaged"):
        assert checkpoints.resume().name == "step-00000004.pt"
    assert fresh.state.optimizer_step == 4


def test_auto_is_an_error_where_no_file_is_usable(tmp_path):
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
def test_a_flipped_bit_anywhere_is_found(at, tmp_path):
    _, checkpoints = rotating(tmp_path)
    path = checkpoints.save()
    flip(path, at)
    with pytest.raises(RuntimeError, match="damaged|can't be read"):
        rotating(tmp_path)[1].resume(path)


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.9, 0.999])
def test_half_a_file_is_found(keep, tmp_path):
    _, checkpoints = rotating(tmp_path)
    path = checkpoints.save()
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    with pytest.raises(RuntimeError, match="damaged or no checkpoint"):
        rotating(tmp_path)[1].resume(path)


def test_a_path_that_is_not_there_and_a_best_that_was_never_are_errors(tmp_path):
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


def test_the_file_holds_tensors_and_plain_values_alone_and_no_wrappers_prefixes(tmp_path):
    model = torch.nn.DataParallel(linear())
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


def test_inside_a_run_or_unattached_it_can_not_resume(tmp_path):
    trainer, checkpoints = rotating(tmp_path)
    trainer.add_event_handler(Events.EPOCH_STARTED, lambda: checkpoints.resume())
    with pytest.raises(RuntimeError, match=r"resume\(\) can't be called inside a run"):
        trainer.run(batches(1))
    loose = CheckpointRotation(tmp_path)
    for call in (loose.resume, loose.save):
        with pytest.raises(RuntimeError, match=r"isn't attached to a trainer; call attach\(trainer\) first"):
            call()


def test_a_metric_that_never_appears_is_an_error(tmp_path):
    trainer = trainer_of()
    CheckpointRotation(tmp_path, keep_best=1, metric="val/acc").attach(trainer)
    with pytest.raises(ValueError, match="CheckpointRotation: no metric named 'val/acc'"):
        trainer.run(batches(1))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"keep_last": 0}, "keep_last must be an integer of at least 1, got 0"),
        ({"keep_last": 1.5}, "keep_last must be an integer of at least 1, got 1.5"),
        ({"keep_best": -1}, "keep_best must be an integer of at least 0, got -1"),
        ({"keep_best": 1}, "keep_best needs metric"),
        ({"mode": "best"}, "mode must be 'min' or 'max', got 'best'"),
        ({"every_minutes": 0}, "every_minutes must be a positive number, got 0"),
    ],
)
def test_wrong_arguments_are_errors(arguments, text, tmp_path):
    with pytest.raises(ValueError, match=text):
        CheckpointRotation(tmp_path, **arguments)
