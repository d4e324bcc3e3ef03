"""Attention backends behind one call. A backend is a function and a rule that names what it cannot do.

`attend` picks the backend given by its argument, else by the environment variable `G2VLM_ATTENTION`, else `sdpa`.
"""

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from g2vlm.errors import InputError
from g2vlm.model.attention.eager import attend as eager_attend
from g2vlm.model.attention.plan import AttnPlan
from g2vlm.model.attention.sdpa import attend as sdpa_attend

ENVIRONMENT = "G2VLM_ATTENTION"
AUTOMATIC = "sdpa"

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Request:
    """What a backend is asked to do, for its refusal rule."""

    plan: AttnPlan
    device: torch.device
    dtype: torch.dtype
    head_dim: int
    num_query_heads: int
    num_key_heads: int
    needs_grad: bool


AttendFn = Callable[[Tensor, Tensor, Tensor, AttnPlan, float], Tensor]
RefuseFn = Callable[[Request], str | None]


@dataclass(frozen=True)
class _Backend:
    attend: AttendFn
    refuse: RefuseFn


def _never(request: Request) -> None:
    """Refuses nothing."""


_BACKENDS = {"eager": _Backend(eager_attend, _never), "sdpa": _Backend(sdpa_attend, _never)}


def register(name: str, attend_fn: AttendFn, refuse: RefuseFn = _never) -> None:
    """Adds a backend.

    Args:
        name: what users call it.
        attend_fn: `(q, k, v, plan, scale) -> (Sq, Hq, D)`; shapes are checked before, the plan has at least one block.
        refuse: the reason why a request cannot be served (package missing, dtype, ...), or None.

    Raises:
        ValueError: the name is taken.
    """
    if name in _BACKENDS:
        raise ValueError(f"attention backend {name!r} is already registered")
    _BACKENDS[name] = _Backend(attend_fn, refuse)


def backend_names() -> list[str]:
    """Every registered backend; one may still refuse a request."""
    return sorted(_BACKENDS)


def attend(
    q: Tensor, k: Tensor, v: Tensor, plan: AttnPlan, *, scale: float | None = None, backend: str | None = None
) -> Tensor:
    """Attention softmax(scale * q k^T) v over the pairs that `plan` allows.

    Args:
        q: (Sq, Hq, D) queries.
        k: (Sk, Hkv, D) keys; query head h reads key head `h // (Hq / Hkv)`.
        v: (Sk, Hkv, D) values.
        plan: who attends to whom; Sq and Sk are its `num_queries` and `num_keys`.
        scale: of the logits; default 1 / sqrt(D).
        backend: name of a registered backend; see the module.

    Returns:
        (Sq, Hq, D) in the dtype of `q`.

    Raises:
        InputError: the backend named by the argument or the environment is unknown or refuses, with its reason.
        ValueError: shapes that do not agree with each other or with the plan.
    """
    _check_shapes(q, k, v, plan)
    if not plan.blocks:
        return q  # no queries, nothing to attend
    needs_grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    request = Request(plan, q.device, q.dtype, q.shape[2], q.shape[1], k.shape[1], needs_grad)
    chosen = _choose(request, backend)
    return chosen.attend(q, k, v, plan, q.shape[2] ** -0.5 if scale is None else scale)


def _choose(request: Request, backend: str | None) -> _Backend:
    from_environment = os.environ.get(ENVIRONMENT)
    name, source = AUTOMATIC, "chosen automatically"
    if backend:
        name, source = backend, "named by the caller"
    elif from_environment:
        name, source = from_environment, f"named by {ENVIRONMENT}"
    reason = _BACKENDS[name].refuse(request) if name in _BACKENDS else "there is no backend of this name"
    if reason:
        others = ", ".join(sorted(set(_BACKENDS) - {name}))
        raise InputError(f"attention backend {name!r}, {source}, cannot be used", reason, f"choose one of: {others}")
    _announce(name, source)
    return _BACKENDS[name]


@cache
def _announce(name: str, source: str) -> None:
    _log.info("attention backend: %s (%s)", name, source)


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, plan: AttnPlan) -> None:
    if q.ndim != 3 or k.ndim != 3 or k.shape != v.shape or q.shape[2] != k.shape[2]:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} must be (tokens, heads, width), "
            "k and v alike and as wide as q"
        )
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads are not a multiple of {k.shape[1]} key heads")
    if (q.shape[0], k.shape[0]) != (plan.num_queries, plan.num_keys):
        raise ValueError(
            f"q has {q.shape[0]} tokens and k {k.shape[0]}; the plan is for {plan.num_queries} queries and "
            f"{plan.num_keys} keys"
        )
