from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import CachingLM
from lm_eval.utils import get_rolling_token_windows
from plan_factory import make_plan, random_ids, with_chunked_prefill
from sentencepiece_tokenizer import pieces, sentencepiece_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, Gemma2Config, PreTrainedTokenizerFast

from baklava.cache.budgeted_cache import BudgetedCache
from baklava.data.windows import Window
from baklava.errors import UserError
from baklava.evaluation.lm_eval import BaklavaLM, ModelArgs, PlanCoverage
from baklava.evaluation.window_scoring import prefill_window, score_plan
from baklava.eviction import Eviction, HeavyHitter, KVzip, StreamingLLM
from baklava.plan.budget_plan import BudgetPlan, full_cache_plan
from baklava.runtime import logprobs
from baklava.runtime.decode import generate
from baklava.runtime.model_loader import LoadedModel
from baklava.runtime.prefill import prefill as enter

Maker = Callable[..., LoadedModel]

TIGHT = [[20, 33], [16, 24]]
EVICTIONS = [StreamingLLM(), HeavyHitter(eviction_interval=8), KVzip(eviction_interval=8)]
SIGNS = [chr(0x4E00 + number) for number in range(64)]  # a token each, none of which is a stop or a space


@pytest.fixture
def loaded_model(tiny: Maker) -> LoadedModel:
    """A tiny model whose tokens are single signs, so that a text can be made for any ids."""
    vocabulary = {sign: number for number, sign in enumerate(["<pad>", "<s>", "</s>", *SIGNS[3:]])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<pad>"
    )
    return replace(tiny(), tokenizer=made)


def signs(ids: list[int]) -> str:
    return "".join(SIGNS[number] for number in ids)


def ids_of(tokens: int, seed: int = 0) -> list[int]:
    return (random_ids(1, tokens, seed)[0] % 61 + 3).tolist()


def make_instance(kind: str, *arguments: Any) -> Instance:
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


def loglikelihood(model: BaklavaLM, *pairs: tuple[list[int], list[int]]) -> list[tuple[float, bool]]:
    return model.loglikelihood([make_instance("loglikelihood", signs(context), signs(text)) for context, text in pairs])


def plans(loaded: LoadedModel) -> list[BudgetPlan]:
    made = [make_plan(loaded, TIGHT, eviction) for eviction in EVICTIONS]
    return [*made, with_chunked_prefill(made[0], 24), with_chunked_prefill(made[1], 24)]


@pytest.mark.slow
@pytest.mark.parametrize("number", range(5), ids=["streaming", "heavy_hitter", "reconstruction", "chunks", "hh-chunks"])
@pytest.mark.parametrize("length", [1, 2, 61])
def test_a_loglikelihood_is_that_of_the_window_score(loaded_model: LoadedModel, number: int, length: int) -> None:
    plan, ids = plans(loaded_model)[number], ids_of(80 + length)
    window = Window("w", "d", tuple(ids), 80)
    eviction = EVICTIONS[(0, 1, 2, 0, 1)[number]]
    expected = score_plan(loaded_model, prefill_window(loaded_model, window, [eviction]), plan).nll * length
    [(found, _)] = loglikelihood(BaklavaLM(loaded_model, plan), (ids[:80], ids[80:]))
    assert found == pytest.approx(-expected, abs=1e-3)


@torch.inference_mode()
def test_the_full_plan_is_a_plain_forward(loaded_model: LoadedModel) -> None:
    ids, model = (
        ids_of(90),
        BaklavaLM(loaded_model, full_cache_plan(loaded_model.identity, loaded_model.geometry, 200, bits=32)),
    )
    greedy_ids = loaded_model.model.generate(torch.tensor([ids[:60]]), max_new_tokens=9, use_cache=False)[
        0, 60:
    ].tolist()
    for text in (ids[60:], greedy_ids, [*greedy_ids[:-1], (greedy_ids[-1] + 1) % 60 + 3]):
        whole = torch.tensor([ids[:60] + text])
        log_probs = loaded_model.model(whole, use_cache=False).logits[0, 59:-1].log_softmax(-1)
        expected = float(log_probs.gather(-1, whole[0, 60:, None]).sum())
        [(found, greedy)] = loglikelihood(model, (ids[:60], text))
        assert found == pytest.approx(expected, abs=1e-3)
        assert greedy == (text == greedy_ids)


