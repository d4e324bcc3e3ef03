"""Attention over packed sequences: a plan says who attends to whom, a backend computes it."""

from g2vlm.model.attention.plan import AttnPlan, Block
from g2vlm.model.attention.registry import attend, backend_names, register

__all__ = ["AttnPlan", "Block", "attend", "backend_names", "register"]
