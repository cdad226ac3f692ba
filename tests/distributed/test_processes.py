"""Two and three real processes over gloo, started by torchrun, against one process on the same global batches."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

SCENES = Path(__file__).parent / "scenes.py"
NUMBERS = (
    "one_batch_a_step",
    "accumulation_with_a_ragged_tail",
    "accumulation_that_drops",
    "weighed_by_samples",
    "weighed_by_a_function",
    "an_epoch_of_unknown_length",
    "an_epoch_cut_short",
    "a_gan",
    "metrics_of_all",
    "sharded_accumulation",
    "sharded_weighed_by_samples",
    "sharded_with_a_limit_of_iterations",
    "parameters_beside_the_shards",
    "parameters_beside_the_wrapper",
)
DECISIONS = (
    "reductions",
    "stopped_by_one",
    "skipped_by_one",
    "a_score_of_one_alone",
    "a_limit_of_one_alone",
    "a_guard_that_raises",
    "interrupted_by_one",
    "asked_to_stop_at_the_start",
)
AFTERWARDS = (
    "run_again_after_an_exception",
    "a_loop_of_ones_own_after_a_run",
    "saved_inside_a_run",
    "saved_behind",
    "saved_on_an_exception",
    "a_checkpoint_inside_a_window_of_shards",
    "resumed_where_gradients_differ",
    "resumed_inside_a_window_of_shards",
    "resumed_at_the_end_of_an_epoch_that_another_ends",
    "failing_twice",
)
MISTAKES = (
    "a_model_that_is_not_wrapped",
    "batches_of_other_number",
    "a_handler_on_one_alone",
    "a_wrapper_that_is_passed_by",
    "a_schedule_of_one_alone",
    "unfrozen_after_wrapping",
)
STORIES = {
    ("numbers", 1): NUMBERS,
    ("numbers", 2): (*NUMBERS, *DECISIONS, *MISTAKES, "who_writes", "signalled_to_one"),
    ("numbers", 3): (*NUMBERS, *DECISIONS),
    ("resumed", 2): (
        "resumed_after_each_iteration",
        "resumed_from_shards",
        "resumed_from_a_whole_file_of_shards",
        "leave_shards",
    ),
    ("afterwards", 2): AFTERWARDS,
    ("raised", 2): ("raised_by_one",),
    ("raised", 3): ("raised_by_one",),
    ("killed", 2): ("killed_by_one",),
}


def start(out, world, scenes):
    out.mkdir(exist_ok=True)
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}"] if world > 1 else []
    command = [sys.executable, *torchrun, SCENES, out, *scenes]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with (out / "log").open("w") as log:
        return subprocess.run(command, stdout=log, stderr=log, env=environment, timeout=300, check=False).returncode


@pytest.fixture(scope="session")
def told(tmp_path_factory):
    """By story and number of processes: the folder with what each process has found; each is run once for all workers."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def tell(story, world):
        out = base / f"{story}-{world}"
        with FileLock(f"{out}.lock"):
            if not (out / "code").exists():
                code = start(out, world, STORIES[story, world])
                (out / "code").write_text(str(code))
        return out

    return tell


def found(out, scene, world=2):
    """What each process has found; the log where one has found nothing."""
    paths = [out / f"{scene}-{rank}.pt" for rank in range(world)]
    missing = [path.name for path in paths if not path.exists()]
    assert not missing, (missing, (out / "log").read_text()[-4000:])
    return [torch.load(path, weights_only=True) for path in paths]


# -- the same numbers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("scene", NUMBERS)
def test_several_processes_give_what_one_gives(told, scene, world):
    (alone,) = found(told("numbers", 1), scene, 1)
    for together in found(told("numbers", world), scene, world):
        assert list(together) == list(alone)
        for name, value in alone.items():
            torch.testing.assert_close(torch.as_tensor(together[name]), torch.as_tensor(value), rtol=0, atol=1e-12, msg=name)


@pytest.mark.parametrize("world", [2, 3])
def test_gradients_travel_once_per_optimizer_step(told, world):
    for seen in found(told("numbers", world), "reductions", world):
        assert seen == {"reductions": 6, "steps": 6}  # seven batches over four, three epochs


# -- one decision for all -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [2, 3])
def test_what_one_stops_stops_for_all_at_the_same_iteration(told, world):
    seen = found(told("numbers", world), "stopped_by_one", world)
    assert [state["iteration"] for state in seen] == [5] * world
    assert seen[-1]["reason"] == "enough"
    assert seen[0]["reason"] == f"enough (on rank {world - 1})"


