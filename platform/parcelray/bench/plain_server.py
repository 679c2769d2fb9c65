"""A minimal FastAPI server, the baseline of `parcelray bench serve`: `generate` behind Ray Serve's own batching.

It collects a batch of requests and runs `generate` once per budget, up to the largest `max_tokens` of the batch. Longer
answers are cut. Checkpoint, processor, precision and threads are those of the endpoint that it is compared with.
"""

import base64
from typing import Any

import torch
from fastapi import FastAPI
from ray import serve

from parcelray.datasets.images import decode_image
from parcelray.models.decoding import answer_lengths, decode_answers, end_token_ids, generate
from parcelray.models.vlm import load_processor
from parcelray.serving.replica import ReplicaSettings
from parcelray.serving.replica.load import load_model
from parcelray.tracking.opening import model_folder


class PlainServer:
    """One replica that parses requests and generates answers.

    Args:
        settings: settings of the model.
    """

    def __init__(self, settings: ReplicaSettings) -> None:
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        folder = model_folder(settings.pin)
        self._model = load_model(folder, settings.model, settings.budgets)
        self._processor = load_processor(folder)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Returns the application; called by Ray Serve."""
        api = FastAPI()

        @api.post("/v1/chat/completions")
        async def chat(body: dict[str, Any]) -> dict[str, Any]:
            text, count = await self._answers(body)
            return {
                "choices": [{"message": {"role": "assistant", "content": text}}],
                "usage": {"completion_tokens": count},
            }

        return api

    @serve.batch(max_batch_size=32, batch_wait_timeout_s=0.02)
    async def _answers(self, bodies: list[dict[str, Any]]) -> list[tuple[str, int]]:
        answers: list[tuple[str, int]] = [("", 0)] * len(bodies)
        for budget in sorted({body["visual_tokens"] for body in bodies}):
            indices = [index for index, body in enumerate(bodies) if body["visual_tokens"] == budget]
            for index, answer in zip(
                indices, self._generate([bodies[index] for index in indices], budget), strict=True
            ):
                answers[index] = answer
        return answers

    @torch.inference_mode()
    def _generate(self, bodies: list[dict[str, Any]], budget: int) -> list[tuple[str, int]]:
        parts = [body["messages"][0]["content"] for body in bodies]
        images = [
            [decode_image(base64.b64decode(content[0]["image_url"]["url"].partition(",")[2]), transparency="white")]
            for content in parts
        ]
        texts = [content[1]["text"] for content in parts]
        inputs: dict[str, Any] = dict(self._processor(images, texts, num_visual_tokens=budget))
        longest = max(body["max_tokens"] for body in bodies)
        tokenizer = self._processor.tokenizer
        end_ids = end_token_ids(self._model, tokenizer)
        new_BM = generate(
            self._model,
            inputs | {"num_visual_tokens": budget},
            max_new_tokens=longest,
            end_ids=end_ids,
            pad_token_id=tokenizer.pad_token_id,
        )
        answers = []
        for body, row in zip(bodies, new_BM, strict=True):
            own_1M = row[None, : body["max_tokens"]]
            lengths, ended = answer_lengths(own_1M, end_ids)
            answers.append((decode_answers(tokenizer, own_1M, lengths, ended)[0], lengths[0]))
        return answers
