"""Fused Triton kernels for recurrent cells: cells x schedules, each written once. Tensors in, tensors out.

Knows neither autograd nor nn; `seqcells` builds those on top. Importing this package imports triton.
"""
