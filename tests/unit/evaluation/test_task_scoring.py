"""Task scoring: the full cache answers as transformers' own does, and no plan knows what will be asked."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from byte_model import byte_model
from plan_factory import make_plan
from sentencepiece_tokenizer import pieces, sentencepiece_tokenizer
from tokenizers import Tokenizer, models, normalizers
from transformers import DynamicCache, PreTrainedTokenizerFast

from baklava.allocation.plan_spec import resolve_plan
from baklava.cache.budgeted_cache import BudgetedCache
from baklava.data.documents import load_documents
from baklava.errors import UserError
from baklava.evaluation import task_scoring
from baklava.evaluation.evaluator import Evaluator
from baklava.evaluation.speed import transformers_attention
from baklava.evaluation.task_scoring import (
    Answer,
    answer_closed_book,
    answer_with_full_cache,
    answer_with_plan,
    check_question_unseen,
    encode_continuation,
    prefill_context,
)
from baklava.evaluation.tasks import TASKS, FillerText, Prompt, Question, build_prompts
from baklava.evaluation.tasks.metrics import METRICS
from baklava.evaluation.tasks.word_lists import CommonWords
from baklava.eviction import TOVA, Eviction, HeavyHitter, KVzip, SnapKV, StreamingLLM
from baklava.plan.budget_plan import BudgetPlan, full_cache_plan
from baklava.runtime.model_loader import LoadedModel
from baklava.runtime.prefill import PrefilledPrompt, prefill

Maker = Callable[..., LoadedModel]

CONTEXT = "a list: one two three four five six seven eight nine ten eleven twelve, and so on."
ASKED = tuple(Question(f" What is {word}?", f" {word}!") for word in ("first", "second", "last"))
EVICTIONS = [
    StreamingLLM(),
    HeavyHitter(eviction_interval=4),
    TOVA(eviction_interval=4),
    SnapKV(eviction_interval=4, window=8),
    KVzip(eviction_interval=4),
]


@pytest.fixture
def letters(tiny: Maker) -> LoadedModel:
    return byte_model(tiny, eos_token_id=None)


def greedy(loaded: LoadedModel, cache: BudgetedCache | DynamicCache, ids: list[int], tokens: int) -> list[int]:
    """Token by token through a cache that is behind the context, as a server decodes."""
    generated: list[int] = []
    for token in ids[:-1]:
        loaded.model(torch.tensor([[token]]), past_key_values=cache)
    token = ids[-1]
    for _ in range(tokens):
        token = int(loaded.model(torch.tensor([[token]]), past_key_values=cache).logits[0, -1].argmax())
        generated.append(token)
    return generated


@pytest.mark.slow
@pytest.mark.parametrize("eviction", EVICTIONS, ids=str)
@torch.inference_mode()
def test_an_exact_answer_is_what_greedy_decoding_writes(letters: LoadedModel, eviction: Eviction) -> None:
    plan = make_plan(letters, [[24, 40], [30, 24]], eviction, context_length=120)
    prompt = Prompt("p", CONTEXT, ASKED)
    context = prefill_context(letters, prompt, [eviction])
    for question in ASKED:
        cache, _ = prefill(letters, plan, context.ids)
        new_tokens = greedy(letters, cache, letters.tokenizer.encode(question.text), 6)
        text = letters.tokenizer.decode(new_tokens)
        assert letters.tokenizer.encode(text) == new_tokens
        right = replace(question, target=text)
        wrong = replace(question, target=text[:-1] + ("x" if text[-1] != "x" else "y"))
        found = answer_with_plan(letters, context, Prompt("p", CONTEXT, (right, wrong)), plan)
        assert [each.score for each in found.answers] == [1.0, 0.0]
        assert found.answers[0].nll < found.answers[1].nll
        assert found.allocated_bytes <= plan.bytes_per_sequence


@pytest.mark.slow
@pytest.mark.parametrize("eviction", EVICTIONS, ids=str)
def test_questions_do_not_disturb_each_other(letters: LoadedModel, eviction: Eviction) -> None:
    plan = make_plan(letters, [[24, 40], [30, 24]], eviction, context_length=120)
    context = prefill_context(letters, Prompt("p", CONTEXT, ASKED), [eviction])
    forward = answer_with_plan(letters, context, Prompt("p", CONTEXT, ASKED), plan)
    backward = answer_with_plan(letters, context, Prompt("p", CONTEXT, ASKED[::-1]), plan)
    alone = answer_with_plan(letters, context, Prompt("p", CONTEXT, ASKED[1:2]), plan)
    assert forward.answers == backward.answers[::-1]
    assert forward.answers[1] == alone.answers[0]


def test_a_plan_that_keeps_everything_answers_as_the_full_cache(letters: LoadedModel) -> None:
    prompt = Prompt("p", CONTEXT, (*ASKED, replace(ASKED[0], metric="recall", answers=("z",), max_new_tokens=5)))
    context = prefill_context(letters, prompt, [StreamingLLM()])
    plan = full_cache_plan(letters.identity, letters.geometry, 200, 32)
    ours, theirs = (
        answer_with_plan(letters, context, prompt, plan).answers,
        answer_with_full_cache(letters, context, prompt),
    )
    assert [each.score for each in ours] == [each.score for each in theirs]
    assert [each.nll for each in ours] == pytest.approx([each.nll for each in theirs], abs=1e-5)


def write(monkeypatch: pytest.MonkeyPatch, loaded: LoadedModel, ids: list[int]) -> None:
    """Let the model generate these tokens."""
    scripted = iter(ids)

    def forced(loaded: LoadedModel, cache: object, fed: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.one_hot(torch.full_like(fed, next(scripted)), 512).float()

    monkeypatch.setattr(task_scoring, "forced_logits", forced)


def test_a_generated_answer_keeps_its_first_space(tiny: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = sentencepiece_tokenizer()
    loaded = replace(tiny(vocab_size=512), tokenizer=tokenizer)
    question = Question(" France is", " Paris", metric="recall", answers=(" Paris and Rome.",), max_new_tokens=4)
    made = pieces(tokenizer, "▁Paris", "▁and", "▁Rome", ".")
    write(monkeypatch, loaded, [0, *made])
    [answer] = answer_closed_book(loaded, Prompt("p", "The capital of", (question,)))
    assert answer.score == 1.0


def test_a_generated_answer_ends_before_the_end_token_of_the_tokenizer(
    tiny: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = sentencepiece_tokenizer(end="<tool>")  # not a special token, so decoding alone would write it
    loaded = replace(tiny(vocab_size=512), tokenizer=tokenizer)
    question = Question(" France is", " Paris", metric="exact_text", answers=("Paris",), max_new_tokens=9)
    monkeypatch.setitem(METRICS, "exact_text", lambda text, question: float(text == " Paris"))
    write(monkeypatch, loaded, [0, *pieces(tokenizer, "▁Paris", "<tool>")])
    [answer] = answer_closed_book(loaded, Prompt("p", "The capital of", (question,)))
    assert answer.score == 1.0


def cached_positions(loaded: LoadedModel, context: PrefilledPrompt, plan: BudgetPlan) -> list[list[int]]:
    cache, _ = task_scoring.compress(loaded, context, plan)
    return [cache.cached_positions(layer, head).tolist() for layer in range(2) for head in range(2)]


def test_no_question_reaches_what_eviction_sees(letters: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    eviction = SnapKV(eviction_interval=4, window=8)
    plan = make_plan(letters, [[24, 40], [30, 24]], eviction, context_length=200)
    prompt = Prompt("p", CONTEXT, ASKED)
    context = prefill_context(letters, prompt, [eviction])
    other = prefill_context(letters, Prompt("p", CONTEXT, ASKED[2:]), [eviction])
    assert cached_positions(letters, context, plan) == cached_positions(letters, other, plan)

    # Broken on purpose: the prompt goes in with its question, as it would from a chat.
    leaking = prefill_context(letters, Prompt("p", CONTEXT + ASKED[0].text, ASKED[1:]), [eviction])
    before = [[at for at in head if at < context.ids.shape[1]] for head in cached_positions(letters, leaking, plan)]
    assert before != cached_positions(letters, context, plan), (
        "a leak must matter here, or the next lines prove nothing"
    )
    monkeypatch.setattr(task_scoring, "compress", lambda loaded, unused, plan: prefill(loaded, plan, leaking.ids))
    with pytest.raises(RuntimeError, match="eviction may know the question"):
        answer_with_plan(letters, context, prompt, plan)


def test_a_cache_that_saw_a_question_is_detected() -> None:
    cache = DynamicCache()
    cache.update(torch.zeros(1, 1, 5, 4), torch.zeros(1, 1, 5, 4), 0)
    check_question_unseen(cache, 5)
    with pytest.raises(RuntimeError, match="has seen 5 tokens, but the context has 4"):
        check_question_unseen(cache, 4)


def test_closed_book_answers_do_not_depend_on_the_context(letters: LoadedModel) -> None:
    first = answer_closed_book(letters, Prompt("p", CONTEXT, ASKED))
    assert first == answer_closed_book(letters, Prompt("q", "Another text.", ASKED))
    assert all(isinstance(each, Answer) for each in first)


def test_a_prompt_longer_than_the_model_is_rejected(letters: LoadedModel) -> None:
    with pytest.raises(UserError, match=r"a prompt of .* is longer than the 256"):
        prefill_context(letters, Prompt("p", "x" * 300, ASKED), [])


@pytest.fixture(scope="module")
def filler() -> FillerText:
    return FillerText.from_documents(load_documents(["ifcraft"])[:2])


def of_demo(demo: LoadedModel, filler: FillerText, name: str, tokens: int = 384) -> Prompt:
    task = CommonWords(common=4, repeats=4) if name == "common_words" else TASKS[name]()
    (prompt,) = build_prompts(task, filler, 1, tokens=tokens, seed=0, count_tokens=demo.count_tokens)
    return replace(prompt, questions=prompt.questions[:2])


@torch.inference_mode()
def by_transformers(demo: LoadedModel, prompt: Prompt, question: Question) -> Answer:
    """All of the prompt at once, and generate() with transformers' own attention and cache."""
    ids = [demo.tokenizer.encode(part) for part in (prompt.context, question.text, question.target)]
    with transformers_attention(demo):
        logits = demo.model(torch.tensor([[*ids[0], *ids[1], *ids[2]]])).logits[0, -len(ids[2]) - 1 : -1]
        nll = float(torch.nn.functional.cross_entropy(logits, torch.tensor(ids[2])))
        asked = torch.tensor([ids[0] + ids[1]])
        options = {"max_new_tokens": question.max_new_tokens or len(ids[2]), "do_sample": False}
        generated = demo.model.generate(asked, attention_mask=torch.ones_like(asked), **options)
    new_tokens = generated[0, asked.shape[1] :].tolist()
    if question.metric == "exact":
        return Answer(float(new_tokens == ids[2]), nll)
    return Answer(METRICS[question.metric](demo.tokenizer.decode(new_tokens, skip_special_tokens=True), question), nll)


