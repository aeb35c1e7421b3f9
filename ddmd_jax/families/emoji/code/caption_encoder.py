"""The text encoder of ddmd_jax's embedded teacher (Apache-2.0)."""

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn
from torch.nn import functional as F


class CaptionLayer(nn.Module):
    """Pre-normed attention and a two-layer GELU network."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.norm_attn, self.norm_ffn = nn.RMSNorm(dim, eps=1e-5), nn.RMSNorm(dim, eps=1e-5)
        self.to_qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.to_out = nn.Linear(dim, dim, bias=False)
        self.linear_1 = nn.Linear(dim, 4 * dim, bias=False)
        self.linear_2 = nn.Linear(4 * dim, dim, bias=False)

    def forward(self, x, mask):
        heads = lambda y: y.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        q, k, v = map(heads, self.to_qkv(self.norm_attn(x)).chunk(3, dim=-1))
        attn = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :])
        x = x + self.to_out(attn.transpose(1, 2).flatten(2))
        return x + self.linear_2(F.gelu(self.linear_1(self.norm_ffn(x)), approximate='tanh'))


class CaptionEncoder(ModelMixin, ConfigMixin):
    """``(ids [B, L], mask [B, L] bool) -> states [B, L, dim]``."""

    @register_to_config
    def __init__(self, vocab_size=64, max_length=16, dim=128, num_layers=2, num_heads=4):
        super().__init__()
        self.token = nn.Embedding(vocab_size, dim)
        self.position = nn.Parameter(torch.zeros(max_length, dim))
        self.layers = nn.ModuleList(CaptionLayer(dim, num_heads) for _ in range(num_layers))
        self.norm = nn.RMSNorm(dim, eps=1e-5)

    def forward(self, ids, mask):
        x = self.token(ids) + self.position[: ids.shape[1]]
        for layer in self.layers:
            x = layer(x, mask)
        return self.norm(x)
