"""A cut trace is the same decode, seen from a later step and by fewer layers."""

import numpy as np
import pytest

from fmsim import trace as traces
from fmsim.errors import FmsimError
from fmsim.trace.cut import cut, parse_numbers, parse_range

WHOLE = traces.read("traces/nano-32k-needles.safetensors")
STEPS = f"steps 0:{WHOLE.n_steps}"


@pytest.mark.parametrize(("first", "end", "layers"), [(0, 100, None), (64, 130, [0, 2, 5])])
def test_rows_keys_and_states_are_those_of_the_whole(first, end, layers, tmp_path):
    traces.write(tmp_path / "a.safetensors", cut(WHOLE, first, end, layers))
    part = traces.read(tmp_path / "a.safetensors", check=True)
    chosen = layers or list(range(6))
    assert part.header.prompt_tokens == 32_768 + first and part.n_steps == end - first
    for step in (0, end - first - 1):
        assert part.n_entries(step) == WHOLE.n_entries(first + step)
    np.testing.assert_array_equal(
        np.asarray(part.entry_ids), np.asarray(WHOLE.entry_ids[first:end])[:, chosen]
    )
    np.testing.assert_array_equal(
        np.asarray(part.mass), np.asarray(WHOLE.mass[first:end])[:, chosen]
    )
    hidden = np.asarray(WHOLE.hidden[first // 64])[chosen]
    np.testing.assert_array_equal(np.asarray(part.hidden[0]), hidden)
    entries = part.total_entries
    np.testing.assert_array_equal(part.keys(), WHOLE.keys(entries)[chosen])
    assert (part.prompt_mass is None) == (first > 0)
    csa_layers = [2, 3, 5, 6, 8, 9]  # of nano's eleven
    assert part.header.geometry["csa_layers"] == [csa_layers[layer] for layer in chosen]
    assert part.csa_numbers == chosen


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((0, 1000), STEPS),
        ((5, 5), STEPS),
        ((10, 100), "multiple of 64"),
        ((0, 10, [6]), "0 to 5"),
        ((0, 10, [1, 0]), "rising"),
    ],
)
def test_what_is_not_there_is_told(arguments, says):
    with pytest.raises(FmsimError, match=says):
        cut(WHOLE, *arguments)


def test_ranges_and_numbers_as_users_write_them():
    assert parse_range("64:128", "--steps") == (64, 128)
    assert parse_range(":", "--steps") == (0, None)
    assert parse_numbers("0,2,5-7", "--layers") == [0, 2, 5, 6, 7]
    for text in ("12", "a:b", "-1:2"):
        with pytest.raises(FmsimError, match="first:end"):
            parse_range(text, "--steps")
    with pytest.raises(FmsimError, match="0,2,5-7"):
        parse_numbers("x", "--layers")
