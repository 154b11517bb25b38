import dataclasses
import re
from html import unescape
from html.parser import HTMLParser

import pytest
from inprocess_replica import ask, byte_loaded, make_replica
from plan_factory import make_plan

from baklava.evaluation.heat_map import plot_heat_map
from baklava.eviction import HeavyHitter, StreamingLLM
from serve_app.api.routes import create_app
from serve_app.api.status_page import format_bytes, render_page


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


def test_the_page_loads_nothing_else_and_has_no_script(shown):
    tags = Tags()
    tags.feed(shown.text)
    assert not {"script", "link", "img", "iframe", "form", "object"} & set(tags.seen)
    assert not [value for name, value in tags.attributes if name in ("src", "href", "action") or name.startswith("on")]
    assert "url(" not in shown.text
    assert "@import" not in shown.text
    assert "default-src 'none'" in shown.headers["content-security-policy"]
    assert shown.headers["refresh"] == "3"


def test_the_page_has_a_dark_mode(shown):
    assert "prefers-color-scheme: dark" in shown.text


def test_the_map_has_a_cell_per_layer_and_head_with_its_budget(replica, shown):
    geometry = replica.engine.plan.geometry
    assert shown.text.count("<title>layer") == 3 * geometry.layers * geometry.kv_heads  # entries, key and value bits
    assert "<title>layer 1, head 0: 256<" in shown.text


def test_a_head_with_more_entries_has_a_stronger_colour(tiny):
    loaded = byte_loaded(tiny)
    plan = make_plan(loaded, [[8, 16]] * loaded.geometry.layers, StreamingLLM(), context_length=256)
    cells = re.findall(r'fill-opacity="([\d.]+)"><title>layer \d+, head \d+: (\d+)<', plot_heat_map(plan))
    opacities = {int(tokens): float(opacity) for opacity, tokens in cells}
    assert opacities[8] < opacities[16] == 1.0


def test_more_entries_than_the_context_has_tokens_are_explained(tiny):
    loaded = byte_loaded(tiny)
    never_evicts, evicts = (
        plot_heat_map(
            make_plan(loaded, [[tokens, tokens]] * loaded.geometry.layers, HeavyHitter(), context_length=3584)
        )
        for tokens in (3616, 3584)
    )
    assert "3,616 entries are the 3,584 tokens of the plan's context and the 32 that" in unescape(never_evicts)
    assert "the plan's context" not in unescape(evicts)


def test_the_page_shows_what_is_reserved_allocated_and_cached(replica):
    report = replica.replica_sync.report()
    state = report.state | {
        "reserved_bytes": 30 << 20,
        "allocated_bytes": 10 << 20,
        "running": 3,
        "full_entries": 100,
        "cached_entries": 25,
    }
    page = render_page(replica.model_card, replica.engine.plan, [dataclasses.replace(report, state=state)])
    assert "10.0 MiB allocated of 30.0 MiB reserved" in page  # for those who do not see the bar
    assert '<dt>of the KV entries are cached</dt><dd><span title="25 of 100">25.0%</span></dd>' in page
    assert "<dt>running</dt><dd>3</dd>" in page
    free, sequence = state["pool_bytes"] - (30 << 20), replica.engine.plan.bytes_per_sequence
    assert f"<dt>more sequences of 256 tokens fit</dt><dd>{free // sequence:,}</dd>" in page


def test_a_budget_is_shown_up_to_the_length(replica, tiny):
    loaded = byte_loaded(tiny)
    plan = make_plan(loaded, [[260, 8]] * loaded.geometry.layers, StreamingLLM(), context_length=256)
    assert "8 to 256 entries per head" in render_page(replica.model_card, plan, [])


def test_names_are_escaped(replica):
    report = dataclasses.replace(replica.replica_sync.report(), replica="<script>x</script>", failure="<b>")
    page = render_page(replica.model_card | {"id": '"><script>'}, replica.engine.plan, [report])
    assert "<script>" not in page


@pytest.mark.parametrize(
    ("amount", "text"),
    [(0, "0 B"), (1023, "1,023 B"), (1536, "1.5 KiB"), (3 << 20, "3.0 MiB"), (5 << 40, "5,120.0 GiB")],
)
def test_sizes_have_a_unit_that_people_read(amount, text):
    assert format_bytes(amount) == text
