"""An LSTM and a GRU memorize thirty random letters, one letter and one step of Adam at a time, and then say them.

On CUDA if there is one, else on the CPU.
"""

import sys
from itertools import pairwise

import matplotlib.pyplot as plt
import torch
from torch import nn

import seqcells

epochs = int(sys.argv[1]) if len(sys.argv) > 1 else 100
device = "cuda" if torch.cuda.is_available() else "cpu"
torch.set_num_threads(1)  # tensors this small gain nothing from more
target = "VNMVWKTFFLOZKUNSDYGOEFOBTZTTVU"
letters = torch.tensor([ord(letter) - ord("A") for letter in target], device=device)
onehot = torch.eye(26, device=device)


def detached(state):
    """The state's value goes on to the next letter; the gradient stops, for the parameters change in between."""
    return state.detach() if isinstance(state, torch.Tensor) else tuple(s.detach() for s in state)


def said(cell, head):
    """What comes out when the first letter goes in, and then every answer."""
    answer, state = [letters[:1]], None
    for _ in range(len(letters) - 1):
        state = cell(onehot[answer[-1]], state)
        answer.append(head(state if isinstance(state, torch.Tensor) else state[0]).argmax(1))
    return torch.cat(answer)


for name, kind in ("LSTM", seqcells.LSTMCell), ("GRU", seqcells.GRUCell):
    torch.manual_seed(0)
    cell, head, shares = kind(26, 32).to(device), nn.Linear(32, 26).to(device), []
    optimizer = torch.optim.Adam([*cell.parameters(), *head.parameters()], lr=3e-3)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.1 ** (1 / epochs))
    for _ in range(epochs):
        state = None
        for letter, following in pairwise(letters):
            state = cell(onehot[letter][None], state)
            scores = head(state if isinstance(state, torch.Tensor) else state[0])
            optimizer.zero_grad()
            nn.functional.cross_entropy(scores, following[None]).backward()
            optimizer.step()
            state = detached(state)
        schedule.step()
        with torch.no_grad():
            shares.append((said(cell, head) == letters).float().mean().item())
    with torch.no_grad():
        produced = "".join(chr(letter + ord("A")) for letter in said(cell, head).tolist())
    print(f"{name} target   {target}\n{name} produced {produced}")
    plt.plot(range(1, epochs + 1), shares, label=name)
plt.gca().set(xlabel="epoch", ylabel="letters right, said from the first", title="memorizing thirty letters")
plt.legend()
plt.savefig("memorize.png")
