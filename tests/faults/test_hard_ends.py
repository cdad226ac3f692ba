"""After a hard exit or an exception, the resumed run equals the uninterrupted one."""

import os

import pytest
from faulty import Child
from signalled import BATCHES, EPOCHS, assert_resumes_exactly, make_run

from camshaft import Events, Priority, StepEvents
from camshaft.checkpoints.file_load import load_checked

STOPS = [3, 8, BATCHES - 1, BATCHES, BATCHES + 1, 2 * BATCHES + 5, BATCHES * EPOCHS - 1]
OFTEN = Events.ITERATION_COMPLETED(every=2)


def exit_hard(report, folder, iteration):
    """Exits without cleaning up, right after the saves of an iteration."""
    trainer, _, _, run = make_run(folder, every=OFTEN)
    trainer.add_event_handler_at(Priority.SAVE + 1, Events.ITERATION_COMPLETED(once=iteration), lambda: os._exit(9))
    run()


@pytest.mark.parametrize("iteration", STOPS)
def test_a_hard_exit_after_a_save(tmp_path, uninterrupted, iteration):
    with Child(exit_hard, tmp_path / "notes", tmp_path, iteration) as child:
        assert child.join() == 9, child.error()
    assert_resumes_exactly(tmp_path, uninterrupted)


def test_a_hard_exit_before_the_first_save_starts_from_scratch(tmp_path):
    with Child(exit_hard, tmp_path / "notes", tmp_path, 2) as child:
        assert child.join() == 9, child.error()
    assert make_run(tmp_path)[1].resume("auto") is None


EVENTS = [Events.ITERATION_STARTED, StepEvents.BACKWARD_COMPLETED, Events.ITERATION_COMPLETED]


@pytest.mark.parametrize("event", EVENTS, ids=str)
@pytest.mark.parametrize("iteration", [5, BATCHES, 2 * BATCHES + 4])
def test_an_exception_in_a_step(tmp_path, uninterrupted, iteration, event):
    trainer, rotation, _, run = make_run(tmp_path, every=OFTEN)

    @trainer.on(event)
    def fail(engine):
        if engine.state.iteration == iteration:
            raise ZeroDivisionError("on purpose")

    with pytest.raises(ZeroDivisionError, match="on purpose"):
        run()
    trainer.handlers["TensorBoard"].close()
    assert load_checked(rotation.last)["clocks"]["iteration"] <= iteration
    assert_resumes_exactly(tmp_path, uninterrupted)
