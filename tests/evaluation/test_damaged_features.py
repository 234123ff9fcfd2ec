"""Damaged files of features, and of benchmarks: each reader takes them or raises a `UserError` of one line."""

import hashlib

import pytest
import torch
from fuzz import Reader, check_reader, damaged_bytes, damaged_content
from PIL import Image

from sendvae_fast.engine.distributed import Distributed
from sendvae_fast.evaluation.chunks import compute_chunks
from sendvae_fast.evaluation.pictures import Pictures
from sendvae_fast.evaluation.probing.benchmarks import open_benchmark
from sendvae_fast.evaluation.probing.encoding import encoded_rows
from sendvae_fast.evaluation.result import PicturesOrigin

pytestmark = pytest.mark.slow

NUM = 4
CLASSES = ("antelope", "beaver", "leopard")
CLOTHES = {"img/Tee/1.jpg": "train", "img/Tee/2.jpg": "train", "img/Coat/1.jpg": "val", "img/Coat/2.jpg": "test"}
FEATURES = f"features-{hashlib.sha256(f'a x 1 {NUM}'.encode()).hexdigest()[:16]}"


class Numbered(Pictures):
    """Pictures of one pixel that show their number."""

    origin = PicturesOrigin(path="", num_pictures=NUM, image_size=1, sha256="x", hash_of="names")

    def batches(self, batch_size, start=0, stop=None):
        for ids in torch.arange(start, NUM if stop is None else stop, dtype=torch.uint8).split(batch_size):
            yield ids[:, None, None, None].expand(-1, 3, 1, 1)


def damaged_numbers(path, draw):
    """Half of the copies have other numbers in a sound file."""
    content = path.read_bytes()
    return damaged_bytes(content, draw) if draw.random() < 0.5 else content[:-2] + draw.randbytes(2)


def measured_chunks(folder):
    """Whatever happens to a file of features, what is measured is what was computed."""

    def compute(start, stop):
        return {"pooled": torch.arange(start, stop)[:, None].float(), "logits": torch.zeros(stop - start, 2)}

    chunks = compute_chunks(NUM, compute, folder=folder / "chunks", size=2)
    assert chunks["pooled"].flatten().tolist() == list(range(NUM))
    assert chunks.column("logits").shape == (NUM, 2)


def encode(folder):
    rows = encoded_rows(lambda images: images.float(), "a", Numbered(), folder, 2, Distributed())
    assert sum(len(block) for _, block in rows.blocks()) == NUM
    return rows


def note_two(folder):
    """What an interrupted call has left: two pictures are done."""
    (folder / "begun" / f"{FEATURES}.rank0of1").write_text('{"done": 2}')


def encode_the_rest(folder):
    """Go on with it. The features of the two are taken as they are, the others made."""
    rows = encode(folder / "begun")
    (folder / "begun" / f"{FEATURES}.finished").unlink()
    assert rows.dim == 3 and torch.cat([block for _, block in rows.blocks()])[2:, 0].tolist() == [2, 3]


def animals(folder):
    data = open_benchmark("awa2", folder / "awa2", 8, "official", 0)
    assert ((data.train.values == 0) | (data.train.values == 1)).all() and data.train.values.shape[1] == len(data.names)


def clothes(folder):
    data = open_benchmark("deepfashion", folder / "clothes", 8, "official", 0)
    assert len(data.train.ids) + len(data.validation.ids) + len(data.test.ids) == len(CLOTHES)
    assert ((data.train.values == 0) | (data.train.values == 1)).all() and data.train.values.shape[1] == len(data.names)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    measured_chunks(folder)
    for place in ("begun", "encoded"):
        encode(folder / place)
    note_two(folder)
    (folder / "begun" / f"{FEATURES}.finished").unlink()
    pictures = [folder / "awa2/JPEGImages" / word / f"{k}.jpg" for word in CLASSES for k in range(4)]
    for picture in (*pictures, *(folder / "clothes/Img" / name for name in CLOTHES)):
        picture.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(picture)
    head, rows = f"{len(CLOTHES)}\nimage_name  of_it\n", [f"{name}     1 -1\n" for name in CLOTHES]
    texts = {
        "awa2/classes.txt": "".join(f"{k:6}\t{name}\n" for k, name in enumerate(CLASSES, 1)),
        "awa2/predicates.txt": "     1\tblack\n     2\tfurry\n",
        "awa2/predicate-matrix-binary.txt": "0 1 \n1 0 \n1 1 \n",
        "awa2/trainclasses.txt": "antelope\nbeaver\n",
        "awa2/testclasses.txt": "leopard\n",
        "clothes/list_attr_cloth.txt": "2\nattribute_name  attribute_type\na-line dress     3\nfloral    1\n",
        "clothes/list_attr_img.txt": head + "".join(rows),
        "clothes/list_eval_partition.txt": head + "".join(f"{name}  {part}\n" for name, part in CLOTHES.items()),
    }
    for name, text in texts.items():
        (folder / name).write_text(text)
    return folder


READERS = {
    "features of pictures": Reader("chunks/part_00001.safetensors", damaged_numbers, measured_chunks),
    "note of features to probe": Reader(f"begun/{FEATURES}.rank0of1", damaged_content, encode_the_rest),
    "features to probe, begun": Reader(
        f"begun/{FEATURES}.npy", damaged_content, lambda folder: (note_two(folder), encode_the_rest(folder))
    ),
    "features to probe": Reader(f"encoded/{FEATURES}.npy", damaged_content, lambda folder: encode(folder / "encoded")),
    **{
        f"AwA2: {name}": Reader(f"awa2/{name}.txt", damaged_content, animals)
        for name in ("classes", "predicates", "predicate-matrix-binary", "trainclasses", "testclasses")
    },
    **{
        f"DeepFashion: {name}": Reader(f"clothes/{name}.txt", damaged_content, clothes)
        for name in ("list_attr_cloth", "list_attr_img", "list_eval_partition")
    },
}


@pytest.mark.parametrize("name", READERS)
def test_damage_is_a_user_error_or_nothing(name, folder):
    check_reader(name, READERS[name], folder)
