"""Errors that say: no memory; real ones, of a process with a limit, and what libraries are known to say."""

import multiprocessing
import os
import resource
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch

from reid_dist.out_of_memory import is_out_of_memory, memory_line


def _run_out(pipe: Connection, kind: str) -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20),) * 2)
    try:
        if kind == "torch":
            torch.empty(1 << 30)
        else:
            bytearray(1 << 30)
    except BaseException as error:
        pipe.send((type(error).__name__, is_out_of_memory(error), memory_line(error, 4)))
    finally:
        os._exit(0)


@pytest.mark.parametrize("kind", ["torch", "python"])
def test_a_process_at_its_limit_is_told_from_other_faults(kind: str) -> None:
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_run_out, args=(sender, kind))
    process.start()
    sender.close()
    try:
        assert receiver.poll(20)
        name, found, line = receiver.recv()
    finally:
        process.kill()
        process.join()
    assert found, name
    assert line.startswith("rank 0, step 5: out of memory (") and "\n" not in line
    assert "engine.gradient_accumulation_steps" in line


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("Caught OSError in DataLoader worker process 0.\nOSError: [Errno 12] Cannot allocate memory"),
        RuntimeError("std::bad_alloc"),
        OSError(12, "Cannot allocate memory"),
    ],
)
def test_what_libraries_say_is_understood(error: Exception) -> None:
    assert is_out_of_memory(error)
    assert memory_line(error, None).startswith("rank 0: out of memory (")


def test_an_error_that_followed_is_one_too_and_its_cause_is_quoted() -> None:
    try:
        try:
            raise MemoryError
        except MemoryError:
            raise KeyError("while cleaning up")  # noqa: B904
    except KeyError as error:
        assert is_out_of_memory(error)
        assert "out of memory (MemoryError)" in memory_line(error, 0)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Connection closed by peer [127.0.0.1]:123"),
        OSError(28, "No space left on device"),
        ValueError("memory format"),
    ],
)
def test_other_faults_are_not(error: Exception) -> None:
    assert not is_out_of_memory(error)
