"""A trainer is an Ignite engine: what is Ignite's works on it; and what is its own: explain, reasons, windows, phases."""

import io

import pytest
import torch
from ignite.engine import Events
from ignite.handlers import (
    Checkpoint,
    DiskSaver,
    EarlyStopping,
    EpochOutputStore,
    ProgressBar,
    TerminateOnNan,
    Timer,
    global_step_from_engine,
)
from ignite.metrics import Average, Loss, MeanSquaredError, RunningAverage
from toys import batches, linear, model_of, same, sgd, trainer_of, weights

import camshaft
from camshaft import (
    CheckpointRotation,
    FreezeParameters,
    GradientAccumulation,
    GradientClipping,
    LRHistory,
    LRScheduling,
    MixedPrecision,
    Phase,
    StepEvents,
    TensorBoard,
    Trainer,
    create_trainer,
)

MSE = torch.nn.functional.mse_loss


def hand_losses(data, epochs=1, lr=0.1):
    """The losses of a loop written by hand over the linear model, and the model afterwards."""
    model = linear()
    optimizer = sgd(model, lr)
    losses = []
    for _ in range(epochs):
        for x, y in data:
            optimizer.zero_grad()
            loss = MSE(model(x), y)
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    return losses, model


# -- Ignite's own things ----------------------------------------------------------------------------------------------


def test_a_metric_attached_to_the_trainer_sees_the_output():
    trainer = trainer_of()
    Average().attach(trainer, "mean loss")
    trainer.run(batches(3))
    losses, _ = hand_losses(batches(3))
    assert float(trainer.state.metrics["mean loss"]) == pytest.approx(sum(losses) / 3, rel=1e-6)


def test_metrics_over_predictions_by_output_transform():
    trainer = trainer_of(output_transform=lambda x, y, y_pred, loss: (y_pred, y))
    MeanSquaredError().attach(trainer, "mse")
    Loss(MSE).attach(trainer, "loss")
    trainer.run(batches(3))
    losses, _ = hand_losses(batches(3))
    assert trainer.state.metrics["mse"] == pytest.approx(2 * sum(losses) / 3, rel=1e-5)  # Ignite's sums over outputs
    assert trainer.state.metrics["loss"] == pytest.approx(sum(losses) / 3, rel=1e-5)


def test_running_average_follows_the_loss():
    trainer, seen = trainer_of(), []
    RunningAverage(output_transform=float, alpha=0.5).attach(trainer, "running")
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda e: seen.append(float(e.state.metrics["running"])))
    trainer.run(batches(3))
    first, second, third = hand_losses(batches(3))[0]
    expected = [first, (first + second) / 2, ((first + second) / 2 + third) / 2]
    assert seen == pytest.approx(expected, rel=1e-6)


def test_ignites_progress_bar_draws():
    trainer, text = trainer_of(), io.StringIO()
    RunningAverage(output_transform=float).attach(trainer, "running")
    ProgressBar(file=text, ncols=80).attach(trainer, ["running"])
    trainer.run(batches(3))
    assert "3/3" in text.getvalue() or "[2/3]" in text.getvalue()
    assert "running=" in text.getvalue()


def test_a_timer_counts_steps():
    trainer = trainer_of()
    timer = Timer(average=True)
    timer.attach(
        trainer,
        start=Events.EPOCH_STARTED,
        resume=StepEvents.OPTIMIZER_STEP_STARTED,
        pause=StepEvents.OPTIMIZER_STEP_COMPLETED,
        step=StepEvents.OPTIMIZER_STEP_COMPLETED,
    )
    trainer.run(batches(3))
    assert timer.step_count == 3
    assert timer.value() > 0


def test_terminate_on_nan_ends_the_run():
    trainer = trainer_of()
    trainer.add_event_handler(Events.ITERATION_COMPLETED, TerminateOnNan())
    data = batches(4)
    data[1][0][0, 0] = float("nan")
    trainer.run(data)
    assert trainer.state.iteration == 2
    assert trainer.state.stop_reason == "terminate() was called in epoch 1, iteration 2"


