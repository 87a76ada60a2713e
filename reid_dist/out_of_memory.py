"""Recognises an error that says: no memory."""

from collections.abc import Iterator

import torch

from reid_dist.distributed import rank

# As torch's CPU allocator, the C++ library, the kernel, CUDA's libraries and NCCL put it.
_WORDS = (
    "DefaultCPUAllocator: can't allocate memory",
    "std::bad_alloc",
    "Cannot allocate memory",
    "out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error, or one that led to it, is about memory that was not to be had. The launcher exits with 72."""
    return _cause(error) is not None


def memory_line(error: BaseException, step: int | None) -> str:
    """One line for a person, of an error that `is_out_of_memory`.

    Args:
        error: the error.
        step: in which it came, 0-based; None: in none.
    """
    cause = _cause(error)
    said = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
    where = "" if step is None else f", step {step + 1}"
    return (
        f"rank {rank()}{where}: out of memory ({said}); raise engine.gradient_accumulation_steps (with"
        " engine.cached_gradients the loss stays the same) or engine.zero_stage, or lower data.global_batch_size;"
        " --dry-run estimates what a rank needs"
    )


def _cause(error: BaseException) -> BaseException | None:
    for link in _chain(error):
        if isinstance(link, (MemoryError, torch.OutOfMemoryError)) or any(word in str(link) for word in _WORDS):
            return link
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and what led to it, newest first."""
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
