"""The plan's hypotheses, answered from the results in words that follow from the numbers alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bench.evidence.analysis import (
    MEASURES,
    Estimate,
    Result,
    by_variant,
    correlation_of_differences,
    correlation_with_distance,
    difference,
    mean_over_seeds,
    of_main_size,
    values_of,
)
from bench.evidence.study import read_variants_file
from bench.markdown import interval_text
from sendvae_fast.evaluation.correlation import Correlation

NOT_RUN = "Not run yet."
NUM_PLANNED_FINE = 3
Variants = Mapping[str, Mapping[int, Result]]


def answers(results: Sequence[Result]) -> list[str]:
    """A paragraph for each hypothesis, in the plan's order."""
    variants = by_variant(results)
    return [
        helps(variants), lost_in_the_decoder(variants), easier_to_learn(variants), with_repa(variants),
        against_controls("What of the method matters.", variants,
                         ("send_no_noise", "send_light", "send_heavy", "send_depth_0", "send_depth_2", "va", "reals")),
        against_controls("What the foundation model knows.", variants,
                         ("send_strong", "send_self_supervised", "send_random")),
        size(variants),
        predicts(results),
    ]  # fmt: skip


def paired(key: str, variants: Variants, ours: str = "send", theirs: str = "control") -> Estimate | None:
    """The difference of two variants over the seeds that both have."""
    if not variants.get(ours) or not variants.get(theirs):
        return None
    return difference(MEASURES[key], variants[ours], variants[theirs])


def told(estimate: Estimate | None, digits: int = 2) -> str:
    """A difference with its interval and seeds."""
    if estimate is None:
        return "not run"
    seeds = "one seed" if estimate.num_seeds == 1 else f"{estimate.num_seeds} seeds"
    return f"{interval_text(estimate.value, estimate.interval, digits, '+')} ({seeds})"


def verdict(estimate: Estimate | None, lower_is_better: bool = True) -> str:
    """Which side of 0 an interval is on."""
    if estimate is None or estimate.interval is None:
        return "undecided"
    if not estimate.leaves_out_zero:
        return "undecided"
    return "shown" if (estimate.value < 0) == lower_is_better else "refuted"


def helps(variants: Variants) -> str:
    """Hypothesis 1, the only confirmatory one."""
    distance = paired("frechet", variants)
    if distance is None:
        return f"*Alignment helps generation here.* {NOT_RUN}"
    f1, guided = paired("f1", variants), paired("frechet_guided", variants)
    control = mean_over_seeds(list(values_of(MEASURES["frechet"], variants["control"]).values()))
    return (
        f"*Alignment helps generation here.* **{verdict(distance).capitalize()}**: Fréchet distance of Send-VAE minus "
        f"control {told(distance)}, of the control's {control.value:.2f}; with guidance {told(guided)}. Attribute F1 "
        f"{told(f1, 3)}."
    )


def lost_in_the_decoder(variants: Variants) -> str:
    """Hypothesis 2."""
    cost, helped = paired("cost_of_error", variants), paired("helped_by_noise", variants)
    if cost is None:
        return f"*The gain is lost in the decoder.* {NOT_RUN}"
    needed = [verdict(cost, lower_is_better=False), verdict(helped)]
    found = "refuted" if "refuted" in needed else "shown" if needed == ["shown", "shown"] else "undecided"
    text = (
        f"*The gain is lost in the decoder.* **{found.capitalize()}**: an error of 0.4 deviations costs Send-VAE's "
        f"decoder {told(cost)} more distance than the control's; a decoder trained with noise helps it by "
        f"{told(helped)} more."
    )
    for remedy, name in (("kl", "a KL weight of 1e-4"), ("slow", "smaller steps for longer")):
        estimate = paired("frechet", variants, f"send_{remedy}", f"control_{remedy}")
        text += f" With {name} Send-VAE minus its control is {told(estimate)}."
    return text


