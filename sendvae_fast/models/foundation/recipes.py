"""The timm network, the preprocessing and the features of each foundation model.

Sources, read as code: REPA's `preprocess_raw_image` (train.py), `load_encoders` (utils.py) and models/mae_vit.py,
clip_vit.py and jepa.py for DINOv2, MAE, CLIP and I-JEPA, which REPA-E shares; iREPA's ldm/vision_encoder.py and
ldm/models/dinov3_loader.py for DINOv3, SigLIP and SigLIP 2, which REPA lacks. In all of them:

- images are divided by 255, normalised and resized (CLIP's resized first, which is the same: the weights of the
  resampling sum to one), bicubic without antialiasing; only DINOv3's are resized bilinearly with antialiasing;
- features are the patch tokens of the last block, without class or register tokens, through the last LayerNorm but for
  MAE and CLIP;
- learned positions are resampled once to the grid, bicubic with antialiasing, by timm's `resample_abs_pos_embed`.

Where a model was trained otherwise, the sources are followed: SigLIP gets ImageNet's mean and standard deviation
instead of its own 0.5, MAE images of 256 instead of 224, DINOv2 images of 224 instead of 518. VA-VAE feeds its DINOv2-L
with x / 127.5 - 1, resized bilinearly; that is its own and not offered here.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field
from typing import Any

from sendvae_fast.errors import UserError
from sendvae_fast.models.foundation.preprocessing import IMAGENET, Preprocessing


@dataclass(frozen=True)
class Recipe:
    """The timm network of a named model and the features that REPA or iREPA takes from it."""

    timm_name: str
    tag: str
    """timm's name for the weights."""
    image_size: int
    final_norm: bool = True
    """Whether the tokens pass the network's last LayerNorm."""
    preprocessing: Preprocessing = IMAGENET
    arguments: dict[str, Any] = field(default_factory=dict)
    """Arguments that make timm's network the published one."""

    @property
    def weight_files(self) -> str:
        """Where the weights are published, for error messages."""
        import timm  # here and below, because a name of `RECIPES` needs no look into timm, which takes seconds

        published = timm.get_pretrained_cfg(f"{self.timm_name}.{self.tag}" if self.tag else self.timm_name)
        hub, url = (published.hf_hub_id, str(published.url or "")) if published else (None, "")
        files = [f"model.safetensors of {hub} on the hub"] if hub else []
        files += [f"the original release's {url.rsplit('/', 1)[-1]}"] if url else []
        return " or ".join(files) or f"a state dict of timm's {self.timm_name}"


_CLIP = Preprocessing(mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711))
_DINOV3 = Preprocessing(interpolation="bilinear", antialias=True)
# SigLIP was trained with the approximation of GELU; timm's base and large networks have the exact one.
_SIGLIP_ARGUMENTS = {"act_layer": "gelu_tanh"}

_SIZES = {"s": "small", "splus": "small_plus", "b": "base", "l": "large", "g": "giant", "hplus": "huge_plus"}
RECIPES = {
    **{f"dinov2-vit-{s}": Recipe(f"vit_{_SIZES[s]}_patch14_dinov2", "lvd142m", 224) for s in "sblg"},
    **{f"dinov2reg-vit-{s}": Recipe(f"vit_{_SIZES[s]}_patch14_reg4_dinov2", "lvd142m", 224) for s in "sblg"},
    **{
        f"dinov3-vit-{s}": Recipe(f"vit_{_SIZES.get(s, s)}_patch16_dinov3", "lvd1689m", 256, preprocessing=_DINOV3)
        for s in ("s", "splus", "b", "l", "hplus", "7b")
    },
    **{f"mae-vit-{s}": Recipe(f"vit_{_SIZES[s]}_patch16_224", "mae", 256, final_norm=False) for s in "bl"},
    "clip-vit-l": Recipe("vit_large_patch14_clip_quickgelu_224", "openai", 224, False, _CLIP),
    "ijepa-vit-h": Recipe("vit_huge_patch14_gap_224", "in1k_ijepa", 224),
    **{
        f"{family}-{s}": Recipe(f"vit_{name}_siglip_{size}", tag, size, arguments=_SIGLIP_ARGUMENTS)
        for family, s, name, tag, size in (
            ("siglip", "b", "base_patch16", "webli", 256),
            ("siglip", "l", "large_patch16", "webli", 256),
            ("siglip", "so400m", "so400m_patch14", "webli", 224),
            ("siglip2", "b", "base_patch16", "v2_webli", 256),
            ("siglip2", "l", "large_patch16", "v2_webli", 256),
            ("siglip2", "so400m", "so400m_patch16", "v2_webli", 256),
            ("siglip2", "g", "giantopt_patch16", "v2_webli", 256),
        )
    },
}


def recipe_of(name: str) -> Recipe:
    """The recipe of a name in `RECIPES`, or one for a timm name: its own normalisation, size and last LayerNorm."""
    if name in RECIPES:
        return RECIPES[name]
    import timm

    if not timm.is_model(name):
        known = ["demo", "squeezenet", *RECIPES]
        nearest = difflib.get_close_matches(name, known + timm.list_models("*vit*"), n=1)
        hint = f"did you mean {nearest[0]}? " if nearest else ""
        raise UserError(f"unknown foundation model {name!r}: {hint}choose {', '.join(known)}, or a ViT that timm names")
    published: Any = timm.get_pretrained_cfg(name)  # every model has one
    preprocessing = Preprocessing(mean=published.mean, std=published.std)
    return Recipe(name, published.tag or "", published.input_size[-1], preprocessing=preprocessing)
