"""The study of alignment and generation: its plan, its measures against closed forms, a tiny point, its page."""

import json
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr, ttest_rel
from torch_fidelity.metric_kid import kid_features_to_metric

from bench.evidence import analysis, chosen, latent_measures, listing, page, pictures, plots, study
from bench.evidence.decoder_tuning import DecoderStage, is_of_decoder
from bench.evidence.latent_measures import LatentSet
from bench.evidence.point import PointJob
from bench.evidence.study import Runs, read_points, read_scale, read_variants_file
from sendvae_fast.config import build_config
from sendvae_fast.engine.distributed import init_distributed
from sendvae_fast.errors import UserError
from sendvae_fast.evaluation.feature_config import FeaturesConfig
from sendvae_fast.models.autoencoder.storage import load_autoencoder
from sendvae_fast.models.sit.sit import SiT
from sendvae_fast.train.sit.settings import SiTTrainConfig
from sendvae_fast.train.sit.stage import SiTStage
from sendvae_fast.train.vae.settings import VAETrainConfig
from sendvae_fast.train.vae.stage import VAEStage

GPU_CHECKPOINT_BYTES = 60e6


# ---- The plan ----


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    """The scale, and a point of every variant at seed 0 by the variant's name, as runs."""
    scale, root = read_scale("cpu"), tmp_path_factory.mktemp("plan")
    return {point.variant.key: Runs(scale, point, root) for point in read_points() if point.seed == 0}


def test_every_variant_is_run_once_beside_its_control(plan):
    names = [point.name for point in read_points()]
    assert len(set(names)) == len(names) and set(plan) == set(read_variants_file())
    for point in read_points():
        assert point.variant.control is None or f"{point.variant.control}-{point.seed}" in names


def test_settings_are_those_of_runs(plan):
    """Of the variants; their controls differ in the method of alignment alone, see below."""
    built, controls = set(), {runs.point.variant.control for runs in plan.values()}
    for key, runs in plan.items():
        finetuning, generator = runs.finetuning_settings(), runs.generator_settings()
        assert generator["seed"] == 0
        assert finetuning is None or finetuning["init_from"] == str(runs.published or runs.plain.run)
        for kind, settings in ((VAETrainConfig, finetuning), (SiTTrainConfig, generator)):
            own = None if settings is None else study.short_hash(settings | {"latents": ""})
            if settings is not None and own not in built and key not in controls:
                built.add(own)
                build_config(kind, settings | {"run": "none"})


def test_a_variant_and_its_control_differ_in_alignment_alone(plan):
    """Equal steps, rate, batch and loss: else what is compared is not alignment."""
    for runs in plan.values():
        if runs.point.variant.control is None:
            continue
        ours, theirs = (one.finetuning_settings() for one in (runs, plan[runs.point.variant.control]))
        methods = ours.pop("alignment"), theirs.pop("alignment")
        assert ours == theirs
        assert methods[0].get("latent_norm") == methods[1].get("latent_norm") and methods[1]["method"] == "none"
        ours, theirs = (one.generator_settings() for one in (runs, plan[runs.point.variant.control]))
        for settings in (ours, theirs):
            del settings["latents"]
        assert ours == theirs


def test_the_gpus_checkpoints_are_small(tmp_path):
    """Weights, EMA twice and two moments of the generator; weights and two moments of the autoencoder: fp32."""
    scale = read_scale("gpu", foundation_weights="dinov2.safetensors")
    point = next(point for point in read_points() if point.variant.key == "send_repa")
    runs = Runs(scale, point, tmp_path)
    generator, autoencoder = runs.generator, runs.plain.autoencoder
    size = scale.image_size // autoencoder.downsampling
    with torch.device("meta"):
        sit = SiT(generator.generator.build((autoencoder.latent_channels, size, size), 1000, 768, generator.repa.block))
    assert 20 * sum(value.numel() for value in sit.parameters()) < GPU_CHECKPOINT_BYTES


def test_points_are_chosen_by_name_or_variant():
    points = read_points()
    assert [point.name for point in chosen(points, ["send-1"])] == ["send-1"]
    assert [point.name for point in chosen(points, ["send"])] == [f"send-{seed}" for seed in range(6)]
    with pytest.raises(UserError, match="no point sand-0"):
        chosen(points, ["sand-0"])


