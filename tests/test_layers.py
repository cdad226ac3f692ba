"""The layers of the package: imports go down, and no files import each other in a ring."""

import ast
from pathlib import Path

import pytest

import camshaft

ROOT = Path(camshaft.__file__).parent

LAYERS = [
    ["camshaft", "camshaft.__main__", "camshaft.cli", "camshaft.testing"],
    ["camshaft.engines"],
    ["camshaft.engines.supervised", "camshaft.engines.gan"],
    ["camshaft.engines.shorthand"],
    ["camshaft.handlers"],
    ["camshaft.engines.trainer"],
    ["camshaft.engines.trainer_events", "camshaft.engines.run_state", "camshaft.engines.state"],
    ["camshaft.engines.alternation"],
    ["camshaft.engines.phase"],
    ["camshaft.engines.evaluator"],
    ["camshaft.engines.window", "camshaft.engines.execution", "camshaft.engines.loop"],
    ["camshaft.engines.fire", "camshaft.engines.data_length"],
    ["camshaft.reports", "camshaft.cudagraphs", "camshaft.checkpoints", "camshaft.gan"],
    ["camshaft.resume"],
    ["camshaft.distributed"],
    ["camshaft.protocols"],
    ["camshaft.data", "camshaft.handler", "camshaft.grad_norms", "camshaft.objective", "camshaft.precision", "camshaft.points"],
    ["camshaft.keras_callbacks"],
    ["camshaft.distributed.collectives", "camshaft.distributed.dtensors", "camshaft.distributed.failures"],
    ["camshaft.validation", "camshaft.metrics", "camshaft.optimizers", "camshaft.tensorboard_tags"],
    ["camshaft.events", "camshaft.models", "camshaft.pytree", "camshaft.readback", "camshaft.rng", "camshaft.serialization"],
]
"""From the top to the bottom. A folder stands for all of its files that are not listed by themselves.

The factories (``supervised``, ``gan``) are above the handlers, because an argument is shorthand for attaching one. The trainer
and the step are below.
"""


def name_of(path):
    return ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__")


FILES = {name_of(path): path for path in sorted(ROOT.rglob("*.py"))}


def imports_of(module):
    """The modules that a module imports, at its top, inside a function, or for annotations alone."""
    for node in ast.walk(ast.parse(FILES[module].read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in FILES)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("camshaft"):
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in FILES else node.module


def layer_of(module):
    """The number of a module's layer, from the top: that of the longest name in the list which is the module or its folder."""
    listed = {name: number for number, layer in enumerate(LAYERS) for name in layer}
    parts = module.split(".")
    names = [".".join(parts[:length]) for length in range(len(parts), 1, -1)] + ([module] if module in listed else [])
    return next(listed[name] for name in [module, *names] if name in listed)


def test_every_file_has_a_layer():
    assert [module for module in FILES if layer_of(module) is None] == []


def test_every_name_in_the_list_exists():
    assert [name for layer in LAYERS for name in layer if name not in FILES] == []


@pytest.mark.parametrize("module", FILES)
def test_imports_go_down(module):
    """Files of one layer may import each other, as files of one folder do, but never in a ring."""
    assert [name for name in imports_of(module) if layer_of(name) < layer_of(module)] == []


def test_no_files_import_each_other_in_a_ring():
    edges = {module: {name for name in imports_of(module) if name != module} for module in FILES}
    while leaves := [module for module, targets in edges.items() if not targets]:
        for leaf in leaves:
            del edges[leaf]
        for targets in edges.values():
            targets.difference_update(leaves)
    assert edges == {}


@pytest.mark.parametrize("module", [name for name in FILES if name.startswith("camshaft.handlers.")])
def test_a_handler_imports_no_other(module):
    assert [name for name in imports_of(module) if name.startswith("camshaft.handlers")] == []


def test_no_file_is_over_350_lines_and_no_folder_over_a_quarter_of_the_package():
    lines = {module: path.read_text().count("\n") for module, path in FILES.items()}
    assert {module: number for module, number in lines.items() if number > 350} == {}
    folders = {module.split(".")[1] for module in FILES if module.count(".") > 1}
    shares = {folder: sum(n for m, n in lines.items() if m.startswith(f"camshaft.{folder}.")) for folder in folders}
    assert {folder: number for folder, number in shares.items() if number > sum(lines.values()) / 4} == {}
