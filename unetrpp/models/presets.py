"""Named settings of the networks: the published variants, and tiny ones for tests and first steps.

Each preset holds the constructor arguments of its network that differ from the defaults. The sizes
are those the published code was trained or described with. `out_channels` counts the background of
UNETR++'s and of `tiny`; of the others it counts published regions, which overlap and have none.

unetrpp
    synapse   Synapse multi-organ CT, 14 classes; 42,952,850 parameters
    btcv      the same network: BTCV was trained with the Synapse model on other splits
    acdc      ACDC cardiac MR, E and F separate, two convolution blocks; 66,796,404 parameters
    lung      Decathlon lung CT, as acdc; 121,174,798 parameters
    tumor     BraTS, four MR sequences in, branches added; 42,647,604 parameters
segformer3d
    brats     BraTS, four MR sequences in, three regions out; 4,525,251 parameters
slim_unetr
    brats     BraTS, four MR sequences in, three regions out; 1,783,425 parameters
    hepatic   Decathlon hepatic vessels and tumours, two regions out; 1,773,726 parameters
slim_unetrpp
    brats     the reconstruction at the size of slim_unetr's; 3,407,899 parameters
every network
    tiny      no published counterpart: runs in a second on one CPU core
"""

from typing import Any

__all__ = ["PRESETS"]

_DEEPER = ((2, 2, 2), (2, 2, 2), (2, 2, 2))

_SYNAPSE = {
    "in_channels": 1,
    "out_channels": 14,
    "img_size": (64, 128, 128),
    "strides": ((2, 4, 4), *_DEEPER),
    "attention_dropout": 0.15,
}

_UNETRPP: dict[str, dict[str, Any]] = {
    "synapse": _SYNAPSE,
    "btcv": _SYNAPSE,
    "acdc": {
        "in_channels": 1,
        "out_channels": 4,
        "img_size": (16, 160, 160),
        "strides": ((1, 4, 4), *_DEEPER),
        "epa_kind": "split",
        "res_blocks": 2,
    },
    "lung": {
        "in_channels": 1,
        "out_channels": 2,
        "img_size": (32, 192, 192),
        "strides": ((1, 4, 4), *_DEEPER),
        "epa_kind": "split",
        "res_blocks": 2,
    },
    "tumor": {
        "in_channels": 4,
        "out_channels": 4,
        "img_size": (128, 128, 128),
        "strides": ((4, 4, 4), *_DEEPER),
        "epa_kind": "sum",
    },
    "tiny": {
        "in_channels": 1,
        "out_channels": 2,
        "img_size": (32, 32, 32),
        "strides": ((2, 2, 2), *_DEEPER),
        "feature_size": 8,
        "dims": (8, 16, 32, 64),
        "depths": (1, 1, 1, 1),
        "decoder_depths": (1, 1, 1),
        "num_heads": 2,
        "proj_sizes": (16, 16, 16, 8),
        "decoder_proj_sizes": (16, 16, 16),
    },
}

_SEGFORMER3D: dict[str, dict[str, Any]] = {
    "brats": {"in_channels": 4, "out_channels": 3, "img_size": (128, 128, 128)},
    "tiny": {
        "in_channels": 1,
        "out_channels": 2,
        "img_size": (32, 32, 32),
        "strides": (2, 2, 2, 2),
        "dims": (8, 16, 24, 32),
        "depths": (1, 1, 1, 1),
        "num_heads": (1, 2, 3, 4),
        "decoder_dim": 32,
    },
}

_SLIM_UNETR: dict[str, dict[str, Any]] = {
    "brats": {"in_channels": 4, "out_channels": 3, "img_size": (128, 128, 128)},
    "hepatic": {"in_channels": 1, "out_channels": 2, "img_size": (96, 96, 96)},
    "tiny": {
        "in_channels": 1,
        "out_channels": 2,
        "img_size": (32, 32, 32),
        "strides": (2, 2, 2, 2),
        "dims": (8, 12, 16, 24),
        "depths": (1, 1, 1, 1),
        "num_heads": (1, 2, 2, 4),
    },
}

_SLIM_UNETRPP: dict[str, dict[str, Any]] = {
    "brats": _SLIM_UNETR["brats"],
    "tiny": {**_SLIM_UNETR["tiny"], "kernel_size": 3, "proj_size": 16, "epa_proj_size": 8},
}

PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "unetrpp": _UNETRPP,
    "segformer3d": _SEGFORMER3D,
    "slim_unetr": _SLIM_UNETR,
    "slim_unetrpp": _SLIM_UNETRPP,
}
