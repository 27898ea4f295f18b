"""Generate text and images in the browser, on a page that only this machine can open.

    python -m tools.playground                      # all runs in runs/ that can generate
    python -m tools.playground demo demo-images     # these runs; the first one is selected
    python -m tools.playground --port 0             # on any free port

The page needs gradio (make extra). It contacts no other machine and writes no files: images are
downloaded from the page itself, with the metadata that generate.py writes. See docs/PLAYGROUND.md.
"""

import base64
import functools
import html
import io
import os
import re
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import torch

from common.config import (
    RUNS,
    UserError,
    first_line,
    is_out_of_memory,
    run_script,
    saved_config,
)
from common.device import record_kernels, resolve_device
from common.metrics import evaluations
from common.run import checkpoints, find_run
from data.images import image_grid, to_uint8
from generate import image_metadata, image_name
from sampling import (
    LoadedRun,
    growing_images,
    load_run,
    prompt_ids,
    resolve_sampling,
    text_pieces,
)
from tools.extras import require

HOST = "127.0.0.1"
MAX_PROMPT = 10_000  # characters; checked before the prompt is tokenized
MAX_WAITING = 16  # requests
UPDATE_SECONDS = 0.05  # between updates of a text; a browser that gets too many reacts late
SETTINGS = {  # lowest and highest value, step, default, help
    "temperature": (0, 2, 0.05, 0.8, "0: always the most likely token"),
    "top_k": (0, 200, 1, 0, "Only the k most likely tokens; 0: all"),
    "top_p": (0.01, 1, 0.01, 1, "Only the most likely tokens that add up to this probability"),
    "max_tokens": (1, 1000, 1, 200, "Length of the continuation"),
    "guidance": (0, 10, 0.1, 1, "How closely to follow the prompt; 1: no guidance"),
    "count": (1, 16, 1, 4, "Number of images"),
    # integers of JavaScript, also after adding the count
    "seed": (0, 2**53 - 17, 1, 0, "The same seed gives the same result"),
}
TEXT_SETTINGS = ("temperature", "top_k", "top_p", "max_tokens", "seed")
IMAGE_SETTINGS = ("guidance", "temperature", "count", "seed")
SHAPES_PROMPTS = [  # examples for runs on data.source shapes
    "a photo of a large red circle on a white background",
    "a small green cross at the top left on a black background",
    "a drawing of three blue diamonds on a gray background",
]
# What the page uses of Gradio's routes; uploads, files and a proxy are among the others.
ROUTES = re.compile(
    r"/|/config|/theme\.css|/manifest\.json|/favicon\.ico|/(static|assets)/.*"
    r"|/gradio_api/((queue|heartbeat|call)/.*|cancel|reset|info|startup-events|app_id|login_check)"
)


@dataclass
class Config:
    """What the page offers, and where it runs."""

    runs: list[str]
    """Names of runs under runs/, run folders or checkpoints. Omitted: all runs in runs/ that can
    generate."""
    port: int = 7860
    """Port on 127.0.0.1. 0: any free port."""
    device: str = "auto"
    """Device: cpu, cuda, mps, ... auto: the accelerator that PyTorch finds, otherwise the CPU."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute dtype. auto: bfloat16 where the hardware computes it faster, otherwise float32."""


# ---- runs
def offered_runs(names: list[str]) -> dict[str, dict]:
    """The configs of the runs that the page offers. Raises UserError."""
    if not names:
        trained = [path.parent for path in RUNS.glob("*/config.yaml") if checkpoints(path.parent)]
        names = sorted(run.name for run in trained if saved_config(run)["stage"] != "vqvae")
    configs = {name: find_run(name)[2] for name in names}
    for name, config in configs.items():
        if config["stage"] == "vqvae":
            raise UserError(
                f"{name} is a VQ-VAE run, which cannot generate by itself; pass a run of "
                "train_llm.py or train_multimodal.py"
            )
    if not configs:
        raise UserError(f"there is no run in {RUNS}/ that can generate; train one first")
    return configs


def description(name: str, config: dict) -> str:
    """A line about a run."""
    kind = "Text-to-image model" if config["stage"] == "multimodal" else "Language model, text only"
    model = config["model"]
    parts = [kind, f"{model['n_layers']} layers of width {model['d_model']}"]
    parts.append(f"context of {model['seq_len']:,} tokens")
    if rows := evaluations(find_run(name)[0]):
        parts.append(f"validation loss {rows[-1]['val_loss']:.3f}")
    return " · ".join(parts)


