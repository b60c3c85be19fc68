"""An LSTM and a GRU learn to count the ones in a string of twenty digits. On CUDA if there is one, else on the CPU."""

import argparse

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from torch import nn

import seqcells

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--epochs", type=int, default=10)
parser.add_argument("--plot", default="count_ones.png")
options = parser.parse_args()
device = "cuda" if torch.cuda.is_available() else "cpu"
torch.set_num_threads(1)  # tensors this small gain nothing from more


def strings(count):
    """Digits [count, 20, 1], each string with its own share of ones, and how many ones there are [count]."""
    share = 1 - torch.randint(20, (count, 1)) / 20
    digits = (torch.rand(count, 20) < share).float().to(device)
    return digits[..., None], digits.sum(1)


torch.manual_seed(0)
(digits, counts), (test_digits, test_counts) = strings(10_000), strings(1_000)
for name, cell in ("LSTM", seqcells.LSTM), ("GRU", seqcells.GRU):
    layer, head = cell(1, 20, batch_first=True).to(device), nn.Linear(20, 1).to(device)
    optimizer = torch.optim.Adam([*layer.parameters(), *head.parameters()], lr=1e-3, fused=True)
    accuracies = []
    for epoch in range(1, options.epochs + 1):
        for chosen in torch.randperm(len(digits), device=device).split(16):
            answers = head(layer(digits[chosen])[0][:, -1])[:, 0]
            loss = nn.functional.mse_loss(answers, counts[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            answers = head(layer(test_digits)[0][:, -1])[:, 0]
        accuracies.append((answers.round() == test_counts).float().mean().item())
        print(f"{name} epoch {epoch}: test accuracy {accuracies[-1]:.3f}")
    for string, count, answer in zip(test_digits[:3, :, 0], test_counts, answers, strict=False):
        print("".join(str(int(d)) for d in string), f"count {int(count)}, answer {answer:.2f}")
    plt.plot(range(1, options.epochs + 1), accuracies, label=name)
plt.gca().set(xlabel="epoch", ylabel="test accuracy", title="counting ones")
plt.legend()
plt.savefig(options.plot)
