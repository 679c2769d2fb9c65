"""Memory of the KV cache: blocks of tokens out of one fixed pool, so that requests of any length share it and none can overrun it.

Shapes: M blocks, T tokens a block, H key-value heads, E head width, B requests, S tokens, R rows written at once.
"""

import math

import torch
from torch import Tensor

BLOCK_TOKENS = 16
_SCRATCH = 0
"""A block that no request owns: tables are padded with it."""


class KVPool:
    """Keys and values of all requests in flight.

    Args:
        num_layers: of the decoder.
        num_heads: key-value heads.
        head_width: of each.
        max_tokens: tokens that all requests together may hold; rounded down to whole blocks.
        spare_tokens: held beside them, for requests that must not wait; rounded up.
        dtype: of the model.
        device: of the model.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_heads: int,
        head_width: int,
        max_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
        spare_tokens: int = 0,
    ) -> None:
        self.spare_blocks = self.blocks_for(spare_tokens)
        self.num_blocks = max_tokens // BLOCK_TOKENS + self.spare_blocks
        shape = (self.num_blocks + 1, BLOCK_TOKENS, num_heads, head_width)
        # Zeros, not whatever was there: masked places are multiplied by 0, which a NaN would survive.
        self._keys_MTHE = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(num_layers)]
        self._values_MTHE = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(num_layers)]
        self._free = list(range(self.num_blocks, _SCRATCH, -1))

    @property
    def free_blocks(self) -> int:
        """Blocks that no request owns."""
        return len(self._free)

    @property
    def used_tokens(self) -> int:
        """Tokens that are reserved."""
        return (self.num_blocks - len(self._free)) * BLOCK_TOKENS

    @property
    def total_tokens(self) -> int:
        """Tokens that can be reserved, without the spare ones."""
        return (self.num_blocks - self.spare_blocks) * BLOCK_TOKENS

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold so many tokens."""
        return math.ceil(num_tokens / BLOCK_TOKENS)

    def reserve(self, num_tokens: int) -> list[int]:
        """Blocks for a request that will never hold more than `num_tokens`; the caller has looked at `free_blocks`."""
        count = self.blocks_for(num_tokens)
        assert count <= len(self._free), "reserved more than is free"
        return [self._free.pop() for _ in range(count)]

    def release(self, blocks: list[int]) -> None:
        """Gives blocks back."""
        self._free += blocks

    def write(self, layer: int, slots_R: Tensor, keys_RHE: Tensor, values_RHE: Tensor) -> None:
        """Stores rows at slots (block x T + place in it)."""
        self._keys_MTHE[layer].flatten(0, 1).index_copy_(0, slots_R, keys_RHE)
        self._values_MTHE[layer].flatten(0, 1).index_copy_(0, slots_R, values_RHE)

    def read(self, layer: int, tables_BM: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, H, S, E] of requests, S the tokens of the longest table."""
        batch = tables_BM.shape[0]
        flat = tables_BM.flatten()
        keys, values = (
            pool[layer].index_select(0, flat).view(batch, -1, *pool[layer].shape[2:]).transpose(1, 2)
            for pool in (self._keys_MTHE, self._values_MTHE)
        )
        return keys, values


def table_of(blocks: list[list[int]], num_tokens: int, device: torch.device) -> Tensor:
    """Block tables [B, M] of requests, as wide as `num_tokens` tokens need, padded with the scratch block."""
    width = math.ceil(num_tokens / BLOCK_TOKENS)
    return torch.tensor([(row + [_SCRATCH] * width)[:width] for row in blocks], device=device)


def slots_of(blocks: list[int], start: int, end: int) -> list[int]:
    """Slots of a request's tokens from `start` to before `end`."""
    return [blocks[place // BLOCK_TOKENS] * BLOCK_TOKENS + place % BLOCK_TOKENS for place in range(start, end)]
