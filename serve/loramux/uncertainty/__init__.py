"""How sure an answer is: scores from the draws of a Bayesian adapter."""

#: Key of `SamplingParams.extra_args` whose value is a tag: the worker keeps the entropies of the request's tokens.
ENTROPY_KEY = "loramux_entropy"
#: Key of `SamplingParams.extra_args` that tells the worker to read a request.
READ_KEY = "loramux_read"
