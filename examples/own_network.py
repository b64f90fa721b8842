"""The layer in a network of your own: a small classifier of 3-D volumes.

    python examples/own_network.py

Volumes with a bright ball in the upper or in the lower half are told apart. EPA mixes the tokens
between two convolutions; it needs only torch.
"""

import torch
from torch import nn

from epa_kernels import EPA


class Block(nn.Module):
    """Paired attention over the voxels of a grid, with a residual connection."""

    def __init__(self, grid: tuple[int, int, int], channels: int) -> None:
        super().__init__()
        tokens = grid[0] * grid[1] * grid[2]
        self.norm = nn.LayerNorm(channels)
        self.attention = EPA(tokens, channels, proj_size=32, num_heads=4)

    def forward(self, volume: torch.Tensor) -> torch.Tensor:
        tokens = volume.flatten(2).transpose(1, 2)  # (B, C, X, Y, Z) -> (B, N, C), no copy
        tokens = tokens + self.attention(self.norm(tokens))
        return tokens.transpose(1, 2).reshape(volume.shape)


def make_network() -> nn.Module:
    return nn.Sequential(
        nn.Conv3d(1, 32, kernel_size=4, stride=4),  # (B, 1, 32, 32, 32) -> (B, 32, 8, 8, 8)
        Block((8, 8, 8), 32),
        nn.AdaptiveAvgPool3d((2, 1, 1)),
        nn.Flatten(),
        nn.Linear(64, 2),
    )


def make_batch(size: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Volumes (B, 1, 32, 32, 32) of noise with a ball, and the half in which it lies (B)."""
    axis = torch.arange(32.0)
    half = torch.randint(2, (size,), generator=generator)
    centre = 8 + 16 * torch.rand(size, 3, generator=generator)
    centre[:, 0] = 8 + 16 * half
    grid = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"))  # (3, 32, 32, 32)
    distance = (grid - centre[:, :, None, None, None]).square().sum(1)
    volume = (distance < 25).float() + 0.5 * torch.randn(distance.shape, generator=generator)
    return volume[:, None], half


def main() -> float:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    network = make_network()
    optimizer = torch.optim.AdamW(network.parameters(), 3e-3)
    for step in range(60):
        volumes, half = make_batch(8, generator)
        loss = nn.functional.cross_entropy(network(volumes), half)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 0:
            print(f"step {step}: loss {loss.item():.3f}")
    network.eval()
    volumes, half = make_batch(64, generator)
    with torch.no_grad():
        accuracy = (network(volumes).argmax(1) == half).float().mean().item()
    print(f"accuracy on new volumes {accuracy:.2f}")
    return accuracy


if __name__ == "__main__":
    main()
