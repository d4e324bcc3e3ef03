import math
import random

import pytest
import torch

from g2vlm.model.attention.plan import AttnPlan
from g2vlm.sequence import (
    FILLER_ID,
    IGNORED,
    GeometryViews,
    PackedSequence,
    Sample,
    SampleRange,
    SemanticImage,
    SemanticVideo,
    SequenceBuilder,
    Text,
)
from tests.g2vlm.packs import (
    BUILDERS,
    CHAT,
    OTHER,
    PACKS,
    RECON,
    SPECIAL,
    in_sequence,
    random_pack,
    segment_mask,
    tokens,
)

SEEDS = range(200)
RECON_TOKENS = len(tokens([RECON]))
CACHED = BUILDERS["global-full"].build([RECON])
pack = pytest.mark.parametrize("samples", [pytest.param(samples, id=name) for name, samples in PACKS.items()])
builder_ = pytest.mark.parametrize("builder", [pytest.param(builder, id=name) for name, builder in BUILDERS.items()])


def joins(plan: AttnPlan, left: int) -> bool:
    """Whether blocks `left` and `left + 1` could be one: all rows alike, or each row one key longer than the last.

    Full blocks of one row, which views of one patch alone give, are left as they are.
    """
    first, second = plan.blocks[left : left + 2]
    if first.num_queries == second.num_queries == 1 and not first.causal and not second.causal:
        return False
    span = slice(plan.blocks[left].q_range[0], plan.blocks[left + 1].q_range[1])
    seen = plan.mask()[span]
    grown = seen[1:].int() - seen[:-1].int()
    full = not grown.any()
    causal = bool((grown >= 0).all()) and bool((grown.sum(dim=1) == 1).all())
    new = grown.argmax(dim=1)
    return full or (causal and bool((new.diff() == 1).all()))


@builder_
@pack
def test_plan_equals_the_rule_of_the_segments(builder: SequenceBuilder, samples: list[Sample]) -> None:
    packed = builder.build(samples)
    assert in_sequence(packed).equal(segment_mask(builder, samples))


@pytest.mark.parametrize("seed", SEEDS)
def test_random_packs(seed: int) -> None:
    builder, samples = random_pack(seed)
    packed = builder.build(samples)
    assert in_sequence(packed).equal(segment_mask(builder, samples))
    assert not any(joins(packed.plan, i) for i in range(len(packed.plan.blocks) - 1)), "blocks left to merge"
    check_tensors(packed, samples)


