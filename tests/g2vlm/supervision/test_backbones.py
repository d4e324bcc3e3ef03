"""Every backbone gives what its model computes, whatever the family, and changes nothing that nobody asked for."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from g2vlm.model import decoder as our_decoder
from g2vlm.model.recorder import Recorder
from g2vlm.supervision.backbones import Probes, Taps, backbone_of, clip, split_frames
from tests.g2vlm.stock import IMAGE
from tests.g2vlm.supervision.taps import (
    close,
    every_layer,
    families,
    hooks,
    its_probes,
    of,
    probes_for,
    scores,
    stock_families,
    the_models_own,
)
from tests.g2vlm.supervision.vlms import END, FAMILIES, OURS, START, Family
from train.trainable import checkpoint_activations


@families
@torch.no_grad()
def test_logits_are_the_models_own_to_the_bit(family: Family) -> None:
    model = family.model()
    backbone = backbone_of(model)
    inputs = family.inputs(family.samples)
    before = {name: value.clone() for name, value in inputs.items() if isinstance(value, Tensor)}
    expected = the_models_own(family, model, inputs)
    left_by_the_library = hooks(model)
    assert torch.equal(backbone(inputs, every_layer(backbone)).logits, expected)
    assert torch.equal(backbone(inputs).logits, expected)
    assert all(torch.equal(inputs[name], value) for name, value in before.items())
    assert hooks(model) == left_by_the_library


@families
@torch.no_grad()
def test_targets_belong_to_the_logits(family: Family) -> None:
    """The loss is the library's; probe tokens have none, and the words after them keep theirs."""
    model = family.model()
    backbone = backbone_of(model)
    inputs = family.inputs(family.samples)
    tapped = backbone(inputs)
    assert tapped.targets is not None
    assert tapped.targets.shape == tapped.logits.shape[:-1]
    if family.name in OURS:
        assert torch.equal(tapped.targets, inputs["sequence"].labels)
    else:
        close(cross_entropy(tapped.logits.flatten(0, -2), tapped.targets.flatten()), model(**inputs).loss)
    probed = backbone(family.inputs(family.samples, probes=(True, True)), Taps(probes=its_probes(family, backbone)))
    assert probed.targets is not None
    assert torch.equal(probed.targets[probed.targets != -100], tapped.targets[tapped.targets != -100])


@stock_families
@pytest.mark.parametrize("probed", [False, True], ids=["plain", "probes"])
@torch.no_grad()
def test_logits_of_answers_alone(family: Family, probed: bool) -> None:
    """Those of the whole forward at the tokens with a target, row by row."""
    backbone = backbone_of(family.model())
    inputs, taps = family.inputs(family.samples), Taps(probes=its_probes(family, backbone) if probed else None)
    whole, sparse = backbone(inputs, taps), backbone({**inputs, "logits_at_labels": True}, taps)
    assert torch.equal(sparse.targets, whole.targets[whole.targets != -100])
    assert torch.equal(sparse.targets, inputs["labels"][:, 1:][inputs["labels"][:, 1:] != -100])
    close(sparse.logits, whole.logits[whole.targets != -100])


@stock_families
@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@torch.no_grad()
def test_hidden_states_are_the_librarys(family: Family, left: bool) -> None:
    """At the placeholders; the last one after the norm, and before it on request."""
    model = family.model()
    backbone = backbone_of(model)
    inputs = family.inputs(family.samples, left)
    tapped = backbone(inputs, every_layer(backbone))
    known = {name: value for name, value in inputs.items() if name != "labels"}
    with Recorder() as recorder:
        recorder.keep_output(model.get_decoder().layers[-1])
        expected = model(**known, output_hidden_states=True).hidden_states
        before_norm = recorder.output(model.get_decoder().layers[-1])
    assert backbone.num_layers == len(expected) - 1
    assert backbone.width == expected[0].shape[-1]
    assert tapped.frames == tuple(sample.grids for sample in family.samples)
    visual = torch.isin(inputs["input_ids"], torch.tensor(list(backbone.media(inputs))))  # pyright: ignore
    for layer, states in enumerate(expected):
        for sample, own in enumerate(tapped.hidden[layer]):
            shown = states[sample][visual[sample]]
            assert torch.equal(own, shown[: len(own)])
            assert len(own) <= len(shown) <= len(own) + 1
    assert tapped.raw_last is not None
    norm = model.get_decoder().norm
    for sample, (raw, last) in enumerate(zip(tapped.raw_last, tapped.hidden[backbone.num_layers], strict=True)):
        assert torch.equal(raw, before_norm[sample][visual[sample]][: len(raw)])
        close(norm(raw), last)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f.name in OURS], ids=lambda family: family.name)
