"""Pictures with attributes, split for probing: published benchmarks with their official splits, any folder with a CSV.

    CelebA       162,770 / 19,867 / 19,962 aligned faces, 40 attributes: `img_align_celeba`, `list_attr_celeba.txt` and
                 `list_eval_partition.txt`
    DeepFashion  209,222 / 40,000 / 40,000 pictures of clothes, 1000 attributes: `img`, `list_attr_cloth.txt`,
                 `list_attr_img.txt` and `list_eval_partition.txt`; whole pictures, not the boxes around the clothes
    AwA2         37,322 animals of 50 classes, 85 attributes of each class: `JPEGImages` and the class matrix. Official
                 are 40 classes to train with and 10 to test with; validation pictures are of training classes

Files may lie in the folder itself or in the folders that the archives make (`Anno`, `Eval`, `Img`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sendvae_fast.data.attributes import ATTRIBUTES_FILE
from sendvae_fast.data.catalog import Catalog
from sendvae_fast.errors import UserError
from sendvae_fast.evaluation.pictures import CatalogPictures
from sendvae_fast.evaluation.probing.attribute_probe import held_out
from sendvae_fast.evaluation.probing.attribute_tables import (
    AttributeTable,
    read_awa2_attributes,
    read_celeba_attributes,
    read_class_list,
    read_deepfashion_attributes,
    read_partition,
)
from sendvae_fast.evaluation.settings import Benchmark, Splitting

VALIDATION_FRACTION = 0.1
"""Of the training pictures, held out to tune thresholds where a benchmark has no validation pictures."""
TEST_FRACTION = 0.2
"""Of all pictures, where they are split at random."""
_FOLDERS = ("", "Anno", "Anno_coarse", "Eval", "Img", "Anno_coarse/Anno_coarse")


@dataclass(frozen=True)
class LabelledPictures:
    """Some of a catalog's pictures, with their attributes."""

    pictures: CatalogPictures
    ids: np.ndarray
    """int64 [n], ascending."""
    values: np.ndarray
    """uint8 [n, A] of 0 and 1."""


@dataclass(frozen=True)
class ProbeData:
    """What a benchmark is made of."""

    train: LabelledPictures
    validation: LabelledPictures
    test: LabelledPictures
    names: tuple[str, ...]
    """Of the attributes."""
    split: str
    """How pictures came to be in which part."""
    top_k: int | None = None
    """Guesses a picture, where the benchmark counts them."""


def csv_data(train: CatalogPictures, test: CatalogPictures, validation: CatalogPictures | None, seed: int) -> ProbeData:
    """Folders with an `attributes.csv` each; without validation pictures a tenth of the training ones.

    Raises:
        UserError: a folder has no table, or the tables name different attributes.
    """
    wholes = [_whole(pictures) for pictures in (train, test, *([] if validation is None else [validation]))]
    names = _names(train)
    for part in wholes:
        if _names(part.pictures) != names:
            raise UserError(
                f"{part.pictures.catalog.root / ATTRIBUTES_FILE} and {train.catalog.root / ATTRIBUTES_FILE} name "
                "different attributes; give folders of one data set"
            )
    if validation is not None:
        return ProbeData(wholes[0], wholes[2], wholes[1], names, "as given")
    fitted, tuned = held_out(len(train), VALIDATION_FRACTION, seed)
    return ProbeData(
        _take(wholes[0], fitted), _take(wholes[0], tuned), wholes[1], names,
        f"as given, {VALIDATION_FRACTION:.0%} of the training pictures for validation, seed {seed}",
    )  # fmt: skip


def open_benchmark(benchmark: Benchmark, root: Path, image_size: int, splitting: Splitting, seed: int) -> ProbeData:
    """CelebA, DeepFashion or AwA2 in the folder `root`.

    Raises:
        UserError: a file is missing or broken, or pictures and lists do not match.
    """
    if not root.is_dir():
        raise UserError(f"{root} is no folder; give the folder that {benchmark} lies in")
    if benchmark == "awa2":
        return _awa2(root, image_size, splitting, seed)
    if benchmark == "celeba":
        table = read_celeba_attributes(_find(root, "list_attr_celeba.txt"))
        catalog, words = Catalog.open(_find(root, "img_align_celeba")), ("0", "1", "2")
    else:
        files = (_find(root, name) for name in ("list_attr_cloth.txt", "list_attr_img.txt"))
        table, words = read_deepfashion_attributes(*files), ("train", "val", "test")
        catalog = Catalog.open(_find(root, "img"))
    everything = _labelled(catalog, table, image_size)
    top_k = 5 if benchmark == "deepfashion" else None
    if splitting == "random":
        return _random(everything, table.names, seed, top_k)
    list_file = _find(root, "list_eval_partition.txt", "; for a part of the data set give --split=random")
    partition = {_own_name(key): part for key, part in read_partition(list_file, words).items()}
    if missing := [name for name in catalog.names if name not in partition]:
        raise UserError(f"{list_file} has no line for {missing[0]} ({len(missing)} pictures lack one); fetch it again")
    places = np.array([partition[name] for name in catalog.names])
    parts = [_take(everything, np.flatnonzero(places == part)) for part in range(3)]
    for part, word in zip(parts, ("training", "validation", "test"), strict=True):
        if not len(part.ids):
            raise UserError(f"{list_file} makes none of these pictures a {word} picture; give --split=random")
    return ProbeData(*parts, names=table.names, split="official", top_k=top_k)


