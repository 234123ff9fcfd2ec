import io
import json
import os
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from time_limits import HANG_S

from sendvae_fast.engine.distributed import Distributed
from sendvae_fast.engine.loggers import tagged
from sendvae_fast.engine.metrics import MetricsLogger
from sendvae_fast.engine.run import RunDirectory
from sendvae_fast.engine.settings import LoggingConfig, OptimizerConfig
from sendvae_fast.errors import UserError
from sendvae_fast.image_grid import save_grid
from sendvae_fast.report.read_run import read_run


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
    first = events.Scalars("loss/loss")[0]
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
    assert [event.step for event in events.Scalars("loss/loss")] == [1, 2, 3, 4, 5]


def test_a_new_run_in_the_directory_starts_empty(run):
    MetricsLogger(run, Distributed()).log(3, {"loss": 1.0})
    MetricsLogger(run, Distributed())
    assert lines(run) == []


def test_failures_warn_once_and_go_on(run, capsys):
    logger = MetricsLogger(run, Distributed())
    logger._sinks["metrics.jsonl"]._file.close()
    for step in range(3):
        logger.log(step, {"loss": 1.0})
    assert capsys.readouterr().err.count("metrics are not being recorded by metrics.jsonl") == 1
    logger.close()


def test_an_unusable_place_does_not_stop_training(run, capsys):
    run.metrics.mkdir()
    logger = MetricsLogger(run, Distributed())
    logger.log(1, {"loss": 1.0})
    logger.close()
    assert "metrics are not being recorded" in capsys.readouterr().err


def test_without_tensorboard_metrics_are_recorded_all_the_same(run, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    logger = MetricsLogger(run, Distributed())
    logger.log(1, {"loss": 1.0})
    logger.close()
    assert [line["loss"] for line in lines(run)] == [1.0] and not run.tensorboard.exists()
    assert "sendvae_fast[logging]" in capsys.readouterr().err


def test_tags_have_their_group():
    assert tagged({"align": 1.0, "grad_norm": 2.0, "img_per_s": 3.0, "evaluation/psnr": 4.0}) == {
        "loss/align": 1.0,
        "optimizer/grad_norm": 2.0,
        "speed/img_per_s": 3.0,
        "evaluation/psnr": 4.0,
    }


def preview(run, step):
    """A preview as a stage draws it: its pixels, uint8 [H, W, 3]."""
    pictures = torch.randint(0, 256, (1, 3, 8, 8), dtype=torch.uint8, generator=torch.manual_seed(0))
    save_grid(run.samples / f"samples_{step:08d}.png", pictures, columns=1)
    return pictures[0].permute(1, 2, 0).numpy()


def test_tensorboard_shows_the_config_and_the_pictures_of_a_step(run):
    logger = MetricsLogger(run, Distributed())
    pixels = preview(run, 7)
    logger.pictures(7, run.samples)
    logger.pictures(8, run.samples)
    logger.close()
    events = EventAccumulator(str(run.tensorboard)).Reload()
    assert "learning_rate: 0.0001" in events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    (picture,) = events.Images("pictures/samples")
    assert picture.step == 7
    decoded = np.asarray(Image.open(io.BytesIO(picture.encoded_image_string), formats=("PNG",)).convert("RGB"))
    assert (decoded == pixels).all() or decoded.shape != pixels.shape  # a grid has a border


@pytest.mark.parametrize("raising", [RuntimeError("the network is down"), UserError("no account")])
def test_a_logger_that_fails_stops_nothing(run, capsys, monkeypatch, raising):
    def fail(**settings):
        raise raising

    monkeypatch.setitem(sys.modules, "trackio", types.SimpleNamespace(init=fail, Image=None))
    logger = MetricsLogger(run, Distributed(), config=LoggingConfig(to=["trackio", "tensorboard"]))
    logger.log(1, {"loss": 0.5})
    logger.close()
    assert f"by trackio ({raising})" in capsys.readouterr().err
    assert lines(run)[0]["loss"] == 0.5 and EventAccumulator(str(run.tensorboard)).Reload().Scalars("loss/loss")


def test_a_logger_that_does_not_exist_is_one_line():
    with pytest.raises(UserError, match="logging.to names 'tensorbaord': there are tensorboard, wandb, trackio"):
        LoggingConfig(to=["tensorbaord"])


def test_wandb_without_an_account_does_not_ask(run, capsys, monkeypatch):
    api = types.SimpleNamespace(api_key=None)
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(api=api, init=lambda **_: pytest.fail("asked")))
    MetricsLogger(run, Distributed(), config=LoggingConfig(to=["wandb"]))
    assert "wandb login" in capsys.readouterr().err


