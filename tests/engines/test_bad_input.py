"""Every mistake is said at the first moment when it can be known; nothing runs in silence and trains nothing."""

from __future__ import annotations

import copy
from collections import namedtuple

import pytest
import torch
from ignite.metrics import Accuracy, Loss
from torch import nn
from torch.nn.functional import mse_loss
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from toys import batches, linear, same, sgd, trainer_of, weights

from camshaft import (
    CheckpointRotation,
    EarlyStopping,
    Evaluation,
    Events,
    FreezeParameters,
    LRScheduling,
    NonFiniteGuard,
    StepEvents,
    create_evaluator,
    create_trainer,
    freeze,
    load_weights,
    save_weights,
    unfreeze,
)


class Stream(IterableDataset):
    """Data that can be passed over again and again, but not counted."""

    def __init__(self, data=()):
        self.data = data

    def __iter__(self):
        return iter(self.data)


class Broken(Stream):
    """A loader that fails after its last batch."""

    def __iter__(self):
        yield from self.data
        raise OSError("the disk is gone")


class Sized(Broken):
    def __len__(self):
        return 10


def names_iteration(caught, number):
    """Whether the notes of an exception name the iteration in which it was raised."""
    return any(f"iteration {number}" in note for note in caught.value.__notes__)


# -- the data and the length of a run ---------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [{"max_epochs": 3}, {"max_iters": 5}])
@pytest.mark.parametrize(
    ("make", "match"),
    [
        (list, "zero size"),
        (lambda: DataLoader(TensorDataset(torch.zeros(3, 3)), batch_size=4, drop_last=True), "zero size"),
        (lambda: iter(()), "the data"),
        (Stream, "the data"),
        (lambda: DataLoader(Stream()), "the data"),
    ],
    ids=["list", "loader", "iterator", "stream", "loader of a stream"],
)
def test_empty_data(make, match, limit):
    with pytest.raises((ValueError, RuntimeError), match=match):
        trainer_of().run(make(), **limit)


@pytest.mark.parametrize("kind", [Broken, Sized])
def test_loader_that_raises(kind):
    trainer, data = trainer_of(), kind(batches(2))
    with pytest.raises(OSError, match="the disk is gone") as caught:
        trainer.run(data, max_epochs=2)
    assert names_iteration(caught, 2)
    assert trainer.state.optimizer_step == 2


def test_data_set_that_raises_in_a_loader():
    class Rows(TensorDataset):
        def __getitem__(self, index):
            if index == 5:
                raise KeyError("row 5 has no label")
            return super().__getitem__(index)

    loader = DataLoader(Rows(torch.zeros(8, 3), torch.zeros(8, 2)), batch_size=2)
    with pytest.raises(KeyError, match="row 5 has no label") as caught:
        trainer_of().run(loader)
    assert names_iteration(caught, 2)


@pytest.mark.parametrize("data", [5, object()], ids=["number", "object"])
def test_data_that_is_no_iterable(data):
    with pytest.raises(TypeError, match="iterable"):
        trainer_of().run(data)


def test_no_data_at_all():
    with pytest.raises(ValueError, match="epoch_length"):
        trainer_of().run()


@pytest.mark.parametrize("argument", ["max_epochs", "max_iters", "epoch_length"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True, "2"])
def test_length_of_a_run_is_a_positive_integer(argument, value):
    with pytest.raises(ValueError, match=f"{argument} must be a positive integer, got {value!r}"):
        trainer_of().run(batches(), **{argument: value})


def test_max_epochs_and_max_iters_exclude_each_other():
    with pytest.raises(ValueError, match="max_epochs"):
        trainer_of().run(batches(), max_epochs=1, max_iters=2)


@pytest.mark.parametrize("kind", [list, Stream])
def test_run_whose_windows_are_all_dropped(kind):
    trainer = trainer_of(accumulation_steps=4, partial_window="drop")
    with pytest.raises(RuntimeError, match="without one optimizer step"):
        trainer.run(kind(batches(3)), max_epochs=2)


