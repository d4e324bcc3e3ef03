"""Keys and values of tokens already seen: as a prefill left them, and spread over rows for decoding.

Both hold keys after rotation, so that nothing is ever rotated twice. Shapes: C cached tokens, n new ones, B rows,
L columns, M key heads, G query heads per key head, K head width.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from g2vlm.model.attention.plan import Range, length
from g2vlm.sequence import PackedSequence


class LayerCache:
    """Keys and values (C, M, K) of one layer; None while there are none."""

    def __init__(self, keys: Tensor | None = None, values: Tensor | None = None):
        self.keys, self.values = keys, values

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Appends (n, M, K) of new tokens and returns all, (C + n, M, K). Tensors held before are not changed."""
        if self.keys is not None and self.values is not None:
            keys, values = torch.cat([self.keys, keys]), torch.cat([self.values, values])
        self.keys, self.values = keys, values
        return keys, values

    @property
    def num_tokens(self) -> int:
        """C."""
        return 0 if self.keys is None else self.keys.shape[0]


@dataclass(frozen=True)
class KVCache:
    """Keys and values of all tokens so far, per layer, forward after forward, each in its own expert layout."""

    layers: tuple[LayerCache, ...]

    @classmethod
    def empty(cls, num_layers: int) -> "KVCache":
        """A cache without tokens."""
        return cls(tuple(LayerCache() for _ in range(num_layers)))

    def copy(self) -> "KVCache":
        """A cache that grows on its own and shares what is there so far."""
        return KVCache(tuple(LayerCache(layer.keys, layer.values) for layer in self.layers))

    @property
    def num_tokens(self) -> int:
        """Number of cached tokens."""
        return self.layers[0].num_tokens


@dataclass
class Rows:
    """The state of decoding B answers at once: preallocated keys and values, and each row's next position.

    What a row sees lies at the right end of its first `length` columns, so that every step fills one column for all.
    The columns are written in place: there are no gradients through them.

    Args:
        keys, values: per layer, (B, M, L, K).
        length: number of columns in use.
        positions: (B,) position of each row's next token.
        visible: (B, L) columns that a row sees; None when all rows are equally long.
    """

    keys: list[Tensor]
    values: list[Tensor]
    length: int
    positions: Tensor
    visible: Tensor | None = field(default=None)

    @classmethod
    @torch.no_grad()
    def after(cls, sequence: PackedSequence, cache: KVCache, room: int) -> "Rows":
        """One row for each sample of a sequence that the cache ends with.

        Args:
            sequence: the last sequence that went into the cache.
            cache: keys and values; they are copied.
            room: number of tokens that will be decoded.
        """
        spans = [seen.everything for seen in sequence.seen]
        lengths = [sum(map(length, ranges)) for ranges in spans]
        used, columns = max(lengths), max(lengths) + room
        device = sequence.position_ids.device
        visible = None
        if min(lengths) < used:
            first = torch.tensor([used - own for own in lengths], device=device)
            visible = torch.arange(columns, device=device) >= first[:, None]
        return cls(
            keys=[_rows(layer.keys, spans, used, columns) for layer in cache.layers],
            values=[_rows(layer.values, spans, used, columns) for layer in cache.layers],
            length=used,
            positions=torch.tensor(sequence.next_positions, device=device),
            visible=visible,
        )

    @property
    def room(self) -> int:
        """Number of columns that are still free."""
        return self.keys[0].shape[2] - self.length

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Writes one new token per row and attends to everything its row sees, the token included.

        The query heads of one key head share its keys, so they take the place of queries: a view, no mask.

        Args:
            layer: index of the layer.
            q: (B, M * G, K) rotated queries.
            k, v: (B, M, K) rotated keys, and values.

        Returns:
            (B, M * G, K).
        """
        stop = self.length + 1
        self.keys[layer][:, :, self.length] = k
        self.values[layer][:, :, self.length] = v
        grouped = q.unflatten(1, (k.shape[1], -1))  # (B, M, G, K)
        mask = None if self.visible is None else self.visible[:, None, None, :stop]
        keys, values = self.keys[layer][:, :, :stop], self.values[layer][:, :, :stop]
        return scaled_dot_product_attention(grouped, keys, values, attn_mask=mask).flatten(1, 2)

    def advance(self) -> None:
        """Ends a step, after every layer has written its token."""
        self.length += 1
        self.positions = self.positions + 1

    def repeated(self, count: int) -> "Rows":
        """Every row `count` times, neighbours of each other; nothing is shared with this one."""
        keys, values = ([x.repeat_interleave(count, dim=0) for x in own] for own in (self.keys, self.values))
        visible = None if self.visible is None else self.visible.repeat_interleave(count, dim=0)
        return Rows(keys, values, self.length, self.positions.repeat_interleave(count), visible)


def _rows(tokens: Tensor | None, spans: Sequence[Iterable[Range]], used: int, columns: int) -> Tensor:
    """Cached (C, M, K) as rows (B, M, columns, K): each row's ranges end at column `used`."""
    assert tokens is not None
    rows = tokens.new_zeros(len(spans), tokens.shape[1], columns, tokens.shape[2])
    for row, ranges in zip(rows, spans, strict=True):
        own = torch.cat([tokens[start:stop] for start, stop in ranges])  # (n, M, K)
        row[:, used - own.shape[0] : used] = own.transpose(0, 1)
    return rows
