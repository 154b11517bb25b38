"""Checkpoints: every weight is there, whatever a loader raises is one sentence, and both before weights are read."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from byte_model import byte_tokenizer
from safetensors.torch import load_file, save_file
from transformers.utils import logging as transformers_logging

from baklava.errors import UserError
from baklava.runtime import checkpoint
from baklava.runtime.model_loader import LoadedModel, load, load_config

Maker = Callable[..., LoadedModel]
Weights = dict[str, torch.Tensor]
Damage = Callable[[Path], object]

LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


@pytest.fixture(scope="module")
def whole(tiny: Maker, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny(vocab_size=257).model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy of a checkpoint that loads."""
    return Path(shutil.copytree(whole, tmp_path / "model"))


def refused(folder: Path, message: str) -> None:
    """Expect the same sentence from a load and from the check before it."""
    sentences = []
    for read in (load, load_config):
        with pytest.raises(UserError, match=message) as error:
            read(str(folder))
        sentences.append(str(error.value))
    assert sentences[0] == sentences[1]
    assert sentences[0].startswith(f"cannot load model '{folder}': ")
    assert "\n" not in sentences[0]


def edit(name: str, **fields: object) -> Damage:
    def change(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | fields))

    return change


def write(name: str, content: bytes) -> Damage:
    return lambda folder: (folder / name).write_bytes(content)


def remove(name: str) -> Damage:
    return lambda folder: (folder / name).unlink()


def rewrite(change: Callable[[Weights], Weights]) -> Damage:
    def damage(folder: Path) -> None:
        file = folder / "model.safetensors"
        save_file(change(load_file(file)), file, metadata={"format": "pt"})

    return damage


def shard(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    where = {name: SHARDS[number % 2] for number, name in enumerate(weights)}
    for file in SHARDS:
        own = {name: weight for name, weight in weights.items() if where[name] == file}
        save_file(own, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def truncate(name: str) -> Damage:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-100])


def test_a_whole_checkpoint_loads_as_one_file_and_as_shards(folder: Path) -> None:
    alone = load(str(folder))
    shard(folder)
    sharded = load(str(folder))
    assert sharded.weights_digest == alone.weights_digest
    assert load_config(str(folder)) == (sharded.identity, sharded.geometry)


def test_a_tied_output_layer_and_buffers_need_no_weights_of_their_own(tiny: Maker, folder: Path) -> None:
    tiny(vocab_size=257, tie_word_embeddings=True).model.save_pretrained(folder)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    assert load(str(folder)).identity == load_config(str(folder))[0]


def without_layer(weights: Weights) -> Weights:
    return {name: weight for name, weight in weights.items() if ".layers.1." not in name}


def wrapped(weights: Weights) -> Weights:
    return {f"base_model.model.{name}": weight for name, weight in weights.items()}


def narrower(weights: Weights) -> Weights:
    name = "model.layers.1.mlp.up_proj.weight"
    return weights | {name: weights[name][:-1].contiguous()}


def with_more(name: str) -> Damage:
    return rewrite(lambda weights: weights | {name: torch.zeros(2, 32)})


def without_head(weights: Weights) -> Weights:
    return {name: weight for name, weight in weights.items() if name != "lm_head.weight"}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            rewrite(without_layer),
            r"lack 9 of the 21 weights .*\(model.layers.1.self_attn.q_proj.weight, .*, …\); fetch",
        ),
        (rewrite(wrapped), r"lack 21 of the 21 .* and hold 21 others \(base_model\.model\..*merge the adapter"),
        (rewrite(without_head), r"lack 1 of the 21 weights that LlamaForCausalLM has \(lm_head.weight\); fetch"),
        (rewrite(narrower), r"up_proj.weight is \[63, 32\] instead of \[64, 32\]"),
        (edit("config.json", vocab_size=64), r"weight is \[257, 32\] instead of \[64, 32\]"),
        (edit("config.json", num_hidden_layers=1), r"would leave out \(model.layers.1.input_layernorm.*9 in all\)"),
        (with_more("model.layers.0.self_attn.q_proj.bias"), r"would leave out \(model.layers.0.self_attn.q_proj.bias"),
        (with_more("model.layers.0.self_attn.q_proj.lora_A.weight"), r"lora_A.weight; 1 in all\); merge the adapter"),
    ],
    ids=["layer", "wrapped", "head", "shape", "vocabulary", "more layers", "bias", "lora"],
)
def test_weights_that_are_not_those_of_the_model_are_refused_by_name_and_number(
    folder: Path, damage: Damage, message: str
) -> None:
    damage(folder)
    refused(folder, message)


