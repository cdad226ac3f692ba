"""When checkpoints are saved, which are kept, and what else is in their folder."""

import json

import pytest
import torch
from ignite.engine import Events
from rotations import indexed, rotating, steps_in
from toys import batches, linear, model_of, same, scripted, trainer_of, weights

from camshaft import CheckpointRotation, Evaluation, StepEvents, save_weights
from camshaft.checkpoints import writer

NAN = float("nan")


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
def test_the_best_are_kept_in_addition_to_the_last(scores, options, kept, best, tmp_path):
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


def test_a_best_score_in_mid_epoch_remains_the_best_after_the_save_of_the_epoch(tmp_path):
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
    """Records the name of every checkpoint that is written."""
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


def test_a_save_runs_after_every_other_handler_of_its_event(tmp_path):
    trainer, checkpoints = rotating(tmp_path, every=Events.ITERATION_COMPLETED(once=2))
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=2), lambda e: e.state.metrics.__setitem__("late", 3.0))
    trainer.add_event_handler(Events.ITERATION_STARTED(once=3), lambda e: e.terminate(skip_completed=True))
    trainer.run(batches(4))
    assert torch.load(checkpoints.last, weights_only=True)["metrics"] == {"late": 3.0}


def test_terminate_saves_the_gradients_of_the_open_window(tmp_path):
    trainer, checkpoints = rotating(tmp_path, trainer_of(accumulation_steps=4))
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=6), lambda e: e.terminate())
    trainer.run(batches(8))
    window = torch.load(checkpoints.last, weights_only=True)["phases"]["model"]["window"]
    assert window["batches"] == 2
    assert torch.equal(window["gradients"][0], model_of(trainer).weight.grad)


def test_an_exception_saves_nothing(tmp_path):
    trainer, _ = rotating(tmp_path)

    @trainer.on(Events.ITERATION_COMPLETED(once=3))
    def fail():
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        trainer.run(batches(2), max_epochs=2)
    assert steps_in(tmp_path) == [2]


def test_every_minutes_requests_checkpoints_too(tmp_path):
    trainer, _ = rotating(tmp_path, every=Events.COMPLETED, every_minutes=1e-9, keep_last=9)
    trainer.run(batches(3))
    assert steps_in(tmp_path) == [1, 2, 3]


def test_save_writes_at_once_outside_a_run_and_at_the_end_of_the_window_inside_one(tmp_path):
    trainer, checkpoints = rotating(tmp_path, trainer_of(accumulation_steps=2), every=Events.COMPLETED, keep_last=9)
    assert checkpoints.save() == tmp_path / "step-00000000.pt"
    returned = []
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=1), lambda: returned.append(checkpoints.save()))
    trainer.run(batches(4))
    assert returned == [None]
    assert steps_in(tmp_path) == [0, 1, 2]


def test_a_step_that_is_saved_again_replaces_the_older_file(tmp_path):
    trainer, checkpoints = rotating(tmp_path)
    checkpoints.save()
    with torch.no_grad():
        model_of(trainer).weight.fill_(5)
    checkpoints.save()
    content = torch.load(tmp_path / "step-00000000.pt", weights_only=True)
    assert content["phases"]["model"]["module"]["weight"].unique().tolist() == [5]
    assert indexed(tmp_path) == [0]


# -- the folder -------------------------------------------------------------------------------------------------------


