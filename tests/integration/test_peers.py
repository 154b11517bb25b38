import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.kvpress.cli import Job, make_jobs, parse_args, run
from benchmarks.kvpress.loading import UserError, Window, check_scorable, read_windows, validate_windows
from benchmarks.kvpress.presses import FULL, PRESSES, Press, find_press
from benchmarks.kvpress.results import Compression, Geometry, Journal, Row, summarize_plan, table, write
from benchmarks.kvpress.scoring import attention_mask, continue_from, prefill, reference, score_press

ROOT = Path(__file__).parents[2]
GEOMETRY = Geometry(layers=2, kv_heads=3, head_dim=4)
WINDOW = Window("a:0", "a", tuple(range(12)), 8)
ROW = Row(
    run="run",
    press="snapkv",
    compression="kept=0.5",
    window="a:0",
    document="a",
    nll_full=2.0,
    nll=2.5,
    kl=0.25,
    kept=24,
    shortest=4,
    longest=4,
    storage_bytes=2 * 7 * 6 * 4 * 4,  # keys and values of 7 tokens, 6 heads, 4 numbers of 4 bytes
    storage_dtype="float32",
    seconds=1.5,
)


def score(*arguments: str, code: int = 2) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.kvpress.cli", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done


def file_of(folder: Path, **changed: Any) -> Path:
    content = {"context": 8, "continuation": 4, "windows": [{"name": "a:0", "document": "a", "ids": [*range(12)]}]}
    path = folder / "windows.json"
    path.write_text(json.dumps(content | changed))
    return path