@torch.no_grad()
def test_hidden_states_of_our_model(family: Family) -> None:
    """Those of the semantic stream at the image slots, layer by layer."""
    model = family.model()
    backbone = backbone_of(model)
    inputs = family.inputs(family.samples)
    sequence = inputs["sequence"]
    tapped = backbone(inputs, every_layer(backbone))
    stream, added = model.embed_semantic(sequence, inputs["pixel_values"], inputs["image_grid_thw"])
    geometry = model.embed_views(inputs["views"])
    cos, sin = model.decoder._rotary(sequence.position_ids)
    expected = [stream]
    for i, layer in enumerate(model.decoder.layers):
        geometry, stream = layer(geometry, stream, cos, sin, sequence.plan, None)
        expected.append(stream)
        stream = stream + added[i] if i < len(added) else stream
    for layer, states in enumerate(expected[:-1]):
        assert torch.equal(torch.cat(tapped.hidden[layer]), states[sequence.image_slots])
    last = torch.cat(tapped.hidden[backbone.num_layers])
    assert torch.equal(last, model.decoder.semantic_norm(stream[sequence.image_slots]))
    assert torch.equal(torch.cat(tapped.raw_last or ()), expected[-1][sequence.image_slots])
    assert [len(own) for own in tapped.hidden[0]] == [sum(h * w for h, w in own.grids) for own in family.samples]


@families
@torch.no_grad()
def test_a_batch_gives_what_its_samples_give(family: Family) -> None:
    """With probe tokens, of different numbers, and padding on either side."""
    backbone = backbone_of(family.model())
    taps = every_layer(backbone, probes=its_probes(family, backbone))
    alone = [backbone(family.inputs([sample], probes=(True, True)), taps) for sample in family.samples]
    for left in (False, True):
        together = backbone(family.inputs(family.samples, left, (True, True)), taps)
        assert together.frames == tuple(own.frames[0] for own in alone)
        for i, own in enumerate(alone):
            for layer in taps.hidden:
                close(together.hidden[layer][i], own.hidden[layer][0])
            for block in taps.attention:
                close(together.queries[block].before_rotary[i], own.queries[block].before_rotary[0])
                close(together.keys[block].before_rotary[i], own.keys[block].before_rotary[0])
                close(scores(together, block, i), scores(own, block, 0))  # padding on the left may move all positions
            assert together.camera is not None
            assert own.camera is not None
            assert together.scale is not None
            assert own.scale is not None
            close(together.camera[i], own.camera[0])
            close(together.scale[i], own.scale[0])
            assert own.camera[0].shape == (len(own.frames[0]), backbone.width)
            assert own.scale[0].shape == (1, backbone.width)


@stock_families
@torch.no_grad()
def test_scores_of_queries_and_keys_are_the_eager_attentions(family: Family) -> None:
    """Over the keys that a query sees, log probabilities differ as scores do; before rotation, by query_projection."""
    model = family.model()
    model.set_attn_implementation("eager")
    backbone = backbone_of(model)
    for sample in family.samples:
        inputs = family.inputs([sample])
        tapped = backbone(inputs, every_layer(backbone))
        known = {name: value for name, value in inputs.items() if name != "labels"}
        attentions = model(**known, output_attentions=True).attentions
        places = backbone.locate(inputs).index[0]  # pyright: ignore
        for block in range(1, backbone.num_layers + 1):
            seen = torch.ones(len(places), len(places)).tril().bool()
            expected = attentions[block - 1][0][:, places][:, :, places]
            ours = scores(tapped, block, 0).masked_fill(~seen, -torch.inf).softmax(-1)
            torch.testing.assert_close(ours, expected / expected.sum(-1, keepdim=True), atol=1e-4, rtol=1e-3)
            assert not torch.equal(*(states[0] for states in tapped.queries[block]))


