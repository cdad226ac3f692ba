"""``create_trainer``, compared with a loop written by hand, for a seeded sample of all combinations of options."""

from __future__ import annotations

import random
from dataclasses import asdict, astuple, dataclass, fields
from itertools import combinations, product
from math import ceil

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, TensorDataset

from camshaft import Events, StepEvents, create_trainer

CHOICES = {
    "precision": ("float32", "float64", "bf16", "fp16"),
    "accumulation": (1, 3, 4),
    "batches": (24, 23),  # the last window of 23 batches is shorter
    "data": ("list", "shuffled", "stream"),
    "loss_weight": ("batch", "samples", "tokens"),
    "partial_window": ("step", "drop"),
    "clip": ("none", "norm", "value", "both"),
    "schedule": ("none", "one_cycle", "sequential", "epoch"),
    "optimizer": ("sgd", "nesterov", "adam", "adamw", "fused", "rmsprop", "pair"),
    "dropout": (0.0, 0.3),
    "batch_norm": (False, True),
}
COMBINATIONS = 264
EPOCHS = 2
MAX_NORM, MAX_VALUE = 0.3, 0.05
IGNORED = -100


@dataclass(frozen=True)
class Case:
    precision: str
    accumulation: int
    batches: int
    data: str
    loss_weight: str
    partial_window: str
    clip: str
    schedule: str
    optimizer: str
    dropout: float
    batch_norm: bool

    @property
    def is_possible(self):
        # The length of the last window of a stream is not known in advance. Its gradient is corrected afterwards, when half
        # precision has already rounded it at another scale than in a loop that knows the length.
        return not (self.data == "stream" and self.amp)

    @property
    def is_exact(self):
        return self.loss_weight == "batch" and self.data != "stream"

    @property
    def amp(self):
        return self.precision if self.precision in ("bf16", "fp16") else None

    @property
    def dtype(self):
        return torch.float64 if self.precision == "float64" else torch.float32

    def __str__(self):
        return "-".join(map(str, astuple(self)))


def sample_cases(count, seed):
    """Draws cases one by one, each time the candidate with the most new pairs of options."""
    rng, cases, seen = random.Random(seed), [], set()
    while len(cases) < count:
        drawn = [Case(*(rng.choice(options) for options in CHOICES.values())) for _ in range(8)]
        candidates = [case for case in drawn if case.is_possible and case not in cases]
        if candidates:
            cases.append(max(candidates, key=lambda case: len(pairs(case) - seen)))
            seen |= pairs(cases[-1])
    return cases


def pairs(case):
    return set(combinations(asdict(case).items(), 2))


CASES = sample_cases(COMBINATIONS, seed=2)