def easier_to_learn(variants: Variants) -> str:
    """Hypothesis 3."""
    loss, share = paired("mean_of_gaussian", variants), paired("latent_accuracy", variants)
    if loss is None:
        return f"*Aligned latents are easier to learn.* {NOT_RUN}"
    needed = [verdict(loss), verdict(share, lower_is_better=False)]
    found = "refuted" if "refuted" in needed else "shown" if needed == ["shown", "shown"] else "undecided"
    return (
        f"*Aligned latents are easier to learn.* **{found.capitalize()}**: the velocity's loss over the best linear "
        f"estimate's {told(loss, 3)}; the share of the real latents' class accuracy that generated ones reach "
        f"{told(share, 3)}."
    )


def with_repa(variants: Variants) -> str:
    """Hypothesis 4: the difference of two differences, seed by seed."""
    title = "*With REPA alignment adds less.*"
    names = ("send", "control", "send_repa", "control_repa")
    if any(not variants.get(name) for name in names):
        return f"{title} {NOT_RUN}"
    values = [values_of(MEASURES["frechet"], variants[name]) for name in names]
    seeds = sorted(set.intersection(*(set(part) for part in values)))
    if not seeds:
        return f"{title} {NOT_RUN}"
    send, control, send_repa, control_repa = ([part[seed] for seed in seeds] for part in values)
    gains = [c - s for s, c in zip(send, control, strict=True)]
    gains_repa = [c - s for s, c in zip(send_repa, control_repa, strict=True)]
    less = mean_over_seeds([b - a for a, b in zip(gains, gains_repa, strict=True)])
    own = paired("frechet", variants, "send_repa", "control_repa")
    return (
        f"{title} **{verdict(less).capitalize()}**: Send-VAE minus control is {told(own)} with REPA; its gain with "
        f"REPA minus its gain without, same seeds: {told(less)}."
    )


def against_controls(title: str, variants: Variants, keys: Sequence[str]) -> str:
    """A list of variants' distances, each minus its control's."""
    known, parts = read_variants_file(), []
    for key in keys:
        control = known[key].control or "control"
        if variants.get(key) and variants.get(control) and (estimate := paired("frechet", variants, key, control)):
            parts.append(f"`{key}` {told(estimate)}")
    send = told(paired("frechet", variants))
    return f"*{title}* " + (f"Distance minus the control's: {'; '.join(parts)}; `send` {send}." if parts else NOT_RUN)


def size(variants: Variants) -> str:
    """Hypothesis 7. The plan tells why `fine` has more seeds than the three it was planned with."""
    text = against_controls("A matter of size.", variants, (
        "send_fine", "send_long", "send_tuned_long", "send_large", "send_8", "send_32", "send_fixed_norm",
        "send_start_1", "plain",
    ))  # fmt: skip
    planned = {
        key: {seed: result for seed, result in variants.get(key, {}).items() if seed < NUM_PLANNED_FINE}
        for key in ("send_fine", "control_fine")
    }
    if len(variants.get("send_fine", {})) <= NUM_PLANNED_FINE:
        return text
    of_planned = told(paired("frechet", planned, *planned))
    return f"{text} Of the {NUM_PLANNED_FINE} seeds that were planned: `send_fine` {of_planned}."


def predicts(results: Sequence[Result]) -> str:
    """Hypothesis 8."""
    usual = of_main_size(results)
    found = correlation_with_distance(usual, ("f1",)) if len(usual) > 3 else {}
    if "f1" not in found:
        return f"*Attribute F1 predicts the distance.* {NOT_RUN}"
    control_of = {key: variant.control for key, variant in read_variants_file().items()}
    differences = correlation_of_differences(usual, control_of, "f1")
    return (
        f"*Attribute F1 predicts the distance.* Pearson {correlation_told(found['f1'])} over points without REPA, "
        f"{correlation_told(differences)} over differences from controls, seed by seed; the paper's sign is negative."
    )


def correlation_told(one: Correlation | None) -> str:
    """A correlation with its interval and points."""
    if one is None:
        return "of too few"
    return f"{interval_text(one.pearson, one.interval, 2, '+')} (n = {len(one.points)})"