# -- the batch --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "what"),
    [
        ((torch.zeros(4, 3), torch.zeros(4, 2), torch.zeros(4)), "a tuple of 3"),
        ([torch.zeros(4, 3)], "a list of 1"),
        ({"x": torch.zeros(4, 3), "y": torch.zeros(4, 2)}, r"a dict with the keys \['x', 'y'\]"),
        (torch.zeros(2, 3), r"a tensor of shape \(2, 3\)"),
        ("text", "a str"),
        (None, "a NoneType"),
    ],
    ids=["triple", "single", "dict", "tensor of two rows", "text", "none"],
)
def test_batch_that_is_no_pair(batch, what):
    with pytest.raises(TypeError, match=f"pair.*got {what}.*prepare_batch") as caught:
        trainer_of().run([*batches(1), batch])
    assert names_iteration(caught, 2)


@pytest.mark.parametrize("result", [None, 5, (1, 2, 3)])
def test_prepare_batch_that_gives_no_pair(result):
    def prepare(batch, device, non_blocking):
        return result

    with pytest.raises(TypeError, match=r"prepare_batch .*prepare.* must return \(x, y\)") as caught:
        trainer_of(prepare_batch=prepare).run(batches())
    assert names_iteration(caught, 1)


@pytest.mark.parametrize("create", [trainer_of, lambda **options: create_evaluator(linear(), **options)])
def test_prepare_batch_that_does_not_take_the_device(create):
    def prepare(batch):
        return batch

    match = r"called as prepare_batch\(batch, device=\.\.\., non_blocking=\.\.\.\), but .*prepare takes \(batch\); write def"
    with pytest.raises(TypeError, match=match):
        create(prepare_batch=prepare)


@pytest.mark.parametrize("argument", ["prepare_batch", "model_transform", "output_transform"])
def test_function_that_is_none(argument):
    with pytest.raises(TypeError, match=f"{argument} must be callable, got 5"):
        trainer_of(**{argument: 5})


@pytest.mark.parametrize(
    ("weight", "match"),
    [
        (-1, "at least 0, got -1"),
        (float("nan"), "finite number of at least 0, got nan"),
        (float("inf"), "finite number of at least 0, got inf"),
        (None, "finite number of at least 0, got None"),
        (torch.ones(3), "finite number"),
        (torch.tensor(-2.0), "at least 0, got -2.0"),
        (0, "weighs 0"),
    ],
)
def test_weight_that_is_none(weight, match):
    def tokens(batch):
        return weight

    with pytest.raises(ValueError, match=match) as caught:
        trainer_of(loss_weight=tokens, accumulation_steps=2).run(batches(4))
    assert names_iteration(caught, 2 if match == "weighs 0" else 1)


def test_samples_of_a_batch_without_a_length():
    with pytest.raises(TypeError, match="loss_weight='samples' needs a tensor with a length"):
        trainer_of(loss_weight="samples", prepare_batch=lambda batch, **_: batches(1)[0]).run([("a", "b")])


# -- the loss ---------------------------------------------------------------------------------------------------------

BAD_LOSSES = {
    "vector": (lambda y_pred, y: (y_pred - y).square(), ValueError, r"must be a scalar, got a tensor of shape \(4, 2\)"),
    "none": (lambda y_pred, y: None, TypeError, "must be a scalar tensor, got None"),
    "number": (lambda y_pred, y: mse_loss(y_pred, y).item(), TypeError, "must be a scalar tensor, got a float"),
    "tuple": (lambda y_pred, y: (mse_loss(y_pred, y), 1), TypeError, "must be a scalar tensor, got a tuple of 2"),
    "detached": (lambda y_pred, y: mse_loss(y_pred.detach(), y), ValueError, "has no gradient"),
    "mapping without loss": (lambda y_pred, y: {"mse": mse_loss(y_pred, y)}, TypeError, r"without 'loss'; it has \['mse'\]"),
}


