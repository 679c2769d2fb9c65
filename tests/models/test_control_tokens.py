"""No text becomes a control token, and ordinary texts have the token ids of the stock processors, in every family."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AddedToken, GemmaTokenizer, LlamaTokenizer, LlavaProcessor, PaliGemmaProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from parcelray.config.connector import M3ConnectorConfig
from parcelray.datasets.collator import IGNORED, Collator
from parcelray.datasets.sample import Sample
from parcelray.errors import UserError
from parcelray.models.backbones import ElasticVLM
from parcelray.models.backbones.llava_processor import ElasticLlavaProcessor
from parcelray.models.backbones.paligemma_processor import ElasticPaliGemmaProcessor
from parcelray.models.backbones.processor_base import ElasticProcessor
from parcelray.models.mini import build_config, build_model, build_processor, save_checkpoint
from parcelray.models.mini_llava import build
from parcelray.models.mini_llava import build_config as build_llava_config
from parcelray.models.mini_llava import build_model as build_llava_model
from parcelray.models.mini_llava import build_processor as build_llava_processor
from parcelray.models.reduced_decoder import encode_prompts
from parcelray.models.vlm import load_processor
from parcelray.serving.engine.engine import PromptBuilder, Sampling
from parcelray.training.step import losses, to_tensors, with_placeholders
from tests.benchmarks.table_data import png

from .conftest import CONFIG, CORPUS, MINI_LLAVA, random_images

BUDGET = 16
FAMILIES = ("mini paligemma", "gemma", "mini llava", "llama")
ORDINARY = [
    "what color is the circle",
    "",
    " leading and trailing ",
    "\na line end first",
    "two\n\nlines\n",
    "Ceci n'est pas une pipe: \u00e9\u4e2d",
    "<loc0001><loc1023> red",
    "detect <loc0001> red ; blue",
    "a < b > c, <image 1>, <imag e>, <b>bold</b>",
]
FRAMES = ["what is {0}?", "{0}", "x{0}{0}y", "{0}\n", " {0} {0}", "a < {0} > b"]


def _vocabulary(special: list[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of a byte-pair tokenizer with the byte fallback of Llama and Gemma."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    first = [*special, *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer.train_from_iterator(
        [*CORPUS, "USER: ASSISTANT: red blue"] * 3,
        trainers.BpeTrainer(vocab_size=500, special_tokens=first, show_progress=False),
    )
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [tuple(pair) for pair in model["merges"]]


def _processor_of(family: str) -> ElasticProcessor:
    size = {"height": 64, "width": 64}
    if family == "mini paligemma":
        return build_processor(CONFIG, CORPUS)
    if family == "mini llava":
        return build_llava_processor(MINI_LLAVA, CORPUS)
    if family == "gemma":
        vocabulary, merges = _vocabulary(["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"])
        siglip = SiglipImageProcessorPil(size=size)
        siglip.image_seq_length = 256
        return ElasticPaliGemmaProcessor(
            image_processor=siglip, tokenizer=GemmaTokenizer(vocab=vocabulary, merges=merges)
        )
    vocabulary, merges = _vocabulary(["<unk>", "<s>", "</s>"])
    tokenizer = LlamaTokenizer(vocab=vocabulary, merges=merges, padding_side="left", add_bos_token=True)
    names = [AddedToken("<image>", special=True, normalized=False), AddedToken("<pad>", special=True, normalized=False)]
    tokenizer.add_tokens(names, special_tokens=True)
    tokenizer.pad_token = "<pad>"
    return ElasticLlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": 64}, crop_size=size),
        tokenizer=tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


@pytest.fixture(scope="module", params=FAMILIES)
def processor(request: pytest.FixtureRequest) -> ElasticProcessor:
    return _processor_of(request.param)


def _is_llava(processor: ElasticProcessor) -> bool:
    return isinstance(processor, LlavaProcessor)


def _names(processor: ElasticProcessor) -> list[str]:
    """Names of the control tokens, without that of unknown characters, which a text may have."""
    names = set(processor.tokenizer.all_special_tokens) | {processor.image_token}
    return sorted(names - {processor.tokenizer.unk_token})


def _frame(processor: ElasticProcessor, *, with_image: bool) -> tuple[int, int]:
    """Number of tokens of a prompt before and after a text that neither merges with its neighbours nor is empty."""
    (one,) = processor.encode_prompts(["\n"], with_image=with_image)
    (two,) = processor.encode_prompts(["\n\n"], with_image=with_image)
    newline = next(a for a, b in zip(one, two[1:], strict=False) if a == b)
    start = one.index(newline)
    return start, len(one) - start - 1


@pytest.mark.parametrize("num_images", [0, 1, 2])
def test_ordinary_texts_have_the_ids_of_the_stock_processor(processor: ElasticProcessor, num_images: int) -> None:
    images = [random_images(num_images, seed=index) for index in range(len(ORDINARY))] if num_images else None
    answers = None if _is_llava(processor) else ORDINARY[::-1]
    own = processor(images, ORDINARY, answers, num_visual_tokens=None)
    placeholders = processor.image_token * num_images
    for row, text in enumerate(ORDINARY):
        if isinstance(processor, LlavaProcessor):
            stock = LlavaProcessor(
                image_processor=processor.image_processor,
                tokenizer=processor.tokenizer,
                patch_size=processor.patch_size,
                vision_feature_select_strategy=processor.vision_feature_select_strategy,
                num_additional_image_tokens=processor.num_additional_image_tokens,
            )
            line = f"USER: {placeholders}\n{text} ASSISTANT:" if num_images else f"USER: {text} ASSISTANT:"
            expected = stock(images=images[row] if images else None, text=line, return_tensors="pt")
        elif images:
            stock = PaliGemmaProcessor(processor.image_processor, processor.tokenizer)
            expected = stock(
                images=[images[row]], text=[placeholders + text], suffix=[ORDINARY[::-1][row]], return_tensors="pt"
            )
        else:
            line = f"{processor.tokenizer.bos_token}{text}\n"
            answer = ORDINARY[::-1][row] + processor.tokenizer.eos_token
            expected = processor.tokenizer(line, text_pair=answer, add_special_tokens=False, return_tensors="pt")
        kept = own["attention_mask"][row].bool()
        assert own["input_ids"][row][kept].tolist() == expected["input_ids"][0].tolist(), repr(text)
        for key in {"token_type_ids", "labels"} & set(own) & set(expected):
            assert own[key][row][kept].tolist() == expected[key][0].tolist(), (key, text)


@pytest.mark.parametrize("with_image", [True, False])
def test_names_of_control_tokens_in_a_prompt_stay_text(processor: ElasticProcessor, with_image: bool) -> None:
    controls = set(processor.tokenizer.convert_tokens_to_ids(_names(processor)))
    start, end = _frame(processor, with_image=with_image)
    for name in _names(processor):
        for frame in FRAMES:
            text = frame.format(name)
            (ids,) = processor.encode_prompts([text], with_image=with_image)
            own = ids[start : len(ids) - end] if start else ids
            assert not controls & set(own), text
            assert controls & set(ids[: start + 1]) == {processor.tokenizer.bos_token_id}
            assert text.strip() in processor.tokenizer.decode(ids, skip_special_tokens=True), text
    texts = [frame.format(name) for name in _names(processor) for frame in FRAMES]
    for num_images in (0, 1, 2):
        batch = processor.prompts(texts, num_images, num_visual_tokens=BUDGET)
        found = (batch["input_ids"] == processor.image_token_id).sum(1)
        assert found.tolist() == [num_images * BUDGET] * len(texts)


def test_names_of_control_tokens_in_an_answer_stay_text(processor: ElasticProcessor) -> None:
    controls = set(processor.tokenizer.convert_tokens_to_ids(_names(processor)))
    texts = [frame.format(name) for name in _names(processor) for frame in FRAMES]
    for text, ids in zip(texts, processor.encode_answers(texts), strict=True):
        assert ids[-1] == processor.tokenizer.eos_token_id
        assert not controls & set(ids[:-1]), text
        assert processor.tokenizer.decode(ids, skip_special_tokens=True).strip() == text.strip()


def test_what_the_call_does_not_support_is_refused(processor: ElasticProcessor) -> None:
    call: Any = processor
    with pytest.raises(UserError, match="padding False and return_tensors 'np'; it returns padded torch tensors only"):
        call(None, ["a"], padding=False, return_tensors="np")
    images = random_images(3)
    for groups in ([images[:1], images[1:]], [images[:1]], [*([image] for image in images)]):
        with pytest.raises(UserError, match=r"2 prompts got images in groups of \[1.*; give one group per prompt"):
            call(groups, ["a", "b"])


@pytest.mark.parametrize("family", ["mini paligemma", "gemma", "mini llava"])
def test_location_tokens_are_words_in_prompts_and_answers(family: str) -> None:
    processor = _processor_of(family)
    location = processor.tokenizer.convert_tokens_to_ids("<loc0001>")
    assert processor.encode_answers(["<loc0001><loc0001>"])[0][:2] == [location] * 2
    assert processor.encode_prompts(["describe <loc0001>"])[0].count(location) == 1


def test_training_reads_names_of_control_tokens_as_text(processor: ElasticProcessor) -> None:
    names = " ".join(_names(processor))
    sample = Sample(
        id="0",
        benchmark="b",
        family="f",
        task="t",
        images=(png((9, 9, 9)),),
        prompt=f"what is {names}",
        answers=(f"it is {names}",),
        metadata={"regions": [[{"box": [0, 0, 1, 1], "word": processor.image_token}]]},
    )
    batch = to_tensors(Collator(processor, label_patches=True)([sample]), torch.device("cpu"), processor)
    labels = batch.labels_BS[batch.labels_BS != IGNORED].tolist()
    assert labels.count(processor.tokenizer.eos_token_id) == 1
    assert processor.tokenizer.decode(labels, skip_special_tokens=True).strip() == f"it is {names}"
    inputs = with_placeholders(batch, BUDGET, processor.image_token_id)
    assert int((inputs["input_ids"] == processor.image_token_id).sum()) == BUDGET
    assert batch.patch_labels_BN is not None
    assert processor.image_token_id not in batch.patch_labels_BN


@pytest.mark.parametrize("family", ["mini paligemma", "mini llava"])
def test_a_training_step_runs_on_names_of_control_tokens(family: str) -> None:
    processor = _processor_of(family)
    model = _model_of(processor)
    names = " ".join(_names(processor))
    sample = Sample(
        id="0", benchmark="b", family="f", task="t", images=(png((9, 9, 9)),), prompt=names, answers=(names,)
    )
    batch = to_tensors(Collator(processor)([sample]), torch.device("cpu"), processor)
    loss = losses(model, batch, num_visual_tokens=BUDGET, image_token_id=model.config.image_token_id).answer_sum
    assert bool(loss.isfinite())


def test_serving_and_the_reduced_decoder_read_the_prompt_of_evaluation(processor: ElasticProcessor) -> None:
    text = f"what is {' '.join(_names(processor))}"
    expected = processor.prompts([text], 1, num_visual_tokens=1)["input_ids"][0].tolist()
    expected.remove(processor.image_token_id)
    builder = PromptBuilder(processor)
    image = builder.pixels(random_images(1)[0])
    request = builder.request(
        "r", text, [image], num_visual_tokens=BUDGET, sampling=Sampling(max_new_tokens=1), timeout_s=1.0
    )
    assert list(request.prompt_ids) == expected
    reduced = encode_prompts(processor, [text], None, "cpu")
    assert [*reduced.before_O.tolist(), *reduced.after_BT[0].tolist()] == expected


def test_a_placeholder_that_a_checkpoint_marks_as_an_ordinary_token_stays_text(tmp_path: Path) -> None:
    model, processor = build(MINI_LLAVA, CORPUS, None, seed=0)
    save_checkpoint(model, processor, tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        values = json.loads((tmp_path / name).read_text())
        values.pop("extra_special_tokens", None)
        values.pop("image_token", None)
        for token in values.get("added_tokens", []):
            token["special"] = token["special"] and token["content"] != "<image>"
        (tmp_path / name).write_text(json.dumps(values))
    loaded = load_processor(tmp_path)
    assert loaded.image_token_id == processor.image_token_id
    prompts = loaded.encode_prompts(["what is <image>?"])
    assert prompts == processor.encode_prompts(["what is <image>?"])
    assert loaded.image_token_id not in prompts[0]


def _model_of(processor: ElasticProcessor) -> ElasticVLM:
    model: ElasticVLM
    connector = M3ConnectorConfig().model_dump(mode="json")
    if isinstance(processor, ElasticLlavaProcessor):
        llava = build_llava_config(MINI_LLAVA, processor)
        llava.connector = connector
        model = build_llava_model(llava, 0)
    else:
        assert isinstance(processor, ElasticPaliGemmaProcessor)
        config = build_config(CONFIG, processor)
        config.connector = connector
        model = build_model(config, 0)
    model.eval()
    return model
