"""The engine's and the ingress' smaller parts, each alone."""

import random
import socket
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from parcelray.errors import UserError
from parcelray.models.backbones.processor_base import ElasticProcessor
from parcelray.serving.engine.engine import EngineStats, Event, Finished, GenerateRequest, Piece, Sampling
from parcelray.serving.engine.job import AnswerWriter
from parcelray.serving.engine.kv_pool import BLOCK_TOKENS, KVPool, slots_of, table_of
from parcelray.serving.engine.sampling import choose, generator_of
from parcelray.serving.engine.text_stream import TextStream
from parcelray.serving.feature_cache import FeatureCache
from parcelray.serving.http.api_errors import ApiError
from parcelray.serving.http.auth import Gatekeeper, add_key, read_keys, remove_key
from parcelray.serving.http.remote_images import fetch_image, is_public
from parcelray.serving.ingress.admission import Admission


def _pool(tokens: int) -> KVPool:
    return KVPool(
        num_layers=2, num_heads=2, head_width=4, max_tokens=tokens, dtype=torch.float32, device=torch.device("cpu")
    )


def test_the_pool_gives_back_what_each_request_wrote() -> None:
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
            # Whole blocks, so that no place holds what another request has left.
            padded = torch.zeros(len(blocks) * BLOCK_TOKENS, 2, 4)
            padded[:length] = written
            pool.write(1, torch.tensor(slots_of(blocks, 0, len(padded))), padded, padded + 1)
            held[step] = (blocks, written)
    owned = [block for blocks, _ in held.values() for block in blocks]
    assert len(owned) == len(set(owned))
    assert pool.used_tokens == len(owned) * BLOCK_TOKENS


def test_the_cache_forgets_the_least_recently_used() -> None:
    cache = FeatureCache(max_bytes=3 * 400)
    for name in "abc":
        cache.put(name, torch.zeros(100))
    assert cache.get("a") is not None
    cache.put("d", torch.zeros(100))
    assert cache.get("b") is None
    assert all(cache.get(name) is not None for name in "acd")
    cache.put("large", torch.zeros(1000))
    assert cache.get("large") is None
    assert (cache.hits, cache.misses, cache.bytes) == (4, 2, 1200)


def test_a_batch_in_the_cache_is_not_kept_for_one_of_its_rows() -> None:
    cache = FeatureCache(max_bytes=10_000)
    batch = torch.zeros(50, 100)
    cache.put("a", batch[3])
    kept = cache.get("a")
    assert kept is not None
    assert kept.untyped_storage().nbytes() == 400


def test_drawn_tokens_follow_the_distribution() -> None:
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


def test_a_row_draws_the_same_alone_and_in_a_batch() -> None:
    logits = torch.randn(5, 50, generator=torch.Generator().manual_seed(0))
    samplings = [Sampling(max_new_tokens=1, temperature=1.0, seed=seed) for seed in range(5)]
    together = choose(logits, samplings, [generator_of(each) for each in samplings])
    assert together == [
        choose(logits[row : row + 1], [samplings[row]], [generator_of(samplings[row])])[0] for row in range(5)
    ]


def test_a_nucleus_is_that_of_a_whole_sort_whatever_is_sorted() -> None:
    rng = torch.Generator().manual_seed(1)
    peaked = -1.5 * torch.arange(1, 20001).log()[torch.randperm(20000, generator=rng)]
    # Flat rows go past what is sorted first, and rows of few values have equals at every edge.
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
            drawn = choose(rows, samplings, [generator_of(each) for each in samplings])
            share = float(torch.rand((), generator=torch.Generator().manual_seed(seed), dtype=torch.float64))
            for logits, token in zip(rows.double(), drawn, strict=True):
                mass, order = (logits / 0.8).softmax(0).sort(descending=True, stable=True)
                sums = mass.cumsum(0)
                size = int((sums < top_p).sum()) + 1
                place = int((sums[:size] <= share * sums[size - 1]).sum())
                near = order[max(0, place - 1) : place + 2].tolist()
                # At the edge of two tokens the last digit of a sum decides.
                assert token in near
                assert token in order[: size + 1].tolist()


def test_a_row_that_holds_no_numbers_has_no_token_and_the_others_theirs() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0]] * 4)
    logits[1, 0] = torch.nan
    logits[2] = -torch.inf
    samplings = [
        Sampling(max_new_tokens=1, temperature=temperature, top_p=1e-6, seed=0)
        for temperature in (1.0, 1.0, 0.0, 1e-50)
    ]
    assert choose(logits, samplings, [generator_of(each) for each in samplings]) == [1, None, None, 1]


