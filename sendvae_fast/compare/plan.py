"""What a comparison consists of: trials, each a method with a seed, and the configs of their runs and jobs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from sendvae_fast.compare.pictures import num_pictures, picture_folders
from sendvae_fast.compare.settings import CompareConfig, MethodConfig
from sendvae_fast.config import build_config, find_config, merge, plain, read_config
from sendvae_fast.engine.run_weights import resolve_weights
from sendvae_fast.errors import UserError
from sendvae_fast.evaluation.generation import open_reference
from sendvae_fast.evaluation.latent_space.view import VIEW_FOLDER
from sendvae_fast.evaluation.result import RESULTS_FILE
from sendvae_fast.models.autoencoder.storage import load_autoencoder
from sendvae_fast.models.foundation.foundation_config import FoundationConfig
from sendvae_fast.sampling.settings import SampleConfig
from sendvae_fast.train.e2e.settings import E2ETrainConfig
from sendvae_fast.train.settings import CacheConfig
from sendvae_fast.train.sit.settings import SiTTrainConfig
from sendvae_fast.train.vae.settings import VAETrainConfig

AUTOENCODER, FINETUNING = "autoencoder", "fine-tuning"
"""The first part of a trial: of an autoencoder that starts from no other method's, and of one that does."""
LATENTS, GENERATOR, SAMPLES, EVALUATION = "latents", "generator", "samples", "evaluation"


@dataclass(frozen=True)
class Trial:
    """A method with a seed. Everything of it is in its folder, but for the pictures beside it that the page shows."""

    config: CompareConfig
    method: MethodConfig
    seed: int
    place: Path
    """Folder of all trials of this seed."""
    train: Path
    """The pictures that are trained on."""
    test: Path
    """Those that are held out."""
    start: Trial | None = None
    """The one whose autoencoder it starts from."""

    @property
    def folder(self) -> Path:
        """Where it is done."""
        return self.place / self.method.key

    @property
    def name(self) -> str:
        """As the user is told."""
        return self.method.title if len(self.config.seeds) == 1 else f"{self.method.title}, seed {self.seed}"

    @property
    def parts(self) -> tuple[str, ...]:
        """What is done for it, in this order."""
        first = () if self.method.weights is not None else (FINETUNING if self.start else AUTOENCODER,)
        return (*first, LATENTS, GENERATOR, SAMPLES, EVALUATION)

    @property
    def autoencoder(self) -> str:
        """Run or weights of its autoencoder."""
        return self.method.weights or str(self.folder / "vae")

    @property
    def generator(self) -> Path:
        """Run of the generator on its latents."""
        return self.folder / "sit"

    @property
    def results(self) -> Path:
        """File of what was measured of it."""
        return self.folder / RESULTS_FILE

    @property
    def view(self) -> Path:
        """Folder of what there is to see of its latents."""
        return self.folder / VIEW_FOLDER

    def picture(self, what: str) -> Path:
        """File of its ``reconstructions`` or ``samples``, for the page."""
        return self.place / f"{self.method.key}_{what}.png"

    @property
    def is_done(self) -> bool:
        """Whether it has been measured."""
        return self.results.is_file()

    # ---- The configs of its runs and jobs ----

    @cached_property
    def autoencoder_config(self) -> VAETrainConfig | E2ETrainConfig | None:
        """Of its autoencoder's training; None where it is taken as it is."""
        method, config = self.method, self.config
        if method.config is None:
            return None
        settings = merge(self._of_every_run(), {"run": self.autoencoder})
        if config.foundation is not None:
            section = "repa" if method.end_to_end else "alignment"
            settings = merge(settings, {section: {"foundation": plain(config.foundation)}})
        if self.start is not None:
            settings["init_from"] = self.start.autoencoder
        path = find_config(method.config)
        content = merge(merge(read_config(path), method.settings), settings)
        return build_config(E2ETrainConfig if method.end_to_end else VAETrainConfig, content, f"{method.key}: {path}")

    def cache_config(self) -> CacheConfig:
        """Of its latents."""
        size = self.config.pictures.image_size
        return CacheConfig(
            out=str(self.folder / "latents"), autoencoder=self.autoencoder, data=str(self.train), image_size=size
        )

    @cached_property
    def generator_config(self) -> SiTTrainConfig:
        """Of its generator: the same for all but for the latents, and where latents have another shape."""
        config = self.config
        settings = merge(self._of_every_run(), {
            "run": str(self.generator), "latents": str(self.folder / "latents"), "autoencoder": self.autoencoder,
        })  # fmt: skip
        if config.foundation is not None:
            settings = merge(settings, {"repa": {"foundation": plain(config.foundation)}})
        if config.curve_every is not None:
            drawn = {"features": plain(config.features), "generate": plain(config.curve), "reference": config.reference}
            settings = merge(settings, {"loop": {"evaluate_every": config.curve_every}, "evaluation": drawn})
        path = find_config(self.method.generator or config.generator)
        content = merge(merge(read_config(path), config.generator_settings), settings)
        return build_config(SiTTrainConfig, content, f"the generator of {self.method.key}: {path}")

    @property
    def foundation(self) -> FoundationConfig | None:
        """The model whose patch similarities the latents' are put beside: the comparison's, else that of REPA."""
        repa = self.generator_config.repa
        return self.config.foundation or (repa.foundation if repa.weight else None)

    def sample_config(self) -> SampleConfig:
        """Of the pictures that its finished generator draws."""
        settings = {
            "generator": str(self.generator),
            "autoencoder": self.autoencoder,
            "out": str(self.folder / "generated"),
            "seed": self.seed,
        }
        return build_config(SampleConfig, merge(plain(self.config.samples), settings), "samples")

    def _of_every_run(self) -> dict[str, Any]:
        size = self.config.pictures.image_size
        return {"seed": self.seed, "data": {"root": str(self.train), "image_size": size}}


