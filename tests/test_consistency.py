"""What is compared over the ranks, and that a difference in any of it names tensor and rank."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from reid_dist.config import EngineConfig, ModelConfig, OptimizerConfig, TextLoss
from reid_dist.consistency import check_ranks_agree
from reid_dist.distributed import note_waits, rank
from reid_dist.engine import build_engine
from reid_dist.errors import DivergenceError
from reid_dist.models.architecture import build_dual_encoder
from reid_dist.stages import T2IStage
from reid_dist.stages.contract import Batch, Surroundings

ARCHITECTURE = str(Path(__file__).parents[1] / "configs" / "models" / "row_conv_tiny.json")
ROWS = 4
WEIGHT = "encoder.visual.projection.weight"


def make_stage(sharded: bool = False, queue: bool = True) -> T2IStage:
    torch.manual_seed(0)
    encoder = build_dual_encoder(ModelConfig(architecture=ARCHITECTURE, image_size=(64, 32)))
    loss = TextLoss(queue_size=30, queue_sharded=sharded, queue_check_every=0) if queue else TextLoss()
    stage = T2IStage(encoder, loss, run=Surroundings(ROWS))
    stage.register_buffer("scale", torch.ones(3))
    stage.register_module("norm", torch.nn.BatchNorm1d(3))
    stage.start(lambda names: ((n, x.detach()) for n, x in stage.state_dict().items() if n in names))
    if stage.moco is not None:
        keys = torch.randn(ROWS, encoder.features, generator=torch.Generator().manual_seed(rank()))
        stage.moco.queue.commit([stage.moco.queue.gather(keys, keys, torch.arange(ROWS) + 10 * rank())])
    return stage


def complaint(stage: T2IStage) -> str:
    try:
        check_ranks_agree(stage, 6)
    except DivergenceError as error:
        return str(error)
    return ""


def _differences(bad: int) -> dict[str, str]:
    here = rank() == bad
    stage, found = make_stage(), {}
    assert stage.moco is not None
    state = stage.moco.key_encoder.state()
    ring = stage.moco.queue.ring
    targets = {
        "weight": dict(stage.named_parameters())[WEIGHT].data,
        "frozen": stage.encoder.logit_scale.requires_grad_(False).data,
        "buffer": stage.get_buffer("scale"),
        "momentum": state[sorted(state)[0]],
        "image key": ring.image_XD,
        "text key": ring.text_XD,
    }
    waits: list = []
    note_waits(waits)
    found["nothing"] = complaint(stage)
    note_waits(None)
    found["collectives"] = str(len(waits))
    for name, tensor in targets.items():
        flat = tensor.view(-1)
        kept = flat[-1].clone() if "key" not in name else flat[0].clone()
        place = 0 if "key" in name else -1
        flat[place] += 1e-6 * here
        found[name] = complaint(stage)
        flat[place] = kept
    stage.norm.running_mean += rank()  # the ranks' own
    found["statistics"] = complaint(stage)
    return found


@pytest.fixture(scope="module")
def differences(run_ranks: Callable) -> list[dict[str, str]]:
    return run_ranks(3, _differences, 1)


def test_equal_ranks_agree_in_one_collective(differences: list[dict[str, str]]) -> None:
    assert {found["nothing"] for found in differences} == {""}
    assert {found["collectives"] for found in differences} == {"1"}


@pytest.mark.parametrize(
    ("what", "named"),
    [
        ("weight", WEIGHT),
        ("frozen", "encoder.logit_scale"),
        ("buffer", "scale"),
        ("momentum", "momentum encoder, encoder."),
        ("image key", "feature queue"),
        ("text key", "feature queue"),
    ],
)
def test_a_millionth_on_one_rank_is_found_and_named_on_all(what: str, named: str, differences: list) -> None:
    assert len({found[what] for found in differences}) == 1
    text = differences[0][what]
    assert text.startswith(f"step 7: not the same on all ranks: {named}")
    assert "rank 1 of 3 diverged from the others; continue from the last checkpoint" in text
    assert "more tensors" not in text


def test_the_ranks_own_batch_statistics_may_differ(differences: list[dict[str, str]]) -> None:
    assert {found["statistics"] for found in differences} == {""}


def _many() -> tuple[str, str]:
    stage = make_stage(sharded=True)
    assert stage.moco is not None
    agreed = complaint(stage)
    stage.moco.queue.ring.next += rank()
    with torch.no_grad():
        for parameter in stage.parameters():
            parameter += rank()
    return agreed, complaint(stage)


def test_of_many_tensors_the_first_are_named_and_shards_of_a_queue_are_no_difference(run_ranks: Callable) -> None:
    (agreed, text), other = run_ranks(2, _many)
    assert (agreed, text) == other and agreed == ""
    assert text.count("two ranks differ") == 3 and "more tensors" in text


def random_batch(seed: int) -> Batch:
    generator = torch.Generator().manual_seed(10 * seed + rank())
    token = torch.randint(3, 400, (ROWS, 40), generator=generator)
    token[:, -1] = 511
    return {
        "image_BCHW": torch.randint(0, 256, (ROWS, 3, 64, 32), generator=generator, dtype=torch.uint8),
        "token_BL": token,
        "pid_B": torch.arange(ROWS) + 100 * seed + 10 * rank(),
        "sample_id_B": torch.arange(ROWS),
    }


def _trained(backend: str, zero_stage: int) -> list[str]:
    """Two steps that agree, then a millionth on rank 1, compared before the next step and after it."""
    stage = make_stage(queue=False)
    config = EngineConfig(backend=backend, zero_stage=zero_stage)  # type: ignore[arg-type]
    engine = build_engine(stage.train(), config, OptimizerConfig(lr=1e-3), ROWS)
    found = []
    for step in range(3):
        engine.backward(engine(random_batch(step))["loss"])
        engine.step()
        found.append(complaint(stage))
        if step == 1 and zero_stage != 3:
            with torch.no_grad():
                dict(stage.named_parameters())[WEIGHT].view(-1)[-1] += 1e-6 * rank()
            found.append(complaint(stage))
    engine.close()
    return found


@pytest.mark.usefixtures("deepspeed_imported")
@pytest.mark.parametrize(("backend", "zero_stage"), [("deepspeed", 0), ("deepspeed", 1), ("torch", 3)])
def test_in_training_what_differs_is_found_and_nothing_else(backend: str, zero_stage: int, run_ranks: Callable) -> None:
    first, second = run_ranks(2, _trained, backend, zero_stage)
    assert first == second
    if zero_stage == 3:  # the ranks' own shards
        assert first == ["", "", ""]
        return
    assert first[:2] == ["", ""] and WEIGHT in first[2]
    # ZeRO 1 sends the weights anew.
    assert (WEIGHT in first[3]) == (zero_stage == 0)
