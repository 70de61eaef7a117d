"""PyTorch on the CPU: one matrix product per adapter in the step, never a copy of weights per token."""
