"""Starts the processes of the distributed tests, and reads what each rank has returned."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from toys import without_gpus

SCRIPT = Path(__file__).parent / "run_scenarios.py"
GROUPS = (
    ("gradient_sync", "fsdp", "distributed_gan", "distributed_evaluation", "coordinator", "distributed_logging"),
    ("collectives", "failures", "distributed_checkpoints", "distributed_resume", "distributed_weights"),
)
"""The subjects whose scenarios run in the same processes, because it takes seconds to start some."""


def start(folder, world_size, subjects, only=None):
    """Runs scenarios in some processes, and returns the exit code."""
    folder.mkdir(exist_ok=True)
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world_size}"] if world_size > 1 else []
    command = [sys.executable, *torchrun, SCRIPT, *subjects, *(["--only", only] if only else [])]
    environment = without_gpus() | {"SCENARIO_OUTPUT": str(folder)}
    with (folder / "log").open("w") as log:
        return subprocess.run(command, stdout=log, stderr=log, env=environment, timeout=400, check=False).returncode


class Results:
    """The results of the scenarios of one subject, which is the name of the test's file without ``test_``.

    Processes are started when a result is needed, once for all workers of pytest-xdist.
    """

    def __init__(self, base, subject):
        self.base, self.subject = base, subject

    def __call__(self, scenario, world_size=2, alone=False):
        """What each rank has returned; fails with the log if a rank has returned nothing."""
        return self.read(self.folder(world_size, scenario if alone else None), scenario, world_size)

    def folder(self, world_size=2, only=None):
        """The folder into which the scenarios have written."""
        subjects = [self.subject] if only else next(group for group in GROUPS if self.subject in group)
        folder = self.base / f"{only or subjects[0]}-{world_size}"
        with FileLock(f"{folder}.lock"):
            if not (folder / "code").exists():
                (folder / "code").write_text(str(start(folder, world_size, subjects, only)))
        return folder

    @staticmethod
    def read(folder, scenario, world_size):
        paths = [folder / f"{scenario}-{rank}.pt" for rank in range(world_size)]
        missing = [path.name for path in paths if not path.exists()]
        assert not missing, (missing, (folder / "log").read_text()[-4000:])
        return [torch.load(path, weights_only=True) for path in paths]

    def run_in(self, folder, scenario, world_size):
        """Runs a scenario on the files of a folder."""
        start(folder, world_size, [self.subject], scenario)
        return self.read(folder, scenario, world_size)

    def check_same_as_one_process(self, scenario, world_size):
        """Fails if the numbers of several processes differ from those of one process on the same global batches."""
        (expected,) = self(scenario, 1)
        for result in self(scenario, world_size):
            assert list(result) == list(expected)
            for name, value in expected.items():
                torch.testing.assert_close(torch.as_tensor(result[name]), torch.as_tensor(value), rtol=0, atol=1e-12, msg=name)


@pytest.fixture
def results(request, tmp_path_factory):
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    return Results(base, request.module.__name__.removeprefix("test_"))