def test_ignites_early_stopping_ends_the_trainer():
    trainer, scores = trainer_of(), iter([3.0, 2.0, 1.0, 0.0])
    stopping = EarlyStopping(patience=2, score_function=lambda engine: next(scores), trainer=trainer)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, stopping)
    trainer.run(batches(2), max_epochs=10)
    assert trainer.state.epoch == 3


def test_ignites_checkpoint_saves_on_the_step_clock(tmp_path):
    trainer = trainer_of(accumulation_steps=2)
    saver = Checkpoint(
        {"model": model_of(trainer), "trainer": trainer},
        DiskSaver(tmp_path, create_dir=True),
        global_step_transform=lambda engine, _: engine.state.optimizer_step,
        n_saved=None,
    )
    trainer.add_event_handler(StepEvents.OPTIMIZER_STEP_COMPLETED(every=2), saver)
    trainer.run(batches(8))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint_2.pt", "checkpoint_4.pt"]
    saved = torch.load(tmp_path / "checkpoint_4.pt", weights_only=True)
    assert torch.equal(saved["model"]["weight"], model_of(trainer).weight)


def test_ignites_checkpoint_loads_into_a_fresh_trainer(tmp_path):
    trainer = trainer_of()
    to_save = {"model": model_of(trainer), "trainer": trainer}
    saver = Checkpoint(to_save, DiskSaver(tmp_path), global_step_transform=global_step_from_engine(trainer))
    trainer.add_event_handler(Events.EPOCH_COMPLETED(once=1), saver)
    trainer.run(batches(3), max_epochs=3)
    fresh, epochs = trainer_of(), []
    Checkpoint.load_objects({"model": model_of(fresh), "trainer": fresh}, torch.load(tmp_path / saver.last_checkpoint))
    fresh.add_event_handler(Events.EPOCH_STARTED, lambda e: epochs.append(e.state.epoch))
    fresh.run(batches(3))
    assert epochs == [2, 3]
    assert same(weights(model_of(fresh)), weights(model_of(trainer)))


def test_an_epoch_output_store_collects():
    trainer = trainer_of()
    store = EpochOutputStore(output_transform=float)
    store.attach(trainer, "losses")
    trainer.run(batches(3))
    assert store.data == pytest.approx(hand_losses(batches(3))[0], rel=1e-6)


def test_the_output_is_the_detached_loss():
    trainer, outputs = trainer_of(), []
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda e: outputs.append(e.state.output))
    trainer.run(batches(3))
    assert [float(output) for output in outputs] == hand_losses(batches(3))[0]
    assert not any(output.requires_grad for output in outputs)


def test_the_trainer_ends_where_the_loop_written_by_hand_does():
    trainer = trainer_of()
    trainer.run(batches(3), max_epochs=2)
    assert same(weights(model_of(trainer)), weights(hand_losses(batches(3), epochs=2)[1]))


def test_the_clocks_are_zero_before_the_first_run():
    state = trainer_of().state
    assert (state.iteration, state.epoch, state.optimizer_step, state.skipped_steps) == (0, 0, 0, 0)


def test_a_second_run_begins_the_clocks_anew():
    trainer = trainer_of()
    trainer.run(batches(3))
    trainer.run(batches(2))
    assert (trainer.state.optimizer_step, trainer.state.iteration) == (2, 2)


def test_a_run_that_goes_on_keeps_the_clocks():
    trainer = trainer_of()
    trainer.run(batches(3), max_epochs=1)
    trainer.run(batches(3), max_epochs=3)
    assert (trainer.state.optimizer_step, trainer.state.epoch) == (9, 3)


# -- explain ----------------------------------------------------------------------------------------------------------


def full_trainer():
    model = linear()
    optimizer = sgd(model)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    trainer = create_trainer(
        model, optimizer, MSE, amp="bf16", accumulation_steps=4, clip_grad_norm=1.5, scheduler=scheduler, partial_window="drop"
    )

    @trainer.on(StepEvents.GRADIENTS_CLIPPED(every=100))
    def look(engine):
        pass

    return trainer


