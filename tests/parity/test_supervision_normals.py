"""Corner normals of point maps against the peers' (golden family `supervision`, `point_normal_loss`)."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from geometry import neighbour_normals
from tests.parity import golden

pytestmark = pytest.mark.parity


@pytest.mark.parametrize("path", golden.cases("supervision/point_normal_loss*.safetensors"))
def test_corner_normals(path: Path) -> None:
    case = load_file(path)
    normals, valid = neighbour_normals(case["gt_points"], case["mask"])
    assert valid.any()
    assert torch.equal(valid, case["gt_normals_valid"])
    torch.testing.assert_close(normals[valid], case["gt_normals"][valid], rtol=1e-5, atol=1e-6)
