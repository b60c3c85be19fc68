# %% [markdown]
"""
# Counting beyond the training lengths

An LSTM and a GRU learn to count ones on strings of 64 digits, and count right up to 127. It runs on CUDA if there is
one, else on the CPU.

With the default initialization this fails: the gates forget, and what was learnt for 64 steps does not hold for 127.
What helps is to start as an accumulator, by `seqcells.init.accumulator_`. The forget gate is open and the input gate
is nearly closed, so each one adds a little, where tanh is still linear. The answer is scaled back up.
"""

# %%
import sys

import matplotlib.pyplot as plt
import torch
from torch import nn

import seqcells

steps = int(sys.argv[-1]) if sys.argv[-1].isdigit() else 1500
device = "cuda" if torch.cuda.is_available() else "cpu"
torch.set_num_threads(1)  # tensors this small gain nothing from more

# %% [markdown]
"""
Each string has its own share of ones. The loss is taken at every prefix, so a string has 64 counts to learn from.
"""


# %%
def strings(count, length):
    """Digits [count, length, 1], each string with its own share of ones, and the count at every prefix."""
    digits = (torch.rand(count, length) < torch.rand(count, 1)).float().to(device)
    return digits[..., None], digits.cumsum(1)


torch.manual_seed(0)
test, counts = strings(2_000, 127)

# %% [markdown]
"""
The learning rate decays exponentially to 1%. The test is the worst error of 2,000 strings at each length.
"""

# %%
worst = {}
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
    worst[name] = (answers - counts).abs().amax(0).cpu()  # at every length from 1 to 127
    print(f"{name}: worst error {worst[name][64:].max():.3f} on lengths 65 to 127, which it has not seen")
    for digits, count, answer in zip(test[:3, :, 0].tolist(), counts[:3, -1], answers[:3, -1], strict=True):
        print("".join(str(int(d)) for d in digits), f"count {int(count)}, prediction {answer:.2f}")

# %%
for name, errors in worst.items():
    plt.semilogy(range(1, 128), errors, label=name)
plt.axvline(64, color="grey", linestyle=":")
plt.axhline(0.5, color="grey", linestyle=":")
plt.gca().set(xlabel="length (trained to 64)", ylabel="worst error of 2000 strings", title="counting on")
plt.legend()
plt.savefig("count_ones_regression.png")

# %% [markdown]
"""
An answer is right if the error is below 0.5, the horizontal line. The task has a second case: two units in float64
and all strings of length 12. `python -m seqcells run count-ones-regression --plot count-ones-regression.png` runs
them.
"""
