"""The commands as a user types them: what they print, where they write, how they exit."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from runs_on_disk import flip, train
from toys import batches, trainer_of

from camshaft import CheckpointRotation
from camshaft.cli.commands import camshaft

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def run(tmp_path):
    """A run of three epochs, with event files and checkpoints of step 6 and step 9."""
    folder = tmp_path / "run"
    train(folder)
    return folder


def typed(*arguments):
    """A command's result, in this process."""
    return CliRunner().invoke(camshaft, [str(argument) for argument in arguments])


def in_a_shell(*command, **options):
    """A command's result, in a process of its own."""
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=120, **options)


INSTALLED = Path(sys.executable).with_name("camshaft")


# -- as installed -----------------------------------------------------------------------------------------------------


def test_show_is_installed_as_a_command(run):
    done = in_a_shell(INSTALLED, "show", run)
    assert (done.returncode, done.stderr) == (0, "")
    assert "step-00000009.pt" in done.stdout
    assert "why it stopped: finished after 3 epochs" in done.stdout


def test_verify_exits_with_one_where_a_file_is_bad(run):
    flip(run / "checkpoints" / "step-00000006.pt")
    done = in_a_shell(INSTALLED, "verify", run)
    assert done.returncode == 1
    assert "its bytes don't match its checksum" in done.stdout


def test_the_package_is_the_same_command(run):
    done = in_a_shell(sys.executable, "-m", "camshaft", "verify", "--json", run)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["good"] is True


def test_without_a_package_the_error_names_it(run, tmp_path):
    (tmp_path / "hide.py").write_text(
        "import importlib.util, sys\n"
        "find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *rest: None if name == 'rich' else find(name, *rest)\n"
        "from camshaft.cli import main\n"
        "main()\n"
    )
    done = in_a_shell(sys.executable, tmp_path / "hide.py", "show", run)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "camshaft: the command line needs rich: pip install rich\n"


def test_the_package_imports_without_the_extra():
    code = "import sys, camshaft, camshaft.cli; print({'click', 'rich'} & set(sys.modules))"
    assert in_a_shell(sys.executable, "-c", code).stdout == "set()\n"


