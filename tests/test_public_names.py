"""The public names: exports, signatures and docstrings."""

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
PACKAGES = ["camshaft", "camshaft.engines", "camshaft.handlers"]


def own_object(name):
    """The object of a public name, or ``None`` if another package defines it."""
    found = getattr(camshaft, name)
    return found if getattr(found, "__module__", "").startswith("camshaft") else None


OWN_NAMES = [name for name in camshaft.__all__ if own_object(name) is not None]


# -- __all__ ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODULES)
def test_all_is_sorted_and_every_name_in_it_exists(name):
    module = importlib.import_module(name)
    assert list(module.__all__) == sorted(set(module.__all__))
    assert [missing for missing in module.__all__ if not hasattr(module, missing)] == []


@pytest.mark.parametrize("name", PACKAGES)
def test_all_contains_every_public_name(name):
    module = importlib.import_module(name)
    public = [key for key, value in vars(module).items() if not key.startswith("_") and not isinstance(value, types.ModuleType)]
    public = [key for key in public if key not in ("ModuleType", "TYPE_CHECKING")]
    assert sorted(public) == module.__all__


def test_the_package_exports_the_names_of_engines_and_handlers():
    for room in (camshaft.engines, camshaft.handlers):
        assert [name for name in room.__all__ if getattr(camshaft, name, None) is not getattr(room, name)] == []


HANDLERS = camshaft.handlers.__all__
ENGINES = ["Phase", "Trainer", "create_evaluator", "create_gan_trainer", "create_trainer"]
ENGINES += ["DRAGAN", "GradientPenalty", "R1", "R2", "gradient_penalty"]
ENGINES += ["load_weights", "save_weights", "seed_everything", "worker_init_fn"]
OTHERS = ["Events", "StepEvents", "Priority", "freeze", "unfreeze", "count_parameters"]


@pytest.mark.parametrize("name", HANDLERS)
def test_handlers_are_exported_twice(name):
    assert getattr(camshaft, name) is getattr(camshaft.handlers, name)


@pytest.mark.parametrize("name", ENGINES)
def test_engines_are_exported_twice(name):
    assert getattr(camshaft, name) is getattr(camshaft.engines, name)


@pytest.mark.parametrize("name", OTHERS)
def test_everything_else_is_exported_by_the_package(name):
    assert name in camshaft.__all__


def test_events_is_the_class_of_ignite():
    assert camshaft.Events is Events


# -- signatures -------------------------------------------------------------------------------------------------------

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
"""The signatures that users rely on. A parameter without a default here may have any default."""


@pytest.mark.parametrize("name", SIGNATURES)
def test_a_signature_is_the_documented_one(name):
    found = [p for p in inspect.signature(getattr(camshaft, name)).parameters.values() if p.kind is not p.VAR_POSITIONAL]
    wanted, keyword_only = [], False
    for item in SIGNATURES[name].split(", ") if SIGNATURES[name] else []:
        keyword_only = keyword_only or item == "*"
        if item != "*":
            wanted.append((*item.partition("=")[::2], keyword_only))
    defaults = {p.name: f"Events.{p.default.name}" if p.default is Events.EPOCH_COMPLETED else repr(p.default) for p in found}
    by_name = {p.name: p for p in found}
    assert [p.name for p in found][: len(wanted)] == [argument for argument, *_ in wanted]
    for argument, default, is_keyword in wanted:
        assert (by_name[argument].kind is inspect.Parameter.KEYWORD_ONLY) is is_keyword
        assert not default or defaults[argument] == default


# -- docstrings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODULES)
def test_every_module_has_a_docstring(name):
    assert inspect.getdoc(importlib.import_module(name))


WITHOUT_EXAMPLE = {"CheckpointError", "ParameterCount", "Priority"}
"""An exception, a named tuple and an enum. The functions that use them have examples."""


@pytest.mark.parametrize("name", OWN_NAMES)
def test_every_public_object_has_a_docstring_with_an_example(name):
    doc = vars(own_object(name)).get("__doc__") if inspect.isclass(own_object(name)) else own_object(name).__doc__
    assert doc
    assert name in WITHOUT_EXAMPLE or ">>>" in doc or "::" in doc


def public_members(cls):
    """The methods and properties that a class defines or inherits from classes of this package."""
    for base in cls.__mro__:
        if base.__module__.startswith("camshaft"):
            for key, value in vars(base).items():
                if not key.startswith("_") and (inspect.isfunction(value) or isinstance(value, (property, staticmethod))):
                    yield base, key, value


@pytest.mark.parametrize("name", [name for name in OWN_NAMES if inspect.isclass(own_object(name))])
def test_every_public_method_has_a_docstring(name):
    undocumented = [
        f"{base.__name__}.{key}" for base, key, value in public_members(own_object(name)) if not inspect.getdoc(value)
    ]
    assert undocumented == []


@pytest.mark.parametrize("name", [name for name in OWN_NAMES if inspect.isfunction(own_object(name))])
def test_every_argument_of_a_function_is_documented(name):
    doc = inspect.getdoc(own_object(name))
    parameters = [p for p in inspect.signature(own_object(name)).parameters if p not in ("args", "kwargs")]
    assert [p for p in parameters if f"{p}:" not in doc and name != "on"] == []


# -- files ------------------------------------------------------------------------------------------------------------


def test_the_file_of_a_handler_has_its_name():
    for name in camshaft.handlers.__all__:
        handler = getattr(camshaft.handlers, name)
        if handler.__module__ != "camshaft.handler":
            assert handler.__module__.rsplit(".", 1)[1].replace("_", "") == name.lower()
