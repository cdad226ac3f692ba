"""What is public, where it lives, that it says what it does, and that imports only go down."""

import importlib
import inspect
import pkgutil
import types
from pathlib import Path

import pytest
from ignite.engine import Events

import camshaft
import camshaft.engines
import camshaft.handlers

ROOT = Path(camshaft.__file__).parent
MODULES = sorted(["camshaft", *(module.name for module in pkgutil.walk_packages([str(ROOT)], "camshaft."))])
ROOMS = ["camshaft", "camshaft.engines", "camshaft.handlers"]


def own(name):
    """A public name's object, where this package defines it."""
    thing = getattr(camshaft, name)
    return thing if getattr(thing, "__module__", "").startswith("camshaft") else None


OWN = [name for name in camshaft.__all__ if own(name) is not None]


# -- __all__ ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODULES)
def test_all_is_sorted_and_every_name_in_it_is_there(name):
    module = importlib.import_module(name)
    assert list(module.__all__) == sorted(set(module.__all__))
    assert [missing for missing in module.__all__ if not hasattr(module, missing)] == []


@pytest.mark.parametrize("name", ROOMS)
def test_a_rooms_all_is_what_is_public_in_it(name):
    module = importlib.import_module(name)
    public = [key for key, value in vars(module).items() if not key.startswith("_") and not isinstance(value, types.ModuleType)]
    public = [key for key in public if key not in ("ModuleType", "TYPE_CHECKING")]
    assert sorted(public) == module.__all__


def test_the_front_door_has_what_the_rooms_have():
    for room in (camshaft.engines, camshaft.handlers):
        assert [name for name in room.__all__ if getattr(camshaft, name, None) is not getattr(room, name)] == []


HANDLERS = camshaft.handlers.__all__
ENGINES = ["Phase", "Trainer", "create_evaluator", "create_gan_trainer", "create_trainer"]
ENGINES += ["DRAGAN", "GradientPenalty", "R1", "R2", "gradient_penalty"]
ENGINES += ["load_weights", "save_weights", "seed_everything", "worker_init_fn"]
OTHERS = ["Events", "StepEvents", "Priority", "freeze", "unfreeze", "count_parameters"]


@pytest.mark.parametrize("name", HANDLERS)
def test_handlers_import_from_two_doors(name):
    assert getattr(camshaft, name) is getattr(camshaft.handlers, name)


@pytest.mark.parametrize("name", ENGINES)
def test_engines_import_from_two_doors(name):
    assert getattr(camshaft, name) is getattr(camshaft.engines, name)


@pytest.mark.parametrize("name", OTHERS)
def test_everything_else_imports_from_the_front_door(name):
    assert name in camshaft.__all__


def test_events_are_ignites():
    assert camshaft.Events is Events


# -- signatures that scripts lean on ----------------------------------------------------------------------------------

SIGNATURES = {
    "create_trainer": "model, optimizer, loss_fn, *, device=None, non_blocking=True, amp=None, accumulation_steps=1, "
    "loss_weight='batch', partial_window='step', clip_grad_norm=None, clip_grad_value=None, scheduler=None, "
    "schedule_every='step', prepare_batch, model_transform, output_transform, compute_loss=None",
    "create_evaluator": "model, metrics=None, *, device=None, non_blocking=True, amp=None, prepare_batch, model_transform, "
    "output_transform",
    "MixedPrecision": "dtype",
    "GradientAccumulation": "steps, *, loss_weight='batch', partial_window='step'",
    "GradientClipping": "max_norm=None, *, norm_type=2.0, clip_value=None, function=None",
    "LRScheduling": "scheduler, *, every='step', metric=None",
    "LRHistory": "",
    "Evaluation": "evaluator, data, *, every=Events.EPOCH_COMPLETED, prefix='val'",
    "EarlyStopping": "metric, *, mode='max', patience=5, min_delta=0.0",
    "CheckpointRotation": "dirname, keep_last=3, keep_best=0, metric=None, mode='max', every=Events.EPOCH_COMPLETED, "
    "every_minutes=None",
    "TensorBoard": "log_dir, *, every=10, hparams=None, images=None, histograms=False",
    "NonFiniteGuard": "action='raise'",
    "seed_everything": "seed, deterministic=False, benchmark=False",
    "worker_init_fn": "worker_id",
    "count_parameters": "model",
    "save_weights": "model, path",
    "load_weights": "model, path",
    "gradient_penalty": "critic, real, fake, *, weight=10.0, center=1.0, one_sided=False, alpha=None",
}
"""As the design has them; a default that isn't said there isn't held."""


@pytest.mark.parametrize("name", SIGNATURES)
def test_a_signature_is_the_designs(name):
    found = [p for p in inspect.signature(getattr(camshaft, name)).parameters.values() if p.kind is not p.VAR_POSITIONAL]
    wanted, keyword_only = [], False
    for item in SIGNATURES[name].split(", ") if SIGNATURES[name] else []:
        keyword_only = keyword_only or item == "*"
        if item != "*":
            wanted.append((*item.partition("=")[::2], keyword_only))
    shown = {p.name: f"Events.{p.default.name}" if p.default is Events.EPOCH_COMPLETED else repr(p.default) for p in found}
    by_name = {p.name: p for p in found}
    assert [p.name for p in found][: len(wanted)] == [argument for argument, *_ in wanted]
    for argument, default, is_keyword in wanted:
        assert (by_name[argument].kind is inspect.Parameter.KEYWORD_ONLY) is is_keyword
        assert not default or shown[argument] == default


# -- docstrings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODULES)
def test_a_module_says_what_it_is(name):
    assert inspect.getdoc(importlib.import_module(name))


NOTHING_TO_SHOW = {"CheckpointError", "ParameterCount", "Priority"}
"""An exception, a named tuple and an enum; the functions that give and take them have the example."""


@pytest.mark.parametrize("name", OWN)
def test_everything_public_is_described_and_shown(name):
    doc = vars(own(name)).get("__doc__") if inspect.isclass(own(name)) else own(name).__doc__
    assert doc
    assert name in NOTHING_TO_SHOW or ">>>" in doc or "::" in doc


def public_members(cls):
    """The methods and properties that a class of ours defines or inherits from one of ours."""
    for base in cls.__mro__:
        if base.__module__.startswith("camshaft"):
            for key, value in vars(base).items():
                if not key.startswith("_") and (inspect.isfunction(value) or isinstance(value, (property, staticmethod))):
                    yield base, key, value


@pytest.mark.parametrize("name", [name for name in OWN if inspect.isclass(own(name))])
def test_every_public_method_says_what_it_does(name):
    silent = [f"{base.__name__}.{key}" for base, key, value in public_members(own(name)) if not inspect.getdoc(value)]
    assert silent == []


@pytest.mark.parametrize("name", [name for name in OWN if inspect.isfunction(own(name))])
def test_a_functions_arguments_are_all_described(name):
    doc = inspect.getdoc(own(name))
    parameters = [p for p in inspect.signature(own(name)).parameters if p not in ("args", "kwargs")]
    assert [p for p in parameters if f"{p}:" not in doc and name != "on"] == []


# -- files ------------------------------------------------------------------------------------------------------------


def test_a_handlers_file_is_named_after_it():
    for name in camshaft.handlers.__all__:
        thing = getattr(camshaft.handlers, name)
        if thing.__module__ != "camshaft.handler":
            assert thing.__module__.rsplit(".", 1)[1].replace("_", "") == name.lower()
