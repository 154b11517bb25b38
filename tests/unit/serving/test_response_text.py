"""The text of answers with tokenizers of SentencePiece's kind: spaces, bytes, echoes, log-probabilities, stops."""

from dataclasses import replace

import pytest
from fake_engine import ScriptedEngine
from inprocess_replica import ask, events, full, replica_of
from lm_eval.models.openai_completions import LocalCompletionsAPI
from sentencepiece_tokenizer import byte_pieces, pieces, sentencepiece_tokenizer

from serve_app.api.routes import create_app
from serve_app.engine.types import Logprob, PrefillDone, TokenOutput

FRANCE = {"prompt": "The capital of France is", "max_tokens": 12}
COMPLETIONS, CHATS = "/v1/completions", "/v1/chat/completions"


@pytest.fixture(scope="module", params=["unigram", "bpe"])
def loaded(request, tiny):
    return replace(tiny(vocab_size=512), tokenizer=sentencepiece_tokenizer(request.param))


@pytest.fixture
def post(loaded):
    """Answers a request with these tokens."""

    def send(path, body, ids, finish="length"):
        def script(work):
            scored = [
                None if place == 0 else Logprob(token, -1.0, ((token, -1.0),))
                for place, token in enumerate(work.prompt)
            ]
            generated = ids if work.sampling_params.max_tokens else []
            yield PrefillDone(
                prompt_logprobs=() if work.prompt_logprobs is None else tuple(scored),
                finish_reason=None if generated else "length",
            )
            for index in range(work.n):
                for place, token in enumerate(generated):
                    last = place + 1 == len(ids)
                    logprob = None if work.logprobs is None else Logprob(token, -1.0, ((token, -1.0), (ids[0], -2.0)))
                    yield TokenOutput(token, index, finish if last else None, logprob)

        engine = ScriptedEngine(full(loaded), script)
        response = ask(create_app(replica_of(engine, loaded)), "POST", path, json=body)
        assert response.status_code == 200, response.text
        return response

    return send


def rome(loaded):
    return pieces(loaded.tokenizer, "▁Paris", "▁and", "▁Rome", ".")


def streamed(response):
    return [event["choices"][0]["text"] for event in events(response)]


def test_a_completion_keeps_its_first_space(post, loaded):
    answer = post(COMPLETIONS, FRANCE | {"n": 2}, rome(loaded)).json()
    assert [choice["text"] for choice in answer["choices"]] == [" Paris and Rome."] * 2
    assert streamed(post(COMPLETIONS, FRANCE | {"stream": True}, rome(loaded))) == [" Paris", " and", " Rome", ".", ""]


def test_a_prompt_of_token_ids_is_continued_like_its_text(post, loaded):
    ids = loaded.tokenizer.encode(FRANCE["prompt"])
    for prompt in (ids, [ids], ids[-1:], [*ids, loaded.tokenizer.eos_token_id]):
        answer = post(COMPLETIONS, FRANCE | {"prompt": prompt}, rome(loaded)).json()
        assert answer["choices"][0]["text"] == " Paris and Rome."


def test_a_text_that_begins_with_the_answer_begins_without_a_space(post, loaded):
    body = FRANCE | {"prompt": [loaded.tokenizer.bos_token_id], "logprobs": 1}
    choice = post(COMPLETIONS, body, rome(loaded)).json()["choices"][0]
    assert choice["text"] == "".join(choice["logprobs"]["tokens"]) == "Paris and Rome."


def test_a_chat_keeps_the_space_after_its_template(post, loaded):
    chat = {"messages": [{"role": "user", "content": "The capital of France is"}]}
    answer = post(CHATS, chat | {"logprobs": True}, rome(loaded)).json()["choices"][0]
    assert answer["message"]["content"] == " Paris and Rome."
    tokens = answer["logprobs"]["content"]
    assert "".join(token["token"] for token in tokens) == " Paris and Rome."
    assert b"".join(bytes(token["bytes"]) for token in tokens) == b" Paris and Rome."
    assert tokens[1]["top_logprobs"][1]["token"] == " Paris"
    deltas = [event["choices"][0]["delta"] for event in events(post(CHATS, chat | {"stream": True}, rome(loaded)))]
    assert "".join(delta.get("content", "") for delta in deltas) == " Paris and Rome."


