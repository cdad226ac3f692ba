"""The data of TensorBoard's pages for two runs, requested from a real server as a browser does."""

import json
import re
import subprocess
import sys
import time
from urllib.parse import quote
from urllib.request import ProxyHandler, Request, build_opener

import pytest
import torch
from ignite.metrics import Accuracy, Loss
from torch import nn
from torch.nn.functional import cross_entropy

from camshaft import Evaluation, TensorBoard, create_evaluator, create_trainer

RUNS = {"slow": 0.01, "fast": 0.5}
"""The learning rate of each run."""
STEPS, EPOCHS = 6, 4
PNG = b"\x89PNG\r\n\x1a\n"


def train(folder, lr):
    """Trains a small classifier; returns its final metrics."""
    torch.manual_seed(0)
    x = torch.randn(STEPS * 16, 1, 4, 4)
    batches = [(x[i::STEPS], x[i::STEPS].mean(dim=(1, 2, 3)).gt(0).long()) for i in range(STEPS)]
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.9)
    trainer = create_trainer(model, optimizer, cross_entropy, clip_grad_norm=1.0, scheduler=scheduler)
    evaluator = create_evaluator(model, metrics={"accuracy": Accuracy(), "loss": Loss(cross_entropy)})
    Evaluation(evaluator, batches).attach(trainer)
    images = {"val/digits": x[:2].sigmoid(), "val/sample": x[0].sigmoid()}
    TensorBoard(folder, every=1, hparams={"lr": lr, "model": "linear"}, images=lambda engine: images).attach(trainer)
    return trainer.run(batches, max_epochs=EPOCHS).metrics


class Server:
    """A running TensorBoard server."""

    def __init__(self, address):
        self.address = address
        self.open = build_opener(ProxyHandler({})).open  # loopback needs no proxy

    def raw(self, path, content=None):
        data = None if content is None else json.dumps(content).encode()
        request = Request(f"{self.address}/data/{path}", data, {"Content-Type": "application/json"})
        with self.open(request, timeout=20) as answer:
            return answer.read()

    def get(self, path, **arguments):
        query = "&".join(f"{name}={quote(str(value), safe='')}" for name, value in arguments.items())
        return json.loads(self.raw(f"{path}?{query}"))

    def post(self, path, **content):
        return json.loads(self.raw(path, content))


def wait_for(question, what, seconds=30):
    """Repeats a request until its answer is not empty."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if answer := question():
            return answer
        time.sleep(0.1)
    raise AssertionError(f"waited {seconds} s in vain for {what}")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of both runs, and the final metrics of each."""
    folder = tmp_path_factory.mktemp("runs")
    return folder, {name: train(folder / name, lr) for name, lr in RUNS.items()}


@pytest.fixture(scope="module")
def board(trained, tmp_path_factory):
    """A TensorBoard server that shows both runs."""
    log = tmp_path_factory.mktemp("log") / "log.txt"
    place = ["--logdir", trained[0], "--host", "127.0.0.1", "--port", "0", "--reload_interval", "1"]
    with log.open("w") as output:
        server = subprocess.Popen([sys.executable, "-m", "tensorboard.main", *place], stdout=output, stderr=output)
    try:
        found = wait_for(lambda: re.search(r"http://127\.0\.0\.1:\d+", log.read_text()), "its address")
        served = Server(found[0])
        wait_for(lambda: len(served.get("plugin/custom_scalars/layout")) and len(served.get("runs")) == len(RUNS), "the runs")
        yield served
    finally:
        server.terminate()
        try:
            server.wait(timeout=10)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def curve(board, run, tag):
    """(step, value) of a scalar, as it is drawn."""
    return [(step, value) for _, step, value in board.get("plugin/scalars/scalars", run=run, tag=tag)]


# -- Scalars ----------------------------------------------------------------------------------------------------------


def test_both_runs_are_listed(board):
    assert set(board.get("runs")) == set(RUNS)


@pytest.mark.parametrize("run", RUNS)
def test_every_run_has_every_curve(run, board):
    train = ["train/grad_norm", "train/loss", "train/lr", "train/samples_per_second"]
    assert sorted(board.get("plugin/scalars/tags")[run]) == [*train, "val/accuracy", "val/loss"]


