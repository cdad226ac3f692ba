"""A run that is stopped anywhere and resumed gives the same result as an uninterrupted run, bit for bit."""

import random
from functools import partial

import numpy as np
import pytest
import torch
from ignite.engine import Events
from runs import NoisyDataset, make_run, make_small
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, Sampler, SubsetRandomSampler, WeightedRandomSampler

from camshaft import CheckpointRotation, EarlyStopping, StepEvents, create_trainer
from camshaft.testing import assert_resumes_exactly

pytestmark = pytest.mark.usefixtures("collected")


@pytest.mark.parametrize("part", range(4))
def test_terminate_after_each_iteration(part):
    assert_resumes_exactly(make_run, stops=range(1 + part, 66, 4))


@pytest.mark.parametrize("part", range(4))
def test_an_exception_after_each_iteration(part):
    make = partial(make_run, every=StepEvents.OPTIMIZER_STEP_COMPLETED)
    assert_resumes_exactly(make, stops=range(1 + part, 66, 4), by="exception")


def test_saving_in_the_background():
    make = partial(make_run, epochs=2, background=True, every=StepEvents.OPTIMIZER_STEP_COMPLETED)
    assert_resumes_exactly(make, stops=[1, 3, 9, 13, 14])
    assert_resumes_exactly(make, stops=[4, 13, 20], by="exception")


@pytest.mark.parametrize("before", [0, 2])
@pytest.mark.parametrize("after", [0, 2])
def test_another_number_of_workers_with_augmentation(before, after):
    make, resumed = partial(make_run, workers=before, epochs=2), partial(make_run, workers=after, epochs=2)
    assert_resumes_exactly(make, stops=[1, 5, 12, 13, 14, 25], make_resumed=resumed)


def test_fp16_with_a_gradient_scaler():
    assert_resumes_exactly(partial(make_run, amp="fp16", epochs=2), stops=[1, 2, 3, 12, 13, 14, 20])


def test_augmentation_from_global_generators_without_workers():
    assert_resumes_exactly(partial(make_run, seeded=False, epochs=2), stops=[1, 4, 13, 14, 25])


class LazySampler(Sampler):
    """Draws each index on demand, from its own generator."""

    def __init__(self, generator):
        self.generator = generator

    def __len__(self):
        return 30

    def __iter__(self):
        for _ in range(30):
            if isinstance(self.generator, torch.Generator):
                yield int(torch.randint(40, (), generator=self.generator))
            elif isinstance(self.generator, random.Random):
                yield self.generator.randrange(40)
            else:
                yield int(self.generator.integers(40) if hasattr(self.generator, "integers") else self.generator.randint(40))


SAMPLERS = {
    "weighted": lambda: WeightedRandomSampler(torch.arange(40).float() + 1, 30),
    "subset": lambda: SubsetRandomSampler(range(30)),
    "torch generator": lambda: LazySampler(torch.Generator().manual_seed(2)),
    "python generator": lambda: LazySampler(random.Random(2)),
    "numpy generator": lambda: LazySampler(np.random.default_rng(2)),
    "numpy random state": lambda: LazySampler(np.random.RandomState(2)),
}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_custom_samplers(sampler, workers):
    def data():
        return DataLoader(NoisyDataset(40, noise=False), batch_size=4, sampler=SAMPLERS[sampler](), num_workers=workers)

    assert_resumes_exactly(partial(make_small, data=data), stops=[1, 8, 9] if workers else [1, 3, 7, 8, 9, 15])


LOADERS = {
    "batch sampler": lambda: DataLoader(
        NoisyDataset(40), batch_sampler=BatchSampler(WeightedRandomSampler(torch.ones(40), 30), 4, drop_last=False)
    ),
    "own generator": lambda: DataLoader(NoisyDataset(40), 4, shuffle=True, generator=torch.Generator().manual_seed(3)),
    "no shuffling": lambda: DataLoader(NoisyDataset(40), 4),
    "persistent workers": lambda: DataLoader(
        NoisyDataset(40, noise=False), 4, shuffle=True, num_workers=1, persistent_workers=True
    ),
    "list": lambda: [(torch.full((2, 6), float(i)), torch.tensor([0, i % 3])) for i in range(7)],
}


@pytest.mark.parametrize("loader", LOADERS)
def test_loaders_of_every_type(loader):
    assert_resumes_exactly(partial(make_small, data=LOADERS[loader]), stops=[1, 6, 7, 8, 10, 11])


