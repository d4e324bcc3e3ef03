"""From pixels to the model's inputs: the config's rules reach the sequence, pixels are normalised once."""

import pytest
import torch

from g2vlm.config import IMAGENET_MEAN, IMAGENET_STD, G2VLMConfig
from g2vlm.processing import normalise_views, recon_inputs, recon_sequence, sequence_builder, view_grid


@pytest.mark.parametrize(("own", "used"), [("global", "global"), ("frame", "frame"), ("mixed", "global")])
def test_mixed_attention_is_global_outside_training(own: str, used: str) -> None:
    assert sequence_builder(G2VLMConfig.tiny(geometry_attention=own)).geometry_attention == used


def test_a_batch_may_choose_another_attention() -> None:
    config = G2VLMConfig.tiny(geometry_attention="mixed")
    assert sequence_builder(config, geometry_attention="frame").geometry_attention == "frame"


def test_the_other_rules_are_the_configs() -> None:
    config = G2VLMConfig.tiny(semantic_image_attention="causal", view_positions="shared")
    builder = sequence_builder(config)
    assert (builder.semantic_image_attention, builder.view_positions) == ("causal", "shared")
    assert builder.special.vision_end == config.tokens.vision_end


def test_normalisation() -> None:
    one_deviation_above = torch.tensor(IMAGENET_MEAN) + torch.tensor(IMAGENET_STD)
    normalised = normalise_views(one_deviation_above.view(1, 3, 1, 1).expand(2, 3, 14, 14))
    torch.testing.assert_close(normalised, torch.ones(2, 3, 14, 14))


def test_recon_sequence_is_bos_prompt_views() -> None:
    config = G2VLMConfig.tiny()
    inputs = recon_inputs(torch.rand(2, 3, 28, 42), config, "cpu")
    tokens = config.tokens
    markers = [tokens.vision_start, tokens.vision_end] * 2
    sequence = recon_sequence([torch.rand(2, 3, 28, 42)], config)
    assert sequence.semantic_ids.tolist() == [tokens.bos, *tokens.recon_prompt, *markers]
    assert sequence.num_geometry == 12
    assert inputs["views"][0].shape == (2, 3, 28, 42)


def test_sides_must_be_multiples_of_the_patch() -> None:
    with pytest.raises(ValueError, match="images of 30x28; sides must be multiples of 14"):
        view_grid(torch.zeros(1, 3, 28, 30), 14)
