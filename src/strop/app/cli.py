"""The command line: one verb, one job. Nothing heavy is imported before a verb runs.

Exit codes: 0 done, 1 failed, 2 misuse, 3 undecided (prove), 130 stopped by Ctrl-C, 143 by SIGTERM.
"""

from __future__ import annotations

import functools
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from strop import __version__
from strop.app import verbs
from strop.errors import StropError, Terminated, nearest

# What DESIGN.md names and this version does not have: asked for, each says so instead of "no such command".
PLANNED = ("squeeze",)


class _Verbs(TyperGroup):
    """A command group that knows the verbs to come and suggests the nearest of those there are."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the verb, or say which one was meant."""
        name = args[0] if args else ""
        if name and not name.startswith("-") and self.get_command(ctx, name) is None:
            if name in PLANNED:
                verbs.stop(
                    f"strop {name} is planned and not in version {__version__}; `strop --help` lists what is.", 2
                )
            known = self.list_commands(ctx)
            verbs.stop(
                f"there is no verb {name!r}{nearest(name, [*known, *PLANNED])}; the verbs are {', '.join(known)}.", 2
            )
        return super().resolve_command(ctx, args)


app = typer.Typer(
    cls=_Verbs,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    add_completion=False,
    help="strop trains the file you ship, and proves it on your task.",
    epilog="Begin with `strop demo`, or `strop plan MODEL`. `strop VERB --help` lists a verb's options.",
)
explain = typer.Typer(
    no_args_is_help=True, help="A number's bits, an affine mapping step by step, a tensor in a format."
)


def _guarded(function: Callable[..., None]) -> Callable[..., None]:
    """Turn what strop raises on purpose into one message and an exit code; anything else is a bug and shows itself."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        _quiet()
        try:
            function(*args, **kwargs)
        except StropError as error:
            verbs.stop(str(error), error.exit_code)
        except Terminated as error:
            verbs.stop(f"stopped by {error}; nothing half-written stands under a final name.", error.exit_code)
        except KeyboardInterrupt:
            verbs.stop("stopped by Ctrl-C; nothing half-written stands under a final name.", 130)
        except (OSError, MemoryError) as error:
            verbs.stop(f"{type(error).__name__}: {error}", 1)

    return run


def _quiet() -> None:
    """Keep the libraries' own bars and advice off the screen; STROP_DEBUG=1 lets them through."""
    if os.environ.get("STROP_DEBUG"):
        return
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("DATASETS_VERBOSITY", "error")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")


def _version(value: bool) -> None:  # noqa: FBT001  typer passes a flag's value by position
    if value:
        print(f"strop {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Take the options that stand before a verb."""


for _function in (verbs.plan, verbs.tune, verbs.quantize, verbs.compare, verbs.export, verbs.chat, verbs.demo):
    app.command(rich_help_panel="Verbs")(_guarded(_function))
_MORE = (verbs.prove, verbs.doctor, verbs.predict, verbs.serve, verbs.merge, verbs.diff, verbs.apply, verbs.verify)
for _function in (*_MORE, verbs.bench, verbs.selftest):
    app.command(rich_help_panel="More")(_guarded(_function))
for _function in (verbs.bits, verbs.affine, verbs.tensor):
    explain.command()(_guarded(_function))
app.add_typer(explain, name="explain", rich_help_panel="More")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line on `argv` (the process's own arguments by default)."""
    app(args=list(argv) if argv is not None else None, prog_name="strop")
