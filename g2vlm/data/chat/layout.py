"""From a conversation to the segments of a sequence, and how many tokens they have.

Turns are laid out as in `g2vlm.prompts`; a scene stands in front of the user's first words.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from g2vlm.config import G2VLMConfig
from g2vlm.data.chat.types import ChatShape, ImageAt, Size, Turn
from g2vlm.errors import InputError
from g2vlm.prompts import RECON_PROMPT, ChatTokenizer, Part, chat_segments, later_segments
from g2vlm.semantic_images import SemanticRule, semantic_grid
from g2vlm.sequence import GeometryViews, Segment, SemanticImage, segment_length
from g2vlm.supervision.segments import with_probes


@dataclass(frozen=True)
class ChatLayout:
    """How conversations become the tokens of one model.

    Args:
        tokenizer: the model's.
        config: the model's.
        rule: of the semantic images' sizes.
        views_prompt: the sentence before the views, as in the model's processor.
        camera_probes, scale_probe: whether a probe token follows every image, and one more a sample's last.

    Raises:
        CheckpointError: the tokenizer is not the model's.
    """

    tokenizer: ChatTokenizer
    config: G2VLMConfig
    rule: SemanticRule
    views_prompt: str = RECON_PROMPT
    camera_probes: bool = False
    scale_probe: bool = False

    def __post_init__(self) -> None:
        self.tokenizer.require_fits(self.config)

    def segments(self, shape: ChatShape) -> list[Segment]:
        """The sample's segments in sequence order.

        Raises:
            InputError: an image or a view of a size that its encoder does not take.
        """
        merge = self.config.semantic_encoder.merge_size
        images = [SemanticImage(semantic_grid(size, self.rule), merge) for size in shape.image_sizes]
        first, *later = shape.turns
        scene: list[Part] = [self.views_prompt, self.views(shape.num_views, shape.view_size)] if shape.num_views else []
        segments = chat_segments(self.tokenizer, [*scene, *_shown(first, images)], first.answer)
        for turn in later:
            segments += later_segments(self.tokenizer, _shown(turn, images), turn.answer)
        return self.probed(segments)

    def probed(self, segments: Sequence[Segment]) -> list[Segment]:
        """A sample's segments with the probe tokens that a supervision asks for."""
        return with_probes(segments, self.camera_probes, self.scale_probe)

    def views(self, num_views: int, size: Size) -> GeometryViews:
        """The segment of a scene.

        Raises:
            InputError: a side is not a multiple of the patch.
        """
        patch = self.config.geometry_encoder.patch_size
        if size[0] % patch or size[1] % patch:
            raise InputError(f"views of {size[1]} x {size[0]}", f"sides are multiples of {patch}", "change view_size")
        return GeometryViews(((size[0] // patch, size[1] // patch),) * num_views)

    def num_tokens(self, shape: ChatShape) -> int:
        """Length of the sample's sequence at most; errors as in `segments`."""
        return sum(segment_length(segment) for segment in self.segments(shape)) + shape.spare


def _shown(turn: Turn, images: Sequence[SemanticImage]) -> list[Part]:
    """A turn's parts with the images at their places."""
    return [images[part.index] if isinstance(part, ImageAt) else part for part in turn.parts]
