"""A question is put to the model exactly as training puts it: the same tokens, positions, pixels and views."""

import pytest
import torch

from eval.benchmarks import ROOMS_QA
from eval.conditions import Conditions, Shown
from g2vlm.chat_model import ChatModel
from g2vlm.data.chat.batch import chat_inputs, collate_chats
from g2vlm.data.chat.layout import ChatLayout
from g2vlm.data.chat.rooms import RoomsChats
from g2vlm.data.qa.heldout_v1 import SIZE, questions
from g2vlm.data.qa.question import Question
from g2vlm.data.qa.source import AskedScene
from g2vlm.processing import normalise_views, sequence_builder
from g2vlm.sampling import GenerationOptions
from tests.eval.vqa_scenes import chat

TASKS = ("point_depth", "object_counting", "object_rel_direction_hard", "camera_displacement")


@pytest.fixture(scope="module")
def model() -> ChatModel:
    return chat()


@pytest.mark.parametrize(("task", "images"), [*((task, "shown") for task in TASKS), ("point_depth", "blank")])
def test_training_and_evaluation_show_the_same(model: ChatModel, task: str, images: Shown) -> None:
    question = next(question for question in questions() if question.task == task)
    batch = trained(model, question, images)
    room = ROOMS_QA.load(question.scene, SIZE).images
    context = Conditions(images=images).context(model, room, room, question)
    lead, rest = context.turn(question.prompt(4))
    asked = sequence_builder(model.model.config).build([[*context.opening, *lead, *rest]])
    learned = batch.sequence

    common = len(asked.semantic_ids)
    assert asked.num_geometry == learned.num_geometry > 0
    assert torch.equal(asked.semantic_ids, learned.semantic_ids[:common])
    assert torch.equal(asked.image_slots, learned.image_slots)
    assert asked.view_grids == learned.view_grids
    assert torch.equal(asked.position_ids, learned.position_ids[:, : asked.num_tokens])
    answer = learned.labels[common - 1 :].tolist()  # the first is predicted where the question ends
    assert model.tokenizer.decode(i for i in answer if i >= 0) == question.answer
    assert (learned.labels[: common - 1] < 0).all()

    assert context.images is not None
    assert context.views is not None
    assert batch.pixel_values is not None
    assert batch.image_grid_thw is not None
    assert torch.equal(context.images.pixel_values, batch.pixel_values)
    assert torch.equal(context.images.grid_thw, batch.image_grid_thw)
    (views,) = chat_inputs(batch, predict_geometry=False)["views"]
    assert torch.equal(normalise_views(context.views.pixels), views)

    with torch.inference_mode():
        logits = model.model(**chat_inputs(batch, predict_geometry=False)).logits  # (L, vocabulary)
    replied = context.ask(question.prompt(4), GenerationOptions(max_new_tokens=1))
    assert [*replied.ids, model.tokenizer.ids.eos][0] == int(logits[0].argmax())


def trained(model: ChatModel, question: Question, images: Shown):
    """The pack with one sample that training would make of a held-out question."""

    class Rooms:
        def load(self, *_: object) -> AskedScene:
            return AskedScene(ROOMS_QA.load(question.scene, SIZE), (question,))

    source = RoomsChats(views=(4, 4), view_size=SIZE, blank=images == "blank")
    source.rooms = Rooms()  # pyright: ignore[reportAttributeAccessIssue]
    layout = ChatLayout(model.tokenizer, model.model.config, model.processor.rule)
    return collate_chats([source.load(0, 0)], layout)
