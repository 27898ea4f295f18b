"""Synthetic images of colored shapes with captions, rendered on demand at any resolution.

A caption states color and shape and, depending on its kind, size, position, count, or the relation
between two objects:

    a photo of a small red circle at the top left on a white background
    three blue crosses
    An orange ring left of a green bar on a gray background

Scene i of a seed is a pure function of (seed, i). Some color-shape pairs never occur in training;
images generated for those captions show whether a model composes attributes or memorizes pairs.
`tools.shapes_checker` reads the attributes back from an image. Lengths are fractions of the image
side; x points right and y points down from the top-left corner.
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
BACKGROUNDS = {"white": (250, 250, 250), "black": (15, 15, 15), "gray": (128, 128, 128)}
# Signed distance of (x, y) from the outline, negative inside; each shape just fits [-1, 1]^2.
SHAPES = {
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
SIZES = {"small": 14 / 128, "medium": 22 / 128, "large": 36 / 128}  # radius of an object
POSITIONS = {  # column and row of a cell in the 3 x 3 grid
    "top left": (0, 0),
    "top": (1, 0),
    "top right": (2, 0),
    "left": (0, 1),
    "center": (1, 1),
    "right": (2, 1),
    "bottom left": (0, 2),
    "bottom": (1, 2),
    "bottom right": (2, 2),
}
COUNTS = {"two": 2, "three": 3, "four": 4}
RELATIONS = {  # axis, and on which side of the second object the first one lies
    "left of": (0, -1),
    "right of": (0, 1),
    "above": (1, -1),
    "below": (1, 1),
}
PREFIXES = ("", "a photo of ", "a drawing of ", "an image of ")
SUFFIXES = {name: f" on a {name} background" for name in BACKGROUNDS} | {None: ""}

JITTER = 0.06  # relative change of a radius at most; the three sizes stay far apart
# Space from an object to the border and to the edge of its cell: at 64 pixels, neighboring objects
# are still 3 pixels apart.
MARGIN = 3 / 128
CELL_INSET = 4 / 128  # minimum distance of a center from the edge of the cell that a caption states
MIN_ALONG = 56 / 128  # minimum distance of two related centers along their axis
MAX_ACROSS = 12 / 128  # maximum distance of two related centers across it


@dataclass(frozen=True)
class Object:
    """A shape with its center and radius (half the side of its bounding square)."""

    shape: str
    color: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Scene:
    """A caption with the objects and the background that it describes."""

    caption: str
    objects: tuple[Object, ...]
    background: str


@dataclass(frozen=True)
class Spec:
    """The statements of a caption: `objects` has one (size, color, shape) per noun phrase."""

    objects: tuple[tuple[str | None, str, str], ...]
    count: int = 1
    position: str | None = None
    relation: str | None = None
    background: str | None = None


# ---- captions
def held_out(color: str, shape: str) -> bool:
    """Whether training never shows this pair: 8 of the 56, at most 2 per color and per shape."""
    return hashlib.sha256(f"0 {color} {shape}".encode()).digest()[0] % 7 == 0


def core_caption(spec: Spec) -> str:
    """The caption of a Spec without prefix and suffix."""
    nouns = [" ".join(filter(None, described)) for described in spec.objects]
    if spec.count > len(nouns):
        number = next(name for name, count in COUNTS.items() if count == spec.count)
        return f"{number} {nouns[0]}{'es' if nouns[0].endswith('s') else 's'}"
    phrases = [f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}" for noun in nouns]
    position = f" at the {spec.position}" if spec.position else ""
    return f" {spec.relation} ".join(phrases) + position


@lru_cache(maxsize=1)
def core_captions() -> dict[str, Spec]:
    """All 12,320 core captions with their Specs. `parse` looks captions up in this table."""
    pairs = list(itertools.product(COLORS, SHAPES))
    singles = [
        Spec(((size, *pair),), position=position)
        for pair in pairs
        for size in SIZES
        for position in (None, *POSITIONS)
        if size != "large" or not position  # a large object does not fit into a cell
    ]
    counts = [Spec(((None, *pair),), count) for pair in pairs for count in COUNTS.values()]
    relations = [
        Spec(((None, *first), (None, *second)), 2, relation=relation)
        for first in pairs
        for second in pairs
        if first[0] != second[0]
        for relation in RELATIONS
    ]
    return {core_caption(spec): spec for spec in singles + counts + relations}


def parse(caption: str) -> Spec:
    """The statements of a caption, ignoring case, surrounding whitespace and a final period.

    Raises ValueError for a caption that no scene can have.
    """
    text = caption.strip().removesuffix(".").rstrip().lower()
    text = text.removeprefix(next((p for p in PREFIXES if p and text.startswith(p)), ""))
    background = next(name for name, suffix in SUFFIXES.items() if text.endswith(suffix))
    spec = core_captions().get(text.removesuffix(SUFFIXES[background]))
    if spec is None:
        raise ValueError(
            f"caption {caption!r} does not describe a shapes scene; "
            "write one such as 'two red bars on a gray background'"
        )
    return replace(spec, background=background)


# ---- scenes
def scene(seed: int, index: int, unseen: bool = False) -> Scene:
    """Scene `index` of a seed, with only held-out color-shape pairs if `unseen`, else with none."""
    rng = np.random.default_rng((seed, index))
    spec = sample_spec(rng, unseen)
    caption = choose(rng, PREFIXES) + core_caption(spec) + SUFFIXES[spec.background]
    if rng.random() < 0.25:
        caption = caption[0].upper() + caption[1:]
    return Scene(
        caption, place_objects(spec, rng), spec.background or choose(rng, tuple(BACKGROUNDS))
    )


def choose(rng: np.random.Generator, options):
    return options[rng.integers(len(options))]


@lru_cache(maxsize=2)
def color_shape_pairs(unseen: bool) -> list[tuple[str, str]]:
    return [pair for pair in itertools.product(COLORS, SHAPES) if held_out(*pair) == unseen]


def sample_spec(rng: np.random.Generator, unseen: bool) -> Spec:
    """A random Spec. Its kind is chosen first, since most of the 12,320 captions are relations."""
    kind = choose(rng, ("plain", "position", "count", "relation"))
    pair = choose(rng, color_shape_pairs(unseen))
    background = choose(rng, (None, *BACKGROUNDS))
    if kind == "plain":
        return Spec(((choose(rng, tuple(SIZES)), *pair),), background=background)
    if kind == "position":
        described = (choose(rng, ("small", "medium")), *pair)  # a large object does not fit
        return Spec((described,), position=choose(rng, tuple(POSITIONS)), background=background)
    if kind == "count":
        return Spec(((None, *pair),), choose(rng, tuple(COUNTS.values())), background=background)
    other = choose(rng, [p for p in color_shape_pairs(unseen) if p[0] != pair[0]])
    relation = choose(rng, tuple(RELATIONS))
    return Spec(((None, *pair), (None, *other)), 2, relation=relation, background=background)


def place_objects(spec: Spec, rng: np.random.Generator) -> tuple[Object, ...]:
    """Objects as a Spec states them, random otherwise; none touches another or the border."""
    size = spec.objects[0][0] or ("medium" if spec.relation else "small")
    radii = SIZES[size] * rng.uniform(1 - JITTER, 1 + JITTER, spec.count)  # (N,)
    room = radii[:, None] + MARGIN  # (N, 1)
    if spec.relation:
        axis, side = RELATIONS[spec.relation]
        low, high = room.max(), 1 - room.max()
        along = rng.uniform(low, high - MIN_ALONG)
        along = np.array([along, rng.uniform(along + MIN_ALONG, high)])[::-side]  # (2,)
        across = rng.uniform(low, high)
        other = np.clip(across + rng.uniform(-MAX_ACROSS, MAX_ACROSS), low, high)
        across = np.array([across, other])  # (2,)
        centers = np.stack((across, along) if axis else (along, across), axis=1)  # (2, 2)
    else:
        low, high = room, 1 - room
        if spec.position:
            cell = np.array([POSITIONS[spec.position]]) / 3  # (1, 2)
            low = np.maximum(low, cell + CELL_INSET)  # (1, 2)
            high = np.minimum(high, cell + 1 / 3 - CELL_INSET)  # (1, 2)
        elif spec.count > 1:
            cells = rng.permutation(list(POSITIONS.values()))[: spec.count] / 3  # (N, 2)
            low, high = cells + room, cells + 1 / 3 - room  # (N, 2) each
        centers = rng.uniform(low, high, (spec.count, 2))  # (N, 2)
    described = spec.objects * (spec.count // len(spec.objects))
    return tuple(
        Object(shape, color, float(x), float(y), float(radius))
        for (_, color, shape), (x, y), radius in zip(described, centers, radii, strict=True)
    )


# ---- rendering
def coverage(
    obj: Object, side: int, box: tuple[slice, slice] = np.s_[:, :], edge: float = 1
) -> np.ndarray:
    """The fraction of each pixel that an object covers: (H, W) in [0, 1].

    Args:
        side: Side of the image in pixels.
        box: Rows and columns of the image to return; all by default.
        edge: Width in pixels of the edge, over which coverage falls from 1 to 0. With 1, coverage
            is exact where the outline runs along a row or column.
    """
    pixels = (np.arange(side) + 0.5) / side  # (S,)
    x = (pixels[box[1]] - obj.x) / obj.radius  # (W,)
    y = (pixels[box[0]][:, None] - obj.y) / obj.radius  # (H, 1)
    return np.clip(0.5 - SHAPES[obj.shape](x, y) * (obj.radius * side / edge), 0, 1)  # (H, W)


def render(scene: Scene, size: int) -> np.ndarray:
    """The image of a scene: uint8 (size, size, 3)."""
    image = np.full((size, size, 3), BACKGROUNDS[scene.background], np.float64)
    for obj in scene.objects:
        image += coverage(obj, size)[..., None] * (np.array(COLORS[obj.color]) - image)
    return np.rint(image).astype(np.uint8)