def log_twice(run, config):
    """A run that is interrupted after step 3 and goes on from step 2."""
    for start in (0, 2):
        logger = MetricsLogger(run, Distributed(), start, config)
        for step in range(start + 1, start + 4):
            logger.log(step, {"loss": 1 / step + start, "img_per_s": 100.0})
        preview(run, start + 3)
        logger.pictures(start + 3, run.samples)
        logger.close()


def shown_by_tensorboard(run):
    """Numbers by tag, (step, float32) each."""
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def shown_by_report(run):
    """Numbers by tag, (step, float32) each, as the report's charts have them."""
    series = read_run(run, "run").series
    tags = tagged(dict.fromkeys(series, 0.0))
    return {
        tag: [(int(step), float(np.float32(value))) for step, value in zip(*series[name], strict=True)]
        for tag, name in zip(tags, series, strict=True)
    }


def test_tensorboard_and_the_report_show_the_same_run(run):
    log_twice(run, LoggingConfig())
    shown = shown_by_tensorboard(run.path)
    assert shown == shown_by_report(run.path) and shown.keys() == {"loss/loss", "speed/img_per_s"}
    assert [step for step, _ in shown["loss/loss"]] == [1, 2, 3, 4, 5]


def test_trackio_keeps_the_run(tmp_path):
    """What TensorBoard and the report show, too. In a process of its own: trackio finds its folder when imported."""
    pytest.importorskip("trackio", reason="trackio is not installed")
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio"), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, __file__, str(tmp_path / "run")]
    done = subprocess.run(command, check=True, env=environment, capture_output=True, text=True, timeout=HANG_S)
    config, logs = json.loads(done.stdout)
    assert config["learning_rate"] == 1e-4
    assert done.stderr.count("Run finished") == 2  # for each of the two that were closed
    run = tmp_path / "run"
    for tag, shown in shown_by_report(run).items():
        kept = [(entry["step"], float(np.float32(entry[tag]))) for entry in logs if tag in entry]
        assert kept == shown == shown_by_tensorboard(run)[tag]
    losses = [(entry["step"], entry["loss/loss"]) for entry in logs if "loss/loss" in entry]
    assert losses == [(step, 1 / step) for step in (1, 2)] + [(step, 1 / step + 2) for step in (3, 4, 5)]
    assert [entry["step"] for entry in logs if "pictures/samples" in entry] == [5]  # the first was of a repeated step


def test_wandb_offline_keeps_the_run(run):
    pytest.importorskip("wandb", reason="wandb is not installed")
    log_twice(run, LoggingConfig(to=["wandb"], wandb_mode="offline"))
    assert len([*run.path.glob("wandb/offline-run-*/run-*.wandb")]) >= 1


if __name__ == "__main__":
    from trackio import Api
    from trackio.sqlite_storage import SQLiteStorage

    logging = LoggingConfig(to=["trackio", "tensorboard"], project="a")
    log_twice(RunDirectory(sys.argv[1], OptimizerConfig(), Distributed()), logging)
    (kept,) = Api().runs("a")
    logs = SQLiteStorage.get_logs("a", kept.name)
    print(json.dumps([kept.config, [{key: value for key, value in log.items() if key != "timestamp"} for log in logs]]))
