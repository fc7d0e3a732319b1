"""The Typer app, one line for each command; main() turns an AdvdiffError into one line and an exit code."""

import io
import logging
import os
import signal
import sys
import warnings
from types import FrameType

import typer

from advdiff_cli import __version__, console
from advdiff_cli.commands import (
    attack,
    bench,
    certify,
    compare,
    demo,
    download_pcam,
    evaluate,
    info,
    merge,
    models,
    predict,
    purify,
    report,
    robustness,
    sweep,
    synthesize,
    train_classifier,
    train_ddpm,
)
from advdiff_cli.errors import EXIT_ERROR, AdvdiffError, Stopped, is_debugging

app = typer.Typer(
    name="advdiff",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Purify histopathology patches of adversarial perturbations, and measure how much that helps.",
)
app.command("download-pcam")(download_pcam.download_pcam)
app.command("synthesize")(synthesize.synthesize)
app.command("train-classifier")(train_classifier.train_classifier)
app.command("train-ddpm")(train_ddpm.train_ddpm)
app.command("attack")(attack.attack)
app.command("purify")(purify.purify)
app.command("predict")(predict.predict)
app.command("evaluate")(evaluate.evaluate)
app.command("compare")(compare.compare)
app.command("certify")(certify.certify)
app.command("robustness")(robustness.robustness)
app.command("sweep")(sweep.sweep)
app.command("report")(report.report)
app.command("bench")(bench.bench)
app.command("merge")(merge.merge)
app.command("info")(info.info)
app.command("models")(models.models)
app.command("demo")(demo.demo)


def _version(requested: bool) -> None:
    if requested:
        print(__version__)
        raise typer.Exit


@app.callback()
def options(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    """Options of the program."""


def _stop(signum: int, frame: FrameType | None) -> None:
    raise Stopped(signum)


def _open_standard_streams() -> None:
    """Open /dev/null for standard streams that are closed, and let names that are not UTF-8 through to stdout."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # a file that is opened later would get the number, and messages would be written into it
            os.open(os.devnull, os.O_RDWR)
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115 (open as long as the process)
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115 (the same)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")


def main() -> None:
    """Run the command line; an error that a user can fix is one line on stderr, and a bug keeps its traceback."""
    _open_standard_streams()
    logger = logging.getLogger("advdiff_cli")
    logger.handlers = [console.WarningHandler()]
    logger.propagate = False
    warnings.filterwarnings("ignore", module=r"PIL\.")  # of image sizes and metadata, which advdiff checks itself
    warnings.filterwarnings("ignore", "Dynamo detected a call to a `functools.lru_cache`")
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, _stop)
    try:
        try:
            app()
        except SystemExit:
            if sys.stdout:
                sys.stdout.flush()  # raises BrokenPipeError here rather than at exit
            raise
    except AdvdiffError as e:
        if is_debugging():
            raise
        console.error(str(e))
        sys.exit(e.exit_code)
    except Stopped as e:
        console.error("stopped by a signal; run the same command again to resume")
        sys.exit(e.exit_code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_ERROR)
    except RuntimeError as e:
        if is_debugging() or type(e).__name__ != "OutOfMemoryError":  # torch's, which is not imported here
            raise
        console.error("the memory of the GPU is full; give a smaller --batch-size, or --batch-size auto")
        sys.exit(EXIT_ERROR)
    except OSError as e:
        if is_debugging() or e.strerror is None:
            raise
        console.error(f"{e.strerror}{f': {e.filename}' if e.filename else ''}")
        sys.exit(EXIT_ERROR)
