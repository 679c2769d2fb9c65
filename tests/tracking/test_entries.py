import pytest

from parcelray.tracking.entries import (
    BATCH_BYTES,
    MAX_PARAM,
    MAX_TAG,
    REDACTED,
    batches,
    clean_key,
    clean_params,
    clean_tags,
    is_secret_key,
)


@pytest.mark.parametrize(
    "key", ["hf_token", "HF_TOKEN", "serving.api_key", "apiKey", "aws_secret_access_key", "db/password", "credentials"]
)
def test_keys_of_secrets_are_recognised(key):
    assert is_secret_key(key)


@pytest.mark.parametrize(
    "key", ["num_visual_tokens", "connector.keys", "tokenizer", "monkey", "max_new_tokens", "keystone"]
)
def test_the_platforms_own_vocabulary_is_no_secret(key):
    assert not is_secret_key(key)


def test_values_of_secret_keys_and_credentials_in_urls_are_masked_and_numbers_are_kept():
    assert clean_params(
        {"hf_token": "abc", "image_token": 7, "uri": "https://me:pw@host/x", "lr": 0.1, "seed": None, "amp": True}
    ) == {
        "hf_token": REDACTED,
        "image_token": "7",
        "uri": "https://***@host/x",
        "lr": "0.1",
        "seed": "None",
        "amp": "True",
    }


def test_values_are_cut_to_mlflows_limits():
    assert len(clean_params({"a": "x" * 9000})["a"]) == MAX_PARAM == 6000
    assert len(clean_tags({"a": "x" * 9000})["a"]) == MAX_TAG == 8000


def test_illegal_characters_of_keys_are_replaced():
    assert clean_key("val/nlvr/accuracy@64") == "val/nlvr/accuracy:64"
    assert clean_key("loss(mean)") == "loss_mean_"
    assert len(clean_key("k" * 400)) == 250


def test_batches_obey_the_limits_of_count_and_bytes():
    entries = [(f"k{i}", "v") for i in range(250)]
    cut = list(batches(entries, 100))
    assert [len(batch) for batch in cut] == [100, 100, 50]
    assert [entry for batch in cut for entry in batch] == entries
    # 6,000 characters outside ASCII are 36,000 bytes of JSON.
    assert [len(batch) for batch in batches([(str(i), "\u00e9" * 6000) for i in range(30)], 100)] == [
        BATCH_BYTES // 36_000 - 1,
        6,
    ]
    assert list(batches([], 100)) == []
