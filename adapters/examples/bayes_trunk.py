"""The lower layers of the base, computed once per text, and the upper ones, which adapters in training are at.

The prompt's shared prefix goes through the upper layers once per draw of the weights, not once per text: sequences of
one draw share its keys and values (see encode.py).
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bayes_data import FOREIGN, MAX_TOKENS, Question
from encode import Encoder
from sources import Rows
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

BATCH = 50
FOREIGN_TEXTS = 50  # of each set that a question is not about


@dataclass(frozen=True)
class Texts:
    """Hidden states below the adapted layers. prefix [1, P, d]; each of suffixes [T, d]; answers: indices of labels, -1
    where there is none; labels: their tokens."""

    prefix: torch.Tensor
    suffixes: list[torch.Tensor]
    answers: torch.Tensor
    labels: torch.Tensor


class _Skipped(torch.nn.Module):
    """Stands for a decoder layer, so that the others keep their names."""

    def forward(self, hidden: torch.Tensor, **_: Any) -> torch.Tensor:
        return hidden


class _LastLayer(torch.nn.Module):
    """A Llama layer that computes nothing but keys and values of positions that nobody reads.

    `rows` [N, P]: the positions of each sequence that are read, counted from the end of the prefix; None: none.
    """

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.self_attn, self.mlp = layer.self_attn, layer.mlp
        self.input_layernorm, self.post_attention_layernorm = layer.input_layernorm, layer.post_attention_layernorm
        self.rows: torch.Tensor | None = None

    def forward(
        self, hidden: torch.Tensor, *, position_embeddings: Any, past_key_values: Any, **_: Any
    ) -> torch.Tensor:
        attention = self.self_attn
        normal = self.input_layernorm(hidden)
        k, v = (_heads(layer(normal), attention.head_dim) for layer in (attention.k_proj, attention.v_proj))
        cos, sin = position_embeddings
        k, _ = apply_rotary_pos_emb(k, k, cos, sin)
        k, v = past_key_values.update(k, v, attention.layer_idx)
        if self.rows is None:
            return hidden
        sequences = torch.arange(len(hidden))[:, None]
        q = _heads(attention.q_proj(normal[sequences, self.rows]), attention.head_dim)
        cos, sin = (part.expand(len(hidden), -1, -1)[sequences, self.rows] for part in (cos, sin))
        q, _ = apply_rotary_pos_emb(q, q, cos, sin)
        seen = torch.arange(k.shape[2]) <= (k.shape[2] - hidden.shape[1] + self.rows)[..., None]  # [N, P, keys]
        mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v, seen[:, None], enable_gqa=True)
        out = hidden[sequences, self.rows] + attention.o_proj(mixed.transpose(1, 2).flatten(2))
        end: torch.Tensor = out + self.mlp(self.post_attention_layernorm(out))
        return end


def _heads(x: torch.Tensor, width: int) -> torch.Tensor:
    return x.unflatten(-1, (-1, width)).transpose(1, 2)


class Trunk:
    """`model` is the upper part, from layer `first` on: it takes hidden states."""

    def __init__(self, base: str, first: int, cache: Path) -> None:
        self.first, self._cache = first, cache
        self._base = base
        self.tokenizer: Any = AutoTokenizer.from_pretrained(base)
        self.model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).requires_grad_(False).eval()
        self._lower: Any = None
        layers = self.model.model.layers
        for i in range(first):
            layers[i] = _Skipped()
        for layer in layers[first:]:
            layer.self_attn.layer_idx -= first
        self._last = layers[-1] = _LastLayer(layers[-1])

    @property
    def modules(self) -> list[str]:
        """The linear layers that are adapted."""
        names = ("q_proj", "v_proj", "o_proj")
        layers = range(self.first, len(self.model.model.layers))
        return [f"model.layers.{i}.self_attn.{name}" for i in layers for name in names]

    def texts(self, question: Question, rows: Rows, *, answered: bool = False) -> Texts:
        """Hidden states of the question's prompts, with the answers behind them if `answered`.

        From the cache folder if they were made before.
        """
        encoder: Any = Encoder.create(self.tokenizer, question)  # type: ignore[arg-type]
        tokens = [int(self.tokenizer.encode(label, add_special_tokens=False)[0]) for label in question.labels]
        ids = [encoder.suffix(encoder.cut(text, MAX_TOKENS)) for text, _ in rows]
        answers = [question.labels.index(label) if label in question.labels else -1 for _, label in rows]
        if answered:
            ids = [[*one, tokens[answer]] for one, answer in zip(ids, answers, strict=True)]
        name = hashlib.sha256(json.dumps([self.first, encoder.prefix, ids]).encode()).hexdigest()[:16]
        path = self._cache / f"hidden-{name}.pt"
        if not path.exists():
            self._cache.mkdir(parents=True, exist_ok=True)
            torch.save(self._hidden(encoder.prefix, ids), path)
        prefix, suffixes = torch.load(path)
        return Texts(prefix, suffixes, torch.tensor(answers), torch.tensor(tokens))

    @torch.inference_mode()
    def _hidden(self, prefix: Sequence[int], suffixes: list[list[int]]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        if self._lower is None:
            self._lower = AutoModelForCausalLM.from_pretrained(self._base, dtype=torch.float32).model.eval()
            self._lower.layers = self._lower.layers[: self.first]
            self._lower.config.num_hidden_layers = self.first
            self._lower.norm = torch.nn.Identity()
        found: list[torch.Tensor] = [torch.empty(0)] * len(suffixes)
        order = sorted(range(len(suffixes)), key=lambda i: len(suffixes[i]))
        first = self._lower(input_ids=torch.tensor([prefix])).last_hidden_state
        for start in range(0, len(order), BATCH):
            batch = order[start : start + BATCH]
            cache = DynamicCache()
            self._lower(input_ids=torch.tensor([prefix]), past_key_values=cache, use_cache=True)
            cache.batch_repeat_interleave(len(batch))
            ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(suffixes[i]) for i in batch], batch_first=True)
            hidden = self._lower(input_ids=ids, past_key_values=cache, use_cache=True).last_hidden_state
            for row, i in enumerate(batch):
                found[i] = hidden[row, : len(suffixes[i])].clone()
        return first.clone(), found

    def ends(self, texts: Texts, batch: Sequence[int], draws: int, positions: int = 1) -> torch.Tensor:
        """Last hidden states [N, positions, d] of some texts, the first N/draws of them under the first draw."""
        cache = DynamicCache()
        upper = self.model.model
        self._last.rows = None
        upper(inputs_embeds=texts.prefix.expand(draws, -1, -1), past_key_values=cache, use_cache=True)
        cache.batch_repeat_interleave(len(batch) // draws)
        # Padding is on the right, where nothing that counts attends to it.
        parts = [texts.suffixes[i] for i in batch]
        padded = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)
        self._last.rows = torch.tensor([range(len(part) - positions, len(part)) for part in parts])
        hidden: torch.Tensor = upper(inputs_embeds=padded, past_key_values=cache, use_cache=True).last_hidden_state
        return hidden

    def logits(self, texts: Texts, batch: Sequence[int], draws: int) -> torch.Tensor:
        """Logits of the labels [N, K] after some prompts."""
        head: torch.Tensor = self.model.lm_head.weight[texts.labels]
        return self.ends(texts, batch, draws)[:, 0] @ head.T

    def written_loss(self, texts: Texts, batch: Sequence[int], draws: int) -> torch.Tensor:
        """Mean over `answered` texts of −log p(answer, end of turn | prompt), among all tokens."""
        logits = self.model.lm_head(self.ends(texts, batch, draws, 2))
        answers = texts.labels[texts.answers[list(batch)]]
        targets = torch.stack([answers, torch.full_like(answers, self.tokenizer.eos_token_id)], 1)
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()) * 2

    def loss(self, texts: Texts, batch: Sequence[int], draws: int) -> torch.Tensor:
        """Mean over texts of −log P(answer | prompt) among the labels."""
        return torch.nn.functional.cross_entropy(self.logits(texts, batch, draws), texts.answers[list(batch)])

    @torch.inference_mode()
    def log_probabilities(self, texts: Texts) -> torch.Tensor:
        """log P(label | prompt), of the labels alone, [N, K] float64: what `decide` reads."""
        order = sorted(range(len(texts.suffixes)), key=lambda i: len(texts.suffixes[i]))
        found = torch.empty(len(order), len(texts.labels), dtype=torch.float64)
        for start in range(0, len(order), BATCH):
            batch = order[start : start + BATCH]
            found[batch] = torch.log_softmax(self.logits(texts, batch, 1).double(), -1)
        return found


@dataclass(frozen=True)
class Split:
    """Of a question: to train on, to choose hyperparameters and the temperature by, to report; and foreign texts."""

    train: Texts
    validation: Texts
    test: Texts
    foreign: Texts


def split(trunk: Trunk, question: Question, archives: Path, train: int, validation: int, test: int) -> Split:
    """Test texts are the first of the set, so that they are the same however many the others are."""
    reported, chosen, learned = question.parts(archives, test, validation, train)
    foreign = [(text, "") for other in FOREIGN[question.name] for text, _ in other.rows(archives)[-FOREIGN_TEXTS:]]
    return Split(
        trunk.texts(question, learned),
        trunk.texts(question, chosen),
        trunk.texts(question, reported),
        trunk.texts(question, foreign),
    )
