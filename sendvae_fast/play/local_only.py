"""What keeps the page of `sendvae play` to itself: Gradio fetches what it is sent the address of; here it does not."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import gradio as gr  # pyright: ignore[reportMissingImports] - an extra of its own, in no other

LOOPBACK_NAMES = {"localhost", "127.0.0.1", "::1"}

Messages = Callable[..., Awaitable[Any]]


class LocalOnly:
    """ASGI middleware: no path with an address in it, and on a loopback address no request by another name for it.

    The latter is how a page from elsewhere reaches a server of this machine (DNS rebinding).
    """

    def __init__(self, app: Callable[..., Awaitable[None]], host: str) -> None:
        self.app, self.names = app, LOOPBACK_NAMES | {host} if is_loopback(host) else None

    async def __call__(self, scope: Mapping[str, Any], receive: Messages, send: Messages) -> None:
        if scope["type"] == "http" and not self._is_welcome(scope):
            await send({"type": "http.response.start", "status": 403, "headers": [(b"content-type", b"text/plain")]})
            await send({"type": "http.response.body", "body": b"sendvae play fetches nothing from elsewhere"})
            return
        await self.app(scope, receive, send)

    def _is_welcome(self, scope: Mapping[str, Any]) -> bool:
        asked = dict(scope["headers"]).get(b"host", b"").decode("latin-1")
        is_known = self.names is None or urlsplit(f"//{asked}").hostname in self.names
        return is_known and ":/" not in scope["path"]


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server at `host`."""
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def fetch_nothing(upload: gr.UploadButton) -> None:
    """Let a button take files from the browser alone.

    Not by a class of our own, for which Gradio writes a stub beside the source.
    """
    keep = upload.async_move_resource_to_block_cache

    async def keep_file(url_or_file_path: str | Path | None) -> str | None:
        if "://" in str(url_or_file_path):
            raise gr.Error("an address is no picture: send the file", print_exception=False)
        return await keep(url_or_file_path)

    upload.async_move_resource_to_block_cache = keep_file
