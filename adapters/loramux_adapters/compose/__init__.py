"""Making one adapter out of several, without training."""
