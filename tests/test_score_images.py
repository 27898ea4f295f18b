import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import sentences, train, train_stage, write_jsonl
from PIL import Image
from test_train_multimodal import PETS, write_pets

import train_multimodal
import train_vqvae
from common.config import UserError, load_config
from data import shapes
from data.images import ImageConfig
from sampling import load_run, resolve_sampling
from tools import score_images


def score(*args: str) -> dict:
    return score_images.main(load_config(score_images.Config, list(args)))


# ---- shapes
def test_fractions_correct_count_only_images_whose_caption_states_the_attribute():
    scenes = [shapes.scene(2, i) for i in range(40)]
    sized = [scene for scene in scenes if shapes.parse(scene.caption).objects[0][0]]
    unsized = [scene for scene in scenes if not shapes.parse(scene.caption).objects[0][0]]
    chosen = [sized[0], unsized[0], sized[1]]
    images = np.stack([shapes.render(scene, 64) for scene in chosen])
    images[2] = 128  # nothing to see
    fractions = score_images.fractions_correct([scene.caption for scene in chosen], images)
    assert fractions["size"] == 1 / 2
    assert fractions["all"] == fractions["count"] == 2 / 3


@pytest.fixture(scope="module")
def shapes_scores(tmp_path_factory) -> tuple[Path, dict]:
    """The folder and the scores of a hardly trained run on shapes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("shapes"))
        train_stage(train_vqvae, run="v", model__image_size=64, model__downsample=8)
        settings = {"data__tokenizer": "bpe-400", "model__vocab_size": 418}
        train_stage(train_multimodal, run="m", vqvae="v", sequences=16, **settings)
        return Path("runs/m").absolute(), score("m", "--n", "6")


@pytest.mark.parametrize("pairs", ["seen", "unseen"])
def test_rendered_scenes_have_perfect_scores(shapes_scores, pairs):
    _, scores = shapes_scores
    assert set(scores[pairs]["ceiling_rendered"].values()) == {1.0}


@pytest.mark.parametrize("pairs", ["seen", "unseen"])
@pytest.mark.parametrize("kind", ["generated", "ceiling_reconstructed", "ceiling_rendered"])
def test_every_kind_of_image_has_a_score_for_each_attribute(shapes_scores, pairs, kind):
    _, scores = shapes_scores
    assert {"color", "shape", "count", "all"} <= scores[pairs][kind].keys()


@pytest.mark.parametrize("pairs", ["seen", "unseen"])
def test_hardly_trained_model_scores_low(shapes_scores, pairs):
    _, scores = shapes_scores
    assert scores[pairs]["generated"]["all"] < 0.5


def test_shapes_are_shown_in_a_grid_of_eight_columns(shapes_scores):
    run, _ = shapes_scores
    assert Image.open(run / "scores.png").width > 8 * 64


# ---- labeled images
@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A working directory with runs/m, which has learned the pets, and runs/lm."""
    folder = tmp_path_factory.mktemp("pets")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_pets()
        write_jsonl("corpus.jsonl", sentences(300))
        train_stage(train_vqvae, run="v", images=160, **PETS)
        settings = {"sequences": 1600, "adamw_lr": 0.01, "sample_n": 0}
        train_stage(train_multimodal, run="m", vqvae="v", **settings, **PETS)
        train(run="lm", tokens=1280)
    return folder


@pytest.fixture
def in_workspace(workspace, monkeypatch):
    monkeypatch.chdir(workspace)


@pytest.fixture(scope="module")
def scores(workspace) -> dict:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workspace)
        return score("m", "--n", "8", "--n_classify", "8")


def test_scores_are_written_to_the_run_folder(scores, workspace):
    assert json.loads((workspace / "runs/m/scores.json").read_text()) == scores


def test_generated_images_are_shown_beside_their_nearest_training_images(scores, workspace):
    grid = Image.open(workspace / "runs/m/scores.png")
    assert grid.width > 8 * 128  # enlarged so that the titles fit
    assert 2 * 128 < grid.height < 3 * 128  # 8 generated and 8 real images


@pytest.mark.parametrize(
    "name, kinds",
    [
        ("class_accuracy", {"generated", "ceiling_reconstructed", "ceiling_real"}),
        ("frechet_distance", {"generated", "reconstructed", "floor_real"}),
        ("kernel_distance", {"generated", "floor_real"}),
        ("diversity", {"generated", "real"}),
    ],
)
def test_score_compares_generated_images_with_references(scores, name, kinds):
    assert scores[name].keys() == kinds
    assert all(isinstance(value, float) for value in scores[name].values())


@pytest.mark.parametrize(
    "name, value",
    [("classifier", "cpu"), ("n", 8), ("n_real", 12), ("n_classify", 8), ("guidance", 3.0)],
)
def test_scores_record_how_they_were_measured(scores, name, value):
    assert scores[name] == value


def test_learned_images_have_the_lowest_loss_under_their_own_caption(scores):
    assert scores["generative_accuracy"] >= 0.75  # chance: 0.25


