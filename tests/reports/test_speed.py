"""What ``explain(speed=True)`` suggests for optimizers and models. No test depends on how fast anything is."""

import re
import subprocess
import sys

import pytest
import torch
from speed_runs import (
    MEASUREMENT,
    advice_about,
    already_enabled,
    picture_data,
    picture_trainer,
    small_gan,
    speed_report,
    suggestions,
)
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import DataLoader
from toys import batches, data_parallel, linear, sgd, trainer_of, without_gpus

from camshaft import GradientPenalty, Phase, StepEvents, Trainer, create_trainer
from camshaft.reports.speed import about_kernel, is_quick_at_bf16
from camshaft.reports.timing import time_kernel

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


CHANNELS_LAST = "model.to(memory_format=torch.channels_last)"


needs_bf16 = pytest.mark.skipif(not is_quick_at_bf16(CPU), reason="the CPU has no instructions for bfloat16")


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad])
def test_a_fused_optimizer_is_measured(kind):
    model = linear()
    text = speed_report(trainer_of(model, kind(model.parameters(), lr=0.01)))
    assert re.search(MEASUREMENT, advice_about(f"torch.optim.{kind.__name__}(..., fused=True)", text))


def test_an_optimizer_without_a_fused_kernel_is_measured_with_foreach():
    model = linear()
    text = speed_report(trainer_of(model, torch.optim.RMSprop(model.parameters())))
    assert re.search(MEASUREMENT, advice_about("torch.optim.RMSprop(..., foreach=True)", text))


@pytest.mark.parametrize(
    ("kind", "form"), [(torch.optim.AdamW, "fused"), (torch.optim.SGD, "fused"), (torch.optim.RMSprop, "foreach")]
)
def test_an_enabled_kernel_is_not_suggested(kind, form):
    model = linear()
    text = speed_report(trainer_of(model, kind(model.parameters(), **{form: True})))
    assert f"torch.optim.{kind.__name__}(..., {form}=True)" in already_enabled(text)


def test_a_kernel_is_suggested_if_one_group_does_not_use_it():
    model = linear()
    groups = [{"params": [model.weight], "fused": True}, {"params": [model.bias], "fused": False}]
    assert suggestions(about_kernel(torch.optim.SGD(groups))) == ["torch.optim.SGD(..., fused=True)"]


def test_foreach_counts_as_enabled_where_torch_uses_it_by_default():
    optimizer = torch.optim.RMSprop([torch.zeros(2, device="meta", requires_grad=True)])
    assert [(advice.suggestion, advice.enabled) for advice in about_kernel(optimizer)] == [
        ("torch.optim.RMSprop(..., foreach=True)", True)
    ]


def test_a_differentiable_optimizer_has_no_other_kernel():
    assert list(about_kernel(torch.optim.Adam([torch.zeros(2, requires_grad=True)], differentiable=True))) == []


def test_complex_parameters_have_no_fused_kernel():
    optimizer = torch.optim.Adam([torch.zeros(2, dtype=torch.complex64, requires_grad=True)])
    assert suggestions(about_kernel(optimizer)) == ["torch.optim.Adam(..., foreach=True)"]


def test_sparse_gradients_have_no_fused_kernel():
    model = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Linear(3, 2))
    trainer = create_trainer(model, sgd(model), None, compute_loss=lambda model, batch: model(batch).mean())
    assert "torch.optim" not in speed_report(trainer)


def test_each_optimizer_of_a_phase_is_measured():
    model = linear()
    pair = [torch.optim.Adam([model.weight]), torch.optim.SGD([model.bias])]
    text = speed_report(trainer_of(model, pair))
    assert all(re.search(MEASUREMENT, advice_about(f"torch.optim.{name}(..., fused=True)", text)) for name in ("Adam", "SGD"))


def test_parameters_that_do_not_fit_in_memory_are_not_copied():
    expanded = torch.zeros(1).expand(2**28).requires_grad_()  # one number in memory, but a copy takes 1 GiB
    assert time_kernel(torch.optim.SGD([expanded]), "fused") == "not measured: copies of 1 tensors would take 6.0 GiB"


class OverridesZeroGrad(torch.optim.SGD):
    """An optimizer that overrides ``zero_grad``."""

    def zero_grad(self, set_to_none=True):
        super().zero_grad(set_to_none=False)


def test_an_overridden_zero_grad_is_reported():
    model = linear()
    text = speed_report(trainer_of(model, OverridesZeroGrad(model.parameters(), lr=0.1)))
    assert "OverridesZeroGrad overrides zero_grad" in advice_about("zero_grad(set_to_none=True)", text)


def test_the_default_zero_grad_is_not_reported():
    assert "zero_grad" not in speed_report(trainer_of())


def test_global_optimizer_hooks_are_not_called_for_copies():
    trainer, stepped = trainer_of(), []
    handle = register_optimizer_step_post_hook(lambda *_: stepped.append(1))
    try:
        assert re.search(MEASUREMENT, speed_report(trainer))
        assert stepped == []
        trainer.run(batches(2))
    finally:
        handle.remove()
    assert stepped == [1, 1]


def test_channels_last_is_measured_on_the_last_batch():
    trainer = picture_trainer()
    trainer.run(DataLoader(picture_data(), 4))
    assert re.search(MEASUREMENT, advice_about(CHANNELS_LAST, speed_report(trainer)))


def test_channels_last_is_not_measured_before_a_batch_is_seen():
    assert "not measured: no batch has been seen yet" in advice_about(CHANNELS_LAST, speed_report(picture_trainer()))


