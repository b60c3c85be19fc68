# %% [markdown]
"""
# Memorizing a string

An LSTM and a GRU memorize thirty random letters, one letter and one step of Adam at a time, and then say them. It
runs on CUDA if there is one, else on the CPU.

The letters are one-hot, the batch is one string, and each cell has 32 units and a linear layer. In the notebook that
the task is from, this failed after 1000 epochs, for two reasons. Its loss took the softmax of a softmax, so it could
not fall below 2.32. And its graph spanned the whole epoch while the parameters changed in place, which torch refuses
today.

Here the loss is on the scores, and the state's value is carried from letter to letter without its gradient.
"""

# %%
import sys
from itertools import pairwise

import matplotlib.pyplot as plt
import torch
from torch import nn

import seqcells

epochs = int(sys.argv[-1]) if sys.argv[-1].isdigit() else 100
device = "cuda" if torch.cuda.is_available() else "cpu"
torch.set_num_threads(1)  # tensors this small gain nothing from more
target = "VNMVWKTFFLOZKUNSDYGOEFOBTZTTVU"
letters = torch.tensor([ord(letter) - ord("A") for letter in target], device=device)
onehot = torch.eye(26, device=device)


def output(state):
    """h, which is all of a GRU's state and the first of an LSTM's two."""
    return state if isinstance(state, torch.Tensor) else state[0]


# %% [markdown]
"""
After a step of Adam the parameters differ from those that computed the state, so the gradient stops there. The string
is judged as it will be used: the first letter goes in, then every answer.
"""


# %%
def detached(state):
    return state.detach() if isinstance(state, torch.Tensor) else tuple(s.detach() for s in state)


@torch.no_grad()
def said(cell, head):
    answer, state = [letters[:1]], None
    for _ in range(len(letters) - 1):
        state = cell(onehot[answer[-1]], state)
        answer.append(head(output(state)).argmax(1))
    return torch.cat(answer)


# %% [markdown]
"""
The number of epochs is fixed in advance. The learning rate falls to a tenth over them, so that what is exact stays
so.
"""

# %%
shares = {"LSTM": [], "GRU": []}
for name, kind in ("LSTM", seqcells.LSTMCell), ("GRU", seqcells.GRUCell):
    torch.manual_seed(0)
    cell, head = kind(26, 32).to(device), nn.Linear(32, 26).to(device)
    optimizer = torch.optim.Adam([*cell.parameters(), *head.parameters()], lr=3e-3)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.1 ** (1 / epochs))
    for _ in range(epochs):
        state = None
        for letter, following in pairwise(letters):
            state = cell(onehot[letter][None], state)
            optimizer.zero_grad()
            nn.functional.cross_entropy(head(output(state)), following[None]).backward()
            optimizer.step()
            state = detached(state)
        schedule.step()
        shares[name].append((said(cell, head) == letters).float().mean().item())
    produced = "".join(chr(letter + ord("A")) for letter in said(cell, head).tolist())
    print(f"{name} target   {target}\n{name} produced {produced}")

# %%
for name, share in shares.items():
    plt.plot(range(1, epochs + 1), share, label=name)
plt.gca().set(xlabel="epoch", ylabel="letters right, said from the first", title="memorizing thirty letters")
plt.legend()
plt.savefig("memorize.png")

# %% [markdown]
"""
`seqcells/tasks/memorize.py` has seven strings, from the alphabet to these letters with 128 units, and the notebook's
own form of the gradient: `python -m seqcells run memorize --plot memorize.png` runs them.
"""
