"""What ``explain(speed=True)`` finds in a run, and that it leaves the run as it was. No test looks at how fast anything is."""

import os
import re
import subprocess
import sys

import pytest
import torch
from speed_runs import FIGURE, game, picture_data, picture_trainer, said
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import DataLoader, IterableDataset
from toys import batches, linear, sgd, trainer_of

from camshaft import GradientPenalty, Phase, StepEvents, Trainer, create_trainer
from camshaft.reports.speed import about_data, about_kernel, is_quick_at_bf16
from camshaft.reports.timing import time_kernel

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


CHANNELS_LAST = "model.to(memory_format=torch.channels_last)"


needs_bf16 = pytest.mark.skipif(not is_quick_at_bf16(CPU), reason="the CPU has no instructions for bfloat16")


def sentence(word, text):
    """All that is said of a word: where it is advised, and why; or that it gains nothing."""
    (found,) = re.findall(rf"^.*{re.escape(word)}.*(?:\n      .*)?", text, re.MULTILINE)
    return found


def taken(text):
    line = next((line for line in text.splitlines() if line.startswith("taken already: ")), "")
    return re.split(r", (?!\w+=)(?!\.)", line.removeprefix("taken already: "))


def words(advice):
    return [item.suggestion for item in advice if not item.enabled]


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad])
def test_a_fused_optimizer_is_measured(kind):
    model = linear()
    text = said(trainer_of(model, kind(model.parameters(), lr=0.01)))
    assert re.search(FIGURE, sentence(f"torch.optim.{kind.__name__}(..., fused=True)", text))


def test_an_optimizer_without_a_fused_form_is_measured_in_the_foreach_one():
    model = linear()
    text = said(trainer_of(model, torch.optim.RMSprop(model.parameters())))
    assert re.search(FIGURE, sentence("torch.optim.RMSprop(..., foreach=True)", text))


@pytest.mark.parametrize(
    ("kind", "form"), [(torch.optim.AdamW, "fused"), (torch.optim.SGD, "fused"), (torch.optim.RMSprop, "foreach")]
)
def test_a_form_that_is_taken_is_not_advised(kind, form):
    model = linear()
    text = said(trainer_of(model, kind(model.parameters(), **{form: True})))
    assert f"torch.optim.{kind.__name__}(..., {form}=True)" in taken(text)


def test_one_group_without_the_form_is_enough_to_advise_it():
    model = linear()
    groups = [{"params": [model.weight], "fused": True}, {"params": [model.bias], "fused": False}]
    assert words(about_kernel(torch.optim.SGD(groups))) == ["torch.optim.SGD(..., fused=True)"]


def test_foreach_is_what_torch_takes_by_itself_but_for_a_cpu():
    optimizer = torch.optim.RMSprop([torch.zeros(2, device="meta", requires_grad=True)])
    assert [(advice.suggestion, advice.enabled) for advice in about_kernel(optimizer)] == [
        ("torch.optim.RMSprop(..., foreach=True)", True)
    ]


def test_a_differentiable_optimizer_has_no_other_form():
    assert list(about_kernel(torch.optim.Adam([torch.zeros(2, requires_grad=True)], differentiable=True))) == []


def test_complex_parameters_have_no_fused_form():
    optimizer = torch.optim.Adam([torch.zeros(2, dtype=torch.complex64, requires_grad=True)])
    assert words(about_kernel(optimizer)) == ["torch.optim.Adam(..., foreach=True)"]


def test_sparse_gradients_have_no_fused_form():
    model = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Linear(3, 2))
    trainer = create_trainer(model, sgd(model), None, compute_loss=lambda model, batch: model(batch).mean())
    assert "torch.optim" not in said(trainer)


def test_several_optimizers_of_a_phase_are_each_measured():
    model = linear()
    pair = [torch.optim.Adam([model.weight]), torch.optim.SGD([model.bias])]
    text = said(trainer_of(model, pair))
    assert all(re.search(FIGURE, sentence(f"torch.optim.{name}(..., fused=True)", text)) for name in ("Adam", "SGD"))


def test_more_than_fits_is_not_copied():
    expanded = torch.zeros(1).expand(2**28).requires_grad_()  # a single number in memory, a gibibyte as a copy
    assert time_kernel(torch.optim.SGD([expanded]), "fused") == "not measured: copies of 1 tensors would take 6.0 GiB"


class Thorough(torch.optim.SGD):
    """An optimizer that clears gradients in a way of its own."""

    def zero_grad(self, set_to_none=True):
        super().zero_grad(set_to_none=False)


