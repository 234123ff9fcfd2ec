"""Small pictures and the files that hold them, for the tests of the data path."""

import io
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


def picture(width=9, height=7, seed=0, mode="RGB"):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels).convert(mode)


def encoded(image=None, form="JPEG", **options):
    buffer = io.BytesIO()
    (image or picture()).save(buffer, format=form, **options)
    return buffer.getvalue()


def write_folder(root, files):
    """`files`: name to bytes."""
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def write_tar(path, files, form=tarfile.GNU_FORMAT):
    """`files`: name to bytes, in this order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def write_parquet(path, rows, class_names=None, row_group_size=2):
    """`rows`: (path, bytes, label), as `datasets` lays them out."""
    path.parent.mkdir(parents=True, exist_ok=True)
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table(
        {
            "image": pa.array([{"bytes": data, "path": name} for name, data, _ in rows], struct),
            "label": pa.array([label for _, _, label in rows], pa.int64()),
        }
    )
    if class_names:
        feature = f'{{"names": {list(class_names)}, "_type": "ClassLabel"}}'.replace("'", '"')
        note = f'{{"info": {{"features": {{"image": {{"_type": "Image"}}, "label": {feature}}}}}}}'
        table = table.replace_schema_metadata({"huggingface": note})
    pq.write_table(table, path, row_group_size=row_group_size)
    return path
