"""Coupled oscillatory RNN (Rusch & Mishra 2021, arXiv:2010.00951): each unit is a damped, driven oscillator."""

import torch

from ..cell import cell


@cell(gates="y z", states="y z", constants="dt=0.042 gamma=2.7 epsilon=4.7", bias="y")
def cornn(x, U, y, z, dt, gamma, epsilon):
    """coRNN (Rusch & Mishra 2021): positions y, the output, and velocities z. Constants as for sMNIST."""
    z = z + dt * (torch.tanh(x.y + U.y(y) + U.z(z)) - gamma * y - epsilon * z)
    return y + dt * z, z
