# %% [markdown]
"""
# Repeating a sequence

Five random integers go in, then the first two come out: an encoder, its last output, and a decoder. Both are LSTMs,
or both GRUs. It runs on CUDA if there is one, else on the CPU.

The integers are 0 to 98, one-hot. The decoder's input at each step is the encoder's last output.
"""

# %%
import sys

import matplotlib.pyplot as plt
import torch
from torch import nn

import seqcells

steps = int(sys.argv[-1]) if sys.argv[-1].isdigit() else 800
device = "cuda" if torch.cuda.is_available() else "cpu"
torch.set_num_threads(1)
INTEGERS, HIDDEN, INPUTS, OUTPUTS = 99, 150, 5, 2

# %% [markdown]
"""
Input weights are Glorot's, recurrent weights orthogonal, and the bias of the LSTM's forget gate is 1.
"""


# %%
class EncoderDecoder(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.encoder = kind(INTEGERS, HIDDEN, batch_first=True)
        self.decoder = kind(HIDDEN, HIDDEN, batch_first=True)
        self.head = nn.Linear(HIDDEN, INTEGERS)
        for layer in self.encoder, self.decoder:
            nn.init.xavier_uniform_(layer.weight_ih_l0)
            for gate in layer.weight_hh_l0.split(HIDDEN):
                nn.init.orthogonal_(gate)
            nn.init.zeros_(layer.bias_ih_l0)
            nn.init.zeros_(layer.bias_hh_l0)
            if kind is seqcells.LSTM:
                seqcells.init.forget_bias_(layer, 1.0)

    def forward(self, integers):
        last = self.encoder(nn.functional.one_hot(integers, INTEGERS).float())[0][:, -1:]
        return self.head(self.decoder(last.expand(-1, OUTPUTS, -1))[0])


# %% [markdown]
"""
The gradient is clipped to norm 1. The learning rate is constant for 60% of the steps, by which time the integers are
learnt, and then decays to 3%.
"""

# %%
test = torch.randint(INTEGERS, (2_000, INPUTS), generator=torch.Generator().manual_seed(0)).to(device)
curves = {}
for name, kind in ("LSTM", seqcells.LSTM), ("GRU", seqcells.GRU):
    torch.manual_seed(1)
    model, seen, shares = EncoderDecoder(kind).to(device), [], []
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    # The rate stays until the integers are learnt; decaying from the first step hurts.
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda done: 1.0 if done <= 0.6 * steps else 0.03 ** ((done / steps - 0.6) / 0.4)
    )
    for step in range(1, steps + 1):
        integers = torch.randint(INTEGERS, (128, INPUTS)).to(device)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(integers).flatten(0, 1), integers[:, :OUTPUTS].flatten()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps:
            with torch.no_grad():
                answers = model(test).argmax(2)
            seen.append(128 * step)
            shares.append((answers == test[:, :OUTPUTS]).all(1).float().mean().item())
    print(f"{name}: {shares[-1]:.4f} of {len(test)} fresh sequences exact after {seen[-1]}")
    for integers, answer in zip(test[:3].tolist(), answers[:3].tolist(), strict=True):
        print(f"{integers}: expected {integers[:OUTPUTS]}, predicted {answer}")
    curves[name] = seen, shares

# %%
for name, curve in curves.items():
    plt.plot(*curve, label=name)
plt.gca().set(xlabel="sequences seen", ylabel="share of fresh sequences exact", title="the first two of five integers")
plt.legend()
plt.savefig("echo.png")

# %% [markdown]
"""
The task's other cases repeat four or all five integers, a whole sequence as it comes, and a sequence in windows, with
the state carried from one to the next. `python -m seqcells run echo --plot echo.png` runs them.
"""
