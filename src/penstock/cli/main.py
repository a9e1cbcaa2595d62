"""Entry point of `penstock`: runs a command and turns whatever ends it into an exit code and at most one line of error.

    0  done        1  it failed        2  the command line or a setting is wrong        130  interrupted

`--debug` or PENSTOCK_DEBUG=1 shows the traceback instead of the line.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence

INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line and exit."""
    sys.exit(run(sys.argv[1:] if argv is None else list(argv)))


def run(argv: list[str]) -> int:
    """Run the command line; the exit code."""
    debug = "--debug" in argv or os.environ.get("PENSTOCK_DEBUG", "") not in {"", "0"}
    try:
        from penstock.cli.app import cli

        result = cli.main(args=argv, prog_name="penstock", standalone_mode=False)
        # Flush here, so that a closed pipe shows as an exception that is handled and not at interpreter exit.
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except BrokenPipeError:
        # The reader left (`penstock … | head`). Keep the interpreter from flushing into the closed pipe again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        if debug:
            import traceback

            traceback.print_exc()
        return _report(error, debug)


def _report(error: Exception, debug: bool) -> int:
    """Print the one line of `error` and return the exit code."""
    import click

    from penstock.core.errors import ConfigError, PenstockError

    if isinstance(error, click.Abort):
        return INTERRUPTED
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        sys.stderr.write(error.format_message() + "\n")
        return error.exit_code
    if isinstance(error, click.ClickException):
        _print_error(_with_help_hint(error))
        return error.exit_code
    if isinstance(error, ConfigError):
        _print_error(str(error))
        return 2
    if isinstance(error, PenstockError):
        _print_error(str(error))
        return 1
    _print_error(_explain(error, debug))
    return 1


def _with_help_hint(error: object) -> str:
    import click

    assert isinstance(error, click.ClickException)  # noqa: S101 - narrowed by the only caller
    message = error.format_message()
    context = getattr(error, "ctx", None)
    if isinstance(error, click.UsageError) and context is not None:
        message = f"{message.rstrip()} See `{context.command_path} --help`."
    return message


def _explain(error: Exception, debug: bool) -> str:
    """One line for errors that are not ours, with a fix where the cause is known."""
    text = str(error)
    if isinstance(error, MemoryError) or "out of memory" in text.lower() or "can't allocate memory" in text:
        return (
            "Not enough memory. Lower --kv-cache-gib, --memory-utilization or --max-model-len, or take a smaller model."
        )
    if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
        return "The port is in use; stop the other program, or choose another with --port (0 takes a free one)."
    if isinstance(error, ModuleNotFoundError) and not (error.name or "").startswith("penstock"):
        return f"The Python package {error.name!r} is missing; install it with `pip install 'penstock[server]'`."
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}." if error.filename else f"{error.strerror}."
    hint = "" if debug else " Run again with --debug for the traceback."
    return f"Unexpected {type(error).__name__}: {text.splitlines()[0] if text else 'no message'}.{hint}"


def _print_error(message: str) -> None:
    line = " ".join(message.split())
    print(f"penstock: error: {line}", file=sys.stderr)


if __name__ == "__main__":
    main()
