"""A signal ends a run in an orderly way, in a process of its own and in this one."""

import os
import signal
import subprocess
import sys
import threading

import pytest
from ignite.engine import Engine, Events
from toys import batches, trainer_of

from camshaft import CheckpointRotation, StepEvents, StopOnSignal

SCRIPT = """
import os, signal, sys, time
sys.path.insert(0, {tests!r})
from toys import batches, trainer_of
from ignite.engine import Events
from camshaft import CheckpointRotation, StopOnSignal

trainer = trainer_of(accumulation_steps=2)
StopOnSignal().attach(trainer)
CheckpointRotation({folder!r}, every=Events.COMPLETED).attach(trainer)

@trainer.on(Events.ITERATION_STARTED(once=3))
def kill(engine):
    os.kill(os.getpid(), signal.{name})
    {then}

trainer.add_event_handler(Events.COMPLETED, lambda e: print("completed at", e.state.optimizer_step, e.state.stop_reason))
trainer.run(batches(8))
print("not reached")
"""
TESTS = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


@pytest.fixture(autouse=True)
def _nobody_dies():
    """Makes a signal that is not handled fail the test instead of ending the process."""

    def nobody(number, frame):
        raise AssertionError(f"nobody listens to {signal.Signals(number).name}")

    signals = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    before = {number: signal.signal(number, nobody) for number in signals}
    yield
    after = {number: signal.getsignal(number) for number in signals}
    for number, handler in before.items():
        signal.signal(number, handler)
    assert set(after.values()) == {nobody}, "the handlers that were there are not put back"


def child(folder, name, then="pass"):
    script = SCRIPT.format(tests=TESTS, folder=str(folder), name=name, then=then)
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_process_completes_its_window_saves_and_exits_with_the_code_of_the_signal(name, code, tmp_path):
    done = child(tmp_path, name)
    assert done.returncode == code
    assert done.stdout == f"completed at 2 {name} received\n"
    assert done.stderr == ""
    assert [path.name for path in tmp_path.glob("*.pt")] == ["step-00000002.pt"]


def test_a_second_signal_exits_immediately(tmp_path):
    done = child(tmp_path, "SIGTERM", then="os.kill(os.getpid(), signal.SIGINT)")
    assert done.returncode == 130
    assert done.stdout == ""
    assert list(tmp_path.glob("*.pt")) == []


def signalled(trainer, *, at, number=signal.SIGTERM, event=Events.ITERATION_STARTED, **run):
    """Runs a trainer that receives a signal in an iteration; returns the exit code."""
    trainer.add_event_handler(event(once=at), lambda: signal.raise_signal(number))
    with pytest.raises(SystemExit) as caught:
        trainer.run(batches(6), **run)
    return caught.value.code


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_run_ends_with_system_exit(number, code):
    trainer = trainer_of()
    StopOnSignal().attach(trainer)
    assert signalled(trainer, at=2, number=number) == code
    assert trainer.state.iteration == 2
    assert trainer.state.stop_reason == f"{signal.Signals(number).name} received"


@pytest.mark.parametrize(("at", "iteration"), [(1, 3), (3, 3), (4, 6)])
def test_the_window_is_completed_first(at, iteration):
    trainer = trainer_of(accumulation_steps=3)
    StopOnSignal().attach(trainer)
    signalled(trainer, at=at)
    assert trainer.state.iteration == iteration
    assert not trainer.window_is_open


@pytest.mark.parametrize("event", [Events.EPOCH_STARTED, Events.EPOCH_COMPLETED], ids=lambda event: event.name)
def test_a_signal_between_epochs_is_handled(event):
    trainer = trainer_of()
    StopOnSignal().attach(trainer)
    assert signalled(trainer, at=1, event=event, max_epochs=3) == 143
    assert trainer.state.epoch == 1


def test_handlers_at_the_end_of_the_run_run_before_the_exit(tmp_path):
    trainer, order = trainer_of(), []
    StopOnSignal().attach(trainer)
    checkpoints = CheckpointRotation(tmp_path, every=Events.COMPLETED).attach(trainer)
    trainer.add_event_handler(Events.COMPLETED, lambda e: order.append(e.state.iteration))
    assert signalled(trainer, at=2) == 143
    assert order == [2]
    assert checkpoints.last.name == "step-00000002.pt"


