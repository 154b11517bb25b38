import pytest
from torch_compile import drill


@pytest.mark.parametrize(("eviction", "bits"), [("streaming", "16"), ("streaming", "4"), ("heavy_hitter", "3")])
def test_compiled_decoding_gives_the_same_tokens_from_a_few_graphs(eviction: str, bits: str) -> None:
    seen = drill(eviction, bits)
    assert seen["equal"]
    assert 1 <= seen["graphs"] <= 4
    assert seen["breaks"] == 0
    assert seen["warnings"] == []


def test_without_a_compiler_decoding_goes_on_with_one_warning() -> None:
    seen = drill("streaming", "4", "no-such-compiler")
    assert seen["equal"]
    assert len(seen["warnings"]) == 1
    assert "goes on uncompiled" in seen["warnings"][0]
