"""Bytes as text, and back."""

import pytest

from fmsim.units import bytes_of, gib, mib, sized


def test_bytes_as_text():
    assert gib(3 * 2**29) == "1.50 GiB"
    assert gib(-(2**30), 0) == "-1 GiB"
    assert mib(2**20 + 2**18, 3) == "1.250 MiB"
    told = [sized(n_bytes) for n_bytes in (2**30, 2**24, 2**18, 2**10, 2**9)]
    assert told == ["1.000 GiB", "16.0 MiB", "0.250 MiB", "1.00 KiB", "512 B"]


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        ("16GiB", 16 * 2**30),
        (" 1.5 mb ", 1_500_000),
        ("4096", 4096),
        ("7 B", 7),
        ("2TiB", 2**41),
        ("", None),
        ("GiB", None),
        ("-1 GiB", None),
        ("5 apples", None),
        ("5%", None),
    ],
)
def test_text_as_bytes(text, n_bytes):
    assert bytes_of(text) == n_bytes