@pytest.mark.parametrize("as_ids", [False, True])
def test_an_echo_and_its_continuation_are_one_text(post, loaded, as_ids):
    prompt = loaded.tokenizer.encode(FRANCE["prompt"]) if as_ids else FRANCE["prompt"]
    body = FRANCE | {"prompt": prompt, "echo": True}
    text = "The capital of France is Paris and Rome."
    assert post(COMPLETIONS, body, rome(loaded)).json()["choices"][0]["text"] == text
    assert "".join(streamed(post(COMPLETIONS, body | {"stream": True}, rome(loaded)))) == text
    assert post(COMPLETIONS, body | {"max_tokens": 0}, []).json()["choices"][0]["text"] == FRANCE["prompt"]


@pytest.mark.parametrize("echo", [False, True])
@pytest.mark.parametrize("stream", [False, True])
def test_the_tokens_of_logprobs_joined_are_the_text(post, loaded, echo, stream):
    body = FRANCE | {"logprobs": 2, "echo": echo, "stream": stream}
    response = post(COMPLETIONS, body, rome(loaded))
    choices = [event["choices"][0] for event in events(response)] if stream else response.json()["choices"]
    tokens, offsets, top = (
        [each for choice in choices if choice["logprobs"] for each in choice["logprobs"][name]]
        for name in ("tokens", "text_offset", "top_logprobs")
    )
    text = "".join(choice["text"] for choice in choices)
    if echo:
        assert tokens[:3] == ["<s>", "The", " capital"]
        tokens, offsets, top = tokens[1:], offsets[1:], top[1:]
    assert "".join(tokens) == text
    assert [text[at:].startswith(token) for at, token in zip(offsets, tokens, strict=True)] == [True] * len(tokens)
    assert offsets == [len("".join(tokens[:place])) for place in range(len(tokens))]
    assert top[-1] == {".": -1.0, " Paris": -2.0}


def test_characters_of_several_byte_tokens_come_whole(post, loaded):
    ids = [*pieces(loaded.tokenizer, "▁Paris", "▁"), *byte_pieces(loaded.tokenizer, "€😀"), *rome(loaded)[1:]]
    assert post(COMPLETIONS, FRANCE, ids).json()["choices"][0]["text"] == " Paris €😀 and Rome."
    sent = streamed(post(COMPLETIONS, FRANCE | {"stream": True}, ids))
    assert sent == [" Paris", " ", "", "", "€", "", "", "", "😀", " and", " Rome", ".", ""]
    asked = FRANCE | {"prompt": "The 😀", "echo": True}
    assert post(COMPLETIONS, asked, ids).json()["choices"][0]["text"] == "The 😀 Paris €😀 and Rome."


def test_a_special_token_in_the_middle_keeps_the_next_space(post, loaded):
    ids = pieces(loaded.tokenizer, "▁Paris", "</s>", "<|user|>", "▁and", "▁Rome")
    body = FRANCE | {"ignore_eos": True}
    assert post(COMPLETIONS, body, ids).json()["choices"][0]["text"] == " Paris and Rome"
    assert streamed(post(COMPLETIONS, body | {"stream": True}, ids)) == [" Paris", "", "", " and", " Rome", ""]