def test_accuracy_per_class_and_confusion_count_expected_and_predicted_classes(monkeypatch):
    def judge(_, images):  # the class is the value of the pixels
        predicted = ((images[:, 0, 0, 0] + 1) * 127.5).round().long()
        features = torch.rand(len(images), 4, generator=torch.Generator().manual_seed(0))
        return torch.nn.functional.one_hot(predicted, 3).float(), features

    def images(predicted: list[int]) -> torch.Tensor:
        return torch.tensor(predicted, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 32, 32)

    monkeypatch.setattr(score_images, "judge", judge)
    small = {
        "generated": images([0, 0, 2, 1]),
        "reconstructed": images([0, 0, 1, 1]),
        "real": images([0, 0, 0, 1]),
        "train": images([0, 1, 2, 0]),
    }
    labels, test_labels = torch.tensor([0, 0, 0, 1]), torch.tensor([0, 0, 0, 1])
    scores = score_images.judged_scores(None, small, labels, test_labels, ["cat", "dog", "owl"])
    assert scores["confusion"]["generated"] == [[2, 0, 1], [0, 1, 0], [0, 0, 0]]
    assert scores["confusion"]["ceiling_reconstructed"] == [[2, 1, 0], [0, 1, 0], [0, 0, 0]]
    assert scores["class_accuracy"] == {
        "generated": 0.75,
        "ceiling_reconstructed": 0.75,
        "ceiling_real": 1.0,
    }
    assert scores["accuracy_by_class"]["cat"]["generated"] == pytest.approx(2 / 3)
    assert scores["accuracy_by_class"]["dog"]["ceiling_real"] == 1
    assert scores["accuracy_by_class"]["owl"]["generated"] is None  # no such image


def test_distances_are_those_of_each_kind_of_image_from_real_ones(monkeypatch):
    def judge(_, images):  # features differ from those of another value by the difference, 4 times
        noise = torch.rand(len(images), 4, generator=torch.Generator().manual_seed(0))
        return torch.zeros(len(images), 2), images[:, 0, 0, :1] * 127.5 + noise

    monkeypatch.setattr(score_images, "judge", judge)
    values = {"generated": 50, "reconstructed": 20, "real": 30, "train": 60}
    small = {
        kind: torch.full((6, 3, 32, 32), value, dtype=torch.uint8) for kind, value in values.items()
    }
    labels = torch.zeros(6, dtype=torch.long)
    scores = score_images.judged_scores(None, small, labels, labels, ["cat", "dog"])
    expected = {"generated": 4 * 20**2, "reconstructed": 4 * 10**2, "floor_real": 4 * 30**2}
    assert scores["frechet_distance"] == pytest.approx(expected, rel=1e-3)
    kernel = scores["kernel_distance"]
    assert kernel["floor_real"] > kernel["generated"] > 0


def test_each_row_of_the_class_figure_shows_one_class(tmp_path):
    colors = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255]], np.uint8)
    images = colors[np.arange(29) % 3][:, None, None].repeat(32, 1).repeat(32, 2)  # (29, 32, 32, 3)
    score_images.plot_classes(images, ["cat", "dog", "owl"], tmp_path / "classes.png")
    pixels = np.asarray(Image.open(tmp_path / "classes.png").convert("RGB"))
    for i, color in enumerate(colors):
        rows, columns = (pixels == color).all(-1).nonzero()
        assert rows.min() >= i * len(pixels) / 3 and rows.max() <= (i + 1) * len(pixels) / 3
        shown = np.diff(np.unique(columns)).tolist()
        assert sum(step > 1 for step in shown) == 7  # the gaps between eight images


def test_classes_are_drawn_if_each_has_an_image(scores, workspace, in_workspace):
    path = workspace / "runs/m/classes.png"
    assert path.exists()
    path.unlink()
    score("m", "--n", "3")  # of four classes
    assert not path.exists()


def test_confusion_is_drawn(scores, workspace):
    image = Image.open(workspace / "runs/m/confusion.png").convert("RGB")
    assert image.width > 2 * image.height  # three matrices side by side
    assert len(image.getcolors(1 << 24)) > 100  # shades of blue


def test_diversity_needs_two_images_of_one_class(in_workspace):
    assert score("m", "--n", "4", "--n_classify", "0")["diversity"]["generated"] is None


def test_argmin_accuracy_is_omitted_for_no_images(in_workspace):
    assert "generative_accuracy" not in score("m", "--n", "4", "--n_classify", "0")


def test_captions_that_are_too_long_are_truncated_and_counted(in_workspace, capsys):
    loaded = load_run("m", load_config(score_images.Config, ["m"]))
    cfg = load_config(score_images.Config, ["m", "--batch=2"])
    resolve_sampling(cfg, loaded)
    score_images.generate_all(cfg, loaded, ["a photo of a red", "word " * 200])
    assert "1 of 2 captions truncated to 32 tokens" in capsys.readouterr().out


def test_no_draft_of_the_scores_is_left(scores, workspace):
    assert list((workspace / "runs/m").glob("*.tmp")) == []


# ---- errors
@pytest.mark.parametrize(
    "args, message",
    [
        (["lm"], "runs/lm is a language model and cannot generate images"),
        (["m", "--n=1"], "distances need at least 2 generated and 5 real images"),
        (["m", "--n_real=4"], "distances need at least 2 generated and 5 real images"),
        (["m", "--batch=0"], "--batch is 0; it must be positive"),
        (["m", "--n_classify=-1"], "--n_classify is -1; it must not be negative"),
    ],
)
def test_invalid_input_is_a_one_line_error(in_workspace, args, message):
    with pytest.raises(UserError) as error:
        score(*args)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_images_with_captions_instead_of_labels_are_refused(workdir):
    Path("captioned").mkdir()
    for i in range(2):
        Image.new("RGB", (32, 32), (100 * i, 0, 0)).save(f"captioned/{i}.png")
    rows = [{"file_name": f"{i}.png", "text": f"number {i}"} for i in range(2)]
    Path("captioned/metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cfg = load_config(score_images.Config, ["m", "--n=8", "--n_real=8"])
    config = ImageConfig(source="captioned", val_fraction=0.4)
    with pytest.raises(UserError, match="data source captioned has captions but no class labels"):
        score_images.labeled_images(cfg, config, 32)
