"""An LSTM and a GRU learn to count on strings of 64 digits, and count right up to 127: accumulators from the start.

On CUDA if there is one, else on the CPU.
"""

import sys

import matplotlib.pyplot as plt
import torch
from torch import nn

import seqcells

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 1500
device = "cuda" if torch.cuda.is_available() else "cpu"
torch.set_num_threads(1)  # tensors this small gain nothing from more


def strings(count, length):
    """Digits [count, length, 1], each string with its own share of ones, and the count at every prefix."""
    digits = (torch.rand(count, length) < torch.rand(count, 1)).float().to(device)
    return digits[..., None], digits.cumsum(1)


torch.manual_seed(0)
test, counts = strings(2_000, 127)
# The gates add so little a step that the state stays where tanh is linear; scale makes up for it.
for name, kind, hidden, scale, lr in ("LSTM", seqcells.LSTM, 8, 1500.0, 0.03), ("GRU", seqcells.GRU, 16, 300.0, 0.02):
    torch.manual_seed(1)
    layer = seqcells.init.accumulator_(kind(1, hidden, batch_first=True)).to(device)
    combine = nn.Parameter(torch.randn(hidden, device=device))
    optimizer = torch.optim.Adam([*layer.parameters(), combine], lr=lr, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.01 ** (1 / steps))
    for _ in range(steps):
        digits, wanted = strings(64, 64)
        optimizer.zero_grad()
        nn.functional.mse_loss(scale * (layer(digits)[0] @ combine), wanted).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        answers = scale * (layer(test)[0] @ combine)
    errors = (answers - counts).abs().amax(0).cpu()  # at every length from 1 to 127
    print(f"{name}: worst error {errors[64:].max():.3f} on lengths 65 to 127, which it has not seen")
    for digits, count, answer in zip(test[:3, :, 0].tolist(), counts[:3, -1], answers[:3, -1], strict=True):
        print("".join(str(int(d)) for d in digits), f"count {int(count)}, prediction {answer:.2f}")
    plt.semilogy(range(1, 128), errors, label=name)
plt.axvline(64, color="grey", linestyle=":")
plt.axhline(0.5, color="grey", linestyle=":")
plt.gca().set(xlabel="length (trained to 64)", ylabel="worst error of 2000 strings", title="counting on")
plt.legend()
plt.savefig("count_ones_regression.png")
