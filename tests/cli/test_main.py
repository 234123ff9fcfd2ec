"""The sendvae command: every verb, its help, and what it says when something is wrong."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import forks
import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file
from two_ranks import run_on_two_ranks

from sendvae_fast.cli.main import VERBS, main
from sendvae_fast.cli.options import config_options
from sendvae_fast.config import packaged_configs
from sendvae_fast.engine import distributed
from sendvae_fast.evaluation.result import read_results
from sendvae_fast.files import file_sha256
from sendvae_fast.models.foundation.demo_vit import DEMO_WEIGHTS
from sendvae_fast.models.weights import weights_sha256
from sendvae_fast.report.metric_names import metric_of
from sendvae_fast.sampling.settings import SampleConfig
from sendvae_fast.version import __version__

TINY_VAE = [
    "--data.image_size=32",
    "--data.global_batch=8",
    "--autoencoder.base_channels=8",
    "--autoencoder.channel_multipliers=[1,2,2]",
    "--autoencoder.num_res_blocks=1",
    "--autoencoder.attention_resolutions=[]",
    "--autoencoder.nominal_resolution=32",
    "--autoencoder.latent_channels=4",
    "--autoencoder.num_groups=4",
    "--alignment.foundation.name=demo",
    "--alignment.send.width=32",
    "--alignment.send.num_heads=2",
    "--alignment.send.projector_width=32",
    "--loss.gan_weight=0",
    "--loop.num_steps=2",
    "--loop.log_every=1",
]
TINY_SIT = [
    "--data.image_size=32",
    "--data.global_batch=8",
    "--generator.preset=null",
    "--generator.width=32",
    "--generator.depth=2",
    "--generator.num_heads=2",
    "--generator.projector_width=32",
    "--repa.block=1",
    "--repa.foundation.name=demo",
    "--loop.num_steps=2",
    "--loop.log_every=1",
    "--preview.num_samples=4",
    "--preview.sampler.num_steps=2",
]

ATTRIBUTE_METRICS = ["attribute_f1", "attribute_f1_micro", "attribute_f1_tuned", "attribute_f1_tuned_micro"]
LATENT_METRICS = [
    "class_probe_accuracy", "latent_high_frequency", "decoder_sensitivity", "patch_similarity_demo",
]  # fmt: skip
TRAVERSAL_METRICS = ["traversal_selectivity", "traversal_effect"]

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    """A folder in which every verb has run, in the order of a user's day."""
    root = tmp_path_factory.mktemp("house")
    images, vae, latents, sit = (str(root / name) for name in ("images", "vae", "latents", "sit"))
    commands = [
        ["data", "synth", images, "--num-images=24", "--size=32"],
        ["train", "vae", f"--run={vae}", f"--data.root={images}", *TINY_VAE],
        ["cache-latents", f"--autoencoder={vae}", f"--data={images}", f"--out={latents}", "--image_size=32"],
        [
            "train",
            "sit",
            f"--run={sit}",
            f"--latents={latents}",
            f"--data.root={images}",
            f"--autoencoder={vae}",
            *TINY_SIT,
        ],
        [
            "sample",
            f"--generator={sit}",
            f"--autoencoder={vae}",
            f"--out={root / 'samples'}",
            "--num_samples=6",
            "--batch_size=4",
            "--sampler.num_steps=3",
            "--npz",
        ],
        [
            "evaluate",
            "generation",
            f"--samples={root / 'samples'}",
            f"--reference={images}",
            "--features.name=demo",
        ],
        ["evaluate", "reconstruction", f"--autoencoder={vae}", f"--data={images}", "--features.name=demo"],
        ["evaluate", "attributes", f"--autoencoder={vae}", f"--data={images}", f"--train_data={images}"],
        [
            "evaluate",
            "latents",
            f"--autoencoder={vae}",
            f"--data={images}",
            f"--train_data={images}",
            "--measures=[classes,spectrum,sensitivity,patches]",
            "--foundation.name=demo",
            "--foundation.image_size=32",
        ],
        [
            "evaluate",
            "traversals",
            f"--autoencoders=[{vae}]",
            f"--data={images}",
            f"--train_data={images}",
            f"--folder={root / 'traversals'}",
            "--num_pictures=2",
            "--num_shown=1",
        ],
        ["report", vae],
        ["report", sit],
    ]
    for command in commands:
        assert main([*command, "--debug"]) == 0, command
    return root