def test_a_window_may_name_its_document(tmp_path: Path) -> None:
    assert read_windows(file_of(tmp_path)) == [WINDOW]
    (window,) = read_windows(file_of(tmp_path, windows=[{"name": "a:0", "ids": [*range(12)]}]))
    assert (window.document, window.context, window.continuation) == (None, 8, 4)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"context": 0}, "a length of 0 tokens"),
        ({"continuation": "4"}, "a length of '4' tokens"),
        ({"context": 9}, "has 12 ids, not 13"),
        ({"windows": []}, "has no windows"),
        ({"windows": [{"name": "a"}]}, "ids"),
        ({"windows": [{"name": "a", "ids": [0.5] * 12}]}, "not a whole number"),
        ({"windows": [{"name": "a", "ids": [0] * 12}] * 2}, "the same name"),
    ],
)
def test_an_invalid_windows_file_is_refused(tmp_path: Path, changed: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        read_windows(file_of(tmp_path, **changed))


def test_windows_of_another_model_are_refused() -> None:
    validate_windows([WINDOW], SimpleNamespace(vocab_size=12, max_position_embeddings=12))
    with pytest.raises(UserError, match="outside 0 to 10"):
        validate_windows([WINDOW], SimpleNamespace(vocab_size=11, max_position_embeddings=12))
    with pytest.raises(UserError, match="12 tokens, the model 11 positions"):
        validate_windows([WINDOW], SimpleNamespace(vocab_size=12, max_position_embeddings=11))


@pytest.mark.parametrize("config", [{"model_type": "gpt2"}, {"model_type": "mistral", "sliding_window": 4096}])
def test_models_that_would_be_scored_wrongly_are_refused(config: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"; (give|use) "):
        check_scorable(SimpleNamespace(**config))


def test_bytes_of_entries_are_keys_and_values_in_16_bits() -> None:
    config = LlamaConfig(num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=3, hidden_size=24, head_dim=4)
    assert Geometry.from_config(config) == GEOMETRY
    assert GEOMETRY.nbytes(GEOMETRY.heads) == 2 * 3 * 4 * 2 * 2


def test_the_continuation_takes_its_bytes_from_the_context() -> None:
    assert Compression("kept", 0.3).entries(3072, 512) == 921
    assert Compression("bytes", 0.3).entries(3072, 512) == 1075 - 512
    assert Compression("bytes", 1).entries(3072, 512) == 3072


@given(share=st.floats(0.001, 1), context=st.integers(1, 5000), continuation=st.integers(1, 1000))
def test_a_compression_never_exceeds_its_share_of_the_bytes(share: float, context: int, continuation: int) -> None:
    try:
        entries = Compression("bytes", share).entries(context, continuation)
    except UserError:
        assert share * (context + continuation) < continuation + 1
    else:
        assert 1 <= entries <= context
        assert entries + continuation <= share * (context + continuation) + 1e-6


@pytest.mark.parametrize(
    ("unit", "share", "remedy"),
    [
        ("bytes", 0.1, 0.144),
        ("kept", 0.0001, 0.001),
        ("kept", 0, 0.3),
        ("bytes", 1.1, 0.3),
        ("kept", float("nan"), 0.3),
    ],
)
def test_a_share_that_leaves_nothing_is_refused_with_one_that_does(unit: Any, share: float, remedy: float) -> None:
    with pytest.raises(UserError, match=f"(at least|try) {remedy:g}$"):
        Compression(unit, share).entries(3072, 512)
    assert Compression(unit, remedy).entries(3072, 512) >= 1


@given(context=st.integers(70, 9000), data=st.data())
def test_the_ratio_given_to_kvpress_keeps_exactly_the_requested_entries(context: int, data: Any) -> None:
    entries = data.draw(st.integers(1, context))
    assert int(context * (1 - PRESSES["snapkv"].ratio(entries, context))) == entries
    all_heads = 90 * context
    assert all_heads - int(all_heads * PRESSES["kvzip"].ratio(entries, context)) == 90 * entries
    assert all(0 <= press.ratio(entries, context) < 1 for press in PRESSES.values())


def test_an_unknown_press_and_a_context_that_is_too_short_are_refused() -> None:
    with pytest.raises(UserError, match="choose among full, streaming"):
        find_press("h2o", 100)
    with pytest.raises(UserError, match="64 tokens is too short for snapkv, which needs 65"):
        find_press("snapkv", 64)


def test_every_press_is_scored_at_every_share_and_the_full_cache_once() -> None:
    arguments = [
        "--windows",
        "w",
        "--model",
        "m",
        "--presses",
        FULL,
        "keydiff",
        "--kept",
        "0.5",
        "0.5",
        "--bytes",
        "0.75",
    ]
    jobs = make_jobs(parse_args(arguments), WINDOW)
    assert {job.plan: job.entries for job in jobs} == {"full": 8, "keydiff:kept=0.5": 4, "keydiff:bytes=0.75": 5}


def test_the_output_has_the_keys_of_evaluate_and_the_storage(tmp_path: Path) -> None:
    rows = [ROW, replace(ROW, window="b:0", document=None, nll=2.0, kl=0.75)]
    plan = summarize_plan(rows, GEOMETRY, WINDOW, frees_memory=True)
    write(tmp_path / "scores.json", [plan], {"kvpress": "0.5.5"})
    content = json.loads((tmp_path / "scores.json").read_text())
    (found,) = content["plans"]
    assert found["plan"] == {
        "bytes_per_sequence": GEOMETRY.nbytes(24 + 4 * 6),
        "full_bytes_per_sequence": GEOMETRY.nbytes(12 * 6),
        "ratio": pytest.approx(8 / 12),
    }
    assert (found["kept"], found["storage_bytes"], found["allocated_bytes"]) == (0.5, 1344, 672)
    assert found["allocated_bytes"] == GEOMETRY.nbytes(7 * 6)  # the last token of the continuation is never fed
    assert found["mean"] == {"dnll": 0.25, "kl": 0.5}
    first = {"name": "a:0", "nll_full": 2.0, "nll": 2.5, "dnll": 0.5, "kl": 0.25, "document": "a"}
    assert found["windows"][0] == first
    assert "document" not in found["windows"][1]
    assert "on top" in content["accounting"]
    assert "snapkv:kept=0.5" in table([plan])


def test_a_flat_pyramid_has_a_note() -> None:
    flat = summarize_plan([replace(ROW, press="pyramidkv")], GEOMETRY, WINDOW, frees_memory=True)
    steep = summarize_plan([replace(ROW, press="pyramidkv", longest=6)], GEOMETRY, WINDOW, frees_memory=True)
    assert "SnapKV" in flat["note"]
    assert steep["note"] is None


def test_finished_windows_survive_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "new" / "scores.jsonl"
    Journal(path).add(ROW)
    with path.open("a") as file:
        file.write('{"run": "ru')
    again = Journal(path)
    other = replace(ROW, window="b:0")
    again.add(other)
    assert Journal(path).rows == {ROW.key: ROW, other.key: other}


def test_finished_windows_are_not_scored_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.kvpress.cli.digest", lambda directory, window: "run")
    journal = Journal(tmp_path / "scores.jsonl")
    journal.add(ROW)
    config = SimpleNamespace(num_hidden_layers=2, num_key_value_heads=3, head_dim=4)
    job = Job("snapkv", PRESSES["snapkv"], "kept=0.5", 4)
    (plan,) = run(SimpleNamespace(config=config), tmp_path, [WINDOW], [job], journal)
    assert plan["mean"] == {"dnll": 0.5, "kl": 0.25}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--presses", "h2o"], "there is no press 'h2o'"),
        (["--bytes", "0.3"], "leaves -1 entries per KV head"),
        (["--kept", "2"], "--kept 2 is not a share"),
        (["--limit", "0"], "--limit 0 is below 1"),
        (["--json", "scores.txt", "--presses", "full"], "not the name of a .json file"),
        (["--json", "scores.json", "--presses", "full"], "is not a folder with a config.json"),
    ],
)
def test_errors_are_reported_in_one_sentence(tmp_path: Path, arguments: list[str], said: str) -> None:
    done = score("--windows", str(file_of(tmp_path)), "--model", str(tmp_path), "--presses", "keydiff", *arguments)
    assert said in done.stderr
    assert done.stderr.count("\n") == 1


def test_help_gives_examples() -> None:
    assert "make peers WINDOWS=windows.json" in score("--help", code=0).stdout


