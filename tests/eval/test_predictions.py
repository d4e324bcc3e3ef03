"""Predictions at the size of the truth, and in files."""

from pathlib import Path

import torch

from eval.predictions import load_prediction, predict, resized, save_prediction
from g2vlm.pipeline import load
from geometry import GeometryPrediction, unproject
from tests.eval.samples import perfect, room_sample


def plane(height: int, width: int) -> GeometryPrediction:
    """A slanted plane on a grid whose corners are those of the image, so that every size shows the same plane."""
    rows, columns = (torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    points = torch.stack([x, y, 2 + x - 0.5 * y], dim=-1)[None]
    normals = torch.nn.functional.normalize(torch.tensor([1.0, -0.5, -1.0]), dim=0).expand_as(points)
    return GeometryPrediction(points, torch.eye(4)[None], normals)


def test_a_plane_stays_the_plane_when_it_is_resized() -> None:
    grown, exact = resized(plane(42, 56), (42, 64)), plane(42, 64)
    inner = (slice(None), slice(2, -2), slice(2, -2))  # the outer half pixels repeat the border
    torch.testing.assert_close(grown.local_points[inner], exact.local_points[inner], atol=1e-5, rtol=0)
    torch.testing.assert_close(grown.normals, exact.normals)


def test_resized_normals_are_unit_vectors() -> None:
    grown = resized(perfect(room_sample()), (50, 60))
    torch.testing.assert_close(grown.normals.norm(dim=-1), torch.ones(3, 50, 60))


def test_a_model_sees_multiples_of_14_and_answers_at_the_size_of_the_truth() -> None:
    pipeline = load("tiny", "cpu")
    seen = []
    inner = pipeline.predict
    pipeline.predict = lambda pixels: seen.append(tuple(pixels.shape)) or inner(pixels)  # pyright: ignore
    assert predict(pipeline, room_sample(2, (42, 64))).local_points.shape == (2, 42, 64, 3)
    assert predict(pipeline, room_sample(2, (42, 56))).local_points.shape == (2, 42, 56, 3)
    assert seen == [(2, 3, 42, 56)] * 2


def test_a_saved_prediction_is_the_same_prediction(tmp_path: Path) -> None:
    sample = room_sample()
    assert sample.depth is not None
    assert sample.intrinsics is not None
    saved = GeometryPrediction(
        unproject(sample.depth, sample.intrinsics), perfect(sample).cam_to_world, perfect(sample).normals
    )
    save_prediction(tmp_path / "a.safetensors", saved, {"item": "room"})
    again = load_prediction(tmp_path / "a.safetensors")
    for name in ("local_points", "cam_to_world", "normals"):
        torch.testing.assert_close(getattr(again, name), getattr(saved, name), rtol=0, atol=0, equal_nan=True)
    assert again.confidence is None
