"""Probe tokens stand where they should, in every family, and change nothing before them."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from g2vlm.model.recorder import Recorder
from g2vlm.sequence import SemanticVideo, SequenceBuilder, segment_length
from g2vlm.supervision.backbones import Probes, Taps, backbone_of, split_frames
from g2vlm.supervision.segments import with_probes
from tests.g2vlm.packs import CHAT, IMAGES, SPECIAL, TEXT
from tests.g2vlm.stock import IMAGE
from tests.g2vlm.supervision.taps import (
    close,
    families,
    its_probes,
    of,
    probes_for,
    stock_families,
)
from tests.g2vlm.supervision.vlms import END, FAMILIES, OURS, QWEN, START, Family


@families
@torch.no_grad()
def test_one_frame(family: Family) -> None:
    """It is the first one and the last one."""
    backbone = backbone_of(family.model())
    sample = replace(family.samples[0], grids=family.grids[:1])
    probes = its_probes(family, backbone)
    tapped = backbone(family.inputs([sample], probes=(True, True)), Taps((0, 1), probes=probes))
    assert tapped.frames == ((family.grids[0],),)
    assert tapped.camera is not None
    assert tapped.scale is not None
    assert tapped.camera[0].shape == tapped.scale[0].shape == (1, backbone.width)
    assert split_frames(tapped.hidden[1][0], tapped.frames[0])[0].shape == (*family.grids[0], backbone.width)


@families
@torch.no_grad()
def test_probes_do_not_change_what_precedes_them(family: Family) -> None:
    """Logits up to a frame's last patch; our own images are seen whole, so there up to the first image."""
    model = family.model()
    backbone = backbone_of(model)
    probes = its_probes(family, backbone)
    for sample in family.samples:
        inputs = family.inputs([sample])
        plain = backbone(inputs).logits.flatten(0, -2)
        probed = backbone(family.inputs([sample], probes=(True, True)), Taps(probes=probes)).logits.flatten(0, -2)
        assert len(probed) == len(plain) + len(sample.grids) + 1
        if family.name in OURS:
            first = int(inputs["sequence"].image_slots[0]) - (family.name == "ours")
        else:
            first = int(backbone.locate(inputs).last_patches(0)[0]) + 1  # pyright: ignore
        close(probed[:first], plain[:first])
        assert (probed[-1] - plain[-1]).abs().max() > 1e-3


@families
@pytest.mark.parametrize(("camera", "scale"), [(True, True), (True, False), (False, True)])
@torch.no_grad()
def test_probe_embeddings_reach_their_places(family: Family, camera: bool, scale: bool) -> None:
    """Row by row: the first frame's camera token, the later ones', the scale token last."""
    model = family.model()
    backbone = backbone_of(model)
    probes = its_probes(family, backbone, camera, scale)
    inputs = family.inputs(family.samples, probes=(camera, scale))
    first_block = model.decoder.layers[0] if family.name in OURS else model.get_decoder().layers[0]
    norm = model.decoder.semantic_norm if family.name in OURS else model.get_decoder().norm
    with Recorder() as recorder:
        recorder.keep_inputs(first_block)
        recorder.keep_output(norm)
        tapped = backbone(inputs, Taps((0,), probes=probes))
        stream = recorder.argument(first_block, 1 if family.name in OURS else 0, "hidden_states")
        last_states = recorder.output(norm).flatten(0, -2)
    expected = [
        row
        for sample in family.samples
        for row in [
            *([probes.camera[min(i, 1)] for i in range(len(sample.grids))] if probes.camera is not None else []),
            *([probes.scale] if probes.scale is not None else []),
        ]
    ]
    rows = stream.flatten(0, -2)
    at = [(rows == row).all(-1).nonzero().flatten().tolist() for row in expected]
    assert all(at)
    counts = [len(sample.grids) * camera + scale for sample in family.samples]
    places = sorted({place for own in at for place in own})
    assert [int(torch.equal(rows[place], row)) for place, row in zip(places, expected, strict=True)] == [1] * sum(
        counts
    )
    for place, own, sample in zip(_starts(places, counts), tapped.hidden[0], family.samples, strict=True):
        last = own[-1] if not camera else split_frames(own, sample.grids)[0][-1, -1]
        assert torch.equal(rows[place - 1], last)
    assert (tapped.camera is None) == (not camera)
    assert (tapped.scale is None) == (not scale)
    nothing = [last_states[:0]] * len(counts)
    for own, cameras, scales in zip(torch.tensor(places).split(counts), tapped.camera or nothing,
                                    tapped.scale or nothing, strict=True):  # fmt: skip
        assert torch.equal(torch.cat([cameras, scales]), last_states[own])
        assert len(scales) == scale


