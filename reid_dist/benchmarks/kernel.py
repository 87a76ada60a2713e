"""Time, memory and error of the contrastive kernel beside what else there is: `benchmark.py kernel --json OUT`.

One run, one table. Each implementation has a process of its own; they are measured in turns on the same inputs, so that
whatever else the machine does hits all alike. Times are medians after a warm-up, on a GPU by CUDA events; on a CPU the
least ones are there too, and `roof_share` is taken from these. Memory and what a peer cannot do: see kernel_worker.py
and kernel_peers.py. Errors are relative, in norm, against float64 answers on the same inputs.

On the CPU all cores of the process are used; `--quick` ends in about two minutes on two cores. On a GPU machine the
same command measures bfloat16 at the sizes of kernel.md, about a minute each, so with a time limit in parts:

    pip install liger-kernel cut-cross-entropy inf-cl quack-kernels    # each is measured where it is installed
    python launch/benchmark.py kernel --json gate.json --sizes 4096x1048576x512 4096x65536x256 4096x65536x512 --route
    python launch/benchmark.py kernel --json pairs.json --ops clip_contrastive
    DS_ACCELERATOR=cpu python launch/benchmark.py kernel --json cpu.json    # the CPU of that machine

`--route` prints what `auto` should know: our rows for reid_dist/kernels/measured.py, where no other number may enter.
"""

import argparse
import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from reid_dist.benchmarks.kernel_peers import OURS, contestants
from reid_dist.benchmarks.kernel_problem import DTYPES, OPS, Cell, parse_size
from reid_dist.benchmarks.kernel_turns import Settings, measure_cell
from reid_dist.benchmarks.kernel_worker import available_bytes
from reid_dist.benchmarks.machine import describe_machine
from reid_dist.benchmarks.plot import check_plot, plot_kernel
from reid_dist.distributed import local_device
from reid_dist.errors import UserError
from reid_dist.files import write_results

_GATE = (512, 65536, 512)
_QUICK = [("moco_nce", _GATE, "float32"), ("clip_contrastive", (256, 256, 512), "float32")]
_CPU = [
    *(("moco_nce", size, "float32") for size in ((64, 4096, 256), (128, 65536, 256), _GATE)),
    ("moco_nce", _GATE, "bfloat16"),
    *(("clip_contrastive", (b, b, 512), "float32") for b in (256, 1024, 4096)),
]
_GPU = [
    *(("moco_nce", (256, 65536, 512), dtype) for dtype in ("bfloat16", "float32")),
    *(("moco_nce", (1024, 65536, d), "bfloat16") for d in (256, 512)),
    *(("moco_nce", (4096, 65536, d), "bfloat16") for d in (256, 512, 1024)),
    *(("moco_nce", (b, 2**20, 512), "bfloat16") for b in (1024, 4096)),
    ("moco_nce", (16384, 2**18, 512), "bfloat16"),
    ("moco_nce", (65536, 65536, 512), "bfloat16"),
    *(("clip_contrastive", (b, b, 512), "bfloat16") for b in (1024, 4096, 16384)),
]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `benchmark.py kernel`."""
    parser.add_argument("--json", required=True, type=Path, help="file to write the rows to")
    parser.add_argument("--plot", type=Path, help="picture to draw, such as kernel.png (needs reid_dist[plot])")
    parser.add_argument("--quick", action="store_true", help="two cells, among them moco_nce at 512x65536x512")
    parser.add_argument("--ops", nargs="+", help=f"of {', '.join(OPS)} (default: both; with --sizes: moco_nce)")
    parser.add_argument("--sizes", nargs="+", metavar="BxKxD", help="anchors x keys x features (default: a list)")
    parser.add_argument("--dtypes", nargs="+", help=f"of {', '.join(DTYPES)} (default: as the sizes' list has them)")
    parser.add_argument("--backends", nargs="+", default=[], help="only these rows, and the roof")
    parser.add_argument("--rounds", type=int, default=9, help="turns of each implementation (default: 9)")
    parser.add_argument("--seconds", type=float, help="of a cell's rounds (default: 40; with --quick: 20)")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--threads", type=int, default=cores, help=f"on a CPU (default: all cores, {cores})")
    parser.add_argument("--route", action="store_true", help="print our times as rows of reid_dist/kernels/measured.py")


def run(options: argparse.Namespace) -> None:
    """Measure, print the table and write the files.

    Raises:
        UserError: wrong options, sizes that do not fit, files that cannot be written.
    """
    device = local_device()
    if options.seconds is None:
        options.seconds = 20.0 if options.quick else 40.0
    cells = choose_cells(options, device)
    _check(options, cells, device)
    settings = Settings(device, options.threads, options.rounds, options.seconds, tuple(options.backends))
    machine = describe_machine()  # its load before ours
    rows: list[dict[str, Any]] = []
    with tqdm(total=len(cells), desc="benchmark: cells", unit=" cells", disable=None) as progress:
        for cell in cells:
            rows += measure_cell(cell, settings, progress)
    results: dict[str, Any] = {
        "rows": rows,
        "routes": routes(rows, device),
        "settings": {
            "device": device.type,
            "threads": options.threads,
            "rounds": options.rounds,
            "memory": "max_memory_allocated" if device.type == "cuda" else "peak resident set",
        },
        "machine": machine,
    }
    write_results(options.json, results)
    print(table(rows))
    if options.route:
        print(route_lines(results["routes"]))
    if options.plot:
        plot_kernel(rows, options.plot)
        print(f"written: {options.plot}")
    print(f"written: {options.json}")


def choose_cells(options: argparse.Namespace, device: torch.device) -> list[Cell]:
    """The cells that the options name.

    Raises:
        UserError: an unknown op or dtype, or a size of the wrong form.
    """
    for name, given, known in (("ops", options.ops, OPS), ("dtypes", options.dtypes, tuple(DTYPES))):
        for word in given or ():
            if word not in known:
                raise UserError(f"--{name} {word}: not known; there are {', '.join(known)}")
    if options.sizes:
        sizes = [parse_size(text) for text in options.sizes]
        dtypes = options.dtypes or ["bfloat16" if device.type == "cuda" else "float32"]
        found: Iterable[Any] = [
            (op, size, dtype) for op in options.ops or OPS[:1] for size in sizes for dtype in dtypes
        ]
    else:
        every = _QUICK if options.quick else _GPU if device.type == "cuda" else _CPU
        found = [
            (op, size, dtype)
            for op, size, listed in every
            if op in (options.ops or OPS)
            for dtype in (options.dtypes or [listed])
        ]
    cells = list(dict.fromkeys(Cell(op, size[0], size[1], size[2], dtype) for op, size, dtype in found))
    for cell in cells:
        if cell.op == "clip_contrastive" and cell.b != cell.k:
            raise UserError(f"--sizes {cell.size}: clip_contrastive pairs rows; write {cell.b}x{cell.b}x{cell.d}")
    return cells


def _check(options: argparse.Namespace, cells: list[Cell], device: torch.device) -> None:
    """Everything that would otherwise fail after minutes."""
    for name in ("rounds", "seconds", "threads"):
        if not 0 < getattr(options, name) < float("inf"):  # nan is not either
            raise UserError(f"--{name} {getattr(options, name)}: must be above 0")
    check_writable("--json", options.json)
    if options.plot:
        check_plot(options.plot)
    names = {contestant.name for cell in cells for contestant in contestants(cell)}
    for name in options.backends:
        if name not in names:
            raise UserError(f"--backends {name}: not known; there are {', '.join(sorted(names))}")
    available = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_bytes()
    for cell in cells:
        count = sum(not options.backends or contestant.name in options.backends for contestant in contestants(cell))
        # Each process has its inputs, and room for the features' gradients and one float32 copy.
        needed = (count + 1) * cell.input_bytes + 3 * (cell.b + cell.k) * cell.d * 4
        if available is not None and needed > available:
            raise UserError(
                f"--sizes {cell.size}: {cell.op} needs at least {needed / 1e9:.0f} GB for the inputs of all processes,"
                f" {available / 1e9:.0f} GB are available; choose a smaller size or fewer --backends"
            )


def check_writable(option: str, path: Path) -> None:
    """Tries the folder of a result before anything is measured.

    Raises:
        UserError: the path is a folder, or a file cannot be made there.
    """
    if path.is_dir():
        raise UserError(f"{option} {path}: is a folder; name a file, such as {path / 'results'}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise UserError(f"{option} {path}: cannot be written ({error.strerror}); name another file") from error


def routes(rows: list[dict[str, Any]], device: torch.device) -> list[dict[str, Any]]:
    """Least times of our backends at each size, as `reid_dist/kernels/measured.py` holds them: rows for `auto`."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        if row["backend"] not in OURS or row["mask"] == "none" or row["least_total_ms"] is None:
            continue
        size = tuple(row[key] for key in ("op", "B", "K", "D", "dtype"))
        route = found.setdefault(
            size,
            {
                "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
                "op": {"moco_nce": "queue_attend", "clip_contrastive": "pair_attend"}[row["op"]],
                "dtype": row["dtype"],
                "rows": row["B"],
                "keys": row["K"],
                "features": row["D"],
                "milliseconds": {},
            },
        )
        route["milliseconds"][row["backend"]] = float(f"{row['least_total_ms']:.4g}")
    return list(found.values())


