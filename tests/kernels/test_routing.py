"""Which backend `auto` takes: the fastest that was measured near that size, and nothing that was not measured."""

from collections.abc import Callable

import pytest
import torch

from reid_dist.kernels import operators, routing
from reid_dist.kernels.contrastive import explain, moco_nce, queue_attend, sdm
from reid_dist.kernels.measured import MEASURED, Measurement

TABLE = {
    ("cpu", "queue_attend", torch.float32): (
        Measurement(8, 64, 64, {"reference": 0.5, "chunked": 0.7}),
        Measurement(512, 65536, 512, {"reference": 700.0, "chunked": 300.0}),
    )
}


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routing, "MEASURED", TABLE)


@pytest.mark.usefixtures("table")
@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((8, 64, 64), "reference: fastest measured at B=8 K=64 D=64 torch.float32 on cpu: reference 0.5 ms"),
        ((30, 17, 200), "reference: fastest measured at B=8"),
        ((500, 30000, 512), "chunked: fastest measured at B=512 K=65536"),
        ((33, 64, 64), "chunked: queue_attend with B=33 K=64 D=64 torch.float32 was not measured on cpu"),
        ((8, 0, 64), "chunked: queue_attend with B=8 K=0"),
    ],
)
def test_auto_takes_the_fastest_near_that_size(size: tuple[int, int, int], expected: str) -> None:
    assert explain("cpu", *size, torch.float32).startswith(expected)


@pytest.mark.usefixtures("table")
@pytest.mark.parametrize(
    ("device", "dtype", "op"),
    [("cuda", torch.float32, "queue_attend"), ("cpu", torch.bfloat16, "queue_attend"), ("cpu", torch.float32, "sdm")],
)
def test_another_device_dtype_or_op_was_not_measured(
    device: str, dtype: torch.dtype, op: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(routing, "_why_no_triton", lambda *_: None)
    assert explain(device, 8, 64, 64, dtype, op).startswith(
        f"chunked: {op} with B=8 K=64 D=64 {dtype} was not measured"
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_a_gpu_can_be_asked_about_where_there_is_none() -> None:
    answer = explain("cuda", 256, 65536, 512, torch.bfloat16)
    assert answer.startswith("chunked: queue_attend") and "no CUDA device" in answer


def test_it_says_why_there_is_no_triton() -> None:
    assert "there is no kernel for siglip" in explain("cpu", 8, 64, 64, torch.float32, "siglip")
    if not routing.triton_tiles.INTERPRETED:
        assert "(triton: the triton kernels run on a CUDA device" in explain("cpu", 8, 64, 64, torch.float32)


def test_no_row_is_of_a_gpu_and_every_row_was_a_comparison() -> None:
    """Rows enter this table by measurement only; the machines of this project have no GPU yet."""
    for (kind, op, dtype), rows in MEASURED.items():
        assert kind == "cpu" and op in routing.OPS and dtype.is_floating_point
        for row in rows:
            assert set(row.milliseconds) == {"reference", "chunked"}
            assert all(time > 0 for time in row.milliseconds.values())
        assert len({row[:3] for row in rows}) == len(rows)


@pytest.mark.usefixtures("table")
def test_calls_go_where_explain_says(queue_case: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    used = []
    real = operators.queue_attend

    def spy(*arguments: object) -> object:
        used.append(arguments[-1])
        return real(*arguments)

    monkeypatch.setattr(operators, "queue_attend", spy)
    queue_attend(*queue_case(8, 64, 64).attend())
    assert used == []
    queue_attend(*queue_case(64, 64, 64).attend())
    assert used == ["chunked"]


def test_backends_agree(queue_case: Callable) -> None:
    case = queue_case()
    torch.testing.assert_close(moco_nce(*case, backend="reference"), moco_nce(*case, backend="chunked"))
    torch.testing.assert_close(moco_nce(*case), moco_nce(*case, backend="chunked"))


@pytest.mark.skipif(routing.triton_tiles.INTERPRETED, reason="triton's interpreter runs on this machine")
def test_triton_by_name_is_refused_where_it_cannot_run(queue_case: Callable) -> None:
    case = queue_case()
    with pytest.raises(ValueError, match=r"backend 'triton': .* use 'chunked' or 'auto'"):
        queue_attend(*case.attend(), backend="triton")
    rows = (case.anchors_BD, case.keys_KD, case.anchor_ids_B, case.key_ids_K, case.log_scale)
    with pytest.raises(ValueError, match="no kernel for sdm"):
        sdm(*rows, backend="triton")


def test_wrong_questions_are_refused() -> None:
    with pytest.raises(ValueError, match="op is 'moco_nce'; it is one of"):
        explain("cpu", 1, 1, 1, torch.float32, "moco_nce")
