"""Tests of the KV pool; `test_offline_parity` covers the decoder over it."""

import random

import torch

from parcelray.serving.engine.decoder import BLOCK_TOKENS, KVPool, slots_of, table_of


def _pool(tokens: int) -> KVPool:
    return KVPool(
        num_layers=2, num_heads=2, head_width=4, max_tokens=tokens, dtype=torch.float32, device=torch.device("cpu")
    )


def test_each_request_reads_back_what_it_wrote() -> None:
    pool = _pool(160)
    rng = random.Random(0)
    held: dict[int, tuple[list[int], torch.Tensor]] = {}
    for step in range(200):
        if held and (pool.free_blocks < 4 or rng.random() < 0.4):
            blocks, written = held.pop(rng.choice(list(held)))
            keys, values = pool.read(1, table_of([blocks], len(written), torch.device("cpu")))
            torch.testing.assert_close(keys[0, :, : len(written)].transpose(0, 1), written)
            torch.testing.assert_close(values, keys + 1, rtol=0, atol=1e-6)
            pool.release(blocks)
        else:
            length = rng.randint(1, 3 * BLOCK_TOKENS)
            if pool.blocks_for(length) > pool.free_blocks:
                continue
            blocks = pool.reserve(length)
            written = torch.randn(length, 2, 4)
            # Whole blocks, so that no position holds values of an earlier request.
            padded = torch.zeros(len(blocks) * BLOCK_TOKENS, 2, 4)
            padded[:length] = written
            pool.write(1, torch.tensor(slots_of(blocks, 0, len(padded))), padded, padded + 1)
            held[step] = (blocks, written)
    owned = [block for blocks, _ in held.values() for block in blocks]
    assert len(owned) == len(set(owned))
    assert pool.used_tokens == len(owned) * BLOCK_TOKENS
