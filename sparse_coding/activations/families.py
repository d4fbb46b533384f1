"""Where the sites with names of transformer-lens lie, in each family of models: one table a family.

What its `TransformerBridge` means by a name where models differ:
- gated MLPs (Llama): `mlp.hook_pre` is the gate before its activation function, `mlp.hook_pre_linear` the other factor,
  `mlp.hook_post` the product that goes into the down projection.
- attention beside the MLP (Pythia): there is no `hook_resid_mid`.
- LayerNorm behind each half (BERT): `hook_embed` is all embeddings after their LayerNorm, `hook_attn_out` the residual
  stream after the attention's LayerNorm, `hook_resid_mid` the sum before the block's last LayerNorm, `hook_resid_post`
  the output of that LayerNorm.
- `attn.hook_z` (and `hook_q|k|v` where a module gives them) has the heads side by side: width n_heads * d_head.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Side = Literal["in", "out"]
Place = tuple[str, Side]


@dataclass(frozen=True)
class Family:
    """Models whose blocks have the same modules. `""` is the block itself; a site with no module is left out."""

    name: str
    blocks: str  # the list of blocks, below the model's base
    needs: tuple[str, ...]  # modules by which the family is known
    base_sites: Mapping[str, Place]
    block_sites: Mapping[str, Place]
    lacks: tuple[str, ...] = ()  # modules with which these names would mean something else
    bypassed: frozenset[str] = field(default_factory=lambda: frozenset({"hook_resid_mid"}))
    """Inputs of a norm that also go on beside it, in the residual stream."""


FAMILIES = (
    Family(
        "GPT-2",
        "h",
        needs=("ln_1", "ln_2", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
        lacks=("crossattention",),
        base_sites={"hook_embed": ("wte", "out"), "ln_final.hook_out": ("ln_f", "out")},
        block_sites={
            "hook_resid_pre": ("", "in"),
            "ln1.hook_out": ("ln_1", "out"),
            "attn.hook_z": ("attn.c_proj", "in"),
            "hook_attn_out": ("attn.c_proj", "out"),
            "hook_resid_mid": ("ln_2", "in"),
            "ln2.hook_out": ("ln_2", "out"),
            "mlp.hook_pre": ("mlp.c_fc", "out"),
            "mlp.hook_post": ("mlp.c_proj", "in"),
            "hook_mlp_out": ("mlp.c_proj", "out"),
            "hook_resid_post": ("", "out"),
        },
    ),
    Family(
        "GPT-Neo",
        "h",
        needs=("ln_1", "ln_2", "attn.attention.out_proj", "mlp.c_fc", "mlp.c_proj"),
        base_sites={"hook_embed": ("wte", "out"), "ln_final.hook_out": ("ln_f", "out")},
        block_sites={
            "hook_resid_pre": ("", "in"),
            "ln1.hook_out": ("ln_1", "out"),
            "attn.hook_q": ("attn.attention.q_proj", "out"),
            "attn.hook_k": ("attn.attention.k_proj", "out"),
            "attn.hook_v": ("attn.attention.v_proj", "out"),
            "attn.hook_z": ("attn.attention.out_proj", "in"),
            "hook_attn_out": ("attn.attention.out_proj", "out"),
            "hook_resid_mid": ("ln_2", "in"),
            "ln2.hook_out": ("ln_2", "out"),
            "mlp.hook_pre": ("mlp.c_fc", "out"),
            "mlp.hook_post": ("mlp.c_proj", "in"),
            "hook_mlp_out": ("mlp.c_proj", "out"),
            "hook_resid_post": ("", "out"),
        },
    ),
    Family(
        "GPT-NeoX",
        "layers",
        needs=("input_layernorm", "post_attention_layernorm", "attention.dense", "mlp.dense_4h_to_h"),
        base_sites={"hook_embed": ("embed_in", "out"), "ln_final.hook_out": ("final_layer_norm", "out")},
        block_sites={
            "hook_resid_pre": ("", "in"),
            "ln1.hook_out": ("input_layernorm", "out"),
            "attn.hook_z": ("attention.dense", "in"),
            "hook_attn_out": ("attention.dense", "out"),
            "hook_resid_mid": ("post_attention_layernorm", "in"),
            "ln2.hook_out": ("post_attention_layernorm", "out"),
            "mlp.hook_pre": ("mlp.dense_h_to_4h", "out"),
            "mlp.hook_post": ("mlp.dense_4h_to_h", "in"),
            "hook_mlp_out": ("mlp.dense_4h_to_h", "out"),
            "hook_resid_post": ("", "out"),
        },
    ),
    Family(
        "Llama",
        "layers",
        needs=("input_layernorm", "post_attention_layernorm", "self_attn.o_proj", "mlp.down_proj"),
        # Gemma 2 and 3, OLMo 2 and GLM 4 have norms behind the halves: there these modules lie elsewhere.
        lacks=(
            "pre_feedforward_layernorm",
            "post_feedforward_layernorm",
            "post_self_attn_layernorm",
            "post_mlp_layernorm",
        ),
        base_sites={"hook_embed": ("embed_tokens", "out"), "ln_final.hook_out": ("norm", "out")},
        block_sites={
            "hook_resid_pre": ("", "in"),
            "ln1.hook_out": ("input_layernorm", "out"),
            "attn.hook_q": ("self_attn.q_proj", "out"),
            "attn.hook_k": ("self_attn.k_proj", "out"),
            "attn.hook_v": ("self_attn.v_proj", "out"),
            "attn.hook_z": ("self_attn.o_proj", "in"),
            "hook_attn_out": ("self_attn.o_proj", "out"),
            "hook_resid_mid": ("post_attention_layernorm", "in"),
            "ln2.hook_out": ("post_attention_layernorm", "out"),
            "mlp.hook_pre": ("mlp.gate_proj", "out"),
            "mlp.hook_pre_linear": ("mlp.up_proj", "out"),
            "mlp.hook_post": ("mlp.down_proj", "in"),
            "hook_mlp_out": ("mlp.down_proj", "out"),
            "hook_resid_post": ("", "out"),
        },
    ),
    Family(
        "BERT",
        "encoder.layer",
        needs=("attention.output.LayerNorm", "attention.output.dense", "intermediate.dense", "output.LayerNorm"),
        base_sites={"hook_embed": ("embeddings.LayerNorm", "out")},
        block_sites={
            "hook_resid_pre": ("", "in"),
            "attn.hook_q": ("attention.self.query", "out"),
            "attn.hook_k": ("attention.self.key", "out"),
            "attn.hook_v": ("attention.self.value", "out"),
            "attn.hook_z": ("attention.output.dense", "in"),
            "hook_attn_out": ("attention.output.LayerNorm", "out"),
            "mlp.hook_pre": ("intermediate.dense", "out"),
            "mlp.hook_post": ("output.dense", "in"),
            "hook_mlp_out": ("output.dense", "out"),
            "hook_resid_mid": ("output.LayerNorm", "in"),
            "hook_resid_post": ("output.LayerNorm", "out"),
        },
        bypassed=frozenset(),
    ),
)  # fmt: skip

ALIASES = {
    "hook_in": "hook_resid_pre",
    "hook_out": "hook_resid_post",
    "attn.hook_out": "hook_attn_out",
    "mlp.hook_out": "hook_mlp_out",
}
"""Names the Bridge also has; they resolve but are not listed."""

LOCATIONS = {
    "mlp": "mlp.hook_post",
    "mlp_in": "ln2.hook_out",
    "mlp_out": "hook_mlp_out",
    "attn": "attn.hook_z",
    "attn_out": "hook_attn_out",
    "resid_pre": "hook_resid_pre",
    "resid_mid": "hook_resid_mid",
    "resid_post": "hook_resid_post",
}
"""Short words for the usual sites of a block."""
