"""How the spatial branch's result is stored: the layouts of paired_attention."""

from torch import Tensor


def heads_view(tokens: Tensor, num_heads: int, layout: str) -> Tensor:
    """The spatial branch's result, stored as (B, N, C), seen as (B, N, H, D) without a copy.

    "tokens" stores head after head: channel h*D + d of token n. "official" is what the published
    code stores and checkpoints expect: the flat order (d, h, n), so that element
    f = (d*H + h)*N + n lies at row f // C, column f % C; C need not divide N.
    """
    B, N, C = tokens.shape
    if layout == "official":
        return tokens.view(B, C // num_heads, num_heads, N).permute(0, 3, 2, 1)
    return tokens.view(B, N, num_heads, C // num_heads)


def from_heads(out: Tensor, layout: str) -> Tensor:
    """Inverse of `heads_view`: (B, N, H, D) -> (B, N, C) in the order of `layout`."""
    B, N, H, D = out.shape
    if layout == "official":
        out = out.permute(0, 3, 2, 1)
    return out.reshape(B, N, H * D)
