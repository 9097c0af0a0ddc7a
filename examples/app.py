"""A page that restores photos: choose an adapter, drop a photo, compare before and after.

    pip install -e ".[demo]" && python examples/app.py

and open the address that it prints. Nothing leaves the machine, and nothing is fetched but adapters that you name.

As a Hugging Face Space (kind Gradio): its root gets this file, the folders `adapters`, `checkpoints` and `data` beside
it, and a `requirements.txt` of one line, `colora-peft @ git+` with the address of this repository after it. Two
processors are enough.
"""

from __future__ import annotations

import html
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when gradio is imported

try:
    import gradio as gr
except ImportError:
    sys.exit('app.py: The page needs gradio: pip install -e ".[demo]" in the clone.')

import torch
from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from colora_peft.hub import load_backbone
from colora_peft.restore import MAX_STRENGTH, NO_ADAPTER, AdapterSet, PhotoRestorer, adapters_in
from colora_peft.utils import check_at_least, check_writable, default_device, flag, relative_path, run_script

HERE = Path(__file__).parent
# Photos to try, by the adapter that is for them; none was trained on. There is none of noise: the noise adapter knows
# real cameras, whose noise we could but imitate.
EXAMPLES = (("underwater", "76.jpg"), ("underwater", "66.jpg"), ("underwater", "89.jpg"), ("rain", "rocket.jpg"))
LOOPBACK = ("127.0.0.1", "localhost", "::1")
UPLOADS_KEPT_SECONDS = 3600

CSS = """
.gradio-container { width: 100% !important; max-width: 1180px !important; margin: 0 auto !important; }
#head h1 { margin-bottom: 0; }
#result .error { display: none; } /* the message says more */
"""


@dataclass
class PageArguments:
    """Flags of the page."""

    model_name_or_path: str = flag(
        relative_path(HERE / "checkpoints" / "nafnet-small-prod"), "The network: a folder or an id on the Hub."
    )
    adapters_dir: str = flag(
        relative_path(HERE / "adapters"),
        "Path to a folder of adapters for it, one folder each; users choose from their names.",
    )
    server_name: str | None = flag(None, "Address to listen on; 0.0.0.0 lets others in. Default: this machine alone.")
    server_port: int | None = flag(None, "Number of the port. Default: the first free one from 7860.")
    max_megapixels: int = flag(16, "Size in million pixels above which photos are refused.")
    max_upload_mb: int = flag(50, "Size in MB above which files are refused.")
    max_waiting: int = flag(8, "Number of jobs that may wait while one runs; more are refused.")

    def __post_init__(self) -> None:
        for name in ("max_megapixels", "max_upload_mb", "max_waiting"):
            check_at_least(self, name, 1)

    @property
    def is_public(self) -> bool:
        """Whether others can use the page; gradio's variable counts, as it does on a Space."""
        return (self.server_name or os.environ.get("GRADIO_SERVER_NAME") or LOOPBACK[0]) not in LOOPBACK


# ---------------------------------------------------------------------------------------------------------- actions


def restore(
    restorer: PhotoRestorer,
    photo: str | None,
    adapter: str,
    strength: float,
    progress: gr.Progress = gr.Progress(track_tqdm=True),  # noqa: B008 - gradio looks for it here
) -> tuple[tuple[str, str] | None, str, dict[str, object]]:
    """Outputs after a change of photo, adapter or strength: before and after, a line, the file to download."""
    if photo is None:
        return nothing_restored()
    with shown_as_message():
        restored = restorer.restore_file(photo, adapter, strength, progress=True)
    line = ". ".join([f"{restored.width} × {restored.height} pixels, {restored.seconds:.1f} s", *restored.notes])
    images = (str(restored.before), str(restored.after))
    return images, line, gr.DownloadButton(value=str(restored.result), interactive=True)


def nothing_restored() -> tuple[None, str, dict[str, object]]:
    """Outputs without a photo, or after a message."""
    return None, "", gr.DownloadButton(value=None, interactive=False)


