"""Tests of the KV pool; `test_offline_parity` and `test_reducers` cover the decoder over it."""

import random

import pytest
import torch

from parcelray.serving.engine.kv_pool import BLOCK_TOKENS, Blocks, KVPool, slots_of, tables_of

CPU = torch.device("cpu")
LAYERS = range(2)


def _pool(tokens: int) -> KVPool:
    return KVPool(num_layers=2, num_heads=2, head_width=4, max_tokens=tokens, dtype=torch.float32, device=CPU)


def test_each_request_reads_back_what_it_wrote_in_layers_of_different_lengths() -> None:
    pool = _pool(160)
    rng = random.Random(0)
    held: dict[int, tuple[Blocks, list[torch.Tensor]]] = {}
    for step in range(200):
        if held and (pool.free_blocks < 8 or rng.random() < 0.4):
            blocks, written = held.pop(rng.choice(list(held)))
            for layer, rows in enumerate(written):
                (table_BM,) = tables_of([blocks], range(layer, layer + 1), len(rows), CPU)
                keys, values = pool.read(table_BM)
                torch.testing.assert_close(keys[0, :, : len(rows)].transpose(0, 1), rows)
                torch.testing.assert_close(values[0, :, : len(rows)].transpose(0, 1), rows + 1, rtol=0, atol=1e-6)
            pool.release(blocks)
        else:
            lengths = [rng.randint(1, 3 * BLOCK_TOKENS) for _ in LAYERS]
            if pool.blocks_for(lengths) > pool.free_blocks:
                continue
            blocks = pool.reserve(lengths)
            written = [torch.randn(length, 2, 4) for length in lengths]
            for layer, rows in enumerate(written):
                (slots_R,) = slots_of([blocks], range(layer, layer + 1), [len(rows)], CPU)
                pool.write(slots_R, rows, rows + 1)
            held[step] = (blocks, written)
    owned = [block for blocks, _ in held.values() for block in blocks[blocks > 0].tolist()]
    assert len(owned) == len(set(owned))
    assert len(owned) + pool.free_blocks == 2 * 160 // BLOCK_TOKENS
    assert pool.used_tokens == len(owned) * BLOCK_TOKENS // 2


def test_a_layer_holds_no_more_tokens_than_were_reserved() -> None:
    blocks = _pool(160).reserve([40, 20])
    assert slots_of([blocks, blocks], LAYERS, [32, 17], CPU).shape == (2, 49)
    with pytest.raises(AssertionError, match="more tokens than were reserved"):
        slots_of([blocks], LAYERS, [33], CPU)
