"""One point from its autoencoder to its numbers. What an earlier call has done is kept, however that call ended."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.evidence import latent_measures
from bench.evidence.decoder_tuning import DecoderTuningConfig, tune_decoder
from bench.evidence.latent_measures import ClassProbe, LatentSet
from bench.evidence.pictures import Judge, prepare_pictures, spread
from bench.evidence.study import Runs, short_hash
from bench.machine import ROOT
from sendvae_fast.config import build_config, merge, plain
from sendvae_fast.data.latents.latent_cache import LatentCache
from sendvae_fast.engine.checkpoint_files import FINAL_NAME, newest_checkpoint
from sendvae_fast.engine.distributed import Distributed
from sendvae_fast.engine.run_lock import lock_run
from sendvae_fast.engine.run_weights import resolve_weights
from sendvae_fast.evaluation.pictures import CatalogPictures
from sendvae_fast.evaluation.reconstruction_quality import IDENTICAL_PSNR_DB, psnr
from sendvae_fast.files import write_atomic
from sendvae_fast.losses.reconstruction import kl_loss
from sendvae_fast.models.autoencoder.autoencoder import Autoencoder
from sendvae_fast.models.autoencoder.storage import convolutional, load_autoencoder
from sendvae_fast.models.pixels import to_model_range, to_uint8
from sendvae_fast.models.sit.storage import load_sit
from sendvae_fast.reading import read_json
from sendvae_fast.sampling.generate import LatentSampler
from sendvae_fast.sampling.settings import GenerateConfig
from sendvae_fast.train.cache_latents import cache
from sendvae_fast.train.sit.stage import train_sit
from sendvae_fast.train.vae.stage import train_vae

DECODED_AT_ONCE = 100
NUM_HELD_OUT = 1000
"""Held-out latents at most, from all over them, that are decoded, and whose velocity is judged."""
NUM_SENSITIVE = 300
"""Of these, those that are decoded with noise of every size."""
ERROR_LEVELS = (0.2, 0.4)
"""Deviations of the noise at which decoded pictures are compared, as a generator's errors would be."""
DECODERS = {"tuned": 0.0, "tuned_noise": 0.6}
"""Decoders that are trained further, by name: the largest noise on their input."""
SAMPLING_SEED = 0
"""All points start from the same noise."""


class Stopped(Exception):
    """A training was asked to stop: it has saved itself, and goes on when the same command is run again."""