class Stream(IterableDataset):
    """Samples without a length or an index."""

    def __iter__(self):
        yield from (NoisyDataset(11, noise=False)[i] for i in range(11))


@pytest.mark.parametrize("stop", [1, 3, 4, 6, 8])
def test_batches_of_data_without_a_length_are_skipped_with_a_log_message(stop, caplog):
    make = partial(make_small, data=lambda: DataLoader(Stream(), batch_size=3))
    assert_resumes_exactly(make, stops=[stop])
    skipped = stop % 4
    assert (f"{skipped} batches are loaded and skipped" in caplog.text) == bool(skipped)


@pytest.mark.parametrize("epoch_length", [4, 13])
def test_epochs_shorter_and_longer_than_the_data(epoch_length):
    data = partial(DataLoader, NoisyDataset(36), batch_size=4, shuffle=True)
    make = partial(make_small, data=data, run={"max_epochs": 3, "epoch_length": epoch_length})
    assert_resumes_exactly(make, stops=[1, 3, 4, 5, 9, 10])


def test_a_run_with_max_iters():
    data = partial(DataLoader, NoisyDataset(36), batch_size=4, shuffle=True)
    assert_resumes_exactly(partial(make_small, data=data, run={"max_iters": 15}), stops=[2, 9, 10, 14])


def test_the_first_difference_is_named():
    calls = []

    def make_with_another_learning_rate(folder):
        trainer, run = make_small(folder, data=partial(DataLoader, NoisyDataset(36), batch_size=4, shuffle=True))
        calls.append(trainer)
        if len(calls) == 3:  # the resumed run has another learning rate
            trainer.add_event_handler(Events.STARTED, lambda: trainer.primary.optimizers[0].param_groups[0].update(lr=1.0))
        return trainer, run

    with pytest.raises(AssertionError, match=r"first difference is the (learning rate lr|weight .*), at iteration 6"):
        assert_resumes_exactly(make_with_another_learning_rate, stops=[5])


def test_a_resumed_run_may_have_more_epochs(tmp_path):
    make = partial(make_small, data=partial(DataLoader, NoisyDataset(36), batch_size=4, shuffle=True))
    uninterrupted, run = make(tmp_path / "uninterrupted", run={"max_epochs": 4})
    run()
    first, run = make(tmp_path / "parts", run={"max_epochs": 2})
    run()
    second, run = make(tmp_path / "parts", run={"max_epochs": 4})
    second.handlers["CheckpointRotation"].resume()
    run()
    assert second.state.epoch == 4
    assert all(torch.equal(a, b) for a, b in zip(uninterrupted.primary.parameters(), second.primary.parameters(), strict=True))


def test_resuming_a_finished_run_does_nothing(tmp_path):
    make = partial(make_small, data=partial(DataLoader, NoisyDataset(36), batch_size=4), run={"max_epochs": 2})
    trainer, run = make(tmp_path)
    run()
    again, run = make(tmp_path)
    again.handlers["CheckpointRotation"].resume()
    assert run().iteration == 18
    assert again.state.optimizer_step == trainer.state.optimizer_step


def test_resuming_with_other_data_raises(tmp_path):
    trainer, run = make_small(tmp_path, data=partial(DataLoader, NoisyDataset(36), batch_size=4))
    run()
    again, run = make_small(tmp_path, data=partial(DataLoader, NoisyDataset(36), batch_size=6), run={"max_epochs": 9})
    again.handlers["CheckpointRotation"].resume()
    with pytest.raises(ValueError, match="the data has 6 batches, the checkpoint was written with 9"):
        run()


def test_epoch_handlers_do_not_fire_twice(tmp_path):
    events = []

    def make():
        trainer, run = make_small(tmp_path, data=partial(DataLoader, NoisyDataset(36), batch_size=4))
        for event in (Events.EPOCH_STARTED, Events.EPOCH_COMPLETED):
            trainer.add_event_handler(event, lambda e, name=event.name: events.append((name, e.state.epoch)))
        return trainer, run

    trainer, run = make()
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=12), lambda: trainer.terminate())
    run()
    again, run = make()
    again.handlers["CheckpointRotation"].resume()
    run()
    assert events == [("EPOCH_STARTED", 1), ("EPOCH_COMPLETED", 1), ("EPOCH_STARTED", 2), ("EPOCH_COMPLETED", 2)]