def test_explain_is_the_cycle_as_text():
    assert full_trainer().explain() == "\n".join(
        [
            "model: Linear on cpu, SGD, 4 batches a step (a shorter last window: drop), bfloat16",
            "STARTED",
            "    LRScheduling(StepLR).start",
            "  EPOCH_STARTED",
            "    ITERATION_STARTED",
            "      FORWARD_STARTED",
            "      FORWARD_COMPLETED",
            "      BACKWARD_STARTED",
            "      BACKWARD_COMPLETED",
            "      GRADIENTS_READY",
            "          GradientClipping(max_norm=1.5).clip  [changes gradients]",
            "      GRADIENTS_CLIPPED",
            "          look  (every=100)",
            "      OPTIMIZER_STEP_STARTED",
            "      OPTIMIZER_STEP_COMPLETED",
            "          LRScheduling(StepLR).step_in_phase",
            "      OPTIMIZER_STEP_SKIPPED",
            "    ITERATION_COMPLETED",
            "  EPOCH_COMPLETED",
            "COMPLETED",
        ]
    )


@pytest.mark.parametrize(
    ("event", "shown"),
    [
        (StepEvents.GRADIENTS_READY(every=10), "(every=10)"),
        (StepEvents.GRADIENTS_READY(once=3), "(once=[3])"),
        (StepEvents.GRADIENTS_READY(before=5), "(before=5)"),
        (StepEvents.GRADIENTS_READY(after=2, before=5), "(before=5, after=2)"),
        (StepEvents.GRADIENTS_READY(every=2, after=4), "(every=2, after=4)"),
        (StepEvents.GRADIENTS_READY(phase="model"), "(phase='model')"),
        (StepEvents.GRADIENTS_READY(phase="model", every=3), "(phase='model', every=3)"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_explain_shows_filters(event, shown):
    trainer = trainer_of()

    def mine(engine):
        pass

    trainer.add_event_handler(event, mine)
    line = next(line for line in trainer.explain().splitlines() if "mine" in line)
    assert sorted(line.strip().removeprefix("mine  (")[:-1].split(", ")) == sorted(shown[1:-1].split(", "))


def test_explain_names_a_filter_that_is_a_function():
    def weekends(engine, clock):
        return False

    trainer = trainer_of()
    trainer.add_event_handler(Events.EPOCH_COMPLETED(weekends), print)
    assert "print  (weekends)" in trainer.explain()


def test_explain_shows_rare_events_only_where_somebody_listens():
    trainer = trainer_of()
    assert "TERMINATE" not in trainer.explain()
    trainer.add_event_handler(Events.TERMINATE, lambda: None)
    assert "TERMINATE" in trainer.explain()


def test_explain_shows_the_packages_own_filters_as_words(tmp_path):
    trainer = trainer_of()
    CheckpointRotation(tmp_path, keep_best=1, metric="score").attach(trainer)
    camshaft.EarlyStopping("score").attach(trainer)
    TensorBoard(tmp_path / "board").attach(trainer)
    lines = [line.strip() for line in trainer.explain().splitlines()]
    shown = ["CheckpointRotation.save_if_requested  (when due)", "EarlyStopping.judge  (when new)"]
    assert {*shown, "TensorBoard.write_metrics  (when metrics are new)"} <= set(lines)
    assert not any("_is_" in line or "MetricWatch" in line for line in lines)
    assert {"CheckpointRotation.check_at_end", "EarlyStopping.check_at_end"} <= set(lines)


def test_explain_shows_a_name_beside_the_class():
    model = linear()
    optimizer = sgd(model)
    trainer = trainer_of(model, optimizer)
    LRScheduling(torch.optim.lr_scheduler.StepLR(optimizer, 1)).attach(trainer, "halving")
    GradientClipping(1.0).attach(trainer, "GradientClipping2")
    text = trainer.explain()
    assert "    halving: LRScheduling(StepLR).step_in_phase" in text
    assert "    GradientClipping2(max_norm=1.0).clip" in text


def test_explain_shows_what_may_come_at_any_time_at_the_end():
    trainer = trainer_of()
    for event in (Events.INTERRUPT, Events.EXCEPTION_RAISED, Events.TERMINATE):
        trainer.add_event_handler(event, lambda *_: None)
    names = [line.strip() for line in trainer.explain().splitlines() if line.strip().isupper()]
    assert names[-5:] == ["EPOCH_COMPLETED", "TERMINATE", "COMPLETED", "INTERRUPT", "EXCEPTION_RAISED"]


def test_explain_shows_every_phase():
    text = two_phases(interval=2).explain().splitlines()
    assert text[0] == "first: Linear on cpu, SGD"
    assert text[1] == "second: Linear on cpu, SGD, after every 2 steps of first"


def test_the_factorys_arguments_are_the_handlers_they_are_shorthand_for():
    model = linear()
    short = create_trainer(model, sgd(model), MSE, amp="bf16", accumulation_steps=3, clip_grad_norm=0.5, clip_grad_value=0.1)
    long = trainer_of()
    MixedPrecision("bf16").attach(long)
    GradientAccumulation(3).attach(long)
    GradientClipping(0.5, clip_value=0.1).attach(long)
    assert short.explain() == long.explain()
    assert list(short.handlers) == list(long.handlers) == ["MixedPrecision", "GradientAccumulation", "GradientClipping"]


# -- why a run ended --------------------------------------------------------------------------------------------------


def test_a_run_to_its_end_has_no_stop_reason():
    trainer = trainer_of()
    trainer.run(batches(3))
    assert trainer.state.stop_reason is None


@pytest.mark.filterwarnings("ignore:Data iterator can not provide data")
def test_data_that_can_be_passed_over_only_once_ends_the_run_and_no_epoch_is_without_a_batch():
    trainer, epochs = trainer_of(), []
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda e: epochs.append(e.state.iteration))
    state = trainer.run((batch for batch in batches(3)), max_epochs=4)
    assert epochs == [3]
    assert state.stop_reason.startswith("the data ended after iteration 3: it can be iterated over only once")


def test_terminate_says_where_and_may_say_why():
    plain, reasoned = trainer_of(), trainer_of()
    plain.add_event_handler(Events.ITERATION_COMPLETED(once=2), lambda e: e.terminate())
    reasoned.add_event_handler(Events.ITERATION_COMPLETED(once=2), lambda e: e.terminate(reason="lunch"))
    assert plain.run(batches(3)).stop_reason == "terminate() was called in epoch 1, iteration 2"
    assert reasoned.run(batches(3)).stop_reason == "lunch"


def test_the_first_reason_stands_and_the_next_run_has_none():
    trainer = trainer_of()

    @trainer.on(Events.ITERATION_COMPLETED(once=2))
    def stop_once(engine):
        if not hasattr(engine, "stopped"):
            engine.stopped = True
            engine.terminate(reason="first")
            engine.terminate(reason="second")

    assert trainer.run(batches(3)).stop_reason == "first"
    assert trainer.run(batches(3)).stop_reason is None


# -- windows that are cut short ---------------------------------------------------------------------------------------


def gradient_sum(model, data):
    """The mean loss's gradient over some batches, by hand."""
    twin = linear()
    twin.load_state_dict(model.state_dict())
    loss = sum(MSE(twin(x), y) for x, y in data) / len(data)
    loss.backward()
    return twin.weight.grad


def cut(trainer, how):
    """Runs six batches in windows of four, with something that cuts the first window after two."""
    ends = {
        "terminate_epoch": lambda: trainer.add_event_handler(Events.ITERATION_COMPLETED(once=2), lambda e: e.terminate_epoch()),
        "terminate": lambda: trainer.add_event_handler(Events.ITERATION_COMPLETED(once=2), lambda e: e.terminate()),
    }
    ends.get(how, lambda: None)()
    return trainer.run(batches(6), max_iters=2) if how == "max_iters" else trainer.run(batches(6))


@pytest.mark.parametrize("how", ["terminate_epoch", "max_iters"])
def test_a_window_cut_short_steps_on_its_true_mean(how):
    trainer, gradients = trainer_of(accumulation_steps=4), []
    model = model_of(trainer)
    trainer.add_event_handler(StepEvents.GRADIENTS_READY, lambda: gradients.append(model.weight.grad.clone()))
    expected = gradient_sum(model, batches(6)[:2])
    cut(trainer, how)
    assert trainer.state.optimizer_step == 1
    torch.testing.assert_close(gradients[0], expected, rtol=1e-6, atol=1e-7)


def test_terminate_epoch_drops_the_window_where_partial_windows_are_dropped():
    trainer = trainer_of(accumulation_steps=4, partial_window="drop")
    before = weights(model_of(trainer))
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=2), lambda e: e.terminate_epoch())
    with pytest.raises(RuntimeError, match="without one optimizer step"):
        trainer.run(batches(6))
    assert same(weights(model_of(trainer)), before)
    assert not trainer.window_is_open