def test_every_verb_leaves_what_it_promises(house):
    assert len(list((house / "images").rglob("*.jpg"))) == 24
    assert (house / "vae" / "checkpoints" / "step_00000002" / "manifest.json").is_file()
    assert (house / "sit" / "checkpoints" / "step_00000002" / "ema.safetensors").is_file()
    assert (house / "latents" / "cache.json").is_file()
    assert len(list((house / "samples").glob("*.png"))) == 6
    for name in ("view.json", "pictures.png", "latents.png", "foundation.png"):
        assert (house / "vae" / "latent_space" / name).is_file()
    assert np.load(house / "samples.npz")["arr_0"].shape == (6, 32, 32, 3)
    drawn = ["frechet_demo", "precision_demo", "recall_demo", "kid_demo", "mind_demo"]
    assert sorted(path.name for path in (house / "traversals").iterdir()) == ["matrices.png", "strips_0.png"]
    measured = {
        "vae": ["rfrechet_demo", "psnr", "ssim", *ATTRIBUTE_METRICS, *LATENT_METRICS, *TRAVERSAL_METRICS],
        "sit": drawn,
    }
    for run, names in measured.items():
        assert [result.metric for result in read_results(house / run / "evaluation.jsonl")] == names
        page = (house / run / "report.html").read_text()
        assert "<h2>All metrics" in page and all(metric_of(name).label in page for name in names)


def test_a_result_says_what_it_was_measured_on(house):
    distance, *_ = read_results(house / "vae" / "evaluation.jsonl")
    autoencoder, data = distance.weights["autoencoder"], distance.pictures["data"]
    checkpoint = house / "vae" / "checkpoints" / "step_00000002"
    assert autoencoder.path == str(checkpoint) and autoencoder.step == 2
    assert autoencoder.sha256 == weights_sha256(load_file(checkpoint / "model.safetensors"))
    assert (data.num_pictures, data.image_size, data.hash_of) == (24, 32, "names")  # the crop is the run's
    assert distance.features.name == "demo" and distance.features.sha256 == file_sha256(DEMO_WEIGHTS)
    assert distance.counts == {"pictures": 24} and "24 pictures are no more than" in distance.remarks[-1]
    assert distance.code["sendvae_fast"] == __version__ and distance.seconds >= 0


def test_pictures_measured_as_they_are_drawn_are_those_of_the_folder(house, tmp_path, capsys):
    """With the folder's settings, another batch size and no file in between."""
    before = read_results(house / "sit" / "evaluation.jsonl")
    arguments = [f"--generator={house / 'sit'}", f"--autoencoder={house / 'vae'}", f"--reference={house / 'images'}"]
    settings = ["--generate.num_samples=6", "--generate.sampler.num_steps=3", "--batch_size=5", "--features.name=demo"]
    assert main(["evaluate", "generation", *arguments, *settings, f"--out={tmp_path / 'results.jsonl'}"]) == 0
    assert "\nnote: 6 pictures are no more than" in capsys.readouterr().out
    online = read_results(tmp_path / "results.jsonl")
    assert [result.metric for result in online] == [result.metric for result in before]
    for ours, theirs in zip(online, before, strict=True):  # but for a grey level that the batch's rounding may move
        assert ours.value == pytest.approx(theirs.value, rel=1e-3, abs=1e-4)
        assert ours.weights["generator"].step == theirs.weights["generator"].step == 2
        assert {result.pictures["samples"].settings["guidance_scale"] for result in (ours, theirs)} == {2.5}
    assert list(tmp_path.iterdir()) == [tmp_path / "results.jsonl"]  # features are kept while the work lasts