def add_adapter(
    restorer: PhotoRestorer, folders_allowed: bool, name_or_path: str
) -> tuple[dict[str, object], dict[str, object]]:
    """Loads an adapter that the user named, and chooses it."""
    with shown_as_message(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        if not folders_allowed and Path(name_or_path.strip()).exists():
            raise ValueError("This page takes ids on the Hub alone, such as name/my-adapter.")
        chosen = restorer.add_adapter(name_or_path)
    for warning in caught:
        if issubclass(warning.category, UserWarning):
            gr.Warning(html.escape(str(warning.message)))
    return gr.Radio(choices=choices(restorer), value=chosen), gr.Textbox(value="")


@contextmanager
def shown_as_message() -> Iterator[None]:
    """Context manager that shows the library's errors, one sentence each, as a message; others are bugs of ours."""
    try:
        yield
    except (ValueError, TypeError, OSError, SafetensorError) as error:
        raise gr.Error(html.escape(str(error)), print_exception=False) from error


def choices(restorer: PhotoRestorer) -> list[tuple[str, str]]:
    """(what is shown, name) of each adapter; ids are shown as they are."""
    shown = [(name if "/" in name else name.capitalize(), name) for name in restorer.adapters]
    return [*shown, ("None", NO_ADAPTER)]


# ------------------------------------------------------------------------------------------------------------- page


def photo_input() -> gr.Image:
    """An image to drop. We read its file ourselves, because gradio answers other files with a stack trace."""
    photo = gr.Image(label="Photo", sources=["upload", "clipboard"], height=240, elem_id="photo", buttons=[])
    # Not in a class of our own, for which gradio would write a file beside this one. Holds as long as no event changes
    # other properties of the component than its value: gradio would make a new one.
    photo.preprocess = lambda payload: payload and payload.path
    return photo


def build_page(restorer: PhotoRestorer, examples: list[tuple[Path, str]], folders_allowed: bool) -> gr.Blocks:
    """The page; nothing listens yet.

    Args:
        restorer: Restores what the page is given.
        examples: Photos to try, each with the adapter that is for it.
        folders_allowed: Whether users may name adapters in folders of this machine.
    """
    page = gr.Blocks(
        title="Restore a photo", analytics_enabled=False, delete_cache=(UPLOADS_KEPT_SECONDS, UPLOADS_KEPT_SECONDS)
    )
    with page:
        gr.Markdown("# Restore a photo\nOne small network, and an adapter for each kind of damage.", elem_id="head")
        with gr.Row():
            with gr.Column(scale=6, min_width=320):
                photo = photo_input()
                first = examples[0][1] if examples else restorer.adapters[0]
                samples = [[str(path)] for path, _ in examples]
                shown = gr.Dataset(
                    components=[photo], samples=samples, type="index", label="Examples", elem_id="examples",
                    visible=bool(samples),
                )  # fmt: skip
                adapter = gr.Radio(choices(restorer), value=first, label="Adapter", elem_id="adapter")
                strength = gr.Slider(0, MAX_STRENGTH, 1, step=0.05, label="Strength", elem_id="strength")
                with gr.Accordion("Another adapter", open=False, elem_id="another"):
                    where = "An id on the Hub, or a folder" if folders_allowed else "An id on the Hub"
                    other = gr.Textbox(label=where, placeholder="name/my-adapter", max_lines=1, elem_id="other")
                    add = gr.Button("Load", size="sm", elem_id="add")
            with gr.Column(scale=8, min_width=320):
                result = gr.ImageSlider(label="Before and after", interactive=False, elem_id="result", max_height=560)
                line = gr.Markdown(elem_id="line")
                download = gr.DownloadButton("Download", interactive=False, elem_id="download")

        restoring = {
            "fn": partial(restore, restorer),
            "inputs": [photo, adapter, strength],
            "outputs": [result, line, download],
            "concurrency_limit": 1,
            "show_progress_on": result,
            "api_visibility": "private",
        }
        changes = [photo.change, adapter.change, strength.release]
        restored = gr.on(changes, trigger_mode="always_last", **restoring)
        restored.failure(nothing_restored, None, restoring["outputs"], api_visibility="private")
        shown.click(
            lambda index: (str(examples[index][0]), examples[index][1]),
            shown,
            [photo, adapter],
            api_visibility="private",
        )
        gr.on(
            [add.click, other.submit],
            partial(add_adapter, restorer, folders_allowed),
            other,
            [adapter, other],
            concurrency_limit=1,
            api_visibility="private",
        )
    return page


def theme() -> gr.themes.Base:
    """Theme of the page, with the fonts of the reader's system: none is fetched."""
    return gr.themes.Soft(
        primary_hue="teal",
        neutral_hue="slate",
        font=["system-ui", "-apple-system", "Segoe UI", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    )


def launch(args: PageArguments) -> None:
    """Loads everything and serves the page until it is stopped."""
    serve(args).block_thread()


def serve(args: PageArguments) -> gr.Blocks:
    """Loads everything and serves the page from a thread."""
    check_writable(os.environ.get("GRADIO_TEMP_DIR") or tempfile.gettempdir(), "The folder for uploads")
    transformers_logging.disable_progress_bar()
    adapters = adapters_in(args.adapters_dir)
    network = load_backbone(args.model_name_or_path).to(default_device(), memory_format=torch.channels_last)
    restorer = PhotoRestorer(AdapterSet(network, adapters), args.max_megapixels * 1_000_000)
    examples = [
        (HERE / "data" / adapter / "test" / "input" / name, adapter)
        for adapter, name in EXAMPLES
        if adapter in adapters
    ]
    page = build_page(restorer, examples, folders_allowed=not args.is_public)
    page.queue(max_size=args.max_waiting)
    page.launch(
        server_name=args.server_name,
        server_port=args.server_port,
        max_file_size=args.max_upload_mb * 2**20,
        prevent_thread_lock=True,
        allowed_paths=[str(path) for path, _ in examples],
        show_error=False,
        ssr_mode=False,
        footer_links=[],
        theme=theme(),
        css=CSS,
    )
    return page


if __name__ == "__main__":
    run_script(launch, PageArguments)
