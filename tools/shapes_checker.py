"""Read color, shape, size, position, count, relation and background off a shapes image.

No learned model is involved. Pixels closer to the color of an object than to the background form
connected components. For each candidate shape, the area and the center of mass of a component give
a radius and a center; the shape whose rendering overlaps the component best is chosen. Blur
preserves area and center of mass, and both are accurate to a fraction of a pixel, so images with
64 pixels a side can be read as well.
"""

import itertools
import math

import numpy as np

from data.shapes import BACKGROUNDS, COLORS, POSITIONS, RELATIONS, SHAPES, Object, coverage, parse

# A smaller component is noise. This is a quarter of the smallest object, a small bar.
MIN_AREA = 60 / 128**2
RADIUS_RANGES = {  # an object has a size if its radius lies in this range
    "small": (0, 17.5 / 128),
    "medium": (17.5 / 128, 28 / 128),
    "large": (28 / 128, math.inf),
}
MAX_COLOR_DISTANCE = 60  # in RGB; colors differ by at least 81 from each other and the backgrounds
MIN_OVERLAP = 0.6  # intersection over union with the best shape; below, the shape is unknown
# Edge widths in pixels: candidate shapes are rendered sharp and soft, as images may be blurred.
EDGE_WIDTHS = (1, 3)
MIN_SEPARATION = 28 / 128  # of related objects along their axis; half of what scenes have
UNKNOWN = ""  # name of a color or shape that is none of those in data.shapes


def moments(shape: str) -> tuple[float, float]:
    """Area and y of the center of mass of a shape with radius 1."""
    cover = coverage(Object(shape, UNKNOWN, 0.5, 0.5, 0.5), 256)  # (256, 256)
    y = (np.arange(256)[:, None] + 0.5) / 128 - 1  # (256, 1)
    return cover.sum() / 128**2, (cover * y).sum() / cover.sum()


MOMENTS = {shape: moments(shape) for shape in SHAPES}


def neighbors(grid: np.ndarray, outside) -> list[np.ndarray]:
    """The values above, below, left and right of each cell of a grid (H, W): 4 arrays (H, W)."""
    padded = np.pad(grid, 1, constant_values=outside)  # (H + 2, W + 2)
    return [padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:]]


def components(mask: np.ndarray) -> np.ndarray:
    """A label for each pixel of a mask (S, S), equal for 4-connected pixels; mask.size outside."""
    outside = mask.size
    labels = np.where(mask, np.arange(outside).reshape(mask.shape), outside)  # (S, S)
    while True:
        lowest = np.minimum.reduce([labels, *neighbors(labels, outside)])
        # A label is the index of a pixel, so taking over the label of that pixel jumps ahead.
        updated = np.where(mask, np.append(lowest, outside)[lowest], outside)
        if np.array_equal(updated, labels):
            return labels
        labels = updated


def nearest_color(color: np.ndarray, palette: dict[str, tuple[int, int, int]]) -> str:
    """The name of the palette color closest to an RGB color (3,), UNKNOWN if none is close."""
    distances = np.linalg.norm(np.array(list(palette.values())) - color, axis=1)  # (N,)
    return list(palette)[distances.argmin()] if distances.min() < MAX_COLOR_DISTANCE else UNKNOWN


