import math
from pathlib import Path

import pytest
import torch
from helpers import flags_of, noisy, train_stage
from PIL import Image

import common.loop
import train_vqvae
from common.config import UserError, load_config
from common.metrics import read_metrics
from vqvae import VARIANCE, VQVAE, VQVAEConfig

LARGER = {"images": 2400, "probe_steps": 50, "model__codebook_size": 64, "model__width": 24}


def train(**changes) -> dict:
    return train_stage(train_vqvae, **changes)


@pytest.fixture(scope="module")
def larger_run(tmp_path_factory):
    """The working directory and the summary of a run of 300 steps, runs/whole."""
    folder = tmp_path_factory.mktemp("larger")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return folder, train(run="whole", **LARGER)


def test_training_beats_the_palette(larger_run):
    _, summary = larger_run
    assert summary["val_psnr"] > summary["palette_psnr"] + 0.5


def test_training_keeps_the_codebook_in_use(larger_run):
    _, summary = larger_run
    assert summary["codes_used"] > 40  # of 64


def test_edge_error_is_that_of_differences_between_neighbors():
    error = torch.full((1, 3, 4, 4), 0.5)
    assert train_vqvae.edge_error(error) == 0  # a wrong brightness blurs no edge
    error[0, 0, 1, 1] = 1.5  # differs by 1 from two neighbors along each axis
    n_pairs = 3 * 4 * 3  # along an axis
    assert train_vqvae.edge_error(error).item() == pytest.approx(2 * 2 / n_pairs)


def test_edge_weight_adds_the_edge_error_to_the_loss():
    images = 2 * torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)) - 1
    shape = VQVAEConfig(image_size=16, codebook_size=16, width=8, n_blocks=1)
    model, gradients = noisy(VQVAE(shape)), []

    def gradient() -> torch.Tensor:
        found = torch.cat([p.grad.flatten() for p in model.parameters()])
        model.zero_grad()
        return found

    for weight in (0.0, 2.0):
        cfg = train_vqvae.Config(edge_weight=weight, micro_batch=2, model=shape)
        train_vqvae.backward(model, images, cfg)
        gradients.append(gradient())
    (train_vqvae.edge_error(model(images)[0] - images) / VARIANCE).backward()
    assert torch.allclose(gradients[1] - gradients[0], 2 * gradient(), rtol=1e-3, atol=1e-2)


def test_trained_codes_are_more_predictable_than_uniform_ones(larger_run):
    _, summary = larger_run
    assert 0 < summary["probe_nats"] < math.log(64)


def test_probe_trains_on_as_many_codes_for_every_grid(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_vqvae, "PROBE_CODES", 640)
    shapes = []

    def probe_nats(train, val, codebook_size, steps):
        shapes.append(tuple(train.shape))
        return 1.0

    monkeypatch.setattr(train_vqvae, "probe_nats", probe_nats)
    for downsample in (4, 8):
        train(run=f"d{downsample}", images=8, probe_steps=1, model__downsample=downsample)
    assert shapes == [(10, 8, 8), (40, 4, 4)]


@pytest.mark.parametrize(
    "key",
    ["val_loss", "val_psnr_p5", "val_ssim", "code_perplexity"]
    + ["params", "images_per_second", "device"],
)
def test_summary_has_the_key(larger_run, key):
    _, summary = larger_run
    assert key in summary


def test_run_folder_has_the_loss_curve(larger_run):
    folder, _ = larger_run
    assert (folder / "runs/whole/loss.png").exists()


def test_sample_shows_images_in_a_row_above_their_reconstructions(larger_run):
    folder, _ = larger_run
    sample = Image.open(folder / "runs/whole/samples/0000300.png")
    assert 12 * 96 < sample.width < 13 * 96  # images of 32 pixels are enlarged to 96
    assert 2 * 96 < sample.height < 3 * 96


def stop_after_one_step(monkeypatch) -> None:
    """Let the next training loop find SIGINT (exit code 130) after its first step."""
    enter = common.loop.Interrupt.__enter__

    def interrupted(self):
        enter(self)
        self.code = 130
        return self

    monkeypatch.setattr(common.loop.Interrupt, "__enter__", interrupted)


def test_run_resumes_bit_for_bit(larger_run, monkeypatch):
    folder, summary = larger_run
    monkeypatch.chdir(folder)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stopped:
        stop_after_one_step(patch)
        train(run="cut", **LARGER)
    assert stopped.value.code == 130
    assert [path.name for path in Path("runs/cut/checkpoints").iterdir()] == ["0000001"]
    resumed = train(run="cut", resume="true", **LARGER)
    assert read_metrics(Path("runs/cut")) == read_metrics(Path("runs/whole"))
    assert resumed["val_psnr"] == summary["val_psnr"]


def red_images(folder: str, n: int, blue: int) -> None:
    """Write n images of one color to FOLDER/LABEL/*.png."""
    for i in range(n):
        path = Path(folder) / "abc"[i % 3] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (200, 30, blue)).save(path)


def test_collapsed_codebook_prints_a_warning(workdir, capsys):
    red_images("red", 40, 30)
    red_images("red_val", 4, 31)
    train(run="red", images=160, data__source="red", data__val_source="red_val")
    assert "warning: only 1 of 16 codes are in use" in capsys.readouterr().out


def test_healthy_codebook_prints_no_warning(workdir, capsys):
    assert train(run="shapes", images=160)["codes_used"] > 8  # of 16
    assert "warning" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "flag, message",
    [
        ("--model.image_size=30", "not divisible by model.downsample 4; set it to 28"),
        ("--model.code_dim=2", "model.code_dim is 2; it must be at least 3"),
        ("--crop=6", "--crop is 6; it must be a multiple of --model.downsample 4"),
        ("--crop=36", "at most --model.image_size 32"),
        ("--images=3", "--images 3 is less than one step of --batch_images 8"),
        ("--micro_batch=3", "--micro_batch 3 does not divide --batch_images 8"),
        ("--data.source=./none", "data source ./none matches no local files"),
        ("--data.source=none.parquet", "data source none.parquet matches no local files"),
        ("--model.codebook_size=20000", "--model.codebook_size is 20000, but the"),
    ],
)
def test_invalid_setting_is_a_one_line_error_and_starts_no_run(workdir, flag, message):
    with pytest.raises(UserError) as error:
        train_vqvae.main(load_config(train_vqvae.Config, [*flags_of(train_vqvae, run="new"), flag]))
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not Path("runs/new").exists()
