"""A packed training sample of the released code: tokens, hidden states, cross-entropy, geometry losses, gradients."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from g2vlm.checkpoint import load_model
from g2vlm.convert.g2vlm_release import KEYMAP
from g2vlm.data.chat.batch import ChatBatch
from g2vlm.model.outputs import G2VLMOutput
from g2vlm.processing import sequence_builder, view_grid
from g2vlm.sequence import GeometryViews, PackedSequence, SemanticImage, Text
from geometry import GeometryPrediction
from geometry.losses import GeometryLosses, GeometryLossWeights, GeometryTargets, geometry_losses
from tests.parity import golden
from tests.parity.test_g2vlm import PATCH, assert_close, in_sequence
from train.config import LanguageConfig
from train.objectives.language import LanguageObjective

pytestmark = pytest.mark.parity
FIXTURES = golden.cases("g2vlm_*/train_outputs.safetensors")
RELEASED_WEIGHTS = GeometryLossWeights(camera=0.2, normal=1.0, translation=100.0, global_points=1.0)


def samples(inputs: dict[str, Tensor]) -> list[list]:
    """The segments of every packed sample, read off its splits; the padding sample at the end is left out."""
    ids = dict(zip(inputs["packed_text_indexes"].tolist(), inputs["packed_text_ids"].tolist(), strict=True))
    views, images, supervised = (
        set(inputs[name].tolist()) if name in inputs else set()
        for name in ("packed_dino_token_indexes", "packed_vit_token_indexes", "ce_loss_indexes")
    )
    view = view_grid(inputs["packed_dino_image_tensor_list"], PATCH)
    grids = iter(inputs["packed_image_grid_thw"].tolist() if images else [])
    ends = set(inputs["sample_lens"].cumsum(0).tolist())
    found: list[list] = [[]]
    start = 0
    for length in inputs["split_lens"].tolist():
        tokens = range(start, start + length)
        start += length
        if views & set(tokens):
            add_view(found[-1], view)
        elif images & set(tokens):
            found[-1].append(SemanticImage(tuple(next(grids)[1:])))
        elif set(tokens) <= ids.keys():
            text = tuple(ids[token] for token in tokens)
            is_supervised = bool(supervised & set(tokens))
            found[-1].append(Text(text[:-1] if is_supervised else text, supervised=is_supervised))
        if start in ends:
            found.append([])
    return [sample for sample in found if sample]


def add_view(sample: list, view: tuple[int, int]) -> None:
    """Consecutive views belong to one segment."""
    if sample and isinstance(sample[-1], GeometryViews):
        sample[-1] = GeometryViews((*sample[-1].grids, view))
    else:
        sample.append(GeometryViews((view,)))


def run(folder: Path) -> SimpleNamespace:
    """One forward of the packed sample, and its losses with the released weights."""
    model = load_model(folder, dtype=torch.float32)
    inputs = load_file(folder / "train_inputs.safetensors")
    sequence = sequence_builder(model.config, geometry_attention="block_causal").build(samples(inputs))
    supervised = (sequence.labels >= 0).nonzero().flatten()
    num_scenes = len(sequence.view_grids)

    def per_scene(name: str) -> Tensor:
        return inputs[name].unflatten(0, (num_scenes, -1))

    output = model(
        sequence=sequence,
        views=list(per_scene("packed_dino_image_tensor_list")),
        pixel_values=inputs.get("packed_vit_images"),
        image_grid_thw=inputs.get("packed_image_grid_thw"),
        logits_at=supervised,
        predict_global_points=True,
    )
    cross_entropy = F.cross_entropy(output.logits.float(), sequence.labels[supervised], reduction="none")
    targets = GeometryTargets(
        world_points=per_scene("packed_world_points"),
        cam_to_world=per_scene("packed_extrinsics"),
        valid=per_scene("packed_point_masks").bool(),
        normal_enabled=torch.ones(num_scenes, dtype=torch.bool),
    )
    losses = geometry_losses(batched(output), targets, RELEASED_WEIGHTS)
    return SimpleNamespace(
        model=model,
        inputs=inputs,
        sequence=sequence,
        output=output,
        cross_entropy=cross_entropy,
        targets=targets,
        losses=losses,
    )


def batched(output: G2VLMOutput) -> GeometryPrediction:
    """The scenes' predictions with a batch axis."""
    return GeometryPrediction.stack(output.geometry)


@pytest.fixture(scope="module")
def trained(request: pytest.FixtureRequest) -> SimpleNamespace:
    """The run and the expected outputs of one fixture."""
    folder = request.param.parent
    result = run(folder)
    result.expected = load_file(folder / "train_outputs.safetensors")
    return result


