"""Training on a GPU: synchronization, numbers, CUDA graphs, resuming and memory."""

import itertools
import warnings
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from camshaft import (
    R1,
    CheckpointRotation,
    Events,
    ExponentialMovingAverage,
    GradientClipping,
    GradientPenalty,
    LRHistory,
    NonFiniteGuard,
    Prefetch,
    Progress,
    StepEvents,
    TensorBoard,
    create_evaluator,
    create_gan_trainer,
    create_trainer,
    seed_everything,
)
from camshaft.testing import assert_resumes_exactly

DEVICE = torch.device("cuda")
PRECISIONS = {None: None, "bf16": torch.bfloat16, "fp16": torch.float16}

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
    pytest.mark.usefixtures("_deterministic"),
    # torch says so once per process, when check_synchronization turns this mode on
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature:UserWarning"),
]


@pytest.fixture
def _deterministic(monkeypatch):
    """Deterministic algorithms, so that results can be compared bit for bit."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.cuda.set_sync_debug_mode("default")


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 4)).to(DEVICE)


def samples(number=96):
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(number, 16, generator=generator), torch.randint(4, (number,), generator=generator))


def loader_of(**options):
    return DataLoader(samples(), batch_size=8, pin_memory=True, **options)


def on_device(number=12, size=8):
    generator = torch.Generator().manual_seed(1)
    draw = lambda: (torch.randn(size, 16, generator=generator), torch.randint(4, (size,), generator=generator))  # noqa: E731
    return [(x.to(DEVICE), y.to(DEVICE)) for x, y in (draw() for _ in range(number))]


def weights(module):
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def differing(left, right):
    return {name for name in left if not torch.equal(left[name], right[name])}


def check_synchronization(trainer, mode="error"):
    """Makes each synchronization inside the iterations of an epoch an error or a warning."""
    trainer.add_event_handler_at(10_000, Events.EPOCH_STARTED, lambda: torch.cuda.set_sync_debug_mode(mode))
    trainer.add_event_handler_at(-10_000, Events.EPOCH_COMPLETED, lambda: torch.cuda.set_sync_debug_mode("default"))


def full_trainer(folder, amp=None, optimizer=None, **options):
    """A trainer with most handlers attached."""
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True, **optimizer or {})
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=100)
    trainer = create_trainer(
        model, optimizer, nn.functional.cross_entropy, amp=amp, accumulation_steps=2, clip_grad_norm=1.0, scheduler=scheduler,
        **options,
    )  # fmt: skip
    for handler in (
        LRHistory(),
        ExponentialMovingAverage(0.99),
        Progress(every_seconds=0),
        TensorBoard(folder / "runs", every=2),
    ):
        handler.attach(trainer)
    CheckpointRotation(folder / "checkpoints").attach(trainer)
    return trainer


# -- synchronization --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("amp", [None, "bf16"])
@pytest.mark.parametrize("prefetched", [False, True], ids=["loader", "prefetched"])
def test_an_epoch_does_not_synchronize(tmp_path, amp, prefetched):
    trainer = full_trainer(tmp_path, amp)
    check_synchronization(trainer)
    trainer.run(Prefetch(loader_of(), DEVICE) if prefetched else loader_of(), max_epochs=2)
    assert trainer.state.optimizer_step == 12


@pytest.mark.parametrize("guard", [False, True])
def test_the_scaler_and_the_guard_synchronize_once_per_step(tmp_path, guard):
    trainer = full_trainer(tmp_path, "fp16")
    if guard:
        NonFiniteGuard("skip").attach(trainer)
    check_synchronization(trainer, "warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.run(loader_of())
    syncs = [warning for warning in caught if "called a synchronizing CUDA operation" in str(warning.message)]
    assert len(syncs) == trainer.state.optimizer_step + trainer.state.skipped_steps


@pytest.mark.parametrize("penalty", [None, GradientPenalty(), R1()], ids=["none", "wgan-gp", "r1"])
def test_a_gan_does_not_synchronize(penalty):
    torch.manual_seed(0)
    generator, critic = nn.Linear(4, 16).to(DEVICE), nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 1)).to(DEVICE)
    optimizers = [torch.optim.Adam(module.parameters(), fused=True) for module in (generator, critic)]
    trainer = create_gan_trainer(generator, critic, *optimizers, latent=4, penalty=penalty, discriminator_steps=2)
    GradientClipping(1.0, phase="generator").attach(trainer)
    check_synchronization(trainer)
    trainer.run([x for x, _ in on_device()])
    assert trainer.phases["generator"].optimizer_step == 6


# -- numbers ----------------------------------------------------------------------------------------------------------


def train_by_hand(dtype, batches, epochs=2, window=2):
    """A loop written by hand. Returns the weights."""
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cuda", enabled=dtype is torch.float16)
    for _ in range(epochs):
        for number, (x, y) in enumerate(batches, start=1):
            with torch.autocast("cuda", dtype=dtype, enabled=dtype is not None):
                loss = nn.functional.cross_entropy(model(x), y)
            scaler.scale(loss / window).backward()
            if number % window == 0:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
    return weights(model)


@pytest.mark.parametrize("amp", PRECISIONS)
def test_the_trainer_equals_a_loop_written_by_hand(amp):
    expected = train_by_hand(PRECISIONS[amp], on_device())
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    trainer = create_trainer(model, optimizer, nn.functional.cross_entropy, amp=amp, accumulation_steps=2, clip_grad_norm=1.0)
    trainer.run(on_device(), max_epochs=2)
    assert differing(expected, weights(model)) == set()


def train(prepare=lambda module: module, data=None, **options):
    model = prepare(network())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, **options)
    create_trainer(model, optimizer, nn.functional.cross_entropy).run(data or on_device(), max_epochs=2)
    return weights(getattr(model, "_orig_mod", model))


def test_prefetch_does_not_change_the_batches():
    moved = [(x.to(DEVICE), y.to(DEVICE)) for x, y in loader_of()]
    assert differing(train(data=moved), train(data=Prefetch(loader_of(), DEVICE))) == set()
    assert differing(train(data=moved), train(data=Prefetch(loader_of(num_workers=2), DEVICE))) == set()


@pytest.mark.parametrize("kernels", ["fused", "foreach"])
def test_other_optimizer_kernels_give_the_same_weights_up_to_rounding(kernels):
    expected, found = train(), train(**{kernels: True})
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning")  # a hint of torch.compile: TF32 is faster
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty:UserWarning")  # torch.compile warms its graph pool up with one
def test_a_compiled_model_trains():
    torch.use_deterministic_algorithms(False)
    prepared = partial(torch.compile, mode="reduce-overhead")
    found = train(lambda module: prepared(nn.Sequential(*[layer for layer in module if not isinstance(layer, nn.Dropout)])))
    assert all(value.isfinite().all() for value in found.values())


def test_channels_last_is_kept():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4)).to(DEVICE)
    model = model.to(memory_format=torch.channels_last)
    trainer = create_trainer(model, torch.optim.AdamW(model.parameters(), fused=True), nn.functional.cross_entropy, amp="bf16")
    x = torch.randn(8, 3, 8, 8, device=DEVICE).to(memory_format=torch.channels_last)
    trainer.run([(x, torch.randint(4, (8,), device=DEVICE))] * 4)
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)


# -- graphs -----------------------------------------------------------------------------------------------------------


def train_and_record(capture, batches, *, optimizer_class=torch.optim.AdamW, amp=None, epochs=3, **options):
    """Trains with a learning rate that is exact in every floating-point type. Returns all results and the trainer."""
    model, seen = network(), []
    kernels = {"fused": True} if optimizer_class is torch.optim.SGD else {"capturable": True}
    optimizer = optimizer_class(model.parameters(), lr=2.0**-7, **kernels)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5) if optimizer_class is not torch.optim.RMSprop else None
    trainer = create_trainer(
        model, optimizer, nn.functional.cross_entropy, amp=amp, capture=capture, clip_grad_norm=1.0, scheduler=scheduler,
        schedule_every="epoch", **options,
    )  # fmt: skip
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: seen.append((trainer.state.loss, trainer.state.y_pred)))
    torch.manual_seed(5)
    trainer.run(batches, max_epochs=epochs)
    found = weights(model) | {f"loss {n}": loss for n, (loss, _) in enumerate(seen)}
    return found | {f"y_pred {n}": y_pred for n, (_, y_pred) in enumerate(seen)}, trainer


@pytest.mark.parametrize("amp", PRECISIONS)
@pytest.mark.parametrize("window", [1, 2, 5])
def test_a_captured_step_is_bit_identical(amp, window):
    (expected, _), (found, trainer) = (
        train_and_record(c, on_device(), amp=amp, accumulation_steps=window) for c in (False, True)
    )
    assert differing(expected, found) == set()
    assert trainer.primary.execution._guards, "nothing was captured"


@pytest.mark.parametrize("optimizer_class", [torch.optim.SGD, torch.optim.Adam, torch.optim.RMSprop])
def test_a_captured_step_of_other_optimizers_is_bit_identical(optimizer_class):
    (expected, _), (found, _) = (train_and_record(c, on_device(), optimizer_class=optimizer_class) for c in (False, True))
    assert differing(expected, found) == set()


def test_a_captured_step_does_not_synchronize(tmp_path):
    trainer = full_trainer(tmp_path, "bf16", optimizer={"capturable": True}, capture=True)
    check_synchronization(trainer)
    trainer.run(Prefetch(loader_of(num_workers=2), DEVICE), max_epochs=4)
    assert trainer.state.optimizer_step == 24


def test_a_loss_that_synchronizes_cannot_be_captured_and_the_device_still_works():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    synchronizing_loss = lambda y_pred, y: nn.functional.cross_entropy(y_pred, y) * y_pred.max().item()  # noqa: E731
    trainer = create_trainer(model, optimizer, synchronizing_loss, capture=True)
    stream = torch.cuda.current_stream()
    with pytest.raises(RuntimeError, match="can't be captured as a CUDA graph"):
        trainer.run(on_device())
    assert torch.cuda.current_stream() == stream
    assert float(torch.ones(3, device=DEVICE).sum()) == 3


def test_device_memory_does_not_grow_with_graphs():
    allocated = []
    model = network()
    trainer = create_trainer(
        model, torch.optim.AdamW(model.parameters(), capturable=True), nn.functional.cross_entropy, capture=True
    )
    record = lambda: allocated.append(torch.cuda.memory_allocated())  # noqa: E731
    trainer.add_event_handler(Events.ITERATION_COMPLETED(every=1000), record)
    trainer.run(itertools.chain.from_iterable(itertools.repeat(on_device())), max_iters=5_000)
    assert len(set(allocated)) == 1, allocated


# -- resume -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("amp", PRECISIONS)
@pytest.mark.parametrize("prefetched", [False, True], ids=["loader", "prefetched"])
@pytest.mark.parametrize("capture", [False, True], ids=["eager", "captured"])
def test_a_resumed_run_is_bit_identical(amp, prefetched, capture):
    def make_run(folder):
        seed_everything(0)
        trainer = full_trainer(folder, amp, optimizer={"capturable": capture}, capture=capture)
        loader = loader_of(shuffle=True)
        return trainer, lambda: trainer.run(Prefetch(loader, DEVICE) if prefetched else loader, max_epochs=2)

    assert_resumes_exactly(make_run, stops=[1, 6, 12, 13])


def test_an_evaluator_preserves_the_random_state_of_the_device():
    evaluator = create_evaluator(network())
    before = torch.cuda.get_rng_state()
    evaluator.run(on_device())
    assert torch.equal(torch.cuda.get_rng_state(), before)


# -- memory -----------------------------------------------------------------------------------------------------------


def test_device_memory_does_not_grow(tmp_path):
    trainer, allocated = full_trainer(tmp_path), []
    record = lambda: allocated.append(torch.cuda.memory_allocated())  # noqa: E731
    trainer.add_event_handler(Events.ITERATION_COMPLETED(every=1000), record)
    batches = on_device()
    trainer.run(itertools.chain.from_iterable(itertools.repeat(batches)), max_iters=10_000)
    assert max(allocated[5:]) <= max(allocated[:5]), allocated  # it may vary with the points that wait for TensorBoard


def test_no_autograd_graph_is_kept_between_iterations(tmp_path):
    trainer, allocated = full_trainer(tmp_path), []
    batches = on_device(size=4096)  # each tensor of their graphs is much larger than what may vary: gradients and points

    @trainer.on(StepEvents.FORWARD_STARTED)
    def record(engine):
        allocated.append(torch.cuda.memory_allocated())

    trainer.run(batches)
    smallest = trainer.state.y_pred.nbytes
    assert max(allocated[4:]) - min(allocated[4:]) < smallest, allocated  # eight batches would have left eight of them
