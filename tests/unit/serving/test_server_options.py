"""What a server is started with: the plan, the size of its pool, pinned prefixes, keys."""

import contextlib
import json
import os
import pty
import shutil
import signal
import sys

import pytest
from inprocess_replica import byte_loaded
from plan_factory import make_plan
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.schema import LoggingConfig
from safetensors.torch import load_file, save_file
from server_process import small_model

from baklava.errors import UserError
from baklava.eviction import StreamingLLM
from baklava.plan.budget_plan import PrefillConfig, full_cache_plan
from baklava.plan.geometry import full_cache_bytes
from baklava.runtime import host_memory as memory
from baklava.runtime.model_loader import load_config
from serve_app import cli
from serve_app.api.network import ApiKeys, key_digest, read_api_keys
from serve_app.cli import load_served_plan
from serve_app.deployment.app import ScalingConfig, _application, _drain, hold_controller_log, serving_session
from serve_app.deployment.replica import ReplicaConfig
from serve_app.engine.memory import PoolSize, capacity_table, free_memory_bytes
from serve_app.openai.tokenization import PinnedPrefix, PromptEncoder
from serve_app.replication.coordinator import DesiredState
from serve_app.replication.replica_sync import ReplicaReport


@pytest.fixture(scope="module")
def prompts(tiny):
    return PromptEncoder.from_model(byte_loaded(tiny))


@pytest.mark.parametrize(
    ("text", "amount"),
    [("2GiB", 2 << 30), ("1.5 MiB", 3 << 19), ("512mib", 512 << 20), ("4096", 4096), ("3GB", 3 * 10**9)],
)
def test_a_pool_in_bytes_does_not_depend_on_free_memory(text, amount):
    assert PoolSize.parse(text).shared_by(4).resolve(free_bytes=1) == amount


@pytest.mark.parametrize(
    ("gpus", "pool", "num_gpus"), [(0, 125, 0), (1, 125, 0.25), (3, 250, 0.5), (4, 500, 1), (8, 500, 1)]
)
def test_a_share_of_free_memory_is_divided_between_the_replicas_on_one_device(gpus, pool, num_gpus, monkeypatch):
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 8.0} | ({"GPU": float(gpus)} if gpus else {}))
    monkeypatch.setattr("ray.nodes", lambda: [{"Alive": True, "Resources": {"CPU": 8.0}}])
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    config = ReplicaConfig("demo", None, created=1, pool=PoolSize.parse("50%"), max_waiting=1)
    bound = _application(config, ScalingConfig(4, max_replicas=4), LoggingConfig(), coordinator=None)._bound_deployment
    assert bound.init_args[0].pool.resolve(1000) == pool
    assert bound.init_args[0].threads == 2  # a share of the cores
    assert bound.ray_actor_options["num_gpus"] == num_gpus


@pytest.mark.parametrize("text", ["", "much", "0", "0%", "101%", "-1GiB", "2 PiB", "50%%", "1e9", "GiB"])
def test_an_invalid_size_is_rejected_with_examples(text):
    with pytest.raises(UserError, match=r"2GiB.*50%"):
        PoolSize.parse(text)