@pytest.mark.slow
@pytest.mark.parametrize("eviction", EVICTIONS[:2], ids=str)
def test_a_tight_plan_changes_the_results(loaded_model: LoadedModel, eviction: Eviction) -> None:
    ids = ids_of(130)
    full = BaklavaLM(loaded_model, full_cache_plan(loaded_model.identity, loaded_model.geometry, 200, bits=32))
    tight = BaklavaLM(loaded_model, make_plan(loaded_model, TIGHT, eviction))
    text = signs(ids)
    [rolling, budgeted] = [
        each.loglikelihood_rolling([make_instance("loglikelihood_rolling", text)])[0] for each in (full, tight)
    ]
    assert abs(rolling - budgeted) > 0.1
    [[(whole, _)], [(cut, _)]] = [loglikelihood(each, (ids[:80], ids[80:])) for each in (full, tight)]
    assert abs(whole - cut) > 0.1
    options = {"until": [], "max_gen_toks": 40}
    assert (
        len({each.generate_until([make_instance("generate_until", text, options)])[0] for each in (full, tight)}) == 2
    )
    assert [coverage.affected for coverage in full.coverages] == [0, 0, 0]
    assert [coverage.affected for coverage in tight.coverages] == [1, 1, 1]


def test_requests_that_share_a_context_prefill_it_once(
    loaded_model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefilled = []

    def counting(loaded: LoadedModel, plan: BudgetPlan, ids: torch.Tensor) -> Any:
        prefilled.append(ids.shape[1])
        return enter(loaded, plan, ids)

    monkeypatch.setattr(logprobs, "prefill", counting)
    model = BaklavaLM(loaded_model, make_plan(loaded_model, TIGHT, HeavyHitter(eviction_interval=8)))
    one, other = ids_of(50), ids_of(70, seed=1)
    pairs = [(one, ids_of(9, 2)), (other, ids_of(9, 2)), (one, ids_of(1, 3)), (one, ids_of(30, 4)), (other, ids_of(1))]
    together = loglikelihood(model, *pairs)
    assert prefilled == [70, 50]
    alone = [loglikelihood(model, pair)[0] for pair in pairs]
    assert [found for found, _ in together] == pytest.approx([found for found, _ in alone], abs=1e-4)


@pytest.mark.slow
@torch.inference_mode()
@pytest.mark.parametrize("number", range(5), ids=["streaming", "heavy_hitter", "reconstruction", "chunks", "hh-chunks"])
def test_a_rolling_loglikelihood_feeds_every_token_of_a_window_alone(
    loaded_model: LoadedModel, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logprobs, "LOGITS_CHUNK_TOKENS", 13)  # a text longer than a step
    plan, ids = plans(loaded_model)[number], ids_of(54)
    expected = 0.0
    for seen, scored in get_rolling_token_windows(ids, 1, 36, 1):
        cache, first = enter(
            loaded_model, plan, torch.tensor([seen[:1]])
        )  # a method may repeat even a prompt of one token
        parts = [first]
        for token in seen[1:]:
            parts.append(loaded_model.model(torch.tensor([[token]]), past_key_values=cache).logits[0])
            assert cache.nbytes <= plan.bytes_per_sequence
        log_probs = torch.cat(parts)[-len(scored) :].log_softmax(-1)
        expected += float(log_probs.gather(-1, torch.tensor(scored)[:, None]).sum())
    [found] = BaklavaLM(loaded_model, plan, max_length=36).loglikelihood_rolling([make_instance("rolling", signs(ids))])
    assert found == pytest.approx(expected, abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1, 3, 4], ids=["streaming", "heavy_hitter", "chunks", "hh-chunks"])
