"""Pictures of coloured shapes with captions: made as needed, in any number and at any resolution, from numpy alone.

A caption states colour, shape and, by its kind, size, position, count or a relation of two things:

    a photo of a small red circle at the top left on a white background
    three blue crosses
    An orange ring left of a green bar on a gray background

Scene i of a seed is a pure function of (seed, i). Some pairs of colour and shape never occur in training, so that the
pictures of their captions show whether a model has learned the words or the pairs. `tools.shapes_checker` reads a
picture back. Lengths are fractions of the side; x points right and y down from the top left corner.
"""

import hashlib
import itertools
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

COLORS = {
    "red": (214, 39, 40),
    "green": (44, 160, 44),
    "blue": (31, 90, 200),
    "yellow": (245, 210, 40),
    "purple": (140, 60, 180),
    "orange": (245, 130, 25),
    "cyan": (40, 200, 220),
    "pink": (245, 130, 190),
}
GROUNDS = {"white": (250, 250, 250), "black": (15, 15, 15), "gray": (128, 128, 128)}
SHAPES = {  # signed distance of (x, y) from the outline, negative inside; each shape just fits into [-1, 1] x [-1, 1]
    "circle": lambda x, y: np.hypot(x, y) - 1,
    "square": lambda x, y: np.maximum(abs(x), abs(y)) - 1,
    "triangle": lambda x, y: np.maximum(y - 1, (2 * abs(x) - y - 1) / 5**0.5),
    "diamond": lambda x, y: (abs(x) + abs(y) - 1) / 2**0.5,
    "cross": lambda x, y: np.maximum(
        np.minimum(abs(x), abs(y)) - 1 / 3, np.maximum(abs(x), abs(y)) - 1
    ),
    "ring": lambda x, y: abs(np.hypot(x, y) - 0.775) - 0.225,
    "bar": lambda x, y: np.maximum(abs(x) - 1, abs(y) - 0.36),
}
SIZES = {
    "small": 14 / 128,
    "medium": 22 / 128,
    "large": 36 / 128,
}  # radius: half the side of the square it fits into
POSITIONS = {
    f"{row} {column}".strip() or "center": (i, j)
    for j, row in enumerate(("top", "", "bottom"))
    for i, column in enumerate(("left", "", "right"))
}  # column and row of the 3 x 3 cells
COUNTS = {"two": 2, "three": 3, "four": 4}
RELATIONS = {
    "left of": (0, -1),
    "right of": (0, 1),
    "above": (1, -1),
    "below": (1, 1),
}  # axis, side of the first thing
PREFIXES = ("", "a photo of ", "a drawing of ", "an image of ")

JITTER = 0.06  # of a radius: sizes stay far apart
MARGIN = (
    3 / 128
)  # around a thing, to the border and to its cell's edge: at 64 pixels neighbours still lie 3 apart
INSIDE = 4 / 128  # that a stated position's centre is from its cell's edge at least
APART, ASIDE = (
    56 / 128,
    12 / 128,
)  # distance of two related centres: along their axis at least, across it at most


@dataclass(frozen=True)
class Thing:
    """One shape with its centre and radius."""

    shape: str
    color: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Scene:
    """A caption and what there is to be seen."""

    caption: str
    things: tuple[Thing, ...]
    ground: str


@dataclass(frozen=True)
class Spec:
    """What a caption states. `things` has (size, color, shape) of each thing named: of several alike, once."""

    things: tuple[tuple[str | None, str, str], ...]
    count: int = 1
    position: str | None = None
    relation: str | None = None
    ground: str | None = None


# -------------------------------------------------------------------------------------------------------- captions
def held_out(color: str, shape: str) -> bool:
    """Whether training never shows this pair: 8 of the 56, at most 2 of a colour or a shape."""
    return hashlib.sha256(f"0 {color} {shape}".encode()).digest()[0] % 7 == 0


def body(spec: Spec) -> str:
    """The caption of a Spec without prefix and ground."""
    nouns = [" ".join(filter(None, thing)) for thing in spec.things]
    if spec.count > len(nouns):
        word = next(name for name, count in COUNTS.items() if count == spec.count)
        return f"{word} {nouns[0]}{'es' if nouns[0].endswith('s') else 's'}"
    phrases = [f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}" for noun in nouns]
    place = f" at the {spec.position}" if spec.position else ""
    return f" {spec.relation} ".join(phrases) + place


@lru_cache(maxsize=1)
def specs() -> dict[str, Spec]:
    """Every body there is, 12,320, with its Spec: parsing looks up what captions are made from."""
    kinds = list(itertools.product(COLORS, SHAPES))
    singles = [
        Spec(((size, *kind),), position=position)
        for kind in kinds
        for size in SIZES
        for position in (None, *POSITIONS)
        if size != "large" or not position
    ]
    counts = [Spec(((None, *kind),), count) for kind in kinds for count in COUNTS.values()]
    relations = [
        Spec(((None, *a), (None, *b)), 2, relation=relation)
        for a in kinds
        for b in kinds
        if a[0] != b[0]
        for relation in RELATIONS
    ]
    return {body(spec): spec for spec in singles + counts + relations}


