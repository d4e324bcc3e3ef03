"""Checkpoints from one layout to another."""

__all__ = ["ConversionResult", "convert"]

from g2vlm.convert.run import ConversionResult, convert