def examples(config: dict) -> list[str]:
    """Prompts to try."""
    return SHAPES_PROMPTS if config["data"]["source"] == "shapes" else config["sample_prompts"]


# ---- requests, which may come from any program
def checked(names: tuple[str, ...], values: tuple) -> dict:
    """Settings by name. Raises UserError for a value that is not a number within its limits."""
    settings = {}
    for name, value in zip(names, values, strict=True):
        low, high, step = SETTINGS[name][:3]
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not low <= value <= high or (step == 1 and value != int(value)):
            kind = "a whole number" if step == 1 else "a number"
            shown = "empty" if value is None else repr(value)[:40]
            raise UserError(f"{name} is {shown}; enter {kind} from {low} to {high}")
        settings[name] = int(value) if step == 1 else float(value)
    return settings


def checked_prompt(prompt) -> str:
    """The prompt. Raises UserError if it is too long or not text."""
    if not isinstance(prompt, str) or len(prompt) > MAX_PROMPT:
        raise UserError(f"the prompt is not text of at most {MAX_PROMPT:,} characters; shorten it")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise UserError("the prompt contains half a character; remove it") from error
    return prompt


def reported(request: Callable) -> Callable:
    """A generator of outputs and status lines, with an error as the last status line."""

    @functools.wraps(request)
    def generate(*args) -> Iterator:
        try:
            yield from request(*args)
        except UserError as error:
            reason = str(error)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            reason = "out of memory; lower the count or the length, or choose a smaller run"
        else:
            return
        message = html.escape(reason[:500])  # it may quote the prompt
        yield require("gradio").skip(), f'<span class="error" role="alert">{message}</span>'

    return generate


def logged(what: str, steps: Iterator) -> Iterator:
    """The steps, with a line on the terminal when they end or are stopped."""
    start, n, end = time.perf_counter(), 0, "failed"
    try:
        for step in steps:
            n += 1
            yield step
        end = "finished"
    except GeneratorExit:  # Stop, or the browser has disconnected
        end = "stopped"
        raise
    finally:
        print(f"{what}: {end} after {n} steps, {time.perf_counter() - start:.1f} s", flush=True)


@dataclass
class Playground:
    """The runs of the page, one of which is in memory, and the answers to requests."""

    configs: dict[str, dict]
    cfg: Config
    name: str | None = None
    loaded: LoadedRun | None = field(default=None, repr=False)

    def config(self, name) -> dict:
        """The config of an offered run. Raises UserError for anything else."""
        if not isinstance(name, str) or name not in self.configs:
            known = ", ".join(self.configs)
            raise UserError(f"there is no run {repr(name)[:40]}; choose one of {known}")
        return self.configs[name]

    def load(self, name: str) -> LoadedRun:
        """The run, after the previous one was freed. Raises UserError."""
        if name != self.name:
            self.name = self.loaded = None
            self.loaded = load_run(name, self.cfg)
            self.name = name
        return self.loaded

    def beginning(self, name: str) -> str:
        """What a request for a run begins with, as HTML."""
        return "Generating" if name == self.name else f"Loading {html.escape(name)}"

    def recorder(self) -> Callable:
        """How decoding steps are repeated, see Llama.decode."""
        return partial(record_kernels, device=torch.device(self.cfg.device))

    @reported
    def text(self, name, prompt, *values) -> Iterator:
        """Yield the text so far and a line about it."""
        settings, text = checked(TEXT_SETTINGS, values), checked_prompt(prompt)
        self.config(name)
        yield text, self.beginning(name)
        loaded, seed, n = self.load(name), settings.pop("seed"), 0
        model, tokenizer = loaded.model, loaded.tokenizer
        ids = prompt_ids(tokenizer, prompt, model.config.seq_len)
        yield text, "Generating"
        settings |= {"record": self.recorder()}
        start = shown = time.perf_counter()
        pieces = text_pieces(model, tokenizer, [ids], [seed], **settings)
        for (piece,) in logged(f"text from {name}", pieces):
            text, n = text + piece, n + 1
            if time.perf_counter() - shown > UPDATE_SECONDS:
                yield text, require("gradio").skip()
                shown = time.perf_counter()
        is_full = len(ids) + n >= model.config.seq_len
        end = ", the context is full" if is_full else ""
        yield text, f"{n} tokens in {time.perf_counter() - start:.1f} s{end}"

    @reported
    def images(self, name, prompt, *values) -> Iterator:
        """Yield the images so far, as HTML, and a line about them."""
        settings, prompt = checked(IMAGE_SETTINGS, values), checked_prompt(prompt)
        if self.config(name)["stage"] != "multimodal":
            raise UserError(f"{name} is a language model; choose a run of train_multimodal.py")
        yield "", self.beginning(name)
        loaded, first, count = self.load(name), settings.pop("seed"), settings.pop("count")
        sampling = SimpleNamespace(**settings, top_k=0, top_p="auto")
        resolve_sampling(sampling, loaded)
        yield "", "Generating"
        seeds, settings = [first + i for i in range(count)], vars(sampling)
        parts = loaded.model, loaded.vqvae, loaded.format, prompt, seeds
        steps = growing_images(*parts, **settings, record=self.recorder())
        show = partial(
            figures, prompt=prompt, seeds=seeds, values={**settings, "run": loaded.run.name}
        )
        start = time.perf_counter()
        for images in logged(f"images from {name}", steps):
            yield show(to_uint8(images), links=False), require("gradio").skip()
        noun = "image" if count == 1 else "images"
        status = f"{count} {noun} in {time.perf_counter() - start:.1f} s"
        yield show(to_uint8(images), links=True), status


