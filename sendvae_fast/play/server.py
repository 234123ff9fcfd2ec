"""The page of `sendvae play`, served: to this machine alone unless told otherwise, and with nothing from outside."""

from __future__ import annotations

import os
import signal
import socket
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from sendvae_fast.engine.distributed import init_distributed
from sendvae_fast.errors import UserError, needs_extra
from sendvae_fast.evaluation.job import Say
from sendvae_fast.play.networks import RunNetworks
from sendvae_fast.play.runs import load_runs
from sendvae_fast.play.settings import PlayConfig

MAX_UPLOAD_BYTES = 2**26


def play(config: PlayConfig, say: Say = print) -> None:
    """Load the runs, serve the page, and wait to be stopped.

    Raises:
        UserError: Gradio is not installed, a run is not what is wanted, or the port is taken.
    """
    with needs_extra("eval,play", "`sendvae play`"):  # before networks are loaded, which takes longer
        import gradio  # noqa: F401  # pyright: ignore[reportMissingImports]
    distributed = init_distributed()
    if distributed.world_size > 1:
        raise UserError("play runs on one rank; start it without torchrun")
    networks = load_runs(config, distributed.device, say)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that what was uploaded is removed
    with served(networks, config.host, config.port) as address:
        say(f"open {address} in a browser; Ctrl-C ends it")
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            say("stopped")


@contextmanager
def served(networks: Sequence[RunNetworks], host: str, port: int) -> Iterator[str]:
    """The page at an address, which is given, for the length of the block. What is uploaded is removed after it.

    Raises:
        UserError: the port is taken, or there is no such host.
    """
    port = port or _free_port(host)
    with tempfile.TemporaryDirectory(prefix="sendvae-play-") as folder:
        for name in [name for name in os.environ if name.startswith("GRADIO_")]:
            del os.environ[name]  # some win over what is said below: GRADIO_ALLOWED_PATHS over no paths
        os.environ["GRADIO_TEMP_DIR"] = folder  # read when components are made
        from sendvae_fast.play.local_only import LocalOnly
        from sendvae_fast.play.page import STYLE, THEME, build_page

        page = build_page(networks)
        try:
            page.launch(
                server_name=host,
                server_port=port,
                share=False,
                prevent_thread_lock=True,
                quiet=True,
                theme=THEME,
                css=STYLE,
                footer_links=[],
                run_history=False,
                allowed_paths=[],
                max_file_size=MAX_UPLOAD_BYTES,
                enable_monitoring=False,
                ssr_mode=False,
                pwa=False,
                mcp_server=False,
                app_kwargs={"middleware": [(LocalOnly, (), {"host": host})]},
            )
        except OSError as error:
            raise UserError(f"cannot listen at {host}:{port} ({error}): give another --port or --host") from error
        try:
            yield str(page.local_url)
        finally:
            page.close(verbose=False)


def _free_port(host: str) -> int:
    try:
        with socket.create_server((host, 0)) as listener:
            return listener.getsockname()[1]
    except OSError as error:
        raise UserError(f"cannot listen at {host} ({error}): give another --host") from error