def _starts(places: list[int], counts: list[int]) -> list[int]:
    """The first place of every sample's probe tokens."""
    return [places[sum(counts[:i])] for i in range(len(counts))]


@stock_families
@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize(("camera", "scale"), [(True, True), (True, False), (False, True)])
@torch.no_grad()
def test_positions_of_probes(family: Family, left: bool, camera: bool, scale: bool) -> None:
    """Those of the patch before them; every other token keeps its own, and its label; twice is once."""
    backbone: Any = backbone_of(family.model())
    probes = its_probes(family, backbone, camera, scale)
    inputs = family.inputs(family.samples, left)
    inputs["labels"] = inputs["input_ids"].clone()
    original = backbone.positions(inputs)
    mask = inputs["attention_mask"]
    expanded, visual = backbone.with_probes(inputs, probes)
    assert expanded["attention_mask"][:, -1 if left else 0].all()
    for i, sample in enumerate(family.samples):
        counts = [int(camera)] * len(sample.grids)
        counts[-1] += scale
        assert len(visual.probes[i]) == sum(counts)
        attended = expanded["attention_mask"][i].bool()
        keep = attended.clone()
        keep[visual.probes[i]] = False
        own = torch.ones_like(inputs["input_ids"][i]).bool() if mask is None else mask[i].bool()
        for name in ("input_ids", "labels", "mm_token_type_ids"):
            if name in inputs:
                assert torch.equal(expanded[name][i][keep], inputs[name][i][own])
        positions = expanded["position_ids"][..., i, :]
        assert torch.equal(positions[..., keep], original[..., i, own])
        at_probes = {"labels": -100, "attention_mask": 1, "mm_token_type_ids": 0}
        for name in at_probes.keys() & expanded.keys():
            assert (expanded[name][i, visual.probes[i]] == at_probes[name]).all()
        lasts = visual.last_patches(i)
        owners = lasts.repeat_interleave(torch.tensor(counts))
        assert torch.equal(positions[..., visual.probes[i]], positions[..., owners])
        following = [last + 1 + k for last, count in zip(lasts.tolist(), counts, strict=True) for k in range(count)]
        assert visual.probes[i].tolist() == following
        assert torch.equal(inputs["input_ids"][i][own].sort().values, expanded["input_ids"][i][keep].sort().values)
    again, same = backbone.with_probes(expanded, probes)
    assert again.keys() == expanded.keys()
    assert all(torch.equal(again[name], expanded[name]) for name in again if isinstance(again[name], Tensor))
    assert all(map(torch.equal, same.probes, visual.probes))
    with pytest.raises(ValueError, match="position_ids"):
        backbone.with_probes({**expanded, "position_ids": None}, probes)


