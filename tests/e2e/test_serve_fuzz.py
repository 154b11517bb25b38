"""Whatever a client sends that its own description of the API allows, or nearly does: never a fault of the server."""

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from inprocess_replica import byte_loaded, make_replica
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error

from serve_app.api.network import ApiKeys
from serve_app.api.routes import create_app
from serve_app.engine.engine import EngineConfig

# schemathesis draws some of its strings with the random module
pytestmark = pytest.mark.filterwarnings("ignore:Do not use the `random` module inside strategies")

EXAMPLES = 24
KEY = {"Authorization": "Bearer key"}


@pytest.fixture(scope="module")
def api(tiny):
    """The description of an app and the app behind it. The key is an admin's, so that plans are posted as well."""
    replica = make_replica(byte_loaded(tiny, max_position_embeddings=64), limits=EngineConfig(1 << 20, max_waiting=4))
    app = create_app(replica, ApiKeys.from_keys([], ["key"]))
    schema = schemathesis.openapi.from_dict(app.openapi())
    schema.app = app
    return schema


@pytest.mark.parametrize("mode", GenerationMode)
def test_no_request_is_a_fault_of_the_server(api, mode):
    num_requests = 0

    def check(case):
        nonlocal num_requests
        num_requests += 1
        response = case.call(headers=KEY)
        case.validate_response(response, checks=[not_a_server_error])
        if response.status_code >= 400:
            assert set(response.json()["error"]) == {"message", "type", "param", "code"}

    for found in api.get_all_operations():
        operation = found.ok()
        if mode is GenerationMode.NEGATIVE and operation.method == "get":
            continue  # nothing in them could be wrong
        strategy = operation.as_strategy(generation_mode=mode)
        bounded = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
        bounded(given(strategy)(check))()
    assert num_requests > 100
