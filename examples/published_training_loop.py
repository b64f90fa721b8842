"""Two lines in a training loop that exists: patch_model swaps the attention of published code.

    python examples/published_training_loop.py

`PublishedEPA` stands in for the layer of the published UNETR++ code. patch_model finds it by its
attributes. Weights, outputs, optimizer and checkpoints stay as they are.
"""

import time

import torch
from torch import nn

import epa_kernels


class PublishedEPA(nn.Module):
    """Efficient paired attention as the published code has it, with its names."""

    def __init__(self, input_size: int, hidden_size: int, proj_size: int, num_heads: int = 4):
        super().__init__()
        self.num_heads = num_heads
        self.temperature = nn.Parameter(torch.ones(num_heads, 1, 1))
        self.temperature2 = nn.Parameter(torch.ones(num_heads, 1, 1))
        self.qkvv = nn.Linear(hidden_size, hidden_size * 4, bias=False)
        self.E = self.F = nn.Linear(input_size, proj_size)
        self.attn_drop = nn.Dropout(0.1)
        self.attn_drop_2 = nn.Dropout(0.1)
        self.out_proj = nn.Linear(hidden_size, hidden_size // 2)
        self.out_proj2 = nn.Linear(hidden_size, hidden_size // 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, N, C = x.shape
        heads = self.qkvv(x).reshape(B, N, 4, self.num_heads, C // self.num_heads)
        q, k, v_channel, v_spatial = heads.permute(2, 0, 3, 4, 1)  # each (B, H, D, N)
        k_projected, v_projected = self.E(k), self.F(v_spatial)  # (B, H, D, P)
        q, k = nn.functional.normalize(q, dim=-1), nn.functional.normalize(k, dim=-1)
        channel_map = (q @ k.transpose(-2, -1) * self.temperature).softmax(-1)
        channel = (self.attn_drop(channel_map) @ v_channel).permute(0, 3, 1, 2).reshape(B, N, C)
        spatial_map = (q.transpose(-2, -1) @ k_projected * self.temperature2).softmax(-1)
        spatial = self.attn_drop_2(spatial_map) @ v_projected.transpose(-2, -1)  # (B, H, N, D)
        spatial = spatial.permute(0, 3, 1, 2).reshape(B, N, C)
        return torch.cat((self.out_proj(spatial), self.out_proj2(channel)), dim=-1)


def make_model() -> nn.Module:
    return nn.Sequential(
        nn.Linear(1, 32), PublishedEPA(4096, 32, 64), PublishedEPA(4096, 32, 64), nn.Linear(32, 2)
    )


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> float:
    """The loop that exists already; returns the seconds of a step."""
    generator = torch.Generator().manual_seed(0)
    start = time.perf_counter()
    for _ in range(steps):
        voxels = torch.randn(2, 4096, 1, generator=generator)
        label = (voxels[..., 0] > 0).long()
        loss = nn.functional.cross_entropy(model(voxels).transpose(1, 2), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return (time.perf_counter() - start) / steps


def main() -> tuple[int, float]:
    torch.manual_seed(0)
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.99, nesterov=True)
    before = train(model, optimizer, steps=10)
    voxels = torch.randn(1, 4096, 1)
    expected = model.eval()(voxels)

    swapped = epa_kernels.patch_model(model)  # the second of the two lines; the import is the first

    difference = (model(voxels) - expected).abs().max().item()
    after = train(model.train(), optimizer, steps=10)
    print(f"{swapped} layers swapped, largest difference of the output {difference:.1e}")
    print(f"a step took {1e3 * before:.0f} ms before and {1e3 * after:.0f} ms after")
    return swapped, difference


if __name__ == "__main__":
    main()
