"""Several replicas of one server: one plan for all, readiness, metrics of all from any of them."""

import asyncio
import dataclasses
import threading
import time

import httpx
import pytest
from engine_client import ask as submit
from engine_client import engine_of
from fake_engine import STATE, ScriptedEngine
from inprocess_replica import LOCAL, POOL, LocalGroup, ask, byte_loaded, full, make_replica, replica_of
from plan_factory import make_plan
from prometheus_client.parser import text_string_to_metric_families
from ray.exceptions import GetTimeoutError
from server_process import small_model

from baklava.errors import UserError
from baklava.eviction import StreamingLLM
from baklava.plan.budget_plan import full_cache_plan
from baklava.runtime.model_loader import load_config
from baklava.runtime.prefill import prefill_workspace_bytes
from serve_app.api.metrics import merge_metrics
from serve_app.api.network import ApiKeys
from serve_app.api.routes import create_app
from serve_app.cli import build_parser, reload_plan
from serve_app.deployment.autoscaling import LOAD_METRIC, pool_load, target_replicas
from serve_app.engine.engine import Engine, EngineConfig
from serve_app.engine.types import DeadlineError, PrefillDone, TokenOutput
from serve_app.replication.coordinator import Coordinator, DesiredState
from serve_app.replication.replica_sync import rollout_plan

ONCE = {"prompt": "Once", "max_tokens": 6, "temperature": 0}


@pytest.fixture(scope="module")
def loaded(tiny):
    return byte_loaded(tiny)


@pytest.fixture(scope="module")
def tight(loaded):
    return make_plan(loaded, [[8, 16]] * loaded.geometry.layers, StreamingLLM(), context_length=256)


@pytest.fixture
def pair(loaded):
    """Two replicas of one server, and their group."""
    group = LocalGroup()
    engines = {name: Engine(loaded, full(loaded), EngineConfig(POOL)) for name in ("one", "two")}
    return [replica_of(engine, loaded, name, group) for name, engine in engines.items()], group


def test_a_plan_that_is_posted_to_one_replica_is_active_on_all(pair, tight):
    (one, two), _ = pair
    response = ask(create_app(one), "POST", "/v1/plan", json={"plan": tight.model_dump(mode="json")})
    assert response.json()["digest"] == tight.digest
    assert response.json()["replicas"] == {"one": {"plan": tight.digest}, "two": {"plan": tight.digest}}
    assert one.engine.plan == two.engine.plan == tight
    assert ask(create_app(two), "GET", "/v1/plan").json()["digest"] == tight.digest


def test_a_replica_that_starts_later_or_again_runs_the_active_plan(pair, tight):
    (one, two), group = pair
    group.silent = {"two"}
    one.replica_sync.publish(tight)
    assert two.engine.plan != tight
    two.replica_sync.sync()
    assert two.engine.plan == tight
    desired = group.coordinator.sync(DesiredState())
    group.coordinator = Coordinator()  # as after a restart: the replicas know
    one.replica_sync.sync()
    assert group.coordinator.sync(DesiredState()) == desired


def test_a_replica_that_does_not_answer_is_shown_by_its_last_report_for_a_while(pair, monkeypatch):
    (one, _), group = pair
    names = lambda: [report.replica for report in one.replica_sync.all_reports()]  # noqa: E731
    assert names() == ["one", "two"]
    group.silent = {"two"}
    assert names() == ["one", "two"]
    monkeypatch.setattr("serve_app.replication.replica_sync.MAX_REPORT_AGE_SECONDS", 0.0)
    assert names() == ["one"]


def test_a_plan_that_a_replica_rejects_is_reported_and_not_tried_again(pair, tight, monkeypatch):
    (one, two), _ = pair
    tried = []

    def reject(plan):
        tried.append(plan)
        raise UserError("the pool does not hold one sequence")

    monkeypatch.setattr(two.engine, "swap_plan", reject)
    reports = one.replica_sync.publish(tight)
    assert [report.failure for report in reports] == ["", "the pool does not hold one sequence"]
    two.replica_sync.sync()
    assert len(tried) == 1
    assert two.engine.plan != tight
    page = ask(create_app(two), "GET", "/").text
    assert "does not hold one sequence" in page


def test_a_plan_counts_as_active_when_every_replica_runs_it(pair, tight, loaded, monkeypatch):
    (_, two), group = pair
    group.silent = {"one", "two"}
    assert "0 of 2 replicas run it so far" in rollout_plan(group, tight)
    group.silent = set()
    assert rollout_plan(group, tight) == f"new requests run under plan {tight.digest} ({tight.ratio:.1%})"
    monkeypatch.setattr(two.engine, "swap_plan", lambda _: refuse_plan())
    assert "1 of 2 replicas keep the plan that they have: too small" in rollout_plan(group, full(loaded))


