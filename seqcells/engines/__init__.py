"""The engines, which run a call: triton (the fused kernels), loop (torch operations), aten (torch's own fused RNNs).

`dispatch` chooses among them and the reference.
"""
