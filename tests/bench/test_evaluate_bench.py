"""The evaluation benchmark compares what both commands found before it says which was faster."""

import json

import pytest

from bench import evaluate, table


@pytest.mark.parametrize(("their_fid", "code"), [(3.0001, 0), (3.1, 1)])
def test_a_faster_command_must_find_the_same(their_fid, code, tmp_path, monkeypatch):
    ours = [("frechet_inception_1234", 3.0), ("precision_inception_1234", 0.5), ("recall_inception_1234", 0.25)]
    theirs = {"frechet_inception_distance": their_fid, "precision": 0.5, "recall": 0.25}

    def timed(command, device):
        if "sendvae_fast" in command:
            out = next(word for word in command if word.startswith("--out=")).removeprefix("--out=")
            lines = [json.dumps({"metric": metric, "value": value}) for metric, value in ours]
            with open(out, "w") as file:
                file.write("\n".join(lines))
        seconds = 4.0 if "sendvae_fast" in command else 6.0
        return {"wall_s": seconds, "cpu_s": seconds, "peak_bytes": 2**30}, f"a warning\n{json.dumps(theirs)}"

    monkeypatch.setattr(evaluate, "timed", timed)
    options = ["--device", "cpu", "--pictures", "4", "--size", "16", "--weights", "none.pth", "--out", str(tmp_path)]
    assert evaluate.main(options) == code
    text = table.evaluation_tables(tmp_path)
    assert "met: 1.50x torch-fidelity" in text and "| 1.0 | 1.00 GiB |" in text
    assert ("Failed: 4 pictures of 16 px: the two do not find the same: frechet 3 and 3.1" in text) == bool(code)
