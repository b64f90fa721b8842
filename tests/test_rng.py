"""The random bits of dropout: known answers, statistics, and one mask for every backend."""

import math

import pytest
import torch
from cases import FUSED_BACKENDS

import epa_kernels
from epa_kernels import rng
from epa_kernels.testing import DEVICE

# Random123's kat_vectors for philox4x32-10: counter, key, result.
KNOWN_ANSWERS = (
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (
        (0xFFFFFFFF,) * 4,
        (0xFFFFFFFF,) * 2,
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
)


def signed(value):
    """The int64 with these 64 bits."""
    return value - 2**64 if value >= 2**63 else value


@pytest.mark.parametrize("counter, key, expected", KNOWN_ANSWERS)
def test_philox_known_answers(counter, key, expected):
    seed = torch.tensor(signed(key[0] | key[1] << 32))
    words = rng.philox(tuple(torch.tensor([c]) for c in counter), seed)
    assert tuple(int(w) for w in words) == expected


@pytest.mark.parametrize("p", (0.1, 0.15, 0.5, 0.9))
def test_multiplier_has_the_asked_rate_and_mean_one(p):
    rows = torch.arange(4096)
    m = rng.dropout_multiplier(torch.tensor(3), rows, 64, p, rng.SPATIAL_MAP, torch.float64)
    deviation = math.sqrt(p * (1 - p) / m.numel())
    assert abs((m == 0).double().mean().item() - p) < 4 * deviation
    assert abs(m.mean().item() - 1) < 4 * deviation / (1 - p)
    assert m.unique().numel() == 2


def test_bits_are_independent_of_neighbours_maps_and_seeds():
    rows = torch.arange(2048)

    def mask(seed, map_index=rng.SPATIAL_MAP):
        return rng.dropout_multiplier(torch.tensor(seed), rows, 40, 0.5, map_index, torch.float64)

    a = mask(1) - 1
    others = (mask(2) - 1, mask(1 + 2**32) - 1, mask(1, rng.CHANNEL_MAP) - 1, a.roll(1, 0),
              a.roll(1, 1), a.roll(2, 1), a.roll(8, 1))  # fmt: skip
    for b in others:
        assert abs((a * b).mean().item()) < 5 / math.sqrt(a.numel())


def test_mask_depends_on_position_only():
    seed, p = torch.tensor(-5), 0.3
    rows = torch.arange(2**32 - 3, 2**32 + 5)  # across the low word of the row
    whole = rng.dropout_multiplier(seed, rows, 21, p, rng.SPATIAL_MAP, torch.float32)
    tile = rng.dropout_multiplier(seed, rows[2:6], 21, p, rng.SPATIAL_MAP, torch.float32)
    narrow = rng.dropout_multiplier(seed, rows, 5, p, rng.SPATIAL_MAP, torch.float32)
    assert torch.equal(whole[2:6], tile)
    assert torch.equal(whole[:, :5], narrow)
    assert not torch.equal(whole[0], whole[4])


@pytest.mark.parametrize("backend", FUSED_BACKENDS)
def test_mask_of_a_backend_is_the_spec_s_bit_for_bit(backend, monkeypatch):
    """Uniform attention over one-hot values makes the output the mask itself."""
    monkeypatch.setitem(epa_kernels.backends.two_pass.TILE_ELEMENTS, DEVICE, 1)
    B, N, H, P, p, seed = 2, 300, 2, 13, 0.3, torch.tensor(2**40 + 7, device=DEVICE)
    q, k_proj = torch.zeros(B, N, H, P, device=DEVICE), torch.zeros(B, P, H, P, device=DEVICE)
    v_proj = torch.eye(P, device=DEVICE).view(1, P, 1, P).expand(B, P, H, P)
    temperature = torch.ones(1, device=DEVICE)
    rows = torch.arange(B * H * N, device=DEVICE).view(B, H, N)
    m = rng.dropout_multiplier(seed, rows, P, p, rng.SPATIAL_MAP, torch.float32)
    options = {"dropout_p": p, "seed": seed, "backend": backend}
    out = epa_kernels.spatial_attention(q, k_proj, v_proj, temperature, **options)
    assert torch.equal(out.transpose(1, 2) != 0, m != 0)

    rows = torch.arange(B * H * P, device=DEVICE).view(B, H, P)
    m = rng.dropout_multiplier(seed, rows, P, p, rng.CHANNEL_MAP, torch.float32)
    zero = torch.zeros(B, P, H, P, device=DEVICE)
    out = epa_kernels.channel_attention(zero, zero, v_proj, temperature, **options)
    assert torch.equal(out.permute(0, 2, 3, 1) != 0, m != 0)


def test_seed_comes_from_torch_s_generator():
    torch.manual_seed(1)
    first = rng.draw_seed(torch.device("cpu"))
    second = rng.draw_seed(torch.device("cpu"))
    torch.manual_seed(1)
    assert torch.equal(first, rng.draw_seed(torch.device("cpu")))
    assert not torch.equal(first, second)
