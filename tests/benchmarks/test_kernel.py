"""`benchmark.py kernel`: its table, its file and its refusals."""

import argparse
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from launch import benchmark
from reid_dist.benchmarks import kernel, kernel_turns, plot
from reid_dist.benchmarks.kernel_peers import contestants
from reid_dist.benchmarks.kernel_problem import Cell
from reid_dist.benchmarks.kernel_turns import Settings, measure_cell
from reid_dist.errors import UserError
from reid_dist.kernels import measured, routing

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
KEYS = {
    *("op", "backend", "mask", "B", "K", "D", "dtype", "forward_ms", "total_ms", "least_forward_ms", "least_total_ms"),
    *("extra_bytes", "loss_error", "grad_error", "scale_grad_error", "roof_share", "calls", "cannot", "reason"),
}
NUMBERS = [key for key in KEYS if key.endswith(("_ms", "_error")) or key in ("extra_bytes", "roof_share")]


class Bar:
    """A progress bar that shows nothing."""

    def set_postfix_str(self, text: str) -> None: ...
    def refresh(self) -> None: ...
    def update(self) -> None: ...


def parsed(*options: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    kernel.add_arguments(parser)
    return parser.parse_args(["--json", "x.json", *options])


def check_row(row: dict[str, Any]) -> None:
    assert set(row) == KEYS
    if row["reason"] is not None:
        assert row["reason"] and row["calls"] == 0 and all(row[key] is None for key in NUMBERS)
        return
    assert 0 < row["least_forward_ms"] <= row["forward_ms"] and 0 < row["least_total_ms"] <= row["total_ms"]
    assert row["extra_bytes"] > 0 and row["roof_share"] > 0 and row["calls"] >= 1
    if row["backend"] in ("two_gemms", "three_gemms"):
        assert row["roof_share"] == 1 and row["loss_error"] is None
    else:
        bound = 5e-2 if "bf16" in row["backend"] else 1e-5
        assert row["loss_error"] < bound and row["grad_error"] < bound and row["scale_grad_error"] < bound


def test_rows_of_pairs() -> None:
    cell = Cell("clip_contrastive", 400, 400, 32, "float32")
    settings = Settings(CPU, 1, rounds=2, seconds=60, only=("chunked", "naive", "triton", "inf_cl"))
    rows = measure_cell(cell, settings, Bar())
    assert [row["backend"] for row in rows] == ["three_gemms", "chunked", "triton", "naive", "inf_cl"]
    for row in rows:
        check_row(row)
        assert (row["op"], row["B"], row["K"], row["D"], row["dtype"]) == tuple(cell.as_dict().values())
        assert row["mask"] is None
        assert (row["cannot"] is None) == (row["backend"] in ("two_gemms", "three_gemms", "chunked", "triton"))
    reasons = {row["backend"]: row["reason"] for row in rows}
    assert reasons["triton"] == "needs a CUDA device" and reasons["inf_cl"] and reasons["naive"] is None
    text = kernel.table(rows)
    assert len(text.splitlines()) == len(rows) + 3 and "needs a CUDA device" in text


class FakeWorker:
    """A process that answers at once; `naive` dies in its second turn, `reference` gives a NaN."""

    def __init__(self, cell: Cell, key: str, settings: Settings, folder: Path) -> None:
        self.key, self.answer, self.turns, self.closed = key, folder / f"{key.replace('/', '-')}.pt", 0, False
        self.repeats: list[int] = []
        made.append(self)

    def ask(self, do: str, **command: Any) -> dict[str, Any]:
        if do == "prepare":
            loss = torch.tensor(torch.nan if self.key == "reference/identity" else 2.0)
            one = {"loss": loss, "gradients": [torch.ones(2), torch.tensor(1.0)]}
            everything = dict.fromkeys(("identity", "none", "target"), one)
            torch.save(everything if self.key == "float64" else one, self.answer)
            return {"extra_bytes": 7, "answered": self.key != "two_gemms/none"}
        self.turns += 1
        order.append(self.key)
        self.repeats.append(command["repeats"])
        if self.key == "naive/identity" and self.turns == 2:
            raise kernel_turns.WorkerError("process ended with code -11: crashed")
        milliseconds = {"two_gemms/none": 10.0, "checkpointed/identity": 50.0}.get(self.key, 20.0)
        return {"times": [(milliseconds / 2, milliseconds + self.turns)] * command["repeats"]}

    def close(self) -> None:
        self.closed = True


made: list[FakeWorker] = []
order: list[str] = []


def test_turns_interleave_and_broken_ones_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    made.clear(), order.clear()
    monkeypatch.setattr(kernel_turns, "Worker", FakeWorker)
    only = ("chunked", "reference", "naive", "checkpointed")
    cell = Cell("moco_nce", 8, 333, 16, "float32")
    rows = {
        (row["backend"], row["mask"]): row
        for row in measure_cell(cell, Settings(CPU, 1, rounds=5, seconds=60, only=only), Bar())
    }
    assert all(worker.closed for worker in made)
    assert rows["reference", "identity"]["reason"] == "its loss or gradient is not finite"
    naive = rows["naive", "identity"]
    assert naive["reason"] == "process ended with code -11: crashed" and naive["total_ms"] is None
    assert naive["extra_bytes"] is None and naive["calls"] == 0  # numbers of a broken run are worth nothing
    turns = {worker.key: worker.turns for worker in made if worker.turns}
    assert turns == {
        "two_gemms/none": 5,
        "chunked/identity": 5,
        "chunked/none": 5,
        "naive/identity": 2,
        "checkpointed/identity": 3,  # far from the roof
    }
    running = [key for key in turns]
    assert order[:5] == running and order[5:10] == [*running[1:], running[0]]  # another begins each round
    chunked = rows["chunked", "identity"]
    assert chunked["least_total_ms"] == 21 and chunked["total_ms"] == 23 and chunked["forward_ms"] == 10
    assert chunked["roof_share"] == pytest.approx(11 / 21, abs=1e-4) and chunked["loss_error"] == 0
    assert made[2].repeats[0] == 1 and set(made[2].repeats[1:]) == {4}  # a turn of about 100 ms


def test_rounds_end_with_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    made.clear()
    monkeypatch.setattr(kernel_turns, "Worker", FakeWorker)
    settings = Settings(CPU, 1, rounds=50, seconds=1e-9, only=("chunked",))
    measure_cell(Cell("moco_nce", 8, 333, 16, "float32"), settings, Bar())
    assert {worker.turns for worker in made if worker.key != "float64"} == {3}


def test_cells() -> None:
    every = kernel.choose_cells(parsed(), CPU)
    quick = kernel.choose_cells(parsed("--quick"), CPU)
    gate = Cell("moco_nce", 512, 65536, 512, "float32")
    assert gate in quick and gate in every and {cell.op for cell in quick} == {"moco_nce", "clip_contrastive"}
    assert kernel.choose_cells(parsed("--quick", "--ops", "moco_nce"), CPU) == [gate]
    gpu = {cell.size for cell in kernel.choose_cells(parsed(), torch.device("cuda")) if cell.op == "moco_nce"}
    sizes = "256x65536x512 1024x65536x256 1024x65536x512 4096x65536x512 4096x65536x1024 1024x1048576x512"
    assert {*sizes.split(), "4096x1048576x512", "16384x262144x512", "65536x65536x512"} <= gpu  # kernel.md section 9
    assert kernel.choose_cells(parsed("--sizes", "5x6x7", "--dtypes", "bfloat16", "float32"), CPU) == [
        Cell("moco_nce", 5, 6, 7, "bfloat16"),
        Cell("moco_nce", 5, 6, 7, "float32"),
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ops", "moco"], "--ops moco: not known; there are moco_nce, clip_contrastive"),
        (["--dtypes", "float16"], "--dtypes float16: not known"),
        (["--sizes", "512x512"], "--sizes 512x512: write anchors x keys x features"),
        (["--sizes", "4x5x6", "--ops", "clip_contrastive"], "--sizes 4x5x6: clip_contrastive pairs rows; write 4x4x6"),
        (["--sizes", "64x999999999x512"], r"--sizes 64x999999999x512: moco_nce needs at least \d+ GB"),
        (["--rounds", "0"], "--rounds 0: must be above 0"),
        (["--seconds", "nan"], "--seconds nan: must be above 0"),
        (["--backends", "naiv"], "--backends naiv: not known; there are .*chunked.*naive"),
        (["--json", "/"], "--json /: is a folder"),
        (["--json", "/proc/none/x.json"], r"--json /proc/none/x.json: cannot be written \(.+\); name another file"),
        (["--plot", "x.txt"], r"--plot.*(needs matplotlib|ends in .png)"),
    ],
)
def test_wrong_options(options: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        kernel.run(parsed(*options))


def test_a_picture_needs_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plot.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"--plot: needs matplotlib; install it with pip install \"reid_dist\[plot\]\""):
        kernel.run(parsed("--plot", "x.png"))
    monkeypatch.setattr(plot.importlib.util, "find_spec", lambda name: SimpleNamespace())
    with pytest.raises(UserError, match=r"--plot x.txt: name a file that ends in .png, .svg, .pdf"):
        plot.check_plot(Path("x.txt"))


