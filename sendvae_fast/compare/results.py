"""What a comparison has found so far, as `results.json` and as the report's page, and how far it is."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

from sendvae_fast.compare.parts import seconds_of_parts
from sendvae_fast.compare.plan import (
    AUTOENCODER,
    EVALUATION,
    FINETUNING,
    GENERATOR,
    LATENTS,
    SAMPLES,
    Comparison,
    Trial,
)
from sendvae_fast.compare.timeline import PICTURES, Part, Timeline, clock
from sendvae_fast.compare.trial import ORIGINALS
from sendvae_fast.data.catalog import Catalog
from sendvae_fast.engine.run import environment
from sendvae_fast.evaluation.latent_space.view import VIEW_FILE
from sendvae_fast.evaluation.result import read_results
from sendvae_fast.files import write_atomic
from sendvae_fast.reading import count_in, last_json_line, reading
from sendvae_fast.report import load_report, write_report

PAGE_INTERVAL_S = 15.0
"""Between two pages at least: drawing one takes a second that the trainings want."""
WORDS = {
    PICTURES[1]: "pictures to train on and to test with",
    AUTOENCODER: "training the autoencoder",
    FINETUNING: "fine-tuning the autoencoder",
    LATENTS: "encoding the pictures",
    GENERATOR: "training the generator",
    SAMPLES: "drawing pictures",
    EVALUATION: "measuring",
}


class Results:
    """The results of a comparison's folder."""

    def __init__(self, comparison: Comparison, timeline: Timeline) -> None:
        self.comparison, self.root, self.timeline = comparison, comparison.root, timeline
        self._trials = {trial.name: trial for trial in comparison.trials}
        self._counts = self._counted()
        self._steps = list(dict.fromkeys(self._steps_of(trial) for trial in comparison.of_first_seed))
        self._written_s = 0.0
        self._is_behind = False
        done = self.done()
        self._said = {part for part, fraction in done.items() if fraction == 1}
        timeline.begin(done)

    # ---- How far it is ----

    def done(self) -> dict[Part, float]:
        """How much of each part is done, 0 to 1, read off the files."""
        return {part: self._fraction(*part) for part in self.timeline.costs}

    def is_finished(self) -> bool:
        """Whether everything has been measured."""
        return all(trial.is_done for trial in self._trials.values())

    def work(self) -> int:
        """Steps and pictures that the trials have done."""
        return sum(min(count(), total) for total, count in self._counts.values())

    def total_work(self) -> int:
        """Steps and pictures that the trials will have done."""
        return sum(total for total, _ in self._counts.values())

    def _counted(self) -> dict[Part, tuple[int, Callable[[], int]]]:
        """Of each part that is counted: how many steps or pictures, and how many are there."""
        counts: dict[Part, tuple[int, Callable[[], int]]] = {}
        for trial in self._trials.values():
            autoencoder, generator = trial.autoencoder_config, trial.generator_config
            for part, config in ((trial.parts[0], autoencoder), (GENERATOR, generator)):
                if config is not None:
                    counts[trial.name, part] = config.loop.num_steps, lambda run=Path(config.run): last_step(run)
            pictures = trial.folder / "generated"
            counts[trial.name, SAMPLES] = (
                self.comparison.config.samples.num_samples,
                lambda pictures=pictures: len(list(pictures.glob("[!.]*.png"))),
            )
        return counts

    def _fraction(self, owner: str, name: str) -> float:
        folder = self._trials[owner].folder if owner else self.root
        if name in seconds_of_parts(folder):
            return 1.0
        if (owner, name) not in self._counts:
            return 0.0
        total, count = self._counts[owner, name]
        return min(count() / total, 0.99)

    # ---- What is written ----

    def update(self) -> list[str]:
        """Write the page if a part was finished, not too often; returns a line about each that was."""
        done = self.done()
        finished = {part for part, fraction in done.items() if fraction == 1}
        new = [part for part in self.timeline.costs if part in finished - self._said]
        self._said |= finished
        self._is_behind |= bool(new)
        if self._is_behind and time.monotonic() - self._written_s > PAGE_INTERVAL_S:
            self.write()
        ready = max(self.timeline.remaining_s(done).values(), default=0.0)
        return [f"{words_of(part)}: done; everything at about {clock(ready)}" for part in new]

    def write(self) -> dict[str, Any]:
        """Write `results.json` and `report.html` with what there is; returns the results."""
        comparison, config = self.comparison, self.comparison.config
        train, test = (len(Catalog.open(folder)) for folder in comparison.pictures)
        source = "rendered scenes" if config.pictures.data is None else f"photographs from {config.pictures.data}"
        pictures = f"{train:,} {source} to train on, {test:,} held out"
        seeds = f"seed{'s' * (len(config.seeds) > 1)} {', '.join(map(str, config.seeds))}"
        titles = {method.key: method.title for method in config.taken()}
        results: dict[str, Any] = {
            "title": config.title,
            "subtitle": f"{pictures}, {config.pictures.image_size} px, {seeds}",
            "variants": [self._entry(method.key) for method in config.taken()],
            "notes": self._notes(),
            "settings": comparison.settings,
            "seconds": seconds_of_parts(self.root)
            | {trial.name: seconds_of_parts(trial.folder) for trial in self._trials.values()},
            "environment": environment(),
        }
        if len(titles) > 1:
            results["control"] = titles[config.control_key()]
        if config.candidate in titles and config.candidate != config.control_key():
            results["candidate"] = titles[config.candidate]
        originals = comparison.of_first_seed[0].place / ORIGINALS
        if originals.is_file():
            results["originals"] = self._inside(originals)
        if not self.is_finished():
            results["progress"] = self._progress()
        write_atomic(self.root / "results.json", json.dumps(results, indent=1) + "\n")
        write_report(self.root / "report.html", load_report(self.root))
        self._written_s, self._is_behind = time.monotonic(), False
        return results

    def _entry(self, key: str) -> dict[str, Any]:
        """What there is of a method so far, as `report.load_comparison` reads it.

        Numbers are of every seed, pictures and logs of the first.
        """
        trials = [trial for trial in self._trials.values() if trial.method.key == key]
        first = trials[0]
        entry: dict[str, Any] = {"name": first.method.title, "description": first.method.description}
        if any(trial.is_done for trial in trials):
            entry["evaluations"] = [self._inside(trial.results) for trial in trials]
        for what in ("reconstructions", "samples"):
            if first.picture(what).is_file():
                entry[what] = self._inside(first.picture(what))
        if (first.view / VIEW_FILE).is_file():
            entry["latent_space"] = self._inside(first.view)
        entry["runs"] = [self._inside(run) for run in self._runs(first)]
        if self.comparison.config.curve_every is not None:
            entry["seeds"] = [
                {"seed": trial.seed, "runs": [self._inside(run) for run in self._runs(trial)]} for trial in trials
            ]
        return entry

    def _runs(self, trial: Trial) -> list[Path]:
        """The runs of a trial that have logged something."""
        return [run for run in (trial.folder / "vae", trial.generator) if last_step(run) > 0]

    def _inside(self, path: Path) -> str:
        return str(path.relative_to(self.root))

    def _notes(self) -> list[str]:
        config, notes = self.comparison.config, [*self._steps]
        if config.features.name != "inception":
            notes.append(
                f"Fréchet distances are between features of {config.features.name}: they compare the columns of this "
                "page with each other, not with published FIDs."
            )
        if len(config.seeds) == 1:
            notes.append("One seed is an anecdote: run it with other seeds before believing a small difference.")
        if self.is_finished():
            seconds = [seconds_of_parts(folder) for folder in (self.root, *(t.folder for t in self._trials.values()))]
            minutes = sum(sum(parts.values()) for parts in seconds) / 60
            notes.append(
                f"Its parts took {minutes:.1f} minutes together; up to {self.timeline.num_workers} at a time were done "
                f"here, on {len(os.sched_getaffinity(0))} cores (an interrupted one counts from where it went on)."
            )
        return notes

    @staticmethod
    def _steps_of(trial: Trial) -> str:
        autoencoder, generator = trial.autoencoder_config, trial.generator_config
        taken = "taken as it is" if autoencoder is None else f"{autoencoder.loop.num_steps:,} steps"
        start = "" if trial.start is None else f" from {trial.start.method.title}"
        return f"{trial.method.title}: {taken}{start}, a generator of {generator.loop.num_steps:,} steps."

    def _progress(self) -> dict[str, Any]:
        """What is done and what is to come, for the page."""
        done = self.done()
        remaining = self.timeline.remaining_s(done)
        parts = []
        for part in self.timeline.costs:
            fraction = done[part]
            state = "done" if fraction == 1 else "running" if fraction > 0 else "to come"
            when = "" if part not in remaining else f"about {clock(remaining[part])}"
            parts.append({"name": words_of(part), "state": state, "fraction": round(fraction, 2), "when": when})
        ready = clock(max(remaining.values(), default=0.0))
        return {"written": time.strftime("%H:%M:%S"), "ready": ready, "parts": parts}


