"""How cuBLASLt is called: against its headers if these are installed, and with a cuBLASLt in Python.

On FP8 tensor cores, tests/test_kernels.py checks the results of the real one.
"""

import ctypes
import importlib.util
import re
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mmdit_lib.checkpoint.quantization import rounded
from mmdit_lib.engine import cublaslt

HANDLE, STREAM = 7, 9
SIZES = {3: 4, 4: 4, 7: 4, 8: 8, 17: 8, 18: 8, 20: 8, 25: 1, 26: 4}
"""Bytes of each attribute of a product, as cuBLASLt 13.1 reports them."""
DTYPES = {0: torch.float32, 2: torch.float16, 14: torch.bfloat16, 28: torch.float8_e4m3fn}


class CuBLASLt:
    """Its functions as documented, in memory of the CPU. `status`: what the product returns."""

    def __init__(self, algorithms: int = 1, status: int = 0):
        self.made, self.calls, self.found, self.status = {}, Counter(), algorithms, status

    def _new(self, into, value) -> int:
        into._obj.value = len(self.made) + 1
        self.made[len(self.made) + 1] = value
        return 0

    def cublasLtMatmulDescCreate(self, into, compute, scale):
        assert (compute, scale) == (68, 0)
        return self._new(into, {})

    def cublasLtMatrixLayoutCreate(self, into, *layout):
        return self._new(into, layout)

    def cublasLtMatmulPreferenceCreate(self, into):
        return self._new(into, {})

    def cublasLtMatmulDescSetAttribute(self, descriptor, attribute, value, size):
        assert size == ctypes.sizeof(value._obj) == SIZES[attribute]
        self.made[descriptor.value][attribute] = value._obj.value
        return 0

    def cublasLtMatmulPreferenceSetAttribute(self, descriptor, attribute, value, size):
        assert (attribute, value._obj.value, size) == (1, 32 << 20, 8)
        return 0

    def cublasLtMatmulPreferenceDestroy(self, descriptor):
        return 0

    def cublasLtMatmulAlgoGetHeuristic(self, handle, operation, a, b, c, d, preference, count, results, found):
        assert handle == HANDLE and self.made[operation.value][8], "the bias's address is a part of the question"
        found._obj.value = min(self.found, count)
        for result in results[: found._obj.value]:
            result.workspaceSize = 1 << 10
        self.calls["heuristic"] += 1
        return 0 if self.found else 15

    def cublasLtMatmul(
        self, handle, operation, alpha, a, of_a, b, of_b, beta, c, of_c, d, of_d, algo, workspace, size, stream
    ):
        assert (handle, stream, alpha._obj.value, beta._obj.value, c) == (HANDLE, STREAM, 1.0, 0.0, None)
        assert isinstance(algo._obj, cublaslt.MatmulAlgo) and workspace and size == 1 << 10
        self.calls["product"] += 1
        options = self.made[operation.value]
        assert options[7] == 36 and options[25] == 1 and self.made[of_c.value][0] == options[26]
        a, b, d = (self._matrix(at, layout) for at, layout in ((a, of_a), (b, of_b), (d, of_d)))
        a, b = (x.double().T if options[key] else x.double() for x, key in ((a, 3), (b, 4)))
        scales = [ctypes.c_float.from_address(options[key]).value for key in (17, 18, 20)]
        bias = memory(options[8], DTYPES[options[26]], len(d)).double()
        value = torch.nn.functional.gelu(a @ b * scales[0] * scales[1] + bias[:, None], approximate="tanh")
        d.copy_((value * scales[2]).clamp(-448, 448).to(d.dtype))
        return self.status

    def _matrix(self, address, layout):
        """By columns."""
        kind, rows, columns, step = self.made[layout.value]
        return memory(address, DTYPES[kind], step * columns).as_strided((rows, columns), (1, step))


def memory(address: int, dtype: torch.dtype, count: int) -> torch.Tensor:
    return torch.frombuffer((ctypes.c_uint8 * (count * dtype.itemsize)).from_address(address), dtype=dtype)


def aligned(x: torch.Tensor) -> torch.Tensor:
    """A copy as a GPU's allocator would place it."""
    raw = torch.empty(x.nbytes + cublaslt.ALIGNMENT, dtype=torch.uint8)
    start = -raw.data_ptr() % cublaslt.ALIGNMENT
    return raw[start : start + x.nbytes].view(x.dtype).view(x.shape).copy_(x)


