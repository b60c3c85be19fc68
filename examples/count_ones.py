"""An LSTM and a GRU learn to count the ones in a string of twenty digits. On CUDA if there is one, else on the CPU."""

import sys

import matplotlib.pyplot as plt
import torch
from torch import nn

import seqcells

epochs = int(sys.argv[1]) if len(sys.argv) > 1 else 10
device = "cuda" if torch.cuda.is_available() else "cpu"
torch.set_num_threads(1)  # tensors this small gain nothing from more


def strings(count):
    """Digits [count, 20, 1], each string with its own share of ones, and how many ones there are [count]."""
    share = 1 - torch.randint(20, (count, 1)) / 20
    digits = (torch.rand(count, 20) < share).float().to(device)
    return digits[..., None], digits.sum(1)


torch.manual_seed(0)
(digits, counts), (test_digits, test_counts) = strings(10_000), strings(1_000)
for name, kind in ("LSTM", seqcells.LSTM), ("GRU", seqcells.GRU):
    layer, head, accuracies = kind(1, 20, batch_first=True).to(device), nn.Linear(20, 1).to(device), []
    optimizer = torch.optim.Adam([*layer.parameters(), *head.parameters()], lr=1e-3)
    for epoch in range(1, epochs + 1):
        for chosen in torch.randperm(len(digits), device=device).split(16):
            answers = head(layer(digits[chosen])[0][:, -1])[:, 0]
            optimizer.zero_grad()
            nn.functional.mse_loss(answers, counts[chosen]).backward()
            optimizer.step()
        answers = head(layer(test_digits)[0][:, -1])[:, 0]
        accuracies.append((answers.round() == test_counts).float().mean().item())
        print(f"{name} epoch {epoch}: test accuracy {accuracies[-1]:.3f}; {int(test_counts[0])} ones: {answers[0]:.2f}")
    plt.plot(range(1, epochs + 1), accuracies, label=name)
plt.gca().set(xlabel="epoch", ylabel="test accuracy", title="counting ones")
plt.legend()
plt.savefig("count_ones.png")