def test_weights_of_another_head_beside_those_of_the_model_are_left_out(folder: Path) -> None:
    with_more("value_head.weight")(folder)
    load_config(str(folder))
    assert load(str(folder)).geometry.layers == 2


@pytest.mark.parametrize("buffer", ["attn.bias", "attn.masked_bias", "attn.rotary_emb.inv_freq"])
def test_masks_and_frequencies_of_older_checkpoints_are_left_out(buffer: str, folder: Path) -> None:
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=257, n_positions=64)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    with_more(f"transformer.h.0.{buffer}")(folder)
    load_config(str(folder))
    assert load(str(folder)).geometry.layers == 2


def test_layers_of_a_body_alone_are_not_left_out_either(folder: Path) -> None:
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=257, n_positions=64)
    transformers.GPT2Model(config).save_pretrained(folder)
    assert load_config(str(folder))[1] == load(str(folder)).geometry
    edit("config.json", n_layer=1)(folder)
    refused(folder, r"would leave out \(h\.1\.attn.*11 in all\)")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(folder: Path, value: float) -> None:
    def spoil(weights: Weights) -> Weights:
        weights["model.layers.1.mlp.up_proj.weight"][3, 4] = value
        return weights

    rewrite(spoil)(folder)
    with pytest.raises(UserError, match=r"not finite \(model.layers.1.mlp.up_proj.weight; 1 in all\)"):
        load(str(folder))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove(SHARDS[1]), f"No such file or directory: .*{SHARDS[1]}"),
        (truncate(SHARDS[1]), rf"{SHARDS[1]} cannot be read \(.*not fully covered\); fetch it again"),
        (write("model.safetensors.index.json", b"{"), "cannot be read"),
        (write("model.safetensors.index.json", b"[]"), "cannot be read"),
        (write("model.safetensors.index.json", b'{"metadata": {}}'), "cannot be read .*weight_map"),
        (remove("model.safetensors.index.json"), "no file named model.safetensors"),
        (write(SHARDS[0], LFS_POINTER), f"{SHARDS[0]} is a Git LFS pointer instead of the file; run git lfs pull in"),
    ],
)
def test_a_shard_or_an_index_that_cannot_be_read_is_one_sentence(folder: Path, damage: Damage, message: str) -> None:
    shard(folder)
    damage(folder)
    refused(folder, message)


def as_adapter(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "config.json").rename(folder / "adapter_config.json")


def as_bin(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def as_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("x")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (as_adapter, "is an adapter without its base model; merge it"),
        (as_bin, "weights are in pytorch_model.bin, and only safetensors are read; convert it"),
        (empty, "has no config.json"),
        (as_file, "is a file; give the directory"),
        (truncate("model.safetensors"), r"model.safetensors cannot be read \(.*not fully covered\)"),
        (write("model.safetensors", LFS_POINTER), "model.safetensors is a Git LFS pointer"),
        (write("config.json", LFS_POINTER), "config.json is a Git LFS pointer"),
        (write("tokenizer.json", LFS_POINTER), "tokenizer.json is a Git LFS pointer"),
        (write("config.json", b"[]"), "config cannot be read"),
        (write("config.json", b"[" * 100_000), "config cannot be read"),
        (write("generation_config.json", b"[]"), "TypeError: 'list' object"),
        (edit("config.json", model_type="foo"), "model type `foo`"),
        (edit("config.json", model_type=["foo"]), "TypeError: unhashable"),
        (edit("config.json", model_type="foo", auto_map={"AutoConfig": "a.B"}), "needs code of its own .*never run"),
        (edit("config.json", num_hidden_layers="three"), "'num_hidden_layers' expected int, got str"),
        (edit("config.json", num_hidden_layers=-3), "num_hidden_layers -3, which is below 1"),
        (edit("config.json", hidden_act="nonsense"), "KeyError: 'nonsense'"),
        (edit("config.json", dtype="nonsense"), "AttributeError: .*'nonsense'"),
        (edit("config.json", model_type="t5"), "transformers .* has no causal language model of type t5"),
        (edit("config.json", architectures=["LlamaForSequenceClassification"]), "is a LlamaForSequenceClassification"),
        (edit("config.json", architectures=["BertForMaskedLM"], model_type="bert"), "is a BertForMaskedLM"),
    ],
)
def test_a_checkpoint_that_is_no_language_model_in_safetensors_is_one_sentence(
    folder: Path, damage: Damage, message: str
) -> None:
    damage(folder)
    refused(folder, message)