def test_terminate_leaves_the_window_open_and_makes_no_step():
    trainer = trainer_of(accumulation_steps=4)
    before = weights(model_of(trainer))
    assert cut(trainer, "terminate").optimizer_step == 0
    assert same(weights(model_of(trainer)), before)
    assert trainer.window_is_open


def test_an_exception_leaves_the_window_open_and_makes_no_step():
    trainer = trainer_of(accumulation_steps=4)
    before = weights(model_of(trainer))

    @trainer.on(Events.ITERATION_COMPLETED(once=2))
    def fail(engine):
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        trainer.run(batches(6))
    assert same(weights(model_of(trainer)), before)
    assert trainer.window_is_open


def test_the_next_run_throws_an_open_window_away():
    trainer, gradients = trainer_of(accumulation_steps=4), []
    with trainer.add_event_handler(Events.ITERATION_COMPLETED(once=2), trainer.terminate):
        trainer.run(batches(6))
    model = model_of(trainer)
    trainer.add_event_handler(StepEvents.GRADIENTS_READY(once=1), lambda: gradients.append(model.weight.grad.clone()))
    expected = gradient_sum(model, batches(4))
    trainer.run(batches(4))
    torch.testing.assert_close(gradients[0], expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("policy", "steps"), [("step", [2, 4, 5]), ("drop", [2, 4])])
