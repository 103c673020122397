"""What commands with a --plot share."""

from fmsim.errors import FmsimError


def check_plotly() -> None:
    """Raise FmsimError where plotly is missing: before the work, not after it."""
    try:
        import plotly  # noqa: F401
    except ModuleNotFoundError:
        raise FmsimError("--plot needs plotly; pip install 'fmsim[report]'") from None
