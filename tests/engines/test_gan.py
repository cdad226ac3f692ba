"""The GAN engine: losses, turns, clocks, conditions, precision, and what is said of bad input."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.nn.functional import relu, softplus

from camshaft import (
    R1,
    R2,
    Events,
    FreezeParameters,
    GradientPenalty,
    NonFiniteGuard,
    StepEvents,
    TensorBoard,
    create_gan_trainer,
)

SAMPLES = 8


def make(generator=None, critic=None, **settings):
    generator = nn.Linear(3, 2) if generator is None else generator
    critic = nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 1)) if critic is None else critic
    optimizers = [torch.optim.SGD(network.parameters(), lr=0.05) for network in (generator, critic)]
    settings.setdefault("latent", 3)
    return create_gan_trainer(generator, critic, *optimizers, **settings)


def data(batches=6, *shape):
    return [torch.randn(SAMPLES, *(shape or (2,))) for _ in range(batches)]


def module(trainer, phase):
    return trainer.phases[phase].module


# -- losses and output ------------------------------------------------------------------------------------------------

FORMULAS = {
    "wgan": (lambda r, f: f.mean() - r.mean(), lambda f: -f.mean()),
    "hinge": (lambda r, f: relu(1 - r).mean() + relu(1 + f).mean(), lambda f: -f.mean()),
    "non_saturating": (lambda r, f: softplus(-r).mean() + softplus(f).mean(), lambda f: softplus(-f).mean()),
    "least_squares": (
        lambda r, f: ((r - 1) ** 2).mean() / 2 + (f**2).mean() / 2,
        lambda f: ((f - 1) ** 2).mean() / 2,
    ),
}


@pytest.mark.parametrize("loss", FORMULAS)
def test_losses_are_their_formulas(loss):
    latents, batches = torch.randn(SAMPLES, 3), data(1)
    trainer = make(loss=loss, latent=lambda n, device: latents)
    generator, critic = module(trainer, "generator"), module(trainer, "discriminator")
    trainer.phases["discriminator"].optimizers[0].param_groups[0]["lr"] = 0.0  # the generator meets the same critic
    with torch.no_grad():
        real, fake = critic(batches[0]), critic(generator(latents))
    output = trainer.run(batches).output
    torch.testing.assert_close(output["discriminator_loss"], FORMULAS[loss][0](real, fake))
    torch.testing.assert_close(output["generator_loss"], FORMULAS[loss][1](fake))


def test_a_pair_of_callables_gets_the_scores():
    pair = FORMULAS["hinge"]
    torch.manual_seed(1)
    expected = make(loss="hinge").run(data(2)).output
    torch.manual_seed(1)
    assert make(loss=pair).run(data(2)).output == expected


def test_output_is_detached_and_complete():
    trainer = make(discriminator_steps=2)
    outputs = []
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: outputs.append(engine.state.output))
    trainer.run(data(3))
    assert [list(output) for output in outputs] == [["discriminator_loss", "penalty", "generator_loss"]] * 3
    assert [output["generator_loss"] is None for output in outputs] == [True, False, False]
    assert outputs[1]["generator_loss"] is outputs[2]["generator_loss"]
    assert not any(value.requires_grad for output in outputs for value in output.values() if value is not None)
    assert all(output["penalty"] == 0 for output in outputs)


def test_a_second_run_has_no_generator_loss_before_its_first():
    trainer = make(discriminator_steps=2)
    trainer.run(data(2))
    trainer.state.iteration = trainer.state.epoch = 0
    trainer.state.max_epochs = None
    assert trainer.run(data(1)).output["generator_loss"] is None


def test_several_penalties_are_summed_and_lazy_ones_are_due_at_every_kth_step():
    critic = nn.Linear(2, 1)
    critic.weight.data = torch.tensor([[3.0, 4.0]])
    trainer = make(critic=critic, penalty=[R1(2.0, every=3), R2(4.0, every=2)])
    trainer.phases["discriminator"].optimizers[0].param_groups[0]["lr"] = 0.0
    penalties = []
    trainer.add_event_handler(
        Events.ITERATION_COMPLETED, lambda engine: penalties.append(engine.state.output["penalty"].item())
    )
    trainer.run(data(6))
    r1, r2 = 3 * 2 / 2 * 25, 2 * 4 / 2 * 25
    assert penalties == pytest.approx([0, r2, r1, r2, 0, r1 + r2])


def test_a_lazy_penalty_is_due_in_all_batches_of_its_window():
    trainer = make(penalty=R1(every=2), accumulation_steps=2)
    due = []
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: due.append(engine.state.output["penalty"].item() > 0))
    trainer.run(data(6))
    assert due == [False, False, True, True, False, False]


def test_a_function_will_do_for_a_penalty():
    trainer = make(penalty=lambda critic, real, fake: critic[0].weight.square().sum())
    weight = module(trainer, "discriminator")[0].weight
    expected = weight.square().sum().item()
    assert trainer.run(data(1)).output["penalty"].item() == pytest.approx(expected)


# -- turns ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 3])
def test_clocks_of_both_networks(k):
    trainer = make(discriminator_steps=k)
    seen = []
    trainer.add_event_handler(
        StepEvents.OPTIMIZER_STEP_COMPLETED, lambda engine: seen.append((engine.state.phase, engine.state.optimizer_step))
    )
    trainer.run(data(4), max_epochs=2)
    expected = []
    for step in range(1, 9):
        expected.append(("discriminator", step))
        expected += [("generator", step // k)] if step % k == 0 else []
    assert seen == expected
    assert trainer.state.optimizer_step == trainer.phases["generator"].optimizer_step == 8 // k


def test_events_by_phase_count_on_the_network_s_own_clock():
    trainer = make(discriminator_steps=3, accumulation_steps=2)
    seen = []
    for phase in ("discriminator", "generator"):
        for event in (StepEvents.FORWARD_STARTED, StepEvents.GRADIENTS_READY):
            trainer.add_event_handler(
                event(phase=phase, every=2), lambda e, n: seen.append((e.state.iteration, *n)), (phase, event.name)
            )
    trainer.run(data(12))
    passes = [(i, "discriminator", "FORWARD_STARTED") for i in range(2, 13, 2)]
    passes += [(i, "generator", "FORWARD_STARTED") for i in (6, 12)]
    steps = [(i, "discriminator", "GRADIENTS_READY") for i in (4, 8, 12)] + [(12, "generator", "GRADIENTS_READY")]
    assert sorted(seen) == sorted(passes + steps)


def test_no_gradient_is_made_for_the_other_network():
    trainer = make(penalty=GradientPenalty())
    networks = {name: phase.module for name, phase in trainer.phases.items()}

    @trainer.on(StepEvents.FORWARD_STARTED)
    def forget(engine):
        for network in networks.values():
            network.zero_grad()

    @trainer.on(StepEvents.GRADIENTS_READY)
    def look(engine):
        for name, network in networks.items():
            made = [p.grad is not None for p in network.parameters()]
            assert all(made) if name == engine.state.phase else not any(made)

    trainer.run(data(3))


def test_requires_grad_is_as_before_where_a_turn_fails():
    critic = nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 1))
    critic[0].bias.requires_grad_(False)
    trainer = make(critic=critic)

    @trainer.on(StepEvents.FORWARD_COMPLETED(phase="generator"))
    def fail(engine):
        assert not any(p.requires_grad for p in critic.parameters())
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="the disk is full"):
        trainer.run(data(1))
    assert [p.requires_grad for p in critic.parameters()] == [True, False, True, True]


def test_a_trainer_runs_again_after_an_exception_in_the_middle_of_a_cycle():
    trainer = make(discriminator_steps=2, accumulation_steps=2)
    failures = [OSError("once")]

    @trainer.on(StepEvents.BACKWARD_COMPLETED(phase="generator"))
    def fail(engine):
        if failures:
            raise failures.pop()

    with pytest.raises(OSError, match="once"):
        trainer.run(data(4))
    before = trainer.phases["generator"].optimizer_step
    trainer.run(data(4), max_epochs=trainer.state.epoch + 1)
    assert trainer.phases["generator"].optimizer_step > before


def test_both_networks_train_even_where_a_handler_leaves_one_in_eval_mode():
    generator = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    trainer = make(generator, discriminator_steps=2)
    modes = []
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: generator.eval())
    trainer.add_event_handler(StepEvents.FORWARD_COMPLETED, lambda: modes.append(generator.training))
    trainer.run(data(4))
    assert modes == [True] * 6
    assert generator[1].num_batches_tracked == 6


def test_real_and_generated_batch_are_in_the_state_at_each_event():
    trainer, batches = make(), data(1)
    seen = {}

    @trainer.on(StepEvents.BACKWARD_COMPLETED)
    def look(engine):
        seen[engine.state.phase] = engine.state.x, engine.state.y_pred

    trainer.run(batches)
    for real, fake in seen.values():
        assert real is batches[0]
        assert fake.shape == real.shape
        assert not fake.requires_grad
    assert not torch.equal(seen["discriminator"][1], seen["generator"][1])


def test_a_handler_may_change_the_loss_of_one_network():
    trainer = make(discriminator_steps=2)
    before = module(trainer, "generator").weight.clone()

    @trainer.on(StepEvents.FORWARD_COMPLETED(phase="generator"))
    def silence(engine):
        engine.state.loss = engine.state.loss * 0

    trainer.run(data(4))
    assert torch.equal(module(trainer, "generator").weight, before)


def test_partial_windows_are_closed_and_followed():
    trainer = make(accumulation_steps=4, discriminator_steps=2)
    trainer.run(data(6), max_epochs=2)
    assert trainer.phases["discriminator"].optimizer_step == 4
    assert trainer.phases["generator"].optimizer_step == 2
    assert trainer.phases["generator"].forward_passes == 8


def test_data_of_unknown_length_closes_its_window():
    class Stream:
        def __iter__(self):
            return iter([torch.ones(SAMPLES, 2)] * 5)

    trainer = make(accumulation_steps=2)
    trainer.run(Stream())
    assert [phase.optimizer_step for phase in trainer.phases.values()] == [3, 3]


def test_frozen_critic_stays_frozen_by_the_handler():
    trainer = make()
    FreezeParameters("0.*", phase="discriminator").attach(trainer)
    before = module(trainer, "discriminator")[0].weight.clone()
    trainer.run(data(3))
    assert torch.equal(module(trainer, "discriminator")[0].weight, before)
    assert not module(trainer, "discriminator")[0].weight.requires_grad


# -- batches and conditions -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: [x], lambda x: (x,), lambda x: (x, torch.zeros(len(x)))])
def test_batches_may_be_x_or_a_sequence_that_begins_with_it(wrap):
    trainer, batches = make(), data(2)
    trainer.run([wrap(x) for x in batches])
    assert trainer.state.x is batches[-1]


def test_prepare_batch_may_give_x_alone():
    trainer = make(prepare_batch=lambda batch, device, non_blocking: batch["image"].to(device))
    assert trainer.run([{"image": x} for x in data(2)]).optimizer_step == 2


class Conditional(nn.Module):
    def __init__(self, size, out):
        super().__init__()
        self.embed, self.last, self.seen = nn.Embedding(4, 3), nn.Linear(size + 3, out), []

    def forward(self, x, y):
        self.seen.append(y)
        return self.last(torch.cat([x, self.embed(y)], dim=1))


def test_conditions_go_to_both_networks_and_to_the_penalty():
    generator, critic = Conditional(3, 2), Conditional(2, 1)
    labels = torch.randint(4, (SAMPLES,))
    make(generator, critic, conditional=True, penalty=GradientPenalty()).run([(data(1)[0], labels)])
    assert len(generator.seen) == 2
    assert len(critic.seen) == 4
    assert all(torch.equal(y, labels) for y in generator.seen + critic.seen)
    assert critic.embed.weight.grad is not None


def test_latents_of_a_size_are_normal_and_of_the_generator_s_precision():
    seen = []
    generator = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).double()
    generator.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    make(generator, nn.Linear(2, 1).double(), latent=(2, 2)).run([torch.randn(SAMPLES, 2, dtype=torch.float64)])
    assert seen[0].shape == (SAMPLES, 2, 2)
    assert seen[0].dtype == torch.float64
    assert len(seen) == 2
    assert not torch.equal(*seen)


def test_one_sample_left_over_in_the_last_batch():
    trainer = make(nn.Linear(3, 2), nn.Linear(2, 1), penalty=GradientPenalty())
    assert trainer.run([torch.randn(4, 2), torch.randn(1, 2)]).optimizer_step == 2


@pytest.mark.parametrize("shape", [(), (3, 4), (1, 4, 4), (1, 2, 2, 2)], ids=str)
def test_samples_of_any_rank(shape):
    size = torch.Size(shape).numel()
    generator = nn.Sequential(nn.Linear(3, size), nn.Unflatten(1, shape) if shape else nn.Flatten(0))
    critic = (
        nn.Sequential(nn.Flatten(), nn.Linear(size, 1)) if shape else nn.Sequential(nn.Unflatten(0, (-1, 1)), nn.Linear(1, 1))
    )
    trainer = make(generator, critic, penalty=[GradientPenalty(), R1()])
    assert trainer.run([torch.randn(SAMPLES, *shape)] * 2).optimizer_step == 2


# -- precision --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_penalty_is_that_of_full_precision_under_amp(amp):
    (real,) = batches = data(1)
    critic = nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 1))
    expected = R1()(critic, real, real).item()
    trainer = make(critic=critic, penalty=R1(), amp=amp)
    output = trainer.run(batches).output
    assert output["penalty"].item() == pytest.approx(expected, rel=1e-6)
    assert output["penalty"].dtype == output["discriminator_loss"].dtype == torch.float32


def test_fp16_has_a_scaler_for_each_network():
    trainer = make(amp="fp16", penalty=GradientPenalty())
    scalers = [phase.precision.scaler for phase in trainer.phases.values()]
    assert None not in scalers
    assert scalers[0] is not scalers[1]
    trainer.run(data(12))
    assert all(phase.optimizer_step > 6 for phase in trainer.phases.values())
    assert trainer.primary.optimizer_step + trainer.primary.skipped_steps == 12


def test_a_step_that_the_scaler_skips_gives_the_generator_no_turn():
    trainer = make(amp="fp16")
    for phase in trainer.phases.values():
        phase.precision.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)

    @trainer.on(StepEvents.FORWARD_COMPLETED(phase="discriminator", once=2))
    def overflow(engine):
        engine.state.loss = engine.state.loss * float("inf")

    trainer.run(data(4))
    assert [phase.optimizer_step for phase in trainer.phases.values()] == [3, 3]
    assert [phase.skipped_steps for phase in trainer.phases.values()] == [1, 0]


# -- handlers ---------------------------------------------------------------------------------------------------------


def test_curves_in_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = make(discriminator_steps=2, penalty=GradientPenalty(), clip_grad_norm=1.0)
    TensorBoard(tmp_path, every=1).attach(trainer)
    trainer.run(data(6))
    curves = EventAccumulator(str(tmp_path)).Reload()
    names = {"discriminator_loss", "penalty", "generator_loss", "grad_norm", "discriminator/lr", "generator/lr"}
    assert {f"train/{name}" for name in names} <= set(curves.Tags()["scalars"])
    assert [point.step for point in curves.Scalars("train/generator_loss")] == [1, 2, 3]


def test_explain_names_both_networks():
    text = make(discriminator_steps=5, penalty=GradientPenalty()).explain()
    assert "discriminator: Sequential" in text
    assert "generator: Linear on cpu, SGD, after every 5 steps of discriminator" in text


def test_guard_names_the_network_and_the_iteration():
    trainer, batches = make(), data(4)
    NonFiniteGuard().attach(trainer)
    batches[2] = torch.full((SAMPLES, 2), float("nan"))
    before = {}
    trainer.add_event_handler(
        Events.ITERATION_STARTED(once=3),
        lambda: before.update({k: v.clone() for k, v in module(trainer, "discriminator").state_dict().items()}),
    )
    with pytest.raises(FloatingPointError, match="loss of iteration 3 is nan, .* of phase 'discriminator'"):
        trainer.run(batches)
    assert all(torch.equal(before[name], value) for name, value in module(trainer, "discriminator").state_dict().items())


def test_guard_names_the_generator():
    trainer = make(loss=(FORMULAS["wgan"][0], lambda f: f.mean() * float("inf")))
    NonFiniteGuard().attach(trainer)
    with pytest.raises(FloatingPointError, match="iteration 1 is .*inf, .* of phase 'generator'"):
        trainer.run(data(1))


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "error", "text"),
    [
        ({"discriminator_steps": 0}, ValueError, "discriminator_steps must be a positive integer, got 0"),
        ({"discriminator_steps": 1.5}, ValueError, "discriminator_steps must be a positive integer, got 1.5"),
        ({"loss": "wasserstein"}, ValueError, "loss must be one of 'wgan', 'hinge', .* got 'wasserstein'"),
        ({"loss": (len,)}, TypeError, "pair of callables"),
        ({"loss": len}, TypeError, "pair of callables"),
        ({"latent": 0}, ValueError, "latent must be a positive integer, .* got 0"),
        ({"latent": "128"}, ValueError, "latent must be .* got '128'"),
        ({"penalty": 10.0}, TypeError, r"penalty must be GradientPenalty\(\), .* got 10.0"),
        ({"penalty": R1}, TypeError, r"not the class R1; write R1\(\)"),
        ({"prepare_batch": 3}, TypeError, "prepare_batch must be callable, got 3"),
        ({"prepare_batch": lambda batch: batch}, TypeError, r"called as prepare_batch\(batch, device=.* takes \(batch\)"),
        ({"accumulation_steps": 0}, ValueError, "accumulation_steps must be a positive integer, got 0"),
        ({"clip_grad_norm": -1}, ValueError, "clip_grad_norm .* must be a positive number, got -1"),
        ({"amp": "fp8"}, ValueError, "amp must be .* got 'fp8'"),
        ({"critic": nn.Linear(2, 1).to("meta")}, ValueError, "generator is on 'cpu' and the discriminator on 'meta'"),
    ],
    ids=lambda value: ", ".join(value) if isinstance(value, dict) else None,
)
def test_settings_that_can_t_be_are_errors_at_creation(settings, error, text):
    with pytest.raises(error, match=text):
        make(**settings)


@pytest.mark.parametrize("phase", ["generator", "discriminator"])
def test_a_network_that_is_none_is_named(phase):
    networks = {"generator": nn.Linear(3, 2), "discriminator": nn.Linear(2, 1)}
    optimizers = [torch.optim.SGD(network.parameters(), lr=0.1) for network in networks.values()]
    networks[phase] = torch.relu
    with pytest.raises(TypeError, match=f"model of phase '{phase}' must be a torch.nn.Module, got builtin"):
        create_gan_trainer(*networks.values(), *optimizers, latent=3)


def test_the_same_parameters_in_both_optimizers_are_an_error():
    generator, critic = nn.Linear(3, 2), nn.Linear(2, 1)
    both = torch.optim.SGD([*generator.parameters(), *critic.parameters()], lr=0.1)
    own = torch.optim.SGD(generator.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="phases 'discriminator' and 'generator' hold the same parameters"):
        create_gan_trainer(generator, critic, own, both, latent=3)


def test_optimizers_the_wrong_way_round_are_an_error():
    generator, critic = nn.Linear(3, 2), nn.Linear(2, 1)
    optimizers = [torch.optim.SGD(network.parameters(), lr=0.1) for network in (critic, generator)]
    with pytest.raises(ValueError, match="phase 'discriminator' holds no parameter of the model"):
        create_gan_trainer(generator, critic, *optimizers, latent=3)


def test_a_scheduler_of_the_other_network_is_an_error():
    generator, critic = nn.Linear(3, 2), nn.Linear(2, 1)
    optimizers = [torch.optim.SGD(network.parameters(), lr=0.1) for network in (generator, critic)]
    schedule = torch.optim.lr_scheduler.StepLR(optimizers[0], 2)
    with pytest.raises(ValueError, match="discriminator_scheduler .StepLR. was made for the generator's optimizer"):
        create_gan_trainer(generator, critic, *optimizers, latent=3, discriminator_scheduler=schedule)


@pytest.mark.parametrize(
    ("settings", "error", "text"),
    [
        (
            {"latent": lambda n, d: torch.randn(n - 1, 3)},
            ValueError,
            r"latent .* n=8 samples first, got .*\(7, 3\) in iteration 1",
        ),
        ({"latent": lambda n, d: None}, ValueError, "latent .* the generator .* got a NoneType in iteration 1"),
        ({"generator": nn.Linear(3, 4)}, ValueError, r"generator Linear must .* \(8, 2\), got .* \(8, 4\) in iteration 1"),
        ({"critic": nn.Linear(2, 2)}, ValueError, r"discriminator Linear must return one number per sample, .* in iteration 1"),
        ({"loss": (lambda r, f: r, lambda f: f)}, ValueError, "loss of the discriminator .* in iteration 1.* must be a scalar"),
        (
            {"loss": (FORMULAS["wgan"][0], lambda f: f)},
            ValueError,
            "loss of the generator .* in iteration 1.* must be a scalar",
        ),
        ({"loss": (FORMULAS["wgan"][0], lambda f: 1.0)}, TypeError, "loss of the generator .* must be a scalar tensor"),
        (
            {"penalty": lambda critic, real, fake: critic(real)},
            ValueError,
            "penalty .*lambda.* in iteration 1.* must be a scalar",
        ),
        ({"conditional": True}, TypeError, r"conditional=True needs batches \(x, y\), .* in iteration 1"),
        ({"prepare_batch": lambda batch, device, non_blocking: None}, TypeError, "prepare_batch .* real samples as a tensor"),
    ],
)
def test_what_shows_in_the_run_names_the_network_and_the_iteration(settings, error, text):
    with pytest.raises(error, match=text):
        make(**settings).run(data(2))


def test_a_mistake_in_a_later_iteration_names_it():
    with pytest.raises(ValueError, match="in iteration 3, in the turn of the discriminator"):
        make().run([*data(2), torch.randn(SAMPLES, 5, 2)])


def test_a_batch_that_is_no_tensor_points_to_prepare_batch():
    with pytest.raises(TypeError, match="a batch must be a tensor x.*keys.*pass prepare_batch="):
        make().run([{"image": x} for x in data(2)])


def test_batch_norm_under_a_penalty_gives_one_warning():
    critic = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    with pytest.warns(UserWarning, match="BatchNorm"):
        trainer = make(critic=critic, penalty=[GradientPenalty(), R1()])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer.run(data(2))
        make(critic=nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)))


# -- it learns --------------------------------------------------------------------------------------------------------


def test_finds_all_eight_modes_of_a_ring():
    torch.manual_seed(0)
    angles = torch.arange(8) * torch.pi / 4
    modes = torch.stack([angles.cos(), angles.sin()], dim=1)
    generator = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
    critic = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))
    optimizers = [torch.optim.Adam(network.parameters(), lr=1e-3, betas=(0.0, 0.9)) for network in (generator, critic)]
    penalty = GradientPenalty(weight=1.0)
    trainer = create_gan_trainer(generator, critic, *optimizers, latent=4, penalty=penalty, discriminator_steps=3)
    batches = [modes[torch.randint(8, (128,))] + 0.05 * torch.randn(128, 2) for _ in range(300)]
    trainer.run(batches, max_epochs=6)
    with torch.no_grad():
        distances = torch.cdist(generator(torch.randn(2000, 4)), modes)
    near = distances.min(dim=1)
    found = near.indices[near.values < 0.25].bincount(minlength=8)
    assert (found > 2000 / 8 / 4).all(), found
