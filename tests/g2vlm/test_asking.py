"""Questions about images: answers that need no company, geometry of the same pass, and what is refused."""

import copy
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from g2vlm import generation
from g2vlm.asking import look
from g2vlm.chat_model import ChatModel, image_costs, never_answered, processor_of
from g2vlm.checkpoint import load_model, save_model
from g2vlm.errors import CheckpointError, InputError
from g2vlm.images import from_memory
from g2vlm.model.g2vlm import G2VLMForConditionalGeneration
from g2vlm.pipeline import Pipeline
from g2vlm.prompts import chat_segments, next_turn
from g2vlm.sampling import GenerationOptions
from g2vlm.scene import Scene
from g2vlm.sequence import GeometryViews, SemanticImage, Text, segment_length
from tests.g2vlm.talkative import talkative_model
from tests.parity import golden

SHORT = GenerationOptions(max_new_tokens=4)
SHORTER = GenerationOptions(max_new_tokens=3)
WHERE = "Where is the chair?"


@pytest.fixture(scope="module")
def model() -> G2VLMForConditionalGeneration:
    return talkative_model()


@pytest.fixture
def pipeline(model: G2VLMForConditionalGeneration) -> Pipeline:
    return Pipeline(model, "sensitive")


def pictures(seed: int = 0, count: int = 2) -> list[np.ndarray]:
    random_numbers = np.random.default_rng(seed)
    return [random_numbers.integers(0, 256, (30, 45, 3), dtype=np.uint8) for _ in range(count)]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for index, pixels in enumerate(pictures()):
        Image.fromarray(pixels).save(folder / f"{index}.png")
    return folder


THINGS = ["chair", "table", "lamp", "bed", "door", "sofa", "plant", "rug", "stool", "box"]
QUESTIONS = [
    pattern.format(thing)
    for thing in THINGS
    for pattern in (
        "How many {}s?",
        "<image> and <image>: {}?",
        "Where is {}?",
        "<image> {} <image>?",
        "Is the {} red?",
    )
]


def test_fifty_questions_need_no_company(model: G2VLMForConditionalGeneration, pipeline: Pipeline) -> None:
    """Alone in a fresh pipeline, in batches of any size, in any order: the same tokens."""
    images = pictures()
    alone = [Pipeline(copy.deepcopy(model), "fresh").ask(images, q, options=SHORTER).ids for q in QUESTIONS]
    assert len(set(alone)) > 15
    for batch_size in (1, 3, 7):
        together = pipeline.ask_many([(images, q) for q in QUESTIONS], batch_size, options=SHORTER)
        assert [answer.ids for answer in together] == alone
    order = random.Random(0).sample(range(50), 50)
    shuffled = pipeline.ask_many([(images, QUESTIONS[i]) for i in order], options=SHORTER)
    assert [answer.ids for answer in shuffled] == [alone[i] for i in order]


CASES = {
    "views and images": (WHERE, "on"),
    "interleaved": ("Here <image> and there <image>: where is the chair?", "on"),
    "images": (WHERE, "off"),
    "interleaved images": ("<image><image> again, and nothing else", "off"),
}


@pytest.mark.parametrize("case", CASES)
def test_the_same_as_generate(case: str, pipeline: Pipeline) -> None:
    """Processor and transformers' generate, in one sequence and another loop."""
    question, geometry = CASES[case]
    inputs = pipeline.chat.processor(images=pictures(), text=question, geometry=geometry == "on")
    expected = pipeline.model.generate(**inputs, max_new_tokens=4, do_sample=False)
    answer = pipeline.ask(pictures(), question, geometry, options=SHORT)
    assert answer.ids == tuple(expected[0].tolist())
    assert (answer.tokens, answer.finish, answer.question) == (4, "length", question)
    assert answer.text == pipeline.chat.tokenizer.decode(answer.ids)


def test_about_nothing(pipeline: Pipeline) -> None:
    expected = pipeline.model.generate(**pipeline.chat.processor(text=WHERE), max_new_tokens=4, do_sample=False)
    assert pipeline.ask(None, WHERE, options=SHORT).ids == tuple(expected[0].tolist())