def named(function):
    function.__qualname__ = "users_own"
    return function


@pytest.mark.parametrize("kind", BAD_LOSSES)
@pytest.mark.parametrize("amp", [None, "fp16"])
def test_loss_that_can_not_go_backward(kind, amp):
    function, error, match = BAD_LOSSES[kind]
    with pytest.raises(error, match=rf"loss_fn users_own\b.*{match}") as caught:
        trainer_of(loss_fn=named(function), amp=amp, accumulation_steps=2).run(batches())
    assert names_iteration(caught, 1)


@pytest.mark.parametrize("kind", BAD_LOSSES)
def test_result_of_compute_loss_that_can_not_go_backward(kind):
    function, error, match = BAD_LOSSES[kind]
    model = linear()
    objective = named(lambda model, batch: function(model(batch[0]), batch[1]))
    with pytest.raises(error, match=rf"compute_loss users_own\b.*{match}") as caught:
        create_trainer(model, sgd(model), None, compute_loss=objective).run(batches())
    assert names_iteration(caught, 1)


def test_model_in_which_everything_is_frozen():
    model = linear()
    optimizer = sgd(model)
    freeze(model, "*")
    with pytest.raises(ValueError, match="has no gradient.*frozen") as caught:
        trainer_of(model, optimizer).run(batches())
    assert names_iteration(caught, 1)


def test_users_function_that_raises_is_told_with_its_iteration():
    def loss_fn(y_pred, y):
        if not y.any():
            raise ZeroDivisionError("no labels")
        return mse_loss(y_pred, y)

    with pytest.raises(ZeroDivisionError, match="no labels") as caught:
        trainer_of(loss_fn=loss_fn).run([*batches(2), (torch.zeros(4, 3), torch.zeros(4, 2))])
    assert names_iteration(caught, 3)


@pytest.mark.parametrize("loss_fn", ["mse", None])
def test_loss_fn_that_is_none(loss_fn):
    model = linear()
    with pytest.raises(TypeError, match="loss_fn must be callable.*compute_loss"):
        create_trainer(model, sgd(model), loss_fn)


@pytest.mark.parametrize(
    ("argument", "value", "what"),
    [
        ("loss_fn", nn.CrossEntropyLoss, r"a function of \(y_pred, y\), got the class CrossEntropyLoss; make one: CrossEnt"),
        ("model_transform", nn.Sigmoid, r"a function of the model's output, got the class Sigmoid; make one: Sigmoid\(\)"),
    ],
    ids=["loss_fn", "model_transform"],
)
def test_class_in_place_of_a_function(argument, value, what):
    with pytest.raises(TypeError, match=f"{argument} must be {what}"):
        trainer_of(**{argument: value})


def test_class_in_place_of_compute_loss():
    class Objective:
        def __call__(self, model, batch):
            return mse_loss(model(batch[0]), batch[1])

    model = linear()
    with pytest.raises(
        TypeError, match=r"compute_loss must be a function of \(model, batch\), got the class Objective; make one"
    ):
        create_trainer(model, sgd(model), None, compute_loss=Objective)
    assert create_trainer(model, sgd(model), None, compute_loss=Objective()).run(batches()).optimizer_step == 3


def test_class_that_serves_as_a_function():
    seen = namedtuple("seen", ["x", "y", "y_pred", "loss"])
    loss_fn = lambda rows, y: mse_loss(torch.stack(rows), y)  # noqa: E731
    state = trainer_of(loss_fn=loss_fn, model_transform=tuple, output_transform=seen).run(batches())
    assert [type(state.output), type(state.output.y_pred)] == [seen, tuple]


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("loss_fn", mse_loss),
        ("model_transform", torch.sigmoid),
        ("output_transform", lambda x, y, y_pred, loss: loss),
        ("prepare_batch", lambda batch, device, non_blocking: batch),
    ],
)
def test_compute_loss_with_what_it_replaces(argument, value):
    model = linear()
    with pytest.raises(ValueError, match=f"compute_loss .* {argument} can't be used"):
        create_trainer(model, sgd(model), **{"loss_fn": None, "compute_loss": lambda model, batch: 0, argument: value})