def test_a_containers_limit_bounds_what_is_free(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    unbounded = free_memory_bytes()
    (tmp_path / "memory.max").write_text("3000\n")
    (tmp_path / "memory.current").write_text("1000\n")
    assert free_memory_bytes() == 2000 < unbounded
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory_bytes() > 2000


def test_the_capacity_table_leaves_memory_for_one_prompt_that_is_prefilled(tiny):
    loaded = byte_loaded(tiny)
    plan = make_plan(loaded, [[16, 16]] * loaded.geometry.layers, StreamingLLM(), context_length=256)
    whole = full_cache_bytes(plan.geometry, 256)
    rows = capacity_table(loaded, plan, 10 * whole, lengths=(64, 128, 1024))
    assert [tokens for tokens, _, _ in rows] == [64, 128, 256]
    assert [dense for _, dense, _ in rows] == [
        38,
        18,
        8,
    ]  # a prompt is prefilled in 32 bits, twice the 16 of the full cache
    left = [10 * whole - tokens * whole // 128 for tokens in (64, 128, 256)]
    assert [budgeted for _, _, budgeted in rows] == [room // plan.bytes_per_sequence for room in left]


def test_on_another_cluster_a_warning_names_the_pages_that_need_no_key(monkeypatch, capsys):
    for name in (
        "ray.init",
        "ray.shutdown",
        "serve_app.deployment.app._check_cluster",
        "baklava.runtime.ray_session.check_answers",
    ):
        monkeypatch.setattr(name, lambda *_, **__: None)
    for address, words in (("head:6379", ("/-/routes", "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH")), ("", ())):
        monkeypatch.setenv("RAY_ADDRESS", address)
        with serving_session(1):
            warning = capsys.readouterr().err
        assert all(word in warning for word in words)
        assert ("warning" in warning) == bool(words)


def test_a_local_cluster_without_tokens_is_not_started(monkeypatch):
    monkeypatch.setattr("ray.init", lambda *_, **__: pytest.fail("started"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for mode in ("", "disabled"):
        monkeypatch.setenv("RAY_AUTH_MODE", mode)
        with pytest.raises(UserError, match=f"RAY_AUTH_MODE is '{mode}'.*set RAY_AUTH_MODE=token"), serving_session(1):
            pass


class PolledGroup:
    """Answers each broadcast with the next of its polls; an exception in place of a poll is raised."""

    def __init__(self, *polls):
        self.polls = list(polls)

    def drain(self):
        return DesiredState(draining=True)

    def broadcast(self, desired):
        assert desired.draining
        poll = self.polls.pop(0)
        if isinstance(poll, Exception):
            raise poll
        return poll


def state_of(name, running=0, draining=True):
    return ReplicaReport(name, DesiredState(), {"running": running, "waiting": 0, "draining": draining}, "")


@pytest.mark.parametrize(
    "polls",
    [
        [[state_of("a")]],
        [[state_of("a", draining=False)], [state_of("a", running=1)], [state_of("a")]],
        [[state_of("a", 1)], [TimeoutError()], [TimeoutError()], [state_of("a", 1)], [state_of("a")]],
        [[state_of("a", 1), state_of("b")], *[[TimeoutError(), state_of("b")]] * 3],
        [*[[TimeoutError(), state_of("b")]] * 2, [state_of("a", 1), state_of("b")], [state_of("a"), state_of("b")]],
        [*[[TimeoutError(), state_of("b")]] * 3],
        [*[RuntimeError("")] * 9, [state_of("a", 1)], [state_of("a")]],
        [[state_of("a", 1)], *[DeploymentUnavailableError(DeploymentID("a"))] * 3],
    ],
)
def test_a_server_drains_until_all_replicas_are_idle_or_miss_three_polls(polls, monkeypatch):
    monkeypatch.setattr("serve_app.deployment.app._DRAIN_POLL_SECONDS", 0)
    group = PolledGroup(*polls)
    _drain(group, 60)
    assert not group.polls


def test_a_text_is_a_system_prompt_and_its_tokens_begin_every_chat(tmp_path, prompts):
    file = tmp_path / "system.txt"
    file.write_text("Be brief.\n")
    ids = PinnedPrefix.read(file).encode(prompts)
    assert bytes(ids) == b"s:Be brief.;u:"


def test_messages_are_the_start_of_a_chat(tmp_path, prompts):
    file = tmp_path / "turns.json"
    file.write_text(json.dumps([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]))
    assert bytes(PinnedPrefix.read(file).encode(prompts)) == b"u:Hi;a:Yes?;u:"


def test_a_text_in_json_begins_texts(tmp_path, prompts):
    file = tmp_path / "text.json"
    file.write_text(json.dumps({"text": "Once upon"}))
    assert bytes(PinnedPrefix.read(file).encode(prompts)) == b"Once upon"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", "{"),
        ("a.json", "[]"),
        ("a.json", '[{"role": "user"}]'),
        ("a.json", '{"words": "x"}'),
        ("a.json", "7"),
    ],
)
def test_an_invalid_pinned_prefix_is_rejected(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=r"a\.json"):
        PinnedPrefix.read(tmp_path / name)


def test_a_pinned_prefix_that_is_missing_too_long_or_not_for_the_template_is_rejected(tmp_path, prompts):
    with pytest.raises(UserError, match="cannot read"):
        PinnedPrefix.read(tmp_path / "none.txt")
    with pytest.raises(UserError, match="shorten it"):
        PinnedPrefix("long", text="x" * 300).encode(prompts)
    with pytest.raises(UserError, match="rejects"):
        PinnedPrefix("odd", messages=({"role": "assistant", "content": "x"},)).encode(prompts)


def test_admin_keys_are_let_in_as_the_others_are(tmp_path, monkeypatch):
    monkeypatch.setenv("BAKLAVA_ADMIN_KEYS", "boss")
    keys = ApiKeys.from_keys(["one"], read_api_keys(None, "admin"))
    assert keys.all == {key_digest("one"), key_digest("boss")}
    assert keys.admin == {key_digest("boss")}
    assert keys.required
    assert not ApiKeys.from_keys([], []).required
    with pytest.raises(UserError, match="--admin-keys"):
        read_api_keys(tmp_path / "none", "admin")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(small_model(tmp_path_factory.mktemp("model")))


def test_a_method_without_a_profile_makes_a_plan_for_the_length_of_a_window(model):
    plan = load_served_plan("uniform:0.3", model, ["botocore"])
    assert plan.ratio == pytest.approx(0.3, abs=0.01)
    assert plan.context_length == 3584


@pytest.mark.slow
def test_a_method_with_a_profile_measures_it_on_the_calibration_texts_and_says_so(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("BAKLAVA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cli, "PROFILE_CONTEXT_TOKENS", 96)
    monkeypatch.setattr(cli, "PROFILE_CONTINUATION_TOKENS", 32)
    texts = [tmp_path / f"{name}.txt" for name in "abc"]
    for number, text in enumerate(texts):
        text.write_text("".join(chr(97 + (place * place + number) % 26) for place in range(600)))
    plan = load_served_plan("baklava:0.3", model, [str(text) for text in texts])
    assert plan.allocation.method == "baklava"
    assert plan.context_length == 128
    assert "profiling" in capsys.readouterr().err


def test_a_server_may_prefill_in_chunks_whatever_the_plan_says(model, tmp_path):
    assert load_served_plan("uniform:0.3", model, [], 64).prefill == PrefillConfig(mode="chunked", chunk_size=64)
    file = tmp_path / "plan.json"
    load_served_plan("uniform+heavy_hitter:0.3", model, []).write(file)
    assert load_served_plan(str(file), model, []).prefill.mode == "dense"
    assert load_served_plan(str(file), model, [], 64).prefill.chunk_size == 64
    with pytest.raises(UserError, match=r"chunk_size is 32 tokens, .* make chunks longer than the eviction interval"):
        load_served_plan(str(file), model, [], 32)
    with pytest.raises(UserError, match="--prefill-chunk 64 compresses, and --plan full does not; leave one out"):
        load_served_plan("full", model, [], 64)


def test_a_server_refuses_a_checkpoint_without_all_weights_before_it_starts_replicas(model, tmp_path):
    broken = tmp_path / "model"
    shutil.copytree(model, broken)
    full_cache_plan(*load_config(str(broken)), 64).write(tmp_path / "plan.json")
    weights = load_file(broken / "model.safetensors")
    del weights["model.layers.3.mlp.up_proj.weight"]
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    for source in ("full", str(tmp_path / "plan.json"), "uniform:0.3"):
        with pytest.raises(UserError, match=r"lack 1 of the 39 weights .*model.layers.3.mlp.up_proj.weight"):
            load_served_plan(source, str(broken), [])


def test_the_full_cache_has_no_plan_and_an_unknown_name_is_an_error(model, monkeypatch):
    assert load_served_plan("full", model, []) is None
    with pytest.raises(UserError, match="no-such-model"):
        load_served_plan("full", "./no-such-model", [])
    for path in ("greedy/plan.json", "a:b/plan.json", "greedy.json"):
        with pytest.raises(UserError, match="cannot read plan"):
            load_served_plan(path, model, [])
    with pytest.raises(UserError, match="cannot read plan"):
        load_served_plan("none.json", model, [])
    with pytest.raises(UserError, match="without a budget"):
        load_served_plan("uniform", model, [])
    monkeypatch.setattr("baklava.runtime.model_loader.load", lambda *_: pytest.fail("it reads the weights"))
    with pytest.raises(UserError, match="nonsense"):
        load_served_plan("nonsense:0.3", model, [])


HANGUPS = """
import os, signal, sys
from serve_app.cli import _queue_hangups, _wait_for_end
hangups = _queue_hangups()
os.write(int(sys.argv[1]), b"ready ")
_wait_for_end(hangups, lambda: os.write(int(sys.argv[1]), b"reload "))
os.write(int(sys.argv[1]), b"end")
"""


def test_sighup_reads_the_plan_again_and_ends_the_server_only_if_its_terminal_has_closed():
    said, say = os.pipe()
    pid, terminal = pty.fork()
    if pid == 0:
        os.set_inheritable(say, True)
        os.execv(sys.executable, [sys.executable, "-c", HANGUPS, str(say)])
    os.close(say)
    assert os.read(said, 100) == b"ready "
    os.kill(pid, signal.SIGHUP)
    assert os.read(said, 100) == b"reload "
    os.close(terminal)
    assert os.read(said, 100) == b"end"
    os.close(said)
    assert os.waitpid(pid, 0)[1] == 0


@pytest.mark.parametrize(
    ("error", "printed"),
    [
        (UserError("the pool is too small"), "starting\n"),
        (RuntimeError("unknown"), "starting\n(ServeController pid=1) Traceback\n"),
        (None, "starting\n(ServeController pid=1) Traceback\n"),
    ],
)
def test_the_trace_of_a_replica_that_cannot_start_is_not_printed_above_a_sentence(error, printed, capsys):
    with contextlib.suppress(UserError, RuntimeError), hold_controller_log():
        print("(ServeController pid=1) Traceback", file=sys.stderr)
        print("starting", file=sys.stderr)
        if error:
            raise error
    assert capsys.readouterr().err == printed
