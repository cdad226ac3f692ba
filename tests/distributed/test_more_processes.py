"""Two real processes over gloo: weights' files, evaluation, averages, curves and errors of one process alone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_processes import found

SCENES = Path(__file__).parent / "scenes_more.py"
STORIES = {
    "more": (
        "weights_of_a_split_model",
        "weights_of_checkpoints",
        "weights_that_cannot_be_used",
        "one_file_under_ddp",
        "sums_that_fail_on_one",
        "statistics_of_the_first",
        "evaluated_before_the_first_step",
        "evaluated_over_data_of_unknown_length",
        "averages_of_a_split_model",
        "curves_of_other_names",
        "frozen_under_ddp",
        "penalised_critics",
        "graphs_of_several",
        "a_time_out_that_nobody_explains",
        "actions_on_rank_zero",
    ),
    "lost": ("an_error_that_only_sounds_like_a_loss",),
}


def start(out, scenes, world=2):
    out.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}", SCENES, out, *scenes]
    with (out / "log").open("w") as log:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.run(command, stdout=log, stderr=log, env=environment, timeout=300, check=False).returncode


@pytest.fixture(scope="session")
def told(tmp_path_factory):
    """By story: the folder with what each process has found; each is run once for all workers."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def tell(story):
        out = base / f"{story}-more"
        with FileLock(f"{out}.lock"):
            if not (out / "code").exists():
                (out / "code").write_text(str(start(out, STORIES[story])))
        return out

    return tell


# -- files of weights -----------------------------------------------------------------------------------------------------


def test_weights_of_a_split_model_are_a_file_for_any(told):
    for seen in found(told("more"), "weights_of_a_split_model"):
        assert seen == {"kinds": ["Tensor"], "into a plain one": True, "into a split one": True}


def test_weights_come_out_of_checkpoints_of_a_split_model(told):
    for seen in found(told("more"), "weights_of_checkpoints"):
        assert seen == {"folder": (True, True), "file": (True, True)}


def test_weights_that_one_cannot_use_are_an_error_on_all(told):
    first, second = found(told("more"), "weights_that_cannot_be_used")
    assert first["missing"].startswith("CheckpointError: rank 1 could not load the weights")
    assert "missing.pt isn't there" in first["missing"]
    assert "missing.pt isn't there" in second["missing"]
    assert second["no folder"].startswith("OSError: rank 0 could not write the weights")
    assert "was written for another model than this FSDPLinear" in second["another"]


def test_under_ddp_the_first_process_alone_writes_weights(told):
    for seen in found(told("more"), "one_file_under_ddp"):
        assert seen == ["by-0.pt"]


# -- sharded checkpoints --------------------------------------------------------------------------------------------------


def test_sums_that_fail_on_one_are_an_error_on_all_and_leave_no_litter(told):
    for seen in found(told("more"), "sums_that_fail_on_one"):
        assert seen["error"].startswith("OSError")
        assert "rank 1 could not read what it has written" in seen["error"]
        assert seen["litter"] == []


def test_batch_norms_statistics_are_those_of_the_first_in_checkpoints_and_evaluation(told):
    first, second = found(told("more"), "statistics_of_the_first")
    assert not torch.equal(first["own"], second["own"])
    for seen in (first, second):
        assert torch.equal(seen["loaded"], first["own"])
        assert torch.equal(seen["evaluated"], first["own"])


# -- evaluation -----------------------------------------------------------------------------------------------------------


def test_a_split_model_can_be_evaluated_before_its_first_step(told):
    assert found(told("more"), "evaluated_before_the_first_step") == [0.0, 0.0]


def test_evaluation_of_a_split_model_ends_where_the_first_process_has_no_more(told):
    for counts, error in found(told("more"), "evaluated_over_data_of_unknown_length"):
        assert counts == [2, 4]
        assert "they have [2, 3] batches to evaluate" in error


# -- averages -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["shards", "file"])
def test_the_average_of_a_split_model_is_that_of_a_whole_one_and_is_resumed(told, kind):
    for seen in found(told("more"), "averages_of_a_split_model"):
        assert seen["ahead"] > 1e-3
        assert seen[kind]["gap"] < 1e-12
        assert seen[kind]["own"] < 1e-12  # the model has its own weights again after each evaluation
        assert seen[kind]["score"] < 1e-6


