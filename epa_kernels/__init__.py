"""Fused kernels for efficient paired attention (EPA), the block of UNETR++."""

from .dispatch import explain, use_backend
from .functional import channel_attention, paired_attention, spatial_attention
from .modules import EPA, EfficientPairedAttention
from .patch import patch_model
from .version import __version__

__all__ = [
    "EPA",
    "EfficientPairedAttention",
    "__version__",
    "channel_attention",
    "explain",
    "paired_attention",
    "patch_model",
    "spatial_attention",
    "use_backend",
]
