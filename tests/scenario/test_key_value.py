"""KEY=VALUE, read in one place."""

import pytest

from fmsim.errors import FmsimError
from fmsim.scenario.key_value import key_value


def test_the_first_equals_sign_ends_the_key():
    assert key_value(" a.b = c=d ", "no") == ("a.b", "c=d")
    assert key_value("a=", "no") == ("a", "")


@pytest.mark.parametrize("text", ["", "a", "=1", "  = 1"])
def test_what_is_none_is_said_as_the_caller_says_it(text):
    with pytest.raises(FmsimError, match="^write it so$"):
        key_value(text, "write it so")
