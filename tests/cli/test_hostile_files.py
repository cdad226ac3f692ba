"""Files that a running job changes, or that a stranger has written: nothing raises, hangs, or reaches the terminal."""

import json
import os
import time
import zlib

import pytest
from click.testing import CliRunner
from runs_on_disk import train
from torch.utils.tensorboard import SummaryWriter

from camshaft.checkpoints.index import Index
from camshaft.cli import integrity
from camshaft.cli.commands import camshaft
from camshaft.cli.curves import read_events
from camshaft.cli.integrity import check_folder
from camshaft.cli.run import read_run

HOSTILE = "\x1b[31mred\x07\r\n[bold]x[/bold]\u202e"


def run(*args):
    """What a command prints; it must end with a code, and not with an error of Python."""
    result = CliRunner().invoke(camshaft, [str(arg) for arg in args])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.output


def assert_clean(text):
    assert all(line.isprintable() for line in text.split("\n")), repr(text)


def with_checksum(content):
    return json.dumps(content | {"crc32": zlib.crc32(json.dumps(content, sort_keys=True).encode())})


def rewrite_index(folder, change):
    """Changes the index as someone would who can compute its checksum."""
    path = folder / "checkpoints.json"
    content = json.loads(path.read_text())
    del content["crc32"]
    change(content)
    path.write_text(with_checksum(content))


# -- a running job ----------------------------------------------------------------------------------------------------


def test_a_file_that_is_rotated_away_while_it_is_read_is_not_bad(tmp_path, monkeypatch):
    train(tmp_path, board=False)
    folder = tmp_path / "checkpoints"

    def checked(path):
        if path.name == "step-00000006.pt":
            index = Index(folder)
            index.entries = [entry for entry in index.entries if entry.file != path.name]
            index.write()
            path.unlink()
        return original(path)

    original = integrity.checked
    monkeypatch.setattr(integrity, "checked", checked)
    found = check_folder(folder)
    assert [verdict.file for verdict in found.files] == ["checkpoints.json", "step-00000009.pt"]
    assert found.bad == []


def test_a_file_that_is_replaced_while_it_is_read_is_read_again(tmp_path, monkeypatch):
    path = train(tmp_path, board=False).last
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    looks = []

    def checked(file):
        try:
            return original(file)
        finally:
            if file == path and not looks:
                looks.append(file)
                path.with_suffix(".new").write_bytes(whole)
                os.replace(path.with_suffix(".new"), path)

    original = integrity.checked
    monkeypatch.setattr(integrity, "checked", checked)
    assert check_folder(path.parent).bad == []


def test_show_never_raises_if_files_vanish(tmp_path):
    train(tmp_path)
    for path in sorted((tmp_path / "checkpoints").iterdir()):
        path.unlink()
        run("show", tmp_path)
        run("show", tmp_path, "--json")


# -- what is shown ----------------------------------------------------------------------------------------------------


def test_control_characters_and_markup_are_shown_as_text(tmp_path):
    train(tmp_path)
    folder = tmp_path / "checkpoints"
    with SummaryWriter(tmp_path) as writer:
        writer.add_scalar(HOSTILE, 1.0, 1)
        writer.add_text("ended", HOSTILE)

    def change(content):
        for entry in content["checkpoints"]:
            entry["metrics"], entry["time"] = {HOSTILE: 1.0}, HOSTILE

    rewrite_index(folder, change)
    shown = run("show", tmp_path)
    assert_clean(shown)
    assert r"\x1b[31mred\x07\r\n[bold]x[/bold]\u202e" in shown
    assert_clean(run("verify", tmp_path))


def test_names_of_files_are_shown_as_text(tmp_path):
    train(tmp_path)
    (tmp_path / "checkpoints" / "\x1b[31m.pt").write_bytes(b"")
    assert_clean(run("verify", tmp_path))
    (tmp_path / "\x1b[2J").mkdir()
    assert_clean(run("show", tmp_path / "\x1b[2J"))


# -- event files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b"\0" * 100, b"\xff" * 1000, os.urandom(5000)])
def test_an_event_file_of_something_else_is_empty(content, tmp_path):
    (tmp_path / "events.out.tfevents.1").write_bytes(content)
    events, warnings = read_events(tmp_path)
    assert (dict(events.scalars), events.ending, warnings) == ({}, None, [])


def test_a_pipe_among_the_event_files_is_named(tmp_path):
    train(tmp_path)
    os.mkfifo(tmp_path / "events.out.tfevents.9")
    found = read_run(tmp_path)
    assert "train/loss" in found.metrics
    assert found.warnings == (f"{tmp_path / 'events.out.tfevents.9'} is not a file",)


def test_every_flipped_byte_of_an_event_file_can_be_read(tmp_path):
    train(tmp_path, 1)
    path = next(tmp_path.glob("events.out.tfevents.*"))
    whole = path.read_bytes()
    for place in range(0, len(whole), 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        read_events(tmp_path)


def test_large_tags_and_many_points_take_seconds(tmp_path):
    train(tmp_path, 1)
    with SummaryWriter(tmp_path) as writer:
        for step in range(20_000):
            writer.add_scalar("many", 1.0, step)
        writer.add_scalar("x" * 1_000_000, 1.0, 1)
    before = time.perf_counter()
    shown = run("show", tmp_path)
    assert time.perf_counter() - before < 30
    assert len(shown) < 100_000


def test_an_index_of_many_entries_takes_seconds(tmp_path):
    train(tmp_path, 1, board=False)

    def change(content):
        first = content["checkpoints"][0]
        others = [first | {"file": f"step-{step:08d}.pt", "optimizer_step": step} for step in range(100, 20_100)]
        content["checkpoints"] = others + content["checkpoints"]

    rewrite_index(tmp_path / "checkpoints", change)
    before = time.perf_counter()
    shown = run("show", tmp_path)
    assert len(shown) < 1_000_000
    assert "20000 of 20002 files are bad" in run("verify", tmp_path)
    assert time.perf_counter() - before < 30