def test_a_page_of_latin_letters_alone_is_printed_too(run, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    done = in_a_shell(INSTALLED, "show", run)
    assert done.returncode == 0, done.stderr
    assert "val/score" in done.stdout


# -- show -------------------------------------------------------------------------------------------------------------


def row(output, name):
    """The cells of the table row that begins with a name."""
    line = next(line for line in output.splitlines() if line.strip().startswith(name))
    return [cell.strip() for cell in line.split("│")]


def test_a_metric_has_its_last_value_and_its_extremes(run):
    assert row(typed("show", run).output, "val/score")[:8] == ["val/score", "3", "0.5", "9", "0.25", "3", "0.75", "6"]


def test_a_learning_rate_has_its_last_value_and_its_extremes(run):
    assert row(typed("show", run).output, "lr")[:8] == ["lr", "9", "0.025", "9", "0.025", "7", "0.1", "1"]


def test_a_checkpoint_has_its_step_epoch_and_score(run):
    assert row(typed("show", run).output, "step-00000006.pt")[:5] == ["step-00000006.pt", "6", "2", "6", "0.75"]


def test_a_missing_checkpoint_is_reported(run):
    (run / "checkpoints" / "step-00000006.pt").unlink()
    assert row(typed("show", run).output, "step-00000006.pt")[-1] == "does not exist"


def test_a_damaged_checkpoint_is_said_to_be_bad(run):
    flip(run / "checkpoints" / "step-00000009.pt")
    line = next(line for line in typed("show", run).output.splitlines() if line.startswith("bad:"))
    assert line.endswith("step-00000009.pt is damaged: its bytes don't match its checksum")


def test_a_name_in_brackets_is_shown_as_it_is(tmp_path):
    train(tmp_path / "run [red]", 1)
    assert typed("show", tmp_path / "run [red]").output.splitlines()[0] == str(tmp_path / "run [red]")


def test_shown_as_json_it_is_json_alone(run):
    content = json.loads(typed("show", run, "--json").stdout)
    assert content["metrics"]["val/score"] == [[3, 0.25], [6, 0.75], [9, 0.5]]
    assert content["learning_rates"]["lr"][-1] == [9, 0.025]
    assert content["picture"] is None


# -- pictures ---------------------------------------------------------------------------------------------------------


def test_the_picture_goes_into_the_runs_folder_and_its_place_is_said(run):
    result = typed("show", run, "--plot")
    assert result.output.splitlines()[-1] == f"drawn: {run / 'curves.png'}"
    assert (run / "curves.png").read_bytes().startswith(PNG)


def test_the_picture_goes_where_it_is_asked_for(run, tmp_path):
    typed("show", run, "--plot-to", tmp_path / "picture.svg")
    assert (tmp_path / "picture.svg").read_text().startswith("<?xml")
    assert not (run / "curves.png").exists()


def test_with_json_the_place_of_the_picture_is_in_it(run):
    content = json.loads(typed("show", run, "--plot", "--json").stdout)
    assert content["picture"] == str(run / "curves.png")


@pytest.mark.parametrize("name", ["missing/picture.png", "picture.nonsense"])
def test_a_picture_that_cannot_be_drawn_is_an_error(name, run, tmp_path):
    result = typed("show", run, "--plot-to", tmp_path / name)
    assert result.exit_code == 1
    assert f"{name} can't be drawn: " in result.stderr


def test_without_matplotlib_the_error_says_how_to_get_it(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = typed("show", run, "--plot")
    assert result.exit_code == 1
    assert result.stderr.endswith("needs matplotlib: pip install matplotlib\n")


def test_a_run_without_any_curve_has_no_picture(run):
    for path in [*run.glob("events*"), *run.glob("checkpoints/*.pt")]:
        path.unlink()
    result = typed("show", run, "--plot")
    assert result.exit_code == 1
    assert "has neither metrics nor learning rates to draw" in result.stderr


# -- verify -----------------------------------------------------------------------------------------------------------


def test_good_files_are_named_and_the_exit_code_is_zero(run):
    result = typed("verify", run)
    assert [row(result.output, name)[1] for name in ("checkpoints.json", "step-00000006.pt")] == ["good", "good"]
    assert (result.exit_code, result.output.splitlines()[-1]) == (0, "every file is as it was written")


def test_a_bad_file_is_named_with_its_reason(run):
    flip(run / "checkpoints" / "step-00000006.pt")
    result = typed("verify", run / "checkpoints")
    assert row(result.output, "step-00000006.pt")[1:] == ["bad", "is damaged: its bytes don't match its checksum"]
    assert (result.exit_code, result.output.splitlines()[-1]) == (1, "1 of 3 files are bad")


def test_a_file_that_is_not_listed_is_said_to_be(tmp_path):
    trainer = trainer_of()
    CheckpointRotation(tmp_path).attach(trainer)
    trainer.run(batches(2))
    (tmp_path / "checkpoints.json").unlink()
    assert row(typed("verify", tmp_path).output, "step-")[1:] == ["good", "not listed in checkpoints.json"]


def test_what_a_killed_save_has_left_is_named(run):
    (run / "checkpoints" / ".camshaft-abc.tmp").write_bytes(b"half")
    result = typed("verify", run)
    assert row(result.output, ".camshaft-abc.tmp")[1] == "left"
    assert result.exit_code == 0


# -- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["show", "verify"])
def test_a_folder_of_runs_is_an_error_that_names_them(command, run):
    result = typed(command, run.parent)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.endswith(f"{run.parent} is a folder of runs; give one of them: {run}\n")


@pytest.mark.parametrize("command", ["show", "verify"])
def test_a_folder_that_is_no_run_is_a_clear_error(command, tmp_path):
    result = typed(command, tmp_path)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "is neither a run's folder" in result.stderr


def test_a_run_without_checkpoints_has_nothing_to_verify(run):
    for path in run.glob("checkpoints/*"):
        path.unlink()
    result = typed("verify", run)
    assert result.exit_code == 2
    assert "has no folder of checkpoints" in result.stderr


def test_help_names_both_commands():
    assert {"show", "verify"} <= set(typed("--help").output.split())