def test_two_ranks_measure_latents_as_one_does(house, tmp_path):
    """They share encoding, probes and traversals; one of them writes."""
    data = [f"--{key}={house / 'images'}" for key in ("data", "train_data")]
    commands = [
        [
            "latents",
            f"--autoencoder={house / 'vae'}",
            "--measures=[classes,spectrum,sensitivity,patches]",
            "--foundation={name: demo, image_size: 32}",
        ],
        ["traversals", f"--autoencoders=[{house / 'vae'}]", "--num_pictures=3", "--num_shown=2"],
    ]
    found = {}
    for ranks in ("one", "two"):
        places = {
            "latents": [f"--view={tmp_path / ranks / 'view'}"],
            "traversals": [f"--folder={tmp_path / ranks / 'figures'}"],
        }
        results = tmp_path / ranks / "results.jsonl"
        complete = [["evaluate", *line, *data, *places[line[0]], f"--out={results}"] for line in commands]
        if ranks == "one":
            assert [main(line) for line in complete] == [0, 0]
        else:
            (tmp_path / "commands.json").write_text(json.dumps(complete))
            ended = run_on_two_ranks(Path(__file__).with_name("verbs_of_ranks.py"), tmp_path / "commands.json")
            assert ended.returncode == 0, ended.stderr
        found[ranks] = read_results(results)
    assert [result.metric for result in found["one"]] == LATENT_METRICS + TRAVERSAL_METRICS
    for one, two in zip(found["one"], found["two"], strict=True):
        assert (one.metric, one.counts) == (two.metric, two.counts)
        assert two.value == pytest.approx(one.value, rel=1e-3, abs=1e-4)  # probes are fitted by sums in another order
    for name in ("figures/strips_0.png", "figures/strips_1.png", "view/latents.png", "view/foundation.png"):
        one, two = (np.asarray(Image.open(tmp_path / ranks / name), int) for ranks in ("one", "two"))
        assert np.abs(one - two).mean() < 1


def test_samples_depend_on_nothing_but_their_ids(house, tmp_path):
    """Another batch size and a restart after two pictures were lost give the same pictures, but for a matrix product's
    rounding, which depends on the batch size and may move a value at the edge of two grey levels.
    """
    arguments = [
        "sample",
        f"--generator={house / 'sit'}",
        f"--autoencoder={house / 'vae'}",
        f"--out={tmp_path / 's'}",
        "--num_samples=6",
        "--sampler.num_steps=3",
    ]
    assert main([*arguments, "--batch_size=6"]) == 0
    for sample_id in (1, 4):
        (tmp_path / "s" / f"{sample_id:06d}.png").unlink()
    assert main([*arguments, "--batch_size=1"]) == 0
    for sample_id in range(6):
        name = f"{sample_id:06d}.png"
        one, other = (np.asarray(Image.open(folder / name), int) for folder in (house / "samples", tmp_path / "s"))
        assert np.abs(one - other).max() <= 1 and (one != other).mean() < 1e-3, name


def test_a_finished_run_does_nothing_more(house, capsys):
    before = (house / "vae" / "metrics.jsonl").read_text()
    arguments = [f"--run={house / 'vae'}", f"--data.root={house / 'images'}", *TINY_VAE]
    assert main(["train", "vae", *arguments]) == 0
    assert (house / "vae" / "metrics.jsonl").read_text() == before


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_every_verb_fits_a_screen(verb, capsys, monkeypatch):
    for columns, most_lines in ((100, 40), (80, 45)):
        monkeypatch.setenv("COLUMNS", str(columns))
        assert main([*verb.split(), "--help"]) == 0
        text = capsys.readouterr().out
        assert text.startswith(f"usage: sendvae {verb}") and f"    sendvae {verb} " in text  # there is an example
        lines = text.splitlines()
        assert len(lines) <= most_lines and max(map(len, lines)) <= 120


@pytest.mark.parametrize("verb", VERBS)
def test_main_options_are_options(verb):
    module = importlib.import_module("sendvae_fast.cli." + verb.replace(" ", "_").replace("-", "_"))
    keys = {option.key for option in config_options(module.Config)} if hasattr(module, "Config") else set()
    shown = getattr(module, "MAIN_OPTIONS", ())
    assert set(shown) <= keys and len(set(shown)) == len(shown)


@pytest.mark.parametrize("verb", ["train vae", "train sit", "sample", "demo"])
def test_short_help_has_what_is_required_and_leaves_the_rest_to_the_complete_one(verb, capsys):
    module = importlib.import_module("sendvae_fast.cli." + verb.replace(" ", "_"))
    main([*verb.split(), "--help"])
    short = capsys.readouterr().out
    main([*verb.split(), "--help=all"])
    complete = capsys.readouterr().out
    options = list(config_options(module.Config))
    assert all(f"  --{option.key} " in complete for option in options)
    wanted = {option.key for option in options if option.required} | set(module.MAIN_OPTIONS)
    assert {option.key for option in options if f"  --{option.key} " in short} == wanted != {o.key for o in options}
    assert f"all options ({len(options)})" in short and " ...\n" not in complete