@pytest.mark.parametrize("world", [2, 3])
def test_a_loss_that_is_not_finite_on_one_skips_the_step_on_all(told, world):
    seen = found(told("numbers", world), "skipped_by_one", world)
    assert [(state["steps"], state["skipped"]) for state in seen] == [(6, 1)] * world
    assert all(torch.equal(seen[0]["0.weight"], state["0.weight"]) for state in seen)
    assert seen[0]["0.weight"].isfinite().all()


@pytest.mark.parametrize("world", [2, 3])
def test_a_guard_raises_on_all_before_the_weights_change(told, world):
    for text in found(told("numbers", world), "a_guard_that_raises", world):
        assert text.startswith("FloatingPointError")
        assert "iteration 3" in text
        assert text.endswith("after 2")


@pytest.mark.parametrize("world", [2, 3])
def test_early_stopping_of_one_is_early_stopping_of_all(told, world):
    assert [state["epoch"] for state in found(told("numbers", world), "a_score_of_one_alone", world)] == [3] * world


@pytest.mark.parametrize("world", [2, 3])
def test_a_time_limit_of_one_ends_all_with_the_window(told, world):
    seen = found(told("numbers", world), "a_limit_of_one_alone", world)
    assert seen == [{"iteration": 4, "steps": 2}] * world


@pytest.mark.parametrize("world", [2, 3])
def test_an_interruption_of_one_is_one_of_all(told, world):
    seen = found(told("numbers", world), "interrupted_by_one", world)
    assert seen == [{"held up": 3, "iteration": 14}] * world


@pytest.mark.parametrize("world", [2, 3])
def test_a_stop_that_is_asked_for_at_the_start_comes_before_the_first_iteration(told, world):
    seen = found(told("numbers", world), "asked_to_stop_at_the_start", world)
    assert seen == [{"iteration": 0, "epoch": 0}] * world


def test_sigterm_to_one_ends_all_with_the_window_and_a_checkpoint(told):
    out = told("numbers", 2)
    seen = found(out, "signalled_to_one")
    assert [(state["code"], state["iteration"], state["steps"]) for state in seen] == [(128 + signal.SIGTERM, 6, 2)] * 2
    assert json.loads((out / "signalled" / "checkpoints.json").read_text())["checkpoints"][-1]["iteration"] == 6


@pytest.mark.parametrize("world", [2, 3])
def test_an_exception_on_one_is_named_by_the_others(told, world):
    seen = found(told("raised", world), "raised_by_one", world)
    assert seen[1]["error"] == "ValueError: this batch is spoiled"
    for rank in set(range(world)) - {1}:
        assert "rank 1 failed in epoch 1, iteration 4: ValueError: this batch is spoiled" in seen[rank]["error"]


def test_a_process_that_is_killed_is_missed_by_the_other(told):
    out = told("killed", 2)
    error = torch.load(out / "killed_by_one-0.pt", weights_only=True)["error"]
    assert "another process ended without reporting an error" in error
    assert not (out / "killed_by_one-1.pt").exists()


def test_a_second_failure_is_told_of_and_not_the_first_again(told):
    first, second = found(told("afterwards", 2), "failing_twice")
    assert [first[0], *second] == ["ValueError: first", "ValueError: first", "ValueError: second"]
    assert "rank 1 failed in epoch 1, iteration 1: ValueError: second" in first[1]


# -- what comes after -----------------------------------------------------------------------------------------------------


def test_nothing_of_a_window_that_an_exception_has_cut_short_comes_into_the_next_run(told):
    assert found(told("afterwards", 2), "run_again_after_an_exception") == [{"ddp": 0.0, "fsdp": 0.0}] * 2


def test_gradients_travel_again_after_a_run_that_was_stopped_inside_a_window(told):
    first, second = found(told("afterwards", 2), "a_loop_of_ones_own_after_a_run")
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


# -- mistakes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scene", "text"),
    [
        ("a_model_that_is_not_wrapped", "2 processes train, but the model of phase 'model' is wrapped for one"),
        ("batches_of_other_number", "the number of batches"),
        ("a_handler_on_one_alone", "the attached handlers"),
        ("a_wrapper_that_is_passed_by", "their gradients were not reduced"),
        ("a_schedule_of_one_alone", "the learning rates of phase 'model' differ: [0.01"),
        ("unfrozen_after_wrapping", "unfreeze what will be trained, before you wrap it"),
    ],
)
def test_a_mistake_is_an_error_on_every_process(told, scene, text):
    for error in found(told("numbers", 2), scene):
        assert error.startswith("RuntimeError")
        assert text in error


