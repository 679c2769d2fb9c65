"""An endpoint on three hosts: a replica and a proxy on each worker, and the death of one of them."""

import json
from typing import Any

import pytest

from ..hosts import PROJECT, Hosts
from ..processes import wait_until

pytestmark = [pytest.mark.ray, pytest.mark.nightly, pytest.mark.timeout(3600)]

ADDRESSES = ("10.7.0.1", "10.7.0.11", "10.7.0.12")
"""The head and the workers."""
SERVE: dict[str, Any] = {
    "kind": "serve",
    "name": "spread",
    "model": {"reference": "mini_parcel"},
    "budgets": {"offered": [16, 64]},
    # Two replicas of two CPUs do not fit on one host of three.
    "replicas": {"min": 2, "max": 2, "cpus": 2},
    "http": {"host": "0.0.0.0", "proxies": "every_node", "keys_file": "jobs/keys.txt"},
    "detached": True,
}
_ANSWERED = """
    import json, sys
    from openai import OpenAI, OpenAIError
    address, key, count = sys.argv[1:]
    # With retries, as the client has by default: a proxy that does not run yet refuses the connection.
    client = OpenAI(base_url=f"http://{address}:8000/v1", api_key=key, timeout=120)
    answered = 0
    for _ in range(int(count)):
        try:
            answer = client.chat.completions.create(
                model="spread", messages=[{"role": "user", "content": "how many"}], max_tokens=4
            )
            answered += bool(answer.choices)
        except OpenAIError:
            break
    print(json.dumps(answered))
"""


def _state(hosts: Hosts) -> dict[str, Any]:
    (state,) = json.loads(hosts.laptop.run("parcelray endpoint status --json", PROJECT))
    return dict(state)


def _healthy(hosts: Hosts, addresses: tuple[str, ...]) -> bool:
    """Whether both replicas run and exactly these hosts have a proxy that answers."""
    state = _state(hosts)
    return list(state["models"].values()) == ["2 of 2 replicas run"] and sorted(state["proxies"]) == sorted(
        f"proxy on {address}: HEALTHY" for address in addresses
    )


def test_hosts_answer_with_replicas_and_proxies_of_their_own_and_a_dead_one_is_replaced(hosts: Hosts) -> None:
    key = hosts.laptop.run("parcelray keys add test --file jobs/keys.txt", PROJECT).strip().splitlines()[-1]

    def answered(address: str, count: int) -> int:
        return int(hosts.laptop.python(_ANSWERED, address, key, str(count)))

    output = hosts.laptop.run(f"parcelray submit {hosts.job_file(SERVE)} --wait", PROJECT, timeout_s=900)
    wait_until(lambda: _healthy(hosts, ADDRESSES), f"all hosts have proxies: {output}")
    assert [answered(address, 4) for address in ADDRESSES] == [4, 4, 4]

    # A dead host sends nothing, not even the end of its connections.
    hosts.cut(hosts.workers[1])
    hosts.workers[1].kill()
    hosts.connect(hosts.workers[1])
    # The replica of the host that is left takes the requests, also those that waited for the dead one.
    wait_until(lambda: answered(ADDRESSES[0], 1) == 1, "the head answers")
    hosts.wait_for_nodes(2)
    assert [answered(address, 4) for address in ADDRESSES[:2]] == [4, 4]

    hosts.start_worker(hosts.restart(1))
    hosts.wait_for_nodes(3)
    wait_until(lambda: _healthy(hosts, ADDRESSES), "the new host has a replica and a proxy")
    assert [answered(address, 4) for address in ADDRESSES] == [4, 4, 4]
    hosts.laptop.run("parcelray endpoint stop spread", PROJECT)
    assert json.loads(hosts.laptop.run("parcelray endpoint status --json", PROJECT)) == []
