"""Named settings of UNETR++: the published variants, and a tiny one for tests and first steps.

Each preset holds the constructor arguments of `UNETRPP` that differ from the defaults. The sizes
are those the published code was trained with; `out_channels` counts the background.

    synapse   Synapse multi-organ CT, 14 classes; 42,952,850 parameters
    btcv      the same network: BTCV was trained with the Synapse model on other splits
    acdc      ACDC cardiac MR, E and F separate, two convolution blocks; 66,796,404 parameters
    lung      Decathlon lung CT, as acdc; 121,174,798 parameters
    tumor     BraTS, four MR sequences in, branches added; 42,647,604 parameters
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

PRESETS: dict[str, dict[str, Any]] = {
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
