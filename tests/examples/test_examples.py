"""Every example runs as a user runs it: in a separate process, in an empty folder, with warnings as errors."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

EXAMPLES = Path(__file__).parents[2] / "examples"
HELPERS = {"digits"}
"""Modules that the scripts import; they have tests of their own."""

STRICT = ["-W", "error", "-W", "ignore:`torch.jit:DeprecationWarning"]
"""Warnings are errors, except those that torch and Ignite raise when they are imported."""


def run(script, folder, *arguments):
    """Runs an example in ``folder`` and returns what it printed."""
    command = [sys.executable, *STRICT, EXAMPLES / f"{script}.py", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def curves(folder):
    """The curves that TensorBoard's own reader finds in a folder: tag -> the steps of its points."""
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
    """The files in the index, which must be exactly those in the folder."""
    named = [entry["file"] for entry in json.loads((folder / "checkpoints.json").read_text())["checkpoints"]]
    assert sorted(named) == sorted(path.name for path in folder.glob("*.pt"))
    return sorted(named)


def test_mnist(tmp_path):
    printed = run("mnist", tmp_path, "--quick")
    folder = tmp_path / "runs/mnist"
    assert re.search(r"^test accuracy \d+\.\d\d% with .*runs/mnist/checkpoints/step-0000\d+\.pt$", printed, re.MULTILINE)
    assert "tensorboard --logdir runs\n" in printed
    assert is_png(folder / "lr.png")
    assert checkpoints_in(folder / "checkpoints") == ["step-00000005.pt", "step-00000010.pt"]
    points = curves(folder)
    assert points["val/accuracy"] == points["val/loss"] == points["val/wrong digits"] == [5, 10]
    assert points["train/loss"] == points["train/lr"] == points["train/grad_norm"] == [10]
    assert hyper_parameters(folder)


def test_mnist_resumes(tmp_path):
    run("mnist", tmp_path, "--quick")
    printed = run("mnist", tmp_path, "--quick", "--resume", "--epochs", "3")
    assert re.search(r"^resumed from .*runs/mnist/checkpoints/step-00000010\.pt$", printed, re.MULTILINE)
    assert re.findall(r"^epoch +(\d)", printed, re.MULTILINE) == ["3"]
    assert curves(tmp_path / "runs/mnist")["val/accuracy"] == [5, 10, 15]
    assert not (tmp_path / "runs/mnist-2").exists()


def test_a_second_run_of_mnist_gets_another_folder(tmp_path):
    (tmp_path / "runs/mnist").mkdir(parents=True)
    run("mnist", tmp_path, "--quick", "--epochs", "1")
    assert curves(tmp_path / "runs/mnist-2")["val/accuracy"] == [5]
    assert list((tmp_path / "runs/mnist").iterdir()) == []


@pytest.mark.slow
def test_mnist_reaches_its_accuracy(tmp_path):
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
    assert "resuming from step-" in printed
    uninterrupted, resumed = re.findall(r"weights (\w{8})$", printed, re.MULTILINE)
    assert uninterrupted == resumed
    assert printed.endswith("both runs are equal, bit for bit\n")


def percent(pattern, printed):
    """Every percentage that follows a text."""
    return [float(found) for found in re.findall(rf"{pattern} ([\d.]+)%", printed)]


def test_finetune_frozen(tmp_path):
    printed = run("finetune_frozen", tmp_path, "--quick")
    folder = tmp_path / "runs/finetune_frozen"
    assert re.findall(r"^epoch .* ([\d,]+) trained", printed, re.MULTILINE) == ["7,845"] * 2 + ["12,485"] * 2 + ["12,901"] * 2
    accuracies = percent("test accuracy", printed)
    assert percent("loaded into a new network:", printed) == accuracies[-1:]
    assert percent("before:", printed)[0] < 40 < accuracies[-1]
    points = curves(folder)
    assert points["train/lr/encoder"] == points["train/lr/head"] == list(range(1, 31))
    encoder, finetuned = (torch.load(folder / name, weights_only=True) for name in ("encoder.pt", "finetuned.pt"))
    assert {name for name, tensor in encoder.items() if torch.equal(tensor, finetuned[f"encoder.{name}"])} == set()


def test_token_weighted_lm(tmp_path):
    printed = run("token_weighted_lm", tmp_path, "--quick")
    off = dict(re.findall(r"^(.+?) +off the big batch by (.+)$", printed, re.MULTILINE))
    assert float(off["weighted by characters"]) < 1e-12 < 1e-4 < float(off["each batch the same"])
    bits = [float(found) for found in re.findall(r"([\d.]+) bits a character", printed)]
    assert 7 > bits[0] > bits[1] > bits[2] > 1  # seven bits: an untrained model
    points = curves(tmp_path / "runs/token_weighted_lm")
    assert points["val/loss"] == [10, 20, 30]
    assert points["train/loss"] == points["train/grad_norm"] == [10, 20, 30]


def test_several_losses(tmp_path):
    printed = run("several_losses", tmp_path, "--quick")
    folder = tmp_path / "runs/several_losses"
    accuracies = percent("val accuracy", printed)
    assert accuracies[-1] > max(60, accuracies[0])
    points = curves(folder)
    assert points["train/classification"] == points["train/reconstruction"] == points["train/loss"] == [10, 20, 30, 40]
    assert points["val/accuracy"] == points["val/squared error"] == points["val/drawings"] == [16, 32, 48]
    assert len(checkpoints_in(folder / "checkpoints")) == 1
    assert hyper_parameters(folder)


def test_custom_handler(tmp_path):
    printed = run("custom_handler", tmp_path, "--quick")
    without, guarded, resumed = percent("test accuracy", printed)
    assert without < 90 < guarded == resumed
    skipped = re.findall(r"(\d+) steps skipped, (in .*), ...$", printed, re.MULTILINE)
    assert skipped[0] == skipped[1]
    assert 5 <= int(skipped[0][0]) <= 12  # four in each of three epochs; two may share a batch
    assert "bit for bit" in printed
    assert curves(tmp_path / "runs/custom_handler/with")["guard/skipped"]


def test_lr_schedules(tmp_path):
    printed = run("lr_schedules", tmp_path, "--quick")
    assert is_png(tmp_path / "runs/lr_schedules/lr_schedules.png")
    assert "the real run used the rates 2.0e-02" in printed
    assert "15 schedules ahead of time" in printed


def test_from_ignite(tmp_path):
    printed = run("from_ignite", tmp_path, "--quick")
    theirs, ours = re.split("camshaft\n", printed.partition("\n\n-")[0], maxsplit=1)
    epochs = re.findall(r"^epoch .*$", theirs, re.MULTILINE)
    assert epochs == re.findall(r"^epoch .*$", ours, re.MULTILINE)
    assert len(epochs) == 3
    assert percent("val accuracy", ours)[-1] > 90
    assert "\n5 lines in place of 6\nevery validation loss and every weight is the same, bit for bit\n" in printed
    assert len(checkpoints_in(tmp_path / "runs/from_ignite/1/camshaft")) == 3


@pytest.mark.parametrize("script", sorted(path.stem for path in EXAMPLES.glob("*.py")))
def test_every_example_has_a_test(script):
    own_file = Path(__file__).with_name(f"test_{script}.py")
    assert script in HELPERS or f"test_{script}" in globals() or own_file.is_file()
