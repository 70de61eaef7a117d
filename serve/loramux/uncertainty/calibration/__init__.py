"""From scores to the probability of being right: fitted to labelled answers of one version of one adapter."""
