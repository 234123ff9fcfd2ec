import numpy as np
import timm
import torch
from PIL import Image

from sendvae_fast.evaluation.dinov2 import DINOv2Features, resized_as_pillow

MEAN, STD = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


def test_features_are_the_class_token_of_timms_network(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("vit_small_patch14_dinov2", img_size=224, num_classes=0, global_pool="token").eval()
    torch.save(model.state_dict(), tmp_path / "s.pth")
    images = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8)
    mean, std = (torch.tensor(values).reshape(1, 3, 1, 1) for values in (MEAN, STD))
    with torch.no_grad():
        expected = model((images / 255 - mean) / std)
    network = DINOv2Features("dinov2-vit-s", str(tmp_path / "s.pth"))
    torch.testing.assert_close(network(images).pooled, expected, rtol=1e-4, atol=1e-4)
    assert network.metric("frechet") == "frechet_dinov2_s" and network.origin.dim == expected.shape[1] == 384


def test_resizing_is_pillows():
    for size in (64, 320):
        pixels = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
        theirs = np.asarray(Image.fromarray(pixels).resize((224, 224), Image.Resampling.BICUBIC), float)
        ours = resized_as_pillow(torch.from_numpy(pixels).permute(2, 0, 1)[None])[0].permute(1, 2, 0).numpy()
        assert np.abs(ours - theirs).max() <= 2 and (ours != theirs).mean() < 0.01