def route_lines(found: list[dict[str, Any]]) -> str:
    """The routes as the entries of `measured.MEASURED`."""
    lines: list[str] = []
    for key in dict.fromkeys((route["device"], route["op"], route["dtype"]) for route in found):
        lines.append(f'    ("{key[0]}", "{key[1]}", torch.{key[2]}): (')
        for route in found:
            if (route["device"], route["op"], route["dtype"]) == key:
                size = f"{route['rows']}, {route['keys']}, {route['features']}"
                lines.append(f"        Measurement({size}, {json.dumps(route['milliseconds'])}),")
        lines.append("    ),")
    return "\n".join(["", "rows for reid_dist/kernels/measured.py:", *lines])


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as text, cell after cell."""
    lines: list[str] = []
    cell = None
    for row in rows:
        if cell != (cell := (row["op"], row["B"], row["K"], row["D"], row["dtype"])):
            lines += ["", f"{row['op']}  B={row['B']} K={row['K']} D={row['D']} {row['dtype']}"]
            lines.append(
                f"  {'backend':<18}{'mask':<10}{'forward ms':>11}{'total ms':>11}{'least':>11}{'of roof':>9}"
                f"{'extra MB':>10}{'loss err':>10}{'grad err':>10}  cannot"
            )
        lines.append(_line(row))
    return "\n".join(lines)


def _line(row: dict[str, Any]) -> str:
    begin = f"  {row['backend']:<18}{row['mask'] or '':<10}"
    if row["reason"] is not None:
        return f"{begin}  {row['reason']}"
    megabytes = "" if row["extra_bytes"] is None else f"{row['extra_bytes'] / 1e6:,.1f}"
    errors = "".join(
        f"{'' if row[name] is None else format(row[name], '.1e'):>10}" for name in ("loss_error", "grad_error")
    )
    return (
        f"{begin}{row['forward_ms']:>11,.2f}{row['total_ms']:>11,.2f}{row['least_total_ms']:>11,.2f}"
        f"{row['roof_share'] or 0:>9.1%}{megabytes:>10}{errors}  {', '.join(row['cannot'] or ())}"
    )