@pytest.mark.parametrize("trained", FIXTURES, indirect=True)
def test_pack(trained: SimpleNamespace) -> None:
    sequence: PackedSequence = trained.sequence
    inputs = trained.inputs
    num_tokens = sequence.num_tokens
    assert torch.equal(sequence.position_ids[:, sequence.order], inputs["packed_position_ids"][:, :num_tokens])
    assert torch.equal(sequence.labels[sequence.labels >= 0], inputs["packed_label_ids"])
    assert torch.equal(sequence.label_weights[sequence.labels >= 0], inputs["ce_loss_weights"])


@pytest.mark.parametrize("trained", FIXTURES, indirect=True)
def test_hidden_states_and_cross_entropy(trained: SimpleNamespace) -> None:
    output: G2VLMOutput = trained.output
    hidden = in_sequence(trained.sequence, output.geometric_hidden, output.semantic_hidden)
    assert_close(hidden, trained.expected["last_hidden"], "last_hidden")
    assert_close(trained.cross_entropy, trained.expected["ce_per_token"], "ce_per_token")


@pytest.mark.parametrize("trained", FIXTURES, indirect=True)
def test_language_objective(trained: SimpleNamespace) -> None:
    """The trainer's token mean and its reweighting, from released losses per token."""
    supervised = (trained.sequence.labels >= 0).nonzero().flatten()
    batch = ChatBatch(trained.sequence, (), None, None, supervised, (), ())
    losses, weights = trained.expected["ce_per_token"], trained.inputs["ce_loss_weights"]
    expected = {"token": losses.mean(), "sample_sqrt": (losses * weights).sum() / weights.sum()}
    counts = {"token": float(len(losses)), "sample_sqrt": weights.sum().item()}
    assert len(set(weights.tolist())) > 1 or len(losses) == 1 or weights[0] < 1
    for reduction, value in expected.items():
        term = LanguageObjective(LanguageConfig(reduction=reduction))(trained.output, batch)["language"]
        torch.testing.assert_close(term.value, value, rtol=1e-4, atol=0)
        assert term.count.item() == pytest.approx(counts[reduction])
    total = trained.expected["total_ce_mean_plus_dl"][0] - trained.expected["dl_total"][0]
    torch.testing.assert_close(expected["token"], total, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("trained", FIXTURES, indirect=True)
def test_predictions(trained: SimpleNamespace) -> None:
    prediction = batched(trained.output)
    assert_close(prediction.local_points, trained.expected["pred.local_points"], "local_points")
    assert_close(prediction.world_points, trained.expected["pred.points"], "points")
    assert_close(prediction.cam_to_world, trained.expected["pred.camera_poses"], "camera_poses")
    valid = trained.targets.valid
    distance = torch.where(valid, prediction.local_points.norm(dim=-1), 0).flatten(1).sum(1) / valid.flatten(1).sum(1)
    normalised = prediction.global_points / distance.view(-1, 1, 1, 1, 1)
    assert_close(normalised, trained.expected["pred.global_points"], "global_points")


@pytest.mark.parametrize("trained", FIXTURES, indirect=True)
def test_geometry_losses(trained: SimpleNamespace) -> None:
    losses: GeometryLosses = trained.losses
    names = {
        "local_pts_loss": "points",
        "global_pts_loss": "global_points",
        "normal_loss": "normal",
        "trans_loss": "translation",
        "rot_loss": "rotation",
    }
    for released, ours in names.items():
        torch.testing.assert_close(losses.terms[ours], trained.expected[f"detail.{released}"][0], rtol=1e-4, atol=0)
    torch.testing.assert_close(losses.total, trained.expected["dl_total"][0], rtol=1e-4, atol=0)


@pytest.mark.parametrize("trained", FIXTURES, indirect=True)
def test_gradient_norms(trained: SimpleNamespace) -> None:
    total = trained.cross_entropy.mean() + trained.losses.total
    torch.testing.assert_close(total, trained.expected["total_ce_mean_plus_dl"][0], rtol=1e-4, atol=0)
    trained.model.zero_grad()
    total.backward()
    gradients = {name: p.grad for name, p in trained.model.named_parameters() if p.grad is not None}
    recipes = KEYMAP.to_theirs(gradients)
    norms = {key.removeprefix("grad_norm."): value[0] for key, value in trained.expected.items() if "grad_norm." in key}
    for name, expected in norms.items():
        recipe = recipes[name]
        gradient = gradients[recipe.sources[0]].chunk(recipe.parts)[recipe.part]
        torch.testing.assert_close(gradient.norm(), expected, rtol=1e-3, atol=0, msg=name)
    assert norms