def test_the_average_of_a_split_model_is_no_module(told):
    for seen in found(told("more"), "averages_of_a_split_model"):
        assert seen["module"].startswith("RuntimeError: a model under fully_shard can't be copied")


# -- curves ---------------------------------------------------------------------------------------------------------------


def test_curves_are_averaged_by_name_over_the_processes_that_have_them(told):
    out = told("more")
    assert found(out, "curves_of_other_names") == [7, 7]
    events = EventAccumulator(str(out / "curves"))
    events.Reload()
    points = {name: [(e.step, e.value) for e in events.Scalars(f"train/{name}")] for name in ("one", "two", "extra")}
    assert points["one"] == [(step, 1.0) for step in range(1, 8)]
    assert points["two"] == [(step, 3.0) for step in range(1, 8)]
    assert points["extra"] == [(step, 5.0) for step in range(3, 8)]


# -- what a wrapper can't do ----------------------------------------------------------------------------------------------


def test_parameters_freeze_under_ddp_only_where_it_looks_for_unused_ones(told):
    for seen in found(told("more"), "frozen_under_ddp"):
        assert seen["error"].startswith(
            "ValueError: FreezeParameters: DistributedDataParallel waits for the gradients of 0.weight"
        )
        assert "find_unused_parameters=True" in seen["error"]
        assert seen["moved"] == [False, True]


def test_several_processes_have_no_graphs(told):
    for answer in found(told("more"), "graphs_of_several"):
        assert answer.startswith("RuntimeError: capture=True is for one process: what the processes send each other can't be")


def test_a_split_critic_is_refused_a_penalty_and_a_split_generator_is_not(told):
    for seen in found(told("more"), "penalised_critics"):
        for error in (seen["refused"], seen["called"]):
            assert error.startswith("ValueError: penalty: the critic ")
            assert "Wrap the critic in DistributedDataParallel" in error
        assert seen["gap"] < 1e-12


# -- actions of rank 0 ----------------------------------------------------------------------------------------------------


def test_every_rank_gets_the_result_of_an_action_of_rank_zero(told):
    first, second = found(told("more"), "actions_on_rank_zero")
    assert first["result"] == second["result"] == {"rank": 0}
    assert (first["ran on"], second["ran on"]) == ([0], [])


@pytest.mark.parametrize(
    ("kind", "own", "other"),
    [
        ("checkpoint", "CheckpointError: a.pt is damaged", "CheckpointError: a.pt is damaged"),
        ("os", "OSError: [Errno 28] No space left on device: 'a.pt'", "OSError: [Errno 28] No space left on device: 'a.pt'"),
        ("local", "LocalError: no a.pt", "FileNotFoundError: no a.pt"),
        ("arguments", "LocatedError: a word in line 3", "ValueError: a word in line 3"),
        ("no text", "ValueError: ", "ValueError: ValueError"),
    ],
)
def test_every_rank_raises_the_error_of_an_action_of_rank_zero(told, kind, own, other):
    first, second = found(told("more"), "actions_on_rank_zero")
    assert first[kind] == f"{own}, then 0"
    assert second[kind] == f"{other} (on rank 0), then 0"


def test_a_result_that_cannot_be_pickled_is_an_error_on_every_rank(told):
    first, second = found(told("more"), "actions_on_rank_zero")
    assert "pickle" in first["not picklable"]
    assert second["not picklable"] == f"{first['not picklable']} (on rank 0)"


# -- what became of the others --------------------------------------------------------------------------------------------


def test_an_error_between_processes_stays_what_it_is_where_nobody_has_written_down_another(told):
    first, second = found(told("more"), "a_time_out_that_nobody_explains")
    assert first["own"]
    assert second["theirs"].startswith("rank 0 failed in epoch 1: RuntimeError: [/gloo/")


def test_an_error_that_only_sounds_like_a_loss_is_named_by_both(told):
    first, second = found(told("lost"), "an_error_that_only_sounds_like_a_loss")
    assert second == "RuntimeError: the socket of the data server timed out"
    assert "rank 1 failed in epoch 1, iteration 3: RuntimeError: the socket of the data server timed out" in first
