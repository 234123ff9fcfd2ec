"""REPA-E's training checkpoints: read, gone on from, written, and gone on from again."""

import copy
import shutil

import pytest
import torch
from plain_e2e import NUM_STEPS, assert_equals_plain, batch_of, networks_of, plain_steps, stage_of
from tiny_runs import COMPARED_E2E, checkpoint_tensors, e2e_config
from torch import nn

from sendvae_fast.cli.convert import Config as Convert
from sendvae_fast.cli.convert import run as convert
from sendvae_fast.errors import UserError
from sendvae_fast.ops import use_backend
from sendvae_fast.train.e2e.repa_e_checkpoint import begin_from
from sendvae_fast.train.e2e.stage import train_e2e

pytestmark = pytest.mark.slow

POSITIONS = {"generator": {"trained_positions": True}}
STEPS, UPDATES = 9, 7
"""Of a checkpoint, and of its optimizers: REPA-E counts the steps that its float16 scaler skips, too."""


class Losses(nn.Module):
    """The parameters of REPA-E's loss module, in its order: logvar, the discriminator's, those of a frozen LPIPS."""

    def __init__(self, discriminator):
        super().__init__()
        self.logvar = nn.Parameter(torch.zeros(()), requires_grad=False)
        self.discriminator = discriminator
        self.perceptual_loss = nn.Linear(3, 2).requires_grad_(False)


def optimizer_of(module):
    """torch's AdamW of a module after UPDATES steps, its moments random."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.5)
    for parameter in module.parameters():
        if parameter.requires_grad:
            optimizer.state[parameter] = {
                "step": torch.tensor(float(UPDATES)),
                "exp_avg": 1e-3 * torch.randn(parameter.shape),
                "exp_avg_sq": 1e-5 * torch.rand(parameter.shape),
            }
    return optimizer


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """A stage whose optimizers have no state, and what REPA-E's script writes of its networks with theirs."""
    stage = stage_of(tmp_path_factory.mktemp("theirs"), **POSITIONS)
    torch.manual_seed(2)
    with torch.no_grad():
        for value in (stage.sit.bn.running_mean, stage.sit.bn.ema_mean):
            value.copy_(0.1 * torch.randn(value.shape))
        for value in (stage.sit.bn.running_var, stage.sit.bn.ema_var):
            value.copy_(0.5 + torch.rand(value.shape))
        stage.sit.pos_embed += 0.1 * torch.randn_like(stage.sit.pos_embed)
    for name in stage.generator.trained:
        average = stage.generator.gather(name, "model").detach() * 0.9
        stage.generator.scatter(name, "ema", average)
    autoencoder, discriminator, sit = stage.model.autoencoder, stage.judge.discriminator.module, stage.sit
    model = sit.state_dict()
    averages = {"bn.running_mean": model.pop("bn.ema_mean"), "bn.running_var": model.pop("bn.ema_var")}
    ema = {**model, **{name: stage.generator.gather(name, "ema") for name, _ in sit.named_parameters()}, **averages}
    content = {
        "model": model, "ema": ema, "vae": autoencoder.state_dict(), "discriminator": discriminator.state_dict(),
        "opt": optimizer_of(sit).state_dict(), "opt_vae": optimizer_of(autoencoder).state_dict(),
        "opt_disc": optimizer_of(Losses(discriminator)).state_dict(), "steps": STEPS,
    }  # fmt: skip
    return stage, copy.deepcopy(content)


def test_the_next_steps_are_those_of_torchs_adamw_with_that_state(theirs, tmp_path):
    stage, content = theirs
    torch.save(content, tmp_path / "0000009.pt")
    critics = {number - 1: state for number, state in content["opt_disc"]["state"].items()}
    group = content["opt_disc"]["param_groups"][0] | {"params": list(range(len(critics)))}
    states = (content["opt_vae"], {"state": critics, "param_groups": [group]}, content["opt"])
    settings = {"loss": {"kl_weight": 1e-3}, "loop": {"num_steps": 20}}
    ours = stage_of(tmp_path, start_from=str(tmp_path / "0000009.pt"), seed=3, **settings, **POSITIONS, **COMPARED_E2E)
    assert ours.begin() == STEPS
    assert {name: engine.num_updates for name, engine in ours.engines.items()} == dict.fromkeys(ours.engines, UPDATES)
    before = networks_of(stage)
    stage.config = ours.config
    with use_backend("reference"):
        truth = plain_steps(stage, STEPS, states)
    for step in range(STEPS, STEPS + NUM_STEPS):
        ours.train_step(step, batch_of(step))
    assert_equals_plain(ours, truth, before)


@pytest.fixture(scope="module")
def run(images, tmp_path_factory):
    path = tmp_path_factory.mktemp("e2e") / "run"
    train_e2e(e2e_config(path, images, loop={"num_steps": 5}, **POSITIONS))
    return path