def figures(images, prompt: str, seeds: list[int], values: dict, links: bool) -> str:
    """HTML of images (B, S, S, 3); with `links` to download them."""
    parts = []
    for seed, pixels in zip(seeds, images, strict=True):
        file, metadata = io.BytesIO(), image_metadata(prompt=prompt, seed=seed, **values)
        image_grid(pixels[None], 1, gap=0).save(file, "PNG", pnginfo=metadata)
        url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
        text, name = html.escape(f"{prompt}, seed {seed}"), html.escape(image_name(prompt, seed))
        link = f' <a href="{url}" download="{name}" aria-label="Download seed {seed}">Download</a>'
        caption = f"Seed {seed}" + link * links
        parts.append(f'<figure><img src="{url}" alt="{text}"><p>{caption}</p></figure>')
    return f'<div class="images">{"".join(parts)}</div>'


# ---- page
PRIVATE = {"api_visibility": "private", "show_progress": "hidden"}


def slider(gr, name: str):
    """The component of a setting."""
    low, high, step, default, info = SETTINGS[name]
    label = name.replace("_", "-" if name.startswith("top") else " ").capitalize()
    if name == "seed":
        return gr.Number(default, label=label, info=info, minimum=low, maximum=high, precision=0)
    return gr.Slider(low, high, default, step=step, label=label, info=info, buttons=[])


def tab(gr, request: Callable, run, names: tuple[str, ...], lines: int, output: Callable) -> tuple:
    """The contents of a tab: settings beside prompt, buttons and output, on a phone below them.

    Returns the examples and the components of the settings.
    """
    with gr.Row(equal_height=False):
        with gr.Column(scale=3, min_width=280):
            info = "Ctrl-Enter generates, Escape stops."
            prompt = gr.Textbox(
                label="Prompt", info=info, lines=lines, max_lines=12, max_length=MAX_PROMPT
            )
            samples = gr.Dataset(components=[prompt], samples=[], label="Examples")
            with gr.Row():
                start = gr.Button("Generate", variant="primary", min_width=100)
                stop = gr.Button("Stop", variant="stop", min_width=100)
            status = gr.HTML("", html_template='<p class="status" role="status">${value}</p>')
            shown = output()
        with gr.Column(scale=1, min_width=280):
            sliders = {name: slider(gr, name) for name in names}
    generating = gr.on(
        [start.click, prompt.submit],
        request,
        inputs=[run, prompt, *sliders.values()],
        outputs=[shown, status],
        api_name=request.__name__,
        preprocess=False,  # the request checks the values itself
        concurrency_id="model",  # one request at a time, of either tab
        show_progress="minimal",
    )
    # in the browser: an answer of the server would be lost with the connection that is closed
    stop.click(None, None, status, js="() => 'Stopped'", cancels=[generating], **PRIVATE)
    samples.click(lambda sample: sample[0], samples, prompt, **PRIVATE)
    return samples, sliders