def check_tensors(packed: PackedSequence, samples: list[Sample]) -> None:
    """The tensors agree with the segments, whatever the options."""
    found = tokens(samples)
    segments = [segment for sample in samples for segment in sample]
    num_patches = sum(h * w for s in segments if isinstance(s, GeometryViews) for h, w in s.grids)
    num_slots = sum(math.prod(s.grid) // s.merge**2 for s in segments if isinstance(s, SemanticImage))
    num_labels = sum(len(s.ids) for s in segments if isinstance(s, Text) and s.supervised)
    assert packed.num_tokens == len(found) == packed.plan.num_queries == packed.plan.num_keys
    assert packed.num_geometry == num_patches
    assert packed.semantic_ids.shape == packed.labels.shape == packed.label_weights.shape == (len(found) - num_patches,)
    assert packed.image_slots.shape == (num_slots,)
    assert (packed.semantic_ids[packed.image_slots] == FILLER_ID).all()
    assert (packed.labels != IGNORED).sum() == num_labels
    assert packed.order[packed.inverse_order].equal(torch.arange(len(found)))
    assert packed.view_grids == tuple(s.grids for s in segments if isinstance(s, GeometryViews))
    assert packed.position_ids.shape == (3, len(found))
    check_samples(packed, [token.sample for token in found])


def check_samples(packed: PackedSequence, owners: list[int]) -> None:
    """Sample ranges select the sample's tokens, and its next position follows its largest one."""
    owner = torch.tensor(owners)[packed.inverse_order]
    geometry, semantic = owner[: packed.num_geometry], owner[packed.num_geometry :]
    for sample, (ranges, position) in enumerate(zip(packed.sample_ranges, packed.next_positions, strict=True)):
        for part, (start, stop) in zip((geometry, semantic), ranges, strict=True):
            assert (part == sample).nonzero().flatten().equal(torch.arange(start, stop))
        assert packed.position_ids[:, owner == sample].max() + 1 == position
        assert packed.position_ids[:, owner == sample].min() == 0


@pytest.mark.parametrize("name", ["recon", "chat", "images", "text", "views_only"])
def test_single_recon_and_chat_need_one_key_range_per_block(name: str) -> None:
    plan = BUILDERS["global-full"].build(PACKS[name]).plan
    assert all(len(block.key_ranges) == 1 for block in plan.blocks)


def test_recon_is_a_causal_prompt_and_two_unmasked_blocks() -> None:
    packed = BUILDERS["global-full"].build([RECON])
    total = packed.num_tokens
    assert [(block.key_ranges, block.causal) for block in packed.plan.blocks] == [
        (((0, total),), False),  # geometry tokens
        (((18, 21),), True),  # prompt
        (((0, total),), False),  # markers
    ]


def test_layout_puts_geometry_first() -> None:
    packed = BUILDERS["global-full"].build(
        [[Text((5, 6)), GeometryViews(((1, 2), (1, 1))), SemanticImage((2, 4))], [Text((7,))]]
    )
    assert packed.num_geometry == 3
    start, end = SPECIAL.vision_start, SPECIAL.vision_end
    assert packed.semantic_ids.tolist() == [5, 6, start, end, start, end, start, FILLER_ID, FILLER_ID, end, 7]
    assert packed.image_slots.tolist() == [7, 8]
    assert packed.inverse_order.tolist() == [3, 4, 7, 0, 1, 2, 5, 6, 8, 9, 10, 11, 12, 13]
    assert packed.view_grids == (((1, 2), (1, 1)),)
    assert packed.views_per_group == (2,)
    assert packed.group_samples == (0,)
    assert packed.sample_ranges == (SampleRange((0, 3), (0, 10)), SampleRange((3, 3), (10, 11)))


def test_labels_are_the_next_id_and_eos_is_last() -> None:
    packed = BUILDERS["global-full"].build([[Text((5, 6)), Text((7, 8, 9), supervised=True), Text((4,))]])
    eos, ignored = SPECIAL.eos, IGNORED
    assert packed.semantic_ids.tolist() == [5, 6, 7, 8, 9, eos, 4]
    assert packed.labels.tolist() == [ignored, ignored, 8, 9, eos, ignored, ignored]
    weight = 1 / math.sqrt(3)
    assert packed.label_weights.tolist() == pytest.approx([0, 0, weight, weight, weight, 0, 0])


def views_of(packed: PackedSequence) -> list[torch.Tensor]:
    """Positions of each view with its markers, in sequence order; the pack holds one text token before them."""
    positions = packed.position_ids[:, packed.order][:, 1:]
    sizes = [rows * columns + 2 for group in packed.view_grids for rows, columns in group]
    return list(positions[:, : sum(sizes)].split(sizes, dim=1))


def test_shared_positions_do_not_depend_on_the_order_of_views() -> None:
    builder = SequenceBuilder(SPECIAL, view_positions="shared")
    grids = ((2, 3), (4, 1), (1, 2))
    forward, backward = (
        builder.build([[Text((1,)), GeometryViews(order), Text((2,))]]) for order in (grids, grids[::-1])
    )
    assert all(a.equal(b) for a, b in zip(views_of(forward), views_of(backward)[::-1], strict=True))
    assert {int(view[0, 0]) for view in views_of(forward)} == {1}
    largest = builder.build([[Text((1,)), GeometryViews(((4, 1),)), Text((2,))]])
    assert forward.next_positions == backward.next_positions == largest.next_positions


def test_sequential_positions_continue_from_view_to_view() -> None:
    packed = BUILDERS["global-full"].build([[Text((1,)), GeometryViews(((2, 3), (4, 1)))]])
    first, second = views_of(packed)
    assert first[0].tolist() == [1, 2, 2, 2, 2, 2, 2, 5]
    assert second[1].tolist() == [6, 7, 8, 9, 10, 11]


def test_image_attention_changes_the_plan_alone() -> None:
    full, causal = (BUILDERS[f"global-{mode}"].build([CHAT]) for mode in ("full", "causal"))
    assert full.plan != causal.plan
    assert full.position_ids.equal(causal.position_ids)
    assert full.semantic_ids.equal(causal.semantic_ids)


def test_causal_images_and_text_are_one_block() -> None:
    assert len(BUILDERS["global-causal"].build(PACKS["images"]).plan.blocks) == 1


def identities(packed: PackedSequence, done: list[int], samples: list[Sample]) -> list[tuple[int, int]]:
    """(sample, index inside the sample) of every token in expert layout; `done` tokens of each sample came before."""
    found, seen = [], list(done)
    for token in tokens(samples):
        found.append((token.sample, seen[token.sample]))
        seen[token.sample] += 1
    return [found[i] for i in packed.inverse_order.tolist()]


@pytest.mark.parametrize("seed", SEEDS)
def test_continuations_equal_the_whole(seed: int) -> None:
    """Segments appended in several sequences see, and stand where, they would have in one."""
    builder, samples = random_pack(seed)
    whole = builder.build(samples)
    names = identities(whole, [0] * len(samples), samples)
    mask, positions = whole.plan.mask(), whole.position_ids
    rng = random.Random(seed)
    cuts = [sorted(rng.randint(1, len(sample)) for _ in range(2)) for sample in samples]
    stages = [[s[:a] for s, (a, _) in zip(samples, cuts, strict=True)]]
    stages += [[s[a:b] for s, (a, b) in zip(samples, cuts, strict=True)]]
    stages += [[s[b:] for s, (_, b) in zip(samples, cuts, strict=True)]]
    keys: list[int] = []
    done, packed = [0] * len(samples), None
    for stage in stages:
        packed = builder.extend(packed, stage) if packed else builder.build(stage)
        new = [names.index(name) for name in identities(packed, done, stage)]
        keys += new
        for token in tokens(stage):
            done[token.sample] += 1
        assert packed.plan.mask().equal(mask[new][:, keys])
        assert packed.position_ids.equal(positions[:, new])
        assert packed.num_keys == len(keys)
    assert packed.next_positions == whole.next_positions


@builder_
def test_several_questions_continue_one_prefix(builder: SequenceBuilder) -> None:
    """Each sees what it would see alone, and none sees another."""
    prefix = builder.build([OTHER])
    questions: list[Sample] = [[Text((1, 2, 3))], [SemanticImage((2, 2)), Text((4,))]]
    packed = builder.extend(prefix, questions, parents=[0, 0])
    alone = [builder.extend(prefix, [question]) for question in questions]
    assert packed.next_positions == tuple(single.next_positions[0] for single in alone)
    cached = prefix.num_keys
    for single, (_, (start, stop)) in zip(alone, packed.sample_ranges, strict=True):
        rows = packed.plan.mask()[start:stop]
        assert rows[:, :cached].equal(single.plan.mask()[:, :cached])
        assert rows[:, cached + start : cached + stop].equal(single.plan.mask()[:, cached:])
        assert rows.sum() == single.plan.mask().sum()


def test_a_decoded_token_is_one_block_over_its_sample() -> None:
    builder = BUILDERS["global-full"]
    packed = builder.build([CHAT])
    for _ in range(3):
        packed = builder.extend(packed, [[Text((1,))]])
        (block,) = packed.plan.blocks
        assert block.key_ranges == ((0, packed.num_keys),)


def test_last_tokens_are_where_the_next_is_predicted() -> None:
    packed = BUILDERS["global-full"].build([RECON, OTHER])
    last = [packed.num_geometry + index for index in packed.last_tokens]
    assert packed.order[[RECON_TOKENS - 1, packed.num_tokens - 1]].tolist() == last
    waiting = BUILDERS["global-full"].extend(packed, [[], [Text((1,))]])
    with pytest.raises(ValueError, match=r"samples \[0\] have no tokens"):
        _ = waiting.last_tokens


def test_to_moves_every_tensor() -> None:
    moved = BUILDERS["global-full"].build([CHAT]).to("meta")
    tensors = {name: value for name, value in vars(moved).items() if isinstance(value, torch.Tensor)}
    assert {value.device.type for value in tensors.values()} == {"meta"}
    assert len(tensors) == 8
    assert moved.plan == BUILDERS["global-full"].build([CHAT]).plan


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Text(()), "Text.ids is empty"),
        (lambda: GeometryViews(()), "GeometryViews.grids is empty"),
        (lambda: GeometryViews(((2, 0),)), "GeometryViews.grids"),
        (lambda: SemanticImage((2, 3)), "multiples of 2"),
        (lambda: BUILDERS["global-full"].build([]), "no samples"),
        (lambda: BUILDERS["global-full"].build([[Text((1,))], []]), "sample 1 has no segments"),
        (lambda: BUILDERS["global-full"].extend(CACHED, [[Text((1,))]] * 2), "2 samples continue"),
        (lambda: BUILDERS["global-full"].extend(CACHED, [[Text((1,))]], [1]), "sequence of 1"),
        (lambda: SequenceBuilder(SPECIAL, "local"), "global, block_causal, frame"),  # pyright: ignore[reportArgumentType]
        (lambda: SequenceBuilder(SPECIAL, view_positions="random"), "sequential, shared"),  # pyright: ignore[reportArgumentType]
    ],
)
def test_bad_input_is_refused(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_video_is_one_image_with_times() -> None:
    """Every step has its time; the end marker and the text follow the largest position of the three."""
    video = SemanticVideo((4, 6), (0, 2, 5))
    packed = SequenceBuilder(SPECIAL).build([[Text((9,)), video, Text((8,))]])
    assert packed.image_slots.tolist() == list(range(2, 20))
    times, rows, columns = packed.position_ids[:, packed.order].tolist()
    assert times == [0, 1, *[2] * 6, *[4] * 6, *[7] * 6, 8, 9]
    assert rows == [0, 1, *[2, 2, 2, 3, 3, 3] * 3, 8, 9]
    assert columns == [0, 1, *[2, 3, 4] * 6, 8, 9]
    full = packed.plan.mask()[1:21, 1:21]
    assert full.all()
    causal = SequenceBuilder(SPECIAL, semantic_image_attention="causal").build([[video]])
    assert causal.plan.mask().equal(torch.ones(20, 20, dtype=torch.bool).tril())
    flat = SequenceBuilder(SPECIAL).build([[SemanticVideo((4, 12), (0, 1)), Text((8,))]])
    assert flat.next_positions == (9,)


@pytest.mark.parametrize("times", [(), (1, 0), (-1, 0)])
def test_times_rise(times: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"SemanticVideo\.times"):
        SemanticVideo((2, 2), times)
