"""How good probed depth is, room by room, and how it goes together with answers about the same rooms.

Shapes: F frames, H W pixels, N questions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import spearmanr  # pyright: ignore[reportMissingTypeStubs, reportUnknownVariableType]
from torch import Tensor

from eval.probe_data import Features
from geometry.arrays import FloatArray
from geometry.metrics.depth import align_l1_scale, best_constant_depth

NUM_BINS = 4


@dataclass(frozen=True)
class RoomScore:
    """Errors over the valid pixels of a room's views.

    Args:
        room: its name.
        squared: mean squared error, metres squared.
        abs_rel: mean |p - g| / g.
        abs_rel_scaled: the same after the best scale of the room.
        pixels: valid ones.
    """

    room: str
    squared: float
    abs_rel: float
    abs_rel_scaled: float
    pixels: int

    @property
    def rmse(self) -> float:
        """Root mean squared error in metres."""
        return self.squared**0.5


def score_rooms(depth: Tensor, features: Features) -> list[RoomScore]:
    """Predicted depth (F, H, W) beside the truth, room by room."""
    found = []
    for number, name in enumerate(features.names):
        own = features.room == number
        valid = features.valid[own]
        found.append(score_room(name, depth[own][valid].double().numpy(), features.depth[own][valid].double().numpy()))
    return found


def score_room(name: str, p: FloatArray, g: FloatArray) -> RoomScore:
    """Predicted and true depth (n,) of a room's valid pixels."""
    scaled = align_l1_scale(p, g).scale * p
    return RoomScore(
        name,
        float(np.mean((p - g) ** 2)),
        float(np.mean(np.abs(p - g) / g)),
        float(np.mean(np.abs(scaled - g) / g)),
        len(g),
    )


def constant_depth(features: Features) -> list[RoomScore]:
    """The best constant depth of each room, that of the smallest AbsRel."""
    found = []
    for number, name in enumerate(features.names):
        own = features.room == number
        truth = features.depth[own][features.valid[own]].double().numpy()
        found.append(score_room(name, np.full_like(truth, best_constant_depth(truth)), truth))
    return found


def summary(rooms: Sequence[RoomScore]) -> dict[str, float]:
    """`rmse` in metres over all pixels together, `abs_rel` and `abs_rel_scaled` as means over rooms."""
    pixels = np.array([room.pixels for room in rooms], dtype=np.float64)
    squared = np.array([room.squared for room in rooms])
    return {
        "rmse": float((pixels @ squared / pixels.sum()) ** 0.5),
        "abs_rel": float(np.mean([room.abs_rel for room in rooms])),
        "abs_rel_scaled": float(np.mean([room.abs_rel_scaled for room in rooms])),
    }


@dataclass(frozen=True)
class Bin:
    """Questions about the rooms that a probe does about equally well on.

    Args:
        rmse: mean over its questions, metres.
        accuracy: mean score in percent.
        count: of questions.
    """

    rmse: float
    accuracy: float
    count: int


def bins(errors: FloatArray, scores: FloatArray, count: int = NUM_BINS) -> list[Bin]:
    """Questions in bins of equal size (the first may hold one more) by the error of their room, the worst first.

    Args:
        errors: (N,) of each question's room.
        scores: (N,) in [0, 1].
        count: of the bins; fewer where there are fewer questions.
    """
    order = np.argsort(-errors, kind="stable")
    parts = [part for part in np.array_split(order, count) if len(part)]
    return [Bin(float(errors[part].mean()), 100 * float(scores[part].mean()), len(part)) for part in parts]


def rank_correlation(errors: Sequence[float], scores: Sequence[float]) -> float:
    """Spearman's, over models; NaN below three models or where either is constant."""
    if len(errors) < 3 or len(set(errors)) == 1 or len(set(scores)) == 1:
        return float("nan")
    return float(np.asarray(spearmanr(errors, scores))[0])


def errors_of(rooms: Sequence[RoomScore]) -> Mapping[str, float]:
    """RMSE by room."""
    return {room.room: room.rmse for room in rooms}