class Stream:
    """Batches without a length that can be iterated over repeatedly."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


def build(case):
    """The model, its optimizers, their schedules and the data, from one seed."""
    torch.manual_seed(7)
    first = nn.Linear(6, 8, bias=not case.batch_norm, dtype=case.dtype)
    middle = [nn.BatchNorm1d(8, dtype=case.dtype)] if case.batch_norm else []
    last = nn.Linear(8, 3, dtype=case.dtype)
    model = nn.Sequential(first, *middle, nn.Tanh(), nn.Dropout(case.dropout), last)
    optimizers = build_optimizers(case, model)
    schedulers = [build_schedule(case, optimizer) for optimizer in optimizers if case.schedule != "none"]
    return model, optimizers, schedulers, build_data(case)


def build_optimizers(case, model):
    parameters = list(model.parameters())
    return {
        "sgd": lambda: [torch.optim.SGD(parameters, lr=0.1, momentum=0.9)],
        "nesterov": lambda: [torch.optim.SGD(parameters, lr=0.05, momentum=0.8, nesterov=True, weight_decay=0.01)],
        "adam": lambda: [torch.optim.Adam(parameters, lr=0.01)],
        "adamw": lambda: [torch.optim.AdamW(parameters, lr=0.01, amsgrad=True)],
        "fused": lambda: [torch.optim.AdamW(parameters, lr=0.01, fused=True)],
        "rmsprop": lambda: [torch.optim.RMSprop(parameters, lr=0.005, alpha=0.9, momentum=0.5)],
        "pair": lambda: [
            torch.optim.SGD(parameters[:-2], lr=0.1, momentum=0.9),
            torch.optim.Adam([{"params": parameters[-2:-1], "lr": 0.02}, {"params": parameters[-1:]}], lr=0.01),
        ],
    }[case.optimizer]()


def build_schedule(case, optimizer):
    steps = EPOCHS * ceil(case.batches / case.accumulation)
    if case.schedule == "one_cycle":
        peaks = [2 * group["lr"] for group in optimizer.param_groups]
        return lr_scheduler.OneCycleLR(optimizer, max_lr=peaks, total_steps=steps)
    if case.schedule == "sequential":
        warmup = lr_scheduler.ConstantLR(optimizer, factor=0.25, total_iters=2)
        cosine = lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
        return lr_scheduler.SequentialLR(optimizer, [warmup, cosine], milestones=[2])
    return lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)


def build_data(case):
    """Batches of different sizes, in which some samples have no label."""
    sizes = [2 + (3 * number) % 5 for number in range(case.batches)]
    total = sum(sizes) if case.data != "shuffled" else 4 * case.batches - 1
    x, y = torch.randn(total, 6, dtype=case.dtype), torch.randint(3, (total,))
    if case.data == "shuffled":
        y[:2] = IGNORED  # so that every batch has a label
        return DataLoader(TensorDataset(x, y), batch_size=4, shuffle=True)
    batches = list(zip(x.split(sizes), y.split(sizes), strict=True))
    for _, labels in batches:
        labels[2::3] = IGNORED
    return batches if case.data == "list" else Stream(batches)


def loss_of(y_pred, y):
    return cross_entropy(y_pred, y, ignore_index=IGNORED)


def count_labels(batch):
    return int((batch[1] != IGNORED).sum())


def learning_rates(optimizers):
    return [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]


def train_by_hand(case):
    model, optimizers, schedulers, loader = build(case)
    scaler = torch.amp.GradScaler("cpu", enabled=case.amp == "fp16")
    half = torch.bfloat16 if case.amp == "bf16" else torch.float16
    seen = {"losses": [], "rates": [], "skipped": 0}
    for _epoch in range(EPOCHS):
        for index, (x, y) in enumerate(loader):
            position = index % case.accumulation
            if position == 0:  # a new window
                for optimizer in optimizers:
                    optimizer.zero_grad()
                left, weights = case.batches - index, 0
                length = min(case.accumulation, left) if case.partial_window == "step" else case.accumulation

            with torch.autocast("cpu", dtype=half, enabled=case.amp is not None):
                loss = loss_of(model(x), y)
            if case.loss_weight == "batch":
                scaled_loss = loss / length
            else:
                weight = len(x) if case.loss_weight == "samples" else count_labels((x, y))
                scaled_loss, weights = loss * weight, weights + weight
            scaler.scale(scaled_loss).backward()
            seen["losses"].append(loss.detach())
            if position + 1 < length:
                continue

            for optimizer in optimizers:
                scaler.unscale_(optimizer)
            if case.loss_weight != "batch":
                for parameter in model.parameters():
                    parameter.grad /= weights
            overflow = scaler.is_enabled() and not all(p.grad.isfinite().all() for p in model.parameters())
            if case.clip in ("norm", "both"):
                nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
            if case.clip in ("value", "both"):
                nn.utils.clip_grad_value_(model.parameters(), MAX_VALUE)
            if overflow:
                seen["skipped"] += 1
            else:
                seen["rates"].append(learning_rates(optimizers))
                for optimizer in optimizers:
                    scaler.step(optimizer)
            scaler.update()
            if not overflow and case.schedule in ("one_cycle", "sequential"):
                for scheduler in schedulers:
                    scheduler.step()
        if case.schedule == "epoch":
            for scheduler in schedulers:
                scheduler.step()
    return seen | final_state(model, optimizers, scaler)


def train(case):
    model, optimizers, schedulers, loader = build(case)
    trainer = create_trainer(
        model,
        optimizers if len(optimizers) > 1 else optimizers[0],
        loss_of,
        amp=case.amp,
        accumulation_steps=case.accumulation,
        loss_weight=count_labels if case.loss_weight == "tokens" else case.loss_weight,
        partial_window=case.partial_window,
        clip_grad_norm=MAX_NORM if case.clip in ("norm", "both") else None,
        clip_grad_value=MAX_VALUE if case.clip in ("value", "both") else None,
        scheduler=schedulers or None,
        schedule_every="epoch" if case.schedule == "epoch" else "step",
    )
    seen = {"losses": [], "rates": []}
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: seen["losses"].append(trainer.state.output))

    @trainer.on(StepEvents.OPTIMIZER_STEP_STARTED)
    def record_rates():
        seen["rates"].append(learning_rates(optimizers))

    state = trainer.run(loader, max_epochs=EPOCHS)
    assert state.optimizer_step == len(seen["rates"])
    return seen | {"skipped": state.skipped_steps} | final_state(model, optimizers, trainer.phases["model"].precision.scaler)


def final_state(model, optimizers, scaler):
    return {
        "model": dict(model.state_dict()),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "scaler": scaler.state_dict() if scaler is not None else {},
        "rng": torch.get_rng_state(),
    }


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_trainer_equals_a_loop_written_by_hand(case):
    tolerance = 0.0 if case.is_exact else {torch.float32: 1e-6, torch.float64: 1e-12}[case.dtype]
    expected = train_by_hand(case)
    assert expected["rates"], "the loop made no steps"
    torch.testing.assert_close(train(case), expected, rtol=tolerance, atol=tolerance)


def test_the_sample_contains_every_pair_of_choices():
    choices = [[(name, option) for option in options] for name, options in CHOICES.items()]
    every = {pair for one, other in combinations(choices, 2) for pair in product(one, other)}
    impossible = {(("precision", amp), ("data", "stream")) for amp in ("bf16", "fp16")}
    assert [field.name for field in fields(Case)] == list(CHOICES)
    assert {pair for case in CASES for pair in pairs(case)} == every - impossible
    assert len(set(CASES)) == COMBINATIONS >= 200


def test_the_sample_contains_skipped_steps_and_exact_cases():
    assert sum(case.is_exact for case in CASES) >= 50
    assert any(train_by_hand(case)["skipped"] for case in CASES if case.precision == "fp16")
