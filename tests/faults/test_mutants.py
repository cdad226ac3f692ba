"""Files that were changed on purpose, with correct checksums: each is refused with one kind of error, or does no harm."""

import io
import json
import math
import os
import resource
import warnings
import zipfile
import zlib

import pytest
import torch
from faulty import counting_run, train

from camshaft import CheckpointRotation
from camshaft.checkpoints.file_load import load_checked
from camshaft.checkpoints.files import CheckpointError, checksum, save_durably
from camshaft.checkpoints.index import Index
from camshaft.checkpoints.sharded_load import load_manifest, load_shards
from camshaft.cli.integrity import check_folder
from camshaft.cli.run import read_run

VALUES = {
    "none": lambda value: None,
    "true": lambda value: True,
    "negative": lambda value: -1,
    "huge": lambda value: 2**70,
    "nan": lambda value: math.nan,
    "text": lambda value: "../../guard/secret\x1b[31m",
    "list": lambda value: [value],
    "dict": lambda value: {"a": value},
    "empty list": lambda value: [],
    "empty dict": lambda value: {},
    "bytes": lambda value: b"\0",
    "tensor": lambda value: torch.zeros(3, 0),
    "large tensor": lambda value: torch.zeros(1).expand(10**6),
}
"""Values of another type, range or size, in place of any entry."""


def paths_in(value, path=()):
    """The path of each entry of a nest, at any depth; of long lists only the first two."""
    if path:
        yield path
    items = (
        list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, (list, tuple)) else []
    )
    for key, item in items[:40] if isinstance(value, dict) else items[:2]:
        yield from paths_in(item, (*path, key))


def changed(value, path, change):
    """A copy of a nest with one entry changed; ``None`` as the result of ``change`` for a renamed or missing entry is kept."""
    if not path:
        return change(value)
    if isinstance(value, dict):
        return {key: changed(item, path[1:], change) if key == path[0] else item for key, item in value.items()}
    return type(value)(changed(item, path[1:], change) if n == path[0] else item for n, item in enumerate(value))


def without(value, path):
    """A copy of a nest that lacks an entry of a dict."""
    if len(path) == 1:
        return {key: item for key, item in value.items() if key != path[0]} if isinstance(value, dict) else value
    return changed(value, path[:1], lambda inner: without(inner, path[1:]))


def renamed(value, path):
    """A copy of a nest in which a key has another name."""
    if len(path) == 1:
        return {"../x" if key == path[0] else key: item for key, item in value.items()} if isinstance(value, dict) else value
    return changed(value, path[:1], lambda inner: renamed(inner, path[1:]))


def mutants_of(content):
    """Every entry, replaced by every value, removed and renamed."""
    for path in paths_in(content):
        for name, change in VALUES.items():
            yield f"{path}: {name}", lambda path=path, change=change: changed(content, path, change)
        yield f"{path}: removed", lambda path=path: without(content, path)
        yield f"{path}: renamed", lambda path=path: renamed(content, path)


def fingerprint(trainer):
    """Everything of a trainer that a checkpoint holds, as bytes that can be compared."""
    file = io.BytesIO()
    torch.save(trainer.checkpoint(), file)
    return file.getvalue()


@pytest.fixture
def guard(tmp_path):
    """A folder next to the checkpoints, which nothing may touch."""
    folder = tmp_path / "guard"
    folder.mkdir()
    (folder / "secret").write_text("mine")
    yield folder
    assert [(path.name, path.read_text()) for path in folder.iterdir()] == [("secret", "mine")]


@pytest.fixture
def folder(tmp_path, guard):
    train(counting_run(tmp_path / "run")[0], 2)
    return tmp_path / "run"


def try_all(mutants, write, trainer, resume, good):
    """Writes each mutant and resumes from it. Returns how many were refused, and how many were loaded.

    After a refused one the trainer is as before.
    """
    before, refused, loaded = fingerprint(trainer), 0, 0
    for name, make in mutants:
        write(make())
        try:
            resume()
        except Exception as error:
            text, is_right = str(error), isinstance(error, CheckpointError) and str(error).isprintable()
            refused += 1
        else:
            text, is_right = "", True
            loaded += 1
            trainer.restore(good)
        assert is_right, f"{name}: {text!r}"
        assert fingerprint(trainer) == before, f"{name} has changed the trainer"
    return refused, loaded


@pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::UserWarning")
@pytest.mark.parametrize("part", range(2))
def test_no_mutant_of_a_checkpoint_does_harm(part, folder, tmp_path):
    content = load_checked(folder / "step-00000002.pt")
    mutants = list(mutants_of(content))
    assert len(mutants) > 1000
    trainer, rotation = counting_run(tmp_path / "other")
    good = load_checked(folder / "step-00000001.pt")
    trainer.restore(good)
    path = tmp_path / "step-00000002.pt"
    write = lambda mutant: save_durably(mutant, path)  # noqa: E731
    refused, loaded = try_all(mutants[part::2], write, trainer, lambda: rotation.resume(path), good)
    assert refused > 300
    assert refused + loaded == len(mutants[part::2])


@pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::UserWarning")
def test_auto_passes_over_every_mutant_that_is_refused(folder):
    content = load_checked(folder / "step-00000002.pt")
    for _, make in list(mutants_of({"clocks": content["clocks"], "rng": content["rng"], "handlers": content["handlers"]}))[::5]:
        save_durably(content | make(), folder / "step-00000002.pt")
        _, rotation = counting_run(folder)
        assert rotation.resume("auto") in (folder / "step-00000001.pt", folder / "step-00000002.pt")
        rotation.detach()


def index_with(content):
    content = {key: value for key, value in content.items() if key != "crc32"} if isinstance(content, dict) else content
    if isinstance(content, dict):
        content["crc32"] = zlib.crc32(json.dumps(content, sort_keys=True).encode())
    return json.dumps(content)


