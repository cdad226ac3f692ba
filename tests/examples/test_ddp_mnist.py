"""The example for several processes, as a user starts it: two over gloo, one of them killed, both resumed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from toys import without_gpus

SCRIPT = Path(__file__).parents[2] / "examples" / "ddp_mnist.py"


def command(out, processes=2):
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [sys.executable, *torchrun, SCRIPT, "--quick", "--epochs", "20", "--out", out]


def run(out, processes=2):
    done = subprocess.run(command(out, processes), env=without_gpus(), capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def workers_of(launcher):
    """The processes that torchrun has started."""
    ps = ["ps", "-ww", "-o", "pid=,args=", "--ppid", str(launcher.pid)]
    listed = subprocess.run(ps, capture_output=True, text=True, check=False)
    return [int(line.split()[0]) for line in listed.stdout.splitlines() if SCRIPT.name in line]


def kill_one(out):
    """Starts both, waits for a checkpoint and kills one of them; returns how long the other has lasted."""
    with subprocess.Popen(command(out), env=without_gpus(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as launcher:
        until = time.monotonic() + 100
        while not list(out.glob("checkpoints/step-*.pt")) and time.monotonic() < until:
            time.sleep(0.01)
        os.kill(workers_of(launcher)[-1], signal.SIGKILL)
        killed = time.monotonic()
        assert launcher.wait(timeout=60) != 0
        return time.monotonic() - killed


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    return out, run(out)


def test_two_processes_learn_the_digits_and_the_first_writes(whole):
    out, printed = whole
    assert "new run\n2 processes, 60 steps" in printed
    assert float(printed.split("val accuracy ")[1].split("%")[0]) > 80
    assert len(list(out.glob("events.*"))) == 1


def test_one_is_killed_and_both_go_on_to_the_same_weights(whole, tmp_path):
    out, _ = whole
    assert kill_one(tmp_path) < 45
    assert not (tmp_path / "weights.pt").exists()
    assert "resumed from" in run(tmp_path)
    expected, found = (torch.load(folder / "weights.pt", weights_only=True) for folder in (out, tmp_path))
    assert {name for name in expected if not torch.equal(expected[name], found[name])} == set()