# -- model, optimizer, scheduler --------------------------------------------------------------------------------------


@pytest.mark.parametrize("create", [lambda model: create_trainer(model, sgd(linear()), mse_loss), create_evaluator])
@pytest.mark.parametrize(
    ("model", "what"),
    [("resnet", "str"), (None, "NoneType"), (nn.Linear, r"the class Linear; make one: Linear\(\.\.\.\)")],
    ids=["text", "none", "class"],
)
def test_model_that_is_none(model, what, create):
    with pytest.raises(TypeError, match=rf"must be a torch\.nn\.Module, got {what}"):
        create(model)


def test_optimizer_of_another_model():
    with pytest.raises(ValueError, match="optimizer SGD .* holds no parameter of the model"):
        trainer_of(linear(), sgd(linear()))


def test_one_of_several_optimizers_is_of_another_model():
    model = linear()
    with pytest.raises(ValueError, match="optimizer Adam .* holds no parameter of the model"):
        trainer_of(model, [sgd(model), torch.optim.Adam(linear().parameters())])


def test_optimizer_made_before_the_model_was_copied():
    model = linear()
    optimizer = sgd(model)
    with pytest.raises(ValueError, match=r"holds no parameter of the model.*model\.parameters\(\)"):
        trainer_of(copy.deepcopy(model), optimizer)


def test_parameters_that_no_optimizer_holds_are_warned_of(caplog):
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    optimizer = sgd(model)
    model[1] = nn.Linear(2, 2)  # after the optimizer was made
    trainer_of(model, optimizer)
    assert "2 parameters of phase 'model' want a gradient and are in no optimizer" in caplog.text
    assert "1.weight, 1.bias" in caplog.text


def test_frozen_parameters_need_no_optimizer(caplog):
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    model[1].requires_grad_(False)
    trainer_of(model, sgd(model[0]))
    assert caplog.text == ""


def test_optimizer_without_parameters():
    model = linear()
    optimizer = sgd(model)
    optimizer.param_groups[0]["params"] = []
    with pytest.raises(ValueError, match="optimizer SGD .* holds no parameters"):
        trainer_of(model, optimizer)


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda model: [], ValueError, "at least one, got an empty one"),
        (lambda model: "adam", TypeError, "must be a torch.optim.Optimizer.*got str"),
        (
            lambda model: torch.optim.SGD,
            TypeError,
            "must be a torch.optim.Optimizer.*got the class SGD; make one: SGD\\(\\.\\.\\.\\)",
        ),
        (lambda model: [sgd(model), None], TypeError, "must be a torch.optim.Optimizer.*got NoneType"),
        (lambda model: [sgd(model), sgd(model)], ValueError, "stepped twice"),
        (lambda model: torch.optim.LBFGS(model.parameters()), TypeError, "LBFGS"),
    ],
)
def test_optimizer_that_can_not_train(make, error, match):
    model = linear()
    with pytest.raises(error, match=match):
        create_trainer(model, make(model), mse_loss)


def test_scheduler_of_another_optimizer():
    with pytest.raises(ValueError, match="scheduler StepLR was made for another optimizer"):
        trainer_of(scheduler=StepLR(sgd(linear()), 1))


def test_same_scheduler_twice():
    model = linear()
    optimizer = sgd(model)
    scheduler = StepLR(optimizer, 1)
    with pytest.raises(ValueError, match="scheduler StepLR is attached already"):
        trainer_of(model, optimizer, scheduler=[scheduler, scheduler])


@pytest.mark.parametrize(
    ("scheduler", "what"),
    [
        ("cosine", "str without 'step'"),
        (lambda step: 0.1, "function without 'step'"),
        (StepLR, r"the class StepLR; make one: StepLR\(\.\.\.\)"),
    ],
    ids=["text", "function", "class"],
)
def test_scheduler_that_is_none(scheduler, what):
    with pytest.raises(TypeError, match=rf"scheduler must be a torch\.optim\.lr_scheduler, got {what}"):
        trainer_of(scheduler=scheduler)


