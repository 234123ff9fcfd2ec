import json

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sendvae_fast.engine.distributed import Distributed
from sendvae_fast.engine.metrics import MetricsLogger
from sendvae_fast.engine.optimizer import OptimizerConfig
from sendvae_fast.engine.run import RunDirectory


@pytest.fixture
def run(tmp_path):
    return RunDirectory(tmp_path, OptimizerConfig(), Distributed())


def lines(run):
    return [json.loads(line) for line in run.metrics.read_text().splitlines()]


def test_numbers_reach_the_file_at_once_and_tensorboard(run):
    logger = MetricsLogger(run, Distributed())
    logger.log(1, {"loss": 0.5, "norm": torch.tensor(2.0)})
    assert [(line["step"], line["loss"], line["norm"]) for line in lines(run)] == [(1, 0.5, 2.0)]
    logger.log(2, {"loss": float("nan"), "norm": float("inf")})
    assert lines(run)[1]["loss"] is None and lines(run)[1]["norm"] is None
    logger.close()
    events = EventAccumulator(str(run.tensorboard)).Reload()
    first = events.Scalars("loss")[0]
    assert (first.step, first.value) == (1, 0.5)


def test_resuming_drops_what_came_after_the_checkpoint(run):
    logger = MetricsLogger(run, Distributed())
    for step in range(1, 8):
        logger.log(step, {"loss": step})
    logger.close()
    with open(run.metrics, "a") as file:
        file.write('{"step": 8, "lo')
    logger = MetricsLogger(run, Distributed(), last_step=4)
    logger.log(5, {"loss": 50.0})
    logger.close()
    assert [(line["step"], line["loss"]) for line in lines(run)] == [(1, 1), (2, 2), (3, 3), (4, 4), (5, 50)]
    events = EventAccumulator(str(run.tensorboard)).Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4, 5]


def test_a_new_run_in_the_directory_starts_empty(run):
    MetricsLogger(run, Distributed()).log(3, {"loss": 1.0})
    MetricsLogger(run, Distributed())
    assert lines(run) == []


def test_failures_warn_once_and_go_on(run, capsys):
    logger = MetricsLogger(run, Distributed())
    logger._file.close()
    for step in range(3):
        logger.log(step, {"loss": 1.0})
    assert capsys.readouterr().err.count("metrics are not being recorded") == 1
    logger.close()


def test_an_unusable_place_does_not_stop_training(run, capsys):
    run.metrics.mkdir()
    logger = MetricsLogger(run, Distributed())
    logger.log(1, {"loss": 1.0})
    logger.close()
    assert "metrics are not being recorded" in capsys.readouterr().err


def test_without_tensorboard_metrics_are_recorded_all_the_same(run, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    logger = MetricsLogger(run, Distributed())
    logger.log(1, {"loss": 1.0})
    logger.close()
    assert [line["loss"] for line in lines(run)] == [1.0] and not run.tensorboard.exists()
    assert "sendvae_fast[logging]" in capsys.readouterr().err