@families
@torch.no_grad()
def test_query_projection_gives_the_queries(family: Family) -> None:
    model = family.model()
    backbone = backbone_of(model)
    inputs = family.inputs(family.samples[:1])
    blocks = (1, backbone.num_layers)
    stream = [model.decoder.layers[b - 1].semantic.input_norm if family.name in OURS
              else model.get_decoder().layers[b - 1].input_layernorm for b in blocks]  # fmt: skip
    with Recorder() as recorder:
        for norm in stream:
            recorder.keep_inputs(norm)
        tapped = backbone(inputs, Taps(attention=blocks))
        given = [recorder.argument(norm, 0, "x") for norm in stream]
    for block, x in zip(blocks, given, strict=True):
        own = backbone.query_projection(block)
        rows = x[inputs["sequence"].image_slots] if family.name in OURS else x[0][backbone.locate(inputs).index[0]]  # pyright: ignore
        projected = nn.functional.linear(own.input_norm(rows), own.weight, own.bias)
        heads = tapped.queries[block].before_rotary[0]
        projected = projected.unflatten(-1, heads.shape[-2:])
        if family.name in OURS:
            projected = model.decoder.layers[block - 1].semantic.attention.q_norm(projected)
        elif hasattr(model.get_decoder().layers[block - 1].self_attn, "q_norm"):
            projected = model.get_decoder().layers[block - 1].self_attn.q_norm(projected)
        close(projected, heads)
        assert not own.weight.requires_grad


@pytest.mark.parametrize("family", [f for f in FAMILIES if f.name in OURS], ids=lambda family: family.name)
@torch.no_grad()
def test_queries_and_keys_of_our_model(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that the shared attention is given."""
    model = family.model()
    backbone = backbone_of(model)
    inputs = family.inputs(family.samples)
    given = []
    attend = our_decoder.attend
    monkeypatch.setattr(our_decoder, "attend", lambda q, k, *a, **b: (given.append((q, k)), attend(q, k, *a, **b))[1])
    tapped = backbone(inputs, every_layer(backbone))
    slots = inputs["sequence"].image_slots + inputs["sequence"].num_geometry
    for block, (q, k) in enumerate(given, start=1):
        assert torch.equal(torch.cat(tapped.queries[block].after_rotary), q[slots])
        assert torch.equal(torch.cat(tapped.keys[block].after_rotary), k[slots])


def trained_like(family: Family) -> tuple[Any, Any]:
    """A fresh copy of a family's model with a frozen vision tower, and its backbone."""
    model = copy.deepcopy(family.model()).train()
    model.requires_grad_(True)
    for parameter in tower(family, model).parameters():
        parameter.requires_grad_(False)
    return model, backbone_of(model)


def tower(family: Family, model: Any) -> nn.Module:
    if family.name in OURS:
        return model.semantic_encoder
    core = model.model
    return core.visual if hasattr(core, "visual") else core.vision_tower


def objective(tapped: Any, head: nn.Linear) -> Tensor:
    """Two layers, the probe tokens and the words."""
    states = [torch.cat(own) for own in tapped.hidden.values()]
    states += [torch.cat(tapped.camera), torch.cat(tapped.scale)]
    geometric = sum((head(own) - 1).square().mean() for own in states)
    targets = tapped.targets
    return geometric + cross_entropy(tapped.logits.flatten(0, -2), targets.flatten(), ignore_index=-100)


@families
def test_a_toy_training(family: Family) -> None:
    model, backbone = trained_like(family)
    dtype = torch.float64 if family.name in OURS else torch.float32
    head = nn.Linear(backbone.width, 3, dtype=dtype)
    given = its_probes(family, backbone)
    assert given.camera is not None
    assert given.scale is not None
    camera, scale = nn.Parameter(given.camera * 0.1), nn.Parameter(given.scale * 0.1)
    inputs = family.inputs(family.samples[:2], probes=(True, True))
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.Adam([*learned, *head.parameters(), camera, scale], lr=2e-3)
    taps = Taps((1, backbone.num_layers), probes=Probes(camera, scale))
    losses = []
    for _ in range(20):
        optimiser.zero_grad()
        loss = objective(backbone(inputs, taps), head)
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0], losses
    assert camera.grad is not None
    assert (camera.grad.abs().sum(-1) > 0).all()
    assert scale.grad is not None
    assert scale.grad.abs().sum() > 0
    block = model.decoder.layers[0].semantic if family.name in OURS else model.get_decoder().layers[0]
    assert all(parameter.grad is not None for parameter in block.parameters())
    assert all(parameter.grad is None for parameter in tower(family, model).parameters())


