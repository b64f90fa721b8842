"""Paired, spatial and channel attention, forward and hand-written backward, in plain PyTorch.

The math is that of `reference`; this is the form that every kernel computes, on any device. q, k,
vc and vs are linear in x, so a sum over tokens is taken over x itself, once:

    summary  mu = mean_n x (B,C),  M = sum_n (x-mu)(x-mu)^T (B,C,C),  Z = E x (B,J,P,C)
             J = 1, or 2 where values have a projection of their own
    mix      |q|, |k|, A, keys = k_proj * temperature2 / |q|, v_proj, and the whole channel branch
             as one matrix a sample; nothing here depends on N
    output   S = softmax(q keys^T), out_s = S v_proj, and y, from x directly

Exact. Backward runs the same two passes from x, mu, M, Z and the seed. M is centred, tile by tile
(Chan's formula), since x^T x squares the condition number and the norms of nearly constant tokens
would cancel. Tokens go through in tiles: nothing of size N x P or N x 4C exists. For few tokens
(`contract.plan`) the direct form, with q, k, vc and vs in memory, costs less.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..contract import NORM_EPS, OPS, accumulate_dtype, mean_dtype, plan
from ..layout import heads_view
from ..rng import CHANNEL_MAP, SPATIAL_MAP, dropout_multiplier
from .gradients import empty_gradient, temperature_gradient

PAIRED, SPATIAL, CHANNEL = OPS.values()

# Elements of a tile's (B, H, tile, P) map. On a CPU the few that live at once fit a second-level
# cache; on an accelerator the tile only bounds memory.
TILE_ELEMENTS = {"cpu": 2**19, "other": 2**24}


def _tiles(num_tokens: int, elements_per_token: int, device: torch.device) -> Iterator[slice]:
    budget = TILE_ELEMENTS.get(device.type, TILE_ELEMENTS["other"])
    size = max(64, budget // elements_per_token)
    for start in range(0, num_tokens, size):
        yield slice(start, min(start + size, num_tokens))


def _gradient(gradient: Tensor, target: Tensor) -> Tensor:
    """The gradient in dtype, shape and strides of its tensor."""
    return empty_gradient(target, target).copy_(gradient.view_as(target))


def _softmax_backward(softmax: Tensor, d: Tensor) -> Tensor:
    return softmax * (d - (d * softmax).sum(-1, keepdim=True))


class _ChannelMap:
    """A = dropout(softmax_j(temperature <q^_i, k^_j>)) from products and norms of q and k.

    dots (B,H,D,D) = <q_i, k_j>;  q_norm, k_norm (B,H,D);  temperature (H,1,1) or one element
    """

    def __init__(self, dots, q_norm, k_norm, temperature, p, seed):
        self.q_norm, self.k_norm = q_norm.clamp_min(NORM_EPS), k_norm.clamp_min(NORM_EPS)
        self.temperature = temperature.view(-1, 1, 1)
        self.norms = self.q_norm.unsqueeze(-1) * self.k_norm.unsqueeze(-2)
        self.cosine = dots / self.norms
        self.softmax = torch.softmax(self.temperature * self.cosine, dim=-1)
        self.multiplier = 1.0
        if p > 0:
            rows = torch.arange(self.softmax[..., 0].numel(), device=dots.device)
            self.multiplier = dropout_multiplier(
                seed, rows.view(dots.shape[:-1]), dots.shape[-1], p, CHANNEL_MAP, dots.dtype
            )
        self.attention = self.softmax * self.multiplier

    def backward(self, dattention):
        """-> ddots (B,H,D,D), d|q|/|q| and d|k|/|k| (B,H,D), dtemperature (H)."""
        dlogits = _softmax_backward(self.softmax, dattention * self.multiplier)
        dcosine = self.temperature * dlogits
        along = dcosine * self.cosine
        return (
            dcosine / self.norms,
            _per_norm(along.sum(-1), self.q_norm),
            _per_norm(along.sum(-2), self.k_norm),
            (dlogits * self.cosine).sum((0, 2, 3)),
        )


def _per_norm(along, norm):
    """d|q| / |q| where |q| d|q| = -along; a clamped norm passes no gradient."""
    return torch.where(norm > NORM_EPS, -along / norm.square(), 0)


class _SpatialMap:
    """S = dropout(softmax_p(q keys^T)), tile by tile; temperature and |q| are folded into keys.

    keys, values (B,H,P,D);  num_tokens: N of the whole map, which numbers the rows of the mask
    """

    def __init__(self, keys, values, num_tokens, p, seed):
        self.keys, self.values = keys, values
        self.num_tokens, self.p, self.seed = num_tokens, p, seed

    def _weights(self, q, tile):
        softmax = torch.softmax(q @ self.keys.mT, dim=-1)  # (B, H, tile, P)
        if self.p == 0:
            return softmax, 1.0
        B, H, P, _ = self.keys.shape
        heads = torch.arange(B * H, device=q.device).view(B, H, 1)
        rows = heads * self.num_tokens + torch.arange(tile.start, tile.stop, device=q.device)
        return softmax, dropout_multiplier(self.seed, rows, P, self.p, SPATIAL_MAP, q.dtype)

    def forward(self, q, tile):
        """q (B,H,tile,D) -> out (B,H,tile,D)."""
        softmax, multiplier = self._weights(q, tile)
        return (softmax * multiplier) @ self.values

    def backward(self, q, tile, dout):
        """-> out (B,H,tile,D), dlogits (B,H,tile,P), dvalues (B,H,P,D) of this tile."""
        softmax, multiplier = self._weights(q, tile)
        attention = softmax * multiplier
        dlogits = _softmax_backward(softmax, (dout @ self.values.mT) * multiplier)
        return attention @ self.values, dlogits, attention.mT @ dout


def _fold_temperature(k_proj, q_norm, temperature):
    """keys = k_proj * temperature / |q|; k_proj (B,H,P,D), q_norm (B,H,D) clamped."""
    return k_proj * (temperature.view(-1, 1, 1) / q_norm.unsqueeze(-2))


def _fold_temperature_backward(k_proj, q_norm, temperature, keys, dkeys):
    """-> dk_proj (B,H,P,D), d|q|/|q| (B,H,D), dtemperature (H)."""
    dtemperature = (dkeys * k_proj / q_norm.unsqueeze(-2)).sum((0, 2, 3))
    dq_norm = _per_norm((dkeys * keys).sum(-2), q_norm)
    return _fold_temperature(dkeys, q_norm, temperature), dq_norm, dtemperature


class _Layer:
    """The tensors and options of one call of paired_attention, in the accumulation dtype."""

    def __init__(self, inputs, seed, options):
        x, kind = inputs.x, options.kind
        self.B, self.N, self.C = x.shape
        self.H, self.P = options.num_heads, inputs.proj_k_weight.shape[0]
        self.D = self.C // self.H
        self.dtype = accumulate_dtype(x.dtype)
        self.x, self.seed, self.layout, self.kind = x, seed, options.layout, kind
        self.channel_dropout_p = options.channel_dropout_p
        self.spatial_dropout_p = options.spatial_dropout_p

        def cast(t):
            return None if t is None else t.to(self.dtype)

        self.weight = cast(inputs.qkvv_weight).view(4, self.H, self.D, self.C)
        if inputs.qkvv_bias is None:
            self.bias = self.weight.new_zeros((4, self.H, self.D))
        else:
            self.bias = cast(inputs.qkvv_bias).view(4, self.H, self.D)
        # Projections stay in their own dtype, tile by tile: they can be as large as x.
        self.projections, biases = (inputs.proj_k_weight,), (inputs.proj_k_bias,) * 2
        if kind == "split":
            self.projections += (inputs.proj_v_weight,)
            biases = inputs.proj_k_bias, inputs.proj_v_bias
        self.projection_biases = [None if e is None else cast(e).view(-1, 1) for e in biases]
        self.temperature = cast(inputs.temperature)
        self.temperature2 = cast(inputs.temperature2)
        self.out_proj_weight, self.out_proj_bias = map(
            cast, (inputs.out_proj_weight, inputs.out_proj_bias)
        )
        self.out_proj2_weight, self.out_proj2_bias = map(
            cast, (inputs.out_proj2_weight, inputs.out_proj2_bias)
        )

    def tiles(self):
        return _tiles(self.N, self.B * max(self.H * self.P, self.C), self.x.device)

    def tokens(self, tile):
        return self.x[:, tile].to(self.dtype)  # (B, tile, C)

    def heads(self, t):
        return t.unflatten(-1, (-1, self.D)).transpose(1, 2)  # (B, n, H*D) -> (B, H, n, D)

    def linear(self, t, parts):
        """Heads of t W^T + bias; parts is a slice of (q, k, vc, vs); t (B,n,C) -> (B,H',n,D)."""
        weight, bias = self.weight[parts].flatten(0, -2), self.bias[parts].flatten()
        return self.heads(F.linear(t, weight, bias))

    def spatial_map(self, keys, values):
        return _SpatialMap(keys, values, self.N, self.spatial_dropout_p, self.seed)

    def channel_map(self, dots, q_norm, k_norm):
        return _ChannelMap(
            dots, q_norm, k_norm, self.temperature, self.channel_dropout_p, self.seed
        )

    def spatial_buffer(self):
        """Room for out_s as (B,N,C) in the layer's layout, and the same memory as (B,H,N,D)."""
        buffer = torch.empty(self.B, self.N, self.C, dtype=self.dtype, device=self.x.device)
        return buffer, heads_view(buffer, self.H, self.layout).transpose(1, 2)

    def join(self, out_s, y_c):
        """y from out_s' (B,N,C) and the channel branch's part of y."""
        if self.kind == "sum":
            return (out_s + y_c).to(self.x.dtype)
        y_s = F.linear(out_s, self.out_proj_weight, self.out_proj_bias)
        return torch.cat((y_s, y_c), dim=-1).to(self.x.dtype)

    def split(self, dy):
        """dy -> dy_s, dy_c and dout_s as (B,H,N,D)."""
        dy_s = dy_c = dout = dy.to(self.dtype).contiguous()
        if self.kind != "sum":
            dy_s, dy_c = dy_s.chunk(2, dim=-1)
            dout = dy_s @ self.out_proj_weight
        return dy_s, dy_c, heads_view(dout, self.H, self.layout).transpose(1, 2)


def _summary(layer):
    """First pass: mean (B,C), centred gram (B,C,C), projected (B,J,P,C)."""
    B, C = layer.B, layer.C
    mean = torch.zeros(B, 1, C, dtype=mean_dtype(layer.x.device), device=layer.x.device)
    gram = layer.weight.new_zeros((B, C, C))
    projected = layer.weight.new_zeros((B, len(layer.projections), layer.P, C))
    for tile in layer.tiles():
        x = layer.tokens(tile)
        # Differences to one token are exact where tokens are nearly constant.
        centred = x - x[:, :1]
        tile_offset = centred.mean(1, keepdim=True)
        centred -= tile_offset
        # Chan's formula: from the means of the tokens so far and of the tile to the joint one.
        share = (tile.stop - tile.start) / tile.stop
        delta = x[:, :1].to(mean.dtype) + tile_offset - mean
        mean += delta * share
        delta = delta.to(layer.dtype)
        gram += centred.mT @ centred + delta.mT @ delta * (share * tile.start)
        for j, projection in enumerate(layer.projections):
            projected[:, j] += projection[:, tile].to(layer.dtype) @ x
    return mean.squeeze(1), gram, projected


class _Mix:
    """Between the passes, forward: tiny, independent of N.

    The means of x, q and k are taken in float64: a channel of q whose mean is small beside its
    weights would lose its digits, and with them the direction that its norm divides out.
    """

    def __init__(self, layer, mean, gram, projected):
        N = layer.N
        (q_weight, k_weight, vc_weight, _), vc_bias = layer.weight, layer.bias[2]
        weight, bias = layer.weight[:2].to(mean.dtype), layer.bias[:2].to(mean.dtype)
        means = torch.einsum("khdc,bc->kbhd", weight, mean) + bias.unsqueeze(1)
        self.q_mean, self.k_mean = means.to(layer.dtype)  # (B, H, D)
        self.mean, self.projected = mean.to(layer.dtype).unsqueeze(1), projected
        # Wq M and Wk M, (B, H, D, C).
        self.q_gram, self.k_gram = (layer.weight[:2].unsqueeze(1) @ gram[:, None]).unbind()
        # Rounding may leave a vanishing square just below zero.
        q_square = (self.q_gram * q_weight).sum(-1).clamp_min(0) + N * self.q_mean.square()
        k_square = (self.k_gram * k_weight).sum(-1).clamp_min(0) + N * self.k_mean.square()
        dots = self.q_gram @ k_weight.mT + N * self.q_mean.unsqueeze(-1) * self.k_mean.unsqueeze(-2)
        self.channel = layer.channel_map(dots, q_square.sqrt(), k_square.sqrt())

        # sum_n E[p,n] (W x_n + b) = W Z_p + b sum_n E[p,n]
        self.row_sums = [e.sum(1, dtype=layer.dtype).unsqueeze(-1) for e in layer.projections]
        self.k_proj, self.v_proj = (
            projected[:, None, j] @ layer.weight[part].mT
            + self.row_sums[j] * layer.bias[part].unsqueeze(1)
            + (0 if e is None else e)
            for part, j, e in zip((1, 3), (0, -1), layer.projection_biases, strict=True)
        )
        self.keys = _fold_temperature(self.k_proj, self.channel.q_norm, layer.temperature2)

        # out_c = A (Wvc x + bvc), then the output projection: one matrix and one constant a sample.
        self.value_matrix = self.channel.attention @ vc_weight  # (B, H, D, C)
        self.value_constant = (self.channel.attention @ vc_bias.unsqueeze(-1)).squeeze(-1)
        self.matrix, self.constant = self.value_matrix.flatten(1, 2), self.value_constant.flatten(1)
        if layer.kind != "sum":
            self.matrix = layer.out_proj2_weight @ self.matrix  # (B, C/2, C)
            self.constant = F.linear(self.constant, layer.out_proj2_weight, layer.out_proj2_bias)

    def backward(self, layer, sums):
        """Gradients of everything small, from the output pass's sums over tokens.

        Returns (gradients by parameter, dprojected J x (B,P,C), drows J x (P,1), dgram (B,C,C),
        dtoken (B,C)): token x gets (x - mean) dgram + dtoken, row p of a projection gets drows[p].
        """
        N, grads, channel = layer.N, {}, self.channel
        q_weight, k_weight, vc_weight, vs_weight = layer.weight
        _, k_bias, vc_bias, vs_bias = layer.bias.unsqueeze(-1)  # (H, D, 1)

        # Channel branch.
        dmatrix, dconstant = sums.dmatrix, sums.dconstant
        if layer.kind != "sum":
            grads["out_proj2_weight"] = (
                dmatrix @ self.value_matrix.flatten(1, 2).mT
                + dconstant.unsqueeze(-1) * self.value_constant.flatten(1).unsqueeze(1)
            ).sum(0)
            grads["out_proj2_bias"] = dconstant.sum(0)
            dmatrix = layer.out_proj2_weight.T @ dmatrix
            dconstant = dconstant @ layer.out_proj2_weight
        dmatrix = dmatrix.unflatten(1, (layer.H, layer.D))  # (B, H, D, C)
        dconstant = dconstant.unflatten(1, (layer.H, layer.D)).unsqueeze(-1)  # (B, H, D, 1)
        dattention = dmatrix @ vc_weight.mT + dconstant * vc_bias.mT
        ddots, dq_norm, dk_norm, grads["temperature"] = channel.backward(dattention)

        # Spatial branch.
        dkeys = sums.dkeys + sums.dlogits.unsqueeze(-1) * self.q_mean.unsqueeze(2)
        dk_proj, dq_norm_spatial, grads["temperature2"] = _fold_temperature_backward(
            self.k_proj, channel.q_norm, layer.temperature2, self.keys, dkeys
        )
        dv_proj = sums.dvalues

        # q_n gets ddots k_n + dq_norm q_n, and k_n gets ddots^T q_n + dk_norm k_n: centred part and
        # mean apart, so that neither cancels against the other.
        dq_norm, dk_norm = (dq_norm + dq_norm_spatial).unsqueeze(-1), dk_norm.unsqueeze(-1)
        q_mean, k_mean = self.q_mean.unsqueeze(-1), self.k_mean.unsqueeze(-1)  # (B, H, D, 1)
        dq_mean = ddots @ k_mean + dq_norm * q_mean
        dk_mean = ddots.mT @ q_mean + dk_norm * k_mean
        dq_total = N * dq_mean + (sums.dlogits.unsqueeze(2) @ self.keys).mT
        dk_total = N * dk_mean
        dgram = (
            (ddots @ k_weight + dq_norm * q_weight).mT @ q_weight
            + (ddots.mT @ q_weight + dk_norm * k_weight).mT @ k_weight
        ).sum(1)
        dtoken = (dq_mean.mT @ q_weight + dk_mean.mT @ k_weight).sum((1, 2))

        # qkvv: over tokens, and for keys and spatial values over projected tokens.
        mean, z_k, z_v = self.mean[:, None], self.projected[:, None, 0], self.projected[:, None, -1]
        dq_weight = sums.dq_weight + ddots @ self.k_gram + dq_norm * self.q_gram + dq_total * mean
        dk_weight = ddots.mT @ self.q_gram + dk_norm * self.k_gram + dk_total * mean
        dk_weight += dk_proj.mT @ z_k
        dvc_weight, dvc_bias = channel.attention.mT @ dmatrix, channel.attention.mT @ dconstant
        dvs_weight, dvs_bias = dv_proj.mT @ z_v, dv_proj.mT @ self.row_sums[-1]
        dk_bias = dk_total + dk_proj.mT @ self.row_sums[0]
        grads["qkvv_weight"] = torch.stack((dq_weight, dk_weight, dvc_weight, dvs_weight)).sum(1)
        grads["qkvv_bias"] = torch.stack((dq_total, dk_bias, dvc_bias, dvs_bias)).sum(1)

        # Token projections, and their biases: one value a row, added to every channel.
        dprojected = [(dk_proj @ k_weight).sum(1), (dv_proj @ vs_weight).sum(1)]
        drows = [(dk_proj @ k_bias).sum((0, 1)), (dv_proj @ vs_bias).sum((0, 1))]
        dbiases = [dk_proj.sum((0, 1, 3)), dv_proj.sum((0, 1, 3))]
        if layer.kind != "split":
            dprojected, drows, dbiases = ([sum(pair)] for pair in (dprojected, drows, dbiases))
        grads.update(zip(("proj_k_bias", "proj_v_bias"), dbiases, strict=False))
        return grads, dprojected, drows, dgram, dtoken


def _summary_backward(layer, mean, dx, dprojected, drows, dgram, dtoken):
    """Last pass: adds to dx (B,N,C) in place, returns the gradient of each token projection."""
    gradients = [torch.empty_like(projection) for projection in layer.projections]
    for tile in layer.tiles():
        x = layer.tokens(tile)
        dx[:, tile] += (x - mean) @ dgram + dtoken.unsqueeze(1)
        for projection, gradient, dz, drow in zip(
            layer.projections, gradients, dprojected, drows, strict=True
        ):
            dx[:, tile] += projection[:, tile].to(layer.dtype).mT @ dz
            gradient[:, tile] = dz.transpose(0, 1).flatten(1) @ x.mT.flatten(0, 1) + drow
    return gradients


class _Sums(NamedTuple):
    """Sums over tokens that the output pass leaves for the mix's backward."""

    dmatrix: Tensor  # (B, O, C), O = C/2, or C for kind "sum"
    dconstant: Tensor  # (B, O)
    dlogits: Tensor  # (B, H, P)
    dkeys: Tensor  # (B, H, P, D)  sum of dlogits (q - mean)
    dvalues: Tensor  # (B, H, P, D)
    dq_weight: Tensor  # (B, H, D, C)  sum of dq (x - mean)


def _two_pass_forward(layer):
    kept = _summary(layer)
    mix = _Mix(layer, *kept)
    spatial = layer.spatial_map(mix.keys, mix.v_proj)
    buffer, out_s = layer.spatial_buffer()
    for tile in layer.tiles():
        q = layer.linear(layer.tokens(tile), slice(0, 1))
        out_s[:, :, tile] = spatial.forward(q, tile)
    y_c = layer.x.to(layer.dtype) @ mix.matrix.mT + mix.constant.unsqueeze(1)
    return layer.join(buffer, y_c), *kept


def _two_pass_backward(layer, dy, mean, gram, projected):
    mix = _Mix(layer, mean, gram, projected)
    spatial = layer.spatial_map(mix.keys, mix.v_proj)
    dy_s, dy_c, dout_s = layer.split(dy)
    buffer, out_s = layer.spatial_buffer()
    dx = dy_c @ mix.matrix
    dconstant = dy_c.sum(1)
    sums = _Sums(
        dconstant.unsqueeze(-1) * mix.mean,
        dconstant,
        mix.keys.new_zeros(mix.keys.shape[:3]),
        torch.zeros_like(mix.keys),
        torch.zeros_like(mix.keys),
        torch.zeros_like(mix.q_gram),
    )
    q_weight = layer.weight[0].flatten(0, 1)
    for tile in layer.tiles():
        x = layer.tokens(tile) - mix.mean
        q_centred = layer.heads(x @ q_weight.T)
        q = q_centred + mix.q_mean.unsqueeze(2)
        out_s[:, :, tile], dlogits, dvalues = spatial.backward(q, tile, dout_s[:, :, tile])
        dq = dlogits @ mix.keys
        dx[:, tile] += dq.transpose(1, 2).flatten(2) @ q_weight
        sums.dmatrix.add_(dy_c[:, tile].mT @ x)
        sums.dlogits.add_(dlogits.sum(2))
        sums.dkeys.add_(dlogits.mT @ q_centred)
        sums.dvalues.add_(dvalues)
        sums.dq_weight.add_(dq.mT @ x.unsqueeze(1))
    grads, *small = mix.backward(layer, sums)
    dprojections = _summary_backward(layer, mix.mean, dx, *small)
    grads["x"] = dx
    _output_projection_backward(layer, grads, dy_s, buffer)
    return grads, dprojections


def _output_projection_backward(layer, grads, dy_s, out_s):
    if layer.kind != "sum":
        grads["out_proj_weight"] = dy_s.flatten(0, 1).T @ out_s.flatten(0, 1)
        grads["out_proj_bias"] = dy_s.sum((0, 1))


class _Direct:
    """The direct plan's tensors: q, k, vc, vs (B,H,N,D) and what follows from them."""

    def __init__(self, layer):
        x = layer.tokens(slice(None))
        self.x = x
        self.q, self.k, self.vc, self.vs = layer.linear(x, slice(0, 4)).chunk(4, dim=1)
        q_norm, k_norm = self.q.norm(dim=2), self.k.norm(dim=2)
        self.channel = layer.channel_map(self.q.mT @ self.k, q_norm, k_norm)
        projections = [projection.to(layer.dtype) for projection in layer.projections]
        self.projections = projections[0], projections[-1]
        self.k_proj, self.v_proj = (
            projection @ t if e is None else projection @ t + e
            for projection, t, e in zip(
                self.projections, (self.k, self.vs), layer.projection_biases, strict=True
            )
        )
        self.keys = _fold_temperature(self.k_proj, self.channel.q_norm, layer.temperature2)
        self.spatial = layer.spatial_map(self.keys, self.v_proj)
        self.out_c = (self.vc @ self.channel.attention.mT).transpose(1, 2).flatten(2)  # (B, N, C)


def _direct_forward(layer):
    direct = _Direct(layer)
    buffer, out_s = layer.spatial_buffer()
    out_s.copy_(direct.spatial.forward(direct.q, slice(0, layer.N)))
    y_c = direct.out_c
    if layer.kind != "sum":
        y_c = F.linear(y_c, layer.out_proj2_weight, layer.out_proj2_bias)
    return layer.join(buffer, y_c), *(layer.x.new_empty((0,)) for _ in range(3))


def _direct_backward(layer, dy):
    direct, grads = _Direct(layer), {}
    q, k = direct.q, direct.k
    dy_s, dy_c, dout_s = layer.split(dy)
    buffer, out_s = layer.spatial_buffer()
    out, dlogits, dv_proj = direct.spatial.backward(q, slice(0, layer.N), dout_s)
    out_s.copy_(out)
    _output_projection_backward(layer, grads, dy_s, buffer)
    dk_proj, dq_norm_spatial, grads["temperature2"] = _fold_temperature_backward(
        direct.k_proj, direct.channel.q_norm, layer.temperature2, direct.keys, dlogits.mT @ q
    )

    if layer.kind != "sum":
        grads["out_proj2_weight"] = dy_c.flatten(0, 1).T @ direct.out_c.flatten(0, 1)
        grads["out_proj2_bias"] = dy_c.sum((0, 1))
        dy_c = dy_c @ layer.out_proj2_weight
    dout_c = layer.heads(dy_c)  # (B, H, N, D)
    dattention = dout_c.mT @ direct.vc
    ddots, dq_norm, dk_norm, grads["temperature"] = direct.channel.backward(dattention)
    dq = dlogits @ direct.keys + k @ ddots.mT + q * (dq_norm + dq_norm_spatial).unsqueeze(2)
    dk = q @ ddots + k * dk_norm.unsqueeze(2) + direct.projections[0].T @ dk_proj
    dvc = dout_c @ direct.channel.attention
    dvs = direct.projections[1].T @ dv_proj

    dqkvv = torch.cat((dq, dk, dvc, dvs), 1).transpose(1, 2).flatten(2)  # (B, N, 4C)
    grads["x"] = dqkvv @ layer.weight.flatten(0, 2)
    grads["qkvv_weight"] = dqkvv.flatten(0, 1).T @ direct.x.flatten(0, 1)
    grads["qkvv_bias"] = dqkvv.sum((0, 1))
    dprojections = [
        torch.einsum("bhpd,bhnd->pn", dk_proj, k), torch.einsum("bhpd,bhnd->pn", dv_proj, direct.vs)
    ]  # fmt: skip
    dbiases = [dk_proj.sum((0, 1, 3)), dv_proj.sum((0, 1, 3))]
    if layer.kind != "split":
        dprojections, dbiases = [sum(dprojections)], [sum(dbiases)]
    grads.update(zip(("proj_k_bias", "proj_v_bias"), dbiases, strict=False))
    return grads, dprojections


def paired_attention(*tensors, **options):
    """Op `paired_attention`, see `ops`."""
    layer = _Layer(*PAIRED.forward(tensors, options))
    return (
        _direct_forward(layer) if plan(layer.N, layer.C) == "direct" else _two_pass_forward(layer)
    )


def paired_attention_bwd(dy, *tensors, **options):
    """Op `paired_attention_bwd`, see `ops`."""
    inputs, kept, seed, options = PAIRED.backward(tensors, options)
    layer = _Layer(inputs, seed, options)
    if plan(layer.N, layer.C) == "direct":
        grads, dprojections = _direct_backward(layer, dy)
    else:
        grads, dprojections = _two_pass_backward(layer, dy, *kept)
    grads["proj_k_weight"], grads["proj_v_weight"] = dprojections[0], dprojections[-1]
    return tuple(
        empty_gradient(t, inputs.x) if t is None else _gradient(grads[name], t)
        for name, t in inputs._asdict().items()
    )


def _head_major(t):
    return t.transpose(1, 2).to(accumulate_dtype(t.dtype))  # (B, n, H, D) -> (B, H, n, D)


class _Spatial:
    """The tensors of one call of spatial_attention."""

    def __init__(self, inputs, q_norm, seed, options):
        q = inputs.q
        self.k_proj, self.temperature = (
            _head_major(inputs.k_proj),
            inputs.temperature.to(q_norm.dtype),
        )
        self.q_norm = q_norm.clamp_min(NORM_EPS)
        self.keys = _fold_temperature(self.k_proj, self.q_norm, self.temperature)
        values = _head_major(inputs.v_proj)
        self.map = _SpatialMap(self.keys, values, q.shape[1], options.dropout_p, seed)
        self.tiles = list(_tiles(q.shape[1], self.keys[..., 0].numel(), q.device))


def spatial_attention(*tensors, **options):
    """Op `spatial_attention`, see `ops`."""
    inputs, seed, options = SPATIAL.forward(tensors, options)
    q = inputs.q
    B, N, H, D = q.shape
    dtype = accumulate_dtype(q.dtype)
    if options.normalize:
        q_norm = torch.linalg.vector_norm(q, dim=1, dtype=dtype)
    else:
        q_norm = torch.ones(B, H, D, dtype=dtype, device=q.device)
    spatial = _Spatial(inputs, q_norm, seed, options)
    out = q.new_empty((B, N, H, D))
    for tile in spatial.tiles:
        out[:, tile] = spatial.map.forward(_head_major(q[:, tile]), tile).transpose(1, 2)
    return out, q_norm


def spatial_attention_bwd(dout, *tensors, **options):
    """Op `spatial_attention_bwd`, see `ops`."""
    inputs, kept, seed, options = SPATIAL.backward(tensors, options)
    q, spatial = inputs.q, _Spatial(inputs, kept.q_norm, seed, options)
    dq = torch.empty(q.shape, dtype=kept.q_norm.dtype, device=q.device)
    dkeys, dvalues = torch.zeros_like(spatial.keys), torch.zeros_like(spatial.keys)
    for tile in spatial.tiles:
        q_tile = _head_major(q[:, tile])
        _, dlogits, dvalues_tile = spatial.map.backward(q_tile, tile, _head_major(dout[:, tile]))
        dq[:, tile] = (dlogits @ spatial.keys).transpose(1, 2)
        dkeys += dlogits.mT @ q_tile
        dvalues += dvalues_tile
    dk_proj, dq_norm, dtemperature = _fold_temperature_backward(
        spatial.k_proj, spatial.q_norm, spatial.temperature, spatial.keys, dkeys
    )
    if options.normalize:
        dq += q * dq_norm.unsqueeze(1)
    return (
        _gradient(dq, q),
        _gradient(dk_proj.transpose(1, 2), inputs.k_proj),
        _gradient(dvalues.transpose(1, 2), inputs.v_proj),
        temperature_gradient(dtemperature, inputs.temperature),
    )


def channel_attention(*tensors, **options):
    """Op `channel_attention`, see `ops`."""
    inputs, seed, options = CHANNEL.forward(tensors, options)
    q, k, v, temperature = inputs
    dtype = accumulate_dtype(q.dtype)
    q_norm, k_norm = (torch.linalg.vector_norm(t, dim=1, dtype=dtype) for t in (q, k))
    B, N, H, D = q.shape
    gram = torch.zeros(B, H, D, D, dtype=dtype, device=q.device)
    tiles = list(_tiles(N, B * H * D, q.device))
    for tile in tiles:
        gram += _head_major(q[:, tile]).mT @ _head_major(k[:, tile])
    channel = _ChannelMap(gram, q_norm, k_norm, temperature.to(dtype), options.dropout_p, seed)
    out = q.new_empty((B, N, H, D))
    for tile in tiles:
        out[:, tile] = (_head_major(v[:, tile]) @ channel.attention.mT).transpose(1, 2)
    return out, gram, q_norm, k_norm


def channel_attention_bwd(dout, *tensors, **options):
    """Op `channel_attention_bwd`, see `ops`."""
    inputs, kept, seed, options = CHANNEL.backward(tensors, options)
    q, k, v, temperature = inputs
    channel = _ChannelMap(*kept, temperature.to(kept.gram.dtype), options.dropout_p, seed)
    dattention = torch.zeros_like(kept.gram)
    dq, dk, dv = (empty_gradient(t, q) for t in (q, k, v))
    tiles = list(_tiles(q.shape[1], kept.q_norm.numel(), q.device))
    for tile in tiles:
        dout_tile = _head_major(dout[:, tile])
        dattention += dout_tile.mT @ _head_major(v[:, tile])
        dv[:, tile] = (dout_tile @ channel.attention).transpose(1, 2)
    ddots, dq_norm, dk_norm, dtemperature = channel.backward(dattention)
    for tile in tiles:
        q_tile, k_tile = _head_major(q[:, tile]), _head_major(k[:, tile])
        dq[:, tile] = (k_tile @ ddots.mT + q_tile * dq_norm.unsqueeze(2)).transpose(1, 2)
        dk[:, tile] = (q_tile @ ddots + k_tile * dk_norm.unsqueeze(2)).transpose(1, 2)
    return dq, dk, dv, temperature_gradient(dtemperature, temperature)
