"""The processor: which tokens and pixels a question with images becomes, and what it refuses."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoProcessor

from g2vlm.checkpoint import load_model
from g2vlm.config import G2VLMConfig
from g2vlm.errors import InputError
from g2vlm.images import from_memory, geometry_pixels
from g2vlm.processing import normalise_views, sequence_builder
from g2vlm.processor import G2VLMProcessor, ModelInputs, processor_fields
from g2vlm.prompts import RECON_PROMPT, ChatTokenizer, Part, chat_segments
from g2vlm.semantic_images import SemanticRule, semantic_grid, semantic_pixels
from g2vlm.sequence import GeometryViews, SemanticImage

RULE = SemanticRule.native(max_pixels=56 * 84)
QUESTION = "How many chairs are in this room?"


@pytest.fixture(scope="module")
def processor() -> G2VLMProcessor:
    return G2VLMProcessor.from_config(G2VLMConfig.tiny(), ChatTokenizer.embedded().tokenizer, RULE)


def pictures(count: int, height: int = 60, width: int = 80) -> list[np.ndarray]:
    return [np.random.default_rng(i).integers(0, 256, (height, width, 3), dtype=np.uint8) for i in range(count)]


def expect(inputs: ModelInputs, *questions: list[Part]) -> None:
    """The sequence is that of the parts."""
    built = sequence_builder(G2VLMConfig.tiny()).build([chat_segments(ChatTokenizer.embedded(), q) for q in questions])
    sequence = inputs["sequence"]
    assert sequence.semantic_ids.equal(built.semantic_ids)
    assert sequence.position_ids.equal(built.position_ids)
    assert sequence.view_grids == built.view_grids
    assert sequence.plan == built.plan


def view_pixels(images: list[np.ndarray]) -> Tensor:
    return normalise_views(torch.from_numpy(geometry_pixels([from_memory(image) for image in images], 84)))


def image_part(image: np.ndarray) -> SemanticImage:
    return SemanticImage(semantic_grid(image.shape[:2], RULE))


VIEWS = GeometryViews(((4, 6), (4, 6)))  # two views of 56 x 84


def test_images_stand_before_a_question_without_placeholders(processor: G2VLMProcessor) -> None:
    images = pictures(2)
    inputs = processor(images=images, text=QUESTION)
    expect(inputs, [RECON_PROMPT, VIEWS, *map(image_part, images), QUESTION])
    values, grids = semantic_pixels(images, RULE)
    assert inputs["pixel_values"].equal(torch.from_numpy(values))
    assert inputs["image_grid_thw"].equal(torch.from_numpy(grids))
    (views,) = inputs["views"]
    assert views.equal(view_pixels(images))


def test_images_stand_where_the_text_says(processor: G2VLMProcessor) -> None:
    one, two = pictures(1, 60, 60) + pictures(1, 30, 80)
    inputs = processor(images=[one, two], text="First <image>, then <image>: which is larger?", geometry=False)
    expect(inputs, ["First ", image_part(one), ", then ", image_part(two), ": which is larger?"])
    assert inputs["pixel_values"].equal(torch.from_numpy(semantic_pixels([one, two], RULE)[0]))
    assert inputs["views"] == []


def test_other_views_than_the_images(processor: G2VLMProcessor) -> None:
    image, *views = pictures(3)
    inputs = processor(images=image, text=QUESTION, views=views)
    expect(inputs, [RECON_PROMPT, VIEWS, image_part(image), QUESTION])
    assert inputs["views"][0].equal(view_pixels(views))
    only_views = processor(text=QUESTION, views=views)
    expect(only_views, [RECON_PROMPT, VIEWS, QUESTION])
    assert "pixel_values" not in only_views


def test_text_alone(processor: G2VLMProcessor) -> None:
    inputs = processor(text=QUESTION)
    expect(inputs, [QUESTION])
    assert set(inputs) == {"sequence", "views"}


def test_the_released_chat_has_no_sentence_before_the_views() -> None:
    fields = {**processor_fields(G2VLMConfig.tiny(), RULE), "views_prompt": ""}
    images = pictures(2)
    inputs = G2VLMProcessor(ChatTokenizer.embedded().tokenizer, **fields)(images=images, text=QUESTION)
    expect(inputs, [VIEWS, *map(image_part, images), QUESTION])


def test_several_questions_are_packed(processor: G2VLMProcessor) -> None:
    images = pictures(3)
    inputs = processor(text=["Where?", QUESTION, "Why?"], images=[images[:2], None, images[2]])
    expect(
        inputs,
        [RECON_PROMPT, VIEWS, *map(image_part, images[:2]), "Where?"],
        [QUESTION],
        [RECON_PROMPT, GeometryViews(((4, 6),)), image_part(images[2]), "Why?"],
    )
    assert [len(views) for views in inputs["views"]] == [2, 1]


def test_the_model_takes_what_the_processor_gives(processor: G2VLMProcessor) -> None:
    model = load_model("tiny")
    images = pictures(2)
    with torch.inference_mode():
        packed = model(**processor(text=["Where?", QUESTION], images=[images[0], images[1]]))
        alone = model(**processor(text=QUESTION, images=images[1]))
    assert len(packed.geometry) == 2
    count = len(alone.semantic_hidden)
    torch.testing.assert_close(packed.semantic_hidden[-count:], alone.semantic_hidden, atol=1e-5, rtol=1e-4)


def message(*parts: object) -> list[dict]:
    return [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image", "image": p} for p in parts]


def test_interleaved_messages(processor: G2VLMProcessor) -> None:
    one, two = pictures(2)
    parts = message("Here ", one, " and there ", two, QUESTION)
    content = ["Here ", image_part(one), " and there ", image_part(two), QUESTION]
    expect(processor.apply_chat_template(parts), [RECON_PROMPT, VIEWS, *content])
    expect(processor.apply_chat_template(parts, geometry=False), content)
    conversation = [{"role": "user", "content": parts}]
    usual = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    expect(processor.apply_chat_template(conversation, **usual), [RECON_PROMPT, VIEWS, *content])
    expect(processor.apply_chat_template([{"role": "user", "content": QUESTION}]), [QUESTION])


def test_messages_say_where_the_views_stand(processor: G2VLMProcessor) -> None:
    one, two = pictures(2)
    parts = [*message(one, "seen from "), {"type": "views", "views": [one, two]}, *message(QUESTION)]
    inputs = processor.apply_chat_template(parts)
    expect(inputs, [image_part(one), "seen from ", RECON_PROMPT, VIEWS, QUESTION])
    assert inputs["views"][0].equal(view_pixels([one, two]))
    expect(processor.apply_chat_template(parts, geometry=False), [image_part(one), "seen from ", QUESTION])


def test_files_and_pil_images(processor: G2VLMProcessor, tmp_path: Path) -> None:
    (image,) = pictures(1)
    Image.fromarray(image).save(tmp_path / "a.png")
    expected = processor(images=image, text=QUESTION)["pixel_values"]
    for given in (tmp_path / "a.png", str(tmp_path / "a.png"), Image.fromarray(image), from_memory(image)):
        assert processor(images=given, text=QUESTION)["pixel_values"].equal(expected)


@pytest.mark.parametrize(("arguments", "told"), [
    ({"text": "What is <image>?", "images": 2}, "1 <image>, and there are 2 images"),
    ({"text": "<image><image>?"}, "2 <image>, and there are 0 images"),
    ({"images": 1}, "no question"),
    ({"images": 1, "text": ""}, "the question is empty"),
    ({"text": []}, "no question"),
    ({"text": ["a", "b"], "images": 1}, "2 questions and 1 entries of images"),
    ({"text": "a", "return_tensors": "np"}, "return_tensors='np'"),
])  # fmt: skip
def test_unusable_questions(processor: G2VLMProcessor, arguments: dict, told: str) -> None:
    if "images" in arguments:
        arguments = {**arguments, "images": pictures(arguments["images"])}
    with pytest.raises(InputError) as caught:
        processor(**arguments)
    assert told in caught.value.what
    assert caught.value.fix


@pytest.mark.parametrize(("conversation", "options", "told"), [
    ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], {}, "conversation"),
    ([{"role": "system", "content": "a"}], {}, "conversation"),
    ([{"type": "video", "video": "a.mp4"}], {}, "type 'video'"),
    ([{"type": "image", "url": "http://a"}], {}, "type 'image'"),
    ([{"type": "text", "text": "a"}], {"tokenize": False}, "tokenize=False"),
    ([{"type": "text", "text": "a"}], {"tools": []}, "tools=[]"),
    ([], {}, "no question"),
])  # fmt: skip
def test_unusable_messages(processor: G2VLMProcessor, conversation: list, options: dict, told: str) -> None:
    with pytest.raises(InputError) as caught:
        processor.apply_chat_template(conversation, **options)
    assert told in caught.value.what


@pytest.mark.parametrize("image", [3, None, [1], np.zeros((4, 4), np.uint8), torch.zeros(3, 4, 4)])
def test_what_is_no_image(processor: G2VLMProcessor, image: object) -> None:
    with pytest.raises(InputError):
        processor(images=[image], text=QUESTION)


def test_saved_and_loaded(processor: G2VLMProcessor, tmp_path: Path) -> None:
    config = G2VLMConfig.tiny(geometry_attention="mixed", semantic_image_attention="causal", view_positions="shared")
    fields = processor_fields(config, SemanticRule.official(max_pixels=230 * 230)) | {"views_prompt": "Look."}
    saved = G2VLMProcessor(processor.tokenizer, **fields)
    saved.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "processor_config.json").read_text())
    assert stored == {"processor_class": "G2VLMProcessor", **fields}
    for loaded in (AutoProcessor.from_pretrained(tmp_path), G2VLMProcessor.from_pretrained(tmp_path)):
        assert isinstance(loaded, G2VLMProcessor)
        assert {name: getattr(loaded, name) for name in fields} == fields
        assert loaded.chat_template == saved.chat_template
        one, two = (p(images=pictures(2), text=QUESTION) for p in (saved, loaded))
        assert one["sequence"].position_ids.equal(two["sequence"].position_ids)
        assert one["sequence"].plan == two["sequence"].plan
        assert one["pixel_values"].equal(two["pixel_values"])


def test_inputs_move(processor: G2VLMProcessor) -> None:
    inputs = processor(images=pictures(1), text=QUESTION)
    moved = inputs.to("meta", torch.bfloat16)
    assert moved["views"][0].dtype == moved["pixel_values"].dtype == torch.bfloat16
    tensors = (moved["views"][0], moved["pixel_values"], moved["image_grid_thw"], moved["sequence"].semantic_ids)
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert moved["image_grid_thw"].dtype == torch.int64
    assert set(processor(text=QUESTION).to("meta")) == {"sequence", "views"}
