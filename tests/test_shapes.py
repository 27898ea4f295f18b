import os
import subprocess
import sys
from dataclasses import replace
from functools import lru_cache

import numpy as np
import pytest
from helpers import ROOT

from data.shapes import (
    BACKGROUNDS,
    COLORS,
    POSITIONS,
    RELATIONS,
    SHAPES,
    SIZES,
    Object,
    Scene,
    Spec,
    held_out,
    parse,
    render,
    scene,
)
from tools.shapes_checker import check

RED_CIRCLE = Object("circle", "red", 0.2, 0.2, 0.11)
BLUE_BAR = Object("bar", "blue", 0.7, 0.25, 0.17)
RED_CIRCLES = tuple(replace(RED_CIRCLE, x=x, y=0.5) for x in (0.2, 0.5, 0.8))
SINGLE = Scene("a small red circle at the top left on a white background", (RED_CIRCLE,), "white")
RELATED = Scene("a red circle left of a blue bar", (RED_CIRCLE, BLUE_BAR), "white")
COUNTED = Scene("three red circles", RED_CIRCLES, "white")

seen_and_unseen = pytest.mark.parametrize("unseen", [False, True], ids=["seen", "unseen"])
each_kind = pytest.mark.parametrize(
    "example", [SINGLE, RELATED, COUNTED], ids=["single", "related", "counted"]
)


# ---- scenes and captions
def scenes_as_text(indices: list[int]) -> str:
    """Scenes with their pixels, created in the given order and listed by index."""
    scenes = {i: scene(3, i) for i in indices}
    return repr([(scenes[i], render(scenes[i], 16).tobytes()) for i in sorted(scenes)])


def test_scenes_do_not_depend_on_process_or_order():
    env = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "PYTHONHASHSEED": "77"}
    code = "import test_shapes; print(test_shapes.scenes_as_text([7, 2, 900]), end='')"
    text = subprocess.check_output([sys.executable, "-c", code], env=env, text=True)
    assert text == scenes_as_text([2, 7, 900])


@lru_cache
def parsed_scenes(unseen: bool) -> list[tuple[Scene, Spec]]:
    scenes = [scene(1, i, unseen) for i in range(600)]
    return [(made, parse(made.caption)) for made in scenes]


@seen_and_unseen
def test_captions_name_color_and_shape_of_all_objects(unseen):
    for made, spec in parsed_scenes(unseen):
        shown = dict.fromkeys((obj.color, obj.shape) for obj in made.objects)
        assert list(shown) == [(color, shape) for _, color, shape in spec.objects]


@seen_and_unseen
def test_captions_state_the_number_of_objects(unseen):
    for made, spec in parsed_scenes(unseen):
        assert len(made.objects) == spec.count


@seen_and_unseen
def test_objects_have_the_stated_size(unseen):
    sized = [(made, spec) for made, spec in parsed_scenes(unseen) if spec.objects[0][0]]
    ratios = [made.objects[0].radius / SIZES[spec.objects[0][0]] for made, spec in sized]
    assert ratios == pytest.approx([1] * len(sized), rel=0.06)


@seen_and_unseen
def test_objects_are_in_the_stated_cell(unseen):
    placed = [(made.objects[0], spec) for made, spec in parsed_scenes(unseen) if spec.position]
    cells = [(int(3 * obj.x), int(3 * obj.y)) for obj, _ in placed]
    assert cells == [POSITIONS[spec.position] for _, spec in placed]


@seen_and_unseen
def test_objects_are_in_the_stated_relation(unseen):
    for made, spec in parsed_scenes(unseen):
        if spec.relation:
            first, second = made.objects
            axis, side = RELATIONS[spec.relation]
            assert side * (first.x - second.x, first.y - second.y)[axis] > 0.4


@seen_and_unseen
def test_scenes_have_the_stated_background(unseen):
    stated = [(made, spec) for made, spec in parsed_scenes(unseen) if spec.background]
    assert [made.background for made, _ in stated] == [spec.background for _, spec in stated]


@seen_and_unseen
def test_only_unseen_scenes_show_held_out_pairs(unseen):
    objects = [obj for made, _ in parsed_scenes(unseen) for obj in made.objects]
    assert {held_out(obj.color, obj.shape) for obj in objects} == {unseen}


@seen_and_unseen
@pytest.mark.parametrize(
    "statement, expected",
    [
        (lambda made, spec: spec.objects[0][0], {None, *SIZES}),
        (lambda made, spec: spec.position, {None, *POSITIONS}),
        (lambda made, spec: spec.count, {1, 2, 3, 4}),
        (lambda made, spec: spec.relation, {None, *RELATIONS}),
        (lambda made, spec: spec.background, {None, *BACKGROUNDS}),
        (lambda made, spec: made.caption[0].isupper(), {False, True}),
    ],
    ids=["size", "position", "count", "relation", "background", "capital"],
)
def test_scenes_cover_all_values_of_each_attribute(unseen, statement, expected):
    assert {statement(made, spec) for made, spec in parsed_scenes(unseen)} == expected


