"""The benchmark of checkpoints saves what a run would, and tells waiting from writing."""

import json
import time

import pytest

from bench import saving, table
from bench.step_cases import StepCase
from sendvae_fast.engine import checkpoint

pytestmark = pytest.mark.slow
WRITING_S = 0.2
TINY = StepCase(
    "sit", "tiny", "sit/xl_1.yaml",
    {
        "generator": {"preset": None, "width": 32, "depth": 1, "num_heads": 2},
        "repa": {"weight": 0.0}, "engine": {"precision": "fp32"},
    },
    2, (4, 4, 4),
)  # fmt: skip


def test_what_is_timed_is_the_whole_state_on_the_disk(tmp_path, monkeypatch, capsys):
    save = checkpoint.Checkpointer.save

    def slowly(self, step, write):
        time.sleep(WRITING_S)
        return save(self, step, write)

    monkeypatch.setattr(checkpoint.Checkpointer, "save", slowly)
    monkeypatch.setattr(saving, "cases_of", lambda stage, device: [TINY])
    monkeypatch.setattr(saving, "FREE_STEPS", 2)
    assert saving.main(["--rounds", "1", "--threads", "1", "--out", str(tmp_path), "--scratch", str(tmp_path)]) == 0
    (row,) = json.loads(next(tmp_path.glob("saving_*.json")).read_text())
    assert min(row["waited_for_s"], row["written_s"]) > WRITING_S and 0 < row["blocked_s"] < row["written_s"]
    assert row["steps_beside"] > 0 and row["step_beside_s"] > 0
    stage = TINY.build(tmp_path, {}, saving.init_distributed())
    state = sum(x.numel() for x in stage.engine.full_state("model").values())
    # Weights, their average and two moments.
    assert 4 * 4 * state <= row["bytes"] < 4 * 4 * state + 10_000
    assert "blocks them for" in capsys.readouterr().out
    row |= {"waited_for_s": 4.0, "blocked_s": 0.1, "step_beside_s": 0.3, "step_s": 0.25}
    next(tmp_path.glob("saving_*.json")).write_text(json.dumps([row]))
    cells = table.saving_tables(tmp_path).splitlines()[-1].split(" | ")
    assert (cells[2], cells[3], cells[4], cells[-1]) == ("4000 ms", "100 ms", "2%", "1.20x |")