def test_make_refuses_windows_that_are_not_there_before_it_installs_anything() -> None:
    done = subprocess.run(["make", "peers", "WINDOWS=none.json"], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 2
    assert "WINDOWS='none.json' is not a file" in done.stderr
    assert done.stdout == ""


def test_a_query_attends_to_cached_entries_that_are_not_hidden_and_to_earlier_queries() -> None:
    config = SimpleNamespace(num_attention_heads=4, num_key_value_heads=2)
    assert attention_mask(2, 3, None, config)[0, 0].tolist() == [[True] * 4 + [False], [True] * 5]
    mask = attention_mask(2, 3, (torch.tensor([1]), torch.tensor([0])), config)
    assert mask.shape == (1, 4, 2, 5)
    assert [head[0, 0].item() for head in mask[0]] == [True, True, False, False]
    assert mask[0, :, :, 1:].equal(attention_mask(2, 3, None, config)[0, :, :, 1:].expand(4, 2, 4))


@pytest.fixture(scope="module")
def tiny() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "intermediate_size": 24, "vocab_size": 12, "max_position_embeddings": 32}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 4}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, attn_implementation="sdpa")).eval()


def acting(act: Callable[[Any, Any], None]) -> Press:
    """A press as kvpress's are: a context manager over the model, whose hook acts on a layer that has attended."""

    @contextmanager
    def hooked(model: Any) -> Iterator[None]:
        def after(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            act(module, kwargs["past_key_values"].layers[module.layer_idx])

        hooks = [each.self_attn.register_forward_hook(after, with_kwargs=True) for each in model.model.layers]
        yield
        for hook in hooks:
            hook.remove()

    return Press(lambda ratio: hooked)


def uneven(module: Any, layer: Any) -> None:
    """Keep the newest entries, 3 in the first layer and 5 in the second."""
    count = 3 + 2 * module.layer_idx
    layer.keys, layer.values = layer.keys[:, :, -count:].clone(), layer.values[:, :, -count:].clone()


def hiding(module: Any, layer: Any) -> None:
    """Hide half of the entries, others in every head."""
    heads, tokens = torch.tensor([[head, token] for head in range(3) for token in range(8) if (head + token) % 2]).T
    module.masked_key_indices = (torch.zeros_like(heads), heads, tokens)


def test_the_full_cache_costs_nothing_through_the_same_path(tiny: LlamaForCausalLM) -> None:
    full = reference(tiny, WINDOW)
    scores = score_press(tiny, WINDOW, full, PRESSES[FULL], 8)
    assert scores.kl == pytest.approx(0, abs=1e-6)
    assert scores.nll == pytest.approx(full.nll, abs=1e-6)
    assert (scores.kept, scores.shortest, scores.longest) == (48, 8, 8)
    assert scores.storage_bytes == 2 * GEOMETRY.nbytes(11 * 6)  # in float32


@torch.inference_mode()
def test_layers_of_unequal_lengths_are_scored_as_token_by_token(tiny: LlamaForCausalLM) -> None:
    ours = continue_from(tiny, WINDOW, prefill(tiny, WINDOW, acting(uneven), 4))
    prefilled = prefill(tiny, WINDOW, acting(uneven), 4)
    assert (prefilled.lengths, prefilled.kept) == ([3, 5], 24)
    steps = [prefilled.logits]
    for position in range(8, 11):
        ids, at = torch.tensor([[WINDOW.ids[position]]]), torch.tensor([[position]])
        steps.append(tiny(ids, past_key_values=prefilled.cache, position_ids=at).logits[0])
    torch.testing.assert_close(ours, torch.cat(steps))


@torch.inference_mode()
def test_noise_in_hidden_entries_moves_nothing_and_the_hiding_leaves_no_trace(tiny: LlamaForCausalLM) -> None:
    full = reference(tiny, WINDOW)
    clean, noisy = (prefill(tiny, WINDOW, acting(hiding), 4) for _ in range(2))
    assert clean.kept == 24
    for layer, hidden in zip(noisy.cache.layers, noisy.masked, strict=True):
        assert hidden is not None
        layer.keys[0, hidden[0], hidden[1]] = 9.0
        layer.values[0, hidden[0], hidden[1]] = 9.0
    moved = continue_from(tiny, WINDOW, noisy)
    torch.testing.assert_close(continue_from(tiny, WINDOW, clean), moved)
    assert not torch.allclose(full.log_probs[1:], torch.log_softmax(moved, -1)[1:], atol=1e-4)
    assert not any(hasattr(layer.self_attn, "masked_key_indices") for layer in tiny.model.layers)
    assert reference(tiny, WINDOW).log_probs.equal(full.log_probs)


def test_a_press_that_keeps_another_number_is_not_scored(tiny: LlamaForCausalLM) -> None:
    with pytest.raises(RuntimeError, match="24 entries in 6 heads instead of 6 per head"):
        score_press(tiny, WINDOW, reference(tiny, WINDOW), acting(uneven), 6)