def test_channels_last_is_not_measured_with_a_custom_objective():
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    trainer = create_trainer(model, sgd(model), None, compute_loss=lambda model, batch: model(batch).mean())
    trainer.run([torch.randn(2, 3, 5, 5)])
    assert "only the objective knows the arguments of the network" in advice_about(CHANNELS_LAST, speed_report(trainer))


def test_enabled_channels_last_is_not_suggested():
    trainer = picture_trainer()
    trainer.primary.module.to(memory_format=torch.channels_last)
    assert CHANNELS_LAST in already_enabled(speed_report(trainer))


def test_channels_last_is_suggested_only_for_convolutions():
    assert "channels_last" not in speed_report(trainer_of())


def test_3d_convolutions_use_channels_last_3d():
    model = nn.Conv3d(2, 3, 3)
    text = speed_report(trainer_of(model, sgd(model)))
    assert "torch.channels_last_3d" in text
    assert CHANNELS_LAST not in text


@needs_bf16
def test_mixed_precision_is_measured():
    trainer = trainer_of()
    trainer.run(batches(2))
    assert re.search(MEASUREMENT, advice_about('MixedPrecision("bf16").attach(trainer)', speed_report(trainer)))


def test_enabled_mixed_precision_is_not_suggested():
    text = speed_report(trainer_of(amp="bf16"))
    assert "mixed precision in bfloat16" in already_enabled(text)
    assert "MixedPrecision" not in text


def test_compiling_a_compiled_network_is_not_suggested():
    model = linear()
    optimizer = sgd(model)
    assert "torch.compile(model)" in already_enabled(speed_report(trainer_of(torch.compile(model, backend="eager"), optimizer)))


def test_a_network_with_compiled_parts_is_not_measured():
    trainer = picture_trainer()
    trainer.run(DataLoader(picture_data(), 4))
    trainer.primary.module[0].compile(backend="eager")
    text = speed_report(trainer)
    assert "torch.compile(model)" in already_enabled(text)
    assert "parts of the network are compiled" in advice_about(CHANNELS_LAST, text)


def test_a_network_with_hooks_is_not_copied():
    trainer, called = picture_trainer(), []
    trainer.run(DataLoader(picture_data(), 4))
    trainer.primary.module[0].register_forward_hook(lambda *_: called.append(1))
    assert "the network has hooks" in advice_about(CHANNELS_LAST, speed_report(trainer))
    assert called == []


class CannotBeCopied(nn.Conv2d):
    """A layer that cannot be copied."""

    def __deepcopy__(self, memo):
        raise TypeError("this layer cannot be copied")


def test_a_network_that_cannot_be_copied_is_reported():
    trainer = picture_trainer(CannotBeCopied)
    trainer.run(DataLoader(picture_data(), 4))
    assert "not measured: TypeError: this layer cannot be copied" in advice_about(CHANNELS_LAST, speed_report(trainer))


def test_a_wrapped_network_is_not_measured():
    trainer = picture_trainer()
    trainer.run(DataLoader(picture_data(), 4))
    trainer.primary.module = data_parallel(trainer.primary.module)
    assert "the network is wrapped (DataParallel)" in advice_about(CHANNELS_LAST, speed_report(trainer))


def test_anomaly_detection_is_reported():
    with torch.autograd.set_detect_anomaly(True, check_nan=False):
        text = speed_report(trainer_of())
    assert "a setting of the whole process" in advice_about("torch.autograd.set_detect_anomaly(False)", text)
    assert "anomaly" not in speed_report(trainer_of())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_settings_for_a_gpu_are_suggested():
    trainer = trainer_of(picture_trainer().primary.module.cuda(), loss_fn=nn.functional.cross_entropy)
    trainer.run(DataLoader(picture_data(), 4))
    text = speed_report(trainer)
    assert all(word in text for word in ("torch.backends.cudnn.benchmark = True", "pin_memory=True", "Prefetch"))


def test_both_networks_of_a_gan_are_measured():
    trainer = small_gan()
    trainer.run([torch.randn(3, 2)] * 2)
    found = re.findall(rf"(\w+): Adam steps 2 tensors on cpu without it; {MEASUREMENT}", speed_report(trainer))
    assert sorted(found) == ["discriminator", "generator"]


def test_each_network_is_measured_during_the_phase_of_the_other():
    trainer, texts = small_gan(), []
    trainer.on(StepEvents.FORWARD_COMPLETED(phase="generator", once=1))(lambda engine: texts.append(speed_report(engine)))
    trainer.run([torch.randn(3, 2)] * 2)
    assert re.search(rf"discriminator: Adam steps 2 tensors on cpu without it; {MEASUREMENT}", texts[0])
    assert all(parameter.requires_grad for parameter in trainer.primary.module.parameters())


def test_compiling_a_network_with_a_gradient_penalty_is_not_suggested():
    compiled = re.findall(r"(\w+): Linear runs one operation", speed_report(small_gan(penalty=GradientPenalty())))
    assert "discriminator" not in compiled


def test_phases_with_custom_objectives_are_supported():
    model = linear()
    phase = Phase("mine", model, sgd(model), lambda engine, batch: model(batch[0]).square().mean())
    trainer = Trainer([phase])
    trainer.run(batches(2))
    assert "torch.optim.SGD(..., fused=True)" in speed_report(trainer)


TWO_PROCESSES = """
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
def test_nothing_is_measured_with_several_processes(tmp_path):
    script = tmp_path / "two.py"
    script.write_text(TWO_PROCESSES)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=without_gpus(), check=True)
    assert "not measured: with several processes" in advice_about("torch.optim.SGD(..., fused=True)", done.stdout)
    assert "times as fast" not in done.stdout