def refuse_plan():
    raise UserError("too small")


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"plan": "plans/demo-30.json"}, "not a path"),
        ({"plan": "/etc/passwd"}, "not a path"),
        ({"plan": {"schema_version": 1}}, "not a valid plan"),
        ({"plan": 7}, "plan"),
        ({"path": "x"}, "plan"),
        ({}, "plan"),
    ],
)
def test_an_invalid_plan_changes_nothing(pair, body, words):
    (one, _), group = pair
    response = ask(create_app(one), "POST", "/v1/plan", json=body)
    assert response.status_code == 400
    assert words in response.json()["error"]["message"]
    assert group.coordinator.sync(DesiredState()) == DesiredState()


def test_a_plan_for_another_model_is_rejected(pair, tiny):
    (one, _), group = pair
    foreign = tiny(layers=3)
    plan = full(dataclasses.replace(foreign, tokenizer=None))
    response = ask(create_app(one), "POST", "/v1/plan", faults=False, json={"plan": plan.model_dump(mode="json")})
    assert response.status_code == 400
    assert "was made for" in response.json()["error"]["message"]
    assert group.coordinator.sync(DesiredState()) == DesiredState()


def test_only_an_admins_key_changes_the_plan(pair, tight):
    (one, _), _ = pair
    app = create_app(one, ApiKeys.from_keys(["plain"], ["admin"]))
    body = {"plan": tight.model_dump(mode="json")}
    for key, status in (("plain", 403), ("wrong", 401), ("admin", 200)):
        response = ask(app, "POST", "/v1/plan", json=body, headers={"Authorization": f"Bearer {key}"})
        assert response.status_code == status
    assert one.engine.plan == tight
    nobody = create_app(one, ApiKeys.from_keys(["plain"], []))
    assert ask(nobody, "POST", "/v1/plan", json=body, headers={"Authorization": "Bearer plain"}).status_code == 403


def test_a_running_request_ends_under_its_plan_while_another_becomes_active(pair, tight, loaded):
    (one, _), _ = pair
    app = create_app(one)
    expected = ask(app, "POST", "/v1/completions", json=ONCE | {"max_tokens": 100}).json()

    begun = threading.Event()
    hook = loaded.model.register_forward_hook(lambda *_: begun.set())

    async def scene():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url=LOCAL) as client:
            long = asyncio.create_task(client.post("/v1/completions", json=ONCE | {"max_tokens": 100}, timeout=60))
            await asyncio.to_thread(begun.wait, 60)
            swapped = await client.post("/v1/plan", json={"plan": tight.model_dump(mode="json")}, timeout=60)
            return (await long).json(), swapped.json(), (await client.post("/v1/completions", json=ONCE)).headers

    try:
        long, swapped, later = asyncio.run(scene())
    finally:
        hook.remove()
    assert long["choices"][0]["text"] == expected["choices"][0]["text"]
    assert swapped["digest"] == later["x-baklava-plan"] == tight.digest
    assert long["system_fingerprint"] != f"baklava-{tight.digest}"


def test_draining_reaches_every_replica_and_new_requests_are_rejected(pair):
    (one, two), group = pair
    group.broadcast(group.coordinator.drain())
    for replica in (one, two):
        app = create_app(replica)
        ready = ask(app, "GET", "/ready", faults=False)
        assert (ready.status_code, ready.headers["retry-after"]) == (503, "5")
        assert ask(app, "GET", "/health").status_code == 200
        rejected = ask(app, "POST", "/v1/completions", json=ONCE)
        assert (rejected.status_code, rejected.json()["error"]["code"]) == (503, "draining")
        assert int(rejected.headers["retry-after"]) > 0
    assert {replica.replica_sync.report().state["draining"] for replica in (one, two)} == {True}


def test_a_replica_that_comes_up_during_a_drain_takes_no_requests(loaded):
    group = LocalGroup()
    applied = group.coordinator.drain()
    late = replica_of(Engine(loaded, full(loaded), EngineConfig(POOL)), loaded, group=group, applied=applied)
    late.replica_sync.sync()
    assert ask(create_app(late), "GET", "/ready").status_code == 503
    assert late.replica_sync.report().state["draining"]


