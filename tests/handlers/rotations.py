"""Trainers with a rotation of checkpoints, and what their folders hold."""

import json

from toys import scripted, trainer_of

from camshaft import CheckpointRotation, Evaluation


def rotating(folder, trainer=None, scores=None, **options):
    """A trainer with a rotation. If scores are given, an evaluation returns them, and the rotation follows its metric."""
    trainer = trainer_of() if trainer is None else trainer
    if scores is not None:
        Evaluation(scripted(scores), [0]).attach(trainer)
        options = {"metric": "val/score", "keep_best": 1} | options
    return trainer, CheckpointRotation(folder, **options).attach(trainer)


def steps_in(folder):
    """The optimizer steps of the checkpoints in a folder."""
    return sorted(int(path.stem.removeprefix("step-")) for path in folder.glob("step-*.pt"))


def indexed(folder):
    """The optimizer steps that the index of a folder lists."""
    return [entry["optimizer_step"] for entry in json.loads((folder / "checkpoints.json").read_text())["checkpoints"]]
