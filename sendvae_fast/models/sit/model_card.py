"""The model card of a generator's folder."""

from __future__ import annotations

import shutil
from pathlib import Path

from sendvae_fast.models.autoencoder.export import CITATION, Card, measured_table
from sendvae_fast.models.sit.sit import SiT

PICTURE_FILE = "samples.png"

_CARD = """---
library_name: sendvae_fast
license: {licence}
pipeline_tag: unconditional-image-generation
tags:
- diffusion
- send-vae
---

# Generator of {depth} blocks of width {width}, {classes} classes

A {kind} transformer of {parameters:.1f}M parameters in float32 on latents of {latents}, written by sendvae_fast from
`{source}`: `model.safetensors` has the weights in training, `ema.safetensors` their moving average, which samples.
{facts}{picture}{measured}
```python
from sendvae_fast import load_autoencoder, load_generator

autoencoder, generator = load_autoencoder("AUTOENCODER"), load_generator("{name}")
images = generator.sample(autoencoder, num_samples=4, labels=1).images  # uint8 [4, 3, H, W]
```

AUTOENCODER is the one whose latents it was trained on; `latent_stats.safetensors` has the mean and deviation they were
normalised by. The weights' license is that of what they were made from.
{citation}"""

_PICTURE = f"""
![Pictures drawn while it was trained]({PICTURE_FILE})
"""


def write_card(directory: Path, sit: SiT, source: str, card: Card) -> None:
    """Put README.md, and the picture of `card`, beside the weights in `directory`, which it opens by its name.

    Args:
        directory: the folder that `save_sit` wrote.
        sit: the generator.
        source: what the weights were read from.
        card: what is known of their training.
    """
    sizes = sit.config
    if card.picture is not None:
        shutil.copyfile(card.picture, directory / PICTURE_FILE)
    text = _CARD.format(
        licence=card.licence,
        depth=sizes.depth,
        width=sizes.width,
        classes=sizes.num_classes,
        kind="diffusion" if sizes.diffusion else "flow",
        parameters=sum(weight.numel() for weight in sit.parameters()) / 1e6,
        latents=" x ".join(map(str, sizes.latent_shape)),
        source=source,
        facts="\n" * bool(card.facts) + "".join(f"- {what}: {value}\n" for what, value in card.facts.items()),
        picture=_PICTURE if card.picture is not None else "",
        measured=measured_table(card.measured),
        name="FOLDER",
        citation=CITATION,
    )
    (directory / "README.md").write_text(text, encoding="utf-8")
