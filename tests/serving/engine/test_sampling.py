"""Tests of how the next tokens are chosen."""

import torch

from parcelray.serving.engine.engine import Sampling
from parcelray.serving.engine.sampling import choose, generator_of


def test_sampled_tokens_follow_the_distribution() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -5.0]])
    sampling = Sampling(max_new_tokens=1, temperature=0.5, seed=0)
    generator = generator_of(sampling)
    counts = (
        torch.bincount(torch.tensor([choose(logits, [sampling], [generator])[0] for _ in range(4000)]), minlength=4)
        / 4000
    )
    torch.testing.assert_close(counts, (logits[0] / 0.5).softmax(0), atol=0.03, rtol=0)
    top = Sampling(max_new_tokens=1, temperature=0.5, top_p=0.9, seed=0)
    generator = generator_of(top)
    assert {choose(logits, [top], [generator])[0] for _ in range(300)} == {0, 1}


def test_a_row_samples_the_same_alone_and_in_a_batch() -> None:
    logits = torch.randn(5, 50, generator=torch.Generator().manual_seed(0))
    samplings = [Sampling(max_new_tokens=1, temperature=1.0, seed=seed) for seed in range(5)]
    together = choose(logits, samplings, [generator_of(each) for each in samplings])
    assert together == [
        choose(logits[row : row + 1], [samplings[row]], [generator_of(samplings[row])])[0] for row in range(5)
    ]


def test_a_nucleus_equals_that_of_a_full_sort() -> None:
    rng = torch.Generator().manual_seed(1)
    peaked = -1.5 * torch.arange(1, 20001).log()[torch.randperm(20000, generator=rng)]
    # Flat rows need more than the first sort, and rows with few values have ties at every edge.
    rows = torch.stack(
        [
            peaked,
            torch.randn(20000, generator=rng),
            torch.randint(0, 3, (20000,), generator=rng).float(),
            torch.zeros(20000),
        ]
    )
    for top_p in (1e-9, 0.3, 0.9, 0.999):
        for seed in range(4):
            samplings = [Sampling(max_new_tokens=1, temperature=0.8, top_p=top_p, seed=seed) for _ in rows]
            sampled = choose(rows, samplings, [generator_of(each) for each in samplings])
            share = float(torch.rand((), generator=torch.Generator().manual_seed(seed), dtype=torch.float64))
            for logits, token in zip(rows.double(), sampled, strict=True):
                mass, order = (logits / 0.8).softmax(0).sort(descending=True, stable=True)
                sums = mass.cumsum(0)
                size = int((sums < top_p).sum()) + 1
                index = int((sums[:size] <= share * sums[size - 1]).sum())
                near = order[max(0, index - 1) : index + 2].tolist()
                # At the edge between two tokens, the last digit of a sum decides.
                assert token in near
                assert token in order[: size + 1].tolist()


def test_a_row_that_is_not_finite_has_no_token_and_others_are_unaffected() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0]] * 4)
    logits[1, 0] = torch.nan
    logits[2] = -torch.inf
    samplings = [
        Sampling(max_new_tokens=1, temperature=temperature, top_p=1e-6, seed=0)
        for temperature in (1.0, 1.0, 0.0, 1e-50)
    ]
    assert choose(logits, samplings, [generator_of(each) for each in samplings]) == [1, None, None, 1]
