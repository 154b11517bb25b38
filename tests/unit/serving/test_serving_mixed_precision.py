"""Plans with mixed-precision keys, as the searched ones: sequences decode alone and in a batch."""

import pytest
from inprocess_replica import ask, byte_loaded, make_replica
from plan_factory import quantized_plan, with_bits, with_mixed_precision

from baklava.eviction import HeavyHitter
from serve_app.api.routes import create_app


@pytest.mark.parametrize("n", [1, 3])
def test_a_plan_with_mixed_precision_keys_is_served_alone_and_in_a_batch(tiny, n):
    loaded = byte_loaded(tiny, head_dim=32)
    plan = with_mixed_precision(
        loaded,
        with_bits(quantized_plan(loaded, HeavyHitter(sinks=2, eviction_interval=4, distance=0)), [(4, 4), (5, 16)]),
    )
    app = create_app(make_replica(loaded, plan))
    body = {"prompt": "The rivers of Europe are long, and many.", "max_tokens": 40, "n": n, "ignore_eos": True}
    answer = ask(app, "POST", "/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] == 40 * n
