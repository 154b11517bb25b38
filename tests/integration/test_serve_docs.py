"""The page on serving names all options, routes and metrics of the server, and no others."""

import re

import pytest
from inprocess_replica import byte_loaded, make_replica
from prometheus_client.parser import text_string_to_metric_families
from server_process import ROOT

from serve_app.api.routes import create_app
from serve_app.cli import build_parser

PAGE = (ROOT / "docs/guide/serve.md").read_text()


@pytest.fixture(scope="module")
def replica(tiny):
    return make_replica(byte_loaded(tiny))


def test_the_page_names_every_option_and_no_other(capsys):
    with pytest.raises(SystemExit):
        build_parser().parse_args(["--help"])
    known = set(re.findall(r"--[a-z-]+", capsys.readouterr().out)) - {"--help"}
    on_page = set(re.findall(r"--[a-z][a-z-]+", PAGE))
    assert on_page <= known
    assert known - on_page <= {"--port", "--model", "--plan"}


def test_every_route_is_on_the_page(replica):
    routes = {route.path.replace("{name:path}", "{id}") for route in create_app(replica).routes}
    assert {
        path for path in routes if f"`{path}`" not in PAGE and not re.search(rf"[A-Z] {re.escape(path)}`", PAGE)
    } == set()


def test_the_page_names_every_metric_and_no_other(replica):
    families = {family.name.removeprefix("baklava:") for family in text_string_to_metric_families(replica.metrics.text)}
    section = PAGE[PAGE.index("## Metrics") :]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    on_page = {name.removesuffix("_total") for row in rows for name in re.findall(r"`([a-z0-9_]+)", row)}
    assert on_page == {name for name in families if not name.endswith("_created")}  # the client's own
