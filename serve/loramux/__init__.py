"""loramux: one base model, very many LoRA adapters of every kind, one OpenAI-compatible endpoint.

Importing this package imports neither vLLM nor torch; `loramux.engine` is the only place that knows vLLM.
"""

__version__ = "0.2.0"