def test_command(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "kernel.json"
    options = ("--sizes", "16x20000x32", "--backends", "chunked", "inf_cl", "--rounds", "1", "--route")
    line = [sys.executable, "launch/benchmark.py", "kernel", "--json", str(out), "--threads", "1", *options]
    result = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    written = json.loads(out.read_text())
    names = [(row["backend"], row["mask"]) for row in written["rows"]]
    ours = [("chunked", "identity"), ("chunked", "none")]
    assert names == [("two_gemms", None), *ours, ("inf_cl", "none")]
    for row in written["rows"]:
        check_row(row)
    assert written["machine"]["packages"]["torch"] and written["settings"]["memory"] == "peak resident set"
    assert written["settings"]["threads"] == 1 and parsed().threads == written["machine"]["cores"]
    assert f"written: {out}" in result.stdout and "Measurement(16, 20000, 32, " in result.stdout


def test_command_says_what_is_wrong_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main(["kernel", "--json", str(tmp_path / "x.json"), "--ops", "nothing"]) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    assert said.startswith("error: --ops nothing") and not list(tmp_path.iterdir())


def row(**changes: Any) -> dict[str, Any]:
    empty = dict.fromkeys(KEYS) | {"op": "moco_nce", "backend": "chunked", "mask": "identity"}
    return empty | {"B": 8, "K": 99, "D": 16, "dtype": "float32", "calls": 0} | changes


def test_routes_are_rows_of_the_routing_table() -> None:
    rows = [
        row(backend="two_gemms", mask=None, least_total_ms=0.1),
        row(least_total_ms=3.00004),
        row(backend="reference", least_total_ms=2.5),
        row(mask="none", least_total_ms=1.0),
        row(backend="triton", reason="needs a CUDA device"),
        row(backend="naive", least_total_ms=1.0),
        row(op="clip_contrastive", mask=None, K=8, least_total_ms=4.0),
    ]
    found = kernel.routes(rows, CPU)
    lines = kernel.route_lines(found).splitlines()
    table = "".join(lines[lines.index("rows for reid_dist/kernels/measured.py:") + 1 :])
    assert eval("{" + table + "}", {"torch": torch, "Measurement": measured.Measurement}) == {
        ("cpu", "queue_attend", torch.float32): (measured.Measurement(8, 99, 16, {"chunked": 3.0, "reference": 2.5}),),
        ("cpu", "pair_attend", torch.float32): (measured.Measurement(8, 8, 16, {"chunked": 4.0}),),
    }
    assert all(route["op"] in routing.OPS for route in found)


def test_picture(tmp_path: Path) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        pytest.skip("matplotlib is not installed (reid_dist[plot])")
    rows = [row(least_total_ms=3.0, total_ms=3.1, extra_bytes=10**6), row(backend="naive", reason="not here")]
    plot.plot_kernel(rows, tmp_path / "kernel.png")
    assert (tmp_path / "kernel.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.gpu
def test_rows_on_a_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    for dtype in ("bfloat16", "float32"):
        cell = Cell("moco_nce", 512, 4096, 256, dtype)
        rows = measure_cell(cell, Settings(torch.device("cuda"), 4, rounds=2, seconds=60), Bar())
        assert len(rows) == len(contestants(cell))
        ours = [row for row in rows if row["backend"] in ("chunked", "triton")]
        assert all(row["reason"] is None and row["grad_error"] < 2e-3 for row in ours)
        assert all(row["extra_bytes"] > 0 for row in ours)
