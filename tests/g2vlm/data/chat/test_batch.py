import numpy as np
import pytest
import torch

from g2vlm.data.chat.batch import Filling, chat_inputs, collate_chats
from g2vlm.data.chat.types import ChatSample, ImageAt, Turn
from g2vlm.errors import CheckpointError, InputError
from g2vlm.model.g2vlm import G2VLMForConditionalGeneration
from g2vlm.processing import sequence_builder
from g2vlm.prompts import RECON_PROMPT, ChatTokenizer, chat_segments, next_turn
from g2vlm.sequence import IGNORED, GeometryViews, SemanticImage, Text, segment_length
from tests.train.chats import COLOURS, Colours, chat_config, layout

TOKENIZER = ChatTokenizer.embedded()


def labelled(batch) -> str:
    ids = batch.sequence.labels[batch.supervised].tolist()
    return TOKENIZER.tokenizer.decode(ids, skip_special_tokens=False)


def test_a_question_is_laid_out_as_it_is_asked() -> None:
    sample = Colours().load(5, 0)
    expected = [GeometryViews(((2, 2),) * 2), SemanticImage((4, 4)), "What colour?"]
    assert layout().segments(sample.shape) == chat_segments(TOKENIZER, [RECON_PROMPT, *expected], "green")
    bare = layout(views_prompt="").segments(sample.shape)
    assert bare == chat_segments(TOKENIZER, expected, "green")
    text = Colours(pictures=0, views=0).load(1, 0)
    assert layout().segments(text.shape) == chat_segments(TOKENIZER, ["Say green."], "green")


def test_tokens_are_counted_exactly() -> None:
    for source in (Colours(), Colours(pictures=0), Colours(pictures=3, views=0)):
        shape = source.load(2, 7).shape
        assert source.shape(2, 7) == shape
        built = sequence_builder(chat_config()).build([layout().segments(shape)])
        assert built.num_tokens == layout().num_tokens(shape) == sum(map(segment_length, layout().segments(shape)))


def test_every_answer_of_a_conversation_is_learned() -> None:
    later = (Turn(("Sure?",), "yes"), Turn(("And this? ", ImageAt(0)), "blue"))
    picture = np.zeros((28, 28, 3), np.uint8)
    sample = ChatSample((ImageAt(1), "What colour?"), "red", (picture, picture), later=later)
    batch = collate_chats([sample], layout())
    assert labelled(batch) == "red<|im_end|>yes<|im_end|>blue<|im_end|>"
    assert batch.sequence.num_tokens == layout().num_tokens(sample.shape)
    ids = TOKENIZER.tokenizer.decode(batch.sequence.semantic_ids.tolist(), skip_special_tokens=False)
    assert "<|im_start|>assistant\nred<|im_end|>\n<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\nyes" in ids


def test_a_further_turn_is_learned_as_it_is_asked() -> None:
    """The ids of a conversation that is trained on are those that asking, answering and asking again gives."""
    sample = ChatSample(("How many?",), "two", later=(Turn(("Sure?",), "yes"),))
    first, second = (chat_segments(TOKENIZER, [text]) for text in ("How many?", "Sure?"))
    asked = [*first, *next_turn(TOKENIZER, TOKENIZER.encode("two")), *second[1:], Text(TOKENIZER.encode("yes"))]
    trained, said = (sequence_builder(chat_config()).build([s]) for s in (layout().segments(sample.shape), asked))
    assert trained.semantic_ids.tolist() == [*said.semantic_ids.tolist(), TOKENIZER.ids.eos]


def test_pixels_are_in_the_order_of_the_sequence() -> None:
    white, black = np.full((56, 56, 3), 255, np.uint8), np.zeros((56, 84, 3), np.uint8)
    sample = ChatSample((ImageAt(1), "or", ImageAt(0)), "b", (white, black))
    batch = collate_chats([sample], layout())
    assert batch.image_grid_thw.shape == (2, 3)
    first = int(batch.image_grid_thw[0].prod())
    assert batch.pixel_values[:first].max() < 0 < batch.pixel_values[first:].min()
    assert batch.sequence.image_slots.shape[0] == batch.image_grid_thw.prod(1).sum() // 4


def test_a_pack_runs_and_its_samples_do_not_meet() -> None:
    torch.manual_seed(0)
    model = G2VLMForConditionalGeneration(chat_config()).eval()
    samples = [Colours().load(0, 3), Colours(pictures=0).load(1, 4), Colours(views=0, pictures=2).load(2, 5)]
    with torch.no_grad():
        packed = collate_chats(samples, layout())
        together = model(**chat_inputs(packed, predict_geometry=True))
        alone = [collate_chats([sample], layout()) for sample in samples]
        apart = [model(**chat_inputs(batch, predict_geometry=bool(batch.scenes))) for batch in alone]
    torch.testing.assert_close(together.logits, torch.cat([output.logits for output in apart]), rtol=1e-4, atol=1e-5)
    assert len(together.geometry) == len(packed.scenes) == 2
    torch.testing.assert_close(together.geometry[1].local_points, apart[1].geometry[0].local_points)
    assert packed.names == ("colours/0", "colours/1", "colours/2")
    ((members, scenes),) = packed.groups()
    assert members == [0, 1]
    assert torch.equal(scenes.depth[1:], alone[1].scenes[0].depth)


@pytest.mark.parametrize(
    ("samples", "scenes", "images"),
    [([], 0, False), ([], 2, True), ([Colours(pictures=0, views=0)], 1, True), ([Colours(pictures=0)], 2, True)],
)
def test_filling_changes_no_answer(samples: list[Colours], scenes: int, images: bool) -> None:
    torch.manual_seed(0)
    model = G2VLMForConditionalGeneration(chat_config()).eval()
    loaded = [source.load(1, 2) for source in samples]
    batch = collate_chats(loaded, layout(), Filling(scenes, images, (28, 28)))
    assert len(batch.scenes) == scenes
    assert (batch.pixel_values is not None) == images
    with torch.no_grad():
        filled = model(**chat_inputs(batch, predict_geometry=True))
        if loaded:
            plain = model(**chat_inputs(collate_chats(loaded, layout()), predict_geometry=False))
            torch.testing.assert_close(filled.logits, plain.logits, rtol=1e-4, atol=1e-5)
    assert not batch.scenes or not batch.scenes[-1].valid.any()
    assert len(batch.names) == len(samples)
    assert (batch.sequence.labels != IGNORED).sum() == len(batch.supervised)


def test_the_tokenizer_must_be_the_models() -> None:
    tokens = {"bos": 7, "eos": 1, "vision_start": 2, "vision_end": 3, "recon_prompt": (4,)}
    with pytest.raises(CheckpointError, match="not the model's"):
        layout(chat_config(tokens=tokens))
    with pytest.raises(InputError, match="multiples of 14"):
        layout().views(1, (28, 30))


def test_colours_are_words() -> None:
    assert all(TOKENIZER.encode(name) for name in COLOURS)