# ---- The measures ----


def test_kernel_distance_is_torch_fidelitys_on_whole_sets():
    x, y = torch.randn(60, 8).double(), torch.randn(60, 8).double() * 1.3 + 0.2
    theirs = kid_features_to_metric(x, y, kid_subsets=1, kid_subset_size=60, rng_seed=0, verbose=False)
    assert pictures.kernel_distance(x, y) == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-6)


def test_effective_rank_counts_equal_directions():
    latents = torch.zeros(4000, 4, 2, 2)
    latents[:, 1] = torch.randn(4000, 2, 2)
    found = latent_measures.spectrum(latents)
    assert found["effective_rank"] == pytest.approx(4, rel=0.01) and found["dimensions"] == 16
    constant = torch.randn(500, 4, 1, 1).expand(-1, -1, 2, 2)
    assert latent_measures.spectrum(constant)["mean_share"] == pytest.approx(1)


def test_velocity_errors_of_the_best_linear_estimate_are_those_of_a_gaussian():
    """Independent latents of known variances: the estimate E[v | z_t] by the textbook's formula."""
    torch.manual_seed(0)
    variances = torch.tensor([0.1, 0.3, 0.5, 0.7])[:, None, None].expand(4, 2, 2)
    mean = torch.randn(2000, 4, 2, 2) * variances.sqrt()
    held_out = LatentSet(mean, torch.zeros_like(mean), torch.zeros(2000, dtype=torch.long))

    class Best:
        config = SimpleNamespace(patch_size=1)

        def parameters(self):
            return iter([torch.zeros(1)])

        def __call__(self, tokens, t, labels):
            z_t, t = tokens.transpose(1, 2).unflatten(2, (2, 2)), t[:, None, None, None]
            return (t - (1 - t) * variances) / ((1 - t) ** 2 * variances + t**2) * z_t, None

    found = latent_measures.velocity_errors(Best(), held_out, variances.flatten().double())
    assert all(value == pytest.approx(1, abs=0.05) for value in found["of_gaussian"].values())
    # From nearly pure noise nothing is known: the error of the latent is its variance.
    assert found["denoising_error"]["0.9"] == pytest.approx(
        float((variances * 0.81 / (0.01 * variances + 0.81)).mean() / variances.mean()), rel=0.05
    )


def test_paired_differences_have_students_interval():
    rng = np.random.default_rng(0)
    ours, theirs = rng.normal(size=5), rng.normal(size=5)
    measure = analysis.Measure("x", "x", lambda result: result["x"])
    found = analysis.difference(
        measure,
        {seed: {"x": value} for seed, value in enumerate(ours)},
        {seed: {"x": value} for seed, value in enumerate(theirs)} | {9: {"x": 100.0}},
    )
    expected = ttest_rel(ours, theirs).confidence_interval()
    assert found.interval == pytest.approx((expected.low, expected.high)) and found.num_seeds == 5
    assert analysis.mean_over_seeds([1.0]).interval is None


def test_differences_are_correlated_within_their_seed(monkeypatch):
    rng = np.random.default_rng(0)
    for key in ("f1", "frechet"):
        monkeypatch.setitem(analysis.MEASURES, key, analysis.Measure(key, key, lambda result, key=key: result[key]))
    names = {"control": None, "send": "control", "alone": None}
    results = [
        {"point": f"{name}-{seed}", "variant": name, "seed": seed, "f1": rng.normal(), "frechet": rng.normal()}
        for name in names for seed in range(5) if (name, seed) != ("control", 3)
    ]  # fmt: skip
    value = {result["point"]: result for result in results}
    x, y = (
        [value[f"send-{seed}"][key] - value[f"control-{seed}"][key] for seed in (0, 1, 2, 4)]
        for key in ("f1", "frechet")
    )
    found = analysis.correlation_of_differences(results, names, "f1")
    assert found.pearson == pytest.approx(pearsonr(x, y).statistic) and len(found.points) == 4
    assert analysis.correlation_of_differences(results[:2], names, "f1") is None


# ---- A point ----


