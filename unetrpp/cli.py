"""The command `unetrpp`: train, predict, evaluate, report, convert, info, demo.

Every option is a field or argument of the typed function behind its command, with the help text
taken from there; options can also come from a YAML file (--config) and be printed as one
(--print_config). Only the module of the chosen command is imported.

Exit codes: 0 done; 1 an error, explained in a sentence on stderr; 2 wrong usage; 128 + n stopped
by signal n. --debug, or UNETRPP_DEBUG=1, shows the traceback as well.
"""

from __future__ import annotations

import io
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from unetrpp import _is_of_an_extra, _remedy
from unetrpp.faults import in_words, is_expected
from unetrpp.options import read_path
from unetrpp.signals import Stopped, ended_by_signals
from unetrpp.usage import WrongUsage, check_config_file, wrong_usage

__all__ = ["main"]

_EPILOG = "Options of a command: unetrpp COMMAND --help"


def _train(parser) -> Callable[[dict], int]:
    from unetrpp.models import MODELS, model_label
    from unetrpp.train import Interrupted, TrainConfig, run_train, say

    parser.add_argument("-o", "--output", type=Path | None, help="New folder for the run.")
    parser.add_argument(
        "--model",
        type=str | None,
        metavar=f"{{{','.join(MODELS)}}}",
        help=f"Network: {', '.join(map(model_label, MODELS))}; unetrpp if not given. Or the full "
        "name of a preset.",
    )
    parser.add_class_arguments(TrainConfig, as_group=False, skip={"output", "model"})
    # What the networks say of these options follows what TrainConfig says.
    more = {
        "preset": "; ".join(f"{name}: {', '.join(n.presets)}" for name, n in MODELS.items()),
        "patch_size": f"Published: {', '.join(n.published_patch for n in MODELS.values())}",
    }
    for action in parser._actions:
        if action.dest in more:
            action.help = f"{action.help} {more[action.dest]}."

    def run(options: dict) -> int:
        try:
            result = run_train(TrainConfig(**options))
        except Interrupted as stopped:
            if stopped.is_main:
                raise
            return 0  # one process speaks for all; an error of another would end it at once
        if not result["is_main"]:
            return 0
        say(
            f"done: best validation Dice {result['best_dice']:.4f} in {result['steps']} steps, "
            f"{result['seconds'] / 60:.1f} minutes\n"
            f"predict with: unetrpp predict IMAGE.nii.gz -o OUT --checkpoint "
            f"{result['output']}/best"
        )
        return 0

    return run


def _predict(parser) -> Callable[[dict], int]:
    from unetrpp.predict import run_predict

    parser.add_argument("inputs", nargs="+", type=Path, help="NIfTI files, or folders of them.")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        help="Folder for the label maps; or the name of one, if there is one input.",
    )
    parser.add_function_arguments(run_predict, as_group=False, skip={"inputs", "output"})
    return lambda options: 1 if run_predict(**options).failures else 0


def _evaluate(parser) -> Callable[[dict], int]:
    from unetrpp.evaluate import run_evaluate

    parser.add_argument(
        "predictions", type=Path, help="Folder with predicted label maps (NIfTI), or one file."
    )
    parser.add_argument(
        "labels", type=Path, help="Folder with the reference label maps, or one file."
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path | None,
        help="Folder for scores.csv and scores.json; the predictions' by default.",
    )
    parser.add_function_arguments(
        run_evaluate, as_group=False, skip={"predictions", "labels", "output"}
    )
    return lambda options: 1 if run_evaluate(**options).failures else 0


def _report(parser) -> Callable[[dict], int]:
    from unetrpp.report import write_report

    parser.add_argument("run", type=Path, help="Folder of a training run.")
    parser.add_argument(
        "-o", "--output", type=Path | None, help="The file to write; RUN/report.html by default."
    )
    parser.add_function_arguments(write_report, as_group=False, skip={"run", "output", "notes"})

    def run(options: dict) -> int:
        print(write_report(**options))
        return 0

    return run


