"""Triton kernels for CUDA: two launches per site for any mix of adapters, safe inside CUDA graphs.

Grids depend on the padded token count and static limits only; tables and tiles lie in static buffers; nothing waits
for the device. This package is not called `triton` to the outside: `import triton` is the compiler.
"""