def test_a_zero_grad_of_ones_own_is_named():
    model = linear()
    text = said(trainer_of(model, Thorough(model.parameters(), lr=0.1)))
    assert "Thorough.zero_grad" in sentence("zero_grad(set_to_none=True)", text)


def test_torchs_zero_grad_is_not_named():
    assert "zero_grad" not in said(trainer_of())


def test_who_listens_to_every_optimizer_does_not_hear_of_copies():
    trainer, stepped = trainer_of(), []
    handle = register_optimizer_step_post_hook(lambda *_: stepped.append(1))
    try:
        assert re.search(FIGURE, said(trainer))
        assert stepped == []
        trainer.run(batches(2))
    finally:
        handle.remove()
    assert stepped == [1, 1]


def test_channels_last_is_measured_on_the_last_batch():
    trainer = picture_trainer()
    trainer.run(DataLoader(picture_data(), 4))
    assert re.search(FIGURE, sentence(CHANNELS_LAST, said(trainer)))


def test_channels_last_is_not_measured_before_a_batch_is_seen():
    assert "not measured: no batch has been seen yet" in sentence(CHANNELS_LAST, said(picture_trainer()))


def test_channels_last_is_not_measured_where_the_objective_is_the_users():
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    trainer = create_trainer(model, sgd(model), None, compute_loss=lambda model, batch: model(batch).mean())
    trainer.run([torch.randn(2, 3, 5, 5)])
    assert "only its objective knows how the network is called" in sentence(CHANNELS_LAST, said(trainer))


def test_channels_last_that_is_taken_is_not_advised():
    trainer = picture_trainer()
    trainer.primary.module.to(memory_format=torch.channels_last)
    assert CHANNELS_LAST in taken(said(trainer))


def test_channels_last_is_for_convolutions_alone():
    assert "channels_last" not in said(trainer_of())


def test_convolutions_in_three_dimensions_have_a_layout_of_their_own():
    model = nn.Conv3d(2, 3, 3)
    text = said(trainer_of(model, sgd(model)))
    assert "torch.channels_last_3d" in text
    assert CHANNELS_LAST not in text


@needs_bf16
def test_mixed_precision_is_measured():
    trainer = trainer_of()
    trainer.run(batches(2))
    assert re.search(FIGURE, sentence('MixedPrecision("bf16").attach(trainer)', said(trainer)))


def test_mixed_precision_that_is_taken_is_not_advised():
    text = said(trainer_of(amp="bf16"))
    assert "mixed precision in bfloat16" in taken(text)
    assert "MixedPrecision" not in text


def test_a_compiled_network_is_not_to_be_compiled():
    model = linear()
    optimizer = sgd(model)
    assert "torch.compile(model)" in taken(said(trainer_of(torch.compile(model, backend="eager"), optimizer)))


def test_a_network_with_hooks_is_not_copied():
    trainer, called = picture_trainer(), []
    trainer.run(DataLoader(picture_data(), 4))
    trainer.primary.module[0].register_forward_hook(lambda *_: called.append(1))
    assert "there are hooks on the network" in sentence(CHANNELS_LAST, said(trainer))
    assert called == []


class Uncopied(nn.Conv2d):
    """A layer of which there can be no second one."""

    def __deepcopy__(self, memo):
        raise TypeError("there is but one of me")


def test_a_network_that_cannot_be_copied_is_said_to_be_so():
    trainer = picture_trainer(Uncopied)
    trainer.run(DataLoader(picture_data(), 4))
    assert "not measured: TypeError: there is but one of me" in sentence(CHANNELS_LAST, said(trainer))


def test_a_wrapped_network_is_not_measured():
    trainer = picture_trainer()
    trainer.run(DataLoader(picture_data(), 4))
    trainer.primary.module = nn.DataParallel(trainer.primary.module)
    assert "the network is wrapped (DataParallel)" in sentence(CHANNELS_LAST, said(trainer))


UNKNOWN = "not known before the first run: the data, and what its loader could do"


def test_before_the_first_run_the_data_is_not_known():
    assert said(trainer_of()).endswith(UNKNOWN)


def test_after_a_run_the_data_is_known():
    trainer = trainer_of()
    trainer.run(batches(2))
    assert UNKNOWN not in said(trainer)


@pytest.mark.usefixtures("collected")
def test_the_time_worker_start_is_measured():
    trainer = picture_trainer()
    trainer.run(DataLoader(picture_data(), 4, num_workers=1), max_epochs=2)
    assert re.search(r"measured \d+ ms an epoch", sentence("DataLoader(..., persistent_workers=True)", said(trainer)))