def arguments(m: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Small integers with scales that are powers of two: every sum is exact."""
    generator = torch.Generator().manual_seed(m)
    x, weight = (torch.randint(-4, 5, (n, 48), generator=generator).to(torch.float8_e4m3fn) for n in (m, 32))
    bias = torch.randint(-9, 9, (32,), generator=generator).to(dtype)
    return [*map(aligned, (x, weight)), torch.tensor(2.0**-2), torch.tensor(2.0**-3), aligned(bias), torch.tensor(8.0)]


@pytest.fixture
def install(monkeypatch):
    """Make one the cuBLASLt of torch, and CPU tensors like those of a GPU."""
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_blas_handle", lambda: HANDLE)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=STREAM))

    def installed(fake: CuBLASLt) -> CuBLASLt:
        cublaslt.gemm.cache_clear()
        monkeypatch.setattr(cublaslt, "library", lambda: fake)
        return fake

    yield installed
    cublaslt.gemm.cache_clear()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_it_is_called_for_the_right_product(install, dtype):
    fake = install(CuBLASLt())
    for m in (5, 16, 5):
        x, weight, x_scale, weight_scale, bias, inverse = given = arguments(m, dtype)
        found = cublaslt.fp8_linear_gelu(*given)
        exact = x.double() @ weight.double().T * x_scale.double() * weight_scale.double() + bias.double()
        expected = rounded(torch.nn.functional.gelu(exact, approximate="tanh"), 1 / inverse.double())
        assert found.dtype == torch.float8_e4m3fn and torch.equal(found.float(), expected.float())
    assert fake.calls == {"heuristic": 2, "product": 3}, "one search for each shape"


def test_what_it_cannot_compute(install, monkeypatch):
    given = arguments(5, torch.bfloat16)
    for fake, calls in (
        (CuBLASLt(algorithms=0), {"heuristic": 1}),
        (CuBLASLt(status=15), {"heuristic": 1, "product": 1}),
    ):
        install(fake)
        assert cublaslt.fp8_linear_gelu(*given) is None is cublaslt.fp8_linear_gelu(*given)
        assert fake.calls == calls, "found out once for a shape"
    install(CuBLASLt(status=13))
    with pytest.raises(RuntimeError, match="cublasLtMatmul returned status 13"):
        cublaslt.fp8_linear_gelu(*given)
    fake = install(CuBLASLt())
    misaligned = [aligned(torch.cat([given[0], given[0]]))[1:6], *given[1:]]
    assert cublaslt.fp8_linear_gelu(*misaligned) is None and not fake.calls
    monkeypatch.setattr(cublaslt, "library", lambda: None)
    assert cublaslt.fp8_linear_gelu(*given) is None


def test_without_its_library(monkeypatch):
    for version in (None, "99.0"):
        monkeypatch.setattr(torch.version, "cuda", version)
        assert cublaslt.library.__wrapped__() is None


def test_sizes_of_structures():
    """Printed by a C program that includes cublasLt.h of CUDA 13.1."""
    result = cublaslt.HeuristicResult
    assert (ctypes.sizeof(result), ctypes.sizeof(cublaslt.MatmulAlgo)) == (96, 64)
    assert [getattr(result, name).offset for name in ("algo", "workspaceSize", "state", "wavesCount")] == [
        0,
        64,
        72,
        76,
    ]
    assert ctypes.sizeof(ctypes.c_int) == 4, "of an enum"


def test_values_of_constants():
    spec = importlib.util.find_spec("nvidia")
    folders = [Path(folder) for folder in spec.submodule_search_locations] if spec else []
    files = {file.name: file for folder in folders for file in folder.rglob("*.h")}
    wanted = [files[name] for name in ("cublasLt.h", "cublas_api.h", "library_types.h") if name in files]
    if len(wanted) < 3:
        pytest.skip("needs NVIDIA's headers, as torch for CUDA installs them")
    text = "\n".join(file.read_text() for file in wanted)
    said = dict(re.findall(r"\b(CU[A-Z]+_\w+) *= *([^,\n]+),", text))
    numbers = {name: int(value) for name, value in said.items() if value.isdigit()}
    ours = {name: value for name, value in vars(cublaslt).items() if re.match("CUBLAS|CUDA_R", name)}
    assert len(ours) >= 20
    assert ours == {name: eval(said[name], numbers) for name in ours}
