"""The `fmsim` command: finds the sub-command and turns user errors into one line."""

import errno
import importlib
import inspect
import io
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import NoReturn, TextIO

import typer
from typer.main import get_command

from fmsim import __version__
from fmsim.errors import ExitCode, FmsimError, FmsimWarning, shown

COMMANDS = {  # by name: the module below fmsim.cli, the function in it, and what it is for
    "run": ("run", "run", "Replay a trace under policies: what each keeps and costs."),
    "exec": ("exec", "exec_", "Decode with a real model under a policy, and measure it."),
    "eval": ("eval", "evaluate", "What a model still answers under each policy."),
    "plan": ("plan", "plan", "How many requests a server holds, and what binds."),
    "sweep": ("sweep", "sweep", "Run policies under every combination of settings."),
    "tune": ("tune", "tune", "Search a policy's parameters for the most tokens/s."),
    "report": ("report", "report", "One HTML page of results, which works offline."),
    "validate": ("validate", "validate", "Check the replay against the engine, slot by slot."),
    "compare": ("compare", "compare", "What changed between two results or policies."),
    "init": ("init", "init", "Write a scenario for your model, GPU and context."),
    "schema": ("init", "schema", "Print the JSON schema of scenario files."),
    "doctor": ("doctor", "doctor", "What is installed, and which commands would run."),
}
GROUPS = ("scenario", "model", "policy", "trace", "indexer", "hw")  # modules, each with an `app`
HELP = (
    "Which KV pages should stay in GPU memory, and what does that choice cost and save?\n\n"
    "\b\nfmsim run 500k                  replay a trace under every policy\n"
    "fmsim exec --policy lru         decode with a real model under a policy\n"
    "fmsim init --model v4-pro       write a scenario of your own\n"
    "fmsim plan serve                how many requests a server holds, and what binds\n"
    "fmsim policy show lsa           a policy's parameters and its source"
)


EVERY = (*COMMANDS, *GROUPS)


def command_for(arguments: Sequence[str]) -> Callable[..., None]:
    """The program as far as `arguments` need it: to read every option of every command takes
    longer than most commands' own start.

    The command that they name comes with its options, and alone. Where they name none, as for
    --help, all are listed. For the shell's completion all come whole.
    """
    named = next((word for word in arguments if not word.startswith("-")), None)
    if "_FMSIM_COMPLETE" in os.environ:
        return _command(EVERY)
    if named in EVERY:
        return _command((named,))
    return _command((), () if "--version" in arguments else EVERY)


@cache
def _command(whole: tuple[str, ...], listed: tuple[str, ...] = ()) -> Callable[..., None]:
    """`program`, with its options read: a process that calls `main` often reads them once."""
    return get_command(program(whole, listed))


def program(whole: Sequence[str], listed: Sequence[str] = ()) -> typer.Typer:
    """The program with some commands `whole`, and others `listed` with what they are for and
    nothing else; the list is plain text, which needs no more imports.
    """
    app = typer.Typer(
        name="fmsim",
        no_args_is_help=True,
        context_settings={"help_option_names": ["-h", "--help"]},
        pretty_exceptions_enable=False,
        help=HELP,
        rich_markup_mode=None if listed else "rich",
    )
    app.callback(invoke_without_command=True)(_root)
    for name in whole:
        if name in COMMANDS:
            function = _function(name)
            app.command(name, help=flowed(function.__doc__))(function)
        else:
            app.add_typer(_group(name), name=name)
    for name in listed:
        text = COMMANDS[name][2] if name in COMMANDS else _group(name).info.help
        app.command(name, help=text)(_nothing)
    return app


def _function(name: str) -> Callable[..., None]:
    module, function, _ = COMMANDS[name]
    found: Callable[..., None] = getattr(importlib.import_module(f"fmsim.cli.{module}"), function)
    return found


def _group(name: str) -> typer.Typer:
    found: typer.Typer = importlib.import_module(f"fmsim.cli.{name}").app
    for command in found.registered_commands:
        command.help = flowed(command.help or command.callback.__doc__)
    return found


def flowed(text: str | None) -> str:
    """A docstring whose paragraphs are a line each, for the terminal to break; those behind a \\b
    are kept as they stand.
    """
    parts = inspect.cleandoc(text or "").split("\n\n")
    return "\n\n".join(part if part.startswith("\b") else part.replace("\n", " ") for part in parts)


def _nothing() -> None:
    """Stands for a command in the list of all."""


def _root(
    version: bool = typer.Option(False, "--version", help="Print the version and leave."),
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error."),
) -> None:
    if version:
        typer.echo(f"fmsim {__version__}")
        raise typer.Exit()


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Entry point of the console script: runs a command, and exits as `ExitCode` says.

    A user's mistake is one line on standard error. Anything else is a bug of fmsim, and says so.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given[:1]
    _open_closed_streams()
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, _interrupt)
    try:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        _check_out(given)
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            command_for(given)(given, prog_name="fmsim")
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


def _check_out(given: Sequence[str]) -> None:
    """FmsimError for an empty --out, such as of a shell's unset variable: as a path it would be the
    current folder.
    """
    if "--out=" in given or ("--out", "") in pairwise(given):
        raise FmsimError("--out: is empty; name a file or folder (the current one is `.`)")


def _open_closed_streams() -> None:
    """Give a standard stream that is closed (`>&-`, a service) the null device: else the next pipe
    takes its number, and a worker's output goes into it.
    """
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            null = os.open(os.devnull, os.O_RDWR)  # the lowest number that is free: the stream's
            setattr(sys, name, os.fdopen(null, "r" if name == "stdin" else "w"))


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
    package = Path(__file__).parents[1]
    ours = [frame for frame in frames if Path(frame.filename).is_relative_to(package)]
    where = f" at {Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else ""
    what = str(error).partition("\n")[0][:200]
    _say(
        f"a bug in fmsim{where}: {type(error).__name__}: {what}\n"
        "Please report it (README.md says where), with what `fmsim --debug ...` prints for it",
        debug,
    )
    return ExitCode.BUG
