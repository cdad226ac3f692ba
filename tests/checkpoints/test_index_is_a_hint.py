"""Whatever the index says: nothing outside the folder is touched, and nothing in it but checkpoints."""

import json
import os
import shutil
import sys
import threading
import zlib

import pytest
from toys import batches, trainer_of

from camshaft import CheckpointRotation
from camshaft.checkpoints.index import Index, read_index
from camshaft.checkpoints.names import file_name, step_of

FIELDS = {"iteration": 2, "epoch": 1, "score": None, "metrics": {}, "time": "", "written": 7}

watched = {}
"""By a folder's path, what this process has done to it."""


def watch(event, arguments):
    """Notes every file that is opened, listed, renamed or deleted in a watched folder."""
    if watched and event != "os.symlink" and event.split(".")[0] in ("open", "os", "shutil", "glob", "pathlib"):
        for folder, seen in watched.items():
            if any(isinstance(item, (str, os.PathLike)) and str(item).startswith(folder) for item in arguments):
                seen.append((event, *map(str, arguments[:2])))


@pytest.fixture(scope="module", autouse=True)
def audit():
    sys.addaudithook(watch)


@pytest.fixture
def folder(tmp_path):
    """A folder with steps 2 and 4, beside others' files; another folder beside it, of which nothing may be touched."""
    trainer = trainer_of()
    with CheckpointRotation(tmp_path / "run").attached(trainer):
        trainer.run(batches(2), max_epochs=2)
    shutil.copytree(tmp_path / "run", tmp_path / "guard")
    (tmp_path / "run" / "notes.txt").write_text("mine")
    (tmp_path / "run" / "step-best.pt").write_text("mine")
    (tmp_path / "run" / "more").mkdir()
    (tmp_path / "run" / "more" / "step-00000002.pt").write_text("mine")
    before = contents_of(tmp_path / "guard")
    watched[str(tmp_path / "guard")] = seen = []
    yield tmp_path / "run"
    del watched[str(tmp_path / "guard")]
    assert seen == []
    assert contents_of(tmp_path / "guard") == before
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"
    assert (tmp_path / "run" / "step-best.pt").read_text() == "mine"
    assert (tmp_path / "run" / "more" / "step-00000002.pt").read_text() == "mine"


def contents_of(folder):
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


def write_index(folder, change):
    """Changes the index, and gives it the checksum of what it now says."""
    content = json.loads((folder / "checkpoints.json").read_text())
    del content["crc32"]
    change(content)
    crc32 = zlib.crc32(json.dumps(content, sort_keys=True).encode())
    (folder / "checkpoints.json").write_text(json.dumps(content | {"crc32": crc32}))


def listed(name, step=2):
    return {"file": name, "optimizer_step": step, **FIELDS}


def use(folder):
    """Reads, resumes, and rotates with ``keep_last=1``; returns what was resumed."""
    reader = CheckpointRotation(folder)
    assert reader.last is not None
    trainer = trainer_of()
    checkpoints = CheckpointRotation(folder, keep_last=1).attach(trainer)
    resumed = checkpoints.resume("auto")
    trainer.run(batches(2), max_epochs=3)
    assert checkpoints.last == folder / "step-00000006.pt"
    assert [entry.optimizer_step for entry in read_index(folder / "checkpoints.json")[1]] == [6]
    return resumed


def test_the_watch_sees_what_is_touched(tmp_path):
    watched[str(tmp_path)] = seen = []
    (tmp_path / "a").write_text("")
    os.replace(tmp_path / "a", tmp_path / "b")
    list(tmp_path.iterdir())
    (tmp_path / "b").unlink()
    del watched[str(tmp_path)]
    assert [event for event, *_ in seen] == ["open", "os.rename", "os.listdir", "os.remove"]


NAMES = [
    "../guard/step-00000002.pt",
    "../guard",
    "{guard}/step-00000002.pt",
    "{guard}",
    "step-00000002.pt/../../guard/step-00000002.pt",
    "./step-00000002.pt",
    "more/step-00000002.pt",
    "more",
    "notes.txt",
    "step-best.pt",
    "",
    ".",
    "..",
    "/",
    ".camshaft.lock",
    "checkpoints.json",
    "step-2.pt",
    "step-000000002.pt",
    "step-00000002.PT",
    "step-00000002.pt\n",
    "step-00000002.pt\0",
    "step-0000000\N{ARABIC-INDIC DIGIT TWO}.pt",
    "step-" + "9" * 5000 + ".pt",
    "\x1b[2Jstep-00000002.pt",
]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
@pytest.mark.parametrize("position", ["first", "last", "alone"])
def test_a_name_that_is_not_a_checkpoint_is_ignored_and_named(folder, caplog, name, position):
    name = name.format(guard=folder.parent / "guard")

    def change(content):
        items = [] if position == "alone" else content["checkpoints"]
        content["checkpoints"] = [listed(name), *items] if position == "first" else [*items, listed(name)]

    write_index(folder, change)
    assert use(folder) == folder / "step-00000004.pt"
    assert "lists what is not a checkpoint of this folder; ignored: " in caplog.text
    assert "\x1b" not in caplog.text


