"""Half precision on a CPU: products in float32 where it has no instructions for it, with the same results."""

import pytest
import torch
import torch.nn.functional as F

from mmdit_lib.engine import capability
from mmdit_lib.engine.attention import attention
from mmdit_lib.engine.linears import linear, linear_gelu


@pytest.fixture(params=[True, False], ids=["in float32", "in half precision"])
def ways(request, monkeypatch):
    monkeypatch.setattr(capability, "SLOW_ON_CPU", {torch.bfloat16, torch.float16} if request.param else frozenset())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_linear_layer_rounds_once(ways, dtype):
    """Small integers: every sum is exact in float32, and most are not representable in bfloat16."""
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randint(-9, 10, size, generator=generator) for size in ((2, 5, 64), (1, 7, 64), (1, 1, 7)))
    exact = F.linear(x.double(), weight[0].double(), bias.flatten().double() / 8)
    x, weight, bias = x.to(dtype), weight.to(dtype), bias.to(dtype) / 8
    assert torch.equal(linear(x, weight, bias), exact.to(dtype))
    assert not torch.equal(exact.to(torch.bfloat16).double(), exact)
    tokens_first = x.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(linear(tokens_first, weight, bias), exact.to(dtype))
    assert torch.equal(linear_gelu(x, weight, bias), F.gelu(exact.to(dtype), approximate="tanh"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attention(ways, dtype):
    """One rounding of the result, and one of the weights of the values where they are kept in half precision."""
    q, k, v = torch.randn(3, 2, 4, 33, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), scale=0.25)
    found = attention(q, k, v, 0.25)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), exact, rtol=torch.finfo(dtype).eps, atol=2 * torch.finfo(dtype).eps)


def test_only_on_a_cpu_and_only_in_half_precision(monkeypatch):
    monkeypatch.setattr(capability, "SLOW_ON_CPU", {torch.bfloat16})
    assert capability.slow_on_cpu(torch.zeros(1, dtype=torch.bfloat16))
    for other in (torch.zeros(1), torch.zeros(1, dtype=torch.bfloat16, device="meta")):
        assert not capability.slow_on_cpu(other)
