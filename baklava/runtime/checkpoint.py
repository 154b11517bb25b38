"""A checkpoint as transformers reads it: whatever a loader raises becomes one sentence, and every weight is there."""

import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import tokenizers
import torch
import transformers
from huggingface_hub import constants as hub
from huggingface_hub import get_session, try_to_load_from_cache
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.quantizers.auto import get_hf_quantizer
from transformers.utils import logging as transformers_logging

from baklava.errors import UserError
from baklava.paths import LFS_HEADER

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".npz")
"""Endings of weights in formats that are not read."""

SIZES = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_size", "head_dim", "vocab_size")
"""Fields of a config that shape the cache, and that transformers takes whatever they are."""

TOKENIZER_FILES = frozenset(
    {
        "tokenizer.json",
        "tokenizer.model",
        "tekken.json",
        "vocab.json",
        "vocab.txt",
        "spiece.model",
        "sentencepiece.bpe.model",
    }
)
"""Files of which each tokenizer has one at least, except for those without a vocabulary."""

OTHER_TASKS = ("Classification", "QuestionAnswering", "MultipleChoice", "MaskedLM", "PreTraining", "RewardModel")
"""Ends of the names of architectures that transformers would load as language models all the same."""

COMPUTED_BUFFERS = re.compile(r"\.(self_)?(attn|attention)\.(bias|masked_bias|causal_mask)$|\binv_freq$")
"""Names of masks and frequencies that older versions of transformers stored, and that models compute now."""

_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "Cannot allocate memory")
"""Parts of the messages of other errors that mean that memory ran out; PyTorch raises a RuntimeError on the CPU."""

