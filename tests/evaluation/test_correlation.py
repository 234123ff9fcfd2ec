import numpy as np
import pytest
from PIL import Image

from sendvae_fast.errors import UserError
from sendvae_fast.evaluation.correlation import PAPER_TABLE, CorrelationConfig, evaluate_correlation, read_table
from sendvae_fast.evaluation.result import Result, append_results


def test_the_papers_autoencoders(tmp_path):
    said = []
    found = evaluate_correlation(CorrelationConfig(out=str(tmp_path / "figure.png")), said.append)
    table = read_table(PAPER_TABLE)
    assert list(table) == ["IN-VAE", "VA-VAE", "E2E-VAE", "Send-VAE"] and len(found) == 7
    gfid = [values["gfid"] for values in table.values()]
    for metric, one in found.items():
        assert one.pearson == pytest.approx(np.corrcoef([values[metric] for values in table.values()], gfid)[0, 1])
        assert one.interval[0] < one.pearson < one.interval[1]
    assert found["deepfashion_f1"].pearson == pytest.approx(-0.9757, abs=1e-4)
    assert "deepfashion_f1" in said[1] and "4 autoencoders, with gfid" in said[1]
    assert Image.open(tmp_path / "figure.png", formats=["PNG"]).width > 1000


def test_runs_beside_a_table(tmp_path):
    (tmp_path / "table.csv").write_text("# mine\nautoencoder,fid,psnr\na,3,10\nb,2,20\nc,,30\n")
    for name, fid, psnr in (("d", 1, 30), ("e", 0, 40)):
        records = [Result(metric=metric, value=value, protocol="x") for metric, value in (("fid", fid), ("psnr", psnr))]
        append_results(tmp_path / name / "evaluation.jsonl", [records[0], *records])
    config = CorrelationConfig(
        table=str(tmp_path / "table.csv"), runs=(str(tmp_path / "d"), str(tmp_path / "e")), target="fid",
        out=str(tmp_path / "figure.svg"),
    )  # fmt: skip
    found = evaluate_correlation(config, lambda line: None)
    assert found["psnr"].pearson == pytest.approx(-1) and list(found["psnr"].points) == ["a", "b", "d", "e"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name,fid,psnr\n", "must begin with"),
        ("autoencoder,fid,psnr\na,1\n", "with 2 values"),
        ("autoencoder,fid,psnr\na,1,x\n", "'a' is no number"),
        ("autoencoder,fid,psnr\na,1,nan\n", "not finite"),
        ("autoencoder,fid,psnr\na,1,2\nb,2,3\n", "for 3 autoencoders or more"),
        ("autoencoder,rfid,psnr\na,1,2\n", "no autoencoder has a value of fid; --target may be rfid, psnr"),
    ],
)
def test_tables_that_do_not_do(tmp_path, text, said):
    (tmp_path / "table.csv").write_text(text)
    with pytest.raises(UserError, match=said):
        evaluate_correlation(CorrelationConfig(table=str(tmp_path / "table.csv"), target="fid"))


def test_a_figure_of_another_kind_is_refused():
    with pytest.raises(UserError, match=r"must end in .png"):
        CorrelationConfig(out="figure.bmp")
