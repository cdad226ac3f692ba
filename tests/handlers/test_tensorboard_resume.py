"""TensorBoard over a stop and a resume, and before a checkpoint."""

import time

import pytest
from event_files import by_hand, curve
from ignite.engine import Events
from toys import batches, scripted, trainer_of

from camshaft import CheckpointRotation, Evaluation, TensorBoard


def resumable(folder):
    trainer = trainer_of()
    Evaluation(scripted([1.0]), [0]).attach(trainer)
    TensorBoard(folder / "board", every=1).attach(trainer)
    return trainer, CheckpointRotation(folder / "checkpoints", keep_last=9).attach(trainer)


def test_a_resumed_run_continues_in_the_same_folder_and_hides_later_points(tmp_path):
    first, _ = resumable(tmp_path)
    first.run(batches(2), max_epochs=3)
    time.sleep(1.1)  # the reader sorts files by the second in their names
    second, checkpoints = resumable(tmp_path)
    checkpoints.resume(tmp_path / "checkpoints" / "step-00000004.pt")
    second.run(batches(2), max_epochs=4)
    steps = [step for step, _ in curve(tmp_path / "board", "train/loss")]
    assert steps == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [step for step, _ in curve(tmp_path / "board", "val/score")] == [2, 4, 6, 8]
    losses, _ = by_hand(batches(2) * 4)
    assert [value for _, value in curve(tmp_path / "board", "train/loss")] == pytest.approx(losses, rel=1e-5)


def test_a_point_interrupted_by_a_stop_is_complete_after_the_resume(tmp_path):
    def make():
        trainer = trainer_of()
        board = TensorBoard(tmp_path / "board", every=4).attach(trainer)
        return trainer, board, CheckpointRotation(tmp_path / "checkpoints").attach(trainer)

    trainer, _, _ = make()
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=3), lambda: trainer.terminate())
    trainer.run(batches(8))
    time.sleep(1.1)
    trainer, _, rotation = make()
    rotation.resume()
    trainer.run(batches(8))
    losses, _ = by_hand(batches(8))
    means = [sum(losses[:4]) / 4, sum(losses[4:]) / 4]
    assert [value for _, value in curve(tmp_path / "board", "train/loss")] == pytest.approx(means, rel=1e-6)


def test_points_before_a_checkpoint_are_on_disk_before_it(tmp_path):
    trainer = trainer_of()
    TensorBoard(tmp_path, every=1).attach(trainer)
    seen = []

    @trainer.on(Events.ITERATION_COMPLETED(once=3))
    def save(engine):
        engine.checkpoint()
        seen.extend(step for step, _ in curve(tmp_path, "train/loss"))

    trainer.run(batches(5))
    assert seen == [1, 2, 3]