@dataclass
class PointJob:
    """The work of one point."""

    runs: Runs
    judge: Judge
    distributed: Distributed

    def run(self) -> dict[str, Any]:
        """Do what is missing; returns the result as JSON.

        Raises:
            Stopped: a signal ended a training, which is saved.
            UserError: another process works on this point or on its autoencoder.
        """
        self.runs.folder.mkdir(parents=True, exist_ok=True)
        lock_run(self.runs.folder)
        point, scale = self.runs.point, self.runs.scale
        if self.runs.published is None or point.variant.finetuning is None:
            self._train("plain", train_vae, self.runs.plain)
        if (config := self.runs.finetuning) is not None:
            self._train("finetuning", train_vae, config)
        with self._timed("latents"):
            cache(self.runs.cache, self.distributed)
        measured_by = short_hash([self.judge.network.origin.sha256, scale.samples, scale.num_train, scale.num_held_out])
        autoencoder = self._kept(
            "autoencoder", self.runs.autoencoder() / f"measured-{measured_by}.json", self._measure_autoencoder
        )
        self._train("generator", train_sit, self.runs.generator)
        for name in DECODERS:
            self._train(f"decoder {name}", lambda config: tune_decoder(config, self.distributed), self._tuning(name))
        curve = [
            self._kept(
                f"step {step}", self.runs.folder / f"step_{step}.json", lambda step=step: self._measure_generator(step)
            )
            for step in self._steps()
        ]
        result = {
            "point": point.name, "batch": point.batch, "variant": point.variant.key, "seed": point.seed,
            "control": point.variant.control, "scale": scale.name, "identity": self.runs.identity(),
            "settings": {"finetuning": plain(self.runs.finetuning or self.runs.plain),
                         "generator": plain(self.runs.generator), "samples": plain(self._samples(guided=False)),
                         "guidance": scale.guidance, "decoder": scale.decoder},
            "judge": {"name": self.judge.network.origin.name, "sha256": self.judge.network.origin.sha256,
                      "dim": self.judge.network.origin.dim},
            "autoencoder": autoencoder, "curve": curve, "cpu_seconds": self._seconds(),
        }  # fmt: skip
        return json.loads(json.dumps(result).replace(str(self.runs.root), "RUNS").replace(f"{ROOT}/", ""))

    def clean(self) -> None:
        """Remove what only this point needs, once its result is written. Autoencoders stay: other points use them."""
        shutil.rmtree(self.runs.folder, ignore_errors=True)

    def _train(self, part: str, train: Callable[[Any], int], config: Any) -> None:
        with self._timed(part):
            code = train(config)
        if code:
            raise Stopped

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        """Add up the CPU seconds of a part over all calls that ended it or were asked to stop in it."""
        start_s = time.process_time()
        yield
        if (taken_s := time.process_time() - start_s) > 1:  # less, and it was there already
            seconds = self._seconds()
            seconds[part] = round(seconds.get(part, 0.0) + taken_s, 1)
            write_atomic(self._seconds_file, json.dumps(seconds))

    @property
    def _seconds_file(self) -> Path:
        return self.runs.folder / "cpu_seconds.json"

    def _seconds(self) -> dict[str, float]:
        return read_json(self._seconds_file, "remove it") if self._seconds_file.is_file() else {}

    def _kept(self, part: str, path: Path, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What was measured, from the file of an earlier call if there is one: measurements are of finished runs."""
        if not path.is_file():
            with self._timed(f"measuring {part}"):
                write_atomic(path, json.dumps(measure()))
        return read_json(path, "remove it")

    # ---- What is measured of ----

    @cached_property
    def _autoencoder(self) -> Autoencoder:
        return self._load(self.runs.autoencoder())

    @cached_property
    def _cache(self) -> LatentCache:
        return LatentCache.open(self.runs.cache.out)

    @cached_property
    def _train_latents(self) -> LatentSet:
        return LatentSet.of_cache(self._cache)

    @cached_property
    def _held_out_latents(self) -> LatentSet:
        catalog = self.judge.held_out.catalog
        return LatentSet.of_pictures(self._autoencoder, catalog, self.runs.scale.image_size, self._cache)

    @cached_property
    def _some_held_out(self) -> LatentSet:
        return self._held_out_latents.take(spread(len(self._held_out_latents), NUM_HELD_OUT))

    @cached_property
    def _held_out_pictures(self) -> CatalogPictures:
        """Those of `_some_held_out`."""
        catalog = self.judge.held_out.catalog
        ids = spread(len(catalog), NUM_HELD_OUT).numpy()
        return CatalogPictures(catalog.subset(ids), self.runs.scale.image_size, 1)

    @cached_property
    def _decoded_features(self) -> Tensor:
        """Of the latents of `_some_held_out`, decoded: what a perfect generator's pictures are like."""
        return self.judge.features(self._pictures(self._autoencoder, self._some_held_out.samples()))

    @cached_property
    def _eigenvalues(self) -> Tensor:
        return latent_measures.covariance_spectrum(self._train_latents.samples())

    @cached_property
    def _probe(self) -> ClassProbe:
        return ClassProbe.fit(self._train_latents, self._held_out_latents)

    @cached_property
    def _decoders(self) -> dict[str, Autoencoder]:
        tuned = {name: self._load(Path(self._tuning(name).run)) for name in DECODERS}
        return {"own": self._autoencoder, **tuned}

    def _load(self, run: Path) -> Autoencoder:
        saved = load_autoencoder(resolve_weights(run))
        return convolutional(saved.autoencoder, run).to(self.distributed.device)

    def _tuning(self, name: str) -> DecoderTuningConfig:
        data = self.runs.plain.data
        settings = merge(self.runs.scale.decoder, {"seed": self.runs.point.seed, "noise": DECODERS[name]})
        settings = merge(settings, {
            "init_from": str(self.runs.autoencoder()), "data": plain(data), "engine": plain(self.runs.plain.engine),
        })  # fmt: skip
        config = build_config(DecoderTuningConfig, settings | {"run": "none"}, f"a decoder of {self.runs.point.name}")
        config.run = str(self.runs.autoencoder() / f"decoder_{name}-{short_hash(plain(config))}")
        return config

    def _steps(self) -> list[int]:
        """At which the generator is measured, ascending: those of the plan, not where a signal stopped it."""
        loop = self.runs.generator.loop
        checkpoints = (Path(self.runs.generator.run) / "checkpoints").iterdir()
        found = sorted(int(match[1]) for path in checkpoints if (match := FINAL_NAME.fullmatch(path.name)))
        return [step for step in found if step % loop.save_every == 0 or step == loop.num_steps]

    def _samples(self, guided: bool) -> GenerateConfig:
        none = {"guidance_scale": 1.0, "guidance_interval": [0.0, 1.0], "seed": SAMPLING_SEED}
        settings = merge(none, self.runs.scale.samples)
        return build_config(
            GenerateConfig, merge(settings, self.runs.scale.guidance) if guided else settings, "samples"
        )

    # ---- Measurements ----

    @torch.no_grad()
    def _decode(self, autoencoder: Autoencoder, latents: Tensor) -> Tensor:
        """Normalised latents [B, C, H, H] as pictures near [-1, 1]."""
        mean, std = (part.to(latents)[:, None, None] for part in (self._cache.latent_mean, self._cache.latent_std))
        return autoencoder.decode(latents * std + mean)

    def _pictures(self, autoencoder: Autoencoder, latents: Tensor) -> list[Tensor]:
        """Of normalised latents on the CPU: uint8 batches on the CPU."""
        device = self.distributed.device
        return [to_uint8(self._decode(autoencoder, part.to(device)), "round").cpu()
                for part in latents.split(DECODED_AT_ONCE)]  # fmt: skip

    def _measure_autoencoder(self) -> dict[str, Any]:
        """The latent space and the decoder, without a generator."""
        train, test, judge = self._train_latents, self._some_held_out, self.judge
        originals = [batch.cpu() for batch in self._held_out_pictures.batches(DECODED_AT_ONCE)]
        sampled = test.samples()
        levels = {"0": sampled} | {str(level): latent_measures.with_noise(sampled, level) for level in ERROR_LEVELS}
        decoded = {level: self._pictures(self._autoencoder, latents) for level, latents in levels.items()}
        num = self._samples(guided=False).num_samples
        true_latents = train.samples()[spread(len(train), num)]
        catalogs = judge.train.catalog, judge.held_out.catalog
        device = self.distributed.device
        measured = {
            "psnr": {
                level: float(torch.cat([psnr(x, y) for x, y in zip(originals, made, strict=True)])
                             .clamp(max=IDENTICAL_PSNR_DB).mean())
                for level, made in decoded.items()
            },
            "floor": self._compare(self._pictures(self._autoencoder, true_latents), self._decoded_features),
            "real_floor": judge.real_floor(num),
            "with_error": {level: judge.compare(judge.features(made))["frechet"] for level, made in decoded.items()},
            "class_accuracy_of_real": judge.class_accuracy(originals, test.labels),
            "class_accuracy_of_decoded": judge.class_accuracy(decoded["0"], test.labels),
            "latent_std": self._cache.latent_std.tolist(),
            "posterior_share": float(train.std.square().mean()),
            "kl": self._kl(originals),
            "class_probe": self._probe.accuracy,
            "sensitivity": latent_measures.sensitivity(
                lambda z: self._decode(self._autoencoder, z), test.mean[spread(len(test), NUM_SENSITIVE)].to(device)
            ),
            **latent_measures.spectrum(train.samples()),
        }  # fmt: skip
        if all(catalog.attributes is not None for catalog in catalogs):
            tables = [catalog.attributes for catalog in catalogs if catalog.attributes is not None]
            measured |= latent_measures.attribute_f1(train, self._held_out_latents, tables[0], tables[1])
        return measured

    @torch.no_grad()
    def _kl(self, originals: list[Tensor]) -> float:
        """KL divergence in nats, a picture's mean."""
        device = self.distributed.device
        found = [kl_loss(self._autoencoder.encode(to_model_range(part.to(device)))) for part in originals]
        return float(torch.stack(found).mean())

    def _measure_generator(self, step: int) -> dict[str, Any]:
        """The generator's EMA after a number of steps: what it knows of held-out latents, and what it draws."""
        run = Path(self.runs.generator.run)
        folder = next(path for path in (run / "checkpoints").iterdir() if path.name == f"step_{step:08d}")
        sit = load_sit(folder).sit.to(self.distributed.device)
        measured: dict[str, Any] = {
            "step": step,
            **latent_measures.velocity_errors(sit, self._some_held_out, self._eigenvalues),
        }
        is_last = folder == newest_checkpoint(run / "checkpoints")
        for name, guided in (("unguided", False), ("guided", True)):
            if guided and not is_last:
                continue
            config = self._samples(guided)
            draw = LatentSampler(sit, config, self.distributed.device)
            ids = torch.arange(config.num_samples, device=self.distributed.device)
            drawn = [draw(part) for part in ids.split(config.batch_size)]
            labels, latents = (torch.cat(column).cpu() for column in zip(*drawn, strict=True))
            measured[name] = {
                "class_accuracy_of_latents": self._probe.of_generated(latents, labels),
                "latent_power": float(latents.square().mean()),
                "decoders": {
                    decoder: {
                        "class_accuracy": self.judge.class_accuracy(pictures, labels),
                        **self._compare(pictures, self._decoded_features if decoder == "own" else None),
                    }
                    for decoder, autoencoder in (self._decoders if is_last else {"own": self._autoencoder}).items()
                    for pictures in [self._pictures(autoencoder, latents)]
                },
            }
        return measured

    def _compare(self, pictures: list[Tensor], decoded: Tensor | None) -> dict[str, Any]:
        return self.judge.compare(self.judge.features(pictures), decoded)


def prepare(runs: Runs, photographs: str | None) -> None:
    """What all points of a scale need: the pictures."""
    runs.root.mkdir(parents=True, exist_ok=True)
    prepare_pictures(runs, photographs)
