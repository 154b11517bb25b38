import logging

import openai.types.chat
import pytest
from pydantic import ValidationError

from serve_app.openai.protocol import ChatRequest, CompletionRequest, TokenizeRequest
from serve_app.openai.responses import CHAT

MESSAGES = [{"role": "user", "content": "Hello"}]


def complaint(error: pytest.ExceptionInfo[ValidationError]) -> tuple[str, str]:
    first = error.value.errors()[0]
    return (first.get("ctx") or {}).get("param") or ".".join(map(str, first["loc"])), first["msg"]


@pytest.mark.parametrize(
    ("prompt", "taken"),
    [
        ("Hello", ("Hello",)),
        (["Hello"], ("Hello",)),
        (["a", "b"], ("a", "b")),
        ([1, 2, 3], ([1, 2, 3],)),
        ([[1, 2, 3]], ([1, 2, 3],)),
        ([[1], [2]], ([1], [2])),
    ],
)
def test_a_prompt_is_text_or_ids_alone_or_in_a_list(prompt, taken):
    assert CompletionRequest(prompt=prompt).prompt == taken


@pytest.mark.parametrize(
    "prompt", [[1, "a"], ["a", [1]], [True], [1.5], [[True]], {"text": "a"}, 7, [], [[]], ["a"] * 129]
)
def test_other_prompts_are_refused_by_name(prompt):
    with pytest.raises(ValidationError) as error:
        CompletionRequest(prompt=prompt)
    assert complaint(error)[0] == "prompt"


def test_null_is_absent():
    fields = dict.fromkeys(
        ["model", "max_tokens", "temperature", "top_p", "top_k", "seed", "stop", "n", "tools", "logprobs", "user"]
    )
    nulls = CompletionRequest(prompt="a", stream=True, stream_options={"include_usage": None}, **fields)
    assert nulls.to_sampling_params(5) == CompletionRequest(prompt="a").to_sampling_params(5)
    assert nulls.requested_max_tokens == 16
    assert not nulls.stream_options.include_usage


def test_defaults_are_those_of_openai():
    assert CompletionRequest(prompt="a").requested_max_tokens == 16
    assert ChatRequest(messages=MESSAGES).requested_max_tokens is None
    assert ChatRequest(messages=MESSAGES).to_sampling_params(9).temperature == 1.0


def test_both_names_of_the_most_tokens_are_taken():
    assert ChatRequest(messages=MESSAGES, max_tokens=3).requested_max_tokens == 3
    assert ChatRequest(messages=MESSAGES, max_completion_tokens=4).requested_max_tokens == 4


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools", [{"type": "function"}]),
        ("functions", [{"name": "f"}]),
        ("response_format", {"type": "json_object"}),
        ("best_of", 3),
        ("echo", True),
        ("suffix", "end"),
        ("prompt_logprobs", 0),
        ("reasoning_effort", "high"),
        ("chat_template", "{{ x }}"),
        ("use_beam_search", True),
        ("add_special_tokens", True),
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
    CompletionRequest(prompt="a", top_logprobs=None, **neutral)
    CompletionRequest(prompt="a", top_logprobs=0, **neutral)
    neutral |= {"presence_penalty": 0.0, "frequency_penalty": 0, "repetition_penalty": 1.0, "tool_choice": "auto"}
    ChatRequest(messages=MESSAGES, response_format={"type": "text"}, add_special_tokens=False, **neutral)


def test_unknown_fields_are_ignored_with_a_warning(caplog, monkeypatch):
    logger = logging.getLogger("ray.serve")
    monkeypatch.setattr(logger, "disabled", False)  # a migration of MLflow's database disables all loggers there are
    logger.addHandler(caplog.handler)
    try:
        CompletionRequest(prompt="a", mystery=1, n=1, suffix="")
        turns = [message | {"name": "Ann"} for message in MESSAGES * 3]
        ChatRequest(messages=turns, stream=True, stream_options={"include_obfuscation": True})
        TokenizeRequest(prompt="a", riddle=1, return_token_strs=False)
    finally:
        logger.removeHandler(caplog.handler)
    told = dict.fromkeys(tuple(record.args[0]) for record in caplog.records)  # the root logger may hear it again
    assert list(told) == [("mystery",), ("messages.name", "stream_options.include_obfuscation"), ("riddle",)]


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
        ("max_tokens", -1),
        ("min_tokens", -1),
        ("seed", 2**63),
        ("n", 0),
        ("n", 129),
        ("n", True),
        ("logprobs", 21),
        ("logprobs", -1),
        ("logprobs", True),
        ("presence_penalty", 2.5),
        ("frequency_penalty", -3),
        ("repetition_penalty", 0),
        ("logit_bias", {"1": 101}),
        ("logit_bias", {"one": 1}),
        ("truncate_prompt_tokens", -2),
        ("stop", [str(number) for number in range(65)]),
        ("stop", ["a", None]),
        ("stop", ["a", ["b"]]),
        ("stop", [{"a": "b"}]),
        ("stop", "x" * 1025),
        ("stop", 5),
        ("stream", "perhaps"),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(field, value):
    with pytest.raises(ValidationError) as error:
        CompletionRequest(prompt="a", **{field: value})
    assert complaint(error)[0].split(".")[0] == field


