"""A run that gets a signal ends cleanly, and the resumed run equals the uninterrupted one."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from faulty import TIMEOUT, Child
from signalled import BATCHES, COMPLETED, EPOCHS, IN_EVALUATION, STEPS, WINDOW, assert_resumes_exactly, make_run, train_slowly
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from camshaft import Events
from camshaft.checkpoints.file_load import load_checked

BOTH = pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
MID_EPOCH = BATCHES + 4


def points(folder, tag="train/loss"):
    board = EventAccumulator(str(folder / "board"), size_guidance={"scalars": 0})
    return [point.step for point in board.Reload().Scalars(tag)]


def assert_stopped_cleanly(folder, reported, at_least, *, closed=True):
    """Checks that the last step is saved, every point is on the disk, and the handlers of ``COMPLETED`` have run."""
    last = max(number for number in reported if number < IN_EVALUATION)
    assert at_least <= last < BATCHES * EPOCHS
    newest = max((folder / "checkpoints").glob("*.pt"))
    content = load_checked(newest)
    assert content["clocks"]["iteration"] == last
    assert not closed or last % BATCHES % WINDOW == 0, "the window was not closed"
    step = content["phases"]["model"]["optimizer_step"]
    assert reported[-1] == COMPLETED + step
    assert points(folder) == list(range(1, step + 1))


@BOTH
def test_a_script_that_is_stopped_in_mid_epoch(tmp_path, uninterrupted, number):
    notes = tmp_path / "notes"
    notes.touch()
    script = Path(__file__).with_name("signalled.py")
    command = [sys.executable, script, tmp_path, "0", notes]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as child:
        deadline = time.monotonic() + TIMEOUT
        while f"\n{MID_EPOCH}\n" not in notes.read_text():
            assert child.poll() is None, child.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.005)
        child.send_signal(number)
        _, error = child.communicate(timeout=TIMEOUT)
    assert child.returncode == 128 + number, error
    assert "Traceback" not in error
    assert_stopped_cleanly(tmp_path, [int(line) for line in notes.read_text().split()], MID_EPOCH)
    time.sleep(1)  # TensorBoard sorts its files by the second
    assert_resumes_exactly(tmp_path, uninterrupted)
    assert points(tmp_path) == list(range(1, STEPS + 1))


WORKERS = [
    ("fork", signal.SIGTERM, False, True),
    ("fork", signal.SIGINT, True, True),  # Ctrl-C in a terminal reaches every process of the group
    ("forkserver", signal.SIGTERM, False, True),
    ("fork", signal.SIGTERM, True, False),  # as a batch system sends it: the workers end too, and can't fill the window
    ("forkserver", signal.SIGINT, True, False),
]


@pytest.mark.parametrize(("context", "number", "group", "closed"), WORKERS)
def test_with_workers(tmp_path, uninterrupted, context, number, group, closed):
    with Child(train_slowly, tmp_path / "notes", tmp_path, workers=2, context=context) as child:
        child.wait_for(MID_EPOCH)
        child.signal(number, group=group)
        assert child.join() == 128 + number, child.error()
        assert "Traceback" not in child.error()  # at most a warning about a batch that the workers could not deliver
        assert_stopped_cleanly(tmp_path, child.reported, MID_EPOCH, closed=closed)
    assert_resumes_exactly(tmp_path, uninterrupted)


@BOTH
def test_in_a_nested_evaluation(tmp_path, number):
    with Child(train_slowly, tmp_path / "notes", tmp_path, nested=True) as child:
        child.wait_for(IN_EVALUATION + MID_EPOCH)
        child.signal(number)
        assert child.join() == 128 + number, child.error()
        reported = child.reported
    assert reported.count(IN_EVALUATION + 20) in (0, 4), "the evaluation was not finished"
    assert_stopped_cleanly(tmp_path, reported, MID_EPOCH)


@BOTH
def test_a_second_signal_ends_the_process_at_once(tmp_path, number):
    with Child(train_slowly, tmp_path / "notes", tmp_path, hang=MID_EPOCH) as child:
        child.wait_for(MID_EPOCH)
        child.signal(number)
        child.process.join(0.3)
        assert child.process.is_alive()
        child.signal(number)
        assert child.join() == 128 + number
        assert max(child.reported) == MID_EPOCH
    assert load_checked(max((tmp_path / "checkpoints").glob("*.pt")))["clocks"]["iteration"] == BATCHES


def test_a_run_that_is_stopped_several_times(tmp_path, uninterrupted):
    stops = 0
    for iteration in (2, 9, MID_EPOCH, 30):
        with Child(train_slowly, tmp_path / f"notes {iteration}", tmp_path) as child:
            child.wait_for(iteration)
            child.signal(signal.SIGTERM)
            assert child.join() == 128 + signal.SIGTERM, child.error()
            stops += 1
    assert stops == 4
    assert_resumes_exactly(tmp_path, uninterrupted)


def test_a_run_after_one_that_was_stopped_does_not_exit(tmp_path):
    trainer, _, _, run = make_run(tmp_path)
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=5), lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit, match="143"):
        run()
    run()
    assert trainer.state.epoch == EPOCHS
    assert trainer.state.stop_reason is None
