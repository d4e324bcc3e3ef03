"""Geometry tokens of every source, and our model fused with them: pairing, freezing, answers, checkpoints, configs."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from g2vlm.asking import look
from g2vlm.checkpoint import load_model, random_model, save_model
from g2vlm.config import G2VLMConfig
from g2vlm.errors import CheckpointError, InputError
from g2vlm.fusion_config import FusionConfig
from g2vlm.generation import prefill
from g2vlm.geometry_tokens import Clip, GeometricExpert, GeometryTokens, KeptTokens, SomeTokens, expert_tokens
from g2vlm.images import from_memory
from g2vlm.model.g2vlm import G2VLMForConditionalGeneration
from g2vlm.pipeline import Pipeline
from g2vlm.processing import normalise_views, recon_sequence, sequence_builder
from g2vlm.sampling import GenerationOptions
from g2vlm.sequence import GeometryViews, SemanticImage, Text
from g2vlm.supervision.backbones import Taps, backbone_of
from tests.g2vlm.chats import CHATS, PACKS, chat_model, pack_inputs
from tests.g2vlm.talkative import talkative_model
from train.start import build_model
from train.trainable import set_trainable

SHORT = GenerationOptions(max_new_tokens=4)
HEAD = FusionConfig(head_dim=8)
VIEWS = GeometryViews(((2, 3),) * 2)
ASKED = (Text((10, 11)), VIEWS, SemanticImage((4, 4)), SemanticImage((2, 6)), Text((20, 21)))


def fused(config: FusionConfig = HEAD, sees: str = "everything") -> G2VLMForConditionalGeneration:
    """A random model in float64 with a fusion of random weights."""
    torch.manual_seed(1)
    model = copy.deepcopy(chat_model(sees=sees))
    model.add_fusion(config)
    for parameter in model.fusion.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model


def hidden_of(model: G2VLMForConditionalGeneration, samples: list, **changes) -> Tensor:
    inputs = pack_inputs(samples) | changes
    output = model(sequence_builder(model.config).build(samples), **inputs, predict_geometry=False)
    assert output.semantic_hidden is not None
    return output.semantic_hidden


def pictures(seed: int = 0, count: int = 2) -> list[np.ndarray]:
    draws = np.random.default_rng(seed)
    return [draws.integers(0, 256, (30, 45, 3), dtype=np.uint8) for _ in range(count)]


# Tokens.


def test_camera_tokens_come_first_and_each_kind_can_be_left_out() -> None:
    patches, camera = torch.randn(2, 6, 4), torch.randn(2, 1, 4)
    both = GeometryTokens(patches, camera, (2, 3))
    assert torch.equal(torch.stack(both.frames("frame")), torch.cat([camera, patches], dim=1))
    assert torch.equal(torch.stack(both.only("camera").frames("frame")), camera)
    assert torch.equal(torch.stack(both.only("patches").frames("frame")), patches)
    assert both.only("all").num_frames == 2
    first, second = both.frames("clip")
    assert torch.equal(first, second)
    assert torch.equal(first, torch.cat(both.frames("frame")))


@pytest.mark.parametrize(
    ("patches", "camera", "message"),
    [
        (None, None, "need patches or a camera"),
        (torch.zeros(2, 6, 4), torch.zeros(3, 1, 4), "must be"),
        (torch.zeros(2, 6, 4), torch.zeros(2, 1, 5), "must be"),
        (torch.zeros(2, 5, 4), None, "5 patches do not fill a grid"),
    ],
)
def test_tokens_that_do_not_fit(patches: Tensor | None, camera: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GeometryTokens(patches, camera, (2, 3))


def test_kept_tokens_never_miss_in_silence() -> None:
    tokens = GeometryTokens(torch.randn(2, 6, 4), torch.randn(2, 1, 4), (2, 3))
    source = KeptTokens({"room": tokens})
    clip = Clip(torch.zeros(2, 3, 28, 42), "room")
    assert source.token_dim == 4
    assert source.tokens(clip) is tokens
    ablated = SomeTokens(source, "patches")
    assert ablated.token_dim == 4
    assert ablated.tokens(clip).camera is None
    with pytest.raises(InputError, match="no geometry tokens of clip 'hall'"):
        source.tokens(Clip(clip.images, "hall"))
    with pytest.raises(InputError, match="other frames of clip 'room'"):
        source.tokens(Clip(clip.images[:1], "room"))
    wider = GeometryTokens(torch.randn(2, 6, 5), None, (2, 3))
    with pytest.raises(ValueError, match=r"widths \[4, 5\]"):
        KeptTokens({"room": tokens, "hall": wider})


@pytest.mark.parametrize("layer", [-1, 1, 2])
@pytest.mark.parametrize("camera", ["decoder", "mean"])
def test_the_geometric_expert_says_what_it_says_in_a_reconstruction(layer: int, camera) -> None:
    model, images = chat_model(), torch.rand(3, 3, 28, 42, dtype=torch.float64)
    source = GeometricExpert(model, layer, camera)
    tokens = source.tokens(Clip(images))
    views, kept = [normalise_views(images)], []
    hook = model.decoder.layers[layer - 1 if layer > 0 else -1].register_forward_hook(
        lambda *args: kept.append(args[2])
    )
    last = model(recon_sequence(views, model.config), views).geometric_hidden
    hook.remove()
    expected = last if layer in (-1, 2) else kept[0][0]
    assert source.token_dim == tokens.frames("frame")[0].shape[-1] == 32
    assert (tokens.grid, tokens.layer) == ((2, 3), 2 if layer == -1 else layer)
    assert tokens.patches is not None
    assert tokens.camera is not None
    torch.testing.assert_close(tokens.patches.flatten(0, 1), expected.detach())
    if camera == "mean":
        torch.testing.assert_close(tokens.camera[:, 0], tokens.patches.mean(1))
    else:
        features = []
        hook = model.heads.camera_decoder.output.register_forward_hook(lambda *args: features.append(args[1][0]))
        model(recon_sequence(views, model.config), views)
        hook.remove()
        torch.testing.assert_close(tokens.camera[:, 0], features[0].mean(1).detach())
    assert not tokens.patches.requires_grad
    assert not tokens.camera.requires_grad


def test_scenes_of_a_pack_do_not_see_each_other() -> None:
    model = chat_model()
    views = [torch.randn(2, 3, 28, 42, dtype=torch.float64), torch.randn(3, 3, 14, 28, dtype=torch.float64)]
    together = expert_tokens(model, views)
    for one, own in zip(views, together, strict=True):
        (alone,) = expert_tokens(model, [one])
        torch.testing.assert_close(torch.cat(own.frames("frame")), torch.cat(alone.frames("frame")))


# The fused model.


@pytest.mark.parametrize("name", PACKS)
def test_without_fusion_nothing_changes(name: str) -> None:
    """A model that never heard of fusion: the image tokens of the tower reach the decoder bit by bit."""
    model, inputs = chat_model(), pack_inputs(PACKS[name])
    sequence = sequence_builder(model.config).build(PACKS[name])
    semantic, _ = model.embed_semantic(sequence, inputs["pixel_values"], inputs["image_grid_thw"], inputs["views"])
    expected = model.embed_tokens(sequence.semantic_ids)
    if inputs["pixel_values"] is not None:
        merged = model.encode_images(inputs["pixel_values"], inputs["image_grid_thw"]).merged
        expected = expected.index_copy(0, sequence.image_slots, merged)
    assert torch.equal(semantic, expected)
    assert not [key for key in model.state_dict() if "fusion" in key]


@pytest.mark.parametrize("scope", ["frame", "clip"])
@pytest.mark.parametrize("tokens", ["all", "camera", "patches"])
def test_images_are_fused_behind_the_merger_with_the_view_of_their_number(scope, tokens) -> None:
    model = fused(FusionConfig(head_dim=8, scope=scope, tokens=tokens))
    inputs = pack_inputs([ASKED])
    sequence = sequence_builder(model.config).build([ASKED])
    semantic, _ = model.embed_semantic(sequence, inputs["pixel_values"], inputs["image_grid_thw"], inputs["views"])
    merged = model.encode_images(inputs["pixel_values"], inputs["image_grid_thw"]).merged
    (clip,) = expert_tokens(model, inputs["views"])
    frames = clip.only(tokens).frames(scope)
    expected = [model.fusion(m[None], f[None])[0] for m, f in zip(merged.split([4, 3]), frames, strict=True)]
    torch.testing.assert_close(semantic[sequence.image_slots], torch.cat(expected))


def test_samples_of_a_pack_are_fused_with_their_own_views() -> None:
    model, images = fused(), (Text((10,)), SemanticImage((4, 4)), Text((20,)))
    samples = [ASKED, images, (Text((3,)), GeometryViews(((1, 2),)), SemanticImage((2, 2)), Text((4,)))]
    ranges = sequence_builder(model.config).build(samples).sample_ranges
    packed = hidden_of(model, samples)
    for sample, (_, (start, stop)) in zip(samples, ranges, strict=True):
        torch.testing.assert_close(packed[start:stop], hidden_of(model, [sample]))


def test_images_without_views_stay_as_they_are() -> None:
    assert torch.equal(hidden_of(fused(), [CHATS["images"]]), hidden_of(chat_model(), [CHATS["images"]]))


def test_images_and_views_must_pair() -> None:
    with pytest.raises(InputError, match="sample 0 has 2 images and 3 views"):
        hidden_of(fused(), [CHATS["chat"]])


def test_images_behind_cached_views_must_be_given_their_tokens() -> None:
    """In two forwards the same as in one, and never unfused in silence."""
    model = fused()
    pixels = pack_inputs([ASKED])
    images = {name: pixels[name] for name in ("pixel_values", "image_grid_thw")}
    seen = prefill(model, ASKED[:2], pixels["views"])
    with pytest.raises(ValueError, match="images that continue a cache"):
        prefill(model, ASKED[2:], **images, after=seen)
    (clip,) = expert_tokens(model, pixels["views"])
    with model.given_frames.use(clip.frames("frame")):
        both = prefill(model, ASKED[2:], **images, after=seen)
    whole = prefill(model, ASKED, **pixels)
    for one, other in zip(both.cache.layers, whole.cache.layers, strict=True):
        assert one.values is not None
        assert other.values is not None
        torch.testing.assert_close(one.values[-2:], other.values[-2:])


def test_given_tokens_take_the_place_of_the_own() -> None:
    model = fused(FusionConfig(head_dim=8, source="given", token_dim=6))
    frames = [torch.randn(5, 6, dtype=torch.float64), None]
    with pytest.raises(InputError, match="no geometry tokens for the images"):
        hidden_of(model, [ASKED])
    with model.given_frames.use(frames):
        one = hidden_of(model, [ASKED])
    with model.given_frames.use(frames):
        sequence, inputs = sequence_builder(model.config).build([ASKED]), pack_inputs([ASKED])
        semantic, _ = model.embed_semantic(sequence, inputs["pixel_values"], inputs["image_grid_thw"])
    merged = model.encode_images(inputs["pixel_values"], inputs["image_grid_thw"]).merged
    torch.testing.assert_close(semantic[sequence.image_slots][:4], model.fusion(merged[None, :4], frames[0][None])[0])
    assert torch.equal(semantic[sequence.image_slots][4:], merged[4:])
    with model.given_frames.use([None, None]):
        assert not torch.allclose(hidden_of(model, [ASKED]), one)


def test_no_gradient_reaches_the_source() -> None:
    model = fused()
    inputs = pack_inputs([ASKED])
    sequence = sequence_builder(model.config).build([ASKED])
    semantic, _ = model.embed_semantic(sequence, inputs["pixel_values"], inputs["image_grid_thw"], inputs["views"])
    semantic.square().sum().backward()
    reached = {name.split(".")[0] for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert reached == {"fusion", "semantic_encoder", "embed_tokens"}
    assert all(p.grad is not None for p in model.fusion.parameters())


def test_the_zero_start_answers_as_without_fusion() -> None:
    model = copy.deepcopy(chat_model())
    expected = hidden_of(model, [ASKED])
    model.add_fusion(FusionConfig(head_dim=8, init="zero"))
    assert torch.equal(hidden_of(model, [ASKED]), expected)


def test_taps_are_those_of_the_pass_that_answers() -> None:
    """The reconstruction that the fusion reads runs through the same blocks before it."""
    model = fused()
    inputs = pack_inputs([ASKED]) | {"sequence": sequence_builder(model.config).build([ASKED])}
    last = model.config.decoder.num_layers
    tapped = backbone_of(model)(inputs, Taps(hidden=(0, 1, last), attention=(1,)))
    index = inputs["sequence"].image_slots
    assert torch.equal(tapped.hidden[last][0], hidden_of(model, [ASKED])[index])
    assert [len(tapped.hidden[layer][0]) for layer in (0, 1)] == [len(index)] * 2
    assert len(tapped.queries[1].after_rotary[0]) == len(index)


# Answers.


@pytest.fixture(scope="module")
def talker() -> Pipeline:
    """The tiny preset, fused, with weights so large that every word and pixel counts."""
    model = talkative_model()
    torch.manual_seed(0)
    model.add_fusion(FusionConfig())
    for parameter in model.fusion.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return Pipeline(model, "fused")


@pytest.mark.parametrize(
    ("question", "geometry"),
    [
        ("Where is the chair?", "on"),
        ("Here <image> and there <image>: where is the chair?", "on"),
        ("Where is the chair?", "off"),
    ],
)
def test_asking_is_the_same_as_generate(talker: Pipeline, question: str, geometry) -> None:
    """One forward or several, the views before the images or with them."""
    inputs = talker.chat.processor(images=pictures(), text=question, geometry=geometry == "on")
    for cached in (True, False):
        expected = talker.model.generate(**inputs, max_new_tokens=4, do_sample=False, use_cache=cached)
        answer = talker.ask(pictures(), question, geometry, options=SHORT)
        assert answer.ids == tuple(expected[0].tolist())


def test_answers_depend_on_the_fusion(talker: Pipeline) -> None:
    questions = [f"Where is the {thing}?" for thing in ("chair", "table", "lamp")]
    fused_answers = [talker.ask(pictures(), question, options=SHORT).ids for question in questions]
    plain = Pipeline(talkative_model(), "plain")
    assert [plain.ask(pictures(), question, options=SHORT).ids for question in questions] != fused_answers
    again = talker.ask_many([(pictures(), question) for question in questions], options=SHORT)
    assert [answer.ids for answer in again] == fused_answers


def test_conversations_go_on(talker: Pipeline) -> None:
    context = talker.context(pictures())
    first = context.ask("What is in <image> and <image>?", SHORT)
    then = context.then("What is in <image> and <image>?", first).ask("And where?", SHORT)
    assert then.tokens == 4


def test_views_of_another_scene_must_be_as_many(talker: Pipeline) -> None:
    own, other = ([from_memory(p) for p in pictures(seed, count)] for seed, count in ((0, 2), (1, 3)))
    assert look(talker.chat, own, other[:2]).ask("Where?", SHORT).tokens == 4
    with pytest.raises(InputError, match="2 images and 3 views"):
        look(talker.chat, own, other)


# Configs and checkpoints.


def test_a_config_without_fusion_is_saved_as_ever(tmp_path: Path) -> None:
    config = G2VLMConfig.tiny()
    config.save_pretrained(tmp_path)
    assert "fusion" not in json.loads((tmp_path / "config.json").read_text())
    assert G2VLMConfig.from_pretrained(tmp_path).fusion is None
    assert "fusion" not in config.to_diff_dict()


def test_fusion_survives_a_folder(tmp_path: Path) -> None:
    wanted = FusionConfig(head_dim=32, init="zero", tokens="patches", layer=3, dropout=0)
    model = random_model(G2VLMConfig.tiny(fusion=wanted))
    torch.nn.init.normal_(model.fusion.output_norm.weight)
    save_model(model, tmp_path / "model")
    assert json.loads((tmp_path / "model" / "config.json").read_text())["fusion"]["tokens"] == "patches"
    loaded = load_model(tmp_path / "model")
    assert loaded.config.fusion == wanted
    assert model.state_dict().keys() == loaded.state_dict().keys()
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())
    images = [from_memory(p) for p in pictures()]
    answers = [look(Pipeline(m, "x").chat, images, images).ask("Where?", SHORT).ids for m in (model, loaded)]
    assert answers[0] == answers[1]


def test_random_fusion_starts_as_published() -> None:
    own = random_model(G2VLMConfig.tiny(fusion={})).fusion.state_dict()
    assert torch.equal(own["output_norm.weight"], torch.ones(128))
    assert own["query.weight"].abs().max() <= 128**-0.5
    assert not own["attention.q_proj.bias"].any()
    assert own["attention.q_proj.weight"].abs().max() <= (6 / 512) ** 0.5


@pytest.mark.parametrize(
    ("fusion", "message"),
    [
        ({"token": "all"}, "unknown config key fusion.token; did you mean fusion.tokens"),
        ({"head_dim": 48}, "fusion.head_dim 48 does not divide the image tokens' width 128"),
        ({"layer": 5}, "fusion.layer is 5; allowed: 1 to 4"),
    ],
)
def test_wrong_fusions_are_named(fusion: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        G2VLMConfig.tiny(fusion=fusion)
    with pytest.raises(InputError, match="unusable model config"):
        build_model({"preset": "tiny", "fusion": fusion}, 0)


def test_a_wrong_type_in_a_checkpoint_is_named(tmp_path: Path) -> None:
    save_model(random_model(G2VLMConfig.tiny(fusion={})), tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    values = json.loads(file.read_text())
    values["fusion"]["norm_out"] = "yes"
    file.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"fusion.norm_out is 'yes', not of type bool"):
        load_model(tmp_path / "model")


def test_a_run_can_train_the_fusion_alone() -> None:
    model = build_model({"preset": "tiny", "fusion": {"init": "zero"}}, 0)
    assert model.config.fusion == FusionConfig(init="zero")
    trained = set_trainable(model, {"fusion": 1.0})
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(trained["fusion"])
    assert set(trained["fusion"]) == {f"fusion.{name}" for name, _ in model.fusion.named_parameters()}