def recompute(family: Family, model: Any) -> None:
    """Gradient checkpointing, under the name that the installed transformers has for it."""
    if family.name in OURS:
        checkpoint_activations(model)
    else:
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()


@families
@pytest.mark.parametrize("recomputed", [False, True])
def test_every_tap_trains_what_makes_it(family: Family, recomputed: bool) -> None:
    """The first block's queries are made by their projection, everything after by the whole block."""
    model, backbone = trained_like(family)
    if recomputed:
        recompute(family, model)
    taps = every_layer(backbone, probes=its_probes(family, backbone))
    tapped = backbone(family.inputs(family.samples, probes=(True, True)), taps)
    block = (
        model.decoder.layers[0].semantic.attention if family.name in OURS else model.get_decoder().layers[0].self_attn
    )
    made = {
        "hidden": tapped.hidden[1], "last": tapped.hidden[backbone.num_layers], "raw": tapped.raw_last,
        "camera": tapped.camera, "scale": tapped.scale, "queries": tapped.queries[1].after_rotary,
        "before": tapped.queries[1].before_rotary,
    }  # fmt: skip
    for name, states in made.items():
        assert states is not None
        gradient = torch.autograd.grad(torch.cat(states).tanh().sum(), block.q_proj.weight, retain_graph=True)[0]
        assert gradient.abs().max() > 0, name


@families
def test_gradient_checkpointing_changes_no_gradient(family: Family) -> None:
    """The taps' own gradient included, of hidden states and of what is inside a block."""
    found = []
    for recomputed in (False, True):
        model, backbone = trained_like(family)
        if recomputed:
            recompute(family, model)
        probes = its_probes(family, backbone)
        tapped = backbone(family.inputs(family.samples, probes=(True, True)), every_layer(backbone, probes=probes))
        own = [*tapped.hidden.values(), *(kind for heads in tapped.queries.values() for kind in heads)]
        loss = sum(torch.cat(states).tanh().square().sum() for states in own) + tapped.logits.tanh().mean()
        loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        close(found[1][name], gradient)


@families
def test_what_cannot_be_answered_is_refused(family: Family) -> None:
    backbone = backbone_of(family.model())
    last = backbone.num_layers
    inputs = family.inputs(family.samples[:1])
    with pytest.raises(ValueError, match=rf"hidden asks for \[{last + 1}\].*0 to {last}"):
        backbone(inputs, Taps((last + 1,)))
    with pytest.raises(ValueError, match=r"attention asks for \[0\]"):
        backbone(inputs, Taps(attention=(0,)))
    with pytest.raises(ValueError, match="attention"):
        backbone.query_projection(0)


@stock_families
def test_placeholders_that_fit_no_frame_are_refused(family: Family) -> None:
    _, backbone, inputs = of(family.name)
    ids = inputs["input_ids"]
    visual = torch.isin(ids, torch.tensor(list(backbone.media(inputs))))
    without = {**inputs, "input_ids": ids.masked_fill(visual, 44)}
    with pytest.raises(ValueError, match="have no placeholders"):
        backbone(without)
    first = visual[0].nonzero()[0]
    cut = ids.clone()
    cut[0, first + 1] = 44
    with pytest.raises(ValueError, match="do not lie next to each other"):
        backbone({**inputs, "input_ids": cut})
    more = ids.clone()
    more[-1, -2:] = ids[0, first]
    with pytest.raises(ValueError, match=r"have no image or video|several tiles"):
        backbone({**inputs, "input_ids": more})
    with pytest.raises(ValueError, match="logits_to_keep"):
        backbone({**inputs, "logits_to_keep": 1})


