import json
import os

import numpy as np
import pyarrow.parquet as pq
import pytest
from pictures import write_folder, write_parquet, write_tar
from PIL import Image
from torchvision.datasets import ImageFolder

from sendvae_fast.data.catalog import Catalog
from sendvae_fast.data.decode import UnreadableImage
from sendvae_fast.errors import UserError


def save(path, size=(8, 8)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (10, 200, 30)).save(path, format="JPEG")


def tree(root):
    for name in ("n02/b.JPEG", "n02/a.jpg", "n01/z.jpeg", "n01/sub/x.JpG", "n10/q.Png", "n10/.hidden.jpg"):
        save(root / name)
    (root / "n01" / "notes.txt").write_text("not an image")
    (root / ".cache").mkdir()
    return root


def test_lists_as_torchvision_does(tmp_path):
    root = tree(tmp_path)
    (root / ".cache").rmdir()
    (root / "n10" / ".hidden.jpg").unlink()
    catalog, truth = Catalog.open(root), ImageFolder(root)
    assert list(catalog.class_names) == truth.classes == ["n01", "n02", "n10"]
    assert [(catalog.locate(i), label) for i, label in enumerate(catalog.labels.tolist())] == truth.samples
    assert len(catalog) == 5 and catalog.labels.dtype == np.int64 and catalog.attributes is None


def test_hidden_names_are_passed_over(tmp_path):
    catalog = Catalog.open(tree(tmp_path))
    assert len(catalog) == 5 and catalog.class_names == ("n01", "n02", "n10")


def test_a_flat_folder_is_one_class(tmp_path):
    save(tmp_path / "flat" / "b.jpg")
    save(tmp_path / "flat" / "a.jpg")
    catalog = Catalog.open(tmp_path / "flat")
    assert catalog.class_names == ("flat",) and catalog.labels.tolist() == [0, 0]
    assert catalog.names == ["a.jpg", "b.jpg"]


def test_attributes_are_read_by_file_name(tmp_path):
    root = tree(tmp_path)
    (root / "attributes.csv").write_text(
        "file,round,warm\nn02/a.jpg,0,1\nn01/z.jpeg,1,1\nn01/sub/x.JpG,0,0\nn10/q.Png,1,0\nn02/b.JPEG,1,1\ngone.jpg,0,0\n"
    )
    catalog = Catalog.open(root)
    assert catalog.attributes.names == ("round", "warm")
    by_name = {
        os.path.basename(path): row.tolist() for path, row in zip(catalog.names, catalog.attributes.values, strict=True)
    }
    assert by_name == {
        "a.jpg": [False, True],
        "z.jpeg": [True, True],
        "x.JpG": [False, False],
        "q.Png": [True, False],
        "b.JPEG": [True, True],
    }


@pytest.mark.parametrize(
    "table, message",
    [
        ("name,round\n", "must begin with"),
        ("", "must begin with"),
        ("file,round\nn01/z.jpeg,2\n", "line 2"),
        ("file,round\nn01/z.jpeg,1,0\n", "line 2"),
        ("file,round\nn01/z.jpeg,1\n", "no line for n01/sub/x.JpG .4 images"),
    ],
)
def test_bad_attribute_tables(tmp_path, table, message):
    (tree(tmp_path) / "attributes.csv").write_text(table)
    with pytest.raises(UserError, match=message):
        Catalog.open(tmp_path)


def test_folder_errors(tmp_path):
    with pytest.raises(UserError, match="nowhere does not exist; check the path"):
        Catalog.open(tmp_path / "nowhere")
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is a file"):
        Catalog.open(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no images in .*empty; expected .*<class>/<image>"):
        Catalog.open(tmp_path / "empty")
    save(tmp_path / "part" / "full" / "a.jpg")
    (tmp_path / "part" / "hollow").mkdir()
    with pytest.raises(UserError, match="part/hollow holds no images"):
        Catalog.open(tmp_path / "part")


def test_the_parent_of_train_stands_for_train(tmp_path):
    tree(tmp_path / "train")
    tree(tmp_path / "val")
    catalog = Catalog.open(tmp_path)
    assert catalog.root == tmp_path / "train" and catalog.class_names == ("n01", "n02", "n10")
    save(tmp_path / "boat" / "a.jpg")  # now `train` is a class among others
    assert Catalog.open(tmp_path).class_names == ("boat", "train", "val")


def test_a_catalog_file_holds_all_there_is(tmp_path):
    files = {f"{name}.jpg": os.fsencode(name) for name in ("n1/b", "n1/a", "n2/bad\udcff", "n2/line\nbreak")}
    sources = [
        write_folder(tmp_path / "folder", files),
        write_tar(tmp_path / "tar" / "s.tar", files),
        write_parquet(tmp_path / "parquet" / "p.parquet", [("a.jpg", b"0", 0), ("b.jpg", b"1", 2), ("c.jpg", b"2", 1)]),
    ]
    for source in sources:
        catalog = Catalog.open(source)
        catalog.save(tmp_path / "c.parquet")
        again = Catalog.open(tmp_path / "c.parquet")
        assert again.names == catalog.names and again.class_names == catalog.class_names
        assert again.labels.tolist() == catalog.labels.tolist() and again.labels.dtype == np.int64
        assert [again.read(i) for i in range(len(again))] == [catalog.read(i) for i in range(len(catalog))]
        assert again.locate(0) == catalog.locate(0) and again.verdicts is None and again.root == catalog.root
        again.subset(np.array([2, 0])).save(tmp_path / "part.parquet")
        part = Catalog.open(tmp_path / "part.parquet")
        assert part.names == [catalog.names[2], catalog.names[0]] and part.class_names == catalog.class_names
        assert part.read(0) == catalog.read(2)


def test_a_catalog_moves_with_its_pictures(tmp_path):
    write_folder(tmp_path / "a" / "train", {"n1/x.jpg": b"x"})
    Catalog.open(tmp_path / "a" / "train").save(tmp_path / "a" / "train.catalog.parquet")
    (tmp_path / "a").rename(tmp_path / "b")
    assert Catalog.open(tmp_path / "b" / "train.catalog.parquet").read(0) == b"x"


def test_damaged_and_future_catalogs(tmp_path):
    write_folder(tmp_path / "a", {"n1/x.jpg": b"x"})
    path = tmp_path / "c.parquet"
    Catalog.open(tmp_path / "a").save(path)
    table = pq.read_table(path)
    note = json.loads(table.schema.metadata[b"sendvae"])
    pq.write_table(table.replace_schema_metadata({b"sendvae": json.dumps({**note, "schema_version": 99})}), path)
    with pytest.raises(UserError, match="schema version 99, this program reads 1"):
        Catalog.open(path)
    pq.write_table(table.replace_schema_metadata({b"sendvae": "{}"}), path)
    with pytest.raises(UserError, match="is damaged.*sendvae data index"):
        Catalog.open(path)


def test_reading_and_subsets(tmp_path):
    catalog = Catalog.open(tree(tmp_path))
    part = catalog.subset(np.array([4, 1]))
    assert part.names == [catalog.names[4], catalog.names[1]] and part.class_names == catalog.class_names
    assert part.labels.tolist() == [2, 0] and part.locate(0) == str(tmp_path / catalog.names[4])
    assert part.read(1) == (tmp_path / catalog.names[1]).read_bytes()
    assert not catalog.is_bad.any()
    (tmp_path / catalog.names[1]).unlink()
    with pytest.raises(UnreadableImage, match="does not exist"):
        part.read(1)
