"""Selection of intermediate layers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_idpo.errors import ConfigError
from megatron_idpo.objective.layers import resolve_layers


@pytest.mark.parametrize(
    ("spec", "num_layers", "layers"),
    [
        ([22], 32, (22,)),
        ([0.69], 32, (22,)),  # 22.08: the layer of the paper
        ([0.69], 48, (33,)),
        ([0.5], 5, (3,)),  # 2.5: halves round up
        ([0.001], 32, (1,)),
        ([31, 1], 32, (31, 1)),
        ([0.25, 22], 32, (8, 22)),
        ({"every": 8}, 32, (8, 16, 24)),
        ({"every": 5}, 12, (5, 10)),
        ("all", 4, (1, 2, 3)),
        ([], 32, ()),
    ],
)
def test_forms_of_layers(spec, num_layers, layers):
    assert resolve_layers(spec, num_layers) == layers


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ([0], "layer 0 does not exist in a model of 32 layers"),
        ([-1], "layer -1 does not exist"),
        ([33], "layer 33 does not exist"),
        ([32], "layer 32 is the final layer, which has its own loss"),
        ([0.99], r"0.99 \(layer 32 of 32\) is the final layer"),
        ([22, 3, 22], "layer 22 and layer 22 are the same layer"),
        ([0.5, 0.51], r"0.5 \(layer 16 of 32\) and 0.51 \(layer 16 of 32\) are the same layer"),
        ([22, 0.69], r"layer 22 and 0.69 \(layer 22 of 32\) are the same layer"),
        ([22.0], "22.0 is neither a layer number nor a depth fraction"),
        ([1.0], "1.0 is neither"),
        ([True], "True is neither"),
        (["22"], "'22' is neither"),
        ([float("nan")], "nan is neither"),
        ("some", "'some' does not select layers"),
        ({"each": 2}, "does not select layers"),
        ({"every": 2, "from": 1}, "does not select layers"),
        ({"every": 32}, "every 32 layers leaves none below the final layer 32"),
        ({"every": 0}, "every 0 layers"),
        ({"every": 0.5}, "every 0.5 layers"),
        ({"every": True}, "every True layers"),
    ],
)
def test_invalid_layers_are_reported(spec, message):
    with pytest.raises(ConfigError, match=message):
        resolve_layers(spec, 32)


def test_all_problems_are_reported_together():
    with pytest.raises(ConfigError, match=r"^4 problems") as caught:
        resolve_layers([40, 32, 7, 7, "x"], 32)
    for message in (
        "layer 40 does not",
        "layer 32 is the final",
        "the same layer",
        "'x' is neither",
    ):
        assert message in str(caught.value)


@given(
    st.lists(
        st.one_of(st.integers(-2, 50), st.floats(allow_nan=True), st.floats(0, 1)), max_size=5
    ),
    st.integers(1, 48),
)
def test_any_input_gives_distinct_intermediate_layers_or_an_error(spec, num_layers):
    try:
        layers = resolve_layers(spec, num_layers)
    except ConfigError as error:
        assert "objective.layers: " in str(error)
        return
    assert len(layers) == len(spec) == len(set(layers))
    for layer, entry in zip(layers, spec, strict=True):
        assert 1 <= layer < num_layers
        if isinstance(entry, float):
            assert layer == 1 or abs(layer - entry * num_layers) <= 0.5
        else:
            assert layer == entry