@pytest.mark.slow
def test_a_point_interrupted_anywhere_is_gone_on_with_and_is_the_same(tmp_path, monkeypatch):
    """Interrupted in the middle of a training, and before the last measurement; then compared with one go."""
    scale = read_scale("tiny")
    scale.judge = None
    monkeypatch.setattr("bench.evidence.point.DECODERS", {"tuned_noise": 0.6})
    monkeypatch.setattr("bench.evidence.point.ERROR_LEVELS", (0.4,))
    monkeypatch.setattr(latent_measures, "NOISE_LEVELS", (0.3, 0.8))
    point = next(point for point in read_points() if point.name == "send-0")
    distributed = init_distributed("cpu")

    def job(name):
        runs = Runs(scale, point, tmp_path / name)
        pictures.prepare_pictures(runs, None)
        judge = pictures.Judge.open(runs, FeaturesConfig(name="judge"), distributed.device)
        return PointJob(runs, judge, distributed)

    for owner, method, step in ((VAEStage, "train_step", 2), (PointJob, "_measure_generator", 4)):
        with monkeypatch.context() as patch:
            patch.setattr(owner, method, interrupted_at(step, getattr(owner, method)))
            with pytest.raises(KeyboardInterrupt):
                job("interrupted").run()
    with monkeypatch.context() as patch:
        for stage in (VAEStage, SiTStage, DecoderStage):
            patch.setattr(stage, "train_step", lambda *_: pytest.fail("trained again"))
        gone_on_with = job("interrupted").run()
    whole = job("whole")
    result = whole.run()
    for key in ("autoencoder", "curve", "identity"):
        assert gone_on_with[key] == result[key]
    folder = whole.runs.autoencoder()
    own = load_autoencoder(next(folder.glob("checkpoints/step_*"))).autoencoder.state_dict()
    tuned = load_autoencoder(next(folder.glob("decoder_tuned_noise*/checkpoints/step_*"))).autoencoder.state_dict()
    changed = {key for key, value in tuned.items() if not torch.equal(value, own[key])}
    assert changed and all(map(is_of_decoder, changed)), "the latents are no longer the generator's"
    assert all(map(math.isfinite, numbers(result["autoencoder"]) + numbers(result["curve"])))


def interrupted_at(step, method):
    """A method of (step, ...) that is interrupted at a step."""

    def interrupted(self, *arguments):
        if arguments[0] == step:
            raise KeyboardInterrupt
        return method(self, *arguments)

    return interrupted


def numbers(tree):
    if isinstance(tree, dict):
        return [number for value in tree.values() for number in numbers(value)]
    if isinstance(tree, list):
        return [number for value in tree for number in numbers(value)]
    return [tree] if isinstance(tree, int | float) else []


# ---- The page ----


def test_the_page_is_made_from_the_results():
    results = analysis.read_results(study.RESULTS / page.SCALE)
    text = page.PAGE.read_text(encoding="utf-8")
    assert page.page_with(text, results) == text, "run `python -m bench evidence --page`"
    drawn = sorted(page.IMAGES.glob(f"{plots.PREFIX}*.svg"))
    shown = sorted(re.findall(r"\(images/(evidence_\w+\.svg)\)", text))
    assert [path.name for path in drawn] == shown
    assert all(page.fingerprint(results) in path.read_text(encoding="utf-8") for path in drawn)


def test_results_are_of_the_plans_settings(tmp_path):
    """A result whose settings are no longer the plan's may not stand on the page."""
    scale = read_scale("cpu")
    points = {point.name: point for point in read_points()}
    for file in (study.RESULTS / "cpu").glob("*.json"):
        result = json.loads(file.read_text(encoding="utf-8"))
        assert (
            result["point"] == file.stem and result["identity"] == Runs(scale, points[file.stem], tmp_path).identity()
        )


def test_listing_says_what_is_missing(tmp_path):
    scale, points = read_scale("cpu"), chosen(read_points(), ["send"])
    file = points[2].result_file(scale, tmp_path)
    file.parent.mkdir(parents=True)
    file.write_text("{}")
    assert listing(points, scale, tmp_path).split() == "alignment send done [2], missing [0, 1, 3, 4, 5]".split()