def test_scheduler_that_is_given_and_attached_too():
    model = linear()
    optimizer = sgd(model)
    scheduler = StepLR(optimizer, 1)
    trainer = trainer_of(model, optimizer, scheduler=scheduler)
    for name in (None, "LRScheduling2"):
        with pytest.raises(ValueError, match="StepLR is attached already: it would move twice as fast.*not both"):
            LRScheduling(scheduler).attach(trainer, name)


def test_scheduler_that_follows_a_metric():
    model = linear()
    optimizer = sgd(model)
    with pytest.raises(ValueError, match=r"ReduceLROnPlateau follows a metric.*LRScheduling\(scheduler, metric="):
        trainer_of(model, optimizer, scheduler=ReduceLROnPlateau(optimizer))


@pytest.mark.parametrize("with_scheduler", [True, False])
def test_unknown_schedule_every(with_scheduler):
    model = linear()
    optimizer = sgd(model)
    scheduler = StepLR(optimizer, 1) if with_scheduler else None
    with pytest.raises(ValueError, match="schedule_every must be 'step' or 'epoch', got 'batch'"):
        trainer_of(model, optimizer, scheduler=scheduler, schedule_every="batch")


@pytest.mark.parametrize(("model", "device"), [("cpu", "meta"), ("meta", "cpu"), ("cpu", "cuda")])
def test_model_on_another_device(model, device):
    with pytest.raises(ValueError, match=f"device is '{device}' but the model is on '{model}'"):
        trainer_of(nn.Linear(3, 2, device=model), device=device)


@pytest.mark.parametrize("device", [None, "meta"])
def test_model_without_values_in_its_parameters(device):
    with pytest.raises(ValueError, match=r"the model is on 'meta'.*to_empty"):
        trainer_of(nn.Linear(3, 2, device="meta"), device=device)


# -- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0, -1, 1.5, "2", None])
def test_accumulation_steps(value):
    with pytest.raises(ValueError, match=f"accumulation_steps must be a positive integer, got {value!r}"):
        trainer_of(accumulation_steps=value)


@pytest.mark.parametrize("value", ["fp8", "float16", True, 16, torch.float32, torch.float64])
def test_unknown_amp(value):
    with pytest.raises(ValueError, match=f"amp must be None, 'bf16', 'fp16'.* got {value!r}"):
        trainer_of(amp=value)


@pytest.mark.parametrize("argument", ["clip_grad_norm", "clip_grad_value"])
@pytest.mark.parametrize("value", [-1.0, 0, float("nan"), "1", True])
def test_clip_bound(argument, value):
    with pytest.raises(ValueError, match=rf"{argument} .*must be a positive number, got {value!r}"):
        trainer_of(**{argument: value})


@pytest.mark.parametrize(
    ("argument", "value", "allowed"),
    [
        ("loss_weight", "tokens", "'batch', 'samples' or a function"),
        ("loss_weight", None, "'batch', 'samples' or a function"),
        ("partial_window", "keep", "'step' or 'drop'"),
    ],
)
def test_unknown_choice(argument, value, allowed):
    with pytest.raises(ValueError, match=f"{argument} must be {allowed}.*got {value!r}"):
        trainer_of(**{argument: value})


# -- metrics ----------------------------------------------------------------------------------------------------------


def judges(folder, optimizer):
    return {
        "early stopping": EarlyStopping("val/acuracy"),
        "rotation": CheckpointRotation(folder, keep_best=1, metric="val/acuracy"),
        "schedule": LRScheduling(ReduceLROnPlateau(optimizer), metric="val/acuracy"),
    }