def parse(caption: str) -> Spec:
    """What a caption states; case, surrounding blanks and a final dot do not matter. Raises ValueError."""
    text = caption.strip().removesuffix(".").rstrip().lower()
    text = text.removeprefix(next((p for p in PREFIXES if p and text.startswith(p)), ""))
    ground = next((g for g in GROUNDS if text.endswith(f" on a {g} background")), None)
    spec = specs().get(text.removesuffix(f" on a {ground} background") if ground else text)
    if spec is None:
        raise ValueError(
            f"caption {caption!r} is not one of data.shapes, such as 'two red bars on a gray background'"
        )
    return replace(spec, ground=ground)


# ---------------------------------------------------------------------------------------------------------- scenes
def scene(seed: int, index: int, unseen: bool = False) -> Scene:
    """Scene `index` of a seed. Each of its pairs of colour and shape is held out if unseen, and none if not."""
    rng = np.random.default_rng((seed, index))
    spec = choose(rng, unseen)
    caption = (
        pick(rng, PREFIXES)
        + body(spec)
        + (f" on a {spec.ground} background" if spec.ground else "")
    )
    if rng.random() < 0.25:
        caption = caption[0].upper() + caption[1:]
    return Scene(caption, place(spec, rng), spec.ground or pick(rng, tuple(GROUNDS)))


def pick(rng: np.random.Generator, options):
    return options[rng.integers(len(options))]


@lru_cache(maxsize=2)
def pairs(unseen: bool) -> list[tuple[str, str]]:
    return [pair for pair in itertools.product(COLORS, SHAPES) if held_out(*pair) == unseen]


def choose(rng: np.random.Generator, unseen: bool) -> Spec:
    """A Spec at random: its kind first, so that the many captions with a relation are not nearly all."""
    kind, pair = pick(rng, ("plain", "position", "count", "relation")), pick(rng, pairs(unseen))
    ground = pick(rng, (None, *GROUNDS))
    if kind == "plain":
        return Spec(((pick(rng, tuple(SIZES)), *pair),), ground=ground)
    if kind == "position":
        return Spec(
            ((pick(rng, ("small", "medium")), *pair),),
            position=pick(rng, tuple(POSITIONS)),
            ground=ground,
        )
    if kind == "count":
        return Spec(((None, *pair),), pick(rng, tuple(COUNTS.values())), ground=ground)
    other = pick(rng, [p for p in pairs(unseen) if p[0] != pair[0]])
    return Spec(
        ((None, *pair), (None, *other)), 2, relation=pick(rng, tuple(RELATIONS)), ground=ground
    )


def place(spec: Spec, rng: np.random.Generator) -> tuple[Thing, ...]:
    """Things as a Spec states them, at random where it leaves a choice; none touches another or the border."""
    size = spec.things[0][0] or ("medium" if spec.relation else "small")
    radii = SIZES[size] * rng.uniform(1 - JITTER, 1 + JITTER, spec.count)
    room = radii[:, None] + MARGIN  # (N, 1)
    if spec.relation:
        axis, side = RELATIONS[spec.relation]
        low, high = room.max(), 1 - room.max()
        along = rng.uniform(low, high - APART)
        along = np.array([along, rng.uniform(along + APART, high)])[::-side]
        across = rng.uniform(low, high)
        across = np.array([across, np.clip(across + rng.uniform(-ASIDE, ASIDE), low, high)])
        centers = np.stack((across, along) if axis else (along, across), axis=1)  # (2, 2)
    else:
        low, high = room, 1 - room
        if spec.position:
            cell = np.array([POSITIONS[spec.position]]) / 3
            low, high = np.maximum(low, cell + INSIDE), np.minimum(high, cell + 1 / 3 - INSIDE)
        elif spec.count > 1:
            cells = rng.permutation(list(POSITIONS.values()))[: spec.count] / 3
            low, high = cells + room, cells + 1 / 3 - room
        centers = rng.uniform(low, high, (spec.count, 2))
    named = spec.things * (spec.count // len(spec.things))
    return tuple(
        Thing(shape, color, float(x), float(y), float(radius))
        for (_, color, shape), (x, y), radius in zip(named, centers, radii)
    )


# -------------------------------------------------------------------------------------------------------- pictures
def coverage(
    thing: Thing, side: int, box: tuple[slice, slice] = np.s_[:, :], edge: float = 1
) -> np.ndarray:
    """The share of each pixel that a thing covers, in the box of rows and columns: (H, W) in [0, 1].

    It falls from 1 to 0 over so many pixels of edge; 1 is exact where the outline runs along a row or column.
    """
    pixels = (np.arange(side) + 0.5) / side
    x, y = (
        (pixels[box[1]] - thing.x) / thing.radius,
        (pixels[box[0]][:, None] - thing.y) / thing.radius,
    )
    return np.clip(0.5 - SHAPES[thing.shape](x, y) * (thing.radius * side / edge), 0, 1)


def draw(scene: Scene, size: int) -> np.ndarray:
    """The picture of a scene: uint8 (size, size, 3)."""
    picture = np.full((size, size, 3), GROUNDS[scene.ground], np.float64)
    for thing in scene.things:
        picture += coverage(thing, size)[..., None] * (np.array(COLORS[thing.color]) - picture)
    return np.rint(picture).astype(np.uint8)