class _Counting:
    """A tokenizer of single characters that counts how often it decodes."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.calls = 0

    def decode(self, ids: list[int], **_: Any) -> str:
        self.calls += 1
        return "".join(self.text[each] for each in ids)


def test_text_that_nobody_waits_for_is_decoded_once() -> None:
    tokenizer = _Counting(" some text ")
    stream = TextStream(tokenizer, live=False)
    assert [stream.push(token) for token in range(11)] == [""] * 11
    assert tokenizer.calls == 0
    assert stream.finish() == stream.text == "some text"
    assert tokenizer.calls == 1
    stopping = TextStream(_Counting(" some text "), ["te"], live=False)
    assert "".join(stopping.push(token) for token in range(8)) == "some"
    assert stopping.stopped


def test_a_stop_text_that_comes_with_the_last_characters_is_the_reason() -> None:
    # Characters that may be the start of another one are held back to the end.
    writer = AnswerWriter(_Counting("ab\N{REPLACEMENT CHARACTER}"), frozenset())
    ends: list[Event] = []
    sampling = Sampling(max_new_tokens=3, stop=("b\N{REPLACEMENT CHARACTER}",))
    job = writer.job(GenerateRequest("r", (1,), 0, (), 0, sampling, 1.0), ends.append)
    reasons = [writer.append(job, token, torch.zeros(3)) for token in range(3)]
    assert reasons == [None, None, "length"]
    writer.finish(job, "length", EngineStats())
    (end,) = ends
    assert isinstance(end, Finished)
    assert (end.text, end.reason) == ("a", "stop")


def test_a_stream_begins_with_its_first_token_also_where_that_is_no_text() -> None:
    writer = AnswerWriter(_Counting("\N{REPLACEMENT CHARACTER}bc"), frozenset())
    events: list[Event] = []
    job = writer.job(GenerateRequest("r", (1,), 0, (), 0, Sampling(max_new_tokens=4), 1.0, stream=True), events.append)
    writer.append(job, 0, torch.zeros(3))
    (first,) = events
    assert isinstance(first, Piece)
    assert first.text == ""
    assert job.num_new == 1


@pytest.mark.parametrize(
    "text", ["two words", "caf\u00e9 \u4f60\u597d", "  spaces   inside  ", "line\nline", "a", "1234567"]
)
def test_streamed_text_is_the_text(processor: ElasticProcessor, text: str) -> None:
    ids = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    stream = TextStream(processor.tokenizer)
    pieces = [stream.push(token) for token in ids]
    pieces.append(stream.finish())
    assert "".join(pieces) == stream.text == processor.tokenizer.decode(ids).strip()
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


def test_no_part_of_a_stop_text_is_ever_sent(processor: ElasticProcessor) -> None:
    ids = processor.tokenizer("red green STOP blue", add_special_tokens=False)["input_ids"]
    stream = TextStream(processor.tokenizer, stop=["STOP"])
    sent = ""
    for token in ids:
        sent += stream.push(token)
        assert "ST" not in sent
        if stream.stopped:
            break
    assert stream.stopped
    assert sent + stream.finish() == "red green"


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.216.34", True),
        ("2606:2800:220:1:248:1893:25c8:1946", True),
        ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("::1", False),
        ("fe80::1%eth0", False),
        ("fc00::1", False),
        ("::ffff:10.0.0.1", False),
        ("::ffff:169.254.169.254", False),
        ("::ffff:93.184.216.34", False),
        ("64:ff9b::a00:1", False),
        ("64:ff9b:1::1", False),
        ("2002:a00:1::", False),
        ("2001:0:a00:1::1", False),
        ("::10.0.0.1", False),
        ("fec0::1", False),
    ],
)
def test_only_public_addresses_are_dialled(address: str, public: bool) -> None:
    assert is_public(address) is public


@pytest.mark.parametrize(
    "url",
    [
        "http://images.example.com/a.png",
        "https://other.example.com/a.png",
        "https://images.example.com@127.0.0.1/a.png",
        "https://127.0.0.1\\@images.example.com/a.png",
        "https://images.example.com:8443/a.png",
        "https://images.example.com.evil.example/a.png",
        "https://IMAGES.example.com/a.png",
        "https://images.example.com/a b.png",
        "https://images.example.com/\r\nHost: x",
        "https://images.example.com#@evil.example/",
        "ftp://images.example.com/a.png",
    ],
)
def test_only_listed_hosts_are_asked(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("a refused URL was looked up"))
    with pytest.raises(ApiError) as refused:
        fetch_image(url, {"images.example.com"}, 1000, "image 1")
    assert refused.value.status == 403
    assert "example" not in refused.value.message


def test_a_listed_host_inside_a_private_network_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    # One public address beside a private one is no excuse: which of them is dialled would be the resolver's choice.
    found = [(0, 0, 0, "", (address, 443)) for address in ("93.184.216.34", "10.0.0.1")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    monkeypatch.setattr(socket, "create_connection", lambda *_, **__: pytest.fail("a private address was dialled"))
    with pytest.raises(ApiError) as refused:
        fetch_image("https://images.example.com/a.png", {"images.example.com"}, 1000, "image 1")
    assert refused.value.status == 403


def test_a_name_is_resolved_once_and_that_address_dialled(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_up: list[Any] = []
    dialled: list[Any] = []

    def resolve(*arguments: Any, **_: Any) -> list[Any]:
        looked_up.append(arguments)
        return [(0, 0, 0, "", ("93.184.216.34" if len(looked_up) == 1 else "10.0.0.1", 443))]

    def dial(address: Any, **_: Any) -> None:
        dialled.append(address)
        raise OSError

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(socket, "create_connection", dial)
    with pytest.raises(ApiError) as refused:
        fetch_image("https://images.example.com/a.png", {"images.example.com"}, 1000, "image 1")
    assert refused.value.status == 422
    assert (len(looked_up), dialled) == (1, [("93.184.216.34", 443)])


def test_keys_are_hashes_in_a_private_file(tmp_path: Path) -> None:
    file = tmp_path / "keys" / "keys.txt"
    keys = [add_key(file, name, per_minute=60) for name in ("ann", "bob")]
    assert file.stat().st_mode & 0o077 == 0
    assert not any(key in file.read_text() for key in keys)
    keeper = Gatekeeper(read_keys(file))
    assert [keeper.admit(f"Bearer {key}") for key in keys] == ["ann", "bob"]
    for wrong in (
        None,
        "",
        "Bearer",
        "Bearer ",
        f"Basic {keys[0]}",
        f"Bearer {keys[0]}x",
        f"Bearer {read_keys(file)[0].hash}",
    ):
        with pytest.raises(ApiError) as refused:
            keeper.admit(wrong)
        assert refused.value.status == 401
    with pytest.raises(UserError, match="already"):
        add_key(file, "ann")
    file.write_text(file.read_text() + "plaintext-key\n")
    with pytest.raises(UserError, match="line 3"):
        read_keys(file)


def test_a_key_can_be_removed(tmp_path: Path) -> None:
    file = tmp_path / "keys.txt"
    keys = {name: add_key(file, name) for name in ("ann", "bob")}
    file.write_text("# of the team\n" + file.read_text())
    with pytest.raises(UserError, match="no key named eve; it has ann, bob"):
        remove_key(file, "eve")
    keeper = Gatekeeper(read_keys(file))
    remove_key(file, "ann")
    assert file.stat().st_mode & 0o077 == 0
    assert file.read_text().startswith("# of the team\n")
    keeper.replace(read_keys(file))
    assert keeper.admit(f"Bearer {keys['bob']}") == "bob"
    with pytest.raises(ApiError):
        keeper.admit(f"Bearer {keys['ann']}")
    with pytest.raises(UserError, match="only key"):
        remove_key(file, "bob")


def test_other_keys_do_not_fill_a_used_up_rate(tmp_path: Path) -> None:
    key = add_key(tmp_path / "keys.txt", "ann", per_minute=1)
    keeper = Gatekeeper(read_keys(tmp_path / "keys.txt"), clock=lambda: 0.0)
    keeper.admit(f"Bearer {key}")
    add_key(tmp_path / "keys.txt", "bob")
    keeper.replace(read_keys(tmp_path / "keys.txt"))
    with pytest.raises(ApiError) as refused:
        keeper.admit(f"Bearer {key}")
    assert refused.value.status == 429


def test_a_key_has_its_rate(tmp_path: Path) -> None:
    now = [0.0]
    key = add_key(tmp_path / "keys.txt", "ann", per_minute=6)
    keeper = Gatekeeper(read_keys(tmp_path / "keys.txt"), clock=lambda: now[0])
    for _ in range(6):
        keeper.admit(f"Bearer {key}")
    with pytest.raises(ApiError) as refused:
        keeper.admit(f"Bearer {key}")
    assert (refused.value.status, refused.value.headers["retry-after"]) == (429, "10")
    now[0] = 10.0
    assert keeper.admit(f"Bearer {key}") == "ann"


def test_places_are_given_back_whatever_happens() -> None:
    now = [0.0]
    admission = Admission(2, clock=lambda: now[0])

    def fail() -> None:
        with admission.slot():
            raise RuntimeError

    with admission.slot(), admission.slot():
        with pytest.raises(ApiError) as refused, admission.slot():
            pass
        assert refused.value.status == 429
    for _ in range(20):
        with pytest.raises(RuntimeError):
            fail()
    assert admission.in_flight == 0


def test_when_to_come_back_follows_from_answers_only() -> None:
    now = [0.0]
    admission = Admission(40, clock=lambda: now[0])
    with ExitStack() as visits:
        for _ in range(40):
            visits.enter_context(admission.slot())
        assert admission.retry_after_s() == 1
        for _ in range(10):
            admission.answered()
        for _ in range(500):
            with pytest.raises(ApiError), admission.slot():
                pass
        # Ten answers in ten seconds: twenty of forty take twenty seconds, however many were refused meanwhile.
        assert admission.retry_after_s() == 20
