"""How sure an answer is: scores from the draws of a Bayesian adapter."""

#: Key of `SamplingParams.extra_args` that tells the worker to read a request.
READ_KEY = "loramux_read"