def test_greedy_generation_is_that_of_transformers_in_the_same_cache(loaded_model: LoadedModel, number: int) -> None:
    plan, ids = plans(loaded_model)[number], ids_of(80)
    theirs = loaded_model.model.generate(torch.tensor([ids]), past_key_values=BudgetedCache(plan), max_new_tokens=30)
    assert generate(loaded_model, plan, ids, max_new_tokens=30) == theirs[0, 80:].tolist()


@torch.inference_mode()
def test_generation_continues_after_a_repeated_prompt(loaded_model: LoadedModel) -> None:
    plan, made = plans(loaded_model)[2], []
    cache, logits = enter(loaded_model, plan, torch.tensor([ids_of(80)]))
    for _ in range(20):
        made.append(int(logits.argmax()))
        logits = loaded_model.model(torch.tensor([made[-1:]]), past_key_values=cache).logits[:, -1]
    assert generate(loaded_model, plan, ids_of(80), max_new_tokens=20) == made


def test_greedy_generation_with_the_full_plan_is_the_plain_model(loaded_model: LoadedModel) -> None:
    ids, plan = ids_of(80), full_cache_plan(loaded_model.identity, loaded_model.geometry, 200, bits=32)
    plain = loaded_model.model.generate(torch.tensor([ids]), use_cache=False, max_new_tokens=20)[0, 80:].tolist()
    model = BaklavaLM(loaded_model, plan)
    [text] = model.generate_until([make_instance("generate_until", signs(ids), {"until": [], "max_gen_toks": 20})])
    assert text == signs(plain)
    stop = signs(plain[7:9])
    [cut] = model.generate_until([make_instance("generate_until", signs(ids), {"until": [stop], "max_gen_toks": 20})])
    assert cut == signs(plain).split(stop)[0]