@pytest.fixture(scope="module")
def written(run):
    convert(Convert(source=str(run), to="repa-e", out=str(run.parent / "theirs")))
    return run.parent / "theirs" / "generator.pt"


def test_a_run_through_their_file_equals_the_uninterrupted_one(run, written, images, tmp_path):
    shutil.copytree(run, tmp_path / "whole")
    train_e2e(e2e_config(tmp_path / "whole", images, loop={"num_steps": 8}, **POSITIONS))
    for stop in (6, 8):  # the second start is from the run's own checkpoint
        settings = {"start_from": str(written), "loop": {"num_steps": stop}}
        train_e2e(e2e_config(tmp_path / "parts", images, **settings, **POSITIONS))
    whole, parts = checkpoint_tensors(tmp_path / "whole", 8), checkpoint_tensors(tmp_path / "parts", 8)
    assert whole.keys() == parts.keys() and "latent_norm.safetensors:bn.ema_var" in whole
    for name in whole:
        assert torch.equal(whole[name], parts[name]), name


def layers(*names):
    return [f"{name}.{kind}" for name in names for kind in ("weight", "bias")]


def residual(block, widens=False):
    return layers(
        *(f"{block}.{part}" for part in ("norm1", "conv1", "norm2", "conv2")), *[f"{block}.nin_shortcut"] * widens
    )


def middle(half):
    attention = layers(*(f"{half}.mid.attn_1.{part}" for part in ("norm", "q", "k", "v", "proj_out")))
    return residual(f"{half}.mid.block_1") + attention + residual(f"{half}.mid.block_2")


THEIR_ORDER = {
    "vae": [
        *layers("encoder.conv_in"), *residual("encoder.down.0.block.0"), *layers("encoder.down.0.downsample.conv"),
        *residual("encoder.down.1.block.0", widens=True), *layers("encoder.down.1.downsample.conv"),
        *residual("encoder.down.2.block.0"), *middle("encoder"), *layers("encoder.norm_out", "encoder.conv_out"),
        *layers("decoder.conv_in"), *middle("decoder"),
        *residual("decoder.up.0.block.0", widens=True), *residual("decoder.up.0.block.1"),
        *residual("decoder.up.1.block.0"), *residual("decoder.up.1.block.1"), *layers("decoder.up.1.upsample.conv"),
        *residual("decoder.up.2.block.0"), *residual("decoder.up.2.block.1"), *layers("decoder.up.2.upsample.conv"),
        *layers("decoder.norm_out", "decoder.conv_out", "quant_conv", "post_quant_conv"),
    ],
    "model": [
        "pos_embed", *layers("x_embedder.proj", "t_embedder.mlp.0", "t_embedder.mlp.2"),
        "y_embedder.embedding_table.weight",
        *layers(*(
            f"blocks.{block}.{part}" for block in (0, 1)
            for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1")
        )),
        *layers("projectors.0.0", "projectors.0.2", "projectors.0.4"),
        *layers("final_layer.linear", "final_layer.adaLN_modulation.1"),
    ],
    "discriminator": [
        *layers("main.0"), "main.2.weight", *layers("main.3"), "main.5.weight", *layers("main.6", "main.8"),
    ],
}  # fmt: skip


def test_networks_and_optimizers_are_written_in_their_order(run, written):
    content, tensors = torch.load(written, weights_only=True), checkpoint_tensors(run, 5)
    assert content.keys() == {"model", "ema", "vae", "discriminator", "opt", "opt_vae", "opt_disc", "steps"}
    assert content["steps"] == 5
    places = {"vae": "autoencoder", "model": "generator", "discriminator": "discriminator"}
    optimizers = {"vae": ("opt_vae", 0, 0), "model": ("opt", 0, 0), "discriminator": ("opt_disc", 1, 31)}
    for network, order in THEIR_ORDER.items():
        assert [name for name in content[network] if not name.startswith("bn.")] == order
        name, num_before, num_after = optimizers[network]
        (group,), state = content[name]["param_groups"], content[name]["state"]
        assert group["params"] == list(range(num_before + len(order) + num_after))
        assert list(state) == list(range(num_before, num_before + len(order)))
        prefix = "autoencoder." if network == "vae" else ""
        for number, parameter in enumerate(order, num_before):
            assert state[number]["step"] == 5
            for kind in ("exp_avg", "exp_avg_sq"):
                assert torch.equal(state[number][kind], tensors[f"engine/{places[network]}:{kind}/{prefix}{parameter}"])
        lost = torch.optim.AdamW([nn.Parameter(torch.zeros(())) for _ in group["params"]])
        lost.load_state_dict(content[name])
        assert lost.param_groups[0]["lr"] == (1e-4 if network == "discriminator" else 2e-3)
    files = {"ema": "generator/ema", "model": "generator/model", "vae": "autoencoder/model"}
    for name, file in (files | {"discriminator": "discriminator"}).items():
        for key, value in content[name].items():
            if not key.startswith("bn."):
                assert torch.equal(value, tensors[f"{file}.safetensors:{key}"])
    for name, ours in (("model", "running"), ("ema", "ema")):
        for kind in ("mean", "var"):
            truth = tensors[f"latent_norm.safetensors:bn.{ours}_{kind}"]
            assert torch.equal(content[name][f"bn.running_{kind}"], truth)


