"""Comparisons: what is wrong is said first, trials are shared and taken over, the page has the numbers."""

import json
import queue
import re
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager, nullcontext

import pytest
import yaml
from PIL import Image
from time_limits import HANG_S
from tiny_comparison import CONTENT, E2E, PLAIN, SEND, comparison

from sendvae_fast.cli.main import main
from sendvae_fast.compare import compare, parts, workers
from sendvae_fast.compare import trial as trial_work
from sendvae_fast.compare.compare import MAY_CHANGE, claim_folder
from sendvae_fast.compare.parts import noting, seconds_of_parts
from sendvae_fast.compare.pictures import num_pictures, picture_folders, prepare_pictures
from sendvae_fast.compare.plan import EVALUATION
from sendvae_fast.compare.settings import MethodConfig, PicturesConfig
from sendvae_fast.compare.timeline import EVALUATED, Speed, costs
from sendvae_fast.compare.trial import REFERENCE, is_trained
from sendvae_fast.data.catalog import Catalog
from sendvae_fast.engine.distributed import Distributed
from sendvae_fast.engine.signals import EXIT_REQUEUE
from sendvae_fast.errors import UserError
from sendvae_fast.evaluation.result import Result, append_results, read_results


def written(tmp_path, **changes):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(CONTENT | changes))
    return path


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"methods": [PLAIN, SEND | {"config": "demo/vae_sent"}]}, "did you mean.*vae_send"),
        ({"methods": [PLAIN, SEND | {"start": "plane"}]}, "starts from plane, .* above it; did you mean plain"),
        ({"methods": [SEND, PLAIN]}, "send starts from plain, and there is no such method above it"),
        ({"methods": [PLAIN, SEND | {"key": "plain"}]}, "two methods are called plain: give each a key"),
        ({"methods": [PLAIN, SEND | {"name": "Plain VAE"}]}, "two methods are called Plain VAE: give each a name"),
        ({"methods": [PLAIN | {"weights": "x"}]}, "plain has config and weights, or neither"),
        ({"methods": [PLAIN, SEND | {"key": "../send"}]}, "names a folder"),
        ({"methods": [PLAIN, SEND | {"settings": {"lop": 1}}]}, "send: .*unknown key lop; did you mean loop"),
        ({"methods": [PLAIN, {"key": "taken", "weights": "no/where"}]}, "no/where does not exist"),
        ({"methods": [PLAIN | {"settings": {"init_from": "no/where"}}]}, "plain needs no/where"),
        ({"only": ["sand"]}, "only names sand, .* did you mean send"),
        ({"control": "none"}, "control names none, .* there are plain, send"),
        ({"seeds": [1, 1]}, "seeds is .1, 1.: give different"),
        ({"pictures": {"data": "no/where"}}, "no/where"),
        ({"generator": "demo/sat"}, "demo/sat.*did you mean"),
        ({"features": {"name": "inception"}}, "inception need its weights"),
        ({"curve_every": 0}, "curve_every is 0"),
    ],
)
def test_what_is_wrong_is_one_line_before_the_first_step(tmp_path, capsys, monkeypatch, changes, said):
    monkeypatch.setattr(compare, "run_parts", lambda *arguments: pytest.fail("it has begun"))
    run = tmp_path / "run"
    assert main(["compare", str(written(tmp_path, **changes)), f"--run={run}"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("error: ") and not run.exists()
    assert re.search(said, error), error


def test_a_comparison_may_grow_and_not_change(tmp_path):
    claim_folder(comparison(tmp_path, methods=[PLAIN]), MAY_CHANGE)
    claim_folder(comparison(tmp_path, seeds=[0, 1]), MAY_CHANGE)
    changed = [PLAIN, SEND | {"config": "demo/vae_va"}]
    with pytest.raises(UserError, match="methods.send.config was demo/vae_send, now demo/vae_va"):
        claim_folder(comparison(tmp_path, methods=changed), MAY_CHANGE)


def test_a_folder_of_before_there_were_views_goes_on(tmp_path):
    before = comparison(tmp_path)
    claim_folder(before, MAY_CHANGE)
    note = before.root / "settings.yaml"
    note.write_text(yaml.safe_dump({key: value for key, value in before.settings.items() if key != "views"}))
    fewer = comparison(tmp_path, views={"num_shown": 2})
    claim_folder(fewer, MAY_CHANGE)
    with pytest.raises(UserError, match="views.num_shown was 2, now 6"):
        claim_folder(before, MAY_CHANGE)


def test_a_method_is_taken_with_what_it_starts_from(tmp_path):
    methods = [PLAIN, SEND, SEND | {"key": "further", "start": "send"}, PLAIN | {"key": "other", "name": "Other"}]
    trials = comparison(tmp_path, methods=methods, only=["further"], seeds=[3, 5]).trials
    assert [(trial.seed, trial.method.key) for trial in trials] == [
        (seed, key) for seed in (3, 5) for key in ("plain", "send", "further")
    ]
    last = trials[-1]
    assert last.start is trials[-2] and last.folder == tmp_path / "run" / "seed-5" / "further"
    config, generator = last.autoencoder_config, last.generator_config
    assert config.init_from == str(tmp_path / "run" / "seed-5" / "send" / "vae") and config.seed == generator.seed == 5
    assert trials[0].generator_config.latents != generator.latents
    same = trials[3].generator_config
    for name in ("run", "latents", "autoencoder"):
        setattr(same, name, getattr(generator, name))
    assert same == generator  # the same generator on every autoencoder of a seed


def test_every_run_and_job_has_its_trials_seed_pictures_and_settings(tmp_path):
    one = comparison(
        tmp_path, methods=[PLAIN, SEND | {"settings": {"loop": {"num_steps": 7}}}], seeds=[3, 5], reference="real",
        curve_every=1, curve={"num_samples": 4}, foundation={"name": "demo", "image_size": 64},
    )  # fmt: skip
    trial = one.trials[3]
    folder, train = tmp_path / "run" / "seed-5" / "send", str(tmp_path / "run" / "data" / "train")
    autoencoder, latents, generator = trial.autoencoder_config, trial.cache_config(), trial.generator_config
    assert (autoencoder.loop.num_steps, autoencoder.data.root, autoencoder.data.image_size) == (7, train, 32)
    assert (latents.data, latents.autoencoder, latents.out) == (train, str(folder / "vae"), str(folder / "latents"))
    assert (generator.latents, generator.loop.num_steps, generator.data.root) == (latents.out, 2, train)
    assert autoencoder.alignment.foundation == generator.repa.foundation == one.config.foundation
    assert generator.loop.evaluate_every == 1 and generator.evaluation.reference == "real"
    assert (generator.evaluation.generate.num_samples, generator.evaluation.features.name) == (4, "demo")
    samples = trial.sample_config()
    assert (samples.generator, samples.autoencoder) == (str(folder / "sit"), str(folder / "vae"))
    assert (samples.seed, samples.num_samples, samples.guidance_scale, samples.sampler.num_steps) == (5, 6, 2.0, 2)


def test_what_is_measured_cannot_change(tmp_path):
    begun = comparison(tmp_path)
    claim_folder(begun, MAY_CHANGE)
    generator = {"loop": {"num_steps": 3}}
    for name, value in (
        ("samples", {"num_samples": 7}), ("generator", "sit/b_1"), ("generator_settings", generator),
        ("pictures", {"image_size": 64}), ("metrics", ["kid"]), ("features", {"name": "judge"}),
        ("protocol", "lightningdit"), ("foundation", None), ("curve_every", 2), ("reference", "real"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=f"other settings .*{name}"):
            claim_folder(comparison(tmp_path, **{name: value}), MAY_CHANGE)
    claim_folder(comparison(tmp_path, title="Other", control="send", candidate="send", batch_size=3), MAY_CHANGE)


def test_a_part_is_noted_once_and_only_when_it_is_done(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(parts.time, "monotonic", lambda: now[0])

    def work(part, seconds, *codes, **settings):
        with noting(tmp_path, part, **settings) as of_part:
            now[0] += seconds
            of_part += codes

    work("a", 2.0, 0)
    work("b", 3.0, 0, EXIT_REQUEUE)
    work("b", 4.0, writes=False)
    with pytest.raises(UserError), noting(tmp_path, "b"):
        raise UserError("the disk is full")
    assert seconds_of_parts(tmp_path) == {"a": 2.0}
    work("a", 5.0)
    work("b", 6.0)
    assert seconds_of_parts(tmp_path) == {"a": 2.0, "b": 6.0}


def test_held_out_photographs_are_every_fifth_of_a_class(tmp_path):
    for name, num in (("a", 7), ("b", 10)):
        (tmp_path / "given" / name).mkdir(parents=True)
        for number in range(num):
            Image.new("RGB", (8, 8)).save(tmp_path / "given" / name / f"{number}.png")
    config = PicturesConfig(data=str(tmp_path / "given"), image_size=8)
    prepare_pictures(config, tmp_path)
    train, test = (Catalog.open(folder) for folder in picture_folders(config, tmp_path))
    assert sorted(test.names) == ["a/4.png", "b/4.png", "b/9.png"] and len(train) == 14
    assert num_pictures(config) == (14, 3)


def test_a_method_has_one_origin():
    with pytest.raises(UserError, match="takes weights as they are"):
        MethodConfig(key="a", weights="x", end_to_end=True)


@pytest.fixture
def noted(monkeypatch):
    """Trials that only leave a note of who did them, in the order in which they are done."""
    done = []

    def run_trial(trial, ranks, after_part):
        done.append(trial.name)
        (trial.folder / "parts.json").write_text(json.dumps({trial.parts[0]: 1.0}))
        if trial.method.key == "bad":
            raise UserError("the disk is full")
        append_results(trial.results, [Result(metric="psnr", value=1.0, protocol="p")])
        return 0

    monkeypatch.setattr(workers, "run_trial", run_trial)
    monkeypatch.setattr(workers, "POLL_INTERVAL_S", 0.01)
    return done


def test_a_trial_waits_for_its_start_and_is_done_once(tmp_path, noted):
    two = comparison(tmp_path, seeds=[0, 1])
    assert workers.work_off(two) == 0
    assert noted == ["Plain VAE, seed 0", "send, seed 0", "Plain VAE, seed 1", "send, seed 1"]
    assert workers.work_off(two) == 0 and len(noted) == 4
    assert all(is_trained(trial) for trial in two.trials)


def test_a_trial_that_fails_leaves_the_others_their_turn(tmp_path, noted, capsys):
    bad = SEND | {"key": "bad"}
    after = SEND | {"key": "after", "start": "bad"}
    other = SEND | {"key": "other"}
    with pytest.raises(UserError, match="the disk is full"):
        workers.work_off(comparison(tmp_path, methods=[PLAIN, bad, after, other]))
    assert noted == ["Plain VAE", "bad", "other"]
    assert capsys.readouterr().err == "bad: the disk is full (the others go on)\n"


def test_what_somebody_has_finished_in_the_meantime_is_not_done_again(tmp_path, noted, monkeypatch):
    """The lock is free because another process has just given it up, with the results there."""

    @contextmanager
    def claimed_just_after(folder):
        if folder.name == "plain":
            (folder / "parts.json").write_text(json.dumps({"autoencoder": 1.0}))
            append_results(folder / "evaluation.jsonl", [Result(metric="psnr", value=1.0, protocol="p")])
        yield True

    monkeypatch.setattr(workers, "claimed", claimed_just_after)
    assert workers.work_off(comparison(tmp_path)) == 0 and noted == ["send"]


def test_a_stopped_training_ends_its_trial_and_what_is_measured_stays(tmp_path, monkeypatch):
    one, codes, measured = comparison(tmp_path).trials[0], iter([EXIT_REQUEUE, 0, 0]), []

    def measure(trial, ranks):
        measured.append(trial.name)
        append_results(trial.results, [Result(metric="psnr", value=1.0, protocol="p")])

    for name in ("draw_reconstructions", "cache", "sample_to_folder", "draw_samples"):
        monkeypatch.setattr(trial_work, name, lambda *arguments: None)
    monkeypatch.setattr(trial_work, "train_vae", lambda config: 0)
    monkeypatch.setattr(trial_work, "train_sit", lambda config: next(codes))
    monkeypatch.setattr(trial_work, "measure", measure)
    assert trial_work.run_trial(one, Distributed()) == EXIT_REQUEUE
    assert list(seconds_of_parts(one.folder)) == ["autoencoder", "latents"] and measured == []
    for _ in range(2):
        assert trial_work.run_trial(one, Distributed()) == 0
        assert tuple(seconds_of_parts(one.folder)) == one.parts and measured == ["Plain VAE"]
        (one.folder / "parts.json").unlink()  # as if it had ended before the note


HOLDER = """
import sys, time
from pathlib import Path
from sendvae_fast.engine.run_lock import claimed
with claimed(Path(sys.argv[1])) as is_ours:
    print(is_ours, flush=True)
    time.sleep(600)
"""


def test_a_trial_that_another_process_has_is_left_to_it_and_taken_over_when_that_is_killed(
    tmp_path, noted, monkeypatch
):
    claim_next, looks = workers._claim_next, queue.SimpleQueue()

    def looking(*arguments):
        looks.put(number := claim_next(*arguments))
        return number

    monkeypatch.setattr(workers, "_claim_next", looking)
    one = comparison(tmp_path)
    first = one.trials[0]
    first.folder.mkdir(parents=True)
    with subprocess.Popen([sys.executable, "-c", HOLDER, first.folder], stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout.readline() == "True\n"
            worker = threading.Thread(target=workers.work_off, args=(one,), daemon=True)
            worker.start()
            assert looks.get(timeout=HANG_S) == workers.NOTHING_FREE and noted == []
            holder.send_signal(signal.SIGKILL)
            worker.join(HANG_S)
        finally:
            holder.kill()
    assert noted == ["Plain VAE", "send"]


def test_every_claim_is_given_up(tmp_path, noted):
    one = comparison(tmp_path)
    assert workers.work_off(one) == 0
    for trial in one.trials:
        held = subprocess.run(
            [sys.executable, "-c", HOLDER.replace("600", "0"), trial.folder], capture_output=True, text=True, check=True
        )
        assert held.stdout == "True\n"


class InThisProcess:
    """Workers that start no process."""

    def run(self, work, jobs, watch):
        codes = [work(job) for job in jobs]
        watch()
        return codes


def test_a_comparison_that_is_stopped_says_that_it_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compare, "run_parts", lambda *arguments: EXIT_REQUEUE)
    monkeypatch.setattr(compare, "measure_speed", lambda comparison: Speed(1.0, 1.0))
    run = tmp_path / "run"
    assert main(["compare", str(written(tmp_path)), f"--run={run}", "--debug"]) == EXIT_REQUEUE
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == f"stopped; what is done is kept in {run}; the same command goes on"


def test_the_guess_has_the_time_that_latents_are_looked_at(tmp_path):
    """That of t-SNE does not depend on the networks, and is of no more pictures than are held out."""

    def measuring(num_pictures, network_s=0.0):
        one = comparison(tmp_path, views={"num_pictures": num_pictures})
        return costs(one, Speed(network_s, network_s), num_train=48, num_test=24)["send", EVALUATION]

    assert 0 < measuring(10) < measuring(24) == measuring(500)
    assert measuring(20) == pytest.approx(2 * measuring(10))
    assert measuring(10, network_s=1.0) == pytest.approx(measuring(10) + (48 + 24 + 6) * EVALUATED)


@pytest.mark.slow
def test_end_to_end_training_and_curves_through_the_whole_comparison(tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "side_by_side", lambda: nullcontext(InThisProcess()))
    monkeypatch.setattr(workers, "num_workers", lambda: 2)
    curve = {"num_samples": 4, "guidance_scale": 1.0, "sampler": {"num_steps": 2}}
    taken = {"key": "plain", "weights": "demo"}
    file = written(tmp_path, methods=[taken, E2E], curve_every=1, curve=curve)
    run = tmp_path / "run"
    assert main(["compare", str(file), f"--run={run}", "--debug"]) == 0
    for key in ("plain", "e2e"):
        measured = {result.metric for result in read_results(run / "seed-0" / key / "evaluation.jsonl")}
        assert measured == {
            "rfrechet_demo", "psnr", "ssim", "frechet_demo", "decoded_frechet_demo", "patch_similarity_demo",
            "attribute_f1", "attribute_f1_micro", "attribute_f1_tuned", "attribute_f1_tuned_micro",
        }  # and no silhouette: there is a picture of each class  # fmt: skip
        points = read_results(run / "seed-0" / key / "sit" / "evaluation.jsonl")
        assert [point.step for point in points if point.metric == "frechet_demo"] == [1, 2]
    assert not (run / REFERENCE).exists()
    page = (run / "report.html").read_text()
    for words in ("How fast generators learn", "Speed-up in steps", "REPA-E", "hours of a process", "One seed is an"):
        assert words in page, words
    assert "Still to come" not in page and page.count('role="img" aria-label="Fréchet distance, demo over') == 2