@pytest.mark.parametrize("with_evaluation", [True, False])
@pytest.mark.parametrize("kind", ["early stopping", "rotation", "schedule"])
def test_metric_that_never_appears(kind, with_evaluation, tmp_path):
    model = linear()
    optimizer = sgd(model)
    trainer = trainer_of(model, optimizer)
    judges(tmp_path, optimizer)[kind].attach(trainer)
    if with_evaluation:
        Evaluation(create_evaluator(model, {"loss": Loss(mse_loss)}), batches()).attach(trainer)
    known = "'val/loss'" if with_evaluation else "none"
    with pytest.raises(ValueError, match=f"no metric named 'val/acuracy' by the end of epoch 1.*has {known}") as caught:
        trainer.run(batches(3), max_epochs=5)
    assert names_iteration(caught, 3)


def test_metric_that_is_a_class():
    with pytest.raises(TypeError, match=r"metrics\['accuracy'\] must be .*got the class Accuracy; make one: Accuracy\(\)"):
        create_evaluator(linear(), {"accuracy": Accuracy})


def test_evaluation_that_is_attached_to_its_own_evaluator():
    evaluator = create_evaluator(linear())
    with pytest.raises(ValueError, match=r"attach it to the trainer: Evaluation\(evaluator, data\)\.attach\(trainer\)"):
        Evaluation(evaluator, batches()).attach(evaluator)


# -- checkpoints and patterns -----------------------------------------------------------------------------------------


def rotation_of(folder, model=None, optimizer=None):
    return CheckpointRotation(folder).attach(trainer_of(model, optimizer))


@pytest.fixture
def checkpoint(tmp_path):
    rotation = rotation_of(tmp_path / "run")
    rotation.engine.run(batches())
    return rotation.last


def test_checkpoint_that_is_not_there(tmp_path):
    with pytest.raises(RuntimeError, match=r"missing\.pt isn't there"):
        rotation_of(tmp_path).resume(tmp_path / "missing.pt")


def test_best_checkpoint_that_is_not_there(checkpoint):
    with pytest.raises(RuntimeError, match="no best checkpoint"):
        rotation_of(checkpoint.parent).resume("best")


@pytest.mark.parametrize("which", ["auto", "path"])
@pytest.mark.parametrize(
    ("make", "match"),
    [
        (
            lambda: nn.Linear(3, 4),
            r"3\.pt can't be resumed here: .* yours \(phase 'model'\): .*weight \(\(2, 3\) in the checkpoint, \(4, 3\) here\)",
        ),
        (lambda: nn.Sequential(linear()), "only the checkpoint has weight, bias; only the model has 0.weight, 0.bias"),
    ],
    ids=["other shape", "other names"],
)
def test_checkpoint_of_another_model(checkpoint, make, match, which):
    model = make()
    before = weights(model)
    rotation = rotation_of(checkpoint.parent, model)
    with pytest.raises(ValueError, match=match):
        rotation.resume(checkpoint if which == "path" else "auto")
    assert same(weights(model), before)
    assert rotation.engine.state.optimizer_step == 0


def test_checkpoint_of_another_optimizer(checkpoint):
    model = linear()
    with pytest.raises(ValueError, match="optimizer is of another kind than the Adam"):
        rotation_of(checkpoint.parent, model, torch.optim.Adam(model.parameters())).resume(checkpoint)


def test_folder_of_checkpoints_in_place_of_one(checkpoint):
    folder = checkpoint.parent
    match = rf"is a folder of checkpoints.* such as {checkpoint}, or attach CheckpointRotation\('{folder}'\) .*resume\('auto'\)"
    with pytest.raises(RuntimeError, match=match):
        rotation_of(folder.parent).resume(folder)
    with pytest.raises(RuntimeError, match=match):
        load_weights(linear(), folder)


@pytest.mark.parametrize("folder", ["file", "file/below"])
def test_folder_that_can_not_be_written(folder, tmp_path):
    (tmp_path / "file").write_text("")
    trainer = trainer_of()
    with pytest.raises(OSError, match=r"dirname: checkpoints can't be written there \(.*file is a file, not a folder\)"):
        CheckpointRotation(tmp_path / folder).attach(trainer)
    assert trainer.handlers == {}