def build_page(playground: Playground):
    """The page as Gradio blocks."""
    gr = require("gradio")
    names = list(playground.configs)
    # interactive: otherwise the keyboard could not reach it to scroll and copy
    plain = gr.InputHTMLAttributes(spellcheck=False)
    code = {"lines": 8, "max_lines": 30, "elem_id": "text", "interactive": True}
    with gr.Blocks(title="Blueberry playground", analytics_enabled=False) as page:
        gr.HTML("<h1>Blueberry playground</h1>")
        run = gr.Dropdown(names, value=names[0], label="Run", filterable=False)
        about = gr.HTML("", elem_id="about")
        with gr.Tabs() as tabs:
            with gr.Tab("Text", id="text"):
                output = partial(gr.Textbox, label="Generated text", html_attributes=plain, **code)
                texts, _ = tab(gr, playground.text, run, TEXT_SETTINGS, 3, output)
            with gr.Tab("Images", id="images") as images_tab:
                images, sliders = tab(gr, playground.images, run, IMAGE_SETTINGS, 1, gr.HTML)

        def select(name):
            config = playground.config(name)
            prompts, has_images = examples(config), config["stage"] == "multimodal"
            samples = [[prompt] for prompt in prompts]
            return {
                about: description(name, config),
                tabs: gr.Tabs(selected="images" if has_images else "text"),
                images_tab: gr.Tab(interactive=has_images),
                texts: gr.Dataset(samples=samples, visible=bool(prompts) and not has_images),
                images: gr.Dataset(samples=samples, visible=bool(prompts) and has_images),
                sliders["guidance"]: config.get("guidance", 1),
                sliders["temperature"]: config.get("temperature", 1),
            }

        outputs = [about, tabs, images_tab, texts, images]
        outputs += [sliders["guidance"], sliders["temperature"]]
        gr.on([page.load, run.change], select, run, outputs, preprocess=False, **PRIVATE)
    return page.queue(max_size=MAX_WAITING, default_concurrency_limit=1)


# ---- server
@dataclass
class OnlyRoutes:
    """ASGI middleware that answers what the page needs, and nothing else."""

    app: Callable

    async def __call__(self, scope, receive, send) -> None:
        app = self.app
        if scope["type"] == "http" and not ROUTES.fullmatch(scope["path"]):
            app = require("starlette.responses").PlainTextResponse("not found", 404)
        await app(scope, receive, send)


def build_app(playground: Playground):
    """The page as an ASGI application."""
    gr = require("gradio")
    app = require("fastapi").FastAPI(openapi_url=None)
    folder = Path(__file__).parent
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    gr.mount_gradio_app(
        app,
        build_page(playground),
        path="/",
        server_name=HOST,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        theme=gr.themes.Base(primary_hue="indigo", neutral_hue="slate", **fonts),
        css=(folder / "playground.css").read_text(encoding="utf-8"),
        js=(folder / "playground.js").read_text(encoding="utf-8"),
    )
    app.add_middleware(OnlyRoutes)
    hosts = require("starlette.middleware.trustedhost").TrustedHostMiddleware
    app.add_middleware(hosts, allowed_hosts=[HOST, "localhost"])  # against DNS rebinding
    return app


def main(cfg: Config) -> None:
    """Serve the page until a signal arrives. Raises UserError."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
    require("gradio")
    uvicorn, configs = require("uvicorn"), offered_runs(cfg.runs)
    resolve_device(cfg)
    try:
        listener = socket.create_server((HOST, cfg.port))
    except (OSError, OverflowError) as error:
        reason = os.strerror(error.errno) if isinstance(error, OSError) else first_line(error)
        raise UserError(
            f"--port {cfg.port} cannot be used: {reason}; pass another one, or 0 for any free port"
        ) from error
    app = build_app(Playground(configs, cfg))
    print(f"playground: http://{HOST}:{listener.getsockname()[1]} (Ctrl-C stops it)", flush=True)
    # an open page keeps connections open, which must not keep the server from stopping
    options = {"log_level": "critical", "timeout_graceful_shutdown": 1}
    uvicorn.Server(uvicorn.Config(app, **options)).run(sockets=[listener])


if __name__ == "__main__":
    run_script(main, Config, prog="python -m tools.playground", description=__doc__)
