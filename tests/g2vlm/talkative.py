"""A model for tests of what it says: the preset tiny with weights so large that every word and pixel counts."""

import torch

from g2vlm.checkpoint import load_model
from g2vlm.model.g2vlm import G2VLMForConditionalGeneration


def talkative_model() -> G2VLMForConditionalGeneration:
    """Answers differ from question to question and from image to image, and never end with eos."""
    model = load_model("tiny")
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 and name.endswith("norm.weight"):
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        elif parameter.ndim > 1 and name.startswith(("decoder", "embed", "lm_head", "geometry_projection")):
            torch.nn.init.normal_(parameter, std=0.2)
    torch.nn.init.zeros_(model.lm_head.weight[model.config.tokens.eos])
    return model