def _awa2(root: Path, image_size: int, splitting: Splitting, seed: int) -> ProbeData:
    table = read_awa2_attributes(root)
    catalog = Catalog.open(_find(root, "JPEGImages"))
    if unknown := sorted(set(catalog.class_names) - set(table.keys)):
        raise UserError(f"{root} has pictures of {unknown[0]!r}, which classes.txt does not name; fetch it again")
    of_class = table.values.numpy()[[table.keys.index(name) for name in catalog.class_names]]
    pictures = CatalogPictures(catalog, image_size)
    everything = LabelledPictures(pictures, np.arange(len(catalog)), of_class[catalog.labels])
    if splitting == "random":
        return _random(everything, table.names, seed, None)
    parts = []
    for name in ("trainclasses.txt", "testclasses.txt"):
        classes = [catalog.class_names.index(key) for key in read_class_list(root / name) if key in catalog.class_names]
        parts.append(_take(everything, np.flatnonzero(np.isin(catalog.labels, classes))))
        if not len(parts[-1].ids):
            raise UserError(f"{root} has no pictures of the classes in {name}; fetch the data set again")
    fitted, tuned = held_out(len(parts[0].ids), VALIDATION_FRACTION, seed)
    split = f"official classes, {VALIDATION_FRACTION:.0%} of the training pictures for validation, seed {seed}"
    return ProbeData(_take(parts[0], fitted), _take(parts[0], tuned), parts[1], table.names, split)


def _random(everything: LabelledPictures, names: tuple[str, ...], seed: int, top_k: int | None) -> ProbeData:
    rest, tested = held_out(len(everything.ids), TEST_FRACTION, seed)
    fitted, tuned = held_out(len(rest), VALIDATION_FRACTION, seed + 1)
    parts = (_take(everything, ids) for ids in (rest[fitted], rest[tuned], tested))
    return ProbeData(*parts, names=names, split=f"at random 72/8/20, seed {seed}", top_k=top_k)


def _labelled(catalog: Catalog, table: AttributeTable, image_size: int) -> LabelledPictures:
    """All pictures of a catalog with the rows of a table that has one for each, and no others."""
    rows = {_own_name(key): row for row, key in enumerate(table.keys)}
    names = catalog.names
    for absent, what in (
        ([name for name in names if name not in rows], "pictures have no attributes"),
        (sorted(rows.keys() - set(names)), "pictures of the attribute list are missing"),
    ):
        if absent:
            raise UserError(f"{catalog.root}: {len(absent)} {what}, the first is {absent[0]}; fetch the data set again")
    values = table.values.numpy()[[rows[name] for name in names]]
    return LabelledPictures(CatalogPictures(catalog, image_size), np.arange(len(names)), values)


def _own_name(key: str) -> str:
    """A picture's path under the folder of pictures: DeepFashion's lists begin with that folder's name."""
    return key.removeprefix("img/")


def _whole(pictures: CatalogPictures) -> LabelledPictures:
    attributes = pictures.catalog.attributes
    if attributes is None:
        raise UserError(f"{pictures.catalog.root} has no {ATTRIBUTES_FILE}; probing needs one beside the pictures")
    return LabelledPictures(pictures, np.arange(len(pictures)), attributes.values.astype(np.uint8))


def _names(pictures: CatalogPictures) -> tuple[str, ...]:
    return () if pictures.catalog.attributes is None else pictures.catalog.attributes.names


def _take(part: LabelledPictures, ids: Sequence[int] | np.ndarray) -> LabelledPictures:
    return LabelledPictures(part.pictures, part.ids[ids], part.values[ids])


def _find(root: Path, name: str, hint: str = "") -> Path:
    """A file or folder of a data set, wherever its archives put it."""
    for folder in _FOLDERS:
        if (root / folder / name).exists():
            return root / folder / name
    raise UserError(f"{root} has no {name}; fetch the data set again{hint}")
