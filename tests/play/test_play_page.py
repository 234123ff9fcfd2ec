"""The page of `sendvae play`, served: by the client of its own makers, and as headless Chromium sees it."""

import json
import os
import re
import shutil
import socket
import subprocess
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
import torch
from PIL import Image
from time_limits import HANG_S

from sendvae_fast.cli.main import main
from sendvae_fast.data.scenes.scene_folder import synth_scenes
from sendvae_fast.errors import UserError

# Not importorskip: Gradio takes seconds, which each process would spend that collects these tests.
if find_spec("gradio") is None:
    pytest.skip("no gradio: pip install --no-deps -r requirements-play.txt", allow_module_level=True)
import httpx
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError

from sendvae_fast.play.runs import load_runs
from sendvae_fast.play.server import served
from sendvae_fast.play.settings import PlayConfig

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

OLD_RUNS = Path(__file__).parents[1] / "old_runs"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
LOCAL = "127.0.0.1"


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    root = tmp_path_factory.mktemp("page")
    shutil.copytree(OLD_RUNS, root, dirs_exist_ok=True)
    synth_scenes(root / "scenes", 30, 32, seed=0)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("GRADIO_SHARE", "GRADIO_MCP_SERVER", "GRADIO_RUN_HISTORY", "GRADIO_ANALYTICS_ENABLED"):
            patch.setenv(name, "True")  # which none of it obeys
        patch.setenv("GRADIO_SERVER_NAME", "0.0.0.0")
        patch.setenv("GRADIO_ALLOWED_PATHS", "/etc")
        patch.setenv("GRADIO_TEMP_DIR", "")
        patch.chdir(root)
        networks = load_runs(PlayConfig(runs=("sit", "vae")), torch.device("cpu"), pytest.fail)
        networks[0].name, networks[1].name = "sit", "<img src=x onerror=alert(1)>"
        with served(networks, LOCAL, 0) as address:
            uploads = Path(os.environ["GRADIO_TEMP_DIR"])
            assert uploads.is_dir()
            yield address
    assert not uploads.exists()


def pictures_of(html):
    return re.findall(r'<img src="data:image/png;base64,[^"]+" alt="([^"]*)">', html)


def test_a_picture_is_opened_moved_and_others_generated(address, tmp_path):
    client = Client(address, verbose=False, download_files=tmp_path)
    names = ["sit", "<img src=x onerror=alert(1)>"]
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 40, 3), dtype=np.uint8)).save(tmp_path / "own.png")
    client.predict(handle_file(tmp_path / "own.png"), api_name="/open")
    amounts = [0.0] * 16
    html = client.predict(names, *amounts, api_name="/move")
    assert [words.split(",")[0] for words in pictures_of(html)] == ["original", "decoded"] * 2
    assert "<img src=x" not in html and "&lt;img src=x" in html
    amounts[6] = 2.0
    assert pictures_of(client.predict(names, *amounts, api_name="/move"))[2] == "large +2"
    client.predict(api_name="/example")
    assert client.predict(names, *amounts, api_name="/move") != html
    html = client.predict(["sit"], 3, 5, 0, 1.5, 3, api_name="/generate")
    assert pictures_of(html) == ["disc striped"] * 5
    with pytest.raises(AppError, match="no run that is ticked has a generator"):
        client.predict(names[1:], 3, 5, 0, 1.5, 3, api_name="/generate")
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(AppError, match="cannot read the image .*: not an image"):
        client.predict(handle_file(tmp_path / "text.png"), api_name="/open")


def test_it_serves_this_machine_alone_and_fetches_nothing(address, monkeypatch):
    """What a page from elsewhere might ask it for."""
    asked, resolve = [], socket.getaddrinfo
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda host, *rest, **more: asked.append(host) or resolve(host, *rest, **more)
    )
    with httpx.Client(base_url=address) as client:
        for url in ("http://elsewhere.invalid/x.png", "/etc/passwd"):
            file = {"path": url, "url": url, "meta": {"_type": "gradio.FileData"}}
            event = client.post("/gradio_api/call/open", json={"data": [file]}).json()["event_id"]
            assert "event: error" in client.get(f"/gradio_api/call/open/{event}", timeout=HANG_S).text
        for path in ("file=/etc/passwd", "file=http://elsewhere.invalid/", "proxy=http://elsewhere.invalid/", "runs"):
            assert client.get(f"/gradio_api/{path}").status_code in (400, 403, 404), path
        assert client.get("/config", headers={"Host": "elsewhere.invalid"}).status_code == 403
        config = client.get("/config").json()
    assert not config["analytics_enabled"] and not config["run_history"]
    assert set(asked) <= {LOCAL, LOCAL.encode()}
    port = int(address.rsplit(":", 1)[1].strip("/"))
    sockets = [line.split()[1:4] for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    listening = [local for local, _, state in sockets if state == "0A" and local.endswith(f":{port:04X}")]
    assert listening == [f"0100007F:{port:04X}"]  # 127.0.0.1


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium binary found: apt-get install chromium")
def test_chromium_draws_the_page_and_asks_nobody_else(address, tmp_path):
    log, picture = tmp_path / "net.json", tmp_path / "page.png"
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={tmp_path}/profile"]
    flags += [
        f"--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE {LOCAL}",
        f"--log-net-log={log}",
        "--window-size=390,900",
        f"--screenshot={picture}",
        "--virtual-time-budget=5000",
    ]
    subprocess.run([CHROMIUM, *flags, address], capture_output=True, timeout=HANG_S, check=True)
    with Image.open(picture, formats=("PNG",)) as drawn:
        colours = np.asarray(drawn.convert("RGB")).reshape(-1, 3)
    assert len(np.unique(colours, axis=0)) > 50  # buttons, sliders and words; an empty page has a handful
    events = [json.loads(line.rstrip(",")) for line in log.read_text().splitlines() if line.startswith('{"params":')]
    asked = [event["params"] for event in events if {"url", "initiator"} <= event["params"].keys()]
    # Chromium's own calls home, which find nobody here, have no page as their initiator.
    hosts = {urlsplit(one["url"]).hostname for one in asked if one["initiator"] == address.rstrip("/")}
    assert hosts == {LOCAL}


def test_a_port_that_is_taken_is_one_line(address):
    port = int(address.rsplit(":", 1)[1].strip("/"))
    with pytest.raises(UserError, match=f"cannot listen at {LOCAL}:{port} .*: give another --port"):
        with served([], LOCAL, port):
            pass


def test_the_command_line_takes_several_runs(capsys):
    assert main(["play", "nowhere/a", "nowhere/b"]) == 2
    assert "nowhere/a does not exist" in capsys.readouterr().err
    assert main(["play", "--help"]) == 0
    assert "usage: sendvae play [RUNS ...]" in capsys.readouterr().out
