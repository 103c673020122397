"""The `fmsim` command: mounts the sub-commands and turns user errors into one line."""

import errno
import importlib
import io
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn, TextIO

import typer

from fmsim import __version__
from fmsim.cli.compare import compare
from fmsim.cli.doctor import doctor
from fmsim.cli.eval import evaluate
from fmsim.cli.exec import exec_
from fmsim.cli.init import init, schema
from fmsim.cli.plan import plan
from fmsim.cli.report import report
from fmsim.cli.run import run
from fmsim.cli.sweep import sweep
from fmsim.cli.tune import tune
from fmsim.cli.validate import validate
from fmsim.errors import ExitCode, FmsimError, FmsimWarning, shown

app = typer.Typer(
    name="fmsim",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    help=(
        "Which KV pages should stay in GPU memory, and what does that choice cost and save?\n\n"
        "\b\nfmsim run 500k                  replay a trace under every policy\n"
        "fmsim exec --policy lru         decode with a real model under a policy\n"
        "fmsim init --model v4-pro       write a scenario of your own\n"
        "fmsim plan serve                how many requests a server holds, and what binds\n"
        "fmsim policy show lsa           a policy's parameters and its source"
    ),
)

app.command()(run)
app.command("exec")(exec_)
app.command("eval")(evaluate)
app.command()(plan)
app.command()(sweep)
app.command()(tune)
app.command()(report)
app.command()(validate)
app.command()(compare)
app.command()(init)
app.command()(schema)
app.command()(doctor)

# Modules below fmsim.cli, each with an `app`; what they need beyond typer they import when a
# command runs.
SUB_APPS = ("scenario", "model", "policy", "trace", "indexer", "hw")


@app.callback(invoke_without_command=True)
def _root(
    version: bool = typer.Option(False, "--version", help="Print the version and leave."),
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error."),
) -> None:
    if version:
        typer.echo(f"fmsim {__version__}")
        raise typer.Exit()


def _mount() -> None:
    mounted = {group.name for group in app.registered_groups}
    for name in SUB_APPS:
        if name not in mounted:
            app.add_typer(importlib.import_module(f"fmsim.cli.{name}").app, name=name)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Entry point of the console script: runs a command, and exits as `ExitCode` says.

    A user's mistake is one line on standard error. Anything else is a bug of fmsim, and says so.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given[:1]
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, _interrupt)
    try:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        _mount()
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            app(given, prog_name="fmsim")
        code = ExitCode.DONE
    except Interrupted:
        _say("interrupted", debug)
        code = ExitCode.INTERRUPTED
    except FmsimError as error:
        _say(str(error), debug)
        code = error.exit_code
    except OSError as error:
        code = _environment(error, debug)
    except MemoryError:
        _say("not enough memory for this; run less at once", debug)
        code = ExitCode.INPUT
    except Exception as error:  # the last resort
        code = _bug(error, debug)
    sys.exit(code)


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """fmsim's own warnings in one line, as its errors; others as Python writes them."""
    if issubclass(category, FmsimWarning):
        print(f"fmsim: {shown(message)}", file=sys.stderr)
    else:
        text = warnings.formatwarning(message, category, filename, lineno, line)
        print(text, end="", file=file or sys.stderr)


class Interrupted(BaseException):
    """Ctrl-C or SIGTERM. No KeyboardInterrupt: libraries take that for their own."""


def _interrupt(number: int, frame: object) -> NoReturn:
    for again in (signal.SIGINT, signal.SIGTERM):
        signal.signal(again, signal.SIG_IGN)  # so that the way out is not interrupted
    raise Interrupted


def _say(what: str, debug: bool) -> None:
    if debug:
        traceback.print_exc()
    lines = "\n".join(map(shown, what.splitlines()))
    print(f"fmsim: {lines}", file=sys.stderr)


def _environment(error: OSError, debug: bool) -> ExitCode:
    """What the operating system refuses is the user's to mend, wherever it happens."""
    if error.errno is None:
        return _bug(error, debug)
    place = f"{error.filename}: " if error.filename else ""
    hints = {
        errno.ENOSPC: "the disk is full; free some of it",
        errno.EDQUOT: "the disk quota is used up; free some of it",
        errno.EACCES: "no permission; choose another place",
        errno.EROFS: "a read-only file system; choose another place",
        errno.ENOMEM: "not enough memory; run less at once",
        errno.EMFILE: "too many open files; raise `ulimit -n`",
    }
    _say(place + hints.get(error.errno, error.strerror or str(error)), debug)
    return ExitCode.INPUT


def _bug(error: Exception, debug: bool) -> ExitCode:
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "fmsim" in frame.filename]
    where = f" at {Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else ""
    what = str(error).partition("\n")[0][:200]
    _say(
        f"a bug in fmsim{where}: {type(error).__name__}: {what}\n"
        "Please report it (README.md says where), with what `fmsim --debug ...` prints for it",
        debug,
    )
    return ExitCode.BUG