def test_a_checkpoint_requested_inside_a_window_is_written_at_its_end(tmp_path):
    trainer, run = make_small(tmp_path, data=partial(DataLoader, NoisyDataset(36), batch_size=4), accumulation_steps=4)
    rotation = trainer.handlers["CheckpointRotation"]
    seen = []
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=2), lambda: rotation.save())
    trainer.add_event_handler(Events.ITERATION_STARTED, lambda e: seen.append(rotation.last and rotation.last.name))
    run()
    assert seen[:5] == [None] * 4 + ["step-00000001.pt"]


def test_checkpoints_every_n_optimizer_steps(tmp_path):
    trainer, run = make_small(
        tmp_path,
        data=partial(DataLoader, NoisyDataset(36), batch_size=4),
        rotation={"every": StepEvents.OPTIMIZER_STEP_COMPLETED(every=4), "keep_last": 10},
    )
    run()
    names = [entry.file for entry in trainer.handlers["CheckpointRotation"].index.entries]
    assert names == [f"step-{step:08d}.pt" for step in (4, 8, 12, 16, 18)]


def test_early_stopping_keeps_its_state(tmp_path):
    def make(epochs):
        trainer, run = make_small(
            tmp_path, data=partial(DataLoader, NoisyDataset(36), batch_size=4), run={"max_epochs": epochs}
        )
        EarlyStopping("score", patience=3).attach(trainer)

        @trainer.on(Events.EPOCH_COMPLETED)
        def score(engine):
            engine.state.metrics["score"] = 1.0

        return trainer, run

    trainer, run = make(2)
    run()
    again, run = make(9)
    again.handlers["CheckpointRotation"].resume()
    run()
    assert again.state.epoch == 4
    assert "score hasn't improved in 3 evaluations" in again.state.stop_reason


def test_the_best_checkpoint_has_the_best_weights_of_the_run(tmp_path):
    trainer, run = make_small(
        tmp_path,
        data=partial(DataLoader, NoisyDataset(36), batch_size=4),
        run={"max_epochs": 5},
        rotation={"keep_last": 1, "keep_best": 1, "metric": "score"},
    )
    scores = iter([0.1, 0.9, 0.3, float("nan"), 0.2])
    weights = {}

    @trainer.on(Events.EPOCH_COMPLETED)
    def score(engine):
        engine.state.metrics["score"] = next(scores)
        weights[engine.state.epoch] = [p.clone() for p in engine.primary.parameters()]

    run()
    rotation = trainer.handlers["CheckpointRotation"]
    assert sorted(path.name for path in tmp_path.glob("*.pt")) == ["step-00000018.pt", "step-00000045.pt"]
    rotation.resume("best")
    assert isinstance(rotation, CheckpointRotation)
    assert all(torch.equal(a, b) for a, b in zip(trainer.primary.parameters(), weights[2], strict=True))


def test_resuming_a_run_that_stopped_early_does_nothing(tmp_path):
    def make():
        trainer, run = make_small(tmp_path, data=partial(DataLoader, NoisyDataset(36), batch_size=4), run={"max_epochs": 9})
        EarlyStopping("score", patience=2).attach(trainer)

        @trainer.on(Events.EPOCH_COMPLETED)
        def score(engine):
            engine.state.metrics["score"] = 1.0

        return trainer, run

    first, run = make()
    run()
    written = first.handlers["CheckpointRotation"].last.stat().st_mtime_ns
    again, run = make()
    again.handlers["CheckpointRotation"].resume()
    run()
    assert (again.state.epoch, again.state.stop_reason) == (3, first.state.stop_reason)
    assert again.handlers["CheckpointRotation"].last.stat().st_mtime_ns == written


@pytest.mark.parametrize("kernels", [{"fused": True}, {"foreach": True}, {"foreach": False}], ids=str)
def test_optimizer_kernels_are_those_of_the_new_optimizer(tmp_path, kernels):
    def trained(epochs, **chosen):
        model = torch.nn.Linear(6, 3)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, **chosen)
        trainer = create_trainer(model, optimizer, torch.nn.functional.cross_entropy)
        CheckpointRotation(tmp_path).attach(trainer).resume("auto")
        trainer.run([(torch.ones(2, 6), torch.tensor([0, 2]))] * 2, max_epochs=epochs)
        return optimizer

    trained(1)
    again = trained(2, **kernels)
    assert {name: again.param_groups[0][name] for name in kernels} == kernels
    assert next(iter(again.state.values()))["step"] == 4