@pytest.mark.parametrize("question", [WHERE, "Here <image> and there <image>: where?"])
def test_geometry_of_the_same_pass(question: str, pipeline: Pipeline) -> None:
    answer = pipeline.ask(pictures(), question, return_geometry=True, options=SHORT)
    plain = pipeline.ask(pictures(), question, options=SHORT)
    assert (answer.ids, plain.scene) == (plain.ids, None)
    with torch.inference_mode():
        (expected,) = pipeline.model(**pipeline.chat.processor(images=pictures(), text=question)).geometry
    scene = answer.scene
    assert scene is not None
    np.testing.assert_allclose(scene.local_points, expected.local_points, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(scene.cam_to_world, expected.cam_to_world, atol=1e-4)
    np.testing.assert_allclose(scene.images, pipeline.reconstruct(pictures()).images)
    assert scene.original_sizes == ((30, 45), (30, 45))


def test_geometry_is_what_the_views_show(pipeline: Pipeline) -> None:
    """With it, without it, with the views of another scene: three answers."""
    own, other = ([from_memory(pixels) for pixels in pictures(seed)] for seed in (0, 1))
    on, off = (pipeline.context(pictures(), geometry).ask(WHERE, SHORT).ids for geometry in ("on", "off"))
    shuffled = look(pipeline.chat, own, other).ask(WHERE, SHORT).ids
    assert len({on, off, shuffled}) == 3
    assert look(pipeline.chat, own, own).ask(WHERE, SHORT).ids == on


def test_a_scene_gives_its_photographs(photos: Path, pipeline: Pipeline, tmp_path: Path, monkeypatch) -> None:
    scene = pipeline.reconstruct(photos, width=56)
    expected = pipeline.ask(photos, WHERE, options=SHORT, width=56).ids
    assert pipeline.ask(photos, WHERE, options=SHORT).ids != expected
    scene.save(tmp_path / "scene")
    loaded = Scene.load(tmp_path / "scene")
    assert pipeline.ask(loaded, WHERE, options=SHORT).ids == expected
    monkeypatch.setattr("g2vlm.images.read_image", lambda *_: pytest.fail("photographs are read again"))
    assert pipeline.ask(scene, WHERE, options=SHORT).ids == expected


def test_photographs_that_nobody_kept(pipeline: Pipeline, tmp_path: Path) -> None:
    pipeline.reconstruct(pictures()).save(tmp_path / "scene")
    with pytest.raises(InputError, match="2 of its 2 images were given in memory"):
        pipeline.ask(Scene.load(tmp_path / "scene"), WHERE)


def test_neighbours_share_one_pass(pipeline: Pipeline, monkeypatch) -> None:
    seen, prefill = [], generation.prefill
    monkeypatch.setattr(generation, "prefill", lambda *args, **rest: seen.append(1) or prefill(*args, **rest))
    items = [(pictures(seed), question) for seed in (0, 1) for question in ("How many?", WHERE, "Why?")]
    assert len(list(pipeline.ask_many(iter(items), 2, options=SHORT))) == 6
    assert len(seen) == 2
    assert list(pipeline.ask_many([])) == []
    assert pipeline.context(pictures()).ask_all([]) == []


def test_images_that_change_in_memory_or_can_be_read_once(pipeline: Pipeline) -> None:
    def items() -> Iterator:
        buffer = np.zeros((30, 45, 3), np.uint8)
        for seed in (0, 1, 1):
            buffer[:] = pictures(seed)[0]
            yield (image for image in [buffer]), WHERE

    expected = [pipeline.ask(pictures(seed)[0], WHERE, options=SHORT).ids for seed in (0, 1, 1)]
    assert expected[0] != expected[1]
    assert [answer.ids for answer in pipeline.ask_many(items(), options=SHORT)] == expected


def test_streams_tell_the_texts(pipeline: Pipeline) -> None:
    items = [(pictures(seed), question) for seed in (0, 1) for question in (WHERE, "<image> with <image>?", "How?")]
    heard = [""] * len(items)

    def stream(index: int, piece: str) -> None:
        heard[index] += piece

    answers = list(pipeline.ask_many(items, 2, options=SHORT, stream=stream))
    assert heard == [answer.text for answer in answers]


# ---------------------------------------------------------------------------------------------- conversations


def test_a_conversation_is_one_sequence(pipeline: Pipeline) -> None:
    """Turn after turn over cached keys, or everything that was said in one forward."""
    context, chat = pipeline.context(pictures(), "off"), pipeline.chat
    images = context.images
    assert images is not None
    before, shown = chat_segments(chat.tokenizer, [])[:1], images.segments
    for question in ("Where is the chair?", "And the table?", "Why?"):
        answer = context.ask(question, SHORT)
        segments = [*before, *chat_segments(chat.tokenizer, [*shown, question])[1:]]
        pixels = (images.pixel_values, images.grid_thw)
        (expected,) = generation.answer_pack(pipeline.model, [segments], (), *pixels, SHORT)
        assert answer.ids == expected.ids
        context = context.then(question, answer)
        before, shown = [*segments, *next_turn(chat.tokenizer, answer.ids)], ()


def test_turns_follow_the_chat_template(pipeline: Pipeline) -> None:
    tokenizer = pipeline.chat.tokenizer
    words = [("user", "How many chairs?"), ("assistant", "12"), ("user", "How many tables?")]
    messages = [{"role": role, "content": text} for role, text in words]
    expected = tokenizer.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    first, second = (chat_segments(tokenizer, [text]) for text in ("How many chairs?", "How many tables?"))
    segments = [*first, *next_turn(tokenizer, tokenizer.encode("12")), *second[1:]]
    assert [token for segment in segments if isinstance(segment, Text) for token in segment.ids] == expected


def test_asking_changes_nothing(pipeline: Pipeline) -> None:
    context = pipeline.context(pictures())
    first = context.ask(WHERE, SHORT)
    later = context.then(WHERE, first)
    follow_up = later.ask("Why?", SHORT).ids
    assert context.ask("Why?", SHORT).ids != follow_up
    assert context.ask(WHERE, SHORT).ids == first.ids
    assert later.ask("Why?", SHORT).ids == follow_up
    with pytest.raises(InputError, match="1 <image>, and there are 0 images"):
        later.ask("What about <image>?")


# ---------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("question", ["", " \n", "<image><image>", "<image> <image>"])
def test_empty_questions(question: str, pipeline: Pipeline) -> None:
    with pytest.raises(InputError, match="the question is empty"):
        pipeline.ask(pictures(), question)


@pytest.mark.parametrize("question", ["<image> what?", "<image> <image> <image> what?"])
def test_wrong_number_of_places(question: str, pipeline: Pipeline) -> None:
    with pytest.raises(InputError, match=rf"has {question.count('<')} <image>, and there are 2 images"):
        pipeline.ask(pictures(), question)


def test_missing_and_broken_images(pipeline: Pipeline, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no images given"):
        pipeline.ask([], WHERE)
    with pytest.raises(InputError, match=r"absent\.png"):
        pipeline.ask(tmp_path / "absent.png", WHERE)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    with pytest.raises(InputError, match=r"cannot read image .*broken\.png"):
        pipeline.ask(tmp_path / "broken.png", WHERE)


def test_geometry_that_cannot_be_had(pipeline: Pipeline) -> None:
    with pytest.raises(InputError, match="geometry is 'maybe'"):
        pipeline.ask(pictures(), WHERE, geometry="maybe")  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match="geometry is off"):
        pipeline.ask(pictures(), WHERE, geometry="off", return_geometry=True)
    with pytest.raises(InputError, match="there are no images"):
        pipeline.ask(None, WHERE, return_geometry=True)


@pytest.mark.parametrize("geometry", ["on", "off"])
def test_too_many_images(geometry, model: G2VLMForConditionalGeneration) -> None:
    """The number that is said to fit fits, and one more does not."""
    pipeline = Pipeline(model, "small context", max_context=400)
    with pytest.raises(InputError, match="50 images do not fit into the context") as refused:
        pipeline.context(pictures(count=50), geometry)
    fitting = int(refused.value.fix.split()[2])
    assert fitting > 1
    context = pipeline.context(pictures(count=fitting), geometry)
    with pytest.raises(InputError, match=f"{fitting + 1} images do not fit"):
        pipeline.context(pictures(count=fitting + 1), geometry)
    with pytest.raises(InputError, match=f"(?s){fitting} images do not fit.*with 300 for the answer") as refused:
        context.ask(WHERE, GenerationOptions(max_new_tokens=300))
    assert int(refused.value.fix.split()[2]) < fitting


@pytest.mark.parametrize("geometry", ["on", "off"])
def test_the_last_token_of_the_context(geometry, model: G2VLMForConditionalGeneration) -> None:
    """Three images and an answer of one token fill a context exactly; one token less is too little."""
    context = Pipeline(model, "roomy").context(pictures(count=3), geometry)
    assert context.images is not None
    exactly = sum(map(segment_length, (*context.opening, *context.images.segments))) + 1
    Pipeline(model, "full", max_context=exactly).context(pictures(count=3), geometry)
    for count, room in ((4, exactly), (3, exactly - 1)):
        with pytest.raises(InputError, match=f"at most {3 if room == exactly else 2} fit"):
            Pipeline(model, "too small", max_context=room).context(pictures(count=count), geometry)


def test_too_long_texts(model: G2VLMForConditionalGeneration) -> None:
    pipeline = Pipeline(model, "small context", max_context=60)
    with pytest.raises(InputError, match="the question does not fit"):
        pipeline.ask(None, "chair " * 60)
    context = pipeline.context(None)
    with pytest.raises(InputError, match="the conversation does not fit"):  # noqa: PT012
        for _ in range(10):
            context = context.then(WHERE, context.ask(WHERE, SHORT))


def test_costs_of_images() -> None:
    image, views = SemanticImage((4, 6)), GeometryViews(((2, 3), (2, 3)))
    assert image_costs([image, image, views, Text((1,))]) == [16, 16]
    assert image_costs([image]) == [8]
    assert image_costs([views]) == [8, 8]
    assert image_costs([Text((1,))]) == []


# ---------------------------------------------------------------------------------------------- models


def test_a_checkpoint_without_a_tokenizer() -> None:
    for case in golden.cases("g2vlm_*/outputs.safetensors"):
        if case.values[0] is not None:
            model = load_model(case.values[0].parent)
            with pytest.raises(CheckpointError, match="has no tokenizer, so it cannot be asked"):
                Pipeline(model, "golden").ask(None, WHERE)


def test_another_models_tokenizer(model: G2VLMForConditionalGeneration) -> None:
    other = load_model("tiny")
    other.config.tokens = type(other.config.tokens)(bos=5, eos=1, vision_start=2, vision_end=3)
    with pytest.raises(CheckpointError, match=r"<\|im_start\|> is 0, but 5 in the model"):
        ChatModel(other, "other", processor_of(model.config))


def test_damaged_processor(tmp_path: Path) -> None:
    save_model(load_model("tiny"), tmp_path / "model")
    (tmp_path / "model" / "processor_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="processor_config"):
        Pipeline(load_model(tmp_path / "model"), "damaged").ask(None, WHERE)


def test_a_saved_model_answers_the_same(model: G2VLMForConditionalGeneration, pipeline: Pipeline, tmp_path) -> None:
    save_model(model, tmp_path / "model")
    saved = Pipeline(load_model(tmp_path / "model"), "saved")
    assert saved.ask(pictures(), WHERE, options=SHORT).ids == pipeline.ask(pictures(), WHERE, options=SHORT).ids


def test_untrained_experts_are_told_once(model: G2VLMForConditionalGeneration, caplog) -> None:
    untrained = load_model("tiny")
    assert never_answered(untrained)
    assert not never_answered(model)
    pipeline = Pipeline(untrained, "fresh")
    for _ in range(2):
        pipeline.ask(None, WHERE, options=SHORT)
    assert caplog.text.count("fresh: the semantic expert was never trained, its answers mean nothing") == 1