def words_of(part: Part) -> str:
    """A part as the user is told."""
    owner, name = part
    return f"{owner}: {WORDS[name]}" if owner else WORDS[name]


def last_step(run: Path) -> int:
    """The last step in a run's metrics; 0 while there is none."""
    path, remedy = run / "metrics.jsonl", "repair or remove it"
    if not path.is_file():
        return 0
    with reading(path, remedy):
        last = last_json_line(path)
        return 0 if last is None else count_in(last, "step")


def print_summary(comparison: Comparison, say: Callable[[str], object] = print) -> None:
    """The table of metrics as plain text, means over seeds."""
    methods = comparison.config.taken()
    columns = []
    for method in methods:
        values: dict[str, list[float]] = {}
        for trial in comparison.trials:
            if trial.method is method:
                for result in read_results(trial.results):
                    values.setdefault(result.metric, []).append(result.value)
        columns.append({metric: fmean(found) for metric, found in values.items()})
    width = max(14, *(len(method.title) + 2 for method in methods))
    say(f"{'':26s}" + "".join(f"{method.title:>{width}s}" for method in methods))
    for metric in columns[0]:
        cells = [f"{column[metric]:.3f}" if metric in column else "-" for column in columns]
        say(f"{metric:26s}" + "".join(f"{cell:>{width}s}" for cell in cells))