def test_weights_of_another_model(tmp_path):
    path = save_weights(linear(), tmp_path / "weights.pt")
    with pytest.raises(
        ValueError, match=r"weights\.pt was written for another model than this Linear: these have other shapes"
    ):
        load_weights(nn.Linear(3, 4), path)
    with pytest.raises(RuntimeError, match=r"missing\.pt isn't there"):
        load_weights(linear(), tmp_path / "missing.pt")


def test_weights_that_lie_below(tmp_path):
    model = linear()
    content = {"epoch": 3, "optimizer": sgd(model).state_dict(), "model": nn.DataParallel(model).state_dict()}
    torch.save(content, tmp_path / "epoch3.pt")
    match = r"epoch3\.pt holds more .* lie under 'model'; load them by model\.load_state_dict\(torch\.load\('.*\)\['model'\]\)"
    with pytest.raises(RuntimeError, match=match):
        load_weights(model, tmp_path / "epoch3.pt")


@pytest.mark.parametrize(
    "use",
    [
        lambda: freeze(linear(), "weight", "encoder.*"),
        lambda: unfreeze(linear(), "encoder.*"),
        lambda: FreezeParameters("encoder.*").attach(trainer_of(linear())),
    ],
    ids=["freeze", "unfreeze", "FreezeParameters"],
)
def test_pattern_that_matches_no_parameter(use):
    with pytest.raises(ValueError, match=r"'encoder\.\*' matches no parameter; the model has weight, bias"):
        use()


# -- NaN --------------------------------------------------------------------------------------------------------------


def with_nan(at):
    data = batches()
    data[at - 1][0][0, 0] = float("nan")
    return data


def test_nan_without_a_guard_is_as_in_a_plain_loop():
    model, expected = linear(), linear()
    losses = []
    trainer = trainer_of(model)
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: losses.append(float(trainer.state.output)))
    trainer.run(with_nan(at=2))
    optimizer = sgd(expected)
    for x, y in with_nan(at=2):
        optimizer.zero_grad()
        mse_loss(expected(x), y).backward()
        optimizer.step()
    torch.testing.assert_close(weights(model), weights(expected), rtol=0, atol=0, equal_nan=True)
    assert [loss == loss for loss in losses] == [True, False, False]
    assert trainer.state.optimizer_step == 3


@pytest.mark.parametrize("amp", [None, "bf16", "fp16"])
def test_nan_with_a_guard_that_raises(amp):
    model, expected = linear(), linear()
    trainer = trainer_of(model, amp=amp)
    NonFiniteGuard().attach(trainer)
    with pytest.raises(FloatingPointError, match="the loss of iteration 2 is nan") as caught:
        trainer.run(with_nan(at=2))
    trainer_of(expected, amp=amp).run(batches(1))
    assert names_iteration(caught, 2)
    assert same(weights(model), weights(expected))


@pytest.mark.parametrize(("action", "step", "skipped"), [("skip", 2, 1), ("stop", 1, 1)])
def test_nan_with_a_guard_that_does_not_raise(action, step, skipped):
    model = linear()
    trainer = trainer_of(model)
    NonFiniteGuard(action).attach(trainer)
    state = trainer.run(with_nan(at=2))
    assert (state.optimizer_step, state.skipped_steps) == (step, skipped)
    assert all(tensor.isfinite().all() for tensor in weights(model))
    assert (state.stop_reason is not None) == (action == "stop")


# -- after the mistake ------------------------------------------------------------------------------------------------


MOMENTS = [
    *StepEvents,
    *(Events.EPOCH_STARTED, Events.GET_BATCH_STARTED, Events.GET_BATCH_COMPLETED),
    *(Events.ITERATION_STARTED, Events.ITERATION_COMPLETED, Events.EPOCH_COMPLETED),
]


def small_batches():
    """Without an overflow in half precision."""
    return [(0.1 * x, 0.1 * y) for x, y in batches()]