@dataclass(frozen=True)
class Comparison:
    """All trials of a folder."""

    config: CompareConfig
    recorded: Mapping[str, Any] = field(default_factory=dict)
    """The settings as the user gave them; without them those of `config`."""
    in_one_folder: bool = False
    """Whether the trials of a single seed lie in the folder itself, as the demo has it, and not in seed-<seed>."""

    @property
    def root(self) -> Path:
        """The folder."""
        return Path(self.config.run)

    @cached_property
    def trials(self) -> list[Trial]:
        """Method by method in each seed, a start before who starts from it."""
        found: dict[tuple[int, str], Trial] = {}
        for seed in self.config.seeds:
            place = self.root if self.in_one_folder else self.root / f"seed-{seed}"
            for method in self.config.taken():
                start = None if method.start is None else found[seed, method.start]
                found[seed, method.key] = Trial(self.config, method, seed, place, *self.pictures, start)
        return list(found.values())

    @property
    def of_first_seed(self) -> list[Trial]:
        """Those whose pictures and logs the page shows."""
        return [trial for trial in self.trials if trial.seed == self.config.seeds[0]]

    @property
    def pictures(self) -> tuple[Path, Path]:
        """Where the pictures are that are trained on, and those that are held out."""
        return picture_folders(self.config.pictures, self.root)

    @property
    def settings(self) -> dict[str, Any]:
        """What is recorded of it in its folder."""
        settings = dict(self.recorded) or plain(self.config)
        return {key: value for key, value in settings.items() if key != "run"}

    def check(self) -> tuple[int, int]:
        """Look at everything that is given, before the first step; returns the numbers of pictures.

        Raises:
            UserError: a config, weights or pictures are missing or broken.
        """
        config = self.config
        for trial in self.of_first_seed:
            first, generator = trial.autoencoder_config, trial.generator_config
            if trial.method.weights is not None:
                load_autoencoder(resolve_weights(trial.method.weights))
            models = [generator.repa.foundation] if generator.repa.weight else []
            models += [] if trial.foundation is None else [trial.foundation]
            if isinstance(first, VAETrainConfig) and first.alignment.lambda_align:
                models.append(first.alignment.foundation)
            elif isinstance(first, E2ETrainConfig):
                models.append(first.repa.foundation)
            files = [model.weights for model in models]
            if first is not None:
                files += [first.discriminator_from, None if trial.start else first.init_from]
                files += [] if first.loss.perceptual is None else [first.loss.perceptual.weights]
            for path in filter(None, files):
                if not Path(path).exists():
                    raise UserError(f"{trial.method.key} needs {path}, which is not there: fetch it, or name another")
            trial.sample_config()
        config.features.check()
        if config.perceptual is not None:
            config.perceptual.check()
        if config.reference is not None:
            open_reference(config.reference, config.pictures.image_size, config.features.name)
        return num_pictures(config.pictures)