def test_options_are_read_off_the_dataclass():
    options = {option.key: option for option in config_options(SampleConfig)}
    assert options["out"].required and options["out"].default is None and options["out"].kind == "TEXT"
    steps, interval = options["sampler.num_steps"], options["guidance_interval"]
    assert (steps.kind, steps.default, steps.required) == ("N", "250", False) and steps.section.startswith("sampler: ")
    assert (interval.kind, interval.default) == ("[X,X]", "[0.0,0.75]")
    assert (
        set(options["labels"].kind.split("|")) == {"random", "equal"} and options["guidance_channels"].default is None
    )
    assert "Not for `dopri5`" in steps.description and "Pictures." in options["num_samples"].description  # inherited


def test_complete_help_lists_what_may_be_null_too(capsys):
    main(["train", "vae", "--help", "all"])
    out = capsys.readouterr().out
    assert all(f"--loss.perceptual.{name} " in out for name in ("net", "weights", "heads", "legacy_range"))


@pytest.mark.parametrize("arguments", [["data"], ["data", "--help"], ["train", "-h"], ["config", "--help"]])
def test_a_group_lists_its_verbs(arguments, capsys):
    assert main(arguments) == 0
    out = capsys.readouterr().out
    listed = {verb for verb in VERBS if f"\n  {verb} " in out}
    assert listed == {verb for verb in VERBS if verb.split()[0] == arguments[0]} and len(listed) > 1


def test_config_list_names_every_packaged_config(capsys):
    assert main(["config", "list"]) == 0
    out = capsys.readouterr().out
    assert all(f"  {name} " in out for name in packaged_configs()) and "Table 5, f16d16 + L_align\n" in out
    assert main(["config", "list", "sit"]) == 0
    assert "sit/xl_1 " in (out := capsys.readouterr().out) and "vae/" not in out
    assert main(["config", "list", "nothing"]) == 2