@pytest.mark.parametrize(
    ("method", "package"), [("gptq", "optimum"), ("awq", "gptqmodel"), ("hqq", "HQQ"), ("aqlm", "aqlm")]
)
def test_a_quantization_that_needs_a_package_names_it(folder: Path, method: str, package: str) -> None:
    edit("config.json", quantization_config={"quant_method": method, "bits": 4, "group_size": 128})(folder)
    refused(folder, f"needs a package that is missing here .*{package}.*; install it")


def test_weights_that_are_quantized_as_a_whole_are_not_looked_at_before_a_load(folder: Path) -> None:
    text = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 257, "layer_types": ["full_attention"] * 2}
    transformers.Gemma3Config(text_config=text).save_pretrained(folder)
    edit("config.json", quantization_config={"quant_method": "fp8"})(folder)
    remove("model.safetensors")(folder)
    assert load_config(str(folder))[1].layers == 2


def in_tokenizer(**fields: object) -> Damage:
    return edit("tokenizer.json", **fields)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (in_tokenizer(model={"type": "Newer"}), "Exception: data did not match .*saves? them with the versions"),
        (in_tokenizer(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}), "PanicException"),
        (write("tokenizer.json", b"[]"), "tokenizer cannot be read"),
        (write("tokenizer_config.json", b"[]"), "tokenizer cannot be read"),
        (remove("tokenizer.json"), "has no tokenizer; copy"),
        (
            edit("tokenizer_config.json", tokenizer_class="Foo", auto_map={"AutoTokenizer": ["a.B", None]}),
            "tokenizer needs code of its own",
        ),
    ],
)
def test_a_tokenizer_that_cannot_be_read_is_one_sentence(folder: Path, damage: Damage, message: str) -> None:
    damage(folder)
    refused(folder, message)


def test_a_tokenizer_class_without_its_files_is_no_empty_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    edit("tokenizer_config.json", tokenizer_class="XLNetTokenizer")(folder)
    refused(folder, "has no tokenizer; copy")


@pytest.mark.parametrize("read", [load, load_config])
def test_a_model_with_attention_of_its_own_is_refused_before_it_is_served(
    read: Callable[[str], object], folder: Path
) -> None:
    config = transformers.BloomConfig(hidden_size=32, n_layer=2, n_head=2, vocab_size=257)
    transformers.BloomForCausalLM(config).save_pretrained(folder)
    with pytest.raises(UserError, match="bloom does not attend through transformers' attention interface"):
        read(str(folder))


def test_a_model_that_attends_to_later_tokens_is_refused_before_it_is_served(folder: Path) -> None:
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    for is_decoder in (True, False):
        config = transformers.BertConfig(**shape, vocab_size=257, is_decoder=is_decoder)
        transformers.BertLMHeadModel(config).save_pretrained(folder)
        if is_decoder:
            assert load(str(folder)).geometry == load_config(str(folder))[1]
        else:
            refused(folder, "every token of BertLMHeadModel attends to later ones too")


def test_a_tokenizer_of_more_tokens_than_embeddings_is_refused_with_one_of_them(tiny: Maker, folder: Path) -> None:
    tiny(vocab_size=100).model.save_pretrained(folder)
    refused(folder, "156 tokens, such as 'd', beyond the 100")


