"""The writer of checkpoints, in the foreground and in a background thread."""

import errno
import threading
import weakref

import pytest
import torch

from camshaft.checkpoints import writer as module
from camshaft.checkpoints.file_load import load_checked
from camshaft.checkpoints.index import Entry, Index
from camshaft.checkpoints.names import file_name
from camshaft.checkpoints.writer import CheckpointWriter


def entry(step):
    return Entry(file_name(step), step, step, 1)


def make(folder, **options):
    return CheckpointWriter(Index(folder), lambda entries: entries[-2:], **options)


def write_and_wait(writer, step):
    writer.write({"x": torch.zeros(1)}, entry(step))
    writer.wait()


@pytest.fixture
def gate(monkeypatch):
    """Blocks every write until it is set."""
    gate, save = threading.Event(), module.save_durably

    def slow(content, path):
        assert gate.wait(10)
        return save(content, path)

    monkeypatch.setattr(module, "save_durably", slow)
    return gate


def fill_the_disk(monkeypatch):
    def fail(content, path):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "save_durably", fail)


@pytest.mark.parametrize("background", [False, True])
def test_files_are_written_and_rotated(tmp_path, background):
    writer = make(tmp_path, background=background)
    for step in range(1, 5):
        assert writer.write({"x": torch.tensor(step)}, entry(step)) == tmp_path / file_name(step)
    assert writer.wait()
    assert sorted(path.name for path in tmp_path.glob("*.pt")) == [file_name(3), file_name(4)]
    assert [load_checked(path)["x"] for path in Index(tmp_path).newest_first()] == [4, 3]


def test_the_file_contains_the_values_at_the_time_of_the_request(tmp_path, gate):
    writer, weights = make(tmp_path, background=True), torch.zeros(3)
    path = writer.write({"weights": weights}, entry(1))
    weights.fill_(7)  # training continues
    gate.set()
    assert writer.wait()
    assert load_checked(path)["weights"].tolist() == [0, 0, 0]


def test_a_second_write_waits_for_the_first(tmp_path, gate):
    writer = make(tmp_path, background=True)
    writer.write({"x": torch.zeros(1)}, entry(1))
    opener = threading.Timer(0.2, gate.set)
    opener.start()
    writer.write({"x": torch.ones(1)}, entry(2))  # waits for the first
    assert (tmp_path / file_name(1)).exists()
    assert writer.wait()
    opener.join()


def test_report_if_done_does_not_wait(tmp_path, gate):
    writer = make(tmp_path, background=True)
    writer.write({"x": torch.zeros(1)}, entry(1))
    assert writer.report_if_done()
    assert not (tmp_path / file_name(1)).exists()
    gate.set()
    assert writer.wait()


def test_a_failure_in_the_background_is_reported_by_the_next_call(tmp_path, monkeypatch):
    writer = make(tmp_path, background=True)
    write_and_wait(writer, 1)
    fill_the_disk(monkeypatch)
    assert writer.write({"x": torch.zeros(1000)}, entry(2)) is not None
    with pytest.warns(RuntimeWarning, match=r"step-00000002.pt could not be written .*about 4,000 bytes.*training continues"):
        assert not writer.wait()


ERRORS = [
    MemoryError("no memory"),
    RuntimeError("odd"),
    KeyError("odd"),
    RecursionError("deep"),
    OSError("odd"),
    ValueError("odd"),
]


def fail_with(monkeypatch, error):
    def fail(content, path):
        raise error

    monkeypatch.setattr(module, "save_durably", fail)


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_every_exception_counts_as_a_failed_save(tmp_path, monkeypatch, background, error):
    writer = make(tmp_path, background=background)
    write_and_wait(writer, 1)
    fail_with(monkeypatch, error)
    for step in (2, 3):
        with pytest.warns(RuntimeWarning, match=f"step-0000000{step}.pt could not be written .*{error.args[0]}"):
            write_and_wait(writer, step)
    with pytest.raises((OSError, RuntimeError), match=f"{error.args[0]}.*3 saves in a row have failed") as caught:
        write_and_wait(writer, 4)
    assert caught.value.__cause__ is error
    assert [path.name for path in tmp_path.glob("*.pt")] == [file_name(1)]


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3)], ids=lambda error: type(error).__name__)
def test_a_request_to_stop_is_raised_as_it_is(tmp_path, monkeypatch, background, error):
    writer = make(tmp_path, background=background)
    write_and_wait(writer, 1)
    fail_with(monkeypatch, error)
    with pytest.raises(type(error)):
        write_and_wait(writer, 2)
    monkeypatch.undo()
    write_and_wait(writer, 3)
    assert Index(tmp_path).newest_first()[0] == tmp_path / file_name(3)


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_the_first_save_that_fails_raises_at_once(tmp_path, monkeypatch, background, error):
    writer = make(tmp_path, background=background)
    fail_with(monkeypatch, error)
    with pytest.raises((OSError, RuntimeError), match=f"{error.args[0]}.*nothing was ever saved in this folder"):
        write_and_wait(writer, 1)


def test_the_first_save_of_a_restart_that_fails_is_a_warning(tmp_path, monkeypatch):
    write_and_wait(make(tmp_path), 1)
    writer = make(tmp_path)
    fail_with(monkeypatch, OSError(errno.ENOSPC, "No space left on device"))
    with pytest.warns(RuntimeWarning, match="the earlier checkpoints are untouched; training continues"):
        write_and_wait(writer, 2)


def test_a_copy_that_does_not_fit_into_memory_is_a_failed_save(tmp_path, monkeypatch):
    writer = make(tmp_path, background=True)
    write_and_wait(writer, 1)

    def fail(*_):
        raise MemoryError("no memory")

    monkeypatch.setattr(module.Snapshot, "take", fail)
    with pytest.warns(RuntimeWarning, match="MemoryError: no memory"):
        assert writer.write({"x": torch.zeros(1)}, entry(2)) is None
    monkeypatch.undo()
    write_and_wait(writer, 3)


def test_a_failed_save_in_the_background_keeps_no_copy_of_the_tensors(tmp_path, monkeypatch):
    writer, copies = make(tmp_path, background=True), []
    write_and_wait(writer, 1)

    def fail(content, path):
        copies.append(weakref.ref(content["x"]))
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "save_durably", fail)
    writer.write({"x": torch.zeros(1)}, entry(2))
    writer._thread.join()
    assert [copy() for copy in copies] == [None]
    with pytest.warns(RuntimeWarning, match="No space left"):
        writer.wait()


@pytest.mark.parametrize("background", [False, True])
def test_the_third_consecutive_failure_raises(tmp_path, monkeypatch, background):
    writer = make(tmp_path, background=background)
    assert writer.write({"x": torch.zeros(1)}, entry(1))
    assert writer.wait()
    fill_the_disk(monkeypatch)
    for step in (2, 3):
        with pytest.warns(RuntimeWarning, match="training continues"):
            write_and_wait(writer, step)
    with pytest.raises(OSError, match="3 saves in a row have failed"):
        write_and_wait(writer, 4)
    assert [path.name for path in tmp_path.glob("*.pt")] == [file_name(1)]
