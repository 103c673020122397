"""`fmsim doctor`."""

from __future__ import annotations

from fmsim.cli.options import Json, echo_json


def doctor(as_json: Json = False) -> None:
    """Say what is installed, what GPU there is, and which commands would run here."""
    from fmsim.experiments.doctor import look

    found = look()
    if as_json:
        echo_json(found)
    else:
        from fmsim.report.tables import doctor as table

        table.show(found)
