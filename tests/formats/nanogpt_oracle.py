"""nanoGPT's model in its own shapes and names, written from its description, and checkpoints as it leaves them.

Independent of the code under test: plain linear layers, no Hugging Face.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CONFIG = {"dataset": "letters", "learning_rate": 1e-3, "weight_decay": 0.05, "beta2": 0.99, "compile": True, "seed": 7}


class NanoGPT(nn.Module):
    """Every weight random, biases and norms too, so that none is where it could be left out unseen."""

    def __init__(
        self, bias: bool, *, vocab: int = 50, width: int = 16, heads: int = 4, layers: int = 3, block: int = 12
    ) -> None:
        super().__init__()
        self.args = {"n_layer": layers, "n_head": heads, "n_embd": width, "block_size": block}
        self.args |= {"bias": bias, "vocab_size": vocab, "dropout": 0.1}
        self.heads = heads

        def linear(d_in: int, d_out: int) -> nn.Linear:
            return nn.Linear(d_in, d_out, bias=bias)

        def block_of_layers() -> nn.ModuleDict:
            return nn.ModuleDict(
                {
                    "ln_1": nn.LayerNorm(width, bias=bias),
                    "attn": nn.ModuleDict({"c_attn": linear(width, 3 * width), "c_proj": linear(width, width)}),
                    "ln_2": nn.LayerNorm(width, bias=bias),
                    "mlp": nn.ModuleDict({"c_fc": linear(width, 4 * width), "c_proj": linear(4 * width, width)}),
                }
            )

        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(vocab, width),
                "wpe": nn.Embedding(block, width),
                "h": nn.ModuleList(block_of_layers() for _ in range(layers)),
                "ln_f": nn.LayerNorm(width, bias=bias),
            }
        )
        self.lm_head = nn.Linear(width, vocab, bias=False)
        self.lm_head.weight = self.transformer["wte"].weight
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in self.parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(noise * 0.3 if parameter.ndim > 1 else 0.7 + 0.3 * noise)

    @torch.no_grad()
    def forward(self, tokens: Tensor, tanh: bool = False) -> Tensor:
        """Logits [B T vocab]."""
        parts: Any = self.transformer
        x = parts.wte(tokens) + parts.wpe.weight[: tokens.shape[1]]
        for layer in parts.h:
            qkv = layer.attn.c_attn(layer.ln_1(x)).chunk(3, dim=-1)
            q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in qkv)
            z = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
            x = x + layer.attn.c_proj(z)
            act = F.gelu(layer.mlp.c_fc(layer.ln_2(x)), approximate="tanh" if tanh else "none")
            x = x + layer.mlp.c_proj(act)
        return self.lm_head(parts.ln_f(x))

    def laid_out_as_gpt2(self) -> NanoGPT:
        """The same weights, in memory as GPT-2 has them: products then sum in its order, to the last bit."""
        for layer in self.transformer["h"]:  # type: ignore[union-attr]
            for module in layer.modules():
                if isinstance(module, nn.Linear):
                    module.weight.data = module.weight.data.t().contiguous().t()
        return self

    def groups(self) -> torch.optim.AdamW:
        """nanoGPT's optimiser."""
        matrices = [p for p in self.parameters() if p.dim() >= 2]
        vectors = [p for p in self.parameters() if p.dim() < 2]
        return torch.optim.AdamW(
            [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}], lr=6e-4
        )

    def stepped(self) -> torch.optim.AdamW:
        """The same with moments, after a step of a copy of the model."""
        model = copy.deepcopy(self)
        optimizer = model.groups()
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        return optimizer


def checkpoint(model: NanoGPT, *, prefix: str = "", masks: bool = False) -> dict[str, Any]:
    """What train.py saves after update 1,000."""
    state = dict(model.state_dict())
    if masks:
        block = model.args["block_size"]
        for i in range(model.args["n_layer"]):
            state[f"transformer.h.{i}.attn.bias"] = torch.ones(block, block).tril().view(1, 1, block, block)
            state[f"transformer.h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    return {
        "model": {prefix + name: value for name, value in state.items()},
        "optimizer": model.stepped().state_dict(),
        "model_args": dict(model.args),
        "iter_num": 1000,
        "best_val_loss": torch.tensor(1.4697),
        "config": dict(CONFIG),
    }


def saved(path: Path, data: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(data, path)
    return path


def tokens_for(model: NanoGPT) -> Tensor:
    shape = (3, model.args["block_size"])
    return torch.randint(model.args["vocab_size"], shape, generator=torch.Generator().manual_seed(1))
