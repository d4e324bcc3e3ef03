from itertools import islice, pairwise

import pytest

from g2vlm.data.chat.batch import Filling
from g2vlm.errors import InputError
from tests.train.chats import Colours, stream
from train.packing import ChatMixture


def test_packs_take_items_in_order_until_the_next_would_not_fit() -> None:
    drawn = stream(Colours(), Colours(pictures=0, views=0, name="words"), tokens_per_pack=110)
    packs = list(islice(drawn.packs(), 8))
    assert [item.number for pack in packs for item in pack.items] == [*range(packs[-1].end)]
    lengths = {}
    for pack in packs:
        for item in pack.items:
            source = drawn.mixture.sources[item.source]
            lengths[item.number] = drawn.layout.num_tokens(source.shape(item.index, item.seed))
        assert pack.num_tokens == sum(lengths[item.number] for item in pack.items) <= 110
    for pack, after in pairwise(packs):
        assert pack.num_tokens + lengths[after.items[0].number] > 110
    assert len({len(pack.items) for pack in packs}) > 1
    assert {item.source for pack in packs for item in pack.items} == {0, 1}


def test_the_stream_goes_on_anywhere() -> None:
    packs = list(islice(stream().packs(), 7))
    assert list(islice(stream().packs(packs[2].end), 4)) == packs[3:]
    assert list(islice(stream(seed=1).packs(), 7)) != packs


@pytest.mark.parametrize("world", [1, 2, 3])
def test_any_world_size_takes_the_same_items(world: int) -> None:
    whole = list(islice(stream().packs(), 6))
    shares = [list(stream().plans(range(6 // world), 0, rank, world)) for rank in range(world)]
    dealt = [plan.items for step in zip(*shares, strict=True) for plan in step]
    assert dealt == [pack.items for pack in whole]
    for step, plans in enumerate(zip(*shares, strict=True)):
        assert {plan.end for plan in plans} == {whole[(step + 1) * world - 1].end}
        assert plans[0].facts["samples"] == sum(len(plan.items) for plan in plans)
        assert all(plan.facts == plans[0].facts and plan.filling == plans[0].filling for plan in plans)


def test_weights_choose_the_source() -> None:
    drawn = stream(Colours(), Colours(), weights=(3, 1))
    assert 0.18 < sum(drawn.item(i).source for i in range(400)) / 400 < 0.32
    assert {drawn.item(i).index for i in range(1000)} == set(range(40))
    with pytest.raises(InputError, match="no questions"):
        ChatMixture((), ())
    with pytest.raises(InputError, match="no questions"):
        ChatMixture((Colours(),), (-1.0,))


def test_unusable_items_are_passed_over_and_named_once() -> None:
    drawn = stream(Colours(hidden=frozenset(range(10))), Colours(pictures=12, name="long"), tokens_per_pack=110)
    packs = list(islice(drawn.packs(), 6))
    numbers = {item.number for pack in packs for item in pack.items}
    bad = [entry for pack in packs for entry in pack.bad]
    assert len(bad) + len(numbers) == packs[-1].end
    assert all(drawn.item(number).source == 0 for number in numbers)
    assert {entry.scene.split("/")[0] for entry in bad} == {"colours", "long"}
    assert all(("it is hidden" if "colours" in name else "does not fit") in reason for name, reason in bad)
    resumed = list(islice(drawn.packs(packs[1].end), 4))
    assert [pack.bad for pack in resumed] == [pack.bad for pack in packs[2:]]


def test_bad_items_are_told_by_one_rank() -> None:
    drawn = stream(Colours(hidden=frozenset(range(10))))
    told = [list(drawn.plans(range(3), 0, rank, 2)) for rank in range(2)]
    assert any(plan.bad for plan in told[0])
    assert not any(plan.bad for plan in told[1])


def test_views_of_another_size_are_refused() -> None:
    drawn = stream(Colours(size=(28, 42)), Colours(), weights=(1, 3))
    (pack,) = islice(drawn.packs(), 1)
    assert {item.source for item in pack.items} == {1}
    assert not pack.bad or "views of 42 x 28" in pack.bad[0].reason


def test_nothing_usable_is_an_error() -> None:
    with pytest.raises(InputError, match="in a row are unusable"):
        next(stream(Colours(hidden=frozenset(range(40)))).packs())


def test_ranks_fill_in_what_others_have() -> None:
    with_all, with_none = Colours(views=1), Colours(pictures=0, views=0)
    for alone in (False, True):
        drawn = stream(with_all, with_none, tokens_per_pack=60, scenes_alone=alone)
        plans = list(drawn.plans(range(12), 0, 0, 2))
        packs = list(islice(drawn.packs(), 24))
        for plan, one, other in zip(plans, packs[::2], packs[1::2], strict=True):
            most = max(one.num_scenes, other.num_scenes)
            images = one.num_images + other.num_images > 0
            assert plan.filling == Filling(most if alone else min(most, 1), images, (28, 28))
        assert len({(plan.filling.scenes, plan.filling.images) for plan in plans}) > 1
