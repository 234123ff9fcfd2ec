"""What the demo has found so far, as `results.json` and as the report's page, and how far it is."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sendvae_fast.data.catalog import Catalog
from sendvae_fast.demo.pictures import picture_folders
from sendvae_fast.demo.settings import PLANS, DemoConfig, image_size
from sendvae_fast.demo.timeline import Part, Timeline
from sendvae_fast.demo.variant import entry_of, last_step, results_path, seconds_of_parts
from sendvae_fast.engine.run import environment, plain
from sendvae_fast.evaluation.result import read_results
from sendvae_fast.files import write_atomic
from sendvae_fast.reading import numbers_in, read_json, reading
from sendvae_fast.report import load_report, write_report

PAGE_INTERVAL_S = 15.0
"""Between two pages at least: drawing one takes a second that the trainings want."""
WORDS = {
    "pictures": "pictures to train on and to test with",
    "plain autoencoder": "the plain autoencoder",
    "fine-tuning": "fine-tuning the autoencoder",
    "latents": "encoding the pictures",
    "generator": "training the generator",
    "samples": "drawing pictures",
    "evaluation": "measuring",
}
NAMES = {plan.key: plan.name for plan in PLANS}


class Results:
    """The results of a demo's folder."""

    def __init__(self, config: DemoConfig, root: Path, timeline: Timeline) -> None:
        self.config, self.root, self.timeline = config, root, timeline
        self._seconds: dict[str, float] = _seconds_before(root)
        self._finished: set[str] = set()
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
        return all(results_path(self.root, plan).is_file() for plan in PLANS)

    def work(self) -> int:
        """Steps and pictures that the variants have done."""
        return sum(min(count(), total) for total, count in self._counts().values())

    def total_work(self) -> int:
        """Steps and pictures that the variants will have done."""
        return sum(total for total, _ in self._counts().values())

    def _counts(self) -> dict[Part, tuple[int, Callable[[], int]]]:
        """Of each part that is counted: how many steps or pictures, and how many are there."""
        counts: dict[Part, tuple[int, Callable[[], int]]] = {}
        for owner, name in self.timeline.costs:
            folder = self.root / owner
            if name == "fine-tuning":
                counts[owner, name] = self.config.finetune_steps, lambda run=folder / "vae": last_step(run)
            elif name == "generator":
                counts[owner, name] = self.config.generator_steps, lambda run=folder / "sit": last_step(run)
            elif name == "samples":
                pictures = folder / "generated"
                counts[owner, name] = (
                    self.config.generate.num_samples,
                    lambda pictures=pictures: len(list(pictures.glob("[!.]*.png"))),
                )
        return counts

    def _fraction(self, owner: str, name: str) -> float:
        if owner == "demo" and name in self._finished:
            return 1.0
        if owner == "demo":  # as far as an earlier call has come
            there = last_step(self.root / "plain" / "vae") / self.config.vae_steps
            return min(there, 0.99) if name == "plain autoencoder" else float(there > 0)
        plan = next(plan for plan in PLANS if plan.key == owner)
        if name in seconds_of_parts(self.root, plan):
            return 1.0
        if (owner, name) not in self._counts():
            return 0.0
        total, count = self._counts()[owner, name]
        return min(count() / total, 0.99)

    # ---- What is written ----

    def finish(self, title: str, seconds: float) -> None:
        """One of the demo's own parts is done: write the page, if there is something to see."""
        self._finished.add(title)
        self._seconds.setdefault(title, round(seconds, 1))
        if (self.root / "originals.png").is_file():
            self.write()

    def update(self) -> list[str]:
        """Write the page if a part was finished, not too often; returns a line about each that was."""
        done = self.done()
        finished = {part for part, fraction in done.items() if fraction == 1}
        new = [part for part in self.timeline.costs if part in finished - self._said and part[0] != "demo"]
        self._said |= finished
        self._is_behind |= bool(new)
        if self._is_behind and time.monotonic() - self._written_s > PAGE_INTERVAL_S:
            self.write()
        ready = max(self.timeline.remaining_s(done).values(), default=0.0)
        return [f"{self._name(part)}: done; everything at about {_clock(ready)}" for part in new]

    def write(self) -> dict[str, Any]:
        """Write `results.json` and `report.html` with what there is; returns the results."""
        train, test = (Catalog.open(folder) for folder in picture_folders(self.config, self.root))
        source = "rendered scenes" if self.config.data is None else f"photographs from {self.config.data}"
        pictures = f"{len(train):,} {source} to train on, {len(test):,} held out"
        results: dict[str, Any] = {
            "title": "sendvae_fast demo",
            "subtitle": f"{pictures}, {image_size()} px, seed {self.config.seed}",
            "candidate": "Send-VAE",
            "control": "Control",
            "originals": "originals.png",
            "variants": [entry_of(plan, self.root) for plan in PLANS],
            "notes": self._notes(),
            "settings": plain(self.config),
            "seconds": self._seconds | {plan.name: seconds_of_parts(self.root, plan) for plan in PLANS},
            "environment": environment(),
        }
        if not self.is_finished():
            results["progress"] = self._progress()
        write_atomic(self.root / "results.json", json.dumps(results, indent=1) + "\n")
        write_report(self.root / "report.html", load_report(self.root))
        self._written_s, self._is_behind = time.monotonic(), False
        return results

    def _notes(self) -> list[str]:
        config = self.config
        notes = [
            (
                f"Control and Send-VAE start from the same plain VAE, of {config.vae_steps:,} steps, and take "
                f"{config.finetune_steps:,} steps each; every generator takes {config.generator_steps:,} steps. "
                f"Fréchet distances are between features of the foundation model {config.foundation.name}: they "
                "compare the columns of this page with each other, not with published FIDs."
            ),
            "One seed is an anecdote: run the demo with other seeds before believing a small difference.",
        ]
        if self.is_finished():
            minutes, cores = sum(self._seconds.values()) / 60, len(os.sched_getaffinity(0))
            notes.append(
                f"All of it took {minutes:.1f} minutes on {cores} cores (a part that was interrupted counts from where "
                "it went on)."
            )
        return notes

    def _progress(self) -> dict[str, Any]:
        """What is done and what is to come, for the page."""
        done = self.done()
        remaining = self.timeline.remaining_s(done)
        parts = []
        for part in self.timeline.costs:
            fraction = done[part]
            state = "done" if fraction == 1 else "running" if fraction > 0 else "to come"
            when = "" if part not in remaining else f"about {_clock(remaining[part])}"
            parts.append({"name": self._name(part), "state": state, "fraction": round(fraction, 2), "when": when})
        ready = _clock(max(remaining.values(), default=0.0))
        return {"written": time.strftime("%H:%M:%S"), "ready": ready, "parts": parts}

    @staticmethod
    def _name(part: Part) -> str:
        owner, name = part
        return WORDS[name] if owner == "demo" else f"{NAMES[owner]}: {WORDS[name]}"


def _seconds_before(root: Path) -> dict[str, float]:
    """How long the demo's own parts took that an earlier call has finished."""
    path, remedy = root / "results.json", "remove it and run the same command again"
    if not path.is_file():
        return {}
    results = read_json(path, remedy)
    with reading(path, remedy):
        return numbers_in({name: taken for name, taken in results["seconds"].items() if not isinstance(taken, dict)})


def print_summary(root: Path, results: dict[str, Any], say: Callable[[str], object] = print) -> None:
    """The table of metrics as plain text."""
    columns = [
        {result.metric: result for file in entry.get("evaluations", []) for result in read_results(root / file)}
        for entry in results["variants"]
    ]
    say(f"{'':24s}" + "".join(f"{entry['name']:>14s}" for entry in results["variants"]))
    for metric in columns[0]:
        values = [column[metric].value if metric in column else None for column in columns]
        say(f"{metric:24s}" + "".join(f"{'-':>14s}" if value is None else f"{value:14.3f}" for value in values))


def _clock(seconds: float) -> str:
    """The time of day in so many seconds."""
    return time.strftime("%H:%M", time.localtime(time.time() + seconds))