@pytest.mark.parametrize(("camera", "scale"), [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("family", [f for f in FAMILIES if f.name in OURS], ids=lambda family: family.name)
def test_probes_in_our_sequences(family: Family, camera: bool, scale: bool) -> None:
    """They lie in the split of their image with its last position; without them the sequence is the old one."""
    plain = family.inputs(family.samples)["sequence"]
    sequence = family.inputs(family.samples, probes=(camera, scale))["sequence"]
    count = sum(len(sample.grids) * camera + scale for sample in family.samples)
    assert len(sequence.probe_slots) == count
    assert len(plain.probe_slots) == 0
    assert sequence.next_positions == plain.next_positions
    kept = torch.ones(sequence.num_tokens).bool()
    kept[sequence.probe_slots + sequence.num_geometry] = False
    assert torch.equal(sequence.position_ids[:, kept], plain.position_ids)
    semantic = kept[sequence.num_geometry :]
    assert torch.equal(sequence.labels[semantic], plain.labels)
    assert torch.equal(sequence.semantic_ids[semantic], plain.semantic_ids)
    assert (sequence.labels[~semantic] == -100).all()
    seen = sequence.plan.mask()
    for slot in (sequence.probe_slots + sequence.num_geometry).tolist():
        assert torch.equal(sequence.position_ids[:, slot], sequence.position_ids[:, slot - 1])
        assert seen[slot, slot - 1]
        assert bool(seen[slot - 1, slot]) == (family.name == "ours")
    assert torch.equal(seen[kept][:, kept], plain.plan.mask())
    again = [with_probes(with_probes(own, camera, scale), camera, scale) for own in ([*CHAT], [*IMAGES])]
    assert again == [with_probes(own, camera, scale) for own in (CHAT, IMAGES)]


def test_probes_of_samples_without_images() -> None:
    assert with_probes(TEXT, camera=True, scale=True) == TEXT


def test_probes_count_as_tokens() -> None:
    video = [SemanticVideo((4, 2), times=(0, 1, 3))]
    for sample in (CHAT, IMAGES, video):
        segments = with_probes(sample, camera=True, scale=True)
        lengths = [segment_length(segment) for segment in segments]
        assert SequenceBuilder(SPECIAL).build([segments]).num_tokens == sum(lengths)
    assert sum(map(segment_length, with_probes(video, camera=True, scale=True))) == segment_length(video[0]) + 4
    with pytest.raises(ValueError, match=r"probes is \(1, 1\) for 3 steps"):
        replace(video[0], probes=(1, 1))


@pytest.mark.parametrize("built", [None, (True, False)])
def test_our_sequences_hold_the_probes_that_are_asked_for(built: tuple[bool, bool] | None) -> None:
    family = next(family for family in FAMILIES if family.name == "ours")
    backbone = backbone_of(family.model())
    inputs = family.inputs(family.samples, probes=built)
    with pytest.raises(ValueError, match="probe tokens, the taps ask for"):
        backbone(inputs, Taps(probes=its_probes(family, backbone)))
    if built:
        with pytest.raises(ValueError, match="probe tokens, the taps ask for 0"):
            backbone(inputs)


@stock_families
def test_half_inserted_probes_are_refused(family: Family) -> None:
    _, backbone, inputs = of(family.name)
    probes = its_probes(family, backbone)
    expanded, visual = backbone.with_probes(inputs, probes)
    expanded["input_ids"][0, visual.probes[0][-1]] = 44
    with pytest.raises(ValueError, match="give it with all of them or with none"):
        backbone(expanded, Taps(probes=probes))


def test_padding_is_no_probe() -> None:
    """Even if it has the same id and follows a patch."""
    family, backbone, _ = of("qwen2_vl")
    inputs = family.inputs([replace(family.samples[0], grids=((1, 2),), after=())] * 2)
    ids = torch.tensor(
        [[20, START, IMAGE, IMAGE, backbone.probe_id, backbone.probe_id], [20, 21, START, IMAGE, IMAGE, END]]
    )
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1] * 6])
    inputs |= {"input_ids": ids, "attention_mask": mask, "mm_token_type_ids": (ids == IMAGE).int(), "labels": ids}
    probes = its_probes(family, backbone)
    expanded, visual = backbone.with_probes(inputs, probes)
    assert [own.tolist() for own in visual.probes] == [[4, 5], [5, 6]]
    assert expanded["attention_mask"].sum(1).tolist() == [6, 8]


def test_shared_positions_and_flash_attention_are_refused() -> None:
    """Where positions are one-dimensional; nothing is refused without probe tokens."""
    _, backbone, inputs = of("internvl")
    backbone.decoder.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="sdpa"):
        backbone.with_probes(inputs, probes_for(backbone.width))


@pytest.mark.parametrize("name", QWEN)
def test_rope_deltas_are_those_of_the_longer_sequence(name: str) -> None:
    """What is generated goes on at the position at which it would without probe tokens."""
    family, backbone, _ = of(name)
    for left in (False, True):
        inputs = family.inputs(family.samples, left)
        known = {key: value for key, value in inputs.items() if key not in ("labels", "pixel_values")}
        _, plain = backbone.model.model.get_rope_index(**known)
        _, visual = backbone.with_probes(inputs, its_probes(family, backbone))
        counts = torch.tensor([[len(own)] for own in visual.probes])
        assert torch.equal(backbone.model.model.rope_deltas, plain - counts)


@stock_families
@torch.no_grad()
def test_generation_after_probes(family: Family) -> None:
    """Each new token is the likeliest one of a whole forward over what is there."""
    backbone: Any = backbone_of(family.model())
    backbone.model.generation_config.eos_token_id = None
    backbone.model.generation_config.pad_token_id = 1
    probes = its_probes(family, backbone)
    for sample in family.samples:
        inputs = family.inputs([sample])
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        length = len(backbone.with_probes(inputs, probes)[0]["input_ids"][0])
        found = backbone.generate(inputs, probes, max_new_tokens=4, do_sample=False)[0, length:]
        for token in found:
            expected = backbone(inputs, Taps(probes=probes)).logits[0, -1].argmax()
            assert token == expected
            for name in ("input_ids", "attention_mask", "mm_token_type_ids", "labels"):
                if name in inputs:
                    added = {"input_ids": int(token), "attention_mask": 1}.get(name, 0)
                    inputs[name] = torch.nn.functional.pad(inputs[name], (0, 1), value=added)


@pytest.mark.parametrize(
    "arguments", [{}, {"camera": torch.zeros(3, 4)}, {"camera": torch.zeros(4)}, {"scale": torch.zeros(1, 4)}]
)
def test_probes_have_their_shapes(arguments: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match="Probes"):
        Probes(**arguments)