def test_files_of_the_user_are_not_touched(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    save_weights(linear(), tmp_path / "step-00000001.pt")  # has the name of a checkpoint, but is none
    save_weights(linear(), tmp_path / "step-best.pt")
    mine = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    trainer, _ = rotating(tmp_path, keep_last=1)
    trainer.run(batches(2), max_epochs=3)
    assert {name: (tmp_path / name).read_bytes() for name in mine} == mine
    assert steps_in_index_and_folder(tmp_path) == ([6], [1, 6])


def steps_in_index_and_folder(folder):
    in_folder = [int(p.stem[5:]) for p in folder.glob("step-0*.pt")]
    return indexed(folder), sorted(in_folder)


def test_after_a_restart_the_earlier_checkpoints_are_rotated(tmp_path):
    trainer, _ = rotating(tmp_path, scores=[1, 5, 2], keep_last=2)
    trainer.run(batches(2), max_epochs=3)
    second, checkpoints = rotating(tmp_path, scores=[3, 4], keep_last=2)
    assert (checkpoints.last.name, checkpoints.best.name) == ("step-00000006.pt", "step-00000004.pt")
    checkpoints.resume()
    second.run(batches(2), max_epochs=5)
    assert steps_in(tmp_path) == indexed(tmp_path) == [4, 8, 10]


@pytest.mark.parametrize("damage", [None, "", "{", '{"checkpoints": 3}', "[]"], ids=["gone", "empty", "half", "odd", "list"])
def test_a_lost_index_is_rebuilt_from_the_checkpoints(damage, tmp_path):
    trainer, _ = rotating(tmp_path, scores=[1, 5, 2], keep_last=2)
    trainer.run(batches(2), max_epochs=3)
    index = tmp_path / "checkpoints.json"
    index.unlink() if damage is None else index.write_text(damage)
    second, checkpoints = rotating(tmp_path, scores=[3], keep_last=1)
    assert (checkpoints.last.name, checkpoints.best.name) == ("step-00000006.pt", "step-00000004.pt")
    checkpoints.resume()
    second.run(batches(2), max_epochs=4)
    assert steps_in(tmp_path) == indexed(tmp_path) == [4, 8]


def test_a_checkpoint_that_the_user_deletes_is_no_error(tmp_path):
    trainer, checkpoints = rotating(tmp_path, keep_last=2)
    trainer.add_event_handler(Events.EPOCH_STARTED(once=3), lambda: (tmp_path / "step-00000002.pt").unlink())
    trainer.run(batches(2), max_epochs=4)
    assert steps_in(tmp_path) == [6, 8]
    assert checkpoints.last.name == "step-00000008.pt"


def test_attach_removes_the_temporary_files_of_a_killed_save(tmp_path):
    (tmp_path / ".camshaft-abc.tmp").write_bytes(b"half a checkpoint")
    rotating(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".camshaft.lock"]


def test_the_folder_is_created(tmp_path):
    trainer, checkpoints = rotating(tmp_path / "a" / "b")
    trainer.run(batches(1))
    assert checkpoints.last.parent == tmp_path / "a" / "b"


def test_a_folder_that_is_a_file_is_an_error_at_attach(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="dirname: checkpoints can't be written there"):
        rotating(tmp_path / "file")


def test_an_entry_of_the_index(tmp_path):
    trainer, _ = rotating(tmp_path, scores=[0.5])
    trainer.run(batches(2))
    (entry,) = json.loads((tmp_path / "checkpoints.json").read_text())["checkpoints"]
    assert entry.pop("time").startswith("20")
    assert isinstance(entry.pop("written"), int)
    assert entry.pop("mode") == "max"
    assert entry == {
        "file": "step-00000002.pt",
        "optimizer_step": 2,
        "iteration": 2,
        "epoch": 1,
        "score": 0.5,
        "metrics": {"val/score": 0.5},
    }


# -- mistakes ---------------------------------------------------------------------------------------------------------


def test_resume_raises_inside_a_run_and_if_unattached(tmp_path):
    trainer, checkpoints = rotating(tmp_path)
    trainer.add_event_handler(Events.EPOCH_STARTED, lambda: checkpoints.resume())
    with pytest.raises(RuntimeError, match=r"resume\(\) can't be called inside a run"):
        trainer.run(batches(1))
    loose = CheckpointRotation(tmp_path)
    for call in (loose.resume, loose.save):
        with pytest.raises(RuntimeError, match=r"isn't attached to a trainer; call attach\(trainer\) first"):
            call()


def test_a_metric_that_never_appears_raises(tmp_path):
    trainer = trainer_of()
    CheckpointRotation(tmp_path, keep_best=1, metric="val/acc").attach(trainer)
    with pytest.raises(ValueError, match="CheckpointRotation: no metric named 'val/acc'"):
        trainer.run(batches(1))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"keep_last": 0}, "keep_last must be a positive integer, got 0"),
        ({"keep_last": 1.5}, "keep_last must be a positive integer, got 1.5"),
        ({"keep_best": -1}, "keep_best must be an integer of at least 0, got -1"),
        ({"keep_best": 1}, "keep_best needs metric"),
        ({"mode": "best"}, "mode must be 'min' or 'max', got 'best'"),
        ({"every_minutes": 0}, "every_minutes must be a positive number, got 0"),
    ],
)
def test_wrong_arguments_raise(arguments, text, tmp_path):
    with pytest.raises(ValueError, match=text):
        CheckpointRotation(tmp_path, **arguments)
