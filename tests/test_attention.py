"""Which attention runs where; on a Hopper GPU, FlashAttention-3 against float64."""

import sys

import pytest
import torch
import torch.nn.functional as F
from helpers import case

from mmdit_lib.engine import attention as module
from mmdit_lib.engine import pytorch_backend
from mmdit_lib.engine.attention import attention, has_flash_attention_3

CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def forgotten():
    has_flash_attention_3.cache_clear()
    yield
    has_flash_attention_3.cache_clear()


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(module, "find_spec", lambda name: name)


def test_only_on_hopper(monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    assert not has_flash_attention_3(CUDA)
    assert not has_flash_attention_3(torch.device("cpu"))


def test_without_the_package(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setitem(sys.modules, "fa3_fwd", None)
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    assert not has_flash_attention_3(CUDA)


def test_a_package_for_another_torch(hopper, monkeypatch):
    monkeypatch.setitem(sys.modules, "fa3_fwd", None)  # importing it fails
    with pytest.raises(
        ImportError, match=r"fa3-fwd is installed but does not load with torch .*: install the version for it"
    ):
        has_flash_attention_3(CUDA)


def test_such_a_package_is_refused_when_an_engine_that_needs_it_is_opened(monkeypatch):
    def refuse(device):
        raise ImportError("fa3-fwd is installed but does not load")

    monkeypatch.setattr(pytorch_backend, "has_flash_attention_3", refuse)
    with pytest.raises(ImportError, match="fa3-fwd is installed but does not load"):
        case("sd3.5-medium").open("bfloat16")
    case("sd3.5-medium").open("float16")


@pytest.mark.parametrize(
    ("dtype", "size", "takes"),
    [
        (torch.bfloat16, 64, True),
        (torch.bfloat16, 256, True),
        (torch.bfloat16, 8, False),
        (torch.bfloat16, 272, False),
        (torch.float8_e4m3fn, 64, True),
        (torch.float16, 64, False),
        (torch.float32, 64, False),
    ],
)
def test_what_it_supports(dtype, size, takes):
    assert module._supports(torch.empty(1, 2, 3, size, dtype=dtype)) is takes


def test_compiled_code_does_not_look_for_the_package(monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.setattr(module, "has_flash_attention_3", None)  # a call would fail
    q = torch.ones(1, 2, 3, 16, dtype=torch.bfloat16)
    assert torch.equal(attention(q, q, q, 0.25), q)


def parts(order: str, batch: int, heads: int, tokens: int, size: int) -> list[torch.Tensor]:
    """Queries, keys and values [batch, heads, tokens, size], stored in one of the orders that the network has."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, tokens, 3 * heads * size, generator=generator, dtype=torch.float64).bfloat16()
    if order == "tokens first":
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    return [part.unflatten(-1, (heads, size)).transpose(1, 2) for part in x.to(CUDA).chunk(3, -1)]


@pytest.mark.gpu
@pytest.mark.parametrize("order", ["batch first", "tokens first"])
@pytest.mark.parametrize("shape", [(2, 24, 4429, 64), (1, 3, 77, 16), (3, 5, 300, 32)], ids=str)
def test_flash_attention_3(order, shape):
    """No further from float64 than PyTorch's kernel, but for a tenth: both round probabilities to bfloat16."""
    if not has_flash_attention_3(CUDA):
        pytest.skip("needs a Hopper GPU and fa3-fwd")
    q, k, v = parts(order, *shape)
    scale = shape[-1] ** -0.5
    exact = F.scaled_dot_product_attention(*(x[:, :2].double() for x in (q, k, v)), scale=scale)
    found, usual = attention(q, k, v, scale), F.scaled_dot_product_attention(q, k, v, scale=scale)
    assert found.shape == q.shape and found.permute(2, 0, 1, 3).is_contiguous()
    error, limit = (((x[:, :2].double() - exact).norm() / exact.norm()).item() for x in (found, usual))
    assert error <= 1.1 * limit
    assert torch.equal(found, attention(q, k, v, scale))  # the same every time