@pytest.mark.usefixtures("collected")
def test_workers_that_persist_are_not_advised():
    trainer = picture_trainer()
    trainer.run(DataLoader(picture_data(), 4, num_workers=1, persistent_workers=True), max_epochs=2)
    assert "DataLoader(..., persistent_workers=True)" in taken(said(trainer))


def test_workers_of_one_epoch_need_not_persist():
    loader = DataLoader(picture_data(), 4, num_workers=1)
    assert list(about_data(loader, CPU, non_blocking=True, epochs=1)) == []


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core has no room for workers")
def test_workers_are_advised_where_there_are_none():
    (word,) = words(about_data(DataLoader(picture_data(), 4), CPU, non_blocking=True, epochs=2))
    assert re.fullmatch(r"DataLoader\(\.\.\., num_workers=[1-4]\)", word)


class Stream(IterableDataset):
    """Samples without a number."""

    def __iter__(self):
        return iter(range(4))


def test_workers_are_not_advised_where_each_would_give_every_sample():
    assert list(about_data(DataLoader(Stream()), CPU, non_blocking=True, epochs=2)) == []


def test_a_gpu_wants_pinned_batches_fetched_ahead():
    found = words(about_data(DataLoader(picture_data(), 4, num_workers=1), CUDA, non_blocking=True, epochs=1))
    assert found == ["DataLoader(..., pin_memory=True)", "Prefetch(loader, device)"]


def test_pinned_batches_want_copies_that_do_not_wait():
    loader = DataLoader(picture_data(), 4, num_workers=1, pin_memory=True)
    assert "non_blocking=True" in words(about_data(loader, CUDA, non_blocking=False, epochs=1))
    assert "non_blocking=True" not in words(about_data(loader, CUDA, non_blocking=True, epochs=1))


def test_a_gpu_gets_no_advice_of_data_that_is_not_known():
    assert list(about_data(None, CUDA, non_blocking=True, epochs=None)) == []


def test_anomaly_detection_is_named():
    with torch.autograd.set_detect_anomaly(True, check_nan=False):
        text = said(trainer_of())
    assert "a setting of the whole process" in sentence("torch.autograd.set_detect_anomaly(False)", text)
    assert "anomaly" not in said(trainer_of())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_a_gpu_has_settings_of_its_own():
    trainer = trainer_of(picture_trainer().primary.module.cuda(), loss_fn=nn.functional.cross_entropy)
    trainer.run(DataLoader(picture_data(), 4))
    text = said(trainer)
    assert all(word in text for word in ("torch.backends.cudnn.benchmark = True", "pin_memory=True", "Prefetch"))


def test_both_networks_of_a_gan_are_measured_by_name():
    trainer = game()
    trainer.run([torch.randn(3, 2)] * 2)
    found = re.findall(rf"(\w+): Adam steps 2 tensors on cpu without it; {FIGURE}", said(trainer))
    assert sorted(found) == ["discriminator", "generator"]


def test_a_network_is_measured_in_the_others_turn_too():
    trainer, texts = game(), []
    trainer.on(StepEvents.FORWARD_COMPLETED(phase="generator", once=1))(lambda engine: texts.append(said(engine)))
    trainer.run([torch.randn(3, 2)] * 2)
    assert re.search(rf"discriminator: Adam steps 2 tensors on cpu without it; {FIGURE}", texts[0])
    assert all(parameter.requires_grad for parameter in trainer.primary.module.parameters())


def test_a_network_whose_gradient_is_penalised_is_not_to_be_compiled():
    compiled = re.findall(r"(\w+): Linear runs one operation", said(game(penalty=GradientPenalty())))
    assert "discriminator" not in compiled


def test_phases_with_objectives_of_ones_own():
    model = linear()
    phase = Phase("mine", model, sgd(model), lambda engine, batch: model(batch[0]).square().mean())
    trainer = Trainer([phase])
    trainer.run(batches(2))
    assert "torch.optim.SGD(..., fused=True)" in said(trainer)


TWO = """
import torch
from torch.nn.parallel import DistributedDataParallel
from camshaft import create_trainer
torch.distributed.init_process_group("gloo")
model = DistributedDataParallel(torch.nn.Linear(3, 2))
trainer = create_trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), torch.nn.functional.mse_loss)
trainer.run([(torch.ones(2, 3), torch.ones(2, 2))] * 2)
if torch.distributed.get_rank() == 0:
    print(trainer.explain(speed=True), flush=True)
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_of_several_processes_one_can_ask_and_nothing_is_measured(tmp_path):
    script = tmp_path / "two.py"
    script.write_text(TWO)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=True)
    assert "not measured: several processes train" in sentence("torch.optim.SGD(..., fused=True)", done.stdout)
    assert "times as fast" not in done.stdout
