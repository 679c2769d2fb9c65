"""The latency gate: measures the time of one question at a time on the serving engine, in this process."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from parcelray.config.promote import LatencyGate, PromoteJob
from parcelray.config.serve import ServedModelConfig
from parcelray.datasets.images import decode_image
from parcelray.datasets.sample import Sample
from parcelray.evaluation.plan import prepare
from parcelray.models.checkpoint import ResolvedCheckpoint
from parcelray.models.vlm import image_size_of, load_processor
from parcelray.promotion.gates import Check
from parcelray.serving.engine.continuous_engine import ContinuousEngine
from parcelray.serving.engine.engine import PromptBuilder, Sampling, answer_all
from parcelray.serving.replica.load import load_model

_TIMEOUT_S = 600.0
_PERCENTILE = 95


def check_latency(job: PromoteJob, gate: LatencyGate, checkpoint: ResolvedCheckpoint) -> Iterator[Check]:
    """Check the 95th percentile of the time per question at every budget that the gate names.

    Args:
        job: the promotion; questions of its first benchmark are timed.
        gate: the latency gate.
        checkpoint: the candidate.
    """
    first = prepare(job.evaluation("latency", checkpoint.reference, job.reducer), image_size_of(checkpoint.path))[0]
    samples: list[Sample] = []
    for row in first.rows:
        samples += first.reader.read(row).samples
        if len(samples) >= gate.questions:
            break
    sampling = Sampling(max_new_tokens=first.generation.max_new_tokens)
    with _threads(gate.threads):
        config = ServedModelConfig(reference=checkpoint.pinned, dtype=gate.dtype, device=gate.device)
        model = load_model(checkpoint.path, config, gate.at_most_ms, job.reducer)
        processor = load_processor(checkpoint.path)
        # The budgets share the images: with a cache, the vision tower would be timed once for all of them.
        limits = gate.engine.model_copy(update={"feature_cache_mb": 0})
        engine = ContinuousEngine(model, processor, limits, name="gate", reducer=job.reducer)
        prompts = PromptBuilder(processor)

        def answer(sample: Sample, budget: int) -> None:
            images = [prompts.pixels(decode_image(image)) for image in sample.images]
            answer_all(
                engine,
                [
                    prompts.request(
                        "gate", sample.prompt, images, num_visual_tokens=budget, sampling=sampling, timeout_s=_TIMEOUT_S
                    )
                ],
            )

        try:
            measured = _answer_p95_ms(answer, samples[: gate.questions], list(gate.at_most_ms))
        finally:
            engine.close()
    for budget, milliseconds in measured.items():
        limit = gate.at_most_ms[budget]
        yield Check(
            gate="latency",
            what=f"p95 of one question at {budget} visual tokens",
            measured=f"{milliseconds:.1f} ms",
            required=f"at most {limit:g} ms",
            passed=milliseconds <= limit,
            budget=budget,
        )


def _answer_p95_ms(
    answer: Callable[[Sample, int], object], samples: Sequence[Sample], budgets: Sequence[int]
) -> dict[int, float]:
    """95th percentile of the time per answer at each budget, in milliseconds.

    Each question is answered at all budgets in turn, so that other load on the machine affects all budgets alike.

    Args:
        answer: answers a sample at a number of visual tokens, starting from encoded images.
        samples: the questions; the first one is also answered at every budget as a warm-up that is not timed.
        budgets: visual tokens per image.
    """
    for budget in budgets:
        answer(samples[0], budget)
    times: dict[int, list[float]] = {budget: [] for budget in budgets}
    for sample in samples:
        for budget in budgets:
            began = time.perf_counter()
            answer(sample, budget)
            times[budget].append(1000 * (time.perf_counter() - began))
    return {budget: float(np.percentile(each, _PERCENTILE)) for budget, each in times.items()}


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Set the number of torch's CPU threads for a `with` block; None keeps the present number."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
