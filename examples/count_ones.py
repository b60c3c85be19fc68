# %% [markdown]
"""
# Counting ones

An LSTM and a GRU read a string of twenty zeros and ones and say how many ones there were. It runs on CUDA if there is
one, else on the CPU.

The share of ones is drawn anew for each string, so that all counts occur. An answer is right if it rounds to the
count.
"""

# %%
import sys

import matplotlib.pyplot as plt
import torch
from torch import nn

import seqcells

epochs = int(sys.argv[-1]) if sys.argv[-1].isdigit() else 10
device = "cuda" if torch.cuda.is_available() else "cpu"
torch.set_num_threads(1)  # tensors this small gain nothing from more

# %% [markdown]
"""
There are 10,000 strings for training and 1,000 for the test.
"""


# %%
def strings(count):
    """Digits [count, 20, 1], each string with its own share of ones, and how many ones there are [count]."""
    share = 1 - torch.randint(20, (count, 1)) / 20
    digits = (torch.rand(count, 20) < share).float().to(device)
    return digits[..., None], digits.sum(1)


torch.manual_seed(0)
(digits, counts), (test_digits, test_counts) = strings(10_000), strings(1_000)

# %% [markdown]
"""
Twenty units, a linear layer on the last output, the mean squared error, and Adam on batches of 16. Nothing more is
needed.
"""

# %%
accuracies = {"LSTM": [], "GRU": []}
for name, kind in ("LSTM", seqcells.LSTM), ("GRU", seqcells.GRU):
    layer, head = kind(1, 20, batch_first=True).to(device), nn.Linear(20, 1).to(device)
    optimizer = torch.optim.Adam([*layer.parameters(), *head.parameters()], lr=1e-3)
    for epoch in range(1, epochs + 1):
        for chosen in torch.randperm(len(digits), device=device).split(16):
            answers = head(layer(digits[chosen])[0][:, -1])[:, 0]
            optimizer.zero_grad()
            nn.functional.mse_loss(answers, counts[chosen]).backward()
            optimizer.step()
        answers = head(layer(test_digits)[0][:, -1])[:, 0]
        accuracy = (answers.round() == test_counts).float().mean().item()
        accuracies[name].append(accuracy)
        print(f"{name} epoch {epoch}: test accuracy {accuracy:.3f}; {int(test_counts[0])} ones: {answers[0]:.2f}")

# %%
for name, accuracy in accuracies.items():
    plt.plot(range(1, epochs + 1), accuracy, label=name)
plt.gca().set(xlabel="epoch", ylabel="test accuracy", title="counting ones")
plt.legend()
plt.savefig("count_ones.png")

# %% [markdown]
"""
`seqcells/tasks/count_ones.py` draws the initial weights as the notebook did that the task is from, and runs with
every cell: `python -m seqcells run count-ones --cell lstm gru mgu --plot count_ones.png`.
"""
