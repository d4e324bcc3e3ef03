"""Pictures of correspondence: matches between two views, and the main directions of features as colours.

Shapes: T views, H W pixels, h x w cells, d width of a state.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from eval.correspondence_run import Watched
from eval.correspondence_scores import DISTANCES, Key, Scored
from eval.sources import evenly
from g2vlm.preview import GAP, INK, LABEL_WIDTH, MARGIN, MUTED, PAGE, WIDTH, font, grid, sideways, stack
from geometry.correspondence import cell_coordinates
from geometry.io.common import atomic_file

RIGHT, WRONG = (22, 163, 74), (220, 38, 38)
FINE = 2
PAIRS = 2
MAX_LAYERS, MAX_VIEWS = 6, 8


def write_matches(scored: Scored, watched: Watched, shown: Mapping[str, Key], path: Path) -> None:
    """Matches of a few layers between the first view and the two others that share most points with it.

    Args:
        scored: the clip's matches.
        watched: its views.
        shown: what to draw, by its name; a row each.
        path: of the PNG.
    """
    shared = scored.visible.sum(-1)
    others = np.argsort(-shared, kind="stable")[: min(PAIRS, len(shared))]
    panels = [_heading(f"{scored.clip}: first view and two others, points that both show", _match_key())]
    panels += [_match_row(name, key, scored, watched, others) for name, key in shown.items()]
    _save(stack(panels), path)


def _heading(text: str, key: Image.Image | None = None) -> Image.Image:
    panel = Image.new("RGB", (WIDTH - 2 * MARGIN, 34), PAGE)
    ImageDraw.Draw(panel).text((0, 0), text, INK, font(24))
    if key is not None:
        panel.paste(key, (panel.width - key.width, 4))
    return panel


def _match_key() -> Image.Image:
    """What the colours mean."""
    panel = Image.new("RGB", (620, 26), PAGE)
    draw = ImageDraw.Draw(panel)
    for left, colour, text in ((0, RIGHT, f"within {DISTANCES[0]} cells"), (190, WRONG, "not")):
        draw.ellipse((left, 6, left + 12, 18), colour)
        draw.text((left + 20, 12), text, MUTED, font(16), anchor="lm")
    draw.ellipse((270, 6, 282, 18), outline=WRONG, width=2)
    draw.text((290, 12), "where a wrong one should have been", MUTED, font(16), anchor="lm")
    return panel


def _match_row(name: str, key: Key, scored: Scored, watched: Watched, others: np.ndarray) -> Image.Image:
    side = (WIDTH - 2 * MARGIN - LABEL_WIDTH - (2 * PAIRS - 1) * GAP) // (2 * PAIRS)
    height = round(side * watched.sample.size[0] / watched.sample.size[1])
    panel = Image.new("RGB", (WIDTH - 2 * MARGIN, height), PAGE)
    panel.paste(sideways(name, height), (0, 0))
    for place, other in enumerate(others):
        picture = _pair(key, scored, watched, int(other), (height, side))
        panel.paste(picture, (LABEL_WIDTH + place * 2 * (side + GAP), 0))
    return panel


def _pair(key: Key, scored: Scored, watched: Watched, other: int, size: tuple[int, int]) -> Image.Image:
    """The first view and another, `size` each, a line for every point that both show."""
    height, width = size
    page = Image.new("RGB", (FINE * (2 * width + GAP), FINE * height), PAGE)
    for left, view in ((0, 0), (FINE * (width + GAP), other + 1)):
        pixels = Image.fromarray(watched.sample.images[view].permute(1, 2, 0).numpy())
        page.paste(pixels.resize((FINE * width, FINE * height), Image.Resampling.BICUBIC), (left, 0))
    draw = ImageDraw.Draw(page)
    points = watched.points
    starts = _on_page(cell_coordinates(points.queries, points.size, scored.grid).numpy(), scored.grid, size, 0)
    truth = _on_page(cell_coordinates(points.places[other], points.size, scored.grid).numpy(), scored.grid, size, 1)
    ends = _on_page(scored.matches[key].cells[other].numpy(), scored.grid, size, 1)
    right = scored.correct[key][DISTANCES[0]][other]
    for i in np.nonzero(scored.visible[other])[0]:
        colour = RIGHT if right[i] else WRONG
        draw.line((*starts[i], *ends[i]), colour, FINE)
        for x, y in (starts[i], ends[i]):
            draw.ellipse(_around(x, y, 4), colour)
        if not right[i]:
            draw.ellipse(_around(truth[i, 0], truth[i, 1], 5), outline=WRONG, width=FINE)
    return page.resize((2 * width + GAP, height), Image.Resampling.BOX)


def _on_page(cells: np.ndarray, cell_grid: tuple[int, int], size: tuple[int, int], place: int) -> np.ndarray:
    """Cell coordinates (P, 2) as pixels of the fine page, in its first or second view."""
    shares = (cells + 0.5) / (cell_grid[1], cell_grid[0])
    return FINE * (shares * (size[1], size[0]) + (place * (size[1] + GAP), 0))


def _around(x: float, y: float, radius: float) -> tuple[float, float, float, float]:
    return x - FINE * radius, y - FINE * radius, x + FINE * radius, y + FINE * radius


# ---------------------------------------------------------------------------------------------- features


def write_features(clip: str, watched: Watched, path: Path) -> None:
    """Principal components of layers' features over all views of a clip, as red, green and blue; a row per layer."""
    views = range(min(MAX_VIEWS, watched.sample.num_views))
    images = watched.sample.images.permute(0, 2, 3, 1).numpy()
    layers = {f"layer {layer}": watched.seen.hidden[layer] for layer in evenly(list(watched.seen.hidden), MAX_LAYERS)}
    if watched.seen.expert:
        last = max(watched.seen.expert)
        layers[f"expert, block {last}"] = watched.seen.expert[last]
    cells = [[images[view] for view in views]]
    cells += [
        [_enlarged(colours[view], images.shape[1:3]) for view in views] for colours in map(pca_colours, layers.values())
    ]
    rows, columns = ["input", *layers], [f"view {view + 1}" for view in views]
    title = f"{clip}: three main directions of the features of all views, as red, green and blue"
    _save(stack([_heading(title), grid(cells, [[None] * len(columns)] * len(rows), rows, columns)]), path)