@pytest.mark.parametrize(("stop", "text"), [(" Paris", ""), (" and", " Paris"), (["x", " Paris and"], "")])
def test_a_stop_string_may_begin_with_a_space(post, loaded, stop, text):
    choice = post(COMPLETIONS, FRANCE | {"stop": stop}, rome(loaded)).json()["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == (text, "stop")


def test_tokens_to_text_and_back(post, loaded):
    told = post("/tokenize", {"prompt": FRANCE["prompt"], "add_special_tokens": False}, []).json()
    assert post("/detokenize", {"tokens": told["tokens"]}, []).json() == {"prompt": FRANCE["prompt"]}


@pytest.mark.parametrize("path", [COMPLETIONS, CHATS])
def test_a_stop_string_that_is_a_special_token_is_a_stop_token_of_the_request(loaded, path):
    engine = ScriptedEngine(full(loaded), lambda work: [PrefillDone(), TokenOutput(300, finish_reason="length")])
    body = {"messages": [{"role": "user", "content": "The"}]} if path == CHATS else FRANCE
    app = create_app(replica_of(engine, loaded))
    for stop in ("<|im_end|>", ["x", "<|im_end|>", "<tool>"], "x<|im_end|>", None):
        ask(app, "POST", path, json=body | {"stop": stop, "stop_token_ids": [4]})
    end, tool = pieces(loaded.tokenizer, "<|im_end|>", "<tool>")
    assert [work.sampling_params.stop_token_ids for work in engine.works] == [{4, end}, {4, end, tool}, {4}, {4}]


def test_the_end_token_has_a_logprob_and_no_text(post, loaded):
    ids = pieces(loaded.tokenizer, "▁Paris", "<|im_end|>")
    choice = post(COMPLETIONS, FRANCE | {"stop": "<|im_end|>", "logprobs": 1}, ids, "stop").json()["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == (" Paris", "stop")
    assert choice["logprobs"]["tokens"] == [" Paris", "<|im_end|>"]
    assert choice["logprobs"]["text_offset"] == [0, 6]


@pytest.mark.parametrize(
    ("stop", "min_tokens", "text", "reason"),
    [
        ("<|user|>", 0, " Paris", "stop"),
        ("<|user|> and", 0, " Paris", "stop"),
        (" Paris<|user|>", 0, "", "stop"),
        ("<|user|> and<|im_end|>", 0, " Paris", "stop"),
        ("<|user|> and<|user|>", 0, " Paris and Rome", "length"),
        (" Paris and", 0, "", "stop"),
        ("<|user|> and", 5, " Paris and Rome", "length"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_may_contain_special_tokens(post, loaded, stop, min_tokens, text, reason, stream):
    ids = pieces(loaded.tokenizer, "▁Paris", "<|user|>", "▁and", "<|im_end|>", "▁Rome")
    body = FRANCE | {"stop": stop, "min_tokens": min_tokens, "stream": stream}
    response = post(COMPLETIONS, body, ids)
    choices = [event["choices"][0] for event in events(response)] if stream else response.json()["choices"]
    assert "".join(choice["text"] for choice in choices) == text
    assert choices[-1]["finish_reason"] == reason


@pytest.mark.parametrize(
    "until",
    [
        ["<|eot_id|>", "<|start_header_id|>user<|end_header_id|>", "Q:", "</s>", "<|im_end|>"],  # gsm8k_cot_llama
        ["\nclass", "\ndef", "\n#", "\nif", "\nprint", "\nassert"],
        [f"\n{number}." for number in range(30)],
    ],
)
def test_the_harness_may_stop_at_many_strings_in_its_own_words(post, loaded, until):
    harness = LocalCompletionsAPI(base_url="http://localhost", model="tiny", tokenizer_backend=None)
    options = {"until": [*until, " and"], "max_gen_toks": 12, "do_sample": False}
    body = harness._create_payload([FRANCE["prompt"]], generate=True, gen_kwargs=options, eos="</s>")
    assert len(body["stop"]) > len(until)
    answer = post(COMPLETIONS, body, rome(loaded)).json()
    assert harness.parse_generations(answer) == [" Paris"]
