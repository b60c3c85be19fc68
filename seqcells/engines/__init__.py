"""What runs a call: triton (the fused kernels), loop (a loop in torch operations) and aten (torch's own fused RNNs).

`dispatch` chooses among them and the reference.
"""
