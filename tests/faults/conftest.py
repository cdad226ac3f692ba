"""A small disk that can fill up, and the result of a run that is not interrupted."""

import shutil
import subprocess

import pytest
from signalled import end_of, make_run


@pytest.fixture
def small_disk(tmp_path):
    """A function that mounts a tmpfs of a given size and returns its folder."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(size):
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("mounting a tmpfs needs root")
        return folder

    yield mount
    if folder.is_mount():
        subprocess.run(["umount", "--lazy", str(folder)], check=True)  # a trainer that is not freed yet holds its lock file


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory):
    """The final state of the run of ``signalled`` when nothing interrupts it."""
    trainer, _, _, run = make_run(tmp_path_factory.mktemp("whole"))
    run()
    return end_of(trainer)
