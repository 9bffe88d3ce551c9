"""A GEMM that torch does not expose, from the cuBLASLt that torch has loaded.

The names and values of constants are those of cublasLt.h, cublas_api.h and library_types.h. What they mean:
https://docs.nvidia.com/cuda/cublas/#using-the-cublaslt-api.
"""

from __future__ import annotations

import ctypes
import os
import sys
from ctypes import POINTER, byref, c_float, c_int, c_int8, c_int32, c_int64, c_size_t, c_uint32, c_uint64, c_void_p
from functools import cache, cached_property

import torch

CUBLAS_STATUS_SUCCESS, CUBLAS_STATUS_NOT_SUPPORTED = 0, 15
CUBLAS_COMPUTE_32F = 68
CUBLAS_OP_N, CUBLAS_OP_T = 0, 1
CUDA_R_32F, CUDA_R_16F, CUDA_R_16BF, CUDA_R_8F_E4M3 = 0, 2, 14, 28
CUBLASLT_MATMUL_DESC_TRANSA, CUBLASLT_MATMUL_DESC_TRANSB = 3, 4
CUBLASLT_MATMUL_DESC_EPILOGUE = 7
CUBLASLT_MATMUL_DESC_BIAS_POINTER, CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE = 8, 26
CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, CUBLASLT_MATMUL_DESC_B_SCALE_POINTER = 17, 18
CUBLASLT_MATMUL_DESC_D_SCALE_POINTER = 20
CUBLASLT_MATMUL_DESC_FAST_ACCUM = 25
CUBLASLT_EPILOGUE_GELU_BIAS = 32 | 4
CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES = 1

WORKSPACE = 32 << 20
"""Bytes that an algorithm may use; NVIDIA's recommendation for Hopper."""
ALIGNMENT = 256
"""Bytes: the alignment of matrices that the search for an algorithm assumes."""
TYPES = {torch.bfloat16: CUDA_R_16BF, torch.float16: CUDA_R_16F}
"""cuBLAS's types of a bias."""
ONE, ZERO = c_float(1.0), c_float(0.0)


class MatmulAlgo(ctypes.Structure):
    """cublasLtMatmulAlgo_t"""

    _fields_ = [("data", c_uint64 * 8)]


