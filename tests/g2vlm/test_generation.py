"""Answers over a prefix: alone, in batches, again and again; and the same through transformers' own generate."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from g2vlm.errors import InputError
from g2vlm.generation import Answer, Prefix, answer, answer_pack, prefill
from g2vlm.processing import sequence_builder
from g2vlm.sampling import GenerationOptions, GrowingText, Sampler, probabilities
from g2vlm.sequence import Sample, SemanticImage, Text
from tests.g2vlm.chats import CHATS, HEADER, IMAGES, OTHER_VIEWS, VIEWS, VOCABULARY, chat_model, pack_inputs, pixels

SCENE: Sample = (HEADER, VIEWS, *IMAGES)
QUESTIONS = [[Text((20 + i % 7, 21, *range(4, 4 + i % 5)), False), Text((9,))] for i in range(20)]
TEN = GenerationOptions(max_new_tokens=10)
prefixes = pytest.mark.parametrize("segments", [SCENE, CHATS["images"], CHATS["text"]], ids=["scene", "images", "text"])


def scene(model, segments: Sample = SCENE, **options) -> Prefix:
    return prefill(model, segments, **pixels(segments).as_dict(), **options)


def reference(model, segments: Sample, question: Sequence[Text], steps: int) -> tuple[int, ...]:
    """Greedy ids from one whole forward per token, without any cache."""
    ids: list[int] = []
    builder = sequence_builder(model.config)
    for _ in range(steps):
        said = [Text(tuple(ids))] if ids else []
        sequence = builder.build([[*segments, *question, *said]])
        logits = model(
            sequence=sequence, logits_at=torch.tensor(sequence.last_tokens), **pixels(segments).as_dict()
        ).logits
        ids.append(int(logits.argmax()))
    return tuple(ids)


@prefixes
@torch.inference_mode()
def test_an_answer_equals_decoding_without_a_cache(segments: Sample) -> None:
    model = chat_model()
    (given,) = answer(model, scene(model, segments), QUESTIONS[3:4], TEN)
    assert given == Answer(reference(model, segments, QUESTIONS[3], 10), None, "length")


@prefixes
def test_a_batch_of_questions_equals_each_alone(segments: Sample) -> None:
    model = chat_model()
    prefix = scene(model, segments)
    alone = [answer(model, prefix, [question], TEN)[0] for question in QUESTIONS]
    assert answer(model, prefix, QUESTIONS, TEN) == alone
    assert answer(model, prefix, QUESTIONS, replace(TEN, batch_size=3)) == alone
    assert len({given.ids for given in alone}) > 5


def test_questions_over_one_prefix_equal_fresh_prefills() -> None:
    model = chat_model()
    prefix = scene(model)
    before = [tensor.clone() for layer in prefix.cache.layers for tensor in (layer.keys, layer.values)]
    again = [answer(model, prefix, [question], TEN) for question in QUESTIONS]
    fresh = [answer(model, scene(model), [question], TEN) for question in QUESTIONS]
    assert again == fresh
    after = [tensor for layer in prefix.cache.layers for tensor in (layer.keys, layer.values)]
    assert all(a.equal(b) for a, b in zip(before, after, strict=True))


def test_samples_of_a_pack_equal_their_own_prefixes() -> None:
    model = chat_model()
    samples = [[*CHATS["text"], *QUESTIONS[0]], [*SCENE, *QUESTIONS[1]], [*CHATS["images"], *QUESTIONS[2]]]
    alone = [answer(model, scene(model, s[:-1]), [s[-1:]], TEN)[0] for s in samples]
    assert answer_pack(model, samples, **pack_inputs(samples), options=TEN) == alone


def test_a_prefix_may_grow_by_anything() -> None:
    model = chat_model()
    one = prefill(model, [*SCENE, *QUESTIONS[0], OTHER_VIEWS], **pixels([*SCENE, OTHER_VIEWS]).as_dict())
    step = prefill(model, [*QUESTIONS[0], OTHER_VIEWS], **pixels([OTHER_VIEWS]).as_dict(), after=scene(model))
    assert answer(model, step, QUESTIONS[:4], TEN) == answer(model, one, QUESTIONS[:4], TEN)


def test_geometry_of_a_prefill_equals_the_reconstruction() -> None:
    model = chat_model()
    with_geometry, plain = scene(model, predict_geometry=True), scene(model)
    sequence = sequence_builder(model.config).build([SCENE])
    with torch.inference_mode():
        (expected,) = model(sequence=sequence, **pixels(SCENE).as_dict()).geometry
    assert plain.geometry is None
    assert with_geometry.geometry is not None
    (given,) = with_geometry.geometry
    assert given.local_points.equal(expected.local_points)
    assert given.cam_to_world.equal(expected.cam_to_world)
    assert answer(model, with_geometry, QUESTIONS, TEN) == answer(model, plain, QUESTIONS, TEN)


# Ends.


def with_eos(token: int):
    """The same model with another end of answers."""
    model = chat_model()
    model.config.tokens = replace(model.config.tokens, eos=token)
    return model


@pytest.fixture
def restored():
    tokens = chat_model().config.tokens
    yield
    chat_model().config.tokens = tokens


@pytest.mark.usefixtures("restored")
def test_each_row_ends_at_its_own_eos() -> None:
    free = answer(chat_model(), scene(chat_model()), QUESTIONS, TEN)
    eos = free[0].ids[4]
    model = with_eos(eos)
    ended = answer(model, scene(model), QUESTIONS, TEN)
    for before, after in zip(free, ended, strict=True):
        place = before.ids.index(eos) if eos in before.ids else 10
        assert after.ids == before.ids[:place]
        assert after.finish == ("eos" if place < 10 else "length")
    assert {given.finish for given in ended} == {"eos", "length"}
    assert answer(model, scene(model), QUESTIONS[:1], replace(TEN, max_new_tokens=1))[0].finish == "length"


def letters(ids: Sequence[int]) -> str:
    return "".join(chr(ord("A") + token) for token in ids)


def test_stop_strings_end_the_text() -> None:
    model = chat_model()
    prefix = scene(model)
    (free,) = answer(model, prefix, QUESTIONS[:1], TEN, letters)
    stop = free.text[3:5]
    place = free.text.index(stop)
    pieces: list[tuple[int, str]] = []
    (given,) = answer(
        model, prefix, QUESTIONS[:1], replace(TEN, stop=("~~", stop)), letters, lambda i, text: pieces.append((i, text))
    )
    assert given == Answer(free.ids[: place + 2], free.text[:place], "stop")
    assert "".join(text for _, text in pieces) == given.text


def test_streams_are_kept_apart_and_complete() -> None:
    model = chat_model()
    found: dict[int, list[str]] = {}
    options = replace(TEN, batch_size=2)
    given = answer(model, scene(model), QUESTIONS[:5], options, letters, lambda i, x: found.setdefault(i, []).append(x))
    assert ["".join(found[i]) for i in range(5)] == [one.text for one in given]
    assert all(len(pieces) == 10 for pieces in found.values())


def test_a_stream_shows_only_what_is_certain() -> None:
    growing = GrowingText(lambda ids: bytes(ids).decode("utf-8", errors="replace"), ("END", "é!"))
    said = b"a\xc3\xa9 EN EE"
    pieces = [growing.add(said[: i + 1]) for i in range(len(said))]
    assert pieces == ["a", "", "", "é ", "", "", "EN ", "", "E"]
    assert growing.rest() == "E"
    assert not growing.stopped
    assert growing.add(said + b"ND and more") == ""
    assert growing.text == "aé EN E"
    assert growing.stopped


# Sampling.


@pytest.mark.parametrize(
    "options",
    [
        GenerationOptions(temperature=0.7),
        GenerationOptions(temperature=1.3, top_k=5),
        GenerationOptions(temperature=1.0, top_p=0.6),
        GenerationOptions(temperature=0.9, top_k=7, top_p=0.8),
        GenerationOptions(temperature=0.5, top_k=1000, top_p=1e-9),
    ],
    ids=str,
)
def test_probabilities_equal_the_warpers_of_transformers(options: GenerationOptions) -> None:
    logits = torch.randn(6, VOCABULARY, dtype=torch.float64) * 3
    warpers = LogitsProcessorList([TemperatureLogitsWarper(options.temperature)])
    if options.top_k:
        warpers.append(TopKLogitsWarper(options.top_k))
    if options.top_p < 1:
        warpers.append(TopPLogitsWarper(options.top_p))
    given = probabilities(logits, options)
    expected = warpers(torch.empty(6, 0, dtype=torch.long), logits).softmax(dim=-1)  # pyright: ignore[reportArgumentType]
    torch.testing.assert_close(given / given.sum(dim=-1, keepdim=True), expected)


def test_sampling_follows_the_probabilities() -> None:
    logits = torch.tensor([[0.0, 1.0, -1.0, 2.0]])
    options = GenerationOptions(temperature=1.0, top_k=3, seed=3)
    sampler = Sampler(options)
    drawn = torch.cat([sampler(logits) for _ in range(4000)])
    frequencies = torch.bincount(drawn, minlength=4) / len(drawn)
    expected = probabilities(logits, options)[0]
    assert frequencies[2] == 0
    assert (frequencies - expected / expected.sum()).abs().max() < 0.03  # 4 sigma


def test_sampling_repeats_with_its_seed_whatever_else_is_asked() -> None:
    model = chat_model()
    prefix = scene(model)
    options = GenerationOptions(max_new_tokens=10, temperature=3.0, seed=5)
    given = answer(model, prefix, QUESTIONS, options)
    torch.manual_seed(99)
    assert answer(model, prefix, QUESTIONS[::-1], replace(options, batch_size=4))[::-1] == given
    assert answer(model, prefix, QUESTIONS, replace(options, seed=6)) != given


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_new_tokens": 0},
        {"temperature": -1.0},
        {"top_k": -1},
        {"top_p": 0.0},
        {"stop": "text"},
        {"stop": ("",)},
        {"batch_size": 0},
    ],
    ids=str,
)
def test_impossible_options_are_refused(wrong: dict) -> None:
    with pytest.raises(InputError, match=f"{next(iter(wrong))} is"):
        GenerationOptions(**wrong)


@pytest.mark.parametrize(
    ("question", "options", "message"),
    [
        ([], TEN, "question 1 cannot be answered"),
        ([SemanticImage((4, 4))], TEN, "question 1 cannot be answered"),
        ([Text((4,), supervised=True)], TEN, "question 1 cannot be answered"),
        ([Text((4,))], replace(TEN, stop=("x",)), "need text"),
    ],
)
def test_questions_that_cannot_be_answered_are_refused(question, options: GenerationOptions, message: str) -> None:
    model = chat_model()
    with pytest.raises(InputError, match=message):
        answer(model, prefill(model, [HEADER]), [[Text((4,))], question], options)


# transformers' own generate.

SAMPLES: list[Sample] = [(*SCENE, *QUESTIONS[0]), (*CHATS["text"], *QUESTIONS[1]), (*CHATS["images"], *QUESTIONS[2])]


def generate(model, samples: list[Sample], **options):
    sequence = sequence_builder(model.config).build(samples)
    return model.generate(sequence=sequence, **pack_inputs(samples), **options)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("samples", [SAMPLES[:1], SAMPLES], ids=["one", "pack"])
def test_generate_equals_our_loop(samples: list[Sample], use_cache: bool) -> None:
    model = chat_model()
    given = generate(model, samples, max_new_tokens=10, use_cache=use_cache)
    expected = answer_pack(model, samples, **pack_inputs(samples), options=TEN)
    assert given.tolist() == [list(one.ids) for one in expected]


def test_generate_pads_after_eos() -> None:
    model = chat_model()
    free = generate(model, SAMPLES, max_new_tokens=10)
    eos = int(free[0, 3])
    given = generate(model, SAMPLES, max_new_tokens=10, eos_token_id=eos, pad_token_id=0)
    for before, after in zip(free.tolist(), given.tolist(), strict=True):
        place = before.index(eos) + 1 if eos in before else len(after)
        assert after == before[:place] + [0] * (len(after) - place)


def test_generate_samples_by_seed() -> None:
    model = chat_model()
    options = {"max_new_tokens": 8, "do_sample": True, "temperature": 2.0, "top_k": 30, "num_return_sequences": 3}
    rows = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        rows.append(generate(model, SAMPLES, **options))
    assert rows[0].shape == (9, 8)
    assert rows[0].equal(rows[1])
    assert not rows[0].equal(rows[2])
    assert not rows[0][0].equal(rows[0][1])


def test_generate_repeats_the_context_of_each_sample() -> None:
    """Several sequences per sample, forced to be greedy, are the greedy one."""
    model = chat_model()
    options = {"max_new_tokens": 6, "do_sample": True, "top_k": 1, "num_return_sequences": 2}
    expected = generate(model, SAMPLES, max_new_tokens=6).repeat_interleave(2, dim=0)
    for use_cache in (True, False):
        assert generate(model, SAMPLES, use_cache=use_cache, **options).equal(expected)


def test_generate_returns_scores() -> None:
    model = chat_model()
    given = generate(
        model, SAMPLES, max_new_tokens=4, return_dict_in_generate=True, output_scores=True, output_logits=True
    )
    assert torch.stack(given.logits, dim=1).argmax(dim=-1).equal(given.sequences)
    assert len(given.scores) == 4


class Recorder:
    """A streamer that keeps what it is given."""

    def __init__(self) -> None:
        self.pieces: list[Tensor] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.pieces.append(value)

    def end(self) -> None:
        self.ended = True


def test_generate_streams() -> None:
    recorder = Recorder()
    given = generate(chat_model(), SAMPLES[:1], max_new_tokens=5, streamer=recorder)
    assert recorder.ended
    assert torch.cat([piece.flatten() for piece in recorder.pieces]).equal(given[0])


def test_generate_stops_at_strings() -> None:
    model = chat_model()
    free = generate(model, SAMPLES[:1], max_new_tokens=10)[0]
    vocabulary = {chr(ord("A") + token): token for token in range(VOCABULARY)}
    letter_by_letter = Tokenizer(BPE(vocabulary, []))
    letter_by_letter.decoder = decoders.Fuse()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=letter_by_letter)
    stop = letters([int(free[4])])
    given = generate(model, SAMPLES[:1], max_new_tokens=10, stop_strings=[stop], tokenizer=tokenizer)[0]
    assert given.equal(free[: free.tolist().index(int(free[4])) + 1])


def test_generate_knows_the_special_tokens(tmp_path) -> None:
    model = chat_model()
    assert model.generation_config.eos_token_id == model.config.tokens.eos
    model.save_pretrained(tmp_path)
    for remove in (False, True):
        if remove:
            (tmp_path / "generation_config.json").unlink(missing_ok=True)
        loaded = type(model).from_pretrained(tmp_path, dtype=torch.float64)
        assert loaded.generation_config.eos_token_id == model.config.tokens.eos
        assert generate(loaded, SAMPLES, max_new_tokens=4).equal(generate(model, SAMPLES, max_new_tokens=4))


def test_generate_refuses_what_it_cannot_do() -> None:
    model = chat_model()
    with pytest.raises(InputError, match="no sequence"):
        model.generate(max_new_tokens=3)
    with pytest.raises(InputError, match="no sequence"):
        model.generate(torch.ones(1, 3, dtype=torch.long), max_new_tokens=3)
    with pytest.raises(ValueError, match="only supports"):
        generate(model, SAMPLES, max_new_tokens=3, generation_config=GenerationConfig(num_beams=2))
    with pytest.raises(InputError, match="sharded"):
        generate(model, SAMPLES, max_new_tokens=3, synced_gpus=True)