def pca_colours(states: Tensor) -> np.ndarray:
    """States (T, h, w, d) as colours (T, h, w, 3) uint8 that mean the same in every view.

    The three directions of the largest variance over all cells of all views, each from its 2nd to its 98th percentile,
    with the sign that makes its largest weight positive. A direction without variance is grey.
    """
    tokens = states.double().flatten(0, 2)
    centred = tokens - tokens.mean(0)
    _, _, directions = torch.linalg.svd(centred, full_matrices=False)
    main = directions[:3]
    main = main * main.gather(1, main.abs().argmax(1, keepdim=True)).sign()
    values = centred @ main.mT  # (T h w, up to 3)
    values = torch.nn.functional.pad(values, (0, 3 - values.shape[1]))
    low, high = values.quantile(0.02, dim=0), values.quantile(0.98, dim=0)
    spread = high - low
    share = torch.where(spread > 1e-9, (values - low) / spread.clamp_min(1e-9), 0.5).clamp(0, 1)
    return (share * 255).round().to(torch.uint8).unflatten(0, states.shape[:3]).numpy()


def _enlarged(colours: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(h, w, 3) at the size of the views, cells with sharp edges."""
    return np.asarray(Image.fromarray(colours).resize((size[1], size[0]), Image.Resampling.NEAREST))


def _save(picture: Image.Image, path: Path) -> None:
    with atomic_file(path) as file:
        picture.save(file, format="PNG")