@pytest.mark.parametrize("end", ["end", "terminate", "terminate without COMPLETED", "exception", "signal"])
def test_the_earlier_signal_handlers_are_restored(end):
    mine = lambda number, frame: None  # noqa: E731
    before = signal.signal(signal.SIGTERM, mine)
    try:
        trainer = trainer_of()
        StopOnSignal().attach(trainer)
        listened = []
        trainer.add_event_handler(Events.ITERATION_STARTED, lambda: listened.append(signal.getsignal(signal.SIGTERM) is mine))

        @trainer.on(Events.ITERATION_COMPLETED(once=2))
        def act(engine):
            if end == "exception":
                raise ValueError("broken")
            if end == "signal":
                signal.raise_signal(signal.SIGTERM)
            if end.startswith("terminate"):
                engine.terminate(skip_completed="without" in end)

        expected = {"exception": ValueError, "signal": SystemExit}.get(end)
        if expected is None:
            trainer.run(batches(3))
        else:
            with pytest.raises(expected):
                trainer.run(batches(3))
        assert signal.getsignal(signal.SIGTERM) is mine
        assert not any(listened)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_after_the_exit_was_caught_the_trainer_can_run_again():
    trainer = trainer_of()
    StopOnSignal().attach(trainer)
    ask = lambda: signal.raise_signal(signal.SIGTERM)  # noqa: E731
    with trainer.add_event_handler(Events.ITERATION_STARTED(once=2), ask), pytest.raises(SystemExit):
        trainer.run(batches(6))
    assert trainer.run(batches(3)).iteration == 3


def test_an_exception_after_the_signal_is_raised():
    trainer = trainer_of(accumulation_steps=3)
    StopOnSignal().attach(trainer)

    @trainer.on(Events.ITERATION_COMPLETED(once=2))
    def fail():
        raise ValueError("broken")

    trainer.add_event_handler(Events.ITERATION_STARTED(once=1), lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(ValueError, match="broken"):
        trainer.run(batches(6))


def test_an_interrupted_run_that_continues_listens_again():
    trainer = trainer_of()
    StopOnSignal().attach(trainer)
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=1), lambda e: e.interrupt())
    before = signal.getsignal(signal.SIGTERM)
    trainer.run(batches(6))
    assert signal.getsignal(signal.SIGTERM) is before
    assert signalled(trainer, at=3) == 143
    assert trainer.state.iteration == 3


def test_outside_the_main_thread_it_warns_and_does_not_listen():
    trainer, caught = trainer_of(), []
    StopOnSignal().attach(trainer)

    def run():
        with pytest.warns(UserWarning, match="StopOnSignal can listen only in the main thread"):
            trainer.run(batches(2))
        caught.append(trainer.state.optimizer_step)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert caught == [2]


def test_other_signals_can_be_chosen():
    trainer = trainer_of()
    StopOnSignal([signal.SIGUSR1]).attach(trainer)
    assert signalled(trainer, at=1, number=signal.SIGUSR1) == 128 + signal.SIGUSR1


def test_after_detaching_it_does_not_listen():
    trainer = trainer_of()
    StopOnSignal().attach(trainer).detach()
    before, seen = signal.getsignal(signal.SIGTERM), []
    trainer.add_event_handler(StepEvents.FORWARD_STARTED, lambda: seen.append(signal.getsignal(signal.SIGTERM) is before))
    trainer.run(batches(1))
    assert seen == [True]


def test_it_works_on_a_plain_ignite_engine():
    engine, completed = Engine(lambda engine, batch: None), []
    StopOnSignal().attach(engine)
    engine.add_event_handler(Events.ITERATION_STARTED(once=2), lambda: signal.raise_signal(signal.SIGTERM))
    engine.add_event_handler(Events.COMPLETED, lambda e: completed.append(e.state.iteration))
    engine.run(range(5))
    assert completed == [2]


@pytest.mark.parametrize("signals", [[], [1234], ["SIGTERM"], 15])
def test_an_argument_that_is_not_a_signal_is_an_error(signals):
    with pytest.raises(ValueError, match="signals must (be a sequence such as|name at least one)"):
        StopOnSignal(signals)


def test_a_worker_that_ends_together_with_the_signal_prints_nothing(capfd):
    trainer = trainer_of()
    StopOnSignal().attach(trainer)
    calls = []
    before = signal.signal(signal.SIGCHLD, lambda number, frame: calls.append(number))

    @trainer.on(Events.ITERATION_COMPLETED(once=1))
    def both():
        both_signals = {signal.SIGTERM, signal.SIGCHLD}
        signal.pthread_sigmask(signal.SIG_BLOCK, both_signals)
        for number in both_signals:
            signal.pthread_kill(threading.get_ident(), number)  # another thread would take it from kill()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, both_signals)

    try:
        with pytest.raises(SystemExit):
            trainer.run(batches(3))
    finally:
        signal.signal(signal.SIGCHLD, before)
    assert capfd.readouterr().err == ""
    assert calls == []