def test_a_generated_text_keeps_its_first_space_and_lacks_its_end_token(
    tiny: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = sentencepiece_tokenizer(end="<tool>")  # not a special token, so decoding alone would write it
    loaded = replace(tiny(vocab_size=512), tokenizer=tokenizer)
    made = pieces(tokenizer, "▁Paris", "▁and", "▁Rome", ".", "<tool>")
    monkeypatch.setattr("baklava.evaluation.lm_eval.generate", lambda *args, **options: made)
    model = BaklavaLM(loaded, full_cache_plan(loaded.identity, loaded.geometry, 200))

    def text(until: list[str]) -> str:
        options = {"until": until, "max_gen_toks": 20}
        return model.generate_until([make_instance("generate_until", "The capital of France is", options)])[0]

    assert text([]) == " Paris and Rome."
    assert text([" and"]) == " Paris"


def test_sampling_follows_its_seed_and_beams_are_rejected(loaded_model: LoadedModel) -> None:
    model = BaklavaLM(loaded_model, make_plan(loaded_model, TIGHT, StreamingLLM()))

    def drawn(seed: int, **options: Any) -> str:
        torch.manual_seed(seed)
        given = {"until": [], "max_gen_toks": 20, "do_sample": True, "temperature": 0.9, **options}
        return model.generate_until([make_instance("generate_until", signs(ids_of(40)), given)])[0]

    assert drawn(1) == drawn(1) != drawn(2)
    assert drawn(1, top_k=1) == drawn(2, top_k=1)
    for options in ({"num_beams": 2}, {"num_return_sequences": 2}):
        with pytest.raises(UserError, match="one sequence at a time"):
            drawn(1, **options)


def kinds(model: BaklavaLM) -> list[Callable[[], object]]:
    """One request of each kind."""
    text = signs(ids_of(60))
    return [
        lambda: model.loglikelihood([make_instance("loglikelihood", text, SIGNS[5] + SIGNS[9])]),
        lambda: model.loglikelihood_rolling([make_instance("loglikelihood_rolling", text)]),
        lambda: model.generate_until([make_instance("generate_until", text, {"until": [], "max_gen_toks": 3})]),
    ]


@pytest.mark.parametrize("kind", range(3))
def test_a_cache_that_exceeds_its_reserve_ends_the_run(
    loaded_model: LoadedModel, kind: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BudgetedCache, "reserved_bytes", 1)
    with pytest.raises(RuntimeError, match="reserved"):
        kinds(BaklavaLM(loaded_model, make_plan(loaded_model, TIGHT, StreamingLLM())))[kind]()


@pytest.mark.parametrize("kind", range(3))
def test_a_model_that_bypasses_the_cache_ends_the_run(
    loaded_model: LoadedModel, kind: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner, forward = loaded_model.model.model, loaded_model.model.model.forward

    def forgetting(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **{**kwargs, "past_key_values": None, "use_cache": False})

    monkeypatch.setattr(inner, "forward", forgetting)
    with pytest.raises(RuntimeError, match="the plan was not applied"):
        kinds(BaklavaLM(loaded_model, make_plan(loaded_model, TIGHT, StreamingLLM())))[kind]()


def test_a_context_that_is_too_long_loses_its_beginning_and_is_counted(
    loaded_model: LoadedModel, capsys: pytest.CaptureFixture[str]
) -> None:
    ids, plan = ids_of(60), make_plan(loaded_model, TIGHT, StreamingLLM())
    short, long = BaklavaLM(loaded_model, plan, max_length=40), BaklavaLM(loaded_model, plan)
    assert loglikelihood(short, (ids[:50], ids[50:])) == loglikelihood(long, (ids[19:50], ids[50:]))
    options = {"until": [], "max_gen_toks": 10}
    cut, same = (
        model.generate_until([make_instance("generate_until", signs(given), options)])
        for model, given in ((short, ids), (long, ids[-30:]))
    )
    assert cut == same
    assert [coverage.truncated for coverage in short.coverages] == [1, 1]
    assert "1 were longer than the model takes" in capsys.readouterr().err
    with pytest.raises(UserError, match="none of the model's 40"):
        loglikelihood(short, (ids[:5], ids_of(41)))
    with pytest.raises(UserError, match="0 tokens has no likelihood"):
        loglikelihood(short, (ids, []))


def test_a_text_without_context_follows_the_start_token(loaded_model: LoadedModel) -> None:
    model, ids = BaklavaLM(loaded_model, make_plan(loaded_model, TIGHT, StreamingLLM())), ids_of(50)
    [(found, _)] = loglikelihood(model, ([], ids))
    [rolling] = model.loglikelihood_rolling([make_instance("loglikelihood_rolling", signs(ids))])
    assert found == pytest.approx(rolling, abs=1e-3)
    assert model.loglikelihood_rolling([make_instance("loglikelihood_rolling", "")]) == [0.0]


def test_coverage_counts_the_requests_that_a_plan_affected(loaded_model: LoadedModel) -> None:
    plan = make_plan(loaded_model, TIGHT, StreamingLLM())
    for chunk, affected, exact in ((None, 2, 1), (8, 3, 0)):
        coverage = PlanCoverage(with_chunked_prefill(plan, chunk) if chunk else plan, "requests")
        for context, decoded in ((16, 0), (15, 1), (16, 1), (3, 60), (80, 0)):
            coverage.count(context, decoded)
        assert (
            coverage.max_lossless_tokens,
            coverage.requests,
            coverage.affected,
            coverage.predicted_before_eviction,
        ) == (16, 5, affected, exact)
        assert f"{affected} of 5 requests" in coverage.summary()
    unaffected = PlanCoverage(plan, "requests")
    unaffected.count(3, 5)
    assert "say nothing about the plan" in unaffected.summary()


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [None, 7], ids=["dense", "chunks"])
@pytest.mark.parametrize(
    "eviction", [StreamingLLM(), HeavyHitter(sinks=2, eviction_interval=3, recent_ratio=0.2)], ids=["ring", "ranked"]
)
def test_a_request_is_affected_exactly_if_entries_were_gone(
    loaded_model: LoadedModel, eviction: Eviction, chunk: int | None
) -> None:
    full = full_cache_plan(loaded_model.identity, loaded_model.geometry, 200, bits=32)
    plan = make_plan(loaded_model, [[12, 12], [12, 12]], eviction)
    tight = with_chunked_prefill(plan, chunk) if chunk else plan
    seen = set()
    for context in (7, 8, 9, 10, 11, 12, 13, 16):
        texts = [ids_of(length, 1) for length in (1, 2, 3, 5)]
        whole, cut = (
            logprobs.score_continuations(loaded_model, each, ids_of(context), texts) for each in (full, tight)
        )
        for text, exact, found in zip(texts, whole, cut, strict=True):
            coverage = PlanCoverage(tight, "requests")
            coverage.count(context, len(text) - 1)
            assert (abs(exact.log_prob - found.log_prob) > 1e-4) == bool(coverage.affected), (context, len(text))
            seen.add(coverage.affected)
    assert seen == {0, 1}


def test_cached_answers_of_another_plan_are_rejected(loaded_model: LoadedModel, tmp_path: Path) -> None:
    made, request = plans(loaded_model), make_instance("loglikelihood_rolling", signs(ids_of(30)))
    path = str(tmp_path / "answers.db")
    for plan in (made[0], made[0]):
        cached = CachingLM(BaklavaLM(loaded_model, plan), path)
        [first] = cached.loglikelihood_rolling([request])
        cached.dbdict.close()
    assert BaklavaLM(loaded_model, made[0]).loglikelihood_rolling([request]) == [first]
    with pytest.raises(UserError, match="another model or plan"):
        CachingLM(BaklavaLM(loaded_model, made[1]), path)


@torch.inference_mode()
def test_a_model_with_sliding_layers_is_scored_as_it_decodes() -> None:
    shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "head_dim": 8, "initializer_range": 0.25}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 12}
    torch.manual_seed(0)
    loaded = LoadedModel.of(AutoModelForCausalLM.from_config(Gemma2Config(**shape, **heads)))
    assert loaded.geometry.windows == (12, None)
    plan = full_cache_plan(loaded.identity, loaded.geometry, 20, bits=32)
    ids = ids_of(90)
    cache, logits = enter(loaded, plan, torch.tensor([ids[:50]]))
    expected = float(logits.log_softmax(-1)[0, ids[50]])
    for token, following in pairwise(ids[50:]):
        logits = loaded.model(torch.tensor([[token]]), past_key_values=cache).logits[:, -1]
        expected += float(logits.log_softmax(-1)[0, following])
    [found] = logprobs.score_continuations(loaded, plan, ids[:50], [ids[50:]])
    assert found.log_prob == pytest.approx(expected, abs=1e-3)


