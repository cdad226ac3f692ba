"""Losses and gradients that are not finite do not reach the weights."""

import weakref

import pytest
import torch
from ignite.engine import Events
from toys import batches, linear, model_of, same, sgd, trainer_of, weights

from camshaft import GradientClipping, LRHistory, NonFiniteGuard, StepEvents, create_trainer

NAN, INF = float("nan"), float("inf")


def poisoned(number=4, at=2, value=NAN):
    data = batches(number)
    data[at - 1][0][0, 0] = value
    return data


def clean(at=2, number=4):
    """The weights of a run without the bad batch."""
    data = batches(number)
    trainer = trainer_of()
    trainer.run([batch for i, batch in enumerate(data, 1) if i != at])
    return weights(model_of(trainer))


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_skip_omits_the_bad_step_and_continues(value):
    trainer = trainer_of()
    NonFiniteGuard("skip").attach(trainer)
    trainer.run(poisoned(value=value))
    assert (trainer.state.optimizer_step, trainer.state.skipped_steps) == (3, 1)
    assert same(weights(model_of(trainer)), clean())


def test_skip_keeps_momentum_finite():
    model = linear()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    trainer = trainer_of(model, optimizer)
    NonFiniteGuard("skip").attach(trainer)
    trainer.run(poisoned())
    assert all(torch.isfinite(value).all() for state in optimizer.state.values() for value in state.values())


def test_raise_names_the_iteration_and_does_not_change_the_weights():
    trainer = trainer_of()
    NonFiniteGuard().attach(trainer)
    before = []
    trainer.add_event_handler(Events.ITERATION_STARTED(once=2), lambda: before.append(weights(model_of(trainer))))
    with pytest.raises(
        FloatingPointError, match=r"the loss of iteration 2 is nan, at optimizer step 2 of phase 'model'"
    ) as caught:
        trainer.run(poisoned())
    assert caught.value.__notes__ == ["camshaft: in epoch 1, iteration 2"]
    assert same(weights(model_of(trainer)), before[0])


def test_stop_ends_the_run_without_the_step_and_says_why():
    trainer = trainer_of()
    NonFiniteGuard("stop").attach(trainer)
    state = trainer.run(poisoned())
    assert (state.iteration, state.optimizer_step, state.skipped_steps) == (2, 1, 1)
    assert state.stop_reason.startswith("the loss of iteration 2 is nan")


def bad_gradient(trainer, name, at=2):
    parameter = dict(model_of(trainer).named_parameters())[name]

    @trainer.on(StepEvents.BACKWARD_COMPLETED(once=at))
    def spoil():
        parameter.grad.view(-1)[0] = INF


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_gradient_that_is_not_finite_is_named(name):
    trainer = trainer_of()
    NonFiniteGuard().attach(trainer)
    bad_gradient(trainer, name)
    with pytest.raises(FloatingPointError, match=f"the gradient of {name} is not finite in iteration 2"):
        trainer.run(batches(3))


def test_infinities_of_opposite_sign_are_found():
    trainer = trainer_of()
    NonFiniteGuard("skip").attach(trainer)

    @trainer.on(StepEvents.GRADIENTS_READY(once=1))
    def spoil(engine):
        if engine.state.iteration == 1:
            grad = model_of(trainer).weight.grad
            grad[0, 0], grad[0, 1] = INF, -INF

    assert trainer.run(batches(3)).skipped_steps == 1


def test_a_bad_batch_skips_its_window_and_no_other():
    trainer = trainer_of(accumulation_steps=2)
    NonFiniteGuard("skip").attach(trainer)
    trainer.run(poisoned(6, at=3))
    data = batches(6)
    expected = trainer_of(accumulation_steps=2)
    expected.run(data[:2] + data[4:])
    assert same(weights(model_of(trainer)), weights(model_of(expected)))


def test_the_error_names_the_bad_iteration_of_the_window():
    trainer = trainer_of(accumulation_steps=3)
    NonFiniteGuard().attach(trainer)
    with pytest.raises(FloatingPointError, match="the loss of iteration 2 is nan, at optimizer step 1"):
        trainer.run(poisoned(6, at=2))


def test_it_checks_before_clipping_turns_an_infinity_into_zero():
    trainer = trainer_of()
    NonFiniteGuard("skip").attach(trainer)
    GradientClipping(function=lambda parameters: [p.grad.nan_to_num_() for p in parameters]).attach(trainer)
    bad_gradient(trainer, "weight")
    assert trainer.run(batches(3)).skipped_steps == 1


