"""Every example runs as a user runs it: in a process of its own, in an empty folder, with warnings as errors."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

EXAMPLES = Path(__file__).parents[2] / "examples"
HELPERS = {"digits"}
"""Modules that the scripts import; they have tests of their own."""

STRICT = ["-W", "error", "-W", "ignore:`torch.jit:DeprecationWarning"]
"""Warnings are errors, but for those that torch and Ignite raise between themselves when they are imported."""


def run(script, folder, *arguments):
    """Runs an example in ``folder`` and returns what it printed."""
    command = [sys.executable, *STRICT, EXAMPLES / f"{script}.py", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def curves(folder):
    """What TensorBoard's own reader finds in a folder: tag -> the steps of its points."""
    reader = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0})
    reader.Reload()
    tags = reader.Tags()
    steps = {tag: [point.step for point in reader.Scalars(tag)] for tag in tags["scalars"]}
    return steps | {tag: [image.step for image in reader.Images(tag)] for tag in tags["images"]}


def hyper_parameters(folder):
    reader = EventAccumulator(str(folder))
    reader.Reload()
    return {name for name in reader.summary_metadata if name.startswith("_hparams_")}


def is_png(path):
    return path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def checkpoints_in(folder):
    """The files that the index names, which must be those that are there."""
    named = [entry["file"] for entry in json.loads((folder / "checkpoints.json").read_text())["checkpoints"]]
    assert sorted(named) == sorted(path.name for path in folder.glob("*.pt"))
    return sorted(named)


def test_mnist(tmp_path):
    printed = run("mnist", tmp_path, "--quick")
    folder = tmp_path / "runs/mnist"
    assert re.search(r"^test accuracy \d+\.\d\d% with runs/mnist/checkpoints/step-0000\d+\.pt$", printed, re.MULTILINE)
    assert "tensorboard --logdir runs\n" in printed
    assert is_png(folder / "lr.png")
    assert checkpoints_in(folder / "checkpoints") == ["step-00000005.pt", "step-00000010.pt"]
    points = curves(folder)
    assert points["val/accuracy"] == points["val/loss"] == points["val/wrong digits"] == [5, 10]
    assert points["train/loss"] == points["train/lr"] == points["train/grad_norm"] == [10]
    assert hyper_parameters(folder)


def test_mnist_goes_on(tmp_path):
    run("mnist", tmp_path, "--quick")
    printed = run("mnist", tmp_path, "--quick", "--resume", "--epochs", "3")
    assert "resumed from runs/mnist/checkpoints/step-00000010.pt" in printed
    assert re.findall(r"^epoch +(\d)", printed, re.MULTILINE) == ["3"]
    assert curves(tmp_path / "runs/mnist")["val/accuracy"] == [5, 10, 15]
    assert not (tmp_path / "runs/mnist-2").exists()


def test_a_second_run_of_mnist_has_a_folder_of_its_own(tmp_path):
    (tmp_path / "runs/mnist").mkdir(parents=True)
    run("mnist", tmp_path, "--quick", "--epochs", "1")
    assert curves(tmp_path / "runs/mnist-2")["val/accuracy"] == [5]
    assert list((tmp_path / "runs/mnist").iterdir()) == []


@pytest.mark.slow
def test_mnist_reads_the_digits(tmp_path):
    accuracy = re.search(r"^test accuracy ([\d.]+)%", run("mnist", tmp_path), re.MULTILINE)
    assert float(accuracy[1]) >= 97


def test_wgan_gp(tmp_path):
    printed = run("wgan_gp", tmp_path, "--quick")
    folder = tmp_path / "runs/wgan_gp"
    assert "tensorboard --logdir runs\n" in printed
    assert is_png(folder / "samples.png")
    assert len(checkpoints_in(folder / "checkpoints")) == 1
    points = curves(folder)
    assert points["samples"] == points["val/wasserstein"]
    assert len(points["samples"]) == 2
    printed = run("wgan_gp", tmp_path, "--quick", "--resume", "--epochs", "3")
    assert re.findall(r"^epoch +(\d)", printed, re.MULTILINE) == ["3"]
    assert len(curves(folder)["samples"]) == 3


def test_ring_of_gaussians(tmp_path):
    printed = run("ring_of_gaussians", tmp_path, "--quick")
    assert re.findall(r"^generator step +(\d+)", printed, re.MULTILINE) == ["5", "10"]
    assert is_png(tmp_path / "runs/ring/ring.png")


def test_resume_after_kill(tmp_path):
    printed = run("resume_after_kill", tmp_path, "--quick")
    assert "kill -9" in printed
    assert "going on from step-" in printed
    whole, resumed = re.findall(r"weights (\w{8})$", printed, re.MULTILINE)
    assert whole == resumed
    assert printed.endswith("both runs are equal, bit for bit\n")


@pytest.mark.parametrize("script", sorted(path.stem for path in EXAMPLES.glob("*.py")))
def test_every_example_has_a_test(script):
    assert script in HELPERS or f"test_{script}" in globals()