def test_a_discriminator_is_found_in_their_file(written, tmp_path):
    discriminator = stage_of(tmp_path, discriminator_from=str(written)).judge.discriminator.module
    truth = torch.load(written, weights_only=True)["discriminator"]
    for key, value in discriminator.state_dict().items():
        assert torch.equal(value, truth[key]), key


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("engines")
    return {positions: stage_of(folder, generator={"trained_positions": positions}) for positions in (True, False)}


def without_positions(content):
    del content["opt"]["state"][0]


def without_a_critics_state(content):
    del content["opt_disc"]["state"][4]


def without_a_state(content):
    del content["opt_vae"]["state"][4]


def without_a_parameter(content):
    content["opt_vae"]["param_groups"][0]["params"].pop()


def without_discriminator(content):
    del content["discriminator"], content["opt_disc"]


def smaller(content):
    content["opt"]["state"][3]["exp_avg"] = torch.zeros(3)


def wider(content):
    content["model"]["pos_embed"] = content["ema"]["pos_embed"] = torch.zeros(1, 64, 48)
    for key in ("exp_avg", "exp_avg_sq"):
        content["opt"]["state"][0][key] = torch.zeros(1, 64, 48)


def set_in(*path, value):
    def change(content):
        for key in path[:-1]:
            content = content[key]
        content[path[-1]] = value

    return change


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda content: content.pop("opt"), "is no training checkpoint of REPA-E, it has no opt"),
        (lambda content: content.pop("vae"), "is no training checkpoint of REPA-E, it has no vae"),
        (lambda content: content.pop("steps"), "no entry 'steps'"),
        (without_discriminator, "has no discriminator, and this run trains one"),
        (without_a_parameter, "opt_vae is of 151 parameters and vae has 152"),
        (without_a_critics_state, "opt_disc is of 9 parameters and discriminator has 10"),
        (without_a_state, "vae has an optimizer's state of 151 parameters, and 152 are in training"),
        (smaller, "exp_avg of parameter 3 in opt is 3 and t_embedder.mlp.0.weight of model is 32x256"),
        (wider, "pos_embed 1x64x48 instead of 1x64x32"),
        (set_in("opt", "state", 2, "step", value=torch.tensor(8.0)), "not all seen the same number of steps"),
        (set_in("opt", "state", 2, "step", value=torch.ones(2)), "not all seen the same number of steps"),
        (set_in("ema", "t_embedder.mlp.0.bias", value=torch.full((32,), torch.nan)), "ema/t_embedder.* NaN"),
        (set_in("opt_vae", "state", 1, "exp_avg_sq", value=-torch.ones(8)), "conv_in.bias of its vae is below 0"),
        (set_in("steps", value=40), "after 40 steps and loop.num_steps is 20"),
        (without_positions, "model has not trained its position embedding: set generator.trained_positions=false"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_line(change, words, theirs, trained, tmp_path):
    content = copy.deepcopy(theirs[1])
    change(content)
    torch.save(content, tmp_path / "theirs.pt")
    stage = trained[True]
    with pytest.raises(UserError, match=words) as raised:
        begin_from(str(tmp_path / "theirs.pt"), stage.engines, 20, stage.distributed)
    assert "\n" not in str(raised.value) and "theirs.pt" in str(raised.value)


def test_a_fixed_position_embedding_goes_on_only_from_one(theirs, trained, tmp_path):
    content = copy.deepcopy(theirs[1])
    torch.save(content, tmp_path / "theirs.pt")
    stage = trained[False]
    with pytest.raises(UserError, match="has trained its position embedding: set generator.trained_positions=true"):
        begin_from(str(tmp_path / "theirs.pt"), stage.engines, 20, stage.distributed)
    without_positions(content)
    torch.save(content, tmp_path / "fixed.pt")
    assert begin_from(str(tmp_path / "fixed.pt"), stage.engines, 20, stage.distributed) == STEPS


def test_weights_of_single_networks_beside_it_are_refused(tmp_path):
    with pytest.raises(UserError, match="start_from has all networks, and init_from is given as well"):
        e2e_config(tmp_path, tmp_path, start_from="theirs.pt", init_from="vae", cold_discriminator=True)


def test_other_statistics_for_a_runs_checkpoint_are_refused(run, tmp_path):
    with pytest.raises(UserError, match="leave --stats and --scaling_factor out"):
        convert(Convert(source=str(run), to="repa-e", out=str(tmp_path / "theirs"), scaling_factor=0.5))