def test_a_skipped_step_advances_no_schedule_or_history():
    trainer = trainer_of()
    history = LRHistory().attach(trainer)
    NonFiniteGuard("skip").attach(trainer)
    trainer.run(poisoned())
    assert [step for step, _ in history.history["lr"]] == [1, 2, 3]


def test_it_ignores_an_overflow_that_the_scaler_handles():
    trainer = trainer_of(amp="fp16")
    NonFiniteGuard().attach(trainer)
    x, y = batches(1)[0]
    assert trainer.run([(x * 1e3, y * 1e3), *batches(2)]).skipped_steps >= 1
    assert all(tensor.isfinite().all() for tensor in weights(model_of(trainer)))


def test_it_checks_the_loss_under_fp16():
    trainer = trainer_of(amp="fp16")
    NonFiniteGuard().attach(trainer)
    with pytest.raises(FloatingPointError, match="the loss of iteration 2 is nan"):
        trainer.run(poisoned())


def test_without_the_guard_nan_reaches_the_weights():
    trainer = trainer_of()
    trainer.run(poisoned())
    assert model_of(trainer).weight.isnan().any()


def test_the_trainer_can_run_again_after_an_error():
    trainer = trainer_of()
    NonFiniteGuard().attach(trainer)
    with pytest.raises(FloatingPointError, match="iteration 1 is nan"):
        trainer.run(poisoned(at=1))
    trainer.run(batches(4))
    assert same(weights(model_of(trainer)), weights(model_of_clean_run()))


def model_of_clean_run():
    trainer = trainer_of()
    trainer.run(batches(4))
    return model_of(trainer)


def test_parameters_without_a_gradient_are_ignored():
    model = torch.nn.ModuleDict({"used": linear(), "unused": linear()})
    trainer = create_trainer(
        model, sgd(model), None, compute_loss=lambda m, batch: torch.nn.functional.mse_loss(m["used"](batch[0]), batch[1])
    )
    NonFiniteGuard().attach(trainer)
    assert trainer.run(batches(3)).optimizer_step == 3


@pytest.mark.parametrize("action", ["ignore", None, 3])
def test_an_unknown_action_is_an_error(action):
    with pytest.raises(ValueError, match="action must be one of 'raise', 'skip', 'stop', got"):
        NonFiniteGuard(action)


def test_a_finite_gradient_whose_sum_overflows_is_accepted():
    trainer = trainer_of()
    NonFiniteGuard("raise").attach(trainer)

    @trainer.on(StepEvents.BACKWARD_COMPLETED)
    def enlarge(engine):
        for parameter in model_of(engine).parameters():
            parameter.grad.fill_(3e38)

    trainer.run(batches(1))
    assert (trainer.state.optimizer_step, trainer.state.skipped_steps) == (1, 0)


@pytest.mark.parametrize(("scale", "skipped"), [(1.0, 0), (NAN, 2)])
def test_sparse_gradients_and_empty_parameters_are_checked(scale, skipped):
    model = torch.nn.Embedding(5, 2, sparse=True)
    model.empty = torch.nn.Parameter(torch.zeros(0))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = create_trainer(model, optimizer, None, compute_loss=lambda m, batch: m(batch).sum() + m.empty.sum())
    NonFiniteGuard("skip").attach(trainer)
    trainer.add_event_handler(StepEvents.BACKWARD_COMPLETED, lambda: model.weight.grad.mul_(scale))
    trainer.run([torch.tensor([0, 3])] * 2)
    assert trainer.state.skipped_steps == skipped


def test_under_fp16_it_finds_a_bad_gradient_that_a_handler_wrote_after_unscaling():
    trainer = trainer_of(amp="fp16")
    trainer.primary.precision.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)  # no overflow to hide it
    NonFiniteGuard("raise").attach(trainer)
    trainer.add_event_handler(StepEvents.GRADIENTS_READY(once=2), lambda e: model_of(e).weight.grad.fill_(NAN))
    with pytest.raises(FloatingPointError, match="the gradient of weight is not finite in iteration 2"):
        trainer.run(batches(3))
    assert all(p.isfinite().all() for p in trainer.primary.parameters())


# -- with clipping ----------------------------------------------------------------------------------------------------


