"""A safetensors file, written and hashed in one pass over memory that is already there.

The library's own `save_file` first copies every tensor into a Python object, holding the interpreter's lock while
training wants it, and a hash would need the file read again. Here everything long runs without that lock.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from reid_dist.checkpoint.manifest import NOTE, FileRecord

_BLOCK = 1 << 20  # bytes that are hashed and then written while the cache has them
DTYPES = {
    torch.float64: "F64",
    torch.int64: "I64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> FileRecord:
    """Writes tensors and waits until they are on the disk; may raise OSError.

    Args:
        path: of the file; only its owner may read it.
        tensors: on the CPU, contiguous.

    Raises:
        ValueError: a dtype that the format does not have.
    """
    # The largest elements first: then each tensor begins at a multiple of its element's size.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].itemsize, item[0]))
    return write_blocks(path, [_header(ordered), *(x.reshape(-1).view(torch.uint8).numpy().data for _, x in ordered)])


def write_blocks(path: Path, blocks: Iterable[bytes | memoryview]) -> FileRecord:
    """Writes bytes, hashes them and waits until they are on the disk; may raise OSError."""
    digest, size = hashlib.sha256(), 0
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
    try:
        for block in blocks:
            for start in range(0, len(block), _BLOCK):
                part = memoryview(block)[start : start + _BLOCK]
                digest.update(part)
                size += len(part)
                while part:  # a disk that fills up takes a part before it refuses
                    part = part[os.write(descriptor, part) :]
        os.fsync(descriptor)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        os.close(descriptor)
    return FileRecord(size=size, sha256=digest.hexdigest())


def _header(ordered: list[tuple[str, Tensor]]) -> bytes:
    """Length and description of the tensors, which follow without gaps."""
    header: dict[str, object] = {"__metadata__": {"content": NOTE}}
    end = 0
    for name, x in ordered:
        if x.dtype not in DTYPES:
            raise ValueError(f"{name}: {x.dtype} has no form in a safetensors file")
        start, end = end, end + x.numel() * x.itemsize
        header[name] = {"dtype": DTYPES[x.dtype], "shape": list(x.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
