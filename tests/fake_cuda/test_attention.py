"""Which attention kernel torch's own checks allow, and which is chosen, on each kind of GPU."""

from __future__ import annotations

import pytest
import torch

from diffsynth.models.wan.text_encoder import TextEncoderConfig, TextEncoderLayer, relative_buckets
from diffsynth.ops import attention
from diffsynth.ops.attention_kernels import torch_takes
from tests.fake_cuda.gpus import on_gpu

CUDA = torch.device("cuda", 0)
# bfloat16 heads of 128, as of a 14B DiT: without a bias, and with the bias of a padded prompt
CHOSEN = {75: ("chunked", "chunked"), 80: ("sdpa", "sdpa_efficient"), 90: ("sdpa_cudnn", "sdpa_efficient")}
GPUS = [90, *(on_gpu(capability=cc) for cc in (75, 80, 89, 100, 120))]


@pytest.mark.parametrize("capability", GPUS)
@pytest.mark.parametrize("is_training", [False, True])
def test_the_choice_on_each_gpu(capability: int, is_training: bool) -> None:
    plain, biased = CHOSEN.get(capability, CHOSEN[80])
    q = torch.empty(1, 3276, 4, 128, device=CUDA, dtype=torch.bfloat16, requires_grad=is_training)
    k = torch.empty(1, 32, 4, 128, device=CUDA, dtype=torch.bfloat16)
    bias = torch.zeros(1, 1, 1, 32, device=CUDA, dtype=torch.bfloat16)
    assert attention._automatic(q, q, q, None).name == plain
    assert attention._automatic(q, k, k, bias).name == biased
    out = attention.attend(q, k, k, bias=bias)
    if is_training:
        out.sum().backward()


@pytest.mark.parametrize("num_tokens", [13, 512])
@pytest.mark.parametrize("is_padded", [False, True])
def test_attention_of_the_text_encoder_is_fused(num_tokens: int, is_padded: bool, monkeypatch) -> None:
    config = TextEncoderConfig(dim=128, dim_attn=128, dim_ffn=64, num_heads=2, num_layers=1)
    layer = TextEncoderLayer(config).to(CUDA, torch.bfloat16)
    fits = []

    def noted(q, k, v, *, bias, scale):
        fits.append(torch_takes(q, k, v, bias))
        return attention.attend(q, k, v, bias=bias, scale=scale)

    monkeypatch.setattr("diffsynth.models.wan.text_encoder.attend", noted)
    mask = torch.zeros(1, 1, 1, num_tokens, device=CUDA, dtype=torch.bfloat16) if is_padded else None
    with torch.no_grad():
        layer(
            torch.empty(1, num_tokens, 128, device=CUDA, dtype=torch.bfloat16),
            relative_buckets(num_tokens, config.num_buckets).to(CUDA),
            mask,
        )
    assert fits == [True]
