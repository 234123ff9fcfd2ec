"""torch-fidelity's own Inception of FID's layout, with random weights, which cost what the published ones do."""

import io

import torch
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3


class WithoutWeights(FeatureExtractorInceptionV3):
    """As initialised: the constructor's file is not loaded."""

    def load_state_dict(self, state):
        assert state == {}


def random_inception(features=("2048", "logits_unbiased")):
    """Convolutions that keep the scale of what they get, and batch norms with statistics of their own."""
    empty = io.BytesIO()
    torch.save({}, empty)
    empty.seek(0)
    torch.manual_seed(0)
    network = WithoutWeights("inception-v3-compat", list(features), feature_extractor_weights_path=empty)
    for name, value in network.state_dict().items():
        if name.endswith("conv.weight"):
            torch.nn.init.kaiming_normal_(value)
        elif name.endswith(("bn.running_var", "bn.weight")):
            value.uniform_(0.8, 1.2)
        elif name.endswith(("bn.running_mean", "bn.bias")):
            value.normal_(std=0.1)
    return network
