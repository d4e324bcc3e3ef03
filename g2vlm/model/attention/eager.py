"""The oracle backend: softmax attention with the plan's dense mask, in fp32 or better. For tests and small inputs."""

import torch
from torch import Tensor

from g2vlm.model.attention.plan import AttnPlan


def attend(q: Tensor, k: Tensor, v: Tensor, plan: AttnPlan, scale: float) -> Tensor:
    """Attention of q (Sq, Hq, D) over k, v (Sk, Hkv, D), computed in float64 for float64 inputs, else in float32."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[1] // k.shape[1]
    key, value = (x.to(dtype).repeat_interleave(group, dim=1) for x in (k, v))  # (Sk, Hq, D)
    logits = scale * torch.einsum("qhd,khd->hqk", q.to(dtype), key)
    logits = logits.masked_fill(~plan.mask().to(q.device), float("-inf"))
    return torch.einsum("hqk,khd->qhd", logits.softmax(dim=-1), value).to(q.dtype)
