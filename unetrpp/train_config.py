"""The options of a training run, what the recipes decide, and how a run's options are kept."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch

from unetrpp.losses import Loss
from unetrpp.models import MODELS, find_model
from unetrpp.options import checked, choice, refusal
from unetrpp.run_folder import CONFIG, read_config
from unetrpp.usage import wrong_usage

__all__ = [
    "SHORT",
    "ResolvedConfig",
    "TrainConfig",
    "fixed_options",
    "is_decayed",
    "resolved",
    "resumed",
]

Augmentation = Literal["full", "light", "slim_unetr", "segformer3d", "none"]


@dataclass
class TrainConfig:
    """Train a network on a folder of labelled volumes.

    Args:
        data: Folder with dataset.json, imagesTr and labelsTr (Decathlon or nnU-Net layout).
        output: New folder for the run: checkpoints, curves, report.
        resume: Run folder to continue where it stopped; all settings come from there.
        overwrite: Empty the output folder first if it holds an earlier run.
        model: Network, unetrpp if not given; or the full name of a preset.
        recipe: short: AdamW, cosine, for minutes to hours. published: the network's own, for days,
            except for the patch size, which no recipe decides.
        steps: Number of optimizer steps.
        minutes: Instead of steps: time budget of the run; becomes steps once a step is timed.
        patch_size: Network input, voxels along superior, posterior, left; proposed from the data
            if not given, with any recipe.
        strides: Stem stride and three more, e.g. [[2,2,2],[2,2,2],[2,2,2],[2,2,2]].
        spacing: Voxel size in mm to resample to, same order; [0,0,0] for no resampling.
        preset: Widths, one of the presets of the network; its full name also says the network.
        model_args: Further arguments of the network, e.g. {"dims": [16,32,64,128]}.
        batch_size: Patches per step and process.
        loss: dice_ce, dice or dice_focal; the last two take a sigmoid per class.
        optimizer: adamw or sgd.
        betas: Decay of AdamW's two averages, e.g. [0.9,0.999].
        schedule: Learning rate: cosine, restarts (cosine, twice) or poly.
        warm_up: Steps of linear warm-up, at most a tenth of the run.
        learning_rate: Peak learning rate (short: 0.003).
        weight_decay: Weight decay (short: 0.01); of biases and norms only where published so.
        augmentation: full (UNETR++), light (short), slim_unetr, segformer3d or none.
        mirror: Flip patches at random along all axes (short: no).
        foreground: Share of a batch that is centred on a labelled voxel.
        ema: Decay of the averaged weights that are validated and saved; 0 for none.
        fold: Which of the folds is held out for validation.
        folds: Number of folds.
        validate_every: Steps between validations; a tenth of the run, at most 5000.
        save_minutes: Minutes between savings of resume.pt; each validation saves it too.
        seed: Seed of weights, samples, augmentation and dropout.
        accelerator: cpu, cuda, mps, or auto for the best there is.
        devices: Number of processes, one device each.
        precision: 32-true, bf16-mixed (CUDA only), or auto: bf16-mixed where possible.
        workers: Loader processes; 0 prepares patches between steps; auto if not given.
        cache: Number of cases kept in memory, preprocessed; all if not given.
        report: Write report.html at the end.
        check_affine: Refuse a channel or label that lies elsewhere than its image; if not given,
            it is used voxel by voxel, with a warning that says how many mm.
    """

    data: Path | None = None
    output: Path | None = None
    resume: Path | None = None
    overwrite: bool = False
    model: str | None = None
    recipe: Literal["short", "published"] = "short"
    steps: int | None = None
    minutes: float | None = None
    patch_size: list[int] | None = None
    strides: list[list[int]] | None = None
    spacing: list[float] | None = None
    preset: str | None = None
    model_args: dict[str, Any] = field(default_factory=dict)
    batch_size: int | None = None
    loss: Loss | None = None
    optimizer: Literal["adamw", "sgd"] | None = None
    betas: list[float] | None = None
    schedule: Literal["cosine", "restarts", "poly"] | None = None
    warm_up: int | None = None
    learning_rate: float | None = None
    weight_decay: float | None = None
    augmentation: Augmentation | None = None
    mirror: bool | None = None
    foreground: float = 0.33
    ema: float | None = None
    fold: int = 0
    folds: int = 5
    validate_every: int | None = None
    save_minutes: float = 5.0
    seed: int = 1
    accelerator: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    devices: int = 1
    precision: Literal["auto", "32-true", "bf16-mixed"] = "auto"
    workers: int | None = None
    cache: int | None = None
    report: bool = True
    check_affine: bool = False


class ResolvedConfig(TrainConfig):
    """A `TrainConfig` in which the recipe and the machine have decided what the user did not."""

    data: Path
    output: Path
    model: str
    loss: Loss
    optimizer: Literal["adamw", "sgd"]
    schedule: Literal["cosine", "restarts", "poly"]
    learning_rate: float
    weight_decay: float
    augmentation: Augmentation
    ema: float
    precision: Literal["32-true", "bf16-mixed"]


# What the short recipe decides where the user did not; the published one is the network's `recipe`.
SHORT = {
    "loss": "dice_ce",
    "optimizer": "adamw",
    "betas": [0.9, 0.999],
    "schedule": "cosine",
    "warm_up": 50,
    "learning_rate": 3e-3,
    "weight_decay": 0.01,
    "augmentation": "light",
    "mirror": False,
    "ema": 0.99,
    "minutes": 25.0,
}
# What has no effect under which choice: option, the setting that decides, its value.
IDLE = (
    ("betas", "optimizer", "sgd"),
    ("warm_up", "schedule", "poly"),
    ("mirror", "augmentation", "none"),
)
_DEFAULTS = vars(TrainConfig())
# These change where and how fast a run goes on, not what it computes.
RESUMABLE = ("data", "accelerator", "workers", "cache", "save_minutes", "report")


def resolved(config: TrainConfig) -> ResolvedConfig:
    """Fill in what the recipe and the machine decide where the user did not.

    Raises:
        ValueError: no data or output folder, a value out of its option's range, both steps and
            minutes, an option without effect, or a device that is not there.
    """
    config = _checked(config)
    if config.data is None or config.output is None:
        raise ValueError("train needs --data DIR and --output RUN (or --resume RUN)")
    if config.output.exists() and not config.output.is_dir():
        raise ValueError(f"--output {config.output} is a file; name a new folder for the run")
    if config.output.resolve() == config.data.resolve():
        raise ValueError(
            f"--data and --output are both {config.data}; name a new folder for the run"
        )
    model, preset = find_model(config.model, config.preset, "--model")
    if config.minutes is not None and config.steps is not None:
        raise ValueError("train takes --steps or --minutes, not both")
    recipe = dict(SHORT if config.recipe == "short" else MODELS[model].recipe)
    if config.minutes is not None or config.steps is not None:
        recipe.pop("steps", None)
        recipe.pop("minutes", None)
    chosen = {key: value for key, value in recipe.items() if getattr(config, key) is None}
    for option, setting, value in IDLE:
        if chosen.get(setting, getattr(config, setting)) != value:
            continue
        if getattr(config, option):
            raise ValueError(
                f"--{option} has no effect with {setting} {value}, got {getattr(config, option)}; "
                f"leave it out, or choose another --{setting}"
            )
        chosen.pop(option, None)
    if config.precision == "auto":
        chosen["precision"] = "bf16-mixed" if _on_gpu(config) else "32-true"
    _check_precision(config, "use --precision 32-true")
    chosen["model"], chosen["preset"] = model, preset
    # Absolute, because a run may be resumed from another folder.
    _check_machine(config)
    chosen["data"] = config.data.absolute()
    return ResolvedConfig(**{**vars(config), **chosen})


def is_decayed(config: ResolvedConfig, name: str, parameter: torch.nn.Parameter) -> bool:
    """Whether weight decay acts on a parameter of this name.

    The published recipe decays what its network says; short leaves out biases, norms, temperatures.
    """
    if config.recipe == "published":
        return MODELS[config.model].is_decayed(name, parameter)
    # Decay pulls a norm's scale or a temperature (H, 1, 1) to zero, where it means nothing.
    return parameter.ndim > 1 and "temperature" not in name


def _checked(config: TrainConfig, prefix: str = "--") -> TrainConfig:
    """The options as plain Python values, or an error that names the first that is out of range."""
    given = vars(config)
    values = {k: v for k, v in given.items() if v is not None or _DEFAULTS[k] is not None}
    for name, hint in get_type_hints(TrainConfig).items():
        words = next((h for h in (hint, *get_args(hint)) if get_origin(h) is Literal), None)
        if words is None or name not in values or values[name] in get_args(words):
            continue
        raise ValueError(refusal(prefix + name, choice(words), values[name]))
    config = TrainConfig(**{**given, **checked(prefix, values)})
    if config.fold >= config.folds:
        raise ValueError(
            f"{prefix}fold must lie in 0..{config.folds - 1}, since {prefix}folds is "
            f"{config.folds}, got {config.fold}; 0 is the first fold"
        )
    return config


def _check_machine(config: TrainConfig) -> None:
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not there.get(config.accelerator, True):
        raise ValueError(
            f"--accelerator {config.accelerator} needs such a device, and torch {torch.__version__}"
            " finds none here; use --accelerator auto or cpu"
        )
    count = torch.cuda.device_count()
    if _on_gpu(config) and config.devices > count:
        raise ValueError(
            f"--devices must be at most {count}, the GPUs that torch finds here, got "
            f"{config.devices}; fewer devices, or --accelerator cpu"
        )


def _on_gpu(config: TrainConfig) -> bool:
    return config.accelerator in ("auto", "cuda") and torch.cuda.is_available()


def _check_precision(config: TrainConfig, remedy: str) -> None:
    if config.precision == "bf16-mixed" and not _on_gpu(config):
        # torch 2.13 with AMX, channels 8 -> 4 at 8x128x128: NaN, or a segmentation fault.
        raise ValueError(
            "precision bf16-mixed needs a CUDA device: on CPUs the weight gradient of a 1x1x1 "
            f"convolution is wrong in bfloat16 for some sizes (oneDNN); {remedy}"
        )


def _check_stored(file: Path, stored: dict[str, Any]) -> None:
    """Refuse options that this version does not know, that lack, or that have another type."""
    from jsonargparse import ArgumentError, ArgumentParser

    known = {option.name for option in fields(TrainConfig)}
    if unknown := sorted(stored.keys() - known):
        raise ValueError(
            f"{file}: this version has no option {', '.join(unknown)}; a newer version wrote the "
            "file, or a hand: resume with that version, or remove what is not known"
        )
    missing = [name for name in ResolvedConfig.__annotations__ if stored.get(name) is None]
    missing = [name for name in missing if name != "output"]
    if stored.get("steps") is None and stored.get("minutes") is None:
        missing.append("steps or minutes")
    if stored.get("precision") == "auto":  # which a run resolves before it writes
        missing.append("precision")
    if missing:
        raise ValueError(f"{file} lacks {', '.join(missing)}; restore it from a copy")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(TrainConfig)
    try:
        parser.parse_object(stored)
        find_model(stored["model"], stored.get("preset"), "--model")
        _checked(TrainConfig(**stored))
    except (ArgumentError, TypeError, ValueError) as error:
        reason = wrong_usage(error, get_type_hints(TrainConfig))
        raise ValueError(f"{file}: {reason}; restore it from a copy") from error


def fixed_options(config: TrainConfig) -> dict[str, Any]:
    """Return the options that no resume may change, as plain values."""
    free = {*RESUMABLE, "output", "resume", "overwrite"}
    return {name: value for name, value in asdict(config).items() if name not in free}


def resumed(config: TrainConfig) -> ResolvedConfig:
    """The configuration of the run folder `config.resume`, with what may change from the caller.

    Raises:
        FileNotFoundError: no run there. ValueError: its config.yaml is damaged or of a newer
        version, another setting than may change, another output folder, or bf16 without a GPU.
    """
    config = _checked(config)
    folder = Path(config.resume or "")
    stored = read_config(folder)
    if not stored:
        raise FileNotFoundError(
            f"{folder} holds no run to resume: {folder}/config.yaml is missing; name the folder "
            "that unetrpp train wrote"
        )
    _check_stored(folder / CONFIG, stored)
    if config.output is not None and Path(config.output).resolve() != folder.resolve():
        raise ValueError(
            f"--resume {folder} goes on in that folder, so it takes no other --output, got "
            f"{config.output}; leave it out, or copy the run there and resume the copy"
        )
    default = asdict(TrainConfig())
    given = {
        key: value
        for key, value in asdict(config).items()
        if value != default[key] and key not in ("resume", "output")
    }
    fixed = [k for k in given if k not in RESUMABLE and given[k] != stored.get(k)]
    if fixed:
        raise ValueError(
            f"--resume continues with the settings of {folder}/config.yaml; {', '.join(fixed)} "
            f"cannot change (what can: {', '.join(RESUMABLE)}); start a new run for that"
        )
    given = {key: value for key, value in given.items() if key in RESUMABLE}
    values = {**stored, **given, "output": folder, "resume": folder}
    values["data"] = Path(values["data"]).absolute()
    run = ResolvedConfig(**values)
    _check_machine(run)
    _check_precision(run, f"the run in {folder} was started with it, so resume it on a GPU")
    return run