# -- one writer -----------------------------------------------------------------------------------------------------------


def test_the_first_process_alone_writes(told):
    out = told("numbers", 2)
    first, second = found(out, "who_writes")
    assert [path.name for path in (out / "written" / "curves").iterdir() if f".{second['pid']}." in path.name] == []
    assert len(list((out / "written" / "curves").iterdir())) == 1
    assert first["bar"] > 0
    assert second["bar"] == 0
    assert first["last"] == second["last"]


def test_the_loss_that_is_shown_is_that_of_all(told):
    out = told("numbers", 2)
    losses = torch.tensor([state["losses"] for state in found(out, "who_writes")])
    events = EventAccumulator(str(out / "written" / "curves"))
    events.Reload()
    points = {event.step: event.value for event in events.Scalars("train/loss")}
    assert list(points) == [2, 4, 6, 8, 10, 12, 14]
    for step, value in points.items():
        assert value == pytest.approx(float(losses[:, step - 2 : step].mean()), rel=1e-6)


# -- checkpoints ----------------------------------------------------------------------------------------------------------


def test_a_resumed_run_is_exact_between_windows_and_to_rounding_inside(told):
    for gaps in found(told("resumed", 2), "resumed_after_each_iteration"):
        assert list(gaps) == list(range(1, 14))
        assert {stop: gap for stop, gap in gaps.items() if stop in (3, 6, 7, 10, 13) and gap != 0} == {}
        assert max(gaps.values()) < 1e-14


def test_checkpoints_are_written_when_they_are_asked_for(told):
    for seen in found(told("afterwards", 2), "saved_inside_a_run"):
        assert seen["epochs"] == [[], [7], [7, 14], [7, 14, 21]]
        assert seen["iterations"] == [[], [5], [5, 10], [5, 10, 15, 20, 21]]


def test_nobody_leaves_before_a_checkpoint_behind_training_is_there(told):
    first, second = found(told("afterwards", 2), "saved_behind")
    assert first == second
    assert first.endswith("step-00000007.pt")


@pytest.mark.parametrize(
    ("scene", "text"),
    [
        ("saved_on_an_exception", "would wait for the other processes, which may never come to it"),
        ("a_checkpoint_inside_a_window_of_shards", "FSDP2 has gradients of it that have not been reduced"),
    ],
)
def test_a_checkpoint_that_can_not_be_had_is_an_error(told, scene, text):
    for error in found(told("afterwards", 2), scene):
        assert error.startswith("RuntimeError")
        assert text in error


def test_a_window_in_which_each_process_has_other_gradients_is_resumed(told):
    assert found(told("afterwards", 2), "resumed_where_gradients_differ") == [pytest.approx(0, abs=1e-14)] * 2


def test_a_window_of_shards_whose_gradients_have_travelled_is_resumed(told):
    for gaps in found(told("afterwards", 2), "resumed_inside_a_window_of_shards"):
        assert gaps == {False: pytest.approx(0, abs=1e-14), True: pytest.approx(0, abs=1e-14)}


def test_an_epoch_that_ends_because_another_process_has_no_more_data_is_resumed_at_its_end(told):
    assert found(told("afterwards", 2), "resumed_at_the_end_of_an_epoch_that_another_ends") == [{5: 0.0, 10: 0.0}] * 2


@pytest.mark.parametrize("scene", ["resumed_from_shards", "resumed_from_a_whole_file_of_shards"])
def test_a_run_under_fsdp_is_resumed_exactly(told, scene):
    for gaps in found(told("resumed", 2), scene):
        assert gaps == {3: 0.0, 6: 0.0, 8: 0.0, 10: 0.0}  # where a window is open, its end is waited for


@pytest.mark.parametrize("world", [1, 3])
def test_shards_load_on_another_number_of_processes(told, tmp_path, world):
    left = told("resumed", 2)
    out = tmp_path / "taken"
    out.mkdir()
    shutil.copytree(left / "handed_on", out / "handed_on")
    assert start(out, world, ["take_shards"]) == 0, (out / "log").read_text()[-4000:]
    (before, _) = found(left, "leave_shards")
    for state in found(out, "take_shards", world):
        assert all(torch.equal(state[name], before[name]) for name in before if name != "step")
        assert state["moved"] > 0
        assert state["moments"] > 0
        assert (state["epoch"], state["iteration"], state["steps"]) == (2, 14, 6)
