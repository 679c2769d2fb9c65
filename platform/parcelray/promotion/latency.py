"""The latency gate: one question at a time on the engine that serves, in this process."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from parcelray.config.promote import LatencyGate, PromoteJob
from parcelray.datasets.images import decode_image
from parcelray.datasets.sample import Sample
from parcelray.evaluation.setup import prepare
from parcelray.models.checkpoint import ResolvedCheckpoint
from parcelray.models.vlm import image_size_of, load_processor
from parcelray.promotion.answer_latency import answer_p95_ms
from parcelray.promotion.gates import Check
from parcelray.serving.engine.continuous_engine import ContinuousEngine
from parcelray.serving.engine.engine import Sampling
from parcelray.serving.engine.waiting import answer_all
from parcelray.serving.ingress.prompting import PromptBuilder
from parcelray.serving.replica.engine_factory import limits_of
from parcelray.serving.replica.replica_loading import load_model
from parcelray.serving.replica.replica_settings import ReplicaSettings

_TIMEOUT_S = 600.0


def check_latency(job: PromoteJob, gate: LatencyGate, checkpoint: ResolvedCheckpoint) -> Iterator[Check]:
    """Times the first benchmark's questions at every budget that the gate names.

    Args:
        job: of the promotion.
        gate: of the latency.
        checkpoint: of the candidate.
    """
    first = prepare(job.evaluation("latency", checkpoint.reference), image_size_of(checkpoint.path))[0]
    samples: list[Sample] = []
    for row in first.task.rows:
        samples += first.task.reader.read(row).samples
        if len(samples) >= gate.questions:
            break
    sampling = Sampling(max_new_tokens=first.task.generation.max_new_tokens)
    with _threads(gate.threads):
        settings = ReplicaSettings(
            path=str(checkpoint.path),
            version=checkpoint.pinned,
            connector=None,
            dtype=gate.dtype,
            device=gate.device,
            budgets=tuple(gate.at_most_ms),
            # The budgets share the images: kept, their features would be timed once for all of them.
            engine=gate.engine.model_copy(update={"feature_cache_mb": 0}),
            threads=gate.threads,
        )
        processor = load_processor(checkpoint.path)
        engine = ContinuousEngine(load_model(settings), processor, limits_of(settings.engine), name="gate")
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
            measured = answer_p95_ms(answer, samples[: gate.questions], list(gate.at_most_ms))
        finally:
            engine.close()
    for budget, found in measured.items():
        most = gate.at_most_ms[budget]
        what = f"p95 of one question at {budget} visual tokens"
        yield Check("latency", what, f"{found:.1f} ms", f"at most {most:g} ms", found <= most, budget)


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
