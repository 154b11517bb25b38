"""What baklava does with every family of transformers that has a causal language model, tried on tiny random models.

`python tests/helpers/model_table.py` writes docs/reference/models.md.
"""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import torch
from engine_client import ask, engine_of
from model_families import FAMILIES, GEMMA3N, GEMMA4, LINEAR, SHAPE, SHARED
from transformers import AutoModelForCausalLM, __version__, logging
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from baklava.cache.budgeted_cache import BudgetedCache
from baklava.data.windows import Window
from baklava.errors import UserError
from baklava.evaluation.window_scoring import prefill_window, score_plan
from baklava.plan.budget_plan import BudgetPlan, full_cache_plan
from baklava.plan.geometry import CacheGeometry
from baklava.profiling.profile import Profile
from baklava.profiling.profiler import measure_profile
from baklava.runtime.model_loader import LoadedModel
from tuning.study.objective import Goal
from tuning.study.search_space import SearchTask, recorded_evictions

MODEL_TYPES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
COLUMNS = ("generates", "profiles", "scores", "searches", "serves")

SMALL = {
    "num_key_value_heads": 2,
    "head_dim": 8,
    "global_head_dim": 16,
    "sliding_window": 16,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_d_ssm": 64,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 16,
    "is_decoder": True,
    "ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "decoder_layers": 4,
    "decoder_attention_heads": 4,
    "encoder_attention_heads": 4,
    "d_model": 32,
    "n_group": 1,
    "topk_group": 1,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 64,
    "attention_chunk_size": 16,
    "rotary_dim": 8,
    "n_shared_experts": 1,
    "ssm_state_size": 8,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
}
"""Fields that are set if the family has them."""

ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
SPECIAL: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "num_layers": 4},
    **dict.fromkeys(("gemma3n", "gemma3n_text"), GEMMA3N | SHARED),
    **dict.fromkeys(("gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text"), GEMMA4 | SHARED),
    "gpt_bigcode": {"num_key_value_heads": 1},
    "granitemoehybrid": {"layer_types": LINEAR},
    "hunyuan_v1_dense": ROPE | {"head_dim": 8},
    "hunyuan_v1_moe": ROPE | {"head_dim": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "mistral": {"sliding_window": None},
    "ministral": FAMILIES["ministral"][1],
    "nemotron": {"num_key_value_heads": 2},
    "nemotron_h": FAMILIES["nemotron_h"][1],
    "smollm3": FAMILIES["smollm3"][1],
    "xmod": {"default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
}
"""Fields of single families; without them, their tiny model would not be typical, or not be made."""

NOT_SMALL = {
    "blt": "its encoders cannot be made small",
    "phi4_multimodal": "its encoders of images and sound cannot be made small",
}

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "models.md"

PROMPT, TOKENS = 40, 12


def tiny_config(model_type: str) -> Any:
    """Return a config of four layers, of all the kinds that the family's default has."""
    text = CONFIG_MAPPING[model_type]().get_text_config(decoder=True)
    fields = {name: value for name, value in SHAPE.items() if name != "num_key_value_heads"}
    for name, value in SMALL.items():
        try:
            if getattr(text, name, None) is not None:
                fields[name] = value
        except RuntimeError:  # it differs from layer to layer
            continue
    if kinds := list(dict.fromkeys(getattr(text, "layer_types", None) or ())):
        fields["layer_types"] = [kinds[layer % len(kinds)] for layer in range(4)]
    fields |= SPECIAL.get(model_type, {})
    fixed = [name for name in fields if _is_computed(type(text), name)]
    return type(text)(**{name: value for name, value in fields.items() if name not in fixed})


def _is_computed(config_class: Any, name: str) -> bool:
    alias = config_class.attribute_map.get(name, name)
    return any(isinstance(getattr(config_class, each, None), property) for each in (name, alias))


def _ids(tokens: int) -> Any:
    return torch.randint(3, 60, (1, tokens), generator=torch.Generator().manual_seed(0))


def refusal(model_type: str) -> str | None:
    """Return the sentence with which loading refuses a family without looking at its weights, or None."""
    config = tiny_config(model_type)
    try:
        CacheGeometry.from_config(config)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        LoadedModel.of(model)
    except UserError as error:
        return str(error)
    return None


class Trial:
    """Tries one family; each step uses what the steps before it have made."""

    def __init__(self, config: Any) -> None:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
        with torch.inference_mode():
            options = {"max_new_tokens": TOKENS, "do_sample": False}
            self.expected = model.generate(_ids(PROMPT), **options)[0].tolist()
        self.loaded = LoadedModel.of(model)
        self.full = full_cache_plan(self.loaded.identity, self.loaded.geometry, PROMPT + TOKENS, bits=32)
        self.window = Window("w", "d", tuple(_ids(PROMPT + TOKENS)[0].tolist()), PROMPT)
        self.profile: Profile | None = None
        self.plan: BudgetPlan | None = None

    @torch.inference_mode()
    def generates(self) -> None:
        """The tokens of transformers' own cache."""
        cache = BudgetedCache(self.full)
        made = self.loaded.model.generate(_ids(PROMPT), past_key_values=cache, max_new_tokens=TOKENS, do_sample=False)
        cache.check_integrity(PROMPT + TOKENS - 1)
        assert made[0].tolist() == self.expected, "other tokens than transformers' own cache"

    def profiles(self) -> None:
        """Rankings and curves of every layer with full attention."""
        self.profile = measure_profile(self.loaded, [self.window])

    def scores(self) -> None:
        """A plan that covers the text loses nothing."""
        score = score_plan(self.loaded, prefill_window(self.loaded, self.window, ()), self.full)
        assert score.kl < 1e-4, f"a plan that covers the text loses {score.kl:.2g} nats"

    def searches(self) -> None:
        """A plan from sampled parameters, within its bytes."""
        assert self.profile is not None
        task = SearchTask(self.profile, Goal(budget=0.95), PROMPT + TOKENS, ("w",), bits=("16",))
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        study, prefilled = (
            optuna.create_study(),
            prefill_window(self.loaded, self.window, recorded_evictions(self.loaded.moves_queries)),
        )
        for _ in range(20):
            trial = study.ask()
            task.space.suggest(trial)
            try:
                self.plan = task.plan(trial.params)
            except UserError:  # too small for the interval that was sampled
                continue
            assert score_plan(self.loaded, prefilled, self.plan).allocated_bytes <= self.plan.bytes_per_sequence
            return
        raise AssertionError("no plan fits")

    def serves(self) -> None:
        """Two requests at once, with the tokens that each gets alone."""
        assert self.plan is not None
        prompts = [self.window.ids[:30], self.window.ids[3:40]]
        answers = []
        for together in (False, True):
            with engine_of(self.loaded, self.plan, 1 << 26) as engine:
                asked = []
                for prompt in prompts:
                    asked.append(ask(engine, prompt, 6))
                    if not together:
                        asked[-1].wait()
                answers.append([each.tokens() for each in asked])
        assert answers[0] == answers[1], "other tokens for two requests at once"


def support_of(model_type: str) -> tuple[str, ...]:
    """Return a cell per column, and why something does not work."""
    none = ("no",) * len(COLUMNS)
    if model_type in NOT_SMALL:
        return (*("?",) * len(COLUMNS), NOT_SMALL[model_type])
    try:
        config = tiny_config(model_type)
    except Exception as error:
        return (*("?",) * len(COLUMNS), f"no tiny model: {_first_line(error)}")
    try:
        CacheGeometry.from_config(config)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trial = Trial(config)
    except UserError as error:
        return (*none, str(error))
    except Exception as error:
        return (*("?",) * len(COLUMNS), f"no tiny model: {_first_line(error)}")
    cells: list[str] = []
    reason = ""
    for column in COLUMNS:
        step: Callable[[], None] = getattr(trial, column)
        try:
            if reason:
                cells.append("no")
            else:
                step()
                cells.append("yes")
        except Exception as error:
            cells.append("no")
            reason = _first_line(error)
    return (*cells, reason)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def row(model_type: str, cells: tuple[str, ...]) -> str:
    """Return a line of the page."""
    return f"| {model_type} | {' | '.join(cells[:-1])} | {cells[-1].replace('|', '/')} |"


HEADER = f"""# Models

Every family of transformers {__version__} that has a causal language model, tried on tiny random models.
The page is written by a test, which fails when a family changes its row. Models that also see or hear count by their
text part.

- **generates**: the tokens of transformers' own cache, under a plan that covers the text
- **profiles**: rankings and loss curves of the layers with full attention, and importance
- **scores**: the fast score of a plan that covers the text is that of the full cache
- **searches**: a sampled plan is within its bytes when it is applied
- **serves**: the engine gives two requests at once the tokens that each gets alone

`no` is a refusal in the sentence of the last column. `?` says that no tiny model of the family could be made.

| family | {" | ".join(COLUMNS)} | why not |
|---|{"---|" * len(COLUMNS)}---|
"""


def page(rows: list[str]) -> str:
    """Return the page of these rows."""
    return HEADER + "\n".join(rows) + "\n"


def rows_of(text: str) -> dict[str, str]:
    """Return the rows of a page by family."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return {line.split(" | ")[0].removeprefix("| "): line for line in lines[1:]}


if __name__ == "__main__":
    logging.set_verbosity_error()
    PAGE.write_text(page([row(name, support_of(name)) for name in MODEL_TYPES]))