def test_no_mutant_of_the_index_does_harm(folder):
    content = json.loads((folder / "checkpoints.json").read_text())
    for _, make in mutants_of(content):
        try:
            text = index_with(make())
        except (TypeError, ValueError):  # not JSON
            continue
        (folder / "checkpoints.json").write_text(text)
        assert sorted(path.name for path in Index(folder).newest_first()) == ["step-00000001.pt", "step-00000002.pt"]
        check_folder(folder)
        read_run(folder)


@pytest.fixture
def sharded(tmp_path, guard):
    train(counting_run(tmp_path / "run", sharded=True)[0], 2)
    return tmp_path / "run"


@pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::UserWarning")
def test_no_mutant_of_a_manifest_does_harm(sharded, tmp_path):
    path = sharded / "step-00000002"
    content = load_checked(path / "checkpoint.pt")
    good = load_checked_folder(sharded / "step-00000001")
    trainer, rotation = counting_run(tmp_path / "other", sharded=True)
    trainer.restore(good)
    write = lambda mutant: save_durably(mutant, path / "checkpoint.pt")  # noqa: E731
    mutants = [item for key in ("files", "phases") for item in mutants_of({key: content[key]})]
    mutants = [(name, lambda make=make: content | make()) for name, make in mutants]
    refused, _ = try_all(mutants[::3], write, trainer, lambda: rotation.resume(path), good)
    assert refused > 100


def load_checked_folder(path):
    return load_shards(path, load_manifest(path), lambda name: None)


@pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::UserWarning")
def test_no_mutant_of_the_table_of_contents_does_harm(sharded, tmp_path):
    """Bytes of the pickle are changed; the manifest then has the right checksum."""
    path = sharded / "step-00000002"
    whole, manifest = (path / ".metadata").read_bytes(), load_checked(path / "checkpoint.pt")
    good = load_checked_folder(sharded / "step-00000001")
    trainer, rotation = counting_run(tmp_path / "other", sharded=True)
    trainer.restore(good)

    def write(data):
        (path / ".metadata").write_bytes(data)
        files = manifest["files"] | {".metadata": [len(data), checksum(path / ".metadata")]}
        save_durably(manifest | {"files": files}, path / "checkpoint.pt")

    replaced = [(b"__0_0.distcp", b"../guard/sec"), (b"__0_0.distcp", b"/etc/passwd1"), (b"Metadata", b"open_cod")]
    mutants = [(f"{old} -> {new}", lambda old=old, new=new: whole.replace(old, new)) for old, new in replaced]
    for place in range(0, len(whole), 8):
        for value in (0x00, 0xFF, whole[place] ^ 1):
            data = whole[:place] + bytes([value]) + whole[place + 1 :]
            mutants.append((f"byte {place} -> {value}", lambda data=data: data))
    refused, _ = try_all(mutants, write, trainer, lambda: rotation.resume(path), good)
    assert refused > 300


# -- files of the wrong kind, and bombs -------------------------------------------------------------------------------


def test_pipes_devices_and_links_are_refused_without_reading(folder, tmp_path):
    _, rotation = counting_run(tmp_path / "other")
    os.mkfifo(tmp_path / "step-00000003.pt")
    for path in (tmp_path / "step-00000003.pt", "/dev/zero", "/dev/stdin"):
        with pytest.raises(CheckpointError, match="is not a file"):
            rotation.resume(path)
    (folder / "checkpoints.json").unlink()
    os.mkfifo(folder / "checkpoints.json")
    assert len(Index(folder).newest_first()) == 2
    assert "is not a file" in check_folder(folder).bad[0].reason


BOMBS = {
    "a tensor that is expanded": lambda: {"a": torch.zeros(1).expand(2**40)},
    "lists in lists": lambda: doubled(60),
    "a deep nest": lambda: nested(200),
}


def doubled(times):
    value = []
    for _ in range(times):
        value = [value, value]
    return value


def nested(times):
    value = []
    for _ in range(times):
        value = [value]
    return value


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_and_takes_no_memory(name, tmp_path):
    save_durably(BOMBS[name](), tmp_path / "step-00000001.pt")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError):
        load_checked(tmp_path / "step-00000001.pt")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000  # kilobytes


def test_loading_takes_about_twice_the_size_of_the_file(tmp_path):
    size = 200_000_000
    save_durably({"a": torch.zeros(size // 4)}, tmp_path / "step-00000001.pt")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    load_checked(tmp_path / "step-00000001.pt")
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 2.2 * size


def test_a_storage_smaller_than_its_pickle_claims_is_refused(tmp_path):
    """The name of one storage is exchanged for that of a smaller one."""
    path = tmp_path / "weights.pt"
    torch.save({"large": torch.zeros(1000), "small": torch.zeros(1)}, path)
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    folder = next(iter(entries)).split("/")[0]
    entries[f"{folder}/data/0"] = entries[f"{folder}/data/1"]
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    with pytest.raises(CheckpointError, match="has not the size that its pickle claims"):
        load_checked(path, sealed=False)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    with pytest.raises(CheckpointError, match="is compressed"):
        load_checked(path, sealed=False)


def test_a_refused_file_is_passed_over_with_a_reason(folder):
    content = load_checked(folder / "step-00000002.pt")
    save_durably(content | {"clocks": content["clocks"] | {"iteration": -1}}, folder / "step-00000002.pt")
    trainer, _ = counting_run(folder.parent / "other")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        path = CheckpointRotation(folder).resume("auto", trainer)
    assert path == folder / "step-00000001.pt"
    assert "clocks.iteration must be an integer of at least 0, got -1" in str(caught[0].message)
