import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from baklava.errors import UserError
from baklava.plan.budget_plan import AllocationConfig, BudgetPlan, EvictionConfig, LayerBudget
from baklava.plan.geometry import CacheGeometry, ModelIdentity

GEOMETRY = CacheGeometry(layers=3, kv_heads=2, query_group=2, head_dim=8, windows=(None, 16, None))
IDENTITY = ModelIdentity(id="tiny", config_hash="abc")


def plan(tokens: tuple[int, int] = (10, 20), **fields: object) -> BudgetPlan:
    layer = LayerBudget(tokens=tokens, key_bits=(16, 16), value_bits=(16, 16))
    parts: dict[str, object] = {
        "model": IDENTITY,
        "geometry": GEOMETRY,
        "context_length": 100,
        "eviction": EvictionConfig(method="streaming_llm"),
        "allocation": AllocationConfig(method="uniform", budget=0.3),
        "layers": (layer, None, layer),
    }
    return BudgetPlan(**(parts | fields))


def test_bytes_count_payload_state_and_sliding_layers() -> None:
    payload, sliding = 2 * 30 * 8 * 4, 16 * 2 * 8 * 4
    assert plan().bytes_per_sequence == payload + sliding
    assert plan(sliding_bits=32).bytes_per_sequence == payload + 2 * sliding
    scored = EvictionConfig(method="heavy_hitter", scored=True, eviction_interval=4)
    assert plan(eviction=scored).bytes_per_sequence == payload + 2 * 30 * 8 + sliding
    assert plan().full_bytes_per_sequence == 2 * 2 * 100 * 8 * 4 + sliding


def test_a_number_of_a_state_counts_four_bytes_on_both_sides_of_the_ratio() -> None:
    geometry = GEOMETRY.model_copy(update={"windows": (None, 0, None), "states": ((30,), (7, 5), ())})
    with_states, without = plan(geometry=geometry), plan(geometry=geometry.model_copy(update={"states": ()}))
    for name in ("bytes_per_sequence", "full_bytes_per_sequence"):
        assert getattr(with_states, name) == getattr(without, name) + 4 * 42
    assert with_states.bytes_for(1) == without.bytes_for(1) + 4 * 42


@pytest.mark.parametrize(
    ("tokens", "said"), [(400, "it loses more"), (25, "it saves and loses little"), (399, None), (26, None)]
)
def test_texts_of_another_length_than_a_plan_was_made_for_are_named(tokens: int, said: str | None) -> None:
    warning = plan().length_warning(tokens)
    assert (warning is None) == (said is None)
    if said:
        assert f"for texts of 100 tokens, and these may have {tokens}" in str(warning)
        assert said in str(warning)


CHANNELS = ("0001020304050607", "0706050403020100")


def test_bytes_count_the_scales_of_mixed_precision_keys_and_centroids() -> None:
    geometry = GEOMETRY.model_copy(update={"head_dim": 32})
    order = bytes(range(32)).hex()
    layer = LayerBudget(tokens=(10, 20), key_bits=(4, 8), value_bits=(4, 8))
    ring = {"geometry": geometry, "layers": (layer, None, layer), "sliding_bits": 16}
    plain, mixed = (plan(**ring, key_channels=channels) for channels in (None, ((order, order), None, (order, order))))
    # 8 bits are not split; of 4, one half takes 5 and the other 3, with a scale of 2 bytes each
    assert mixed.bytes_per_sequence == plain.bytes_per_sequence + 2 * (10 - 4) * 2
    assert mixed.digest != plain.digest
    scored = EvictionConfig(method="heavy_hitter", scored=True, eviction_interval=4)
    more = plan(**ring, eviction=scored.model_copy(update={"centroids": 3}))
    assert more.bytes_per_sequence == plan(**ring, eviction=scored).bytes_per_sequence + 4 * 3 * (2 * 2 * 32 + 8)


