"""A new handler needs one file and one line: its exports, its registry tests and its entry in the API page are derived."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

FILE = '''"""A handler for the test."""

from camshaft.handler import Handler, on
from camshaft.events import StepEvents

__all__ = ["StepCounter"]


class StepCounter(Handler):
    """Counts optimizer steps.

    Example:
        >>> counter = StepCounter(start=1)
    """

    saved = ("steps",)
    needs_trainer = True

    def __init__(self, start=0):
        self.steps = start

    @on(StepEvents.OPTIMIZER_STEP_COMPLETED)
    def count(self, engine):
        self.steps += 1

    @property
    def next_step(self):
        """The number of the next step."""
        return self.steps + 1
'''

LINE = "from camshaft.handlers.step_counter import StepCounter as StepCounter\n"


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of the package with one more file and one more line."""
    folder = tmp_path_factory.mktemp("copy")
    shutil.copytree(ROOT / "camshaft", folder / "camshaft", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "docs/conf.py", "tests/toys.py", "tests/conftest.py", "tests/handlers/test_registry.py"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    (folder / "camshaft/handlers/step_counter.py").write_text(FILE)
    init = folder / "camshaft/handlers/__init__.py"
    first = "from camshaft.handlers.stop_on_signal"
    init.write_text(init.read_text().replace(first, LINE + first))
    return folder


def run(copy, *arguments):
    environment = os.environ | {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *arguments], cwd=copy, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_it_is_exported_by_both_packages(copy):
    code = "import camshaft, camshaft.handlers as h; print(camshaft.StepCounter is h.StepCounter, h.__all__, camshaft.__all__)"
    printed = run(copy, "-c", code)
    assert printed.startswith("True")
    assert printed.count("'StepCounter'") == 2


def test_the_registry_test_covers_it(copy):
    printed = run(
        copy, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/handlers/test_registry.py", "-k", "StepCounter or init"
    )
    assert " passed" in printed
    assert int(printed.rsplit("\n", 2)[-2].split()[0]) >= 7


def test_the_api_page_has_an_entry_for_it(copy):
    code = (
        "import runpy; page = ['.. every-handler::']; "
        "runpy.run_path('docs/conf.py')['describe_every_handler'](None, 'guide/api', page); print(page[0])"
    )
    assert ".. autoclass:: StepCounter\n   :members: next_step\n" in run(copy, "-c", code)