@pytest.mark.parametrize(
    ("stop", "taken"),
    [
        ("x", ("x",)),
        (["x", "y", "z", "w"], ("x", "y", "z", "w")),
        ([str(number) for number in range(64)], tuple(str(number) for number in range(64))),
        ("x" * 1024, ("x" * 1024,)),
        (["x", "", "y", "x"] * 30, ("x", "y")),
        (None, ()),
        ([], ()),
        ("", ()),
        ([""], ()),
    ],
)
def test_stop_is_one_string_or_up_to_64_different_ones_and_an_empty_one_ends_nothing(stop, taken):
    assert CompletionRequest(prompt="a", stop=stop).stop == taken
    assert ChatRequest(messages=MESSAGES, stop=stop).stop == taken


def test_a_list_of_thousands_of_stop_strings_is_refused_without_comparing_each_with_all_others():
    class CountedString(str):
        comparisons = 0
        __hash__ = str.__hash__

        def __eq__(self, other):
            CountedString.comparisons += 1
            return str.__eq__(self, other)

    with pytest.raises(ValidationError):
        CompletionRequest(prompt="a", stop=[CountedString(number) for number in range(2000)])
    assert CountedString.comparisons <= 2000


def test_the_strings_in_stop_have_at_most_4096_characters_together():
    assert CompletionRequest(prompt="a", stop=[str(number) * 1024 for number in range(4)]).stop
    with pytest.raises(ValidationError, match="5120 characters together, and at most 4096"):
        CompletionRequest(prompt="a", stop=[str(number) * 1024 for number in range(5)])


def test_top_k_of_minus_one_keeps_all_tokens():
    assert CompletionRequest(prompt="a", top_k=-1).to_sampling_params(1).top_k == 0


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
        {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": ""}},
        {"role": "assistant", "content": None, "refusal": "I cannot say that."},
        {"role": "assistant", "content": None, "audio": {"id": "a"}},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
        {"role": "function", "name": "f", "content": "x"},
        {"content": "x"},
    ],
)
def test_messages_that_cannot_be_honoured_are_refused(message):
    with pytest.raises(ValidationError) as error:
        ChatRequest(messages=[message])
    assert complaint(error)[0].startswith("messages.0")


@pytest.mark.parametrize("role", ["tool", "function"])
def test_the_result_of_a_tool_is_refused_with_another_way_to_send_it(role):
    with pytest.raises(ValidationError) as error:
        ChatRequest(messages=[*MESSAGES, {"role": role, "content": "4"}])
    field, sentence = complaint(error)
    assert field == "messages.1.role"
    assert f"'{role}' answers a call of a tool" in sentence
    assert "send the result as a user's message" in sentence


@pytest.mark.parametrize(
    ("fields", "content"),
    [
        ({"tool_calls": []}, "Hi"),
        ({"tool_calls": None, "function_call": None, "refusal": None, "audio": None, "annotations": None}, "Hi"),
        ({"annotations": [], "refusal": "", "function_call": {}}, "Hi"),
        ({"annotations": [{"type": "url_citation"}], "reasoning_content": "Hm.", "name": "Ann"}, "Hi"),
        ({"content": None, "tool_calls": []}, ""),
        ({"content": ""}, ""),
        ({"content": []}, ""),
        ({"content": [{"type": "text", "text": "H", "cache_control": {"type": "ephemeral"}}]}, "H"),
    ],
)
def test_a_history_is_taken_as_agents_send_it(fields, content):
    history = [*MESSAGES, {"role": "assistant", "content": "Hi"} | fields, *MESSAGES]
    assert ChatRequest(messages=history).messages[1].content == content
    assert TokenizeRequest(messages=history).messages[1].content == content


