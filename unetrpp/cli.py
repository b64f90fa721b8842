"""The command `unetrpp`: train, predict, evaluate, report, info, demo.

Every option is a field or argument of the typed function behind its command, with the help text
taken from there; options can also come from a YAML file (--config) and be printed as one
(--print_config). Only the module of the chosen command is imported.

Exit codes: 0 done; 1 an error, explained in a sentence on stderr; 2 wrong usage; 128 + n stopped
by signal n. --debug, or UNETRPP_DEBUG=1, shows the traceback as well.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from unetrpp import _is_of_an_extra, _remedy

__all__ = ["info", "main"]

_EPILOG = "Options of a command: unetrpp COMMAND --help"


def _train(parser) -> Callable[[dict], int]:
    from unetrpp.models import MODELS, model_label
    from unetrpp.train import TrainConfig, run_train

    parser.add_argument("-o", "--output", type=Path | None, help="New folder for the run.")
    parser.add_argument(
        "--model",
        type=Literal[tuple(MODELS)],  # type: ignore[valid-type]
        default=TrainConfig.model,
        help=f"Network: {', '.join(map(model_label, MODELS))}.",
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
        result = run_train(TrainConfig(**options))
        if not result["is_main"]:
            return 0
        print(
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
        if options["throughput"]:
            from unetrpp.throughput import throughput_table

            for line in throughput_table(_presets(options["model"])):
                print(line, flush=True)
        else:
            print(info(options["model"]))
        return 0

    return run


COMMANDS = {
    "train": ("Train on a folder of labelled volumes.", _train),
    "predict": ("Write label maps of volumes with a trained checkpoint.", _predict),
    "evaluate": ("Score label maps against references: Dice, HD95.", _evaluate),
    "report": ("Write a run's HTML report: curves, scores, pictures.", _report),
    "info": ("Describe a checkpoint or preset: size, FLOPs, tokens, backends.", _info),
    "demo": ("Train, predict and report on an embedded brain template; no download.", _demo),
}


def _presets(name: str | None) -> list[str]:
    """The preset of this name, all if there is none."""
    from unetrpp.models import find_preset, preset_label, preset_names

    if name is None:
        return list(preset_names())
    preset = find_preset(name)
    if preset is None:
        listed = ", ".join(map(preset_label, preset_names()))
        raise ValueError(f"{name!r} is no preset; throughput is measured of {listed}")
    return [preset]


def info(model: str | None) -> str:
    """Describe a checkpoint folder or a preset: parameters, FLOPs, tokens, sizes, labels, backends.

    Raises:
        ValueError: model is neither a folder with a checkpoint nor the name of a preset.
    """
    import contextlib
    import io

    import torch

    import epa_kernels
    from unetrpp.models import (
        RECONSTRUCTION,
        create_model,
        find_preset,
        preset_label,
        preset_names,
    )
    from unetrpp.models.network import size_multiples
    from unetrpp.throughput import multiply_adds

    lines, preprocessing, presets = [], None, preset_names()
    preset = find_preset(model)
    if preset is not None:
        network = create_model(*presets[preset])
        lines.append(f"preset {preset_label(preset)}")
    elif model is not None and Path(model).is_dir():
        from unetrpp.checkpoint import load_checkpoint

        network, config = load_checkpoint(Path(model))
        preprocessing = config.get("preprocessing")
        lines.append(f"checkpoint {model}")
        if "val_dice" in config:
            lines.append(f"  validation Dice  {config['val_dice']:.4f} after step {config['step']}")
    else:
        raise ValueError(
            f"{model!r} is neither a checkpoint folder nor a preset "
            f"({', '.join(map(preset_label, presets))})"
        )
    settings = network.config["args"]
    lines.append(f"  network          {type(network).__name__} ({network.name})")
    if network.is_reconstruction:
        lines.append(f"                   {RECONSTRUCTION}")
    giga = multiply_adds(network) / 1e9
    multiples = size_multiples(network.strides)
    tokens = [f"{grid[0] * grid[1] * grid[2]} ({_by(grid)})" for grid in network.grids]
    any_size = " and any other size" if network.takes_any_size else ""
    lines += [
        f"  parameters       {sum(p.numel() for p in network.parameters()):,}",
        f"  FLOPs            {2 * giga:.2f} G = {giga:.2f} G multiply-adds for one input (torch"
        ".utils.flop_counter: 2 per multiply-add; convolutions and matrix products)",
        f"  input            {settings['in_channels']} x {_by(network.img_size)} voxels (superior, "
        f"posterior, left){any_size}; each axis a multiple of {_by(multiples)}",
        f"  strides          {' '.join(_by(stride) for stride in network.strides)}",
        f"  tokens per stage {', '.join(tokens)}",
        f"  output channels  {settings['out_channels']}",
    ]
    if preprocessing:
        spacing = preprocessing["spacing"]
        lines += [
            f"  labels           {preprocessing['labels']}",
            "  channels         "
            + ", ".join(
                f"{name} ({kind})"
                for name, kind in zip(
                    preprocessing["channels"], preprocessing["normalization"], strict=True
                )
            ),
            f"  spacing          {_by(spacing) + ' mm' if spacing else 'as it is in the file'}",
        ]
    table = io.StringIO()
    with contextlib.redirect_stdout(table):
        for op, shape in network.attention_inputs.items():
            epa_kernels.explain(op, torch.zeros(shape))
    lines += [
        "backends, where the network first runs an op:",
        *("  " + line for line in table.getvalue().splitlines()),
    ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (sys.argv if not given); returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
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
        return _run(name, arguments[1:])
    except BrokenPipeError:
        return 1
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if debug:
            raise
        if isinstance(error, ModuleNotFoundError) and _is_of_an_extra(error):
            print(f"unetrpp: {_remedy(error, f'unetrpp {name}')}", file=sys.stderr)
            return 1
        print(f"unetrpp {name}: {_sentence(error)}", file=sys.stderr)
        return getattr(error, "exit_code", 1)


def _run(name: str, arguments: list[str]) -> int:
    from jsonargparse import ArgumentParser

    summary, build = COMMANDS[name]
    parser = ArgumentParser(prog=f"unetrpp {name}", description=summary)
    parser.add_argument("--config", action="config", help="YAML file with options.")
    run = build(parser)
    options = parser.parse_args(_spell_out(arguments, parser)).as_dict()
    del options["config"]
    return run(options)


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


def _sentence(error: Exception) -> str:
    """What to tell a user: the message alone where it was written for one."""
    from_us = isinstance(error, (ValueError, OSError, RuntimeError, ImportError))
    if from_us or hasattr(error, "exit_code"):
        return str(error)
    return f"{type(error).__name__}: {error} (a fault of the program; --debug shows where)"


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


def _by(values: Sequence) -> str:
    return "x".join(f"{value:g}" for value in values)