def test_videos_whose_frames_are_merged_are_refused() -> None:
    _, backbone, inputs = of("qwen2_vl")
    inputs["pixel_values_videos"] = torch.randn_like(inputs["pixel_values_videos"])
    with pytest.raises(ValueError, match="mix 2 different frames"):
        backbone(inputs)


def test_images_without_modalities_are_refused() -> None:
    _, backbone, inputs = of("qwen2_5_vl")
    with pytest.raises(ValueError, match="mm_token_type_ids"):
        backbone({**inputs, "mm_token_type_ids": None})


def test_tiles_are_refused() -> None:
    _, backbone, inputs = of("internvl")
    inputs["input_ids"] = torch.tensor([[20, START, *[IMAGE] * 8, END, 30]])
    with pytest.raises(ValueError, match="several tiles"):
        backbone({**inputs, "attention_mask": None, "pixel_values": inputs["pixel_values"][:2]})
    _, backbone, inputs = of("llava_next_video")
    with pytest.raises(ValueError, match="video of one frame"):
        backbone({**inputs, "pixel_values": inputs["pixel_values_videos"]})


@stock_families
def test_samples_without_frames(family: Family) -> None:
    """Alone they are what they are; the embeddings get a gradient of zero, not none."""
    backbone = backbone_of(family.model())
    embeddings = its_probes(family, backbone)
    assert embeddings.camera is not None
    probes = Probes(embeddings.camera.requires_grad_(), embeddings.scale)
    ids = torch.tensor([[20, 21, 22, 30]])
    tapped = backbone({"input_ids": ids}, Taps((1,), probes=probes))
    with torch.no_grad():
        assert torch.equal(tapped.logits, backbone.model(input_ids=ids).logits)
    assert tapped.frames == ((),)
    assert tapped.camera is not None
    assert tapped.scale is not None
    assert tapped.camera[0].shape == tapped.scale[0].shape == tapped.hidden[1][0].shape == (0, backbone.width)
    tapped.logits.sum().backward()
    assert embeddings.camera.grad is not None
    assert not embeddings.camera.grad.any()
    if not family.one_length:
        mixed = family.inputs([replace(family.samples[0], grids=(), video=False), family.samples[0]])
        tapped = backbone(mixed, Taps(probes=probes))
        assert tapped.frames == ((), family.samples[0].grids)
        assert tapped.camera is not None
        assert [len(own) for own in tapped.camera] == [0, 3]


def test_unknown_models_are_refused() -> None:
    with pytest.raises(ValueError, match=r"no backbone adapter for 'Linear'.*qwen2_vl"):
        backbone_of(nn.Linear(2, 2))


def test_taps_of_several_objectives_are_united() -> None:
    probes = probes_for(4)
    united = Taps((3, 1), attention=(2,)) | Taps((2, 3), raw_last=True, attention=(1, 2), probes=probes)
    assert united == Taps((1, 2, 3), True, (1, 2), probes)
    assert (united | Taps(probes=probes)).probes is probes
    with pytest.raises(ValueError, match="one set"):
        _ = united | Taps(probes=probes_for(4))


def test_frames_of_flat_states() -> None:
    grids = ((2, 3), (1, 2), (2, 3))
    states = torch.arange(28.0).view(14, 2)
    parts = split_frames(states, grids)
    assert [part.shape for part in parts] == [(2, 3, 2), (1, 2, 2), (2, 3, 2)]
    assert torch.equal(parts[2][1, 0], states[11])
    assert clip(states[:12], (grids[0],) * 2).shape == (2, 2, 3, 2)
    with pytest.raises(ValueError, match="one size"):
        clip(states, grids)