class HeuristicResult(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t"""

    _fields_ = [
        ("algo", MatmulAlgo), ("workspaceSize", c_size_t), ("state", c_int), ("wavesCount", c_float),
        ("reserved", c_int * 4),
    ]  # fmt: skip


SIGNATURES = {
    "cublasLtMatmulDescCreate": [POINTER(c_void_p), c_int, c_int],
    "cublasLtMatmulDescSetAttribute": [c_void_p, c_int, c_void_p, c_size_t],
    "cublasLtMatrixLayoutCreate": [POINTER(c_void_p), c_int, c_uint64, c_uint64, c_int64],
    "cublasLtMatmulPreferenceCreate": [POINTER(c_void_p)],
    "cublasLtMatmulPreferenceSetAttribute": [c_void_p, c_int, c_void_p, c_size_t],
    "cublasLtMatmulPreferenceDestroy": [c_void_p],
    "cublasLtMatmulAlgoGetHeuristic": [*[c_void_p] * 7, c_int, POINTER(HeuristicResult), POINTER(c_int)],
    "cublasLtMatmul": [*[c_void_p] * 12, POINTER(MatmulAlgo), c_void_p, c_size_t, c_void_p],
}
"""Arguments; all functions return a cublasStatus_t, an int."""


@cache
def library() -> ctypes.CDLL | None:
    """The cuBLASLt that torch has loaded, so that torch's handles are valid for it; None if there is none."""
    if torch.version.cuda is None or sys.platform != "linux":
        return None
    try:
        found = ctypes.CDLL(f"libcublasLt.so.{torch.version.cuda.partition('.')[0]}", os.RTLD_NOLOAD)
    except OSError:
        return None
    for name, arguments in SIGNATURES.items():
        getattr(found, name).argtypes = arguments
    return found


def check(function: str, status: int) -> None:
    if status != CUBLAS_STATUS_SUCCESS:
        raise RuntimeError(f"{function} returned status {status}")


def created(kind: str, *arguments) -> c_void_p:
    """A new descriptor."""
    function, found = f"cublasLt{kind}Create", c_void_p()
    check(function, getattr(library(), function)(byref(found), *arguments))
    return found


def set_attribute(kind: str, descriptor: c_void_p, attribute: int, value) -> None:
    function = f"cublasLt{kind}SetAttribute"
    check(function, getattr(library(), function)(descriptor, attribute, byref(value), ctypes.sizeof(value)))


class FP8LinearGelu:
    """GELU(x weight^T x_scale weight_scale + bias) times `inverse` in FP8, of x [m, k] and weight [n, k] in FP8.

    cuBLASLt stores matrices by columns. It sees our result [m, n] as D, n x m: the product of the weight as A, stored
    as k x n and transposed, and x as B, stored as k x m. C, of the bias's type, is not read.

    Args:
        handle: that of cuBLAS, which is valid for cuBLASLt: https://docs.nvidia.com/cuda/cublas/#cublaslthandle-t.
        dtype: of the bias; bfloat16 or float16.
    """

    def __init__(self, handle: int, m: int, n: int, k: int, dtype: torch.dtype):
        self.handle, self.shape = handle, (m, n)
        self.operation = created("MatmulDesc", CUBLAS_COMPUTE_32F, CUDA_R_32F)
        self._set(CUBLASLT_MATMUL_DESC_TRANSA, c_int32(CUBLAS_OP_T))
        self._set(CUBLASLT_MATMUL_DESC_TRANSB, c_int32(CUBLAS_OP_N))
        self._set(CUBLASLT_MATMUL_DESC_EPILOGUE, c_uint32(CUBLASLT_EPILOGUE_GELU_BIAS))
        self._set(CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, c_int32(TYPES[dtype]))
        self._set(CUBLASLT_MATMUL_DESC_FAST_ACCUM, c_int8(1))
        a, b, d = ((CUDA_R_8F_E4M3, *size) for size in ((k, n, k), (k, m, k), (n, m, n)))
        self.layouts = [created("MatrixLayout", *layout) for layout in (a, b, (TYPES[dtype], n, m, n), d)]

    def _set(self, attribute: int, value) -> None:
        set_attribute("MatmulDesc", self.operation, attribute, value)

    def algorithms(self, count: int) -> list[HeuristicResult]:
        """At most `count` that can compute it, the one estimated to be the fastest first."""
        preference = created("MatmulPreference")
        set_attribute("MatmulPreference", preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, c_uint64(WORKSPACE))
        results, found = (HeuristicResult * count)(), c_int(0)
        status = library().cublasLtMatmulAlgoGetHeuristic(
            self.handle, self.operation, *self.layouts, preference, count, results, byref(found)
        )
        library().cublasLtMatmulPreferenceDestroy(preference)
        usable = found.value if status == CUBLAS_STATUS_SUCCESS else 0
        return [result for result in results[:usable] if result.state == CUBLAS_STATUS_SUCCESS]

    @cached_property
    def algorithm(self) -> HeuristicResult | None:
        return next(iter(self.algorithms(1)), None)

    def __call__(self, x, weight, x_scale, weight_scale, bias, inverse) -> torch.Tensor | None:
        """None if there is no algorithm for it."""
        self._set(CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, c_void_p(weight_scale.data_ptr()))
        self._set(CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, c_void_p(x_scale.data_ptr()))
        self._set(CUBLASLT_MATMUL_DESC_D_SCALE_POINTER, c_void_p(inverse.data_ptr()))
        self._set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, c_void_p(bias.data_ptr()))
        if self.algorithm is None:
            return None
        out = x.new_empty(self.shape)
        workspace = torch.empty(self.algorithm.workspaceSize, dtype=torch.uint8, device=x.device)
        a, b, c, d = self.layouts
        status = library().cublasLtMatmul(
            self.handle, self.operation, byref(ONE), weight.data_ptr(), a, x.data_ptr(), b, byref(ZERO), None, c,
            out.data_ptr(), d, byref(self.algorithm.algo), workspace.data_ptr(), len(workspace),
            torch.cuda.current_stream(x.device).cuda_stream,
        )  # fmt: skip
        if status == CUBLAS_STATUS_NOT_SUPPORTED:
            self.algorithm = None
            return None
        check("cublasLtMatmul", status)
        return out


gemm = cache(FP8LinearGelu)
"""One for each shape. A handle belongs to one device and one thread, so no other thread sets the pointers."""


def fp8_linear_gelu(x, weight, x_scale, weight_scale, bias, inverse) -> torch.Tensor | None:
    """GELU in its tanh form of x weight^T x_scale weight_scale + bias, times `inverse`, in FP8 and rounded once.

    Args:
        x, weight: [m, k] and [n, k] in FP8, on a GPU; they are copied if their rows do not follow each other in memory.
        x_scale, weight_scale, inverse: float32, one value each.
        bias: [n], bfloat16 or float16.

    Returns:
        [m, n], or None if cuBLASLt cannot compute it here.
    """
    assert x.shape[1:] == weight.shape[1:] and bias.shape == weight.shape[:1]
    x, weight, bias = x.contiguous(), weight.contiguous(), bias.contiguous()
    if library() is None or any(tensor.data_ptr() % ALIGNMENT for tensor in (x, weight, bias)):
        return None
    with torch.cuda.device(x.device):
        handle = torch.cuda.current_blas_handle()
        one = gemm(handle, len(x), *weight.shape, bias.dtype)
        return one(x, weight, x_scale, weight_scale, bias, inverse)