_SELF_EXPLAINING = (OSError, ValueError, RuntimeError, ImportError)
"""Errors whose message says what is wrong; others are named by their type as well."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint by the name that the user gave.

    Attributes:
        name: What error messages call it.
        path: A directory, or the id of a hub model.
    """

    name: str
    path: str

    def read_config(self) -> Any:
        """Return the config.

        Raises:
            UserError: there is no such checkpoint, it was trained for another task, or its quantization needs a package
                that is missing.
        """
        config = self._call("its config", lambda: AutoConfig.from_pretrained(self.path, **self._source))
        others = [name for name in config.architectures or () if str(name).endswith(OTHER_TASKS)]
        if others:
            raise self._error(
                f"it is a {others[0]}, which does not predict the next token", "choose a causal language model"
            )
        if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise self._error(
                f"transformers {transformers.__version__} has no causal language model of type {config.model_type}",
                "choose another model",
            )
        sizes = vars(config.get_text_config(decoder=True))
        for field in SIZES:
            if isinstance(size := sizes.get(field), int) and size < 1:
                raise self._error(f"its config has {field} {size}, which is below 1", "correct its config.json")
        return config

    def read_tokenizer(self) -> Any:
        """Return the tokenizer; raises UserError if it cannot be read."""
        tokenizer = self._call("its tokenizer", lambda: AutoTokenizer.from_pretrained(self.path, **self._source))
        names = {*type(tokenizer).vocab_files_names.values()}
        # transformers makes an empty tokenizer for some classes if their files are missing.
        if names and os.path.isdir(self.path) and (names | TOKENIZER_FILES).isdisjoint(os.listdir(self.path)):
            raise self._error("it has no tokenizer", "copy the tokenizer's files from the base model")
        return tokenizer

    def read_model(self, dtype: torch.dtype | str, target: torch.device, *, device_map_auto: bool = False) -> Any:
        """Return the model with all of its weights, on the target device or distributed over all visible ones.

        Raises:
            UserError: the weights cannot be read, do not fit into memory, or are not those of the model.
        """
        model = self._read_weights(dtype, "auto" if device_map_auto else None, target)
        self._check_causal(model)
        if not device_map_auto:
            model = self._call("it", lambda: model.to(target), target)
        self._check_finite(model)
        return model

    def read_empty_model(self, config: Any) -> Any:
        """Return the model on the meta device; refuse weights by their names and shapes, without reading them.

        Weights on the hub, which may have to be fetched first, and quantized ones, whose names depend on the device,
        are not looked at. Neither are any without accelerate, with which transformers chooses devices.
        """
        quantized = any(
            getattr(part, "quantization_config", None) for part in (config, config.get_text_config(decoder=True))
        )
        if quantized:
            self._call("it", lambda: _check_quantizer_packages(config))
        if os.path.isdir(self.path) and not quantized and transformers.utils.is_accelerate_available():
            with _quiet_transformers():
                model = self._read_weights("auto", "meta")
        else:
            model = self._call("it", lambda: _empty_model(config))
        self._check_causal(model)
        return model

    def check_vocabulary(self, tokenizer: Any, model: Any) -> None:
        """Raise UserError if a token of the tokenizer's own vocabulary has no embedding; added ones may be unused."""
        rows = model.get_input_embeddings().weight.shape[0]
        added = tokenizer.get_added_vocab()
        outside = {
            number: token for token, number in tokenizer.get_vocab().items() if number >= rows and token not in added
        }
        if outside:
            raise self._error(
                f"its tokenizer has {len(outside):,} tokens, such as {outside[min(outside)]!r}, beyond the {rows:,} "
                "that its weights have an embedding for",
                "take the tokenizer and the weights from the same checkpoint",
            )

    @cached_property
    def _source(self) -> dict[str, bool]:
        """Where every file is read from: never code of the checkpoint, and from the hub only if it can be reached.

        The hub's library would try it again for half a minute, for each file.

        Raises:
            UserError: the hub cannot be reached, and the model has not been fetched before.
        """
        reason = None if os.path.exists(self.path) or not _is_hub_id(self.path) else _hub_failure()
        if reason and not isinstance(try_to_load_from_cache(self.path, "config.json"), str):
            meant = "write `demo` if you meant that" if get_close_matches(self.name.lower(), ["demo"]) else None
            raise self._error(
                f"it is no directory, and {hub.ENDPOINT} cannot be reached ({reason})",
                f"{meant or 'correct the name'}, or connect to the network; a model that was fetched before loads "
                "without it, and at once with HF_HUB_OFFLINE=1",
            )
        return {"trust_remote_code": False, "local_files_only": bool(reason)}

    def _read_weights(
        self, dtype: torch.dtype | str, device_map: str | None, target: torch.device | None = None
    ) -> Any:
        model, found = self._call(
            "it",
            lambda: AutoModelForCausalLM.from_pretrained(
                self.path,
                dtype=dtype,
                device_map=device_map,
                use_safetensors=True,
                **self._source,
                attn_implementation="eager",
                ignore_mismatched_sizes=True,  # they are refused below, with their names
                output_loading_info=True,
            ),
            target,
        )
        self._check_weights(model, found)
        return model

    def _check_weights(self, model: Any, found: Mapping[str, Any]) -> None:
        """Raise UserError if a parameter is not in the safetensors, or something there is in no module of the model."""
        names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
        unused = sorted(
            name
            for name in found["unexpected_keys"]
            if _belongs_to_a_layer(name, model) and not COMPUTED_BUFFERS.search(name)
        )
        if any("lora_" in name or name.startswith("base_model.") for name in found["unexpected_keys"]):
            remedy = "merge the adapter into its base model (merge_and_unload), and save that"
        else:
            remedy = "fetch the whole checkpoint again, or correct its config.json"
        if missing := [name for name in names if name in found["missing_keys"]]:
            raise self._error(
                f"its safetensors lack {len(missing):,} of the {len(names):,} weights that {type(model).__name__} has "
                f"({_first_of(missing)}){_and_hold(found['unexpected_keys'])}",
                remedy,
            )
        if found["mismatched_keys"]:
            name, stored, expected = min(found["mismatched_keys"])
            raise self._error(
                f"the shape of {len(found['mismatched_keys']):,} of its weights is not that of its config ({name} is "
                f"{list(stored)} instead of {list(expected)})",
                remedy,
            )
        if unused and not getattr(model, "hf_quantizer", None):
            raise self._error(
                f"its safetensors hold weights that {type(model).__name__} would leave out ({_first_of(unused)}; "
                f"{len(unused):,} in all)",
                remedy,
            )

    def _check_causal(self, model: Any) -> None:
        """Raise UserError if no layer is causal, as in a BERT that its config does not make a decoder."""
        layers = [module for module in model.modules() if hasattr(module, "layer_idx") and hasattr(module, "is_causal")]
        if layers and not any(layer.is_causal for layer in layers):
            raise self._error(
                f"every token of {type(model).__name__} attends to later ones too", "choose a causal language model"
            )

    def _check_finite(self, model: Any) -> None:
        """Raise UserError if a weight is NaN or infinite, as after a training that diverged."""
        wrong = [name for name, weight in model.named_parameters() if not _is_finite(weight.detach())]
        if wrong:
            raise self._error(
                f"it has weights with values that are not finite ({_first_of(wrong)}; {len(wrong):,} in all)",
                "fetch it again, or choose an earlier checkpoint",
            )

    def _call(self, part: str, loader: Callable[[], Result], device: torch.device | None = None) -> Result:
        """Call a loader of transformers, and nothing else: its every error is the checkpoint's, or memory ran out."""
        try:
            return loader()
        except (KeyboardInterrupt, SystemExit, GeneratorExit, UserError):
            raise
        except BaseException as error:  # tokenizers panics with an error that is no Exception
            logger.debug("transformers cannot read %s of %s", part, self.name, exc_info=True)
            raise self._refusal(part, error, device) from error

    def _refusal(self, part: str, error: BaseException, device: torch.device | None) -> UserError:
        """Return the error to raise: too little memory is no fault of the checkpoint."""
        out_of_memory = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if out_of_memory or any(text in str(error) for text in _OUT_OF_MEMORY):
            return UserError(
                f"model {self.name!r} does not fit into the free memory of {device or 'this machine'} "
                f"({first_line(error)}); free some of it, or choose a smaller model or another device"
            )
        reason = first_line(error)
        if not isinstance(error, _SELF_EXPLAINING):
            reason = f"{type(error).__name__}: {reason}"
        if "trust_remote_code" in str(error):
            return self._error(
                f"{part} needs code of its own (auto_map), and code of a checkpoint is never run",
                "choose a model of an architecture that transformers has",
            )
        if isinstance(error, ImportError):
            return self._error(
                f"{part} needs a package that is missing here ({reason})", "install it, or choose another checkpoint"
            )
        if os.path.isdir(self.path):
            return self._directory_error(part, reason)
        if os.path.isfile(self.path):
            return self._error("it is a file", "give the directory with config.json, safetensors and a tokenizer")
        if not _is_hub_id(self.path):
            return self._error(
                "there is no such directory", "correct the path, or give `demo` or the id of a hub model"
            )
        return self._error(
            f"{part} cannot be read ({reason})",
            "give `demo`, a directory with safetensors, or the id of a hub model that this machine can reach",
        )

    def _directory_error(self, part: str, reason: str) -> UserError:
        """Return the error for a directory, by what its files are."""
        try:
            files = sorted(path for path in Path(self.path).iterdir() if path.is_file())
            pointers = [path.name for path in files if _is_lfs_pointer(path)]
        except OSError as error:
            return self._error(f"{error.filename} cannot be read ({error.strerror})", "make it readable")
        names = {path.name for path in files}
        if pointers:
            return self._error(
                f"{', '.join(pointers[:3])} is a Git LFS pointer instead of the file",
                f"run git lfs pull in {self.path}",
            )
        if "config.json" not in names and "adapter_config.json" in names:
            return self._error(
                "it is an adapter without its base model",
                "merge it into the base model (merge_and_unload), and save that",
            )
        if "config.json" not in names:
            return self._error(
                "it has no config.json", "give a directory with config.json, safetensors and a tokenizer"
            )
        if part == "its tokenizer" and names.isdisjoint(TOKENIZER_FILES):
            return self._error("it has no tokenizer", "copy the tokenizer's files from the base model")
        if part == "its tokenizer":
            return self._error(
                f"its tokenizer cannot be read ({reason})",
                "fetch the tokenizer's files again, or save them with the versions installed here: transformers "
                f"{transformers.__version__}, tokenizers {tokenizers.__version__}",
            )
        weights = [path for path in files if path.suffix == ".safetensors"]
        others = [path.name for path in files if path.suffix in OTHER_WEIGHTS]
        if others and not weights:
            return self._error(
                f"its weights are in {others[0]}, and only safetensors are read",
                "convert it where you trust it: load it with transformers, and save it with save_pretrained",
            )
        for path in weights:
            try:
                with safe_open(path, framework="pt"):
                    pass
            except (SafetensorError, OSError) as error:
                return self._error(f"{path.name} cannot be read ({first_line(error)})", "fetch it again")
        return self._error(
            f"{part} cannot be read ({reason})",
            "fetch it again, or correct what this names: it needs config.json, safetensors and a tokenizer",
        )

    def _error(self, cause: str, remedy: str) -> UserError:
        return UserError(f"cannot load model {self.name!r}: {cause}; {remedy}")


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, without half a sentence, or two if the first introduces the next."""
    first, *more = str(error).strip().splitlines() or [type(error).__name__]
    if more and first.endswith(":"):
        first = f"{first} {more[0].strip()}"
    elif more and not first.endswith("."):
        first = first.rpartition(". ")[0] or first
    return first.strip().rstrip(".:")


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Hide progress and warnings of transformers, which come again when the model is loaded."""
    verbosity, shows_progress = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if shows_progress:
            transformers_logging.enable_progress_bar()