def _convert(parser) -> Callable[[dict], int]:
    from unetrpp.convert import run_convert

    parser.add_argument("weights", type=Path, help="File or folder with weights, of any origin.")
    parser.add_argument(
        "-o", "--output", type=Path, required=True, help="New checkpoint folder for predict."
    )
    parser.add_function_arguments(run_convert, as_group=False, skip={"weights", "output"})

    def run(options: dict) -> int:
        print(run_convert(**options))
        return 0

    return run


def _demo(parser) -> Callable[[dict], int]:
    from unetrpp.demo import run_demo

    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path("unetrpp-demo"),
        help="New folder for data, run, prediction, scores and report.",
    )
    parser.add_function_arguments(run_demo, as_group=False, skip={"output"})

    def run(options: dict) -> int:
        run_demo(**options)
        return 0

    return run


def _info(parser) -> Callable[[dict], int]:
    parser.add_argument(
        "model",
        nargs="?",
        help="Checkpoint folder (RUN/best), or a preset: of unetrpp by its name (synapse, ...), "
        "of others as NETWORK/PRESET (segformer3d/brats, slim_unetr/hepatic, ...).",
    )
    parser.add_argument(
        "--throughput",
        type=bool,
        default=False,
        help="Time the preset on this CPU, or all presets: images per minute, latency, memory.",
    )

    def run(options: dict) -> int:
        from unetrpp.describe import describe, presets_named
        from unetrpp.throughput import throughput_table

        if options["throughput"]:
            for line in throughput_table(presets_named(options["model"])):
                print(line, flush=True)
        else:
            print(describe(options["model"]))
        return 0

    return run


COMMANDS = {
    "train": ("Train on a folder of labelled volumes.", _train),
    "predict": ("Write label maps of volumes with a trained checkpoint.", _predict),
    "evaluate": ("Score label maps against references: Dice, HD95.", _evaluate),
    "report": ("Write a run's HTML report: curves, scores, pictures.", _report),
    "convert": ("Make a checkpoint for predict of published or other weights.", _convert),
    "info": ("Describe a checkpoint or preset: size, FLOPs, tokens, backends.", _info),
    "demo": ("Train, predict and report on an embedded brain template; no download.", _demo),
}


