"""The optimizer Muon (Jordan et al. 2024): a tiny model keeps with it what it has read a few times.

PyTorch's own (torch.optim.Muon) works in bfloat16, which most CPUs emulate: half a second a step here.
"""

import torch

# The polynomial a·x + b·x³ + c·x⁵ of Jordan et al., which draws every singular value towards 1.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
ROUNDS = 3  # five in the paper; after three the model has learned as much, in less time


class Muon(torch.optim.Optimizer):
    """Moves matrices by their averaged gradient with all singular values made alike; AdamW is for the rest.

    So a fact that few texts tell moves the weights as much as a phrase of every text.
    """

    def __init__(self, matrices, lr: float, momentum: float = 0.95):
        super().__init__(matrices, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for matrix in group["params"]:
                average = self.state[matrix].setdefault("average", torch.zeros_like(matrix))
                average.lerp_(matrix.grad, 1 - group["momentum"])
                update = orthogonalize(matrix.grad.lerp(average, group["momentum"]))
                matrix.sub_(update, alpha=group["lr"])


def orthogonalize(matrix: torch.Tensor) -> torch.Tensor:
    """Return the nearest matrix whose singular values are about 1, scaled by the root of its (out / in).

    GPT-2 keeps a weight as (in, out), and those of query, key and value side by side: each is treated alone.
    """
    height, width = matrix.shape
    if width == 3 * height:
        return torch.cat([orthogonalize(part) for part in matrix.split(height, dim=1)], dim=1)
    a, b, c = NEWTON_SCHULZ
    x = (matrix if height <= width else matrix.T) / (matrix.norm() + 1e-7)
    for _ in range(ROUNDS):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return (x if height <= width else x.T) * max(1.0, width / height) ** 0.5
