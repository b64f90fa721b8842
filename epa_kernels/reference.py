"""The reference: paired, spatial and channel attention in plain PyTorch.

Every other backend is tested against these functions. They take any floating dtype, are twice
differentiable, and export (torch.export, ONNX). Matrix products run in the dtype of the input;
norms and softmaxes run in float32 (float64 for float64 input), as under automatic mixed precision.

Axes: B batch, N tokens, C channels, H heads, D = C/H head dim, P projected tokens.
Source: Shaker et al., "UNETR++: Delving into efficient and accurate 3D medical image
segmentation", TMI 2024, and the three variants of its published code.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .contract import NORM_EPS, accumulate_dtype
from .layout import from_heads
from .rng import CHANNEL_MAP, SPATIAL_MAP, dropout_multiplier


def normalize_tokens(t: Tensor) -> Tensor:
    """t / max(|t|, 1e-12), the norm of each channel taken over the tokens; t (B, N, H, D)."""
    wide = t.to(accumulate_dtype(t.dtype))
    return F.normalize(wide, dim=1, eps=NORM_EPS).to(t.dtype)


def _softmax(logits: Tensor, temperature: Tensor) -> Tensor:
    """softmax(temperature * logits) over the last axis, in the accumulation dtype."""
    wide = logits.to(accumulate_dtype(logits.dtype))
    return torch.softmax(temperature.to(wide.dtype).view(-1, 1, 1) * wide, dim=-1)


def _dropout(weights: Tensor, p: float, seed: Tensor | None, map_index: int) -> Tensor:
    """dropout(weights) with the mask of `rng`; weights (B, H, rows, columns)."""
    if p == 0:
        return weights
    assert seed is not None
    rows = torch.arange(weights[..., 0].numel(), device=weights.device)
    return weights * dropout_multiplier(
        seed, rows.view(weights.shape[:-1]), weights.shape[-1], p, map_index, weights.dtype
    )


def channel_map(q: Tensor, k: Tensor, temperature: Tensor) -> Tensor:
    """The map A of `channel_attention` before dropout, (B, H, D, D) in the accumulation dtype."""
    gram = torch.einsum("bnhi,bnhj->bhij", normalize_tokens(q), normalize_tokens(k))
    return _softmax(gram, temperature)


def spatial_map(q: Tensor, k_proj: Tensor, temperature: Tensor, *, normalize: bool) -> Tensor:
    """The map S of `spatial_attention` before dropout, (B, H, N, P) in the accumulation dtype."""
    if normalize:
        q = normalize_tokens(q)
    return _softmax(torch.einsum("bnhd,bphd->bhnp", q, k_proj), temperature)


def mix_channels(attention: Tensor, v: Tensor) -> Tensor:
    """out[n,i] = sum_j A[i,j] v[n,j]; attention (B, H, D, D), v (B, N, H, D)."""
    return torch.einsum("bhij,bnhj->bnhi", attention, v)


def mix_tokens(attention: Tensor, v_proj: Tensor) -> Tensor:
    """out[n] = sum_p S[n,p] v_proj[p]; attention (B, H, N, P), v_proj (B, P, H, D)."""
    return torch.einsum("bhnp,bphd->bnhd", attention, v_proj)


def channel_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    temperature: Tensor,
    *,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """Channels attend to channels.

        out[n,i] = sum_j A[i,j] v[n,j],   A = dropout(softmax_j(temperature <q^_i, k^_j>))
        q^ = q / max(|q|, 1e-12), k^ likewise; norms and <.,.> over the N tokens, per head

    Args:
        q, k, v (B, N, H, D): same dtype and device.
        temperature (H) or (1): any shape with so many elements.
        dropout_p: probability of dropping an element of A, 0 <= dropout_p < 1, default 0.
        seed (): int64; the mask is the one of `rng`, map CHANNEL_MAP. Needed if dropout_p > 0.

    Returns:
        out (B, N, H, D), dtype of q.
    """
    attention = _dropout(channel_map(q, k, temperature), dropout_p, seed, CHANNEL_MAP)
    return mix_channels(attention.to(q.dtype), v)


def spatial_attention(
    q: Tensor,
    k_proj: Tensor,
    v_proj: Tensor,
    temperature: Tensor,
    *,
    normalize: bool = False,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """N tokens attend to P projected ones.

        out[n] = sum_p S[n,p] v_proj[p],   S = dropout(softmax_p(temperature q^_n . k_proj_p))
        q^ = q / max(|q|, 1e-12), the norm of each channel over the tokens, if normalize; else q

    Args:
        q (B, N, H, D); k_proj, v_proj (B, P, H, D): same dtype and device.
        temperature (H) or (1): any shape with so many elements.
        normalize: L2-normalise q over its tokens first, default False.
        dropout_p: probability of dropping an element of S, 0 <= dropout_p < 1, default 0.
        seed (): int64; the mask is the one of `rng`, map SPATIAL_MAP. Needed if dropout_p > 0.

    Returns:
        out (B, N, H, D), dtype of q.
    """
    attention = spatial_map(q, k_proj, temperature, normalize=normalize)
    attention = _dropout(attention, dropout_p, seed, SPATIAL_MAP)
    return mix_tokens(attention.to(q.dtype), v_proj)


def paired_attention(
    x: Tensor,
    qkvv_weight: Tensor,
    qkvv_bias: Tensor | None,
    proj_k_weight: Tensor,
    proj_k_bias: Tensor | None,
    proj_v_weight: Tensor | None,
    proj_v_bias: Tensor | None,
    temperature: Tensor,
    temperature2: Tensor,
    out_proj_weight: Tensor | None,
    out_proj_bias: Tensor | None,
    out_proj2_weight: Tensor | None,
    out_proj2_bias: Tensor | None,
    *,
    num_heads: int,
    kind: str = "shared",
    layout: str = "official",
    channel_dropout_p: float = 0.0,
    spatial_dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """Efficient paired attention, the whole layer; arguments as in `epa_kernels.paired_attention`.

        q, k, vc, vs = heads of x qkvv_weight^T + qkvv_bias                       each (B, N, H, D)
        k_proj = E k + e,  v_proj = F vs + f      E, F (P, N) = proj_k_weight, proj_v_weight (F = E
                                                  if proj_v_weight is None); e, f one value per p
        out_c = channel_attention(q, k, vc, temperature)
        out_s = spatial_attention(q, k_proj, v_proj, temperature2, normalize=True)
        y = concat(out_s' out_proj_weight^T + out_proj_bias,
                   out_c out_proj2_weight^T + out_proj2_bias)      kind "sum":  y = out_c + out_s'

    out_s' is out_s in `layout` ("official" or "tokens", see `layout`).

    Returns:
        y (B, N, C), dtype of x.
    """
    B, N, C = x.shape

    def cast(weight):
        return None if weight is None else weight.to(x.dtype)

    def project(weight, bias, t):
        t_proj = torch.einsum("pn,bnhd->bphd", cast(weight), t)
        return t_proj if bias is None else t_proj + cast(bias).view(-1, 1, 1)

    qkvv = F.linear(x, cast(qkvv_weight), cast(qkvv_bias))
    q, k, vc, vs = qkvv.view(B, N, 4, num_heads, C // num_heads).unbind(2)
    k_proj = project(proj_k_weight, proj_k_bias, k)
    if proj_v_weight is None:
        v_proj = project(proj_k_weight, proj_k_bias, vs)
    else:
        v_proj = project(proj_v_weight, proj_v_bias, vs)

    out_c = channel_attention(q, k, vc, temperature, dropout_p=channel_dropout_p, seed=seed)
    out_s = spatial_attention(
        q, k_proj, v_proj, temperature2, normalize=True, dropout_p=spatial_dropout_p, seed=seed
    )
    out_c, out_s = out_c.reshape(B, N, C), from_heads(out_s, layout)
    if kind == "sum":
        return out_c + out_s
    y_s = F.linear(out_s, cast(out_proj_weight), cast(out_proj_bias))
    y_c = F.linear(out_c, cast(out_proj2_weight), cast(out_proj2_bias))
    return torch.cat((y_s, y_c), dim=-1)
