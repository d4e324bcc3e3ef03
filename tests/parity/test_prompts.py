"""`chat_segments` gives the released chat and training sequences; the fixtures' ids stand for the released texts."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from g2vlm.prompts import ChatTokenizer, Part, chat_segments
from g2vlm.sequence import GeometryViews, PackedSequence, Segment, SemanticImage, SequenceBuilder, SpecialIds, Text
from tests.parity import golden
from tests.parity.test_mrope import planned
from tests.parity.test_training import samples

pytestmark = pytest.mark.parity
HEADER = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
ASSISTANT = "<|im_end|>\n<|im_start|>assistant"
PATCH = 14


class Dictionary(ChatTokenizer):
    """Knows the ids of a few whole texts, and no other text."""

    def __init__(self, texts: dict[str, tuple[int, ...]]):
        self.texts = texts

    def encode(self, text: str) -> tuple[int, ...]:
        return self.texts[text]


def assert_released(sample: list[Segment]) -> None:
    """A recorded training sample: header, parts, assistant header, newline and answer."""
    header, *turn, assistant, answer = sample
    assert isinstance(header, Text)
    assert isinstance(assistant, Text)
    assert isinstance(answer, Text)
    texts = {HEADER: header.ids, ASSISTANT: assistant.ids, "\nanswer": answer.ids}
    parts: list[Part] = []
    for index, segment in enumerate(turn):
        if isinstance(segment, Text):
            texts[f"text {index}"] = segment.ids
        parts.append(f"text {index}" if isinstance(segment, Text) else segment)
    assert chat_segments(Dictionary(texts), parts, "answer") == sample


def is_dialogue(sample: list[Segment]) -> bool:
    return isinstance(sample[-1], Text) and sample[-1].supervised


@pytest.mark.parametrize("path", golden.cases("g2vlm_*/train_inputs.safetensors"))
def test_packed_training_sample(path: Path) -> None:
    dialogues = [sample for sample in samples(load_file(path)) if is_dialogue(sample)]
    assert dialogues
    for sample in dialogues:
        assert_released(sample)


@pytest.mark.parametrize("path", golden.cases("mrope/training_packing.json"))
def test_training_plans(path: Path) -> None:
    cases = json.loads(path.read_text()).values()
    dialogues = [s for case in cases for items in case["samples"] if is_dialogue(s := [*planned(items)])]
    assert dialogues
    for sample in dialogues:
        assert_released(sample)


def chat(folder: Path, with_views: bool, with_images: bool) -> tuple[PackedSequence, list[Segment], dict]:
    """The question of a fixture, as our segments and sequence."""
    inputs = load_file(folder / "inputs.safetensors")
    special = json.loads((folder / "special_ids.json").read_text())
    ids = SpecialIds(**{name: special[name] for name in ("bos", "eos", "vision_start", "vision_end")})
    prompt = inputs["chat.prompt_ids"].tolist()
    end = len(prompt) - prompt[::-1].index(ids.eos) - 1  # the assistant header starts with it
    tokenizer = Dictionary({
        HEADER: tuple(inputs["chat.system_ids"].tolist()),
        "question": tuple(prompt[:end]),
        ASSISTANT: tuple(prompt[end:]),
        "\n": tuple(inputs["chat.start_id"].tolist()),
    })  # fmt: skip
    frames, _, height, width = inputs["chat.dino_images"].shape
    views = GeometryViews(((height // PATCH, width // PATCH),) * frames)
    grids = [inputs[name][0].tolist() for name in sorted(inputs) if name.endswith(".grid_thw")]
    images = [SemanticImage((grid[1], grid[2])) for grid in grids]
    segments = chat_segments(tokenizer, [*[views] * with_views, *images * with_images, "question"])
    return SequenceBuilder(ids).build([segments]), segments, inputs


@pytest.mark.parametrize("folder", golden.cases("g2vlm_*"))
@pytest.mark.parametrize(
    ("prefix", "with_views", "with_images"),
    [("official.chat_recon", True, True), ("chat_vit", False, True), ("chat_text", False, False)],
)
def test_chat_sequences(folder: Path, prefix: str, with_views: bool, with_images: bool) -> None:
    outputs = load_file(folder / "outputs.safetensors")
    sequence, segments, inputs = chat(folder, with_views, with_images)
    text = [token for segment in segments if isinstance(segment, Text) for token in segment.ids]
    recorded = torch.cat([inputs[f"chat.{name}"] for name in ("system_ids", "prompt_ids", "start_id")]).tolist()
    assert text == recorded
    positions = sequence.position_ids[:, sequence.order]
    prompt = outputs[f"{prefix}.prompt_position_ids"]
    tail = torch.cat([prompt, prompt[:, -1:] + 1], dim=1)  # with the newline that decoding starts from
    assert positions[:, -tail.shape[1] :].equal(tail)
    calls = [f"{prefix}.dino_block_position_ids"] * with_views
    calls += sorted(name for name in outputs if name.startswith(f"{prefix}.vit_") and name.endswith("position_ids"))
    if calls:
        start = len(inputs["chat.system_ids"])
        assert positions[:, start : -tail.shape[1]].equal(torch.cat([outputs[name] for name in calls], dim=1))
