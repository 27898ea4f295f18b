"""Read colour, shape, size, position, count, relation and ground off a picture of shapes, without any model.

Pixels nearer to a thing's colour than to the ground make components. The area and the centre of mass of each give, for
every shape it might be, the radius and centre, and so a drawing to hold against it: the shape that fits best is it.
Both are kept by blur, and are exact to a fraction of a pixel, so pictures of 64 pixels a side can be read as well.
"""

import itertools
from dataclasses import dataclass

import numpy as np

from data.shapes import COLORS, GROUNDS, POSITIONS, RELATIONS, SHAPES, Thing, coverage, parse

ATTRIBUTES = ("color", "shape", "size", "position", "count", "relation", "ground")
SMALLEST = (
    60 / 128**2
)  # area of what is a thing, not noise: a quarter of that of the least, a small bar
LARGER = {
    "medium": 17.5 / 128,
    "large": 28 / 128,
}  # radius from which a thing has this size: else it is small
COLOR_ERROR = 60  # in RGB: colours are at least 81 from one another and from every ground
FIT = 0.6  # overlap with its best shape below which a thing has none
EDGES = (
    1,
    3,
)  # widths in pixels of the edge that shapes are drawn with for comparison: a picture may be blurred
BESIDE = (
    28 / 128
)  # distance along their axis from which two things are related: half of what is drawn


def properties(shape: str) -> tuple[float, float]:
    """Area and height of the centre of mass of a shape of radius 1."""
    cover = coverage(Thing(shape, "", 0.5, 0.5, 0.5), 256)
    y = (np.arange(256)[:, None] + 0.5) / 128 - 1
    return cover.sum() / 128**2, (cover * y).sum() / cover.sum()


PROPERTIES = {shape: properties(shape) for shape in SHAPES}


@dataclass(frozen=True)
class Found:
    """A thing found: color or shape is None if it is none of those known. Lengths are fractions of the side."""

    shape: str | None
    color: str | None
    size: str
    x: float
    y: float


@dataclass(frozen=True)
class Reading:
    """What a picture shows; ground is None if it is none of those known."""

    ground: str | None
    things: list[Found]


def neighbors(grid: np.ndarray, outside) -> list[np.ndarray]:
    """What is above, below, left and right of each place of a grid (H, W): 4 of (H, W)."""
    padded = np.pad(grid, 1, constant_values=outside)
    return [padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:]]


def components(mask: np.ndarray) -> np.ndarray:
    """Label pixels (S, S) of the mask alike where 4-neighbours join them; those outside of it get mask.size."""
    nothing = mask.size
    label, before = np.where(mask, np.arange(nothing).reshape(mask.shape), nothing), None
    while not np.array_equal(label, before):
        before = label
        least = np.minimum.reduce([label, *neighbors(label, nothing)])
        label = np.where(
            mask, np.append(least, nothing)[least], nothing
        )  # a label is a pixel: take that one's label
    return label


def nearest(color: np.ndarray, palette: dict[str, tuple[int, int, int]]) -> str | None:
    """The name of a palette's colour closest to an RGB colour (3,), None if that is far."""
    distance = np.linalg.norm(np.array(list(palette.values())) - color, axis=1)
    return list(palette)[distance.argmin()] if distance.min() < COLOR_ERROR else None


