"""CUDA C++ kernels for Hopper and later, compiled at first use by NVRTC, which comes with PyTorch.

They take the sites whose weights are bfloat16 or float16 and whose sizes are whole 16-byte accesses; Triton has the
rest.
"""
