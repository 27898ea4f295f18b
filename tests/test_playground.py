"""The page in Chromium, and its server as a program, on runs that are hardly trained."""

import base64
import html
import io
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import weakref
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, script, sentences, train, train_stage, write_jsonl
from PIL import Image

import generate
import train_multimodal
import train_vqvae
from common.config import UserError, load_config
from sampling import generate_images, growing_images
from tools import playground

extra, browser = pytest.mark.extra, pytest.mark.browser
MODULE = ("-m", "tools.playground")
CAPTION = "a red circle"
SIZE, GRID = 64, 16  # of images, in pixels and in tokens
TEXT = {"prompt": "a fox", "temperature": 0, "top_k": 0, "top_p": 1, "max_tokens": 100, "seed": 3}
IMAGE = {"prompt": CAPTION, "guidance": 3, "temperature": 1, "count": 2, "seed": 5}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A working directory with the runs text, images and codes (a VQ-VAE)."""
    folder = tmp_path_factory.mktemp("playground")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_jsonl("corpus.jsonl", sentences(300))
        # large enough to watch what they generate and to stop them
        slow = {"model__d_model": 256, "model__n_layers": 12, "model__d_ff": 1024}
        sizes = {"batch_tokens": 512, "eval_tokens": 512, "model__seq_len": 512}
        train(run="text", tokens=1024, sample_prompts=["a fox"], **sizes, **slow)
        train_stage(train_vqvae, run="codes", model__image_size=SIZE, images=16)
        sizes = {"model__seq_len": 300, "model__n_image_positions": GRID**2}
        changes = {"vqvae": "codes", "sequences": 8, "guidance": 1.5, "sample_n": 0}
        train_stage(train_multimodal, run="images", **changes, **sizes, **slow)
    return folder


@pytest.fixture(autouse=True)
def in_workspace(workspace, monkeypatch):
    monkeypatch.chdir(workspace)


class Server:
    """A running playground: its address, and what it has printed."""

    def __init__(self, process: subprocess.Popen, log: Path):
        self.process, self.log = process, log
        self.url = self.line(r"playground: (http://\S+)")[1]

    def line(self, pattern: str) -> re.Match:
        """The last line that matches, which may come later."""
        deadline = time.monotonic() + 100
        while time.monotonic() < deadline:
            if found := list(re.finditer(pattern, self.log.read_text())):
                return found[-1]
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.05)
        raise AssertionError(f"no line {pattern!r} in {self.log.read_text()!r}")

    def forget(self) -> None:
        """Forget what was printed so far."""
        os.truncate(self.log, 0)


@contextmanager
def running(folder: Path, *args: str):
    """A server with its own folder for temporary files, folder/tmp."""
    (folder / "tmp").mkdir()
    env = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(folder / "tmp")}
    command = [sys.executable, *MODULE, "--port", "0", "--device", "cpu", *args]
    with (folder / "log").open("a") as log:  # append: the log is truncated between tests
        output = {"stdout": log, "stderr": subprocess.STDOUT}
        process = subprocess.Popen([*command, "--dtype", "float32"], env=env, **output)
    try:
        yield Server(process, folder / "log")
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def server(workspace, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workspace)
        with running(tmp_path_factory.mktemp("server"), "text", "images") as server:
            yield server


def expected_text() -> str:
    """What generate.py prints for the settings TEXT."""
    flags = [f"--{name}={value}" for name, value in TEXT.items()]
    flags += ["--device=cpu", "--dtype=float32"]
    (text,) = generate.main(load_config(generate.Config, ["text", *flags]))
    return TEXT["prompt"] + text


@pytest.fixture(scope="module")
def expected_images(workspace, tmp_path_factory) -> list[Path]:
    """The files that generate.py writes for the settings IMAGE."""
    out = tmp_path_factory.mktemp("expected") / "x.png"
    flags = [f"--{name.replace('count', 'n')}={value}" for name, value in IMAGE.items()]
    flags += ["--device=cpu", "--dtype=float32", f"--out={out}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workspace)
        generate.main(load_config(generate.Config, ["images", *flags]))
    return [out.with_suffix("") / f"{IMAGE['seed'] + i}.png" for i in range(IMAGE["count"])]


def opened(url: str) -> Image.Image:
    """The image in a data: URL."""
    return Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/png;base64,"))))


def new_playground() -> playground.Playground:
    cfg = load_config(playground.Config, ["text", "images", "--device=cpu", "--dtype=float32"])
    return playground.Playground(playground.offered_runs(cfg.runs), cfg)


# ---- starting and stopping
@extra
@pytest.mark.parametrize(
    "args, message",
    [
        (["nobody"], "there is no run 'nobody'; existing runs: codes, images, text"),
        (["codes"], "codes is a VQ-VAE run, which cannot generate by itself; pass a run of"),
        (["--port", "70000"], "--port 70000 cannot be used: .*; pass another one, or 0 for any"),
        (["--device", "nowhere"], "--device nowhere cannot be used"),
    ],
)
def test_invalid_arguments_are_an_error(args, message):
    with pytest.raises(UserError, match=message):
        playground.main(load_config(playground.Config, args))


@extra
def test_port_in_use_is_a_one_line_error():
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        done = script(*MODULE, "--port", str(port))
    reason = f"error: --port {port} cannot be used: Address already in use; pass another one"
    assert done.stderr.startswith(reason)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)


@extra
def test_folder_without_runs_is_an_error(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="there is no run in runs/ that can generate; train one"):
        playground.main(load_config(playground.Config, []))


def test_missing_gradio_is_an_error_that_names_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(UserError, match="gradio is not installed; run make extra"):
        playground.main(load_config(playground.Config, ["text"]))


@extra
@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_ends_the_server_with_one_line(number, code, tmp_path):
    with running(tmp_path) as server:
        server.forget()
        with urllib.request.urlopen(server.url + "/gradio_api/heartbeat/x"):  # as an open page does
            server.process.send_signal(number)
            assert server.process.wait(60) == code
        assert server.log.read_text() == "interrupted\n"


def test_all_runs_that_can_generate_are_offered_and_a_vqvae_is_not():
    assert list(playground.offered_runs([])) == ["images", "text"]


# ---- requests
@extra
@pytest.mark.parametrize(
    "kind, change, message",
    [
        ("text", {"run": "../text"}, "there is no run '../text'; choose one of text, images"),
        ("text", {"run": None}, "there is no run None"),
        ("text", {"prompt": "a" * 10_001}, "not text of at most 10,000 characters"),
        ("text", {"prompt": "a " * 600}, "but the model's context is 512; shorten it"),
        ("text", {"prompt": "\ud800"}, "half a character"),
        ("text", {"prompt": ["a"]}, "not text of at most 10,000 characters"),
        ("text", {"temperature": -1}, "temperature is -1; enter a number from 0 to 2"),
        ("text", {"temperature": float("nan")}, "temperature is nan"),
        ("text", {"temperature": True}, "temperature is True"),
        ("text", {"top_p": 0}, "top_p is 0; enter a number from 0.01 to 1"),
        ("text", {"top_k": 1.5}, "top_k is 1.5; enter a whole number from 0 to 200"),
        ("text", {"max_tokens": 1001}, "max_tokens is 1001"),
        ("text", {"seed": None}, "seed is empty; enter a whole number"),
        ("text", {"seed": "1"}, "seed is '1'"),
        ("images", {"count": 17}, "count is 17; enter a whole number from 1 to 16"),
        ("images", {"guidance": 11}, "guidance is 11"),
        ("images", {"prompt": " "}, "the prompt is empty; describe an image"),
        ("images", {"prompt": "a" * 300}, "but the model takes at most 40; shorten it"),
        ("images", {"run": "text"}, "text is a language model; choose a run of"),
    ],
)
def test_value_out_of_its_limits_is_answered_with_a_message(kind, change, message):
    settings = {"run": kind} | (TEXT if kind == "text" else IMAGE) | change
    *_, (_, status) = getattr(new_playground(), kind)(*settings.values())
    assert message in html.unescape(status)
    assert 'role="alert"' in status


@extra
def test_message_that_quotes_the_prompt_is_text_and_not_html():
    settings = TEXT | {"prompt": "<img src=x> " * 300}
    *_, (_, status) = new_playground().text("text", *settings.values())
    assert "&lt;img" in status
    assert "<img" not in status


@extra
def test_prompt_that_names_a_file_is_ordinary_text():
    settings = TEXT | {"prompt": "FILE:corpus.jsonl", "max_tokens": 1}
    *_, (text, _) = new_playground().text("text", *settings.values())
    assert text.startswith("FILE:corpus.jsonl")


def test_image_text_and_file_name_cannot_leave_their_html_attributes():
    images = np.zeros((1, 4, 4, 3), np.uint8)
    page = playground.figures(images, '"><script>', [0], {}, links=True)
    assert "<script" not in page
    assert 'alt="&quot;&gt;&lt;script&gt;, seed 0"' in page


def test_loading_a_run_frees_the_previous_one_first(monkeypatch):
    page = new_playground()
    first = weakref.ref(page.load("text").model)
    assert page.load("text").model is first()  # kept while it is used
    load, alive = playground.load_run, []
    monkeypatch.setattr(
        "tools.playground.load_run", lambda *args: alive.append(first()) or load(*args)
    )
    page.load("images")
    assert alive == [None]


def test_growing_images_are_gray_below_the_rows_that_are_sampled():
    loaded = new_playground().load("images")
    settings = {"guidance": 3.0, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    parts = loaded.model, loaded.vqvae, loaded.format, CAPTION, [5, 6]
    states = list(growing_images(*parts, **settings))
    assert len(states) == GRID
    for n, images in enumerate(states, start=1):
        edge = n * SIZE // GRID
        assert (images[:, :, edge:] == 0).all()
        assert not (images[:, :, edge - 1] == 0).all()
    whole = generate_images(*parts[:3], [CAPTION] * 2, [5, 6], **settings)
    assert torch.equal(states[-1], whole)


# ---- server
def status_of(request) -> int:
    try:
        with urllib.request.urlopen(request) as response:
            return response.status
    except urllib.error.HTTPError as error:
        return error.code


@extra
@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/file=corpus.jsonl",
        "/gradio_api/file=/etc/passwd",
        "/gradio_api/file=runs/text/config.yaml",
        "/gradio_api/upload",
        "/gradio_api/proxy=https://example.org/",
        "/gradio_api/run/text",
        "/static/../../../../corpus.jsonl",
        "/docs",
    ],
)
def test_files_and_what_the_page_does_not_use_are_not_served(server, path):
    assert status_of(server.url + "/config") == 200
    data = b"x" if path.endswith(("upload", "run/text")) else None
    assert status_of(urllib.request.Request(server.url + path, data)) in (403, 404)


@extra
def test_host_name_of_another_machine_is_refused(server):
    request = urllib.request.Request(server.url, headers={"Host": "evil.example"})
    assert status_of(request) == 400


@extra
def test_server_listens_on_loopback_only(server):
    port = int(server.url.rsplit(":", 1)[1])
    addresses = [line.split()[1] for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    assert [a for a in addresses if a.endswith(f":{port:04X}")][:1] == [f"0100007F:{port:04X}"]


@pytest.fixture
def client(server):
    """A program that sends requests, as any program can."""
    return pytest.importorskip("gradio_client").Client(server.url, verbose=False)


@extra
def test_programs_get_the_text_of_generate_py(client):
    text, status = client.predict("text", *TEXT.values(), api_name="/text")
    assert text == expected_text()
    assert status.startswith("100 tokens in")


@extra
def test_requests_for_text_and_for_images_take_turns(server, client):
    server.forget()
    settings = TEXT | {"max_tokens": 1000}  # takes longer than the images
    text = client.submit("text", *settings.values(), api_name="/text")
    while not text.outputs():  # until it is being generated
        time.sleep(0.01)
    client.predict("images", *IMAGE.values(), api_name="/images")
    done = [line.split(":")[0] for line in server.log.read_text().splitlines()]
    assert done == ["text from text", "images from images"]


# ---- browser
@pytest.fixture(scope="module")
def chromium():
    playwright = pytest.importorskip("playwright.sync_api")
    path = shutil.which("chromium") or shutil.which("google-chrome")
    options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with playwright.sync_playwright() as driver:
        instance = driver.chromium.launch(executable_path=path, args=options)
        yield instance
        instance.close()


DESKTOP = {"viewport": {"width": 1280, "height": 900}}
PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
SHAPES = pytest.mark.parametrize("shape", [DESKTOP, PHONE], ids=["desktop", "phone"])


@contextmanager
def visit(chromium, server, **options):
    """A page at the server, which must not report an error or ask another machine for anything."""
    context, problems = chromium.new_context(**options), []
    page = context.new_page()
    page.set_default_timeout(60_000)

    def note(is_problem: bool, text: str) -> None:
        if is_problem:
            problems.append(text)

    # the page itself closes its connections for events
    events = re.compile(r"/gradio_api/(queue/data|heartbeat)")
    page.on("console", lambda m: note(m.type in ("error", "warning"), m.text))
    page.on("pageerror", lambda error: note(True, str(error)))
    page.on("request", lambda r: note(not r.url.startswith((server.url, "data:")), r.url))
    page.on("response", lambda r: note(r.status >= 400, r.url))
    page.on("requestfailed", lambda r: note(not events.search(r.url), r.url))
    server.forget()
    page.goto(server.url)
    page.get_by_role("button", name="a fox").wait_for()  # the example prompt of the first run
    yield page
    context.close()
    assert problems == []


def choose(page, run: str) -> None:
    page.get_by_label("Run").click()
    page.get_by_role("option", name=run, exact=True).click()
    page.get_by_text("Text-to-image" if run == "images" else "Language model").wait_for()


def control(page, label: str):
    """The visible input with a label; of a slider, its number."""
    return page.get_by_label(label).locator("visible=true").first


def fill(page, settings: dict) -> None:
    for name, value in settings.items():
        label = name.replace("top_", "top-").replace("_", " ").capitalize()
        control(page, label).fill(str(value))


def button(page, name: str):
    return page.get_by_role("button", name=name, exact=True).locator("visible=true")


WATCH = """selector => {
  window.states = [];
  const look = () => {
    const element = document.querySelector(selector);
    const state = element && (element.value ?? element.src);
    if (state && state !== window.states.at(-1)) window.states.push(state);
    requestAnimationFrame(look);
  };
  look();
}"""


@browser
@SHAPES
def test_text_grows_while_it_is_generated_to_that_of_generate_py(chromium, server, shape):
    with visit(chromium, server, **shape) as page:
        fill(page, TEXT)
        page.evaluate(WATCH, "#text textarea")
        button(page, "Generate").click()
        page.get_by_text("tokens in").wait_for()
        page.wait_for_function("() => window.states.length > 5")
        states = page.evaluate("window.states")
        final = page.get_by_label("Generated text").input_value()
        assert final == states[-1] == expected_text()
        assert all(later.startswith(earlier) for earlier, later in pairwise(states))
        assert page.evaluate("document.documentElement.scrollWidth") == shape["viewport"]["width"]


@browser
@SHAPES
def test_images_fill_in_to_the_files_of_generate_py(chromium, server, shape, expected_images):
    with visit(chromium, server, **shape) as page:
        choose(page, "images")
        fill(page, IMAGE)
        page.evaluate(WATCH, ".images img")
        button(page, "Generate").click()
        page.get_by_text("2 images in").wait_for()
        *partial, final = (opened(url) for url in page.evaluate("window.states"))
        expected = Image.open(expected_images[0])
        assert (final.tobytes(), final.text) == (expected.tobytes(), expected.text)
        heights = [rows_of(np.array(image), np.array(final)) for image in partial]
        assert len(set(heights)) >= 3
        assert heights == sorted(heights)
        assert page.evaluate("document.documentElement.scrollWidth") == shape["viewport"]["width"]


def rows_of(image: np.ndarray, final: np.ndarray) -> int:
    """The number of pixel rows above the gray part of an image that is not complete."""
    gray = (image == 128).all(axis=(1, 2))
    height = len(gray) - int(gray[::-1].argmin())
    assert 0 < height < SIZE
    return height


@browser
def test_downloaded_file_is_that_of_generate_py(chromium, server, expected_images):
    with visit(chromium, server, accept_downloads=True) as page:
        choose(page, "images")
        fill(page, IMAGE)
        button(page, "Generate").click()
        with page.expect_download() as download:
            page.get_by_label("Download seed 6").click()
        assert download.value.suggested_filename == "a-red-circle-6.png"
        assert Path(download.value.path()).read_bytes() == expected_images[1].read_bytes()


@browser
@pytest.mark.parametrize("how", ["button", "Escape", "closed tab"])
def test_stopping_ends_the_generation(chromium, server, how):
    with visit(chromium, server) as page:
        fill(page, TEXT | {"max_tokens": 1000})
        button(page, "Generate").click()
        page.wait_for_function("document.querySelector('#text textarea').value.length > 30")
        if how == "closed tab":
            page.close()
        elif how == "Escape":
            page.keyboard.press("Escape")
        else:
            button(page, "Stop").click()
        assert int(server.line(r"text from text: stopped after (\d+) steps")[1]) < 500
        if how != "closed tab":
            page.get_by_text("Stopped").wait_for()
            text = page.get_by_label("Generated text").input_value()
            assert text[:30] == expected_text()[:30]
            fill(page, TEXT)
            button(page, "Generate").click()
            page.get_by_text("100 tokens in").wait_for()


@browser
def test_stopping_ends_the_generation_of_images(chromium, server):
    with visit(chromium, server) as page:
        choose(page, "images")
        fill(page, IMAGE | {"count": 16})
        button(page, "Generate").click()
        page.locator(".images img").first.wait_for()
        button(page, "Stop").click()
        assert int(server.line(r"images from images: stopped after (\d+) steps")[1]) < GRID


@browser
def test_invalid_input_is_a_message_on_the_page_and_the_next_request_works(chromium, server):
    with visit(chromium, server) as page:
        fill(page, TEXT | {"prompt": "word " * 600})
        button(page, "Generate").click()
        page.get_by_role("alert").get_by_text("the model's context is 512; shorten it").wait_for()
        fill(page, TEXT | {"seed": ""})
        button(page, "Generate").click()
        page.get_by_text("seed is empty; enter a whole number").wait_for()
        fill(page, TEXT | {"max_tokens": 5})
        button(page, "Generate").click()
        page.get_by_text("5 tokens in").wait_for()
        assert page.get_by_role("alert").count() == 0
    assert "Traceback" not in server.log.read_text()


@browser
def test_choosing_a_run_sets_its_tabs_and_settings(chromium, server):
    with visit(chromium, server) as page:
        images_tab = page.get_by_role("tab", name="Images")
        assert images_tab.is_disabled()
        choose(page, "images")
        assert control(page, "Guidance").input_value() == "1.5"  # of the run's config.yaml
        assert images_tab.get_attribute("aria-selected") == "true"
        page.get_by_role("button", name="a photo of a large red circle").click()
        page.wait_for_function(
            "[...document.querySelectorAll('textarea')].some(e => e.value.includes('red circle'))"
        )
        choose(page, "text")
        page.get_by_role("tab", name="Text", selected=True).wait_for()
        assert images_tab.is_disabled()


@browser
def test_page_is_usable_with_the_keyboard_alone(chromium, server):
    with visit(chromium, server) as page:
        names = [tab_stop(page) for _ in range(16)]
        order = [
            "Run",
            "Text",
            "Prompt",
            "Generate",
            "Stop",
            "Generated text",
            "Temperature",
            "Seed",
        ]
        places = [next(i for i, name in enumerate(names) if want in name) for want in order]
        assert places == sorted(places)
    with visit(chromium, server) as page:
        while "Prompt" not in tab_stop(page):
            pass
        page.keyboard.type("a fox")
        page.keyboard.press("Control+Enter")
        page.get_by_text("tokens in").wait_for()
        while "Run" not in tab_stop(page, "Shift+Tab"):
            pass
        page.keyboard.press("ArrowDown")
        page.keyboard.press("Enter")
        page.get_by_text("Text-to-image").wait_for()
        page.get_by_role("tab", name="Images", selected=True).wait_for()
        while "Prompt" not in tab_stop(page):
            pass
        page.keyboard.type(CAPTION)
        page.keyboard.press("Enter")
        page.get_by_text("4 images in").wait_for()


def tab_stop(page, key: str = "Tab") -> str:
    """Move the focus, which must be visible; the accessible name of what has it."""
    page.keyboard.press(key)
    return page.evaluate("""() => {
      const element = document.activeElement, style = getComputedStyle(element);
      if (style.outlineStyle === "none" || parseFloat(style.outlineWidth) < 2)
        throw new Error("no visible focus: " + element.outerHTML);
      const labels = [...element.labels ?? []].map(label => label.textContent);
      const name = [element.ariaLabel, ...labels, element.textContent].join(" ").trim();
      if (!name) throw new Error("no name: " + element.outerHTML);
      return name;
    }""")


@browser
@pytest.mark.parametrize("scheme, is_dark", [("dark", True), ("light", False)])
def test_page_follows_the_color_scheme_of_the_system(chromium, server, scheme, is_dark):
    with visit(chromium, server, color_scheme=scheme) as page:
        colors = page.evaluate("""() => [getComputedStyle(document.body).backgroundColor,
          getComputedStyle(document.querySelector("h1")).color]""")
        back, front = (sum(map(int, re.findall(r"\d+", color)[:3])) for color in colors)
        assert (back < front) == is_dark


@browser
def test_no_files_are_left_behind(chromium, server, workspace):
    before = sorted(workspace.rglob("*"))
    with visit(chromium, server) as page:
        choose(page, "images")
        fill(page, IMAGE)
        button(page, "Generate").click()
        page.get_by_text("2 images in").wait_for()
    assert sorted(workspace.rglob("*")) == before
    left = [path for path in (server.log.parent / "tmp").rglob("*") if path.is_file()]
    assert left == []