# What a stopped command leaves, and how to go on.
_AFTER_STOP = {
    "train": "unetrpp train --resume RUN goes on from the last saving; where there is none, start "
    "again",
    "predict": "finished label maps stay; the same command with --skip_existing does the others",
    "evaluate": "no scores were written, and earlier ones stay",
    "report": "no report was written, and an earlier one stays",
    "convert": "no checkpoint was written, and an earlier one stays",
    "info": "nothing was written",
    "demo": "start again with --overwrite",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (sys.argv if not given); returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # the caller has closed it
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        # A file name that is no UTF-8, or that the terminal cannot show, is printed with escapes.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    debug = "--debug" in arguments or bool(os.environ.get("UNETRPP_DEBUG"))
    arguments = [argument for argument in arguments if argument != "--debug"]
    if not arguments or arguments[0] in ("-h", "--help", "--version"):
        print(_version() if arguments[:1] == ["--version"] else _overview())
        return 0
    name = arguments[0]
    if name not in COMMANDS:
        print(f"unetrpp: no command {name!r}; there are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    try:
        with ended_by_signals(), _warning_in_sentences(name):
            return _run(name, arguments[1:])
    except BrokenPipeError:
        return 1
    except KeyboardInterrupt as stop:
        what, number = "Ctrl-C", int(signal.SIGINT)
        if isinstance(stop, Stopped):
            what, number = str(stop), stop.number
        _tell(f"{name}: stopped by {what}; {_AFTER_STOP[name]}")
        return 128 + number
    except WrongUsage as error:
        _tell(f"{name}: {error}; unetrpp {name} --help lists all")
        raise SystemExit(error.exit_code) from None
    except Exception as error:
        if debug:
            raise
        if isinstance(error, ModuleNotFoundError) and _is_of_an_extra(error):
            print(f"unetrpp: {_remedy(error, f'unetrpp {name}')}", file=sys.stderr)
            return 1
        _tell(f"{name}: {_sentence(error, name)}")
        return getattr(error, "exit_code", 1)


def _tell(text: str) -> None:
    with suppress(OSError):  # of a terminal that is gone; the exit code still counts
        print(f"unetrpp {text}", file=sys.stderr)


@contextmanager
def _warning_in_sentences(name: str) -> Iterator[None]:
    """Print the package's own warnings without the line of code that Python adds."""
    usual, package = warnings.formatwarning, str(Path(__file__).parent)

    def in_a_sentence(message: Any, category: Any, file: str, *place: Any, **line: Any) -> str:
        if not file.startswith(package):
            return usual(message, category, file, *place, **line)
        return f"unetrpp {name}: warning: {message}\n"

    warnings.formatwarning = in_a_sentence  # type: ignore[assignment]
    try:
        yield
    finally:
        warnings.formatwarning = usual


def _run(name: str, arguments: list[str]) -> int:
    from argparse import ArgumentError

    from jsonargparse import ArgumentParser
    from jsonargparse.typing import register_type

    # Every path that a command takes, from the command line or YAML.
    register_type(Path, str, read_path, fail_already_registered=False)
    summary, build = COMMANDS[name]
    parser = ArgumentParser(prog=f"unetrpp {name}", description=summary, exit_on_error=False)
    parser.add_argument("--config", action="config", help="YAML file with options.")
    run = build(parser)
    types = _types(parser)
    arguments = _spell_out(arguments, parser)
    for file in _config_files(arguments):
        check_config_file(file, types)
    try:
        options = parser.parse_args([word.translate(_STAND_INS) for word in arguments]).as_dict()
    except ArgumentError as error:
        positions = [action.dest for action in parser._actions if not action.option_strings]
        raise wrong_usage(error, types, positions) from error
    del options["config"]
    return run({option: _with_bytes(value) for option, value in options.items()})


# jsonargparse reads values as YAML, which cannot hold the bytes of a file name that is no UTF-8
# (U+DC80 to U+DCFF in Python). Characters for private use stand for them meanwhile.
_STAND_INS = {0xDC80 + i: 0x10FF00 + i for i in range(128)}
_BYTES = {stand_in: byte for byte, stand_in in _STAND_INS.items()}


def _with_bytes(value: Any) -> Any:
    """Return an option's value with the bytes that `_STAND_INS` stand for."""
    if isinstance(value, list):
        return [_with_bytes(each) for each in value]
    if isinstance(value, str | Path):
        return type(value)(str(value).translate(_BYTES))
    return value


def _types(parser) -> dict[str, object]:
    return {
        action.dest: getattr(action, "_typehint", None)
        for action in parser._actions
        if action.dest not in ("help", "config", "print_config")
    }


def _config_files(arguments: list[str]) -> list[str]:
    following = [*arguments[1:], ""]
    pairs = zip(arguments, following[: len(arguments)], strict=True)
    named = [value for option, value in pairs if option == "--config"]
    prefix = "--config="
    return named + [word.removeprefix(prefix) for word in arguments if word.startswith(prefix)]


def _spell_out(arguments: list[str], parser) -> list[str]:
    """Accept --patch-size for --patch_size, and --overwrite for --overwrite true."""
    switches = {
        option
        for action in parser._actions
        if getattr(action, "_typehint", None) in (bool, bool | None)
        for option in action.option_strings
    }
    spelled = []
    for argument, following in zip(arguments, [*arguments, ""][1:], strict=True):
        if argument.startswith("--"):
            option, equals, value = argument.partition("=")
            argument = "--" + option[2:].replace("-", "_") + equals + value
        if argument in switches and following not in ("true", "false", "null"):
            argument += "=true"
        spelled.append(argument)
    return spelled


def _sentence(error: Exception, command: str) -> str:
    """What to tell a user: a fault of the program is named as one."""
    if is_expected(error):
        return in_words(error, command)
    return f"{in_words(error, command)} (a fault of the program; --debug shows where)"


def _overview() -> str:
    width = max(map(len, COMMANDS))
    return "\n".join(
        [
            "usage: unetrpp COMMAND ...",
            "",
            "3-D medical image segmentation with UNETR++ and its siblings: train on labelled NIfTI "
            "volumes, predict new ones.",
            "",
            *(f"  {name:<{width}}  {summary}" for name, (summary, _) in COMMANDS.items()),
            "",
            _EPILOG,
        ]
    )


def _version() -> str:
    from epa_kernels.version import __version__

    return f"unetrpp {__version__}"