def test_a_replica_that_does_not_answer_leaves_out_no_other(pair):
    (one, _), group = pair
    group.silent = {"one"}  # the one that asks knows itself
    assert [report.replica for report in one.replica_sync.all_reports()] == ["one", "two"]


class Gone:
    def broadcast(self, *_):
        raise GetTimeoutError("it does not answer")

    publish_plan = sync = broadcast


def test_a_group_that_does_not_answer_leaves_a_replica_by_itself(loaded):
    replica = replica_of(Engine(loaded, full(loaded), EngineConfig(POOL)), loaded, group=Gone())
    assert [report.replica for report in replica.replica_sync.all_reports()] == ["one"]
    assert ask(create_app(replica), "GET", "/metrics").status_code == 200


def test_a_signal_to_read_the_plan_again_never_ends_the_server(tmp_path, capsys):
    model, file = small_model(tmp_path / "model"), tmp_path / "plan.json"
    identity, geometry = load_config(str(model))
    full_cache_plan(identity, geometry, 64).write(file)
    cases = [(file, "cannot be sent"), ("full", "nothing to read again"), ("none.json", "cannot read plan")]
    for plan, words in [*cases, ("uniform:0.3", "nothing to read again")]:
        reload_plan(build_parser().parse_args(["--plan", str(plan), "--model", str(model)]), Gone())
        assert words in capsys.readouterr().err


def test_a_plan_that_the_others_cannot_get_is_not_made_active(loaded, tight):
    replica = replica_of(Engine(loaded, full(loaded), EngineConfig(POOL)), loaded, group=Gone())
    response = ask(create_app(replica), "POST", "/v1/plan", json={"plan": tight.model_dump(mode="json")})
    assert (response.status_code, "retry-after" in response.headers) == (503, True)
    assert replica.engine.plan == full(loaded)


def samples(text):
    return [
        (sample.name, sample.labels["replica"], sample.labels, sample.value)
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    ]


def metric_values(replica):
    """Values of a replica's metrics, buckets aside."""
    return {
        name.removeprefix("baklava:"): value
        for name, _, labels, value in samples(replica.metrics.text)
        if "le" not in labels
    }


