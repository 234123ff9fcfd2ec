import numpy as np
import pytest
from PIL import Image
from taesd_encoder import load_encoder

from sendvae_fast.data.attributes import write_attributes
from sendvae_fast.data.catalog import Catalog
from sendvae_fast.engine.distributed import Distributed
from sendvae_fast.errors import UserError
from sendvae_fast.evaluation.attributes import measure_attributes
from sendvae_fast.evaluation.pictures import CatalogPictures
from sendvae_fast.evaluation.probing.benchmarks import csv_data, open_benchmark
from sendvae_fast.evaluation.settings import AttributesConfig, ProbeConfig


def picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(path)


@pytest.fixture
def deepfashion(tmp_path):
    """Five pictures in DeepFashion's layout, and the list of values by picture."""
    values = {
        "img/Tee_B/img_1.png": "1 -1", "img/Tee_B/img_2.png": "0 1", "img/Coat A/img_1.png": "-1 -1",
        "img/Coat A/img_2.png": "1 1", "img/Coat A/img_3.png": "-1 1",
    }  # fmt: skip
    values = {name.replace(" ", "_"): row for name, row in values.items()}
    for name in values:
        picture(tmp_path / "Img" / name)
    anno, evaluation = tmp_path / "Anno_coarse", tmp_path / "Eval"
    anno.mkdir(), evaluation.mkdir()
    (anno / "list_attr_cloth.txt").write_text("2\nattribute_name  attribute_type\na-line dress     3\nfloral    1\n")
    rows = "".join(f"{name}     {row}\n" for name, row in values.items())
    (anno / "list_attr_img.txt").write_text(f"5\nimage_name  attribute_labels\n{rows}")
    parts = zip(values, ["train", "train", "val", "test", "test"], strict=True)
    rows = "".join(f"{name}  {part}\n" for name, part in parts)
    (evaluation / "list_eval_partition.txt").write_text(f"5\nimage_name  evaluation_status\n{rows}")
    return tmp_path


def test_deepfashion_by_its_own_lists(deepfashion):
    data = open_benchmark("deepfashion", deepfashion, 8, "official", 0)
    assert data.names == ("a-line dress", "floral") and data.top_k == 5 and data.split == "official"
    parts = {
        word: [data.train.pictures.catalog.names[i] for i in getattr(data, word).ids] for word in ("train", "test")
    }
    assert parts == {"train": ["Tee_B/img_1.png", "Tee_B/img_2.png"], "test": ["Coat_A/img_2.png", "Coat_A/img_3.png"]}
    assert data.train.values.tolist() == [[1, 0], [0, 1]] and data.test.values.tolist() == [[1, 1], [0, 1]]


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        ("Anno_coarse/list_attr_img.txt", ("0 1", "0 7"), "line 4: not 2 values"),
        ("Anno_coarse/list_attr_img.txt", ("5\n", "6\n"), "announces 6 pictures but lists 5"),
        (
            "Anno_coarse/list_attr_img.txt",
            ("img_3.png", "img_4.png"),
            "1 pictures have no attributes, the first",
        ),
        ("Eval/list_eval_partition.txt", (" val\n", " valid\n"), "does not end in one of train, val, test"),
        ("Eval/list_eval_partition.txt", (" val\n", " test\n"), "none of these pictures a validation picture"),
        ("Eval/list_eval_partition.txt", None, "has no list_eval_partition.txt"),
    ],
)
def test_lists_that_do_not_match_the_pictures(deepfashion, file, change, said):
    path = deepfashion / file
    if change is None:
        path.unlink()
    else:
        path.write_text(path.read_text().replace(*change, 1))
    with pytest.raises(UserError, match=said):
        open_benchmark("deepfashion", deepfashion, 8, "official", 0)


def test_awa2_by_classes(tmp_path, test_data):
    for file in (test_data / "attributes/awa2").glob("*.txt"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    for name in ("antelope", "beaver", "leopard"):
        for number in range(4):
            picture(tmp_path / "JPEGImages" / name / f"{name}_{number}.jpg")
    data = open_benchmark("awa2", tmp_path, 8, "official", 0)
    assert len(data.names) == 85 and (len(data.train.ids), len(data.validation.ids)) == (7, 1)
    labels = data.train.pictures.catalog.labels
    assert set(labels[data.train.ids]) == {0, 1} and labels[data.test.ids].tolist() == [2] * 4
    assert data.test.values[0, data.names.index("spots")] == 1 and (data.test.values == data.test.values[0]).all()
    at_random = open_benchmark("awa2", tmp_path, 8, "random", 0)
    ids = np.concatenate([at_random.train.ids, at_random.validation.ids, at_random.test.ids])
    assert sorted(ids) == list(range(12)) and len(at_random.test.ids) == 2


def test_folders_with_different_attributes_are_refused(tmp_path):
    folders = [tmp_path / name for name in ("train", "test")]
    for folder in folders:
        picture(folder / "a" / "1.png")
        write_attributes(folder, [f"is_{folder.name}"], [("a/1.png", [1])])
    pictures = [CatalogPictures(Catalog.open(folder), 8) for folder in folders]
    with pytest.raises(UserError, match="name different attributes"):
        csv_data(*pictures, None, 0)
    with pytest.raises(UserError, match="train_data goes with benchmark=csv"):
        AttributesConfig(autoencoder="run", data="celeba", benchmark="celeba", train_data="train")


@pytest.mark.slow
def test_real_faces_through_a_real_encoder_are_clearly_apart_from_chance(test_data, tmp_path, one_thread):
    data = open_benchmark("celeba", test_data / "attributes/celeba", 32, "random", 0)
    encode = load_encoder(test_data / "weights/taef2/taef2_encoder.pth")
    records = measure_attributes(encode, "taef2", data, 64, tmp_path, Distributed(), ProbeConfig(), control=True)
    f1 = {record.metric: record for record in records}
    assert f1["attribute_f1"].counts == {"train": 402, "validation": 45, "test": 112}
    for metric in ("attribute_f1", "attribute_f1_micro", "attribute_f1_tuned", "attribute_f1_tuned_micro"):
        assert f1[metric].interval[0] > f1[f"{metric}_control"].interval[1] + 0.05
    assert f1["attribute_f1"].details["f1"]["Male"] > 0.7
