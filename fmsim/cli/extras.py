"""What a command needs beyond the base install: told before its work begins."""

from importlib.util import find_spec

from fmsim.errors import FmsimError

MODULES = {"model": ("torch", "transformers", "tokenizers")}


def require(extra: str, what: str) -> None:
    """Raise FmsimError, saying that `what` needs it, where a module of the extra is not
    installed.
    """
    for module in MODULES[extra]:
        if find_spec(module) is None:
            raise FmsimError(f"{what} needs {module}: pip install 'fmsim[{extra}]'")