def test_invalid_arguments_are_rejected_in_one_sentence(loaded_model: LoadedModel, tmp_path: Path) -> None:
    good = {"pretrained": "demo", "plan": "uniform:0.3"}
    for wrong, said in [
        ({"batch_size": 4}, "one sequence at a time"),
        ({"dtype": "int8"}, "dtype: Input should be .auto., .float32., .bfloat16. or .float16."),
        ({"trust": True}, "trust: Extra inputs"),
        ({"context_length": 0}, "context_length: Input should be greater than 0"),
        ({"plan": None}, "plan: Input should be a valid string"),
    ]:
        with pytest.raises(UserError, match=said):
            ModelArgs.parse({**good, **wrong})
    for accepted in (1, "1", "auto", "auto:4"):
        ModelArgs.parse({**good, "batch_size": accepted})
    with pytest.raises(UserError, match="plan: Field required"):
        BaklavaLM.create_from_arg_string("pretrained=demo", {"batch_size": 1})
    with pytest.raises(UserError, match="takes 4096"):
        ModelArgs.parse({**good, "max_length": 5000}).checked_max_length(loaded_model)
    make_plan(loaded_model, TIGHT, StreamingLLM()).write(tmp_path / "plan.json")
    stated = ModelArgs.parse({**good, "plan": str(tmp_path / "plan.json"), "context_length": 300})
    with pytest.raises(UserError, match="made for 100 tokens"):
        stated.load_plan(loaded_model, 4096)


def test_a_plan_by_name_has_the_requested_length(loaded_model: LoadedModel) -> None:
    def length(plan: str, most: int, **given: int) -> int:
        return ModelArgs(pretrained="demo", plan=plan, **given).load_plan(loaded_model, most).context_length

    assert length("full", 4096) == 4096
    assert length("uniform:0.3", 4096, context_length=500) == 500
    assert length("uniform:0.3", 800) == 800