def _is_hub_id(path: str) -> bool:
    return not path.startswith(("/", ".", "~")) and path.count("/") <= 1


def _hub_failure() -> str | None:
    """Return why the hub cannot be reached; None if it answers, or if it is not to be asked."""
    if hub.HF_HUB_OFFLINE:
        return None
    try:
        get_session().head(hub.ENDPOINT, timeout=hub.HF_HUB_ETAG_TIMEOUT)
    except Exception as error:  # its HTTP client, and so the type of its errors, depends on the library's version
        logger.debug("the hub cannot be reached", exc_info=True)
        return first_line(error)
    return None


def _empty_model(config: Any) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False, attn_implementation="eager")


def _check_quantizer_packages(config: Any) -> None:
    """Raise ImportError if the quantization needs a package; whether it needs a GPU is for the loading process."""
    try:
        get_hf_quantizer(config, None, device_map=None, weights_only=True, user_agent={})
    except ImportError:
        raise
    except (RuntimeError, ValueError) as error:
        logger.debug("this process cannot load the quantized weights: %s", error)


def _belongs_to_a_layer(name: str, model: nn.Module) -> bool:
    """Return whether a weight is inside a module that the model has, below its body; other tasks have other heads.

    Checkpoints of a body alone have its names without their first part.
    """
    modules = {name for name, _ in model.named_modules()}
    body = getattr(model, "base_model_prefix", "")
    for place in (name, f"{body}.{name}"):
        while place and place not in modules:
            place = place.rpartition(".")[0]
        if place not in ("", body):
            return True
    return False


def _is_finite(weight: torch.Tensor) -> bool:
    if weight.is_meta or not weight.numel() or not weight.is_floating_point() or weight.element_size() < 2:
        return True
    return bool(torch.stack(torch.aminmax(weight)).isfinite().all())


def _is_lfs_pointer(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(LFS_HEADER)) == LFS_HEADER


def _first_of(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def _and_hold(unexpected: set[str]) -> str:
    return f" and hold {len(unexpected):,} others ({_first_of(sorted(unexpected))})" if unexpected else ""