def test_an_added_token_without_an_embedding_does_not_prevent_loading(folder: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(folder)
    load_config(str(folder))
    assert load(str(folder)).count_tokens("<extra>") == 1


def test_the_check_before_a_load_reads_no_weights_and_says_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    models = []
    of = LoadedModel.of
    monkeypatch.setattr(LoadedModel, "of", lambda model, *args, **fields: models.append(model) or of(model, *args))
    before = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    load_config(str(folder))
    assert {weight.device.type for model in models for weight in model.parameters()} == {"meta"}
    assert (transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()) == before
    assert capfd.readouterr().err == ""


def test_without_accelerate_only_the_load_looks_at_weights(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = load_config(str(folder))
    monkeypatch.setattr(transformers.utils, "is_accelerate_available", lambda *_: False)
    rewrite(without_layer)(folder)
    assert load_config(str(folder)) == expected
    with pytest.raises(UserError, match="lack 9 of the 21"):
        load(str(folder))


class Loader:
    """Stands in for a class of transformers; raises an error."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def from_pretrained(self, *args: object, **options: object) -> Any:
        raise self.error


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
    ids=["cuda", "cpu", "python"],
)
def test_too_little_memory_is_not_called_a_bad_checkpoint(
    error: Exception, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "AutoModelForCausalLM", Loader(error))
    with pytest.raises(UserError, match=r"does not fit into the free memory of cpu .*smaller model"):
        load(str(folder), device="cpu")


def test_the_original_error_is_the_cause_and_in_the_log(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    error = KeyError("surprise")
    monkeypatch.setattr(checkpoint, "AutoTokenizer", Loader(error))
    with caplog.at_level(logging.DEBUG, "baklava"), pytest.raises(UserError, match="KeyError: 'surprise'") as refused:
        load(str(folder))
    assert refused.value.__cause__ is error
    [record] = [record for record in caplog.records if record.name == "baklava.runtime.checkpoint"]
    assert record.exc_info is not None
    assert record.exc_info[1] is error


def test_ctrl_c_during_a_load_stays_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "AutoTokenizer", Loader(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        load(str(folder))


@pytest.mark.parametrize(
    ("owner", "name"), [(LoadedModel, "of"), (checkpoint.Checkpoint, "_check_weights"), (checkpoint, "_first_of")]
)
def test_an_error_of_ours_is_no_bad_checkpoint(
    folder: Path, monkeypatch: pytest.MonkeyPatch, owner: object, name: str
) -> None:
    def fail(*args: object, **fields: object) -> None:
        raise KeyError("a bug")

    if name == "_first_of":
        rewrite(without_layer)(folder)
    monkeypatch.setattr(owner, name, fail)
    for read in (load, load_config):
        with pytest.raises(KeyError, match="a bug"):
            read(str(folder))


def test_a_model_spread_over_devices_is_checked_too(folder: Path) -> None:
    assert load(str(folder), device_map_auto=True).geometry.layers == 2
    rewrite(without_layer)(folder)
    with pytest.raises(UserError, match="lack 9 of the 21"):
        load(str(folder), device_map_auto=True)


@pytest.mark.parametrize("name", ["/nowhere/model", "./nowhere", "~/nowhere", "models/mine/nowhere"])
def test_a_path_that_leads_nowhere_is_no_name_of_the_hub(name: str) -> None:
    for look in (load, load_config):
        with pytest.raises(UserError, match="there is no such directory"):
            look(name)


@pytest.mark.parametrize(
    ("name", "remedy"), [("Demo", "write `demo` if you meant that"), ("owner/name", "correct the name")]
)
def test_a_name_without_a_hub_is_refused_without_trying_again(
    name: str, remedy: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(checkpoint.hub, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(checkpoint.hub, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    with pytest.raises(UserError, match=f"no directory, and http://127.0.0.1:9 cannot be reached .*; {remedy}"):
        load_config(name)
    assert "Retrying" not in caplog.text


def test_a_model_that_was_fetched_needs_no_hub(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stored = tmp_path / "models--owner--name"
    shutil.copytree(whole, stored / "snapshots" / "0123")
    (stored / "refs").mkdir()
    (stored / "refs" / "main").write_text("0123")
    monkeypatch.setattr(checkpoint.hub, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(checkpoint.hub, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(checkpoint.hub, "ENDPOINT", "http://127.0.0.1:9")
    assert load("owner/name").geometry.layers == 2
    assert "Retrying" not in caplog.text