def read(picture: np.ndarray) -> Reading:
    """Read a uint8 picture (S, S, 3)."""
    side = len(picture)
    picture, edge = picture.astype(np.float64), max(1, side // 64)
    inner = np.zeros((side, side), bool)
    inner[edge:-edge, edge:-edge] = True
    ground = np.median(picture[~inner], axis=0)
    away = np.linalg.norm(picture - ground, axis=-1)
    closest = np.min(
        [np.linalg.norm(picture - color, axis=-1) for color in COLORS.values()], axis=0
    )
    label = components(closest < away)
    names, areas = np.unique(label[label < label.size], return_counts=True)
    things = [
        identify(picture, ground, away, label, name) for name in names[areas >= SMALLEST * side**2]
    ]
    return Reading(nearest(ground, GROUNDS), things)


def identify(
    picture: np.ndarray, ground: np.ndarray, away: np.ndarray, label: np.ndarray, name: int
) -> Found:
    """The thing of one component."""
    side, mask = len(picture), label == name
    color = picture[mask & (away >= np.median(away[mask]))].mean(
        axis=0
    )  # the inner half: edges are mixed with ground
    halo = 1 + side // 64  # pixels around a component that its soft edge reaches
    box = tuple(slice(max(0, i.min() - halo), i.max() + 1 + halo) for i in np.nonzero(mask))
    reach, others = mask[box], ((label != name) & (label < label.size))[box]
    for _ in range(halo):
        reach = np.logical_or.reduce([reach, *neighbors(reach, False)]) & ~others
    tint = color - ground
    # 1 in the thing, 0 on the ground; noise goes beyond both, which keeps the sums right
    alpha = (picture[box] - ground) @ tint / max(tint @ tint, 1) * reach  # (H, W)
    total = max(alpha.sum(), 1)
    pixels = (np.arange(side) + 0.5) / side
    x, y = (alpha @ pixels[box[1]]).sum() / total, (pixels[box[0]] @ alpha).sum() / total
    clipped, fits = alpha.clip(0, 1), {}
    for shape, (unit_area, unit_y) in PROPERTIES.items():
        radius = (total / unit_area) ** 0.5 / side
        thing = Thing(shape, "", x, y - unit_y * radius, radius)
        covers = [coverage(thing, side, box, edge) for edge in EDGES]
        fits[thing] = max(
            np.minimum(clipped, cover).sum() / np.maximum(clipped, cover).sum() for cover in covers
        )
    best = max(fits, key=fits.get)
    size = next((size for size in ("large", "medium") if best.radius >= LARGER[size]), "small")
    return Found(
        best.shape if fits[best] >= FIT else None,
        nearest(color, COLORS),
        size,
        float(best.x),
        float(best.y),
    )


def check(caption: str, picture: np.ndarray) -> dict[str, bool]:
    """Whether a uint8 picture (S, S, 3) shows each attribute that its caption states, the count, and "all" of them.

    Of things too many the ones most like the caption are looked at. Raises ValueError for a caption not of data.shapes.
    """
    spec, reading = parse(caption), read(picture)
    # several alike: all things must be as described; otherwise those that fit the description best
    choices = (
        [reading.things]
        if spec.count > len(spec.things)
        else itertools.permutations(reading.things, spec.count)
    )
    chosen, right = (), np.zeros((1, 2), bool)
    for things in filter(None, choices):
        match = np.array(
            [
                (thing.color == color, thing.shape == shape)
                for thing, (_, color, shape) in zip(things, itertools.cycle(spec.things))
            ]
        )
        if not chosen or match.sum() > right.sum():
            chosen, right = things, match
    result = dict(zip(("color", "shape"), right.all(axis=0).tolist()))
    if spec.things[0][0]:
        result["size"] = [thing.size for thing in chosen] == [spec.things[0][0]]
    if spec.position:
        cell = [(int(3 * thing.x), int(3 * thing.y)) for thing in chosen]
        result["position"] = cell == [POSITIONS[spec.position]]
    result["count"] = len(reading.things) == spec.count
    if spec.relation:
        axis, side = RELATIONS[spec.relation]
        result["relation"] = result["color"] and result["shape"] and related(*chosen, axis, side)
    if spec.ground:
        result["ground"] = reading.ground == spec.ground
    return result | {"all": all(result.values())}


def related(first: Found, second: Found, axis: int, side: int) -> bool:
    """Whether the first thing is on this side (-1 or 1) of the second along an axis, more than it is off it."""
    apart = (first.x - second.x, first.y - second.y)
    return side * apart[axis] >= max(BESIDE, abs(apart[1 - axis]))
