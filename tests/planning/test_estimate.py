"""A plan for nodes that are not there: its numbers, its text and its refusals."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed as dist

from launch.train import main
from reid_dist.config import RunConfig
from reid_dist.errors import UserError
from reid_dist.planning.assumptions import Assumptions, read_assumptions, read_cluster
from reid_dist.planning.building import pretended_ranks
from reid_dist.planning.estimate import Choice, StageEstimate, estimate_stage, price
from reid_dist.planning.report import describe_cluster
from reid_dist.recipe_file import load_config

ROOT = Path(__file__).parents[2]
USUAL = Assumptions()


def quickstart(*overrides: str) -> RunConfig:
    return load_config(ROOT / "configs" / "quickstart.yaml", ["data.root=/nowhere", *overrides])


@pytest.fixture(scope="module")
def pretrain() -> StageEstimate:
    config = quickstart()
    return estimate_stage(config, config.stages[0], 2, 8, USUAL)


def test_a_step_is_the_sum_of_its_parts(pretrain: StageEstimate) -> None:
    for choice in pretrain.choices:
        assert not choice.refused and choice.peak_bytes > 0
        assert choice.step_s == choice.compute_s + choice.update_s + choice.exchange_s > 0
    work = pretrain.counted
    expected = work.forward.seconds(USUAL) + work.backward.seconds(USUAL)
    assert {choice.compute_s for choice in pretrain.choices} == {expected}
    zero = [choice.update_s for choice in pretrain.choices]
    assert zero[0] >= zero[1] == zero[2]  # ranks that share the optimizer's state update less each
    assert (pretrain.sample_bytes, pretrain.measured) == (40e3, False)


def test_ranks_send_what_the_formulas_say(pretrain: StageEstimate) -> None:
    weights = 4 * pretrain.plan.trainable
    part = 15 / 16
    sent = [[choice.sent_bytes(kind, 16) / part for kind in ("gradients", "weights")] for choice in pretrain.choices]
    assert sent == [
        pytest.approx([2 * weights, 0]),
        pytest.approx([2 * weights, weights]),
        pytest.approx([2 * weights, weights]),
        pytest.approx([weights, weights]),
    ]
    # Texts of 4 rows a rank to all in fp32, and their gradients back by an all-reduce.
    features = 64 * 128 * 4
    assert pretrain.choices[0].sent_bytes("features, keys", 16) / part == pytest.approx(3 * features, rel=0.4)


def test_more_of_anything_is_not_slower(pretrain: StageEstimate) -> None:
    def priced(**changes: float) -> Choice:
        assumed = USUAL.model_copy(update=changes)
        return price(pretrain.stage, pretrain.plan, pretrain.counted, 2, 8, assumed).choices[1]

    before = priced()
    for name in ("bf16_tflops", "fp32_tflops", "memory_gbs", "near_gbs", "far_gbs"):
        assert priced(**{name: 10 * getattr(USUAL, name)}).step_s <= before.step_s
    assert priced(fp32_tflops=1e-3).compute_s > 10 * before.compute_s
    assert priced(far_gbs=1).exchange_s > before.exchange_s == priced(near_gbs=1).exchange_s


def test_accumulation_and_cached_gradients_repeat_the_work(pretrain: StageEstimate) -> None:
    plain, twice, cached = (
        estimate_stage(config, config.stages[0], 1, 2, USUAL)
        for config in (
            quickstart("data.global_batch_size=16"),
            quickstart("data.global_batch_size=32", "engine.gradient_accumulation_steps=2"),
            quickstart(
                "data.global_batch_size=32", "engine.gradient_accumulation_steps=2", "engine.cached_gradients=true"
            ),
        )
    )
    assert twice.choices[1].compute_s == pytest.approx(2 * plain.choices[1].compute_s)
    forward = plain.counted.forward.seconds(USUAL)
    assert cached.choices[1].compute_s == pytest.approx(twice.choices[1].compute_s + 2 * forward)
    assert "cached_gradients" in cached.choices[3].refused
    gradients = [choice.sent_bytes("gradients", 2) for choice in twice.choices]
    assert gradients[2] == 2 * gradients[1] == 2 * gradients[0]  # ZeRO 2 holds no whole sum to wait with


def test_a_queue_is_refused_at_zero_3_and_gathered_below() -> None:
    config = quickstart("engine.precision=pure_bf16")
    found = estimate_stage(config, config.stages[2], 1, 4, USUAL)
    assert "pure_bf16" in found.choices[0].refused and "momentum encoders" in found.choices[3].refused
    assert found.choices[1].sent_bytes("averages", 4) == pytest.approx(2 * 4 * found.plan.trainable * 3 / 4, rel=0.01)
    assert found.choices[1].sent_bytes("features, keys", 4) == pytest.approx(64 * (2 * 2 * 128 + 4) * 3 / 4, rel=0.05)


def test_manifests_tell_the_size_of_a_sample(tiny_world: Path, tiny_recipe: Callable[..., RunConfig]) -> None:
    config = tiny_recipe(tiny_world)
    found = estimate_stage(config, config.stages[1], 1, 1, USUAL)
    tars = list((tiny_world / "market1501").glob("*.tar"))
    assert found.measured
    assert found.sample_bytes * 128 == pytest.approx(sum(path.stat().st_size for path in tars), rel=0.5)


def test_one_row_a_rank_has_a_plan() -> None:
    """A BatchNorm of the gathered batch must not meet the one row alone."""
    text = describe_cluster(quickstart("stages.pretrain.steps=0", "stages.t2i.steps=0"), "8x8")
    assert "1 a rank" in text and not dist.is_initialized()


def test_the_text_states_its_assumptions_and_marks_what_is_configured() -> None:
    text = describe_cluster(quickstart("stages.i2i.steps=0"), "2x4", ["fp32_tflops=12.5", "utilisation=0.25"])
    assert "plan for 2 x 4 GPUs, 8 ranks" in text and "ARITHMETIC" in text
    assert "fp32_tflops=12.5" in text and "utilisation=0.25" in text and "far_gbs=45" in text
    assert len(re.findall(r"^ +1\* ", text, re.MULTILINE)) == 2  # i2i does not train
    assert "refused: " in text and "i2i" not in text
    assert max(len(line) for line in text.splitlines()) < 180


@pytest.mark.parametrize(
    ("cluster", "settings", "message"),
    [
        ("8", [], "--plan 8: wants nodes x GPUs of each, such as 8x8, or 1x2"),
        ("0x8", [], "--plan 0x8: wants"),
        ("8x", [], "--plan 8x: wants"),
        ("8x8x8", [], "--plan 8x8x8: wants"),
        ("1x3", [], "global_batch_size"),
        ("1x2", ["utilisation"], "--plan-set utilisation: wants key=value"),
        ("1x2", ["utilization=0.5"], "--plan-set utilization=0.5: did you mean utilisation?"),
        ("1x2", ["zzz=1"], "--plan-set zzz=1: known: bf16_tflops"),
        ("1x2", ["utilisation=1.5"], "--plan-set utilisation=1.5: Input should be less than or equal to 1"),
        ("1x2", ["memory_gbs=nan"], "--plan-set memory_gbs=nan: Input should be a finite number"),
        ("1x2", ["memory_gbs=fast"], "--plan-set memory_gbs=fast: Input should be a valid number"),
    ],
)
def test_wrong_input_is_one_line(cluster: str, settings: list[str], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as error:
        describe_cluster(quickstart(), cluster, settings)
    assert len(str(error.value).splitlines()) == 1


def test_arguments() -> None:
    assert read_cluster("16x4") == (16, 4)
    assert read_assumptions(["near_gbs=1e3"]).near_gbs == 1000
    assert read_assumptions([]) == USUAL


def test_ranks_are_not_pretended_inside_a_group() -> None:
    with pretended_ranks(2), pytest.raises(RuntimeError, match="outside of a process group"), pretended_ranks(4):
        pass
    assert not dist.is_initialized()


def test_command() -> None:
    line = [sys.executable, "launch/train.py", "configs/quickstart.yaml", "data.root=/nowhere", "--plan", "1x2"]
    line += ["stages.i2i.steps=0", "stages.t2i.steps=0", "--plan-set", "utilisation=0.9", "--plan-set", "sample_kb=5"]
    result = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "utilisation=0.9" in result.stdout and "5 kB (assumed)" in result.stdout
    assert result.stdout.count("samples/s") == 1


def test_wrong_input_ends_the_command_with_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(ROOT / "configs" / "quickstart.yaml"), "--plan", "many"]) == 2
    assert capsys.readouterr().err == "train.py: --plan many: wants nodes x GPUs of each, such as 8x8, or 1x2\n"