def test_a_reader_that_leaves_early_is_no_error(tmp_path):
    """As `| head -1` does: more is written than a pipe holds, and nobody reads it."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    with open(tmp_path / "errors.txt", "w") as errors:
        command = forks.start(["-m", "sendvae_fast", "train", "vae", "--help=all"], stdout=write_end, stderr=errors)
    os.close(write_end)
    assert (command.wait(), (tmp_path / "errors.txt").read_text()) == (0, "")


@pytest.mark.parametrize(("rank", "said"), [("0", True), ("1", False)])
def test_a_wrong_command_line_is_said_once_for_all_ranks(rank, said, capsys, monkeypatch):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "2")
    if said:
        assert main(["train", "vae", "--rum=x"]) == 2
    else:
        with pytest.raises(SystemExit, match="2"):
            main(["train", "vae", "--rum=x"])
    assert ("did you mean run?" in capsys.readouterr().err) == said


@pytest.mark.parametrize("is_said", [True, False])
def test_an_error_of_all_ranks_is_said_once(is_said, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(distributed, "says_as_first_rank", lambda message: is_said and "nowhere" in message)
    assert main(["report", str(tmp_path / "nowhere")]) == 2
    words = capsys.readouterr().err
    assert words == "" if is_said else words.startswith("rank 1: error: ")


def test_deepspeeds_launcher_puts_the_local_rank_before_the_verb(capsys):
    assert main(["--local_rank=0", "--version"]) == 0
    assert capsys.readouterr().out.startswith("sendvae_fast ")


def test_overview_lists_every_verb(capsys):
    assert main([]) == 0
    text = capsys.readouterr().out
    assert all(f"  {verb} " in text and line in text for verb, line in VERBS.items())


def test_config_show_prints_every_key(capsys, tmp_path):
    (tmp_path / "vae.yaml").write_text("loop: {num_steps: 7}\n")
    assert main(["config", "show", "train", "vae", f"--config={tmp_path / 'vae.yaml'}", "--seed=3"]) == 0
    text = capsys.readouterr().out
    assert "num_steps: 7" in text and "seed: 3" in text and "run: (required)" in text and "kl_weight" in text


def test_doctor_says_what_runs_the_ops(capsys):
    code = main(["doctor", "--json"])
    findings = json.loads(capsys.readouterr().out)
    verdicts = {finding["verdict"] for finding in findings}
    assert code == (2 if "broken" in verdicts else 1 if "warning" in verdicts else 0)
    assert {finding["name"] for finding in findings} >= {"torch", "noise_inject", "cosine_align", "runs"}


def test_doctor_calls_a_missing_data_folder_broken(capsys, tmp_path):
    assert main(["doctor", f"--data={tmp_path / 'none'}"]) == 2


def mistakes(tmp_path, house):
    """Command lines with one thing wrong each, and words that must be in the answer."""
    empty, text, bad = tmp_path / "empty", tmp_path / "text.txt", tmp_path / "bad"
    empty.mkdir()
    text.write_text("no folder")
    (bad / "a").mkdir(parents=True)
    for number in range(8):
        (bad / "a" / f"{number}.jpg").write_bytes(b"not a picture")
    vae = ["train", "vae", f"--run={tmp_path / 'run'}", *TINY_VAE]
    sample = ["sample", f"--out={tmp_path / 's'}", f"--autoencoder={house / 'vae'}"]
    return {
        "unknown verb": (["trian"], "did you mean"),
        "unknown verb of a group": (["data", "indx"], "did you mean `sendvae data index`?"),
        "unknown key": ([*vae, "--data.root=x", "--data.image_sise=3"], "did you mean data.image_size"),
        "unknown config file": (["train", "vae", "--config=none.yaml"], "none.yaml"),
        "missing key": (["train", "vae", f"--run={tmp_path / 'run'}"], "data"),
        "missing folder": ([*vae, f"--data.root={tmp_path / 'none'}"], str(tmp_path / "none")),
        "empty folder": ([*vae, f"--data.root={empty}"], "no images"),
        "file for a folder": ([*vae, f"--data.root={text}"], "is a file"),
        "unreadable picture": ([*vae, f"--data.root={bad}"], "of 8 images: "),
        "checkpoint of another kind": ([*sample, f"--generator={house / 'vae'}"], "not a SiT"),
        "no checkpoint": ([*sample, f"--generator={empty}"], "neither a weight folder"),
        "no such run": (["report", str(tmp_path / "none")], "not a run"),
        "other settings": (
            ["train", "vae", f"--run={house / 'vae'}", f"--data.root={house / 'images'}", *TINY_VAE, "--seed=9"],
            "seed was 0, now 9",
        ),
        "no samples": (
            [
                "evaluate",
                "generation",
                f"--samples={tmp_path / 'none'}",
                f"--reference={house / 'images'}",
                "--features.name=demo",
            ],
            str(tmp_path / "none"),
        ),
        "LPIPS weights that are not there": (
            [
                "evaluate",
                "reconstruction",
                f"--autoencoder={house / 'vae'}",
                f"--data={house / 'images'}",
                "--features.name=demo",
                "--perceptual.weights=none.pth",
            ],
            "download.pytorch.org/models/vgg16-397923af.pth (its sha256 begins with 397923af)",
        ),
        "weights that are not there": (
            [
                "evaluate",
                "reconstruction",
                f"--autoencoder={house / 'vae'}",
                f"--data={house / 'images'}",
                "--features.name=dinov2-vit-l",
            ],
            "vit_large_patch14_dinov2",
        ),
        "other latents": (
            [
                "cache-latents",
                f"--autoencoder={house / 'vae'}",
                f"--data={house / 'images'}",
                f"--out={house / 'latents'}",
                "--image_size=16",
            ],
            "was made with image_size",
        ),
    }


def test_a_mistake_is_one_clear_line_and_a_nonzero_exit(house, tmp_path, capsys):
    for name, (command, words) in mistakes(tmp_path, house).items():
        capsys.readouterr()
        code = main(command)
        # What a run says of itself before its first step is indented under its title.
        said = ("train ", "rendering ", "  ")
        lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith(said)]
        assert code == 2, f"{name}: exit code {code}"
        assert len(lines) == 1 and lines[0].startswith("error: ") and words in lines[0], f"{name}: {lines}"


def test_debug_shows_the_traceback(tmp_path, capsys):
    assert main(["report", str(tmp_path), "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_the_module_runs_as_a_command():
    command = [sys.executable, "-m", "sendvae_fast", "--version"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("sendvae_fast 0.")
