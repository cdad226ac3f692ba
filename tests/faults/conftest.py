"""Folders for children, and small file systems where they may be mounted."""

import shutil
import subprocess

import pytest
from signalled import end_of, make_run


@pytest.fixture
def small_disk(tmp_path):
    """Mounts a small tmpfs; called with its size, it gives the folder."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(size):
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("a tmpfs can't be mounted here: that needs root")
        return folder

    yield mount
    if folder.is_mount():
        subprocess.run(["umount", "--lazy", str(folder)], check=True)  # a trainer that is not freed yet holds its lock file


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory):
    """All that the run of ``signalled`` has made when nobody disturbs it."""
    trainer, _, _, run = make_run(tmp_path_factory.mktemp("whole"))
    run()
    return end_of(trainer)