def test_an_epochs_partial_window_follows_the_policy(policy, steps):
    trainer, seen = trainer_of(accumulation_steps=2, partial_window=policy), []
    trainer.add_event_handler(StepEvents.OPTIMIZER_STEP_COMPLETED, lambda e: seen.append(e.state.iteration))
    trainer.run(batches(5))
    assert seen == steps


def test_a_window_never_crosses_an_epochs_end():
    trainer, seen = trainer_of(accumulation_steps=4), []
    trainer.add_event_handler(StepEvents.OPTIMIZER_STEP_COMPLETED, lambda e: seen.append(e.state.iteration))
    trainer.run(batches(6), max_epochs=2)
    assert seen == [4, 6, 10, 12]


# -- refused steps ----------------------------------------------------------------------------------------------------


def test_a_refused_step_moves_no_weights_and_the_next_one_is_as_if_it_had_not_been():
    trainer = trainer_of()
    refuse = StepEvents.GRADIENTS_READY(lambda engine, _: engine.state.iteration == 2)
    trainer.add_event_handler(refuse, lambda e: e.skip_step_if(torch.tensor(True)))
    trainer.run(batches(3))
    data = batches(3)
    assert same(weights(model_of(trainer)), weights(hand_losses([data[0], data[2]])[1]))
    assert (trainer.state.optimizer_step, trainer.state.skipped_steps) == (2, 1)


