"""The keys and values of all requests of an engine, in blocks.

The pool is the memory limit of an engine (`engine.kv_tokens`): it is allocated once, requests of any length share it
block by block, and none can exceed what it reserved. A block belongs to one layer, because a reducer inside the decoder
leaves later layers with fewer tokens.

Shapes: B requests, Y layers, C blocks of the pool, M blocks of a layer, T tokens per block, S tokens, H key-value
heads, E head width, R rows written at once.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

BLOCK_TOKENS = 16
"""Tokens per block of the KV pool."""
_SCRATCH = 0
"""A block that no request owns; it pads the block tables."""

Blocks = NDArray[np.int64]
"""Blocks [Y, M] of a request; layers with fewer tokens are padded with the scratch block."""
NO_BLOCKS: Blocks = np.empty((0, 0), dtype=np.int64)


class KVPool:
    """Keys and values of all requests in flight, in blocks of `BLOCK_TOKENS` tokens of one layer.

    Args:
        num_layers: layers of the decoder.
        num_heads: key-value heads of a layer.
        head_width: width of a head.
        max_tokens: tokens that all requests together may hold in each layer; rounded down to whole blocks.
        spare_tokens: additional tokens for urgent requests; rounded up to whole blocks.
        dtype: data type of the model.
        device: device of the model.
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
        self._num_layers = num_layers
        self.spare_blocks = self.blocks_for([spare_tokens] * num_layers)
        self.num_blocks = max_tokens // BLOCK_TOKENS * num_layers + self.spare_blocks
        shape = (self.num_blocks + 1, BLOCK_TOKENS, num_heads, head_width)
        # Zeros, not uninitialised memory: masked positions are multiplied by 0, and 0 times NaN is NaN.
        self._keys_CTHE = torch.zeros(shape, dtype=dtype, device=device)
        self._values_CTHE = torch.zeros(shape, dtype=dtype, device=device)
        self._free = list(range(self.num_blocks, _SCRATCH, -1))

    @property
    def free_blocks(self) -> int:
        """Number of blocks that no request owns."""
        return len(self._free)

    @property
    def used_tokens(self) -> int:
        """Number of reserved tokens, as the mean over the layers."""
        return (self.num_blocks - len(self._free)) * BLOCK_TOKENS // self._num_layers

    @property
    def total_tokens(self) -> int:
        """Number of tokens that can be reserved in each layer, without the spare ones."""
        return (self.num_blocks - self.spare_blocks) // self._num_layers * BLOCK_TOKENS

    def blocks_for(self, lengths_Y: Sequence[int]) -> int:
        """Returns the number of blocks of a request with these numbers of tokens in the layers."""
        return sum(math.ceil(length / BLOCK_TOKENS) for length in lengths_Y)

    def reserve(self, lengths_Y: Sequence[int]) -> Blocks:
        """Reserves blocks for at most these numbers of tokens in the layers; the caller has checked `free_blocks`."""
        counts_Y = np.array([math.ceil(length / BLOCK_TOKENS) for length in lengths_Y])
        total = int(counts_Y.sum())
        assert total <= len(self._free), "reserved more blocks than are free"
        start = len(self._free) - total
        blocks_YM = np.full((len(counts_Y), counts_Y.max()), _SCRATCH)
        blocks_YM[np.arange(blocks_YM.shape[1]) < counts_Y[:, None]] = self._free[start:]
        del self._free[start:]
        return blocks_YM

    def release(self, blocks_YM: Blocks) -> None:
        """Returns blocks to the pool."""
        self._free += blocks_YM[blocks_YM != _SCRATCH].tolist()

    def write(self, slots_R: Tensor, keys_RHE: Tensor, values_RHE: Tensor) -> None:
        """Stores rows at slots (block x T + position in the block)."""
        self._keys_CTHE.flatten(0, 1).index_copy_(0, slots_R, keys_RHE)
        self._values_CTHE.flatten(0, 1).index_copy_(0, slots_R, values_RHE)

    def read(self, tables_BM: Tensor) -> tuple[Tensor, Tensor]:
        """Returns keys and values [B, H, S, E] of requests in one layer, S the tokens of the longest block table."""
        batch = tables_BM.shape[0]
        flat = tables_BM.flatten()
        keys, values = (
            pool.index_select(0, flat).view(batch, -1, *pool.shape[2:]).transpose(1, 2)
            for pool in (self._keys_CTHE, self._values_CTHE)
        )
        return keys, values


def tables_of(blocks: Sequence[Blocks], layers: range, num_tokens: int, device: torch.device) -> Tensor:
    """Returns the block tables [Y, B, M] of requests in some layers for `num_tokens` tokens."""
    width = math.ceil(num_tokens / BLOCK_TOKENS)
    tables_YBM = np.full((len(layers), len(blocks), width), _SCRATCH)
    for row, blocks_YM in enumerate(blocks):
        own = blocks_YM[layers.start : layers.stop, :width]
        tables_YBM[:, row, : own.shape[1]] = own
    return torch.tensor(tables_YBM, device=device)


def slots_of(blocks: Sequence[Blocks], layers: range, lengths: Sequence[int], device: torch.device) -> Tensor:
    """Returns the slots [Y, R] of the first tokens of requests in some layers, one request after the other."""
    slots = []
    for blocks_YM, length in zip(blocks, lengths, strict=True):
        order = np.arange(length)
        own = blocks_YM[layers.start : layers.stop, order // BLOCK_TOKENS]
        assert (own != _SCRATCH).all(), "a layer has more tokens than were reserved"
        slots.append(own * BLOCK_TOKENS + order % BLOCK_TOKENS)
    return torch.tensor(np.concatenate(slots, axis=1), device=device)
