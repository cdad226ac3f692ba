"""The example under a real torchrun with two processes: trained, and killed in the middle and gone on with by the same command."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

SCRIPT = Path(__file__).parents[2] / "examples/ddp_mnist.py"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
PATIENCE = 25.0
"""Seconds; torchrun itself would wait for 30 before it kills a process that doesn't end."""


def begin(folder):
    """Starts the example in a session of its own, so that nothing of it can be left over."""
    folder.mkdir(exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error,ignore:`torch.jit:DeprecationWarning"}
    with (folder / "log").open("a") as log:
        return subprocess.Popen(
            [*TORCHRUN, SCRIPT, "--quick"], cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True
        )


def end(torchrun, patience=4 * PATIENCE):
    """Its exit code; where it doesn't end by itself, it and its children are ended, and the test fails."""
    try:
        return torchrun.wait(patience)
    finally:
        if torchrun.poll() is None:
            for process in [*children(torchrun), torchrun.pid]:
                os.kill(process, signal.SIGKILL)
            torchrun.wait()


def children(torchrun):
    """The processes that torchrun has started, the oldest first."""
    found = subprocess.run(["pgrep", "-P", str(torchrun.pid)], capture_output=True, text=True, check=False)
    return sorted(map(int, found.stdout.split()))


def wait_for(condition, what):
    until = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < until, f"{what} did not come within {PATIENCE} s"
        time.sleep(0.005)


def is_alive(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def printed(folder):
    return (folder / "log").read_text()


def saved(folder):
    """What the index of the checkpoints names."""
    return json.loads((folder / "runs/ddp_mnist/checkpoints/checkpoints.json").read_text())["checkpoints"]


def last_weights(folder):
    path = folder / "runs/ddp_mnist/checkpoints" / saved(folder)[-1]["file"]
    return torch.load(path, weights_only=True)["phases"]["model"]["model"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The folder of a run that nobody has disturbed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert end(begin(folder)) == 0, printed(folder)
    return folder


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """The folder of a run of which one process was killed in the middle, and then the same command was given again."""
    folder = tmp_path_factory.mktemp("killed")
    torchrun = begin(folder)
    try:
        checkpoints = folder / "runs/ddp_mnist/checkpoints"
        wait_for(lambda: any(checkpoints.glob("step-*.pt")), "the first checkpoint")
        workers = children(torchrun)
        os.kill(workers[-1], signal.SIGKILL)
        wait_for(lambda: not any(map(is_alive, workers)), "the end of the other process")
    finally:
        code = end(torchrun, PATIENCE)
    (folder / "story.json").write_text(json.dumps({"code": code, "workers": len(workers), "left": saved(folder)[-1]}))
    (folder / "log").rename(folder / "first log")
    assert end(begin(folder)) == 0, printed(folder)
    return folder


def test_two_processes_learn_the_digits(undisturbed):
    text = printed(undisturbed)
    assert text.startswith("2 process(es), from the start\n")
    (accuracy,) = re.findall(r"^test accuracy ([\d.]+)%", text, re.MULTILINE)
    assert float(accuracy) > 80


def test_the_first_process_alone_writes(undisturbed):
    folder = undisturbed / "runs/ddp_mnist"
    (curves,) = folder.glob("events.*")
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoints", curves.name]
    files = {entry["file"] for entry in saved(undisturbed)}
    assert {path.name for path in (folder / "checkpoints").iterdir()} == files | {"checkpoints.json"}
    reader = EventAccumulator(str(folder))
    reader.Reload()
    assert [point.step for point in reader.Scalars("val/accuracy")] == [7, 14, 21, 28, 35, 42, 49, 56]
    assert len(re.findall(r"epoch  1  val accuracy", printed(undisturbed))) == 1


def test_where_one_process_is_killed_the_other_ends_and_says_why(killed):
    story = json.loads((killed / "story.json").read_text())
    assert story["code"] != 0
    assert story["workers"] == 2
    assert story["left"]["iteration"] < saved(killed)[-1]["iteration"] == 8 * 13
    assert "another process has left the run without a word" in (killed / "first log").read_text()


def test_the_same_command_goes_on_and_ends_bit_for_bit_as_if_nothing_had_happened(killed, undisturbed):
    assert printed(killed).startswith("2 process(es), going on from runs/ddp_mnist/checkpoints/step-")
    weights, expected = last_weights(killed), last_weights(undisturbed)
    assert list(weights) == list(expected)
    assert {name for name in expected if not torch.equal(weights[name], expected[name])} == set()