def detect(image: np.ndarray) -> tuple[str, list[Object]]:
    """The name of the background and the objects of a uint8 image (S, S, 3).

    Background, color and shape are UNKNOWN where they match none of data.shapes.
    """
    side = len(image)
    border = max(1, side // 64)
    image = image.astype(np.float64)
    inner = np.pad(np.ones((side - 2 * border,) * 2, bool), border)  # (S, S)
    background = np.median(image[~inner], axis=0)  # (3,)
    contrast = np.linalg.norm(image - background, axis=-1)  # (S, S)
    distances = [np.linalg.norm(image - color, axis=-1) for color in COLORS.values()]
    labels = components(np.min(distances, axis=0) < contrast)
    names, areas = np.unique(labels[labels < labels.size], return_counts=True)
    objects = [
        identify(image, background, contrast, labels, label)
        for label in names[areas >= MIN_AREA * side**2]
    ]
    return nearest_color(background, BACKGROUNDS), objects


def identify(
    image: np.ndarray, background: np.ndarray, contrast: np.ndarray, labels: np.ndarray, label: int
) -> Object:
    """The object of one component; arguments as computed by `detect`."""
    side = len(image)
    mask = labels == label  # (S, S)
    # The half with the higher contrast: edges are mixed with the background.
    color = image[mask & (contrast >= np.median(contrast[mask]))].mean(axis=0)  # (3,)
    halo = 1 + side // 64  # pixels around a component that its soft edge reaches
    box = tuple(slice(max(0, i.min() - halo), i.max() + 1 + halo) for i in np.nonzero(mask))
    free = (mask | (labels == labels.size))[box]  # (H, W), not part of another component
    reach = mask[box]  # (H, W)
    for _ in range(halo):
        reach = np.logical_or.reduce([reach, *neighbors(reach, False)]) & free
    tint = color - background
    # 1 in the object and 0 on the background. Noise exceeds both bounds, which keeps sums unbiased.
    alpha = (image[box] - background) @ tint / max(tint @ tint, 1) * reach  # (H, W)
    total = max(alpha.sum(), 1)
    pixels = (np.arange(side) + 0.5) / side
    x = (alpha @ pixels[box[1]]).sum() / total
    y = (pixels[box[0]] @ alpha).sum() / total
    alpha = alpha.clip(0, 1)
    overlaps = {}
    for shape, (unit_area, unit_y) in MOMENTS.items():
        radius = (total / unit_area) ** 0.5 / side
        candidate = Object(shape, UNKNOWN, x, y - unit_y * radius, radius)
        covers = [coverage(candidate, side, box, edge) for edge in EDGE_WIDTHS]  # 2 of (H, W)
        overlaps[candidate] = max(
            np.minimum(alpha, cover).sum() / np.maximum(alpha, cover).sum() for cover in covers
        )
    best = max(overlaps, key=overlaps.get)
    shape = best.shape if overlaps[best] >= MIN_OVERLAP else UNKNOWN
    color_name = nearest_color(color, COLORS)
    return Object(shape, color_name, float(best.x), float(best.y), float(best.radius))


def check(caption: str, image: np.ndarray) -> dict[str, bool]:
    """Whether a uint8 image (S, S, 3) shows each attribute that its caption states.

    The keys are the stated ones of color, shape, size, position, relation and background, and
    always "count" and "all". If the image has too many objects, those most like the caption are
    compared. Raises ValueError if data.shapes cannot make the caption.
    """
    spec = parse(caption)
    background, objects = detect(image)
    if spec.count > len(spec.objects):  # several of a kind: all objects must match the description
        candidates = [objects]
    else:
        candidates = itertools.permutations(objects, spec.count)
    chosen, correct = (), np.zeros((1, 2), bool)
    for candidate in filter(None, candidates):
        pairs = zip(candidate, itertools.cycle(spec.objects))
        matches = [(obj.color == color, obj.shape == shape) for obj, (_, color, shape) in pairs]
        if not chosen or np.sum(matches) > correct.sum():
            chosen, correct = candidate, np.array(matches)  # (N, 2)
    result = dict(zip(("color", "shape"), correct.all(axis=0).tolist(), strict=True))
    if spec.objects[0][0]:
        low, high = RADIUS_RANGES[spec.objects[0][0]]
        result["size"] = [low <= obj.radius < high for obj in chosen] == [True]
    if spec.position:
        cells = [(int(3 * obj.x), int(3 * obj.y)) for obj in chosen]
        result["position"] = cells == [POSITIONS[spec.position]]
    result["count"] = len(objects) == spec.count
    if spec.relation:
        axis, side = RELATIONS[spec.relation]
        result["relation"] = result["color"] and result["shape"] and related(*chosen, axis, side)
    if spec.background:
        result["background"] = background == spec.background
    return result | {"all": all(result.values())}


def related(first: Object, second: Object, axis: int, side: int) -> bool:
    """Whether the first object is on this side (-1 or 1) of the second along an axis.

    The distance along the axis must not be less than the distance across it.
    """
    offset = (first.x - second.x, first.y - second.y)
    return side * offset[axis] >= max(MIN_SEPARATION, abs(offset[1 - axis]))
