"""First sight: the semantic encoder of a small model learns what is where in a room, and how far away.

Large models start from a pretrained vision tower; there is none for presets that train on a laptop, and answers teach
it too little. `python -m train.sight --model DIR --output DIR` renders rooms once, goes through them many times, and
writes the model with the encoder that it has trained; everything else stays as it was.

V views of a batch, P patches of a view, T = P / 4 tokens, D their width, C categories.
"""

import argparse
import logging
import math
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from g2vlm.chat_model import processor_of
from g2vlm.checkpoint import load_model, save_model
from g2vlm.cli import guarded, log_to_stderr
from g2vlm.data.chat.descriptions import filling, some_point
from g2vlm.data.qa.camera_tasks import Point, mark_at
from g2vlm.data.qa.drafts import stream
from g2vlm.data.qa.rooms import room_facts
from g2vlm.data.qa.showing import shown_views
from g2vlm.data.rooms import RoomsSource
from g2vlm.data.rooms.scene import STRUCTURE, Scene
from g2vlm.data.types import SceneSample, ViewRequest
from g2vlm.images import PATCH
from g2vlm.model.g2vlm import G2VLMForConditionalGeneration
from g2vlm.semantic_images import MERGE, SemanticRule, semantic_pixels

LOG = logging.getLogger(__name__)
LAW, CAMERAS = "any_size", "inquiring"
VIEWS, SIDE = 4, 84
BLOCK = MERGE * PATCH
VIEWS_PER_STEP, HIDDEN = 96, 256
NO_PATCH = (SIDE // PATCH) ** 2
MARKED = 0.5
"""Share of the views with the red dot that questions speak of."""


@dataclass(frozen=True)
class Lessons:
    """Rendered views and what their patches show, in the order of the encoder's patches.

    Args:
        images: (N, H, W, 3) uint8.
        owners: (N, P) int64, number of the category that fills most of each patch.
        depths: (N, P) float32, median depth in metres of what it shows.
        marked: (N,) int64, the patch with the middle of the red dot; P where there is none.
        categories: their names.
    """

    images: NDArray[np.uint8]
    owners: NDArray[np.int64]
    depths: NDArray[np.float32]
    marked: NDArray[np.int64]
    categories: tuple[str, ...]

    def part(self, which: slice) -> "Lessons":
        """Some of the views."""
        return Lessons(self.images[which], self.owners[which], self.depths[which], self.marked[which], self.categories)


def lessons(rooms: range, seed: int, workers: int) -> Lessons:
    """Views of training rooms, rendered by several processes."""
    with ProcessPoolExecutor(workers) as pool:
        told = list(pool.map(partial(_lesson, seed), rooms, chunksize=16))
    images, owners, depths, marked = zip(*told, strict=True)
    names = sorted({name for room in owners for name in room})
    numbers = {name: number for number, name in enumerate(names)}
    filled = np.array([[numbers[name] for name in room] for room in owners]).reshape(len(rooms) * VIEWS, -1)
    return Lessons(np.concatenate(images), filled, np.concatenate(depths), np.concatenate(marked), tuple(names))


def _lesson(seed: int, index: int) -> tuple[NDArray[np.uint8], list[str], NDArray[np.float32], NDArray[np.int64]]:
    torch.set_num_threads(1)
    source, draws = RoomsSource(LAW, "train", seed, CAMERAS), stream("sight", seed, index)
    scene, room = source.load(index, ViewRequest(VIEWS, (SIDE, SIDE), index)), source.scene(index)
    frames = room_facts(room, scene).frames
    points = [some_point(frame, draws) if draws.chance(MARKED) else None for frame in frames]
    marks = [mark_at(k, frames[k], point) for k, point in enumerate(points) if point]
    owners, depths = patches(room, scene)
    marked = np.array([patch_of(point) if point else NO_PATCH for point in points])
    return shown_views(scene.images, marks), owners, depths, marked


def patches(room: Scene, scene: SceneSample) -> tuple[list[str], NDArray[np.float32]]:
    """Category and median depth of what fills most of each patch: V * P names, (V, P) metres."""
    assert scene.instances is not None
    assert scene.depth is not None
    names = {thing.index: thing.category for thing in room.instances}
    owners, depths = (_cut(values.numpy()) for values in (scene.instances, scene.depth))
    told, metres = [], []
    for owner, depth in zip(owners, depths, strict=True):
        most, median = filling(owner, depth)
        told.append(names[most])
        metres.append(median)
    return told, np.array(metres, np.float32).reshape(scene.num_views, -1)


def patch_of(point: Point) -> int:
    """The patch that a point is in."""
    dot = np.zeros((1, SIDE, SIDE), bool)
    dot[0, point.row, point.column] = True
    return int(_cut(dot).sum(axis=1).argmax())


def _cut(values: NDArray) -> NDArray:
    """(V, H, W) -> (V * P, patch area), the patches of a token together as the encoder takes them."""
    views, height, width = values.shape
    blocks = values.reshape(views, height // BLOCK, MERGE, PATCH, width // BLOCK, MERGE, PATCH)
    return blocks.transpose(0, 1, 4, 2, 5, 3, 6).reshape(-1, PATCH * PATCH)


@dataclass(frozen=True)
class Reading:
    """What tokens say.

    Args:
        categories: (V, P, C) scores.
        log_depths: (V, P) of metres.
        places: (V, T, T) scores of the place of each token in the image.
        marked: (V, P + 1) scores of the patch with the red dot, and of none.
    """

    categories: Tensor
    log_depths: Tensor
    places: Tensor
    marked: Tensor


class Reader(nn.Module):
    """Reads the encoder's tokens (V, T, D), one by one."""

    def __init__(self, tokens: int, width: int, categories: int):
        super().__init__()
        self.hidden, self.place = nn.Linear(width, HIDDEN), nn.Linear(HIDDEN, tokens)
        self.patches = nn.Linear(HIDDEN, MERGE**2 * (categories + 2))

    def forward(self, tokens: Tensor) -> Reading:
        """What they say."""
        hidden = F.gelu(self.hidden(tokens))
        patches = self.patches(hidden).unflatten(-1, (MERGE**2, -1)).flatten(1, 2)
        categories, log_depths, marked = patches[..., :-2], patches[..., -2], patches[..., -1]
        return Reading(categories, log_depths, self.place(hidden), F.pad(marked, (0, 1)))


def encode(model: G2VLMForConditionalGeneration, rule: SemanticRule, images: NDArray[np.uint8]) -> Tensor:
    """Tokens (V, T, D) of images (V, H, W, 3)."""
    pixels, grids = semantic_pixels(list(images), rule)
    tokens = model.encode_images(torch.from_numpy(pixels), torch.from_numpy(grids)).merged
    return tokens.unflatten(0, (len(images), -1))


def teach(
    model: G2VLMForConditionalGeneration, rule: SemanticRule, shown: Lessons, steps: int, lr: float, seed: int
) -> Reader:
    """Train the encoder in place: cross-entropy of categories, places and marked patches, absolute error of log depths.

    Rotary positions turn keys and queries, not values: tokens tell their place themselves, so that what has found one
    need not work out where it was.
    """
    torch.manual_seed(seed)
    reader = Reader(shown.owners.shape[1] // MERGE**2, model.config.decoder.hidden_size, len(shown.categories))
    weights = [*model.semantic_encoder.parameters(), *reader.parameters()]
    optimizer = torch.optim.AdamW(weights, lr, (0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(_rate, steps=steps))
    for step, batch in enumerate(islice(_batches(len(shown.images), seed), steps), 1):
        told = reader(encode(model, rule, shown.images[batch]))
        owners, depths = torch.from_numpy(shown.owners[batch]), torch.from_numpy(shown.depths[batch])
        what = F.cross_entropy(told.categories.flatten(0, 1), owners.flatten())
        far = (told.log_depths - depths.log()).abs().mean()
        where = F.cross_entropy(told.places.flatten(0, 1), torch.arange(told.places.shape[1]).repeat(len(batch)))
        dot = F.cross_entropy(told.marked, torch.from_numpy(shown.marked[batch]))
        optimizer.zero_grad()
        (what + far + where + dot).backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps:
            losses = what.item(), far.item(), where.item(), dot.item()
            LOG.info("step %d/%d  categories %.3f  log depth %.3f  places %.3f  dot %.3f", step, steps, *losses)
    return reader


def _rate(step: int, steps: int) -> float:
    """Linear over the first twentieth, then half a cosine to zero; step counts from 0."""
    return min(1.0, 20 * (step + 1) / steps) * (1 + math.cos(math.pi * step / steps)) / 2


def _batches(count: int, seed: int) -> Iterator[NDArray[np.int64]]:
    generator = np.random.default_rng(seed)
    while True:
        order = generator.permutation(count)
        for start in range(0, count - VIEWS_PER_STEP + 1, VIEWS_PER_STEP):
            yield order[start : start + VIEWS_PER_STEP]


@torch.inference_mode()
def read(model: G2VLMForConditionalGeneration, rule: SemanticRule, reader: Reader, shown: Lessons) -> str:
    """What the encoder knows of views it never saw, beside the most frequent category and a constant depth."""
    parts = [reader(encode(model, rule, shown.images[i : i + 64])) for i in range(0, len(shown.images), 64)]
    found = torch.cat([told.categories.argmax(-1) for told in parts]).numpy()
    error = np.abs(torch.cat([told.log_depths for told in parts]).numpy() - np.log(shown.depths)).mean()
    places = torch.cat([told.places.argmax(-1) for told in parts])
    marked = torch.cat([told.marked.argmax(-1) for told in parts]).numpy()
    things = ~np.isin(shown.owners, [shown.categories.index(name) for name in STRUCTURE])
    right, common = found == shown.owners, np.bincount(shown.owners[things]).argmax()
    constant = np.abs(np.log(shown.depths) - np.median(np.log(shown.depths))).mean()
    return (
        f"patches: {100 * right.mean():.1f} % of the categories right; of things {100 * right[things].mean():.1f} % "
        f"(most frequent {100 * (shown.owners[things] == common).mean():.1f} %); error of log depth {error:.3f} "
        f"(constant {constant:.3f}); places {100 * (places == torch.arange(places.shape[1])).float().mean():.1f} %; "
        f"red dot found or missing as told {100 * (marked == shown.marked).mean():.1f} %"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Teach and save; the last rooms are kept apart to measure."""
    parser = argparse.ArgumentParser(prog="python -m train.sight", description=__doc__)
    parser.add_argument("--model", required=True, help="model folder to start from")
    parser.add_argument("--output", type=Path, required=True, help="new folder for the model")
    parser.add_argument("--rooms", type=int, default=6000, help="rendered rooms")
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2, help="processes that render")
    args = parser.parse_args(arguments)
    log_to_stderr()
    return guarded(lambda: carry_out(args), debug=False)


def carry_out(args: argparse.Namespace) -> None:
    """What the flags ask for.

    Raises:
        InputError: no such model, or the output folder is taken.
    """
    model = load_model(args.model, dtype=torch.float32)
    rule, apart = processor_of(model.config).rule, max(args.rooms // 50, 8)
    LOG.info("rendering %d rooms", args.rooms + apart)
    shown = lessons(range(args.rooms + apart), args.seed, args.workers)
    taught, kept = shown.part(slice(VIEWS * args.rooms)), shown.part(slice(VIEWS * args.rooms, None))
    reader = teach(model, rule, taught, args.steps, args.lr, args.seed)
    LOG.info(read(model, rule, reader, kept))
    save_model(model, args.output)
    LOG.info("model in %s", args.output)


if __name__ == "__main__":
    sys.exit(main())
