"""`Prefetch` in a run that is stopped and resumed."""

import random
from functools import partial

import numpy as np
import pytest
import torch
from runs import NoisyDataset, make_small
from torch.utils.data import DataLoader, IterableDataset, RandomSampler

from camshaft import CheckpointRotation, Prefetch, SeededDataset, StepEvents, create_trainer, seed_everything
from camshaft.testing import assert_resumes_exactly

pytestmark = pytest.mark.usefixtures("collected")


def loader_of(workers=0, *, seeded=False, generator=None, ahead=True, **options):
    dataset = SeededDataset(NoisyDataset(38), seed=5) if seeded else NoisyDataset(38)
    own = None if generator is None else torch.Generator().manual_seed(generator)
    loader = DataLoader(dataset, batch_size=4, shuffle=True, num_workers=workers, generator=own, **options)
    return Prefetch(loader, "cpu") if ahead else loader


def test_prefetch_with_augmentation_from_global_generators():
    assert_resumes_exactly(partial(make_small, data=loader_of))


@pytest.mark.parametrize("generator", [None, 3])
def test_prefetch_after_an_exception_in_each_iteration(generator):
    rotation = {"every": StepEvents.OPTIMIZER_STEP_COMPLETED}
    make = partial(make_small, data=partial(loader_of, generator=generator), rotation=rotation, accumulation_steps=3)
    assert_resumes_exactly(make, by="exception")


@pytest.mark.parametrize(("before", "after", "persistent"), [(2, 2, False), (0, 2, False), (2, 0, False), (2, 2, True)])
def test_prefetch_with_workers(before, after, persistent):
    def data(workers):
        return loader_of(workers, seeded=True, persistent_workers=persistent)

    make, resumed = (partial(make_small, data=partial(data, workers)) for workers in (before, after))
    assert_resumes_exactly(make, stops=[10] if persistent else [1, 10, 11], make_resumed=resumed)


class Stream(IterableDataset):
    """Samples of an unknown number."""

    def __iter__(self):
        generator = torch.Generator().manual_seed(0)
        for _ in range(22):
            yield torch.randn(6, generator=generator), torch.randint(3, (), generator=generator)


@pytest.mark.filterwarnings("ignore:.*can't start in the middle of a pass")
def test_prefetch_of_data_of_unknown_length():
    make = partial(make_small, data=lambda: Prefetch(DataLoader(Stream(), batch_size=4), "cpu"), accumulation_steps=4)
    assert_resumes_exactly(make)


def test_prefetch_of_a_list():
    batches = [(torch.randn(4, 6), torch.randint(3, (4,))) for _ in range(5)]
    assert_resumes_exactly(partial(make_small, data=lambda: Prefetch(batches, "cpu")))


def test_prefetch_of_epochs_shorter_and_longer_than_the_data():
    for length in (4, 13):
        run = {"epoch_length": length, "max_epochs": 3}
        assert_resumes_exactly(partial(make_small, data=loader_of, run=run))


def test_prefetch_with_a_sampler_that_draws_in_batches():
    def data():
        noisy = NoisyDataset(36)
        own = torch.Generator().manual_seed(1)
        sampler = RandomSampler(noisy, replacement=True, num_samples=24, generator=own)
        return Prefetch(DataLoader(noisy, batch_size=4, sampler=sampler), "cpu")

    assert_resumes_exactly(partial(make_small, data=data, run={"max_epochs": 3}))


@pytest.mark.filterwarnings("ignore:.set_vital. is deprecated")
@pytest.mark.parametrize("workers", [0, 2])
def test_prefetch_of_a_stateful_loader(workers):
    stateful = pytest.importorskip("torchdata.stateful_dataloader")
    loader = partial(
        stateful.StatefulDataLoader, NoisyDataset(36, noise=False), batch_size=4, shuffle=True, num_workers=workers
    )
    assert_resumes_exactly(
        partial(make_small, data=lambda: Prefetch(loader(), "cpu")), stops=[5] if workers else [1, 5, 8, 9, 10, 17]
    )


@pytest.mark.parametrize(("before", "after"), [(False, True), (True, False)])
def test_prefetch_can_be_added_or_removed_if_loading_draws_no_numbers(before, after):
    def data(ahead):
        return loader_of(seeded=True, ahead=ahead)

    make, resumed = (partial(make_small, data=partial(data, ahead)) for ahead in (before, after))
    assert_resumes_exactly(make, stops=[1, 5, 9, 10, 11], make_resumed=resumed)


def test_prefetch_does_not_change_the_weights():
    def weights(ahead):
        seed_everything(4)
        model = torch.nn.Linear(6, 3)
        trainer = create_trainer(model, torch.optim.SGD(model.parameters(), 0.1), torch.nn.functional.cross_entropy)
        trainer.run(loader_of(seeded=True, ahead=ahead), max_epochs=3)
        return model.state_dict()

    with_it, without = weights(ahead=True), weights(ahead=False)
    assert all(torch.equal(with_it[name], without[name]) for name in without)


def test_the_saved_random_state_is_that_before_the_prefetched_batch(tmp_path):
    drawn = []

    class Drawing(NoisyDataset):
        def __getitem__(self, index):
            drawn.append((random.random(), float(np.random.rand()), float(torch.rand(()))))
            return super().__getitem__(index)

    def run(resume):
        seed_everything(1)
        model = torch.nn.Linear(6, 3)
        trainer = create_trainer(model, torch.optim.SGD(model.parameters(), 0.1), torch.nn.functional.cross_entropy)
        checkpoints = CheckpointRotation(tmp_path).attach(trainer)
        if resume:
            checkpoints.resume("auto")
        else:
            trainer.add_event_handler(StepEvents.OPTIMIZER_STEP_COMPLETED(once=3), trainer.terminate)
        trainer.run(Prefetch(DataLoader(Drawing(24), batch_size=4, shuffle=True), "cpu"))

    run(resume=False)
    ahead = drawn[12:16]  # the fourth batch, which was fetched but not trained on
    drawn.clear()
    run(resume=True)
    assert drawn[:4] == ahead
