"""How it shows that a device's memory ran out: torch says so, or a library that wanted a workspace."""

from __future__ import annotations

import torch

CUDA_OUT_OF_MEMORY = 2  # cudaErrorMemoryAllocation
# What cuDNN and cuBLAS answer where every algorithm wants more workspace than there is.
SIGNS = (
    "unable to find an engine to execute this computation",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDA error: out of memory",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that less memory would do."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    if not isinstance(error, RuntimeError):
        return False
    if getattr(error, "error_code", None) == CUDA_OUT_OF_MEMORY:  # torch.AcceleratorError, from torch 2.8 on
        return True
    return any(sign in str(error) for sign in SIGNS)
