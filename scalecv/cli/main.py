"""The command line: `scalecv VERB … [key=value …]`. Each verb is one function of the library.

Progress and messages go to stderr; `--json` prints one JSON object on stdout as the last thing, and nothing else there.
Exit codes: 0 done, 1 failed while running, 2 the input is wrong and nothing was started, 75 interrupted, state saved.
"""

import sys

import typer

from scalecv.cli import bands, bench, data, experiments, operations, predictions, records, sweeps
from scalecv.cli.output import clean_streams, has_printed, keep_stdout_for_json, print_json
from scalecv.errors import ScalecvError

CTRL_C = 130
"""What typer returns where Ctrl-C came outside of what handles it, and a shell where it ended a command."""

app = typer.Typer(
    add_completion=True,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Computer-vision experiments that outgrow one machine.\n\nFirst day:  scalecv demo  ·  "
    "scalecv ingest FOLDER --to data/mine  ·  scalecv train experiment.yaml",
)
app.command()(experiments.demo)
app.command()(data.ingest)
app.command()(experiments.train)
app.command()(sweeps.tune)
app.command()(sweeps.ensemble)
app.command()(experiments.evaluate)
app.command()(predictions.predict)
app.command()(bands.bands)
app.command()(records.reproduce)
app.command()(records.compare)
app.command()(records.pareto)
app.add_typer(data.app, name="data")
app.command()(experiments.config)
app.command()(experiments.schema)
app.command()(operations.doctor)
app.add_typer(bench.app, name="bench")
app.command()(operations.chaos)
app.command()(operations.ui)
app.command()(operations.sync)
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(operations.submit)


def main() -> None:
    """Entry point: run a verb, turn errors of ours into one message and an exit code."""
    if "--json" in sys.argv:
        keep_stdout_for_json()
    clean_streams()
    code = 0
    try:
        returned = app(standalone_mode=False)  # a typer.Exit comes back as its code
        code = returned if isinstance(returned, int) else 0
        if code == CTRL_C:
            code = _fail("stopped", 75)
    except typer.Abort:
        code = _fail("stopped", 75)
    except ScalecvError as error:
        code = _fail(error, error.exit_code)
    except KeyboardInterrupt:
        code = _fail("stopped", 75)
    except OSError as error:
        code = _fail(f"{error.filename or ''}: {error.strerror or error}".lstrip(": "), 1)
    except Exception as error:
        if type(error).__module__.startswith(("typer", "click")) and hasattr(error, "format_message"):
            code = _fail(f"{error.format_message()}. See scalecv --help", 2)
        else:
            raise
    if code and "--json" in sys.argv and not has_printed():
        print_json({"status": "interrupted" if code == 75 else "failed", "exit_code": code})
    sys.stderr.flush()
    sys.stdout.flush()
    sys.exit(code)


def _fail(message: object, code: int) -> int:
    sys.stderr.write(f"scalecv: {message}\n")
    return code