@pytest.mark.parametrize(
    "item", [None, 7, "step-00000002.pt", ["file"], {}, {"file": "step-00000002.pt"}, listed(7), listed(None)], ids=ascii
)
def test_an_item_that_is_no_entry_is_ignored(folder, item):
    write_index(folder, lambda content: content["checkpoints"].insert(0, item))
    assert use(folder) == folder / "step-00000004.pt"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("optimizer_step", 3),
        ("optimizer_step", "2"),
        ("optimizer_step", True),
        ("iteration", -1),
        ("iteration", 2.5),
        ("epoch", None),
        ("score", "high"),
        ("score", float("nan")),
        ("score", float("inf")),
        ("metrics", []),
        ("metrics", {"x": "y"}),
        ("metrics", {"x": float("inf")}),
        ("time", 5),
        ("written", "now"),
        ("written", -1),
    ],
)
def test_an_entry_with_a_wrong_field_is_read_from_its_file_instead(folder, field, value):
    write_index(folder, lambda content: content["checkpoints"][0].update({field: value}))
    assert [entry.optimizer_step for entry in Index(folder).entries] == [2, 4]
    assert use(folder) == folder / "step-00000004.pt"


def test_a_checkpoint_that_is_listed_twice_counts_once(folder):
    write_index(folder, lambda content: content["checkpoints"].extend(content["checkpoints"] * 3))
    assert [entry.optimizer_step for entry in Index(folder).entries] == [2, 4]
    assert use(folder) == folder / "step-00000004.pt"


@pytest.mark.parametrize("target", ["step-00000004.pt", "", "missing"])
@pytest.mark.parametrize("name", ["step-00000009.pt", "step-00000009", "step-00000002.pt"])
def test_a_symbolic_link_is_neither_followed_nor_deleted(folder, name, target):
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(folder.parent / "guard" / target)
    write_index(folder, lambda content: content["checkpoints"].append(listed(name, step_of(name))))
    watched[str(folder / name)] = seen = []
    assert use(folder) == folder / "step-00000004.pt"
    del watched[str(folder / name)]
    assert seen == []
    assert (folder / name).is_symlink()


def test_a_temporary_file_that_is_a_link_is_deleted_and_not_what_it_leads_to(folder):
    (folder / ".camshaft-a.tmp").symlink_to(folder.parent / "guard")
    (folder / ".camshaft-b.tmp").symlink_to(folder.parent / "guard" / "step-00000002.pt")
    use(folder)
    assert not list(folder.glob(".camshaft-*.tmp"))


def test_no_link_is_recovered(folder):
    os.symlink(folder.parent / "guard", folder / ".camshaft-step-00000009.01234567.tmp")
    assert use(folder) == folder / "step-00000004.pt"
    assert not (folder / "step-00000009").exists()


@pytest.mark.parametrize(
    "content", ["3", "null", "[]", '"x"', "{}", '{"crc32": 0}', "[" * 100_000, "1" * 5000, "\udc80", "nan"]
)
def test_a_text_that_is_no_index_is_rebuilt(folder, content, caplog):
    (folder / "checkpoints.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    assert use(folder) == folder / "step-00000004.pt"
    assert "and is rebuilt from the checkpoints" in caplog.text


def test_an_index_that_is_a_pipe_is_not_read(folder, caplog):
    (folder / "checkpoints.json").unlink()
    os.mkfifo(folder / "checkpoints.json")
    done = threading.Thread(target=lambda: use(folder), daemon=True)
    done.start()
    done.join(30)
    assert not done.is_alive()
    assert (folder / "step-00000006.pt").exists()


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("step", [0, 1, 99_999_999, 100_000_000, 10**17])
def test_every_name_of_a_step_is_recognised(step, sharded):
    assert step_of(file_name(step, sharded)) == step