@pytest.fixture
def computed_norms(monkeypatch):
    """The orders of the norms that are computed over all gradients."""
    orders, take = [], torch._foreach_norm
    monkeypatch.setattr(torch, "_foreach_norm", lambda tensors, order: orders.append(order) or take(tensors, order))
    return orders


def clipped(guarded, prepare=lambda trainer: None, model=None, **options):
    """The weights and the norms of a clipped run."""
    trainer, norms = trainer_of(model), []
    GradientClipping(0.5, **options).attach(trainer)
    if guarded:
        NonFiniteGuard().attach(trainer)
    prepare(trainer)
    trainer.add_event_handler(StepEvents.GRADIENTS_CLIPPED, lambda: norms.append(trainer.state.grad_norm))
    trainer.run(batches(4))
    return weights(model_of(trainer)) + norms


@pytest.mark.parametrize("order", [2.0, 1.0, 3.0, INF])
def test_the_norms_are_computed_once_for_both(computed_norms, order):
    expected = clipped(guarded=False, norm_type=order)
    computed_norms.clear()
    assert same(clipped(guarded=True, norm_type=order), expected)
    assert computed_norms == [order] * 4


def test_a_gradient_that_changes_between_them_is_measured_again(computed_norms):
    def halve(trainer):
        between = lambda: [p.grad.mul_(0.5) for p in trainer.primary.parameters()]  # noqa: E731
        trainer.add_event_handler_at(15, StepEvents.GRADIENTS_READY, between)

    assert same(clipped(guarded=True, prepare=halve), clipped(guarded=False, prepare=halve))
    assert computed_norms == [2.0] * (4 + 4 + 4)


def test_each_of_two_clippings_measures_what_it_clips():
    second = lambda trainer: GradientClipping(0.25).attach(trainer, "second")  # noqa: E731
    assert same(clipped(guarded=True, prepare=second), clipped(guarded=False, prepare=second))


def test_gradients_of_several_types_are_summed_as_torch_sums_them():
    def mixed():
        torch.manual_seed(3)
        model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 4).double(), torch.nn.Linear(4, 2))
        model[1].register_forward_pre_hook(lambda module, inputs: (inputs[0].double(),))
        model[2].register_forward_pre_hook(lambda module, inputs: (inputs[0].float(),))
        return model

    assert same(clipped(guarded=True, model=mixed()), clipped(guarded=False, model=mixed()))


@pytest.mark.parametrize("value", [NAN, INF])
def test_the_error_names_the_bad_gradient_although_clipping_spreads_it(value):
    trainer = trainer_of(clip_grad_norm=0.5)
    NonFiniteGuard().attach(trainer)
    bias = model_of(trainer).bias
    trainer.add_event_handler(StepEvents.BACKWARD_COMPLETED(once=2), lambda: bias.grad.view(-1)[:1].fill_(value))
    with pytest.raises(FloatingPointError, match="the gradient of bias is not finite in iteration 2"):
        trainer.run(batches(3))


def test_a_norm_that_overflows_counts_as_not_finite():
    """Clipping by it would make the gradient 0."""
    trainer = trainer_of(clip_grad_norm=0.5)
    NonFiniteGuard("skip").attach(trainer)
    trainer.add_event_handler(StepEvents.BACKWARD_COMPLETED(once=2), lambda: model_of(trainer).weight.grad.fill_(3e38))
    assert trainer.run(batches(3)).skipped_steps == 1


def test_after_the_clipping_is_detached_nothing_overflows():
    trainer = trainer_of()
    clipping = GradientClipping(0.5).attach(trainer)
    NonFiniteGuard("skip").attach(trainer)
    clipping.detach()
    trainer.add_event_handler(StepEvents.BACKWARD_COMPLETED, lambda: model_of(trainer).weight.grad.fill_(3e38))
    assert trainer.run(batches(1)).skipped_steps == 0


def test_no_gradient_is_kept_after_its_step():
    trainer, gradients = trainer_of(clip_grad_norm=0.5), []
    NonFiniteGuard().attach(trainer)
    trainer.add_event_handler(
        StepEvents.OPTIMIZER_STEP_STARTED, lambda: gradients.extend(weakref.ref(p.grad) for p in trainer.primary.parameters())
    )
    trainer.run(batches(3))
    trainer.primary.zero_grad()
    assert [gradient() for gradient in gradients] == [None] * 6
