"""What a checkpoint holds, for tests that compare two of them."""

from collections import defaultdict
from pathlib import Path

import torch
from safetensors.torch import load_file


def tensors_in(directory: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, by file and name; optimizer state of several ranks as one, parts joined flat."""
    tensors, parts = {}, defaultdict(dict)
    for file in sorted(directory.rglob("*.safetensors")):
        where = file.relative_to(directory).parent if "_rank" in file.name else file.relative_to(directory)
        for stored, value in load_file(file).items():
            name, _, start = stored.partition("@")
            if start:
                parts[f"{where}:{name}"][int(start)] = value
            else:
                tensors[f"{where}:{name}"] = value
    tensors.update({name: torch.cat([of_name[start] for start in sorted(of_name)]) for name, of_name in parts.items()})
    assert tensors, f"no tensors in {directory}"
    return tensors