def test_eight_pairs_are_held_out_at_most_two_per_color_or_shape():
    pairs = np.array([[held_out(color, shape) for shape in SHAPES] for color in COLORS])
    assert pairs.sum() == 8
    assert max(pairs.sum(axis=0)) <= 2
    assert max(pairs.sum(axis=1)) <= 2


def test_parse_ignores_case_whitespace_and_final_period():
    spec = parse("  An Image of an orange ring ABOVE a red cross. ")
    assert spec == Spec(((None, "orange", "ring"), (None, "red", "cross")), 2, relation="above")


@pytest.mark.parametrize(
    "caption",
    [
        "",
        "a photo of",
        "a red circle",
        "a small red star",
        "two red crosss",
        "five red bars",
        "a orange ring above a red bar",
        "a large red bar at the top",
        "a small red bar on a red background",
        "a small red bar on a none background",
    ],
)
def test_parse_rejects_captions_that_no_scene_has(caption):
    with pytest.raises(ValueError, match=f"^caption '{caption}' does not describe .*background'$"):
        parse(caption)


# ---- rendering
@pytest.fixture(params=[64, 128])
def triangle(request) -> np.ndarray:
    """Red channel (S, S) of a triangle in the middle of a black image."""
    made = Scene("", (Object("triangle", "red", 0.5, 0.5, 0.25),), "black")
    return render(made, request.param)[..., 0]


def test_triangle_widens_downward(triangle):
    side = len(triangle)
    assert 15 < triangle[side // 3].mean() < triangle[side * 2 // 3].mean()


def test_slanted_edges_are_antialiased(triangle):
    assert len(np.unique(triangle)) > 3


# ---- checker
@lru_cache
def rendered_scenes(side: int) -> tuple[list[str], list[np.ndarray]]:
    """Captions and images; every fourth scene is unseen."""
    scenes = [scene(2, i, i % 4 == 0) for i in range(200 if side == 64 else 100)]
    return [made.caption for made in scenes], [render(made, side) for made in scenes]


@lru_cache
def mismatched_results(side: int) -> list[dict[str, bool]]:
    """Results for each caption with the image of the next one."""
    captions, images = rendered_scenes(side)
    return [check(c, i) for c, i in zip(captions, images[1:] + images[:1], strict=True)]


@pytest.mark.parametrize("side", [64, 128])
def test_checker_accepts_rendered_scenes(side):
    pairs = zip(*rendered_scenes(side), strict=True)
    assert np.mean([check(caption, image)["all"] for caption, image in pairs]) >= 0.99


@pytest.mark.parametrize("side", [64, 128])
@pytest.mark.parametrize(
    "attribute, limit",
    [
        ("all", 0.02),
        ("relation", 0.1),
        ("color", 0.25),
        ("shape", 0.25),
        ("position", 0.25),
        ("size", 0.55),
        ("count", 0.55),
        ("background", 0.55),
    ],
)
def test_checker_rejects_images_of_other_captions(side, attribute, limit):
    results = [result for result in mismatched_results(side) if attribute in result]
    assert np.mean([result[attribute] for result in results]) < limit


@pytest.mark.parametrize("side", [64, 128])
def test_checker_rejects_swapped_color_shape_pairs(side):
    assert not check("a blue circle left of a red bar", render(RELATED, side))["all"]


@each_kind
def test_checker_accepts_correct_captions(example):
    result = check(example.caption, render(example, 64))
    assert result == dict.fromkeys(result, True)


@pytest.mark.parametrize(
    "example, attribute, shown, stated",
    [
        (SINGLE, "color", "red", "pink"),
        (SINGLE, "shape", "circle", "diamond"),
        (SINGLE, "size", "small", "medium"),
        (SINGLE, "position", "top left", "top"),
        (SINGLE, "background", "white", "gray"),
        (COUNTED, "count", "three", "four"),
        (RELATED, "relation", "left of", "right of"),
        (RELATED, "relation", "left of", "above"),
    ],
)
def test_checker_rejects_only_the_wrong_attribute(example, attribute, shown, stated):
    result = check(example.caption.replace(shown, stated), render(example, 64))
    assert {name for name, correct in result.items() if not correct} == {attribute, "all"}


@each_kind
def test_checker_rejects_an_extra_object(example):
    extra = replace(RED_CIRCLE, x=0.5, y=0.85)
    result = check(example.caption, render(replace(example, objects=(*example.objects, extra)), 64))
    assert not result["count"]
    assert not result["all"]


@each_kind
def test_checker_rejects_every_attribute_of_an_empty_image(example):
    result = check(example.caption, render(Scene("", (), "black"), 64))
    assert result == dict.fromkeys(check(example.caption, render(example, 64)), False)
