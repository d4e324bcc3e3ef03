"""Positions, packing and masks of the released code, whatever the cases in the files."""

import json
from itertools import accumulate, groupby
from pathlib import Path

import pytest
import torch

from g2vlm.model.attention.splits import Split, SplitLayout
from g2vlm.sequence import (
    IGNORED,
    GeometryViews,
    PackedSequence,
    Sample,
    Segment,
    SemanticImage,
    SequenceBuilder,
    SpecialIds,
    Text,
    grid_positions,
)
from tests.g2vlm.packs import in_sequence
from tests.parity import golden

pytestmark = pytest.mark.parity
MARKS = SpecialIds(bos=-1, eos=-2, vision_start=-3, vision_end=-4)  # recognisable in the result


def family(name: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("path", golden.cases(f"mrope/{name}.json"))


def read(path: Path):
    return json.loads(path.read_text())


def rows(mask: torch.Tensor) -> list[str]:
    return ["".join(str(int(bit)) for bit in row) for row in mask]


@family("image_primitives")
def test_image_positions(path: Path) -> None:
    for case in read(path):
        times, height, width = case["grid_thw"]
        merge = case.get("merge", 1)
        positions = grid_positions(case["base"], height // merge, width // merge, range(times))
        assert positions.tolist() == case["position_ids"]
        assert int(positions.max() - positions.min()) == case["delta"]


def called(segment: dict) -> Segment:
    """The segment of one call of the released inference."""
    match segment["type"]:
        case "text":
            return Text((5,) * segment["n_tokens"])
        case "text_bos":
            return Text((MARKS.bos, *(5,) * segment["n_tokens"]))
        case "dino_block":
            return GeometryViews(((segment["grid_h"], segment["grid_w"]),) * segment["n_images"])
        case "vit":
            times, height, width = segment["grid_thw"]
            assert times == 1, "an image has one time step"
            return SemanticImage((height, width), segment.get("merge", 2))
    raise AssertionError(f"unknown segment {segment}")


@family("inference_sequences")
def test_inference_calls(path: Path) -> None:
    """Each call's tokens, appended to those before, have the recorded positions and see what the call could see."""
    for calls in read(path).values():
        segments = [called(call["segment"]) for call in calls]
        for count, call in enumerate(calls, start=1):
            packed = SequenceBuilder(MARKS).build([segments[:count]])
            own = call["n_tokens"]
            before = packed.num_tokens - own
            assert packed.num_tokens == call["kv_len_after"]
            assert packed.next_positions == (call["next_position"],)
            assert packed.position_ids[:, packed.order][:, before:].tolist() == call["position_ids"]
            mask = in_sequence(packed)
            square = torch.ones(own, own, dtype=torch.bool)
            assert mask[before:, before:].equal(square.tril() if call["causal_within_segment"] else square)
            assert mask[before:, :before].all()
            assert not mask[:before, before:].any()


def planned(items: list[dict]) -> Sample:
    """The segments of one training sample; consecutive views are one segment."""
    sample = []
    for kind, group in groupby(items, key=lambda item: item["type"]):
        if kind == "dino":
            sample.append(GeometryViews(tuple((item["grid"][0], item["grid"][1]) for item in group)))
        elif kind == "vit":
            sample += [
                SemanticImage((item["grid_thw"][1], item["grid_thw"][2]), item.get("merge", 2)) for item in group
            ]
        else:
            sample += [Text(tuple(item["ids"]), supervised=bool(item.get("loss"))) for item in group]
    return sample


@pytest.fixture
def builder() -> SequenceBuilder:
    return SequenceBuilder(MARKS, geometry_attention="block_causal")


@family("training_packing")
def test_packed_ids_and_slots(path: Path, builder: SequenceBuilder) -> None:
    for case in read(path).values():
        packed = builder.build([planned(items) for items in case["samples"]])
        is_text = torch.ones(packed.semantic_ids.shape[0], dtype=torch.bool)
        is_text[packed.image_slots] = False
        text = is_text.nonzero().flatten()
        semantic_positions = packed.inverse_order[packed.num_geometry :]
        assert semantic_positions[text].tolist() == case["packed_text_indexes"]
        assert semantic_positions[packed.image_slots].tolist() == case["packed_vit_token_indexes"]
        assert packed.inverse_order[: packed.num_geometry].tolist() == case["packed_dino_token_indexes"]
        same_ids(packed.semantic_ids[text].tolist(), case["packed_text_ids"])


def same_ids(ours: list[int], theirs: list[int]) -> None:
    """Equal ids, where each of our marks stands for one id of theirs."""
    assert len(ours) == len(theirs)
    meaning = {mark: mine for mark, mine in zip(ours, theirs, strict=True) if mark < 0}
    assert len(set(meaning.values())) == len(meaning), "two special tokens became one"
    assert [meaning.get(token, token) for token in ours] == theirs


@family("training_packing")
def test_packed_positions_and_splits(path: Path, builder: SequenceBuilder) -> None:
    for case in read(path).values():
        packed = builder.build([planned(items) for items in case["samples"]])
        assert packed.position_ids[:, packed.order].tolist() == case["position_ids"]
        assert [split.stop - split.start for split in packed.splits.splits] == case["split_lens"]
        assert [split.mode for split in packed.splits.splits] == case["attn_modes"]
        lengths = [geometry[1] - geometry[0] + text[1] - text[0] for geometry, text in packed.sample_ranges]
        assert lengths == case["sample_lens"]
        assert views_per_sample(packed) == case["img_per_seq_lens"]
        assert rows(in_sequence(packed)) == case["attend_rows"]


def views_per_sample(packed: PackedSequence) -> list[int]:
    counts = [0] * len(packed.sample_ranges)
    for sample, views in zip(packed.group_samples, packed.views_per_group, strict=True):
        counts[sample] += views
    return counts


@family("training_packing")
def test_packed_labels(path: Path, builder: SequenceBuilder) -> None:
    for case in read(path).values():
        packed = builder.build([planned(items) for items in case["samples"]])
        with_loss = (packed.labels != IGNORED).nonzero().flatten()
        assert packed.inverse_order[packed.num_geometry :][with_loss].tolist() == case["ce_loss_indexes"]
        same_ids(packed.labels[with_loss].tolist(), case["packed_label_ids"])
        expected = torch.zeros_like(packed.label_weights)
        expected[with_loss] = torch.tensor(case["ce_loss_weights"])
        assert packed.label_weights.equal(expected)


@family("mask_modes")
def test_mask_modes(path: Path) -> None:
    for case in read(path).values():
        ends = list(accumulate(case["split_lens"]))
        documents = list(accumulate(case["document_lens"]))
        splits = tuple(
            Split(end - size, end, mode, sample=sum(end > document for document in documents))
            for end, size, mode in zip(ends, case["split_lens"], case["attn_modes"], strict=True)
        )
        assert rows(SplitLayout(splits).plan().mask()) == case["attend_rows"]