def test_one_true_flag_among_several_refuses_and_calls_its_own_function():
    trainer, called = trainer_of(), []

    @trainer.on(StepEvents.GRADIENTS_READY)
    def ask(engine):
        engine.skip_step_if(torch.tensor(False), lambda: called.append("false"))
        engine.skip_step_if(torch.tensor(engine.state.iteration == 1), lambda: called.append("true"))

    trainer.run(batches(2))
    assert called == ["true"]
    assert trainer.state.skipped_steps == 1


def test_a_step_may_be_refused_for_its_norm_at_gradients_clipped():
    trainer = trainer_of(clip_grad_norm=1.0)
    trainer.add_event_handler(StepEvents.GRADIENTS_CLIPPED, lambda e: e.skip_step_if(e.state.grad_norm > 0))
    assert trainer.run(batches(3)).skipped_steps == 3


# -- runs that train nothing ------------------------------------------------------------------------------------------


class Empty:
    def __iter__(self):
        return iter(())


def test_a_run_over_nothing_is_an_error():
    with pytest.raises(RuntimeError, match="ended after 0 iterations without one optimizer step: the data was empty"):
        trainer_of().run(Empty())


def test_a_run_whose_windows_were_all_dropped_is_an_error():
    with pytest.raises(RuntimeError, match="ended after 3 iterations.*dropped by partial_window='drop'"):
        trainer_of(accumulation_steps=4, partial_window="drop").run(batches(3))


def test_a_run_whose_steps_were_all_skipped_is_none():
    trainer = trainer_of()
    trainer.add_event_handler(StepEvents.GRADIENTS_READY, lambda e: e.skip_step_if(torch.tensor(True)))
    assert trainer.run(batches(3)).skipped_steps == 3


def test_a_terminated_run_without_a_step_is_none():
    trainer = trainer_of()
    trainer.add_event_handler(Events.EPOCH_STARTED, lambda e: e.terminate())
    assert trainer.run(batches(3)).optimizer_step == 0


@pytest.mark.parametrize("argument", ["max_epochs", "max_iters", "epoch_length"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True, "3"])
def test_a_limit_that_is_no_positive_integer_is_an_error(argument, value):
    with pytest.raises(ValueError, match=f"{argument} must be a positive integer, got {value!r}"):
        trainer_of().run(batches(3), **{argument: value})


# -- modes ------------------------------------------------------------------------------------------------------------


def test_the_model_is_put_in_training_mode_and_frozen_parts_stay_in_eval():
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2), torch.nn.Dropout())
    model[1].eval()
    trainer = create_trainer(model, sgd(model), MSE)
    model.eval()
    trainer.run(batches(3))
    assert [model.training, model[0].training, model[1].training, model[2].training] == [True, True, False, True]


def test_a_part_put_in_eval_mode_between_epochs_stays_there():
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    trainer = create_trainer(model, sgd(model), MSE)
    trainer.add_event_handler(Events.EPOCH_STARTED(once=2), lambda: model[1].eval())
    trainer.add_event_handler(Events.EPOCH_COMPLETED(once=2), lambda: model.eval())
    trainer.run(batches(3), max_epochs=3)
    assert model.training
    assert not model[1].training


# -- phases of one's own ----------------------------------------------------------------------------------------------


def two_phases(interval=1, **second_options):
    first, second = linear(), linear()

    def objective(model):
        return lambda engine, batch: MSE(model(batch[0]), batch[1])

    return Trainer(
        [
            Phase("first", first, sgd(first), objective(first)),
            Phase("second", second, sgd(second), objective(second), interval=interval, **second_options),
        ]
    )


def test_two_phases_train_each_like_a_loop_of_its_own():
    trainer = two_phases(interval=2)
    trainer.run(batches(5))
    data = batches(5)
    assert same(weights(trainer.phases["first"].module), weights(hand_losses(data)[1]))
    assert same(weights(trainer.phases["second"].module), weights(hand_losses([data[1], data[3]])[1]))
    assert trainer.phases["first"].optimizer_step == 5
    assert trainer.phases["second"].optimizer_step == trainer.state.optimizer_step == 2


