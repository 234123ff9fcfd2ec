"""The page of `sendvae play`: what is asked for goes to `RunNetworks`, what comes back is shown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from html import escape
from typing import Any

import gradio as gr  # pyright: ignore[reportMissingImports] - an extra of its own, in no other

from sendvae_fast.data.decode import FORMAT_OF_EXTENSION
from sendvae_fast.errors import UserError
from sendvae_fast.play.local_only import fetch_nothing
from sendvae_fast.play.networks import RunNetworks
from sendvae_fast.play.player import ANY_CLASS, Crops, Player, Rows
from sendvae_fast.report.page import png_data_uri

FONTS = ["system-ui", "sans-serif"]
MONOSPACED_FONTS = ["ui-monospace", "monospace"]
THEME = gr.themes.Default(font=FONTS, font_mono=MONOSPACED_FONTS)
"""With fonts that every machine has: others would be fetched."""
STYLE = """
.runs-pictures h3 { margin: 0.75rem 0 0.25rem; font-weight: 600 }
.runs-pictures div { display: grid; grid-template-columns: repeat(3, minmax(0, 1fr)); gap: 0.5rem }
.runs-pictures .many { grid-template-columns: repeat(auto-fill, minmax(6.5rem, 1fr)) }
.runs-pictures figure { margin: 0 }
.runs-pictures img { width: 100%; aspect-ratio: 1; image-rendering: pixelated; border-radius: 4px }
.runs-pictures figcaption { font-size: 0.8rem; overflow-wrap: anywhere }
@media (max-width: 640px) {
  .stays { position: sticky; top: 0; z-index: 5; max-height: 45vh; overflow-y: auto;
    background: var(--background-fill-primary) }
}
"""
LEAST_HEIGHT_PX = 160
"""Of the place for pictures, so that what is under it does not jump."""
REACH = 6.0
"""Of a slider, in deviations of the attribute's logit."""
SLIDER_PX = 180
"""Least width: two are beside each other where there is room for two."""


def build_page(networks: Sequence[RunNetworks]) -> gr.Blocks:
    """The page, not yet served."""
    player, names = Player(networks), [one.name for one in networks]
    with gr.Blocks(title="sendvae play", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gr.Markdown("# sendvae play")
        runs = gr.CheckboxGroup(names, value=names, label="Runs", visible=len(names) > 1)
        with gr.Tab("Reconstruct and move"):
            _build_moving(player, runs)
        with gr.Tab("Generate"):
            _build_generating(player, runs)
    return page


def _build_moving(player: Player, runs: gr.CheckboxGroup) -> None:
    crops, number = gr.State({}), gr.State(0)
    with gr.Row():
        upload = gr.UploadButton("Open a picture of yours", file_types=list(FORMAT_OF_EXTENSION), variant="primary")
        example = gr.Button("Take one of the data", visible=player.catalog is not None)
        reset = gr.Button("Sliders to 0", visible=bool(player.sliders))
    fetch_nothing(upload)
    with gr.Row():
        with gr.Column(scale=3, elem_classes="stays"):
            pictures = gr.HTML(_html({}), min_height=LEAST_HEIGHT_PX)
        with gr.Column(scale=2, visible=bool(player.sliders)):
            gr.Markdown("Attributes, in deviations of what a linear probe reads off latents")
            with gr.Row():
                sliders = [
                    gr.Slider(-REACH, REACH, 0, step=0.5, label=name.replace("_", " "), min_width=SLIDER_PX)
                    for name in player.sliders
                ]

    @_shown
    def opened(path: str) -> Crops:
        return player.open(path)

    @_shown
    def exemplified(number: int) -> tuple[Crops, int]:
        return player.example(number), number + 1

    @_shown
    def moved(crops: Crops, names: list[str], *amounts: float) -> str:
        return _html(player.reconstruct_and_move(crops, names, amounts))

    show: dict[str, Any] = dict(fn=moved, inputs=[crops, runs, *sliders], outputs=pictures, concurrency_id="networks")
    upload.upload(opened, upload, crops, api_name="open").success(**show, api_visibility="private")
    example.click(exemplified, number, [crops, number], api_name="example").success(**show, api_name="move")
    runs.change(**show, api_visibility="private")
    reset.click(lambda: [0.0] * len(sliders), None, sliders, api_visibility="private")
    if sliders:
        gr.on([one.change for one in sliders], **show, api_visibility="private", trigger_mode="always_last")


def _build_generating(player: Player, runs: gr.CheckboxGroup) -> None:
    classes = next((one.class_names for one in player.networks.values() if one.class_names), ())
    if not classes:
        gr.Markdown("None of these runs has a generator: give a run of stage 2, or a demo's folder.")
        return
    with gr.Row():
        label = gr.Dropdown(
            [("all in turn", ANY_CLASS), *((name, number) for number, name in enumerate(classes))],
            value=ANY_CLASS,
            label="Class",
        )
        seed = gr.Number(0, precision=0, minimum=0, label="Seed")
        num_pictures = gr.Slider(1, 16, 4, step=1, label="Pictures")
        guidance = gr.Slider(1, 8, 2, step=0.1, label="Guidance")
        num_steps = gr.Slider(2, 250, 50, step=1, label="Steps")
    button = gr.Button("Generate", variant="primary")
    pictures = gr.HTML(min_height=LEAST_HEIGHT_PX)

    @_shown
    def generated(names: list[str], *settings: Any) -> str:
        return _html(player.generate(names, *settings))

    inputs = [runs, label, num_pictures, seed, guidance, num_steps]
    button.click(generated, inputs, pictures, concurrency_id="networks", api_name="generate")


def _html(rows: Rows) -> str:
    """A heading and a row of pictures for each run; three in a row where there are no more."""
    if not rows:
        return "<p>No picture yet.</p>"
    parts = []
    for name, pictures in rows.items():
        figures = [
            f'<figure><img src="{png_data_uri(picture)}" alt="{escape(caption)}"><figcaption>{escape(caption)}'
            "</figcaption></figure>"
            for picture, caption in pictures
        ]
        kind = ' class="many"' if len(figures) > 3 else ""
        parts.append(f"<h3>{escape(name)}</h3><div{kind}>{''.join(figures)}</div>")
    return f'<section class="runs-pictures">{"".join(parts)}</section>'


def _shown(function: Callable) -> Callable:
    """The function, with what a user can mend shown on the page."""

    @wraps(function)
    def call(*arguments: Any) -> Any:
        try:
            return function(*arguments)
        except UserError as error:
            raise gr.Error(str(error), print_exception=False) from error

    return call
