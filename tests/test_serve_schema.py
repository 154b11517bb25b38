import logging

import pytest
from pydantic import ValidationError

from serve_app.schema import ChatRequest, CompletionRequest

MESSAGES = [{"role": "user", "content": "Hello"}]


def complaint(error: pytest.ExceptionInfo[ValidationError]) -> tuple[str, str]:
    first = error.value.errors()[0]
    return (first.get("ctx") or {}).get("param") or ".".join(map(str, first["loc"])), first["msg"]


@pytest.mark.parametrize(
    ("prompt", "taken"),
    [("Hello", "Hello"), (["Hello"], "Hello"), ([1, 2, 3], [1, 2, 3]), ([[1, 2, 3]], [1, 2, 3])],
)
def test_a_prompt_is_text_or_ids_alone_or_in_a_list_of_one(prompt, taken):
    assert CompletionRequest(prompt=prompt).prompt == taken


@pytest.mark.parametrize("prompt", [["a", "b"], [[1], [2]], [1, "a"], [True], [1.5], {"text": "a"}, 7])
def test_other_prompts_are_refused_by_name(prompt):
    with pytest.raises(ValidationError) as error:
        CompletionRequest(prompt=prompt)
    assert complaint(error)[0] == "prompt"


def test_null_is_absent():
    fields = dict.fromkeys(
        ["model", "max_tokens", "temperature", "top_p", "top_k", "seed", "stop", "n", "tools", "logprobs", "user"]
    )
    nulls = CompletionRequest(prompt="a", stream=True, stream_options={"include_usage": None}, **fields)
    assert nulls.sampling(5) == CompletionRequest(prompt="a").sampling(5)
    assert nulls.wanted_tokens == 16
    assert not nulls.stream_options.include_usage


def test_defaults_are_those_of_openai():
    assert CompletionRequest(prompt="a").wanted_tokens == 16
    assert ChatRequest(messages=MESSAGES).wanted_tokens is None
    assert ChatRequest(messages=MESSAGES).sampling(9).temperature == 1.0


def test_both_names_of_the_most_tokens_are_taken():
    assert ChatRequest(messages=MESSAGES, max_tokens=3).wanted_tokens == 3
    assert ChatRequest(messages=MESSAGES, max_completion_tokens=4).wanted_tokens == 4


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools", [{"type": "function"}]),
        ("functions", [{"name": "f"}]),
        ("response_format", {"type": "json_object"}),
        ("n", 2),
        ("n", True),
        ("best_of", 3),
        ("logprobs", True),
        ("logprobs", 0),
        ("top_logprobs", 2),
        ("echo", True),
        ("suffix", "end"),
        ("logit_bias", {"1": 5}),
        ("presence_penalty", 0.5),
        ("frequency_penalty", -1),
        ("repetition_penalty", 1.1),
    ],
)
def test_a_field_that_is_known_and_unsupported_is_refused_by_name(field, value):
    with pytest.raises(ValidationError) as error:
        ChatRequest(messages=MESSAGES, **{field: value})
    name, message = complaint(error)
    assert name == field
    assert "not support" in message


def test_values_that_ask_for_nothing_are_taken():
    neutral = {"n": 1, "best_of": 1, "logprobs": False, "echo": False, "tools": [], "logit_bias": {}, "suffix": ""}
    neutral |= {"presence_penalty": 0.0, "frequency_penalty": 0, "repetition_penalty": 1.0, "tool_choice": "auto"}
    ChatRequest(messages=MESSAGES, response_format={"type": "text"}, **neutral)


def test_unknown_fields_are_ignored_with_a_warning(caplog, monkeypatch):
    logger = logging.getLogger("ray.serve")
    monkeypatch.setattr(logger, "disabled", False)  # a migration of MLflow's database disables all loggers there are
    logger.addHandler(caplog.handler)
    try:
        CompletionRequest(prompt="a", mystery=1, n=1)
    finally:
        logger.removeHandler(caplog.handler)
    assert "mystery" in caplog.text
    assert "'n'" not in caplog.text


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", float("nan")),
        ("top_p", 0),
        ("top_p", 1.1),
        ("top_k", -2),
        ("min_p", 1.5),
        ("max_tokens", 0),
        ("min_tokens", -1),
        ("seed", 2**63),
        ("stop", ["a", "b", "c", "d", "e"]),
        ("stop", [""]),
        ("stop", "x" * 257),
        ("stop", 5),
        ("stream", "perhaps"),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(field, value):
    with pytest.raises(ValidationError) as error:
        CompletionRequest(prompt="a", **{field: value})
    assert complaint(error)[0].split(".")[0] == field


def test_stop_is_one_string_or_up_to_four():
    assert CompletionRequest(prompt="a", stop="x").stop == ("x",)
    assert CompletionRequest(prompt="a", stop=["x", "y", "z", "w"]).stop == ("x", "y", "z", "w")


def test_top_k_of_minus_one_keeps_all_tokens():
    assert CompletionRequest(prompt="a", top_k=-1).sampling(1).top_k == 0


def test_content_may_be_a_list_of_text_parts():
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    assert ChatRequest(messages=[{"role": "user", "content": parts}]).messages[0].content == "Hello"


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
        {"role": "user", "content": 5},
        {"role": "tool", "content": "x"},
        {"role": "assistant", "content": None, "tool_calls": [{}]},
        {"content": "x"},
    ],
)
def test_messages_that_cannot_be_honoured_are_refused(message):
    with pytest.raises(ValidationError) as error:
        ChatRequest(messages=[message])
    assert complaint(error)[0].startswith("messages.0")


def test_a_chat_needs_a_message():
    with pytest.raises(ValidationError):
        ChatRequest(messages=[])


def test_stream_options_belong_to_streams():
    with pytest.raises(ValidationError) as error:
        CompletionRequest(prompt="a", stream_options={"include_usage": True})
    assert complaint(error)[0] == "stream_options"