def test_handlers_of_one_phase_leave_the_other_alone():
    trainer = two_phases()
    GradientClipping(1e-3, phase="first").attach(trainer)
    norms = {}
    trainer.add_event_handler(StepEvents.GRADIENTS_CLIPPED, lambda e: norms.update({e.state.phase: e.state.grad_norm}))
    trainer.run(batches(1))
    assert float(norms["first"]) > 1e-3
    assert norms["second"] is None


def test_the_history_of_two_phases_has_their_names():
    trainer = two_phases(interval=2)
    history = LRHistory().attach(trainer)
    trainer.run(batches(4))
    assert {name: [step for step, _ in points] for name, points in history.history.items()} == {
        "first/lr": [1, 2, 3, 4],
        "second/lr": [1, 2],
    }


def test_accumulation_in_the_first_phase_alone():
    trainer = two_phases()
    GradientAccumulation(2, phase="first").attach(trainer)
    trainer.run(batches(4))
    assert [phase.optimizer_step for phase in trainer.phases.values()] == [2, 2]
    assert [phase.forward_passes for phase in trainer.phases.values()] == [4, 2]


def test_frozen_modules_of_a_phase_get_no_gradient_and_train_again_afterwards():
    critic, maker = linear(), linear()
    seen = []

    def judged(engine, batch):
        seen.append(critic.weight.requires_grad)
        return critic(maker(batch[0]).repeat(1, 2)[:, :3]).mean()

    phases = [
        Phase("critic", critic, sgd(critic), lambda engine, batch: MSE(critic(batch[0]), batch[1])),
        Phase("maker", maker, sgd(maker), judged, frozen=[critic]),
    ]
    Trainer(phases).run(batches(2))
    assert seen == [False, False]
    assert critic.weight.requires_grad


def wrong_phases():
    model = linear()
    phase = Phase("a", model, sgd(model), lambda engine, batch: None)
    other = linear()
    return {
        "none": ([], TypeError, "at least one Phase"),
        "no phase": ([model], TypeError, "at least one Phase"),
        "one name": ([phase, Phase("a", other, sgd(other), print)], ValueError, r"name of its own, got \['a', 'a'\]"),
        "shared": ([phase, Phase("b", model, sgd(model), print)], ValueError, "'a' and 'b' hold the same parameters"),
    }


@pytest.mark.parametrize("name", wrong_phases())
def test_phases_that_make_no_trainer_are_an_error(name):
    phases, error, text = wrong_phases()[name]
    with pytest.raises(error, match=text):
        Trainer(phases)


def test_a_handler_for_an_unknown_phase_is_an_error():
    with pytest.raises(ValueError, match=r"phase must be one of \['model'\], got 'critic'"):
        GradientClipping(1.0, phase="critic").attach(trainer_of())


def test_nothing_of_the_graph_outlives_the_iteration():
    trainer, alive = trainer_of(), []

    @trainer.on(Events.ITERATION_COMPLETED)
    def look(engine):
        state = engine.state
        alive.append([t.grad_fn for t in (state.loss, state.y_pred, state.output) if t.grad_fn is not None])

    trainer.run(batches(3))
    assert alive == [[], [], []]


def test_a_loss_of_named_parts_is_there_by_name():
    model = linear()

    def compute_loss(model, batch):
        x, y = batch
        loss = MSE(model(x), y)
        return {"loss": loss + 1, "fit": loss}

    trainer = create_trainer(model, sgd(model), None, compute_loss=compute_loss)
    state = trainer.run(batches(1))
    assert float(state.losses["fit"]) == hand_losses(batches(1))[0][0]
    assert float(state.output) == pytest.approx(float(state.losses["fit"]) + 1)
    assert (state.x, state.y, state.y_pred) == (None, None, None)


def test_the_run_can_freeze_and_go_on():
    trainer = trainer_of()
    before = model_of(trainer).bias.detach().clone()
    with FreezeParameters("bias").attached(trainer):
        trainer.run(batches(3))
    assert torch.equal(model_of(trainer).bias, before)
    trainer.run(batches(3))
    assert not torch.equal(model_of(trainer).bias, before)
