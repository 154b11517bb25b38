import dataclasses
import re
from html.parser import HTMLParser

import pytest
from inprocess_replica import ask, byte_loaded, full, make_replica
from plan_factory import plan_of

from baklava.eviction import Streaming
from serve_app.api.routes import create_app
from serve_app.api.status_page import heat_map, page, size


@pytest.fixture(scope="module")
def replica(tiny):
    return make_replica(byte_loaded(tiny))


@pytest.fixture(scope="module")
def shown(replica):
    return ask(create_app(replica), "GET", "/")


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.seen, self.attributes = [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        self.attributes += attrs


def test_the_page_asks_nobody_for_anything_and_runs_nothing(shown):
    tags = Tags()
    tags.feed(shown.text)
    assert not {"script", "link", "img", "iframe", "form", "object"} & set(tags.seen)
    assert not [value for name, value in tags.attributes if name in ("src", "href", "action") or name.startswith("on")]
    assert "url(" not in shown.text
    assert "@import" not in shown.text
    assert "default-src 'none'" in shown.headers["content-security-policy"]
    assert shown.headers["refresh"] == "3"


def test_the_page_has_a_dark_side(shown):
    assert "prefers-color-scheme: dark" in shown.text


def test_the_map_has_a_cell_per_layer_and_head_with_its_budget(replica):
    loaded_plan = replica.engine.plan
    drawn = heat_map(loaded_plan)
    assert drawn.count("<rect") == loaded_plan.geometry.layers * loaded_plan.geometry.kv_heads
    assert "layer 1, KV head 0: 256 tokens" in drawn


def test_the_more_a_head_keeps_the_darker_it_is(tiny):
    loaded = byte_loaded(tiny)
    plan = plan_of(loaded, [[8, 16]] * loaded.geometry.layers, Streaming(), context_length=256)
    shades = [float(shade) for shade in re.findall(r'fill-opacity="([\d.]+)"', heat_map(plan))]
    assert shades == [0.5, 1.0] * loaded.geometry.layers


def test_the_page_tells_what_is_promised_held_and_kept(replica):
    report = replica.follower.say()
    state = report.state | {"promised_bytes": 30 << 20, "held_bytes": 10 << 20, "running": 3, "seen": 100, "kept": 25}
    told = page(replica.card, replica.engine.plan, [dataclasses.replace(report, state=state)])
    assert "10.0 MiB held of 30.0 MiB promised" in told  # for those who do not see the bar
    assert "25 of 100 entries are kept (25.0%)" in told
    assert "<b>3</b> running" in told


def test_a_name_from_outside_is_only_text(replica):
    report = dataclasses.replace(replica.follower.say(), replica="<script>x</script>", failed="<b>")
    told = page(replica.card | {"id": '"><script>'}, full(make_loaded(replica)), [report])
    assert "<script>" not in told


def make_loaded(replica):
    return replica.engine._loaded


@pytest.mark.parametrize(
    ("amount", "text"),
    [(0, "0 B"), (1023, "1,023 B"), (1536, "1.5 KiB"), (3 << 20, "3.0 MiB"), (5 << 40, "5,120.0 GiB")],
)
def test_sizes_are_for_people(amount, text):
    assert size(amount) == text