@pytest.mark.parametrize(
    "channels", [(CHANNELS,), (CHANNELS, None, (CHANNELS[0],)), (CHANNELS, None, ("00" * 8, CHANNELS[0])), (None,) * 3]
)
def test_invalid_channel_orders_are_refused(channels: object) -> None:
    plan(key_channels=(CHANNELS, None, CHANNELS))
    with pytest.raises(ValidationError, match="key_channels"):
        plan(key_channels=channels)


def test_a_plan_with_an_unknown_field_says_what_to_do(tmp_path: Path) -> None:
    content = json.loads(plan().model_dump_json())
    content["eviction"]["merging"] = 0.0
    (tmp_path / "plan.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"eviction\.merging.* another version of baklava wrote it: search again"):
        BudgetPlan.read(tmp_path / "plan.json")


def test_a_plan_of_an_older_schema_is_refused_with_its_version_and_a_remedy(tmp_path: Path) -> None:
    content = json.loads(plan().model_dump_json()) | {"schema_version": 1}
    (tmp_path / "plan.json").write_text(json.dumps(content))
    said = "schema_version is 1, but this version of baklava reads version 2.* search again with this version"
    with pytest.raises(UserError, match=said):
        BudgetPlan.read(tmp_path / "plan.json")


def test_a_written_plan_reads_back_equal(tmp_path: Path) -> None:
    plan().write(tmp_path / "plan.json")
    assert BudgetPlan.read(tmp_path / "plan.json") == plan()
    assert [file.name for file in tmp_path.iterdir()] == ["plan.json"]


def test_the_digest_depends_on_what_the_cache_does_and_nothing_else() -> None:
    renamed = plan(allocation=AllocationConfig(method="baklava", budget=0.4))
    assert plan().digest == renamed.digest
    assert plan().digest != plan((10, 21)).digest


def test_a_plan_is_frozen_and_takes_no_unknown_field() -> None:
    with pytest.raises(ValidationError):
        plan().context_length = 5  # type: ignore[misc]
    with pytest.raises(ValidationError):
        BudgetPlan.model_validate(plan().model_dump() | {"budgets": []})


def test_layers_that_do_not_match_the_model_are_refused() -> None:
    layer = plan().layers[0]
    for layers in ((layer, layer, layer), (layer, None), (None, None, layer)):
        with pytest.raises(ValidationError):
            plan(layers=layers)


def test_a_head_too_small_for_sinks_and_interval_is_refused() -> None:
    with pytest.raises(
        ValidationError, match="10 entries, but 4 sinks, an eviction every 8 tokens and a residual of 0 need 13"
    ):
        plan(eviction=EvictionConfig(method="heavy_hitter", eviction_interval=8, scored=True))


@pytest.mark.parametrize("content", ["", "{", "[]", '{"schema_version": 3}', "\0"])
def test_a_corrupted_plan_file_is_one_sentence(tmp_path: Path, content: str) -> None:
    file = tmp_path / "plan.json"
    file.write_text(content)
    with pytest.raises(UserError, match="is not a valid plan") as error:
        BudgetPlan.read(file)
    assert "\n" not in str(error.value)


def test_a_missing_or_binary_plan_file_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x80")
    for name in ("missing.json", "binary", "."):
        with pytest.raises(UserError, match="cannot read plan"):
            BudgetPlan.read(tmp_path / name)


def test_a_plan_for_another_model_does_not_fit() -> None:
    plan().validate_for(IDENTITY, GEOMETRY)
    with pytest.raises(UserError, match="was made for tiny"):
        plan().validate_for(ModelIdentity(id="other", config_hash="def"), GEOMETRY)


def test_the_plan_file_holds_the_numbers_that_others_read(tmp_path: Path) -> None:
    plan().write(tmp_path / "plan.json")
    content = json.loads((tmp_path / "plan.json").read_text())
    assert content["layers"][0] == {"tokens": [10, 20], "key_bits": [16, 16], "value_bits": [16, 16]}
    assert content["layers"][1] is None