@pytest.mark.parametrize("accumulation_steps", [1, 2])
@pytest.mark.parametrize("event", MOMENTS, ids=lambda event: event.name)
def test_next_run_after_an_exception_trains_whole_epochs(event, accumulation_steps):
    """It goes on with the next epoch, as after ``terminate()``, and nothing of the window that was open is left."""
    model, expected = linear(), linear()
    trainer = trainer_of(model, accumulation_steps=accumulation_steps, amp="fp16")
    if event is StepEvents.OPTIMIZER_STEP_SKIPPED:
        overflow = lambda: model.weight.grad.fill_(float("inf"))  # noqa: E731
        trainer.add_event_handler(StepEvents.BACKWARD_COMPLETED(once=accumulation_steps), overflow)
    with trainer.add_event_handler(event(once=1), lambda: 1 / 0), pytest.raises(ZeroDivisionError) as caught:
        trainer.run(small_batches(), max_epochs=2)
    assert any("epoch 1, iteration" in note for note in caught.value.__notes__)
    expected.load_state_dict(model.state_dict())
    steps = trainer.state.optimizer_step
    trainer.run(small_batches(), max_epochs=2)
    state = trainer_of(expected, accumulation_steps=accumulation_steps, amp="fp16").run(small_batches())
    assert trainer.state.optimizer_step - steps == state.optimizer_step > 0
    assert same(weights(model), weights(expected))


@pytest.mark.parametrize("event", [*list(StepEvents)[:-1], Events.STARTED, Events.COMPLETED], ids=lambda event: event.name)
def test_run_after_an_exception_in_its_last_epoch_begins_anew(event):
    trainer, seen = trainer_of(), []
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: seen.append(trainer.state.iteration))
    with trainer.add_event_handler(event, lambda: 1 / 0), pytest.raises(ZeroDivisionError):
        trainer.run(batches())
    seen.clear()
    state = trainer.run(batches())
    assert (seen, state.epoch, state.optimizer_step) == ([1, 2, 3], 1, 3)


@pytest.mark.parametrize("bad", [[], [None] * 3, Broken()], ids=["empty", "no pairs", "broken"])
def test_trainer_runs_after_bad_data(bad):
    model, expected = linear(), linear()
    trainer = trainer_of(model)
    with pytest.raises((ValueError, TypeError, OSError), match="size|pair|disk"):
        trainer.run(bad)
    trainer.run(batches())
    trainer_of(expected).run(batches())
    assert same(weights(model), weights(expected))


def test_a_phase_that_there_is_not():
    trainer = trainer_of()
    with pytest.raises(ValueError, match=r"phase must be one of \['model'\], got 'modle'"):
        trainer.on(StepEvents.GRADIENTS_READY(phase="modle"))(print)


def test_a_metric_that_the_last_evaluation_did_not_bring_either():
    trainer = trainer_of()
    evaluator = create_evaluator(trainer.primary.module, metrics={"l": Loss(torch.nn.functional.mse_loss)})
    Evaluation(evaluator, batches(1), every=Events.EPOCH_COMPLETED(every=5)).attach(trainer)
    EarlyStopping("val/loss", mode="min").attach(trainer)
    with pytest.raises(ValueError, match="no metric named 'val/loss' in the whole run; engine.state.metrics has 'val/l'"):
        trainer.run(batches(2), max_epochs=3)


@pytest.mark.parametrize("argument", ["prepare_batch", "model_transform", "output_transform"])
def test_what_an_evaluator_cannot_call(argument):
    with pytest.raises(TypeError, match=f"{argument} must be callable, got 3"):
        create_evaluator(torch.nn.Linear(2, 1), **{argument: 3})


def test_evaluation_data_that_can_be_passed_over_once():
    with pytest.raises(TypeError, match="data must be batches that can be passed over again and again"):
        Evaluation(create_evaluator(torch.nn.Linear(2, 1)), iter(batches(2)))
