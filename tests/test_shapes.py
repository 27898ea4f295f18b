import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from conftest import ROOT

from data.shapes import (
    COLORS,
    GROUNDS,
    POSITIONS,
    RELATIONS,
    SHAPES,
    SIZES,
    Scene,
    Thing,
    draw,
    held_out,
    parse,
    scene,
)
from tools.shapes_checker import check

RED = Thing("circle", "red", 0.2, 0.2, 0.11)
CORNER = Scene("a small red circle at the top left on a white background", (RED,), "white")
PAIR = Scene(
    "a red circle left of a blue bar", (RED, Thing("bar", "blue", 0.7, 0.25, 0.17)), "white"
)
THREE = Scene(
    "three red circles",
    tuple(Thing("circle", "red", x, 0.5, 0.11) for x in (0.2, 0.5, 0.8)),
    "white",
)


def samples(order) -> str:
    return repr(sorted((i, s := scene(3, i), draw(s, 16).tobytes()) for i in order))


def test_scenes_depend_on_neither_process_nor_order():
    env = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "PYTHONHASHSEED": "77"}
    code = "import test_shapes; print(test_shapes.samples([7, 2, 900]), end='')"
    assert subprocess.check_output([sys.executable, "-c", code], env=env, text=True) == samples(
        [2, 7, 900]
    )


@pytest.mark.parametrize("unseen", [False, True])
def test_captions_say_what_is_there_and_held_out_pairs_stay_apart(unseen):
    stated = set()
    for made in (scene(1, i, unseen) for i in range(600)):
        spec, a, b = parse(made.caption), made.things[0], made.things[-1]
        assert [*dict.fromkeys((t.color, t.shape) for t in made.things)] == [
            thing[1:] for thing in spec.things
        ]
        assert len(made.things) == spec.count and all(
            held_out(t.color, t.shape) == unseen for t in made.things
        )
        size, x, y = spec.things[0][0], a.x - b.x, a.y - b.y
        assert spec.ground in (None, made.ground) and (
            not size or abs(a.radius / SIZES[size] - 1) <= 0.06
        )
        assert not spec.position or (int(3 * a.x), int(3 * a.y)) == POSITIONS[spec.position]
        assert {None: 1, "left of": -x, "right of": x, "above": -y, "below": y}[spec.relation] > 0.4
        stated |= {spec.count, spec.position, spec.relation, spec.ground, size, made.caption[0]}
    assert stated >= {1, 2, 3, 4, None, *POSITIONS, *RELATIONS, *GROUNDS, *SIZES, *"aA"}
    out = np.array([[held_out(color, shape) for shape in SHAPES] for color in COLORS])
    assert out.sum() == 8 and max(*out.sum(axis=0), *out.sum(axis=1)) <= 2


def test_captions_that_no_scene_has_are_refused():
    assert parse("  An Image of an orange ring ABOVE a red cross. ").things[0] == (
        None,
        "orange",
        "ring",
    )
    for wrong in (
        "",
        "a photo of",
        "a red circle",
        "a small red star",
        "two red crosss",
        "five red bars",
        "a orange ring above a red bar",
        "a large red bar at the top",
        "a small red bar on a red background",
    ):
        with pytest.raises(ValueError, match=f"^caption '{wrong}' is not one of.*background'$"):
            parse(wrong)


@pytest.mark.parametrize("side, n", [(64, 200), (128, 100)])
def test_checker_reads_what_was_drawn_and_nothing_else(side, n):
    captions, pictures = zip(
        *[(s.caption, draw(s, side)) for i in range(n) if (s := scene(2, i, i % 4 == 0))]
    )
    assert np.mean([check(c, p)["all"] for c, p in zip(captions, pictures)]) >= 0.99
    others = [check(c, p) for c, p in zip(captions, pictures[1:] + pictures[:1])]
    for keys, limit in {
        "all": 0.02,
        "relation": 0.1,
        "color shape position": 0.25,
        "size count ground": 0.55,
    }.items():
        assert all(np.mean([o[key] for o in others if key in o]) < limit for key in keys.split())
    assert not check("a blue circle left of a red bar", draw(PAIR, side))[
        "all"
    ]  # right words, wrong pairs
    triangle = draw(Scene("", (Thing("triangle", "red", 0.5, 0.5, 0.25),), "black"), side)[..., 0]
    assert (
        15 < triangle[side // 3].mean() < triangle[side * 2 // 3].mean()
        and len(np.unique(triangle)) > 3
    )  # smooth


@pytest.mark.parametrize(
    "made, attribute, old, new",
    [
        (CORNER, "color", "red", "pink"),
        (CORNER, "shape", "circle", "diamond"),
        (CORNER, "size", "small", "medium"),
        (CORNER, "position", "top left", "top"),
        (CORNER, "ground", "white", "gray"),
        (THREE, "count", "three", "four"),
        (PAIR, "relation", "left of", "right of"),
        (PAIR, "relation", "left of", "above"),
    ],
)
def test_checker_fails_what_is_wrong_alone(made, attribute, old, new):
    right, wrong = (
        check(made.caption, draw(made, 64)),
        check(made.caption.replace(old, new), draw(made, 64)),
    )
    assert all(right.values()) and {key for key, value in wrong.items() if not value} == {
        attribute,
        "all",
    }
    extra = check(
        made.caption, draw(Scene("", (*made.things, replace(RED, x=0.5, y=0.85)), "white"), 64)
    )
    assert not extra["count"] | extra["all"]
    assert check(made.caption, draw(Scene("", (), "black"), 64)) == dict.fromkeys(right, False)