@pytest.mark.parametrize("run", RUNS)
def test_the_learning_rate_is_that_of_the_schedule(run, board):
    expected = [(step, pytest.approx(RUNS[run] * 0.9 ** (step - 1), rel=1e-5)) for step in range(1, STEPS * EPOCHS + 1)]
    assert curve(board, run, "train/lr") == expected


@pytest.mark.parametrize("tag", ["val/accuracy", "val/loss"])
def test_validation_has_the_same_steps_as_training(tag, board):
    steps = [step for step, _ in curve(board, "fast", tag)]
    assert steps == [STEPS * epoch for epoch in range(1, EPOCHS + 1)]
    assert steps[-1] == curve(board, "fast", "train/loss")[-1][0]


# -- Custom Scalars ---------------------------------------------------------------------------------------------------


def charts(board):
    """Title -> the names of the curves of a run in this chart."""
    (category,) = board.get("plugin/custom_scalars/layout")["category"]
    return {
        chart["title"]: sorted(
            tag
            for pattern in chart["multiline"]["tag"]
            for tag in board.get("plugin/custom_scalars/scalars", run="fast", tag=pattern)["tag_to_events"]
        )
        for chart in category["chart"]
    }


def test_one_page_has_the_charts_of_related_curves(board):
    shown = {
        "loss": ["train/loss", "val/loss"],
        "accuracy": ["val/accuracy"],
        "learning rate": ["train/lr"],
        "gradient norm": ["train/grad_norm"],
    }
    assert charts(board) == shown
    assert list(charts(board)) == list(shown)


# -- HParams ----------------------------------------------------------------------------------------------------------


def test_the_hyperparameters_are_columns(board):
    experiment = board.post("plugin/hparams/experiment", experimentName="")
    assert {info["name"] for info in experiment["hparamInfos"]} == {"lr", "model"}
    assert {info["name"]["tag"] for info in experiment["metricInfos"]} == {"val/accuracy", "val/loss"}


def sessions(board):
    statuses = ["STATUS_UNKNOWN", "STATUS_SUCCESS", "STATUS_FAILURE", "STATUS_RUNNING"]
    metrics = [{"metric": {"tag": tag, "group": ""}} for tag in ("val/accuracy", "val/loss")]
    query = {"allowedStatuses": statuses, "colParams": metrics, "startIndex": 0, "sliceSize": 10}
    found = board.post("plugin/hparams/session_groups", experimentName="", **query)["sessionGroups"]
    return {group["name"]: group for group in found}


def test_each_run_has_its_hyperparameters(board):
    found = {name: group["hparams"] for name, group in sessions(board).items()}
    assert found == {name: {"lr": lr, "model": "linear"} for name, lr in RUNS.items()}


@pytest.mark.parametrize("run", RUNS)
def test_the_final_metrics_are_shown_with_the_hyperparameters(run, board, trained):
    shown = {value["name"]["tag"]: value["value"] for value in sessions(board)[run]["metricValues"]}
    assert shown == {name: pytest.approx(value, rel=1e-6) for name, value in trained[1][run].items()}


# -- Images, Text -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tag", ["val/digits", "val/sample"])
def test_every_evaluation_has_its_images(tag, board):
    shown = board.get("plugin/images/images", run="slow", tag=tag, sample=0)
    assert [image["step"] for image in shown] == [STEPS * epoch for epoch in range(1, EPOCHS + 1)]
    assert board.raw(f"plugin/images/individualImage?{shown[-1]['query']}").startswith(PNG)


def text(board, run, name):
    return board.get("plugin/text/text", run=run, tag=f"{name}/text_summary")[-1]["text"]


def test_the_text_of_the_cycle_is_shown(board):
    cycle = text(board, "slow", "cycle")
    assert cycle.index("GradientClipping(max_norm=1.0).clip") < cycle.index("OPTIMIZER_STEP_COMPLETED")


def test_the_reason_why_the_run_ended_is_shown(board):
    assert "finished after 4 epochs" in text(board, "fast", "ended")