def test_any_replica_returns_the_metrics_of_all_with_one_description_per_name(pair):
    (one, two), _ = pair
    for replica in (one, two):
        assert ask(create_app(replica), "POST", "/v1/completions", json=ONCE).status_code == 200
    response = ask(create_app(one), "GET", "/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    described = [line for line in response.text.splitlines() if line.startswith("# TYPE ")]
    assert len(described) == len(set(described))
    found = samples(response.text)
    assert {name for _, name, _, _ in found} == {"one", "two"}
    assert {labels["model_name"] for _, _, labels, _ in found} == {"tiny"}
    firsts = [value for name, _, _, value in found if name == "baklava:time_to_first_token_seconds_count"]
    assert firsts == [1, 1]


def test_the_metrics_count_what_happened(loaded):
    def script(work):
        yield PrefillDone()
        yield TokenOutput(97)
        yield TokenOutput(98)
        yield TokenOutput(99, finish_reason="length")

    engine = ScriptedEngine(full(loaded), script)
    engine.now = dataclasses.replace(STATE, running=2, reserved_bytes=1 << 19, cached_entries=5, full_entries=9)
    replica = replica_of(engine, loaded)
    app = create_app(replica)
    ask(app, "POST", "/v1/completions", json=ONCE)
    ask(app, "POST", "/v1/completions", json={"prompt": [5000]})
    now = metric_values(replica)
    assert now["inter_token_latency_seconds_count"] == 2
    assert now["request_success_total"] == 1
    assert now["admission_rejections_total"] == 1
    assert now["request_generation_tokens_sum"] == 3
    assert now["num_requests_running"] == 2
    assert now["kv_cache_usage_perc"] == 0.5
    assert (now["kv_cached_entries"], now["kv_full_entries"]) == (5, 9)
    assert now["num_preemptions_total"] == 0


def test_a_requests_time_is_divided_at_its_admission_and_its_first_token(loaded):
    def script(work):
        time.sleep(0.05)
        admitted = time.monotonic()
        time.sleep(0.15)
        yield PrefillDone(admitted_at=admitted)
        yield TokenOutput(97)
        time.sleep(0.3)
        yield TokenOutput(98, finish_reason="length")

    replica = replica_of(ScriptedEngine(full(loaded), script), loaded)
    ask(create_app(replica), "POST", "/v1/completions", json=ONCE)
    seconds = {
        name: metric_values(replica)[f"request_{name}_time_seconds_sum"] for name in ("queue", "prefill", "decode")
    }
    for name, least in (("queue", 0.05), ("prefill", 0.15), ("decode", 0.3)):
        assert seconds[name] > least - 0.02
    first, whole = (
        metric_values(replica)["time_to_first_token_seconds_sum"],
        metric_values(replica)["e2e_request_latency_seconds_sum"],
    )
    assert seconds["queue"] + seconds["prefill"] == pytest.approx(first)
    inference = metric_values(replica)["request_inference_time_seconds_sum"]
    assert seconds["prefill"] + seconds["decode"] == pytest.approx(inference)
    assert seconds["queue"] + inference <= whole


def test_a_request_is_admitted_before_its_prefill_and_not_before_it_fits(loaded):
    plan, entered, ended = full(loaded), [], []
    hook = loaded.model.register_forward_pre_hook(lambda *_: entered.append(time.monotonic()))
    with engine_of(loaded, plan, pool=plan.bytes_for(256) + prefill_workspace_bytes(plan, 60, 4)) as engine:
        first = submit(engine, b"x" * 60, 190, take=lambda _: ended.append(time.monotonic()))
        second = submit(engine, b"y" * 60, 190)
        assert first.prefill_done.admitted_at <= entered[0]
        # The last token is delivered after the step that generated it has admitted the next request.
        assert ended[-2] <= second.prefill_done.admitted_at
    hook.remove()


@pytest.mark.parametrize(("delivered", "counted"), [(0, 1), (1, 0)])
def test_only_a_request_without_any_output_counts_as_rejected(loaded, delivered, counted):
    def script(work):
        yield PrefillDone()
        yield from [TokenOutput(97)] * delivered
        yield DeadlineError(was_waiting=False)

    replica = replica_of(ScriptedEngine(full(loaded), script), loaded)
    assert ask(create_app(replica), "POST", "/v1/completions", json=ONCE).status_code == 408
    assert metric_values(replica).get("admission_rejections_total", 0) == counted


def test_metrics_have_vllms_names_after_a_prefix_of_our_own(loaded):
    replica = make_replica(loaded)
    names = {family.name for family in text_string_to_metric_families(replica.metrics.text)}
    assert all(name.startswith("baklava:") for name in names)
    theirs = {"num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "num_preemptions"}
    theirs |= {"prompt_tokens", "generation_tokens", "request_success", "time_to_first_token_seconds"}
    theirs |= {"inter_token_latency_seconds", "e2e_request_latency_seconds", "prefix_cache_hits"}
    theirs |= {"prefix_cache_queries", "request_prompt_tokens", "request_generation_tokens"}
    theirs |= {f"request_{part}_time_seconds" for part in ("queue", "prefill", "decode", "inference")}
    theirs |= {"cache_config_info"}
    assert {f"baklava:{name}" for name in theirs} <= names
    (pool,) = [labels for name, _, labels, _ in samples(replica.metrics.text) if name == "baklava:cache_config_info"]
    assert int(pool["block_size"]) == 256
    assert int(pool["num_gpu_blocks"]) == POOL // full(loaded).bytes_per_sequence


def test_merging_keeps_every_sample():
    text = '# HELP a An a.\n# TYPE a gauge\na{{replica="{0}"}} 1\n# HELP b A b.\n# TYPE b gauge\nb{{replica="{0}"}} 2\n'
    both = merge_metrics([text.format("x"), text.format("y")])
    assert both.splitlines() == [
        "# HELP a An a.",
        "# TYPE a gauge",
        'a{replica="x"} 1',
        'a{replica="y"} 1',
        "# HELP b A b.",
        "# TYPE b gauge",
        'b{replica="x"} 2',
        'b{replica="y"} 2',
    ]


@dataclasses.dataclass
class Context:
    aggregated_metrics: dict
    target_num_replicas: int = 3


@pytest.mark.parametrize(
    ("loads", "wanted"), [([0.0], 1), ([0.79], 1), ([0.9], 2), ([0.5, 0.5], 2), ([0.1, 0.1], 1), ([3.2], 4), ([], 3)]
)
def test_replicas_are_added_when_the_pools_fill_up(loads, wanted):
    reported = {LOAD_METRIC: dict(enumerate(loads))} if loads else {}
    assert target_replicas(Context(reported))[0] == wanted


def test_a_waiting_request_counts_as_if_it_were_in_the_pool():
    assert pool_load(reserved_bytes=50, waiting=5, bytes_per_sequence=10, pool_bytes=100) == 1.0
