"""The operations as PyTorch sees them: signature, checks, registration, shape inference. No arithmetic."""