def test_an_assistants_message_may_lack_its_content():
    assert ChatRequest(messages=[*MESSAGES, {"role": "assistant", "tool_calls": []}]).messages[1].content == ""


def test_a_message_of_an_answer_goes_back_into_the_history():
    """As a dict that OpenAI's client makes of it."""
    message = CHAT.complete("Hello there.")["message"]
    choice = {"index": 0, "finish_reason": "stop", "logprobs": None, "message": message}
    envelope = {"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": "tiny", "choices": [choice]}
    answer = openai.types.chat.ChatCompletion.model_validate(envelope)
    for dumped in (answer.choices[0].message.model_dump(), answer.choices[0].message.to_dict()):
        assert ChatRequest(messages=[*MESSAGES, dumped, *MESSAGES]).messages[1].content == "Hello there."


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [], "tool_choice": "none", "parallel_tool_calls": True},
        {"tools": None, "tool_choice": "auto", "parallel_tool_calls": False},
        {"functions": [], "function_call": "none"},
        {"response_format": {"type": "text"}, "modalities": ["text"], "audio": None},
        {"user": "u", "metadata": {"a": "b"}, "store": False, "service_tier": "auto", "safety_identifier": "x"},
        {"user": 7, "metadata": {}, "store": True, "prompt_cache_key": "x"},
        {"logit_bias": {}, "logprobs": False, "top_logprobs": None, "n": None, "seed": None, "temperature": None},
        {"max_tokens": None, "max_completion_tokens": 9, "stop": None, "stream": None, "stream_options": None},
        {"reasoning_effort": None, "verbosity": None, "prediction": None, "web_search_options": None},
    ],
)
def test_harmless_fields_of_agents_are_taken_without_a_warning(fields, caplog, monkeypatch):
    logger = logging.getLogger("ray.serve")
    monkeypatch.setattr(logger, "disabled", False)
    monkeypatch.setattr(logger, "handlers", [caplog.handler])
    message = {"role": "assistant", "content": "Hi", "annotations": [], "audio": None, "tool_calls": []}
    ChatRequest(messages=[*MESSAGES, message], **fields)
    assert caplog.records == []


def test_a_chat_needs_a_message():
    with pytest.raises(ValidationError):
        ChatRequest(messages=[])


@pytest.mark.parametrize("options", [None, {}, {"include_usage": True}, {"include_usage": False}])
def test_stream_options_change_nothing_in_an_answer_at_once(options):
    assert not CompletionRequest(prompt="a", stream_options=options).stream
    assert not ChatRequest(messages=MESSAGES, stream_options=options, stream=False).stream


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"n": 2, "best_of": 3}, "best_of"),
        ({"prompt": ["a"] * 43, "n": 3}, "n"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"chat_template_kwargs": {"a": 1}}, "chat_template_kwargs"),
    ],
)
def test_what_a_completion_cannot_do_is_refused_by_name(fields, name):
    with pytest.raises(ValidationError) as error:
        CompletionRequest(**({"prompt": "a"} | fields))
    assert complaint(error)[0] == name


def test_a_completion_may_be_only_scored_and_have_as_many_answers_as_the_best_of():
    assert CompletionRequest(prompt="a", max_tokens=0, echo=True, logprobs=0).requested_max_tokens == 0
    assert CompletionRequest(prompt="a", n=2, best_of=2).n == 2


def test_a_chat_tells_likelihoods_of_up_to_twenty_alternatives():
    assert ChatRequest(messages=MESSAGES, logprobs=True).num_logprobs == 0
    assert ChatRequest(messages=MESSAGES, logprobs=True, top_logprobs=20).num_logprobs == 20
    assert ChatRequest(messages=MESSAGES).num_logprobs is None
    for wrong in ({"top_logprobs": 2}, {"logprobs": True, "top_logprobs": 21}, {"logprobs": 2}, {"max_tokens": 0}):
        with pytest.raises(ValidationError):
            ChatRequest(messages=MESSAGES, **wrong)


def test_penalties_and_biases_reach_the_sampler():
    asked = CompletionRequest(prompt="a", presence_penalty=1, repetition_penalty=1.5, logit_bias={"7": -100})
    assert asked.to_sampling_params(1).presence_penalty == 1
    assert asked.to_sampling_params(1).repetition_penalty == 1.5
    assert dict(asked.to_sampling_params(1).logit_bias) == {7: -100}