@pytest.mark.demo
@pytest.mark.parametrize("name", TASKS)
def test_the_full_cache_scores_what_transformers_scores(demo: LoadedModel, filler: FillerText, name: str) -> None:
    prompt = of_demo(demo, filler, name, tokens=256)
    asked = prompt.questions[: 2 if name == "kv_retrieval" else 1]
    prompt = replace(prompt, questions=tuple(replace(q, max_new_tokens=min(q.max_new_tokens, 8)) for q in asked))
    context = prefill_context(demo, prompt, [])
    ours = answer_with_full_cache(demo, context, prompt)
    theirs = [by_transformers(demo, prompt, question) for question in prompt.questions]
    assert [each.score for each in ours] == [each.score for each in theirs]
    assert [each.nll for each in ours] == pytest.approx([each.nll for each in theirs], abs=1e-3)


@pytest.mark.demo
def test_a_plan_that_keeps_nothing_but_sinks_retrieves_by_chance(demo: LoadedModel, filler: FillerText) -> None:
    sinks = make_plan(demo, [[8] * 3] * 30, StreamingLLM(sinks=4), context_length=640)
    everything = resolve_plan("full", demo, 700, lambda: pytest.fail("no profile is needed")).plan
    evaluator = Evaluator(demo, [everything, sinks])
    for name in ("passkey", "kv_retrieval"):
        result = evaluator.evaluate_prompt(name, of_demo(demo, filler, name))
        full, compressed, closed = result.plans[0].answers, result.plans[1].answers, result.closed_book
        assert [each.score for each in full] == [each.score for each in result.full]
        assert sum(each.score for each in full) >= len(full) / 2
        assert [each.score for each in compressed] == [0.0] * len(compressed)
        for lost, guess in zip(compressed, closed, strict=True):
            assert lost.nll > 0.7 * guess.nll


def test_an_answer_has_the_tokens_that_it_has_after_its_question() -> None:
    # As Llama 2's: every text begins with a mark, which encoding an answer alone would put in the middle.
    letters = {letter: number for number, letter in enumerate("▁123abcdefghijklmnopqrstuvwxyz?")}
    tokenizer = Tokenizer(models.BPE(vocab=letters, merges=[]))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    assert wrapped.convert_ids_to_tokens(encode_continuation(wrapped, "what is it?", " 12")) == ["▁", "1", "2"]
    assert wrapped.convert_ids_to_tokens(wrapped.encode(" 12")) == ["▁", "▁", "1", "2"]


def test_an_answer_is_encoded_alone_if_a_token_spans_the_boundary() -> None:
    tokenizer = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "ab": 2}, merges=[("a", "b")]))
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    assert encode_continuation(wrapped, "aa", "b") == [1]
