"""Scores of a stage: each task with the image features that belong to it."""

import copy
import json

import pytest
import torch

from reid_dist.data.reader import ShardSet
from reid_dist.data.tokenizer import WordTokenizer
from reid_dist.errors import UserError
from reid_dist.evaluation.benchmark import evaluate_benchmark, extract_benchmark, t2i_task
from reid_dist.evaluation.ranking import rank_queries, summarise
from reid_dist.evaluation.reranking.neighbour_jaccard import neighbour_jaccard
from reid_dist.inputs import build_encoder, open_inputs
from reid_dist.scoring import RERANKED, evaluate, is_scored, record_scores


def test_each_task_is_scored_with_its_own_image_features(tiny_recipe, tmp_path) -> None:
    config = tiny_recipe(tmp_path, "model.dual_token=true")
    stage, size = config.stages[-1], config.model.image_size
    inputs, device = open_inputs(config, 1), torch.device("cpu")
    encoder = build_encoder(config.model, 0)
    for parameter in encoder.visual.projection_i2i.parameters():
        torch.nn.init.normal_(parameter)
    scores = evaluate(encoder, stage, inputs, device, size)
    # An encoder whose only image features are those of image queries, and one that has none of them.
    image_queries, captions = copy.deepcopy(encoder), copy.deepcopy(encoder)
    image_queries.visual.projection = image_queries.visual.projection_i2i
    captions.visual.projection_i2i = image_queries.visual.projection_i2i = None
    for task, own, other in (("t2i", captions, image_queries), ("i2i", image_queries, captions)):
        name = getattr(stage.evaluation, task)[0]
        shards, tokenizer = inputs.shards[stage.data.location(name)], inputs.tokenizer if task == "t2i" else None
        split = stage.evaluation.split
        found = [evaluate_benchmark(x, shards, tokenizer, size, split=split)[task] for x in (own, other)]
        assert scores[task][name] == found[0] != found[1], task


def test_a_task_without_anything_to_find_does_not_stop_the_other(tmp_path, write_set) -> None:
    same_camera = [(pid, 0, role, ["red"]) for pid in "ab" for role in ("query", "gallery")]
    shards, tokenizer = ShardSet(write_set(tmp_path / "set", same_camera)), WordTokenizer(["red"], 4, 5)

    class Colour:
        def encode_image(self, image: torch.Tensor) -> torch.Tensor:
            return image.float().mean((2, 3))

        def encode_text(self, token: torch.Tensor) -> torch.Tensor:
            return torch.ones(len(token), 3)

    pair = evaluate_benchmark(Colour(), shards, tokenizer, (16, 8), wanted=["t2i"])
    assert pair.keys() == {"t2i"} and pair["t2i"]["queries"] == 4
    with pytest.raises(UserError, match="none of the 2 queries has a positive"):
        evaluate_benchmark(Colour(), shards, tokenizer, (16, 8), wanted=["i2i"])


def test_a_stage_asks_a_set_for_the_task_that_it_names(tiny_recipe, tmp_path, monkeypatch) -> None:
    config = tiny_recipe(tmp_path, "evaluation.i2i=[]")
    inputs, asked = open_inputs(config, 1), []

    def remember(*_: object, wanted: list[str]) -> dict:
        asked.append(wanted)
        return {task: {} for task in wanted}

    monkeypatch.setattr("reid_dist.scoring.evaluate_benchmark", remember)
    encoder = build_encoder(config.model, 0)
    evaluate(encoder, config.stages[-1], inputs, torch.device("cpu"), config.model.image_size)
    assert asked == [["t2i"]]


def test_re_ranked_scores_stand_beside_the_plain_ones_with_their_parameters(tiny_recipe, tmp_path, capsys) -> None:
    with pytest.raises(UserError, match=r"evaluation\.rerank\.weight"):
        tiny_recipe(tmp_path, "evaluation.rerank.weight=1e39")
    parameters = {"neighbours": 3, "weight": 0.5}
    config = tiny_recipe(tmp_path, "evaluation.rerank.neighbours=3", "evaluation.rerank.weight=0.5")
    plain = tiny_recipe(tmp_path)
    inputs, device, size = open_inputs(config, 1), torch.device("cpu"), config.model.image_size
    encoder = build_encoder(config.model, 0)
    stage = config.stages[-1]
    scores = evaluate(encoder, stage, inputs, device, size)
    (name,) = stage.evaluation.t2i
    shards = inputs.shards[stage.data.location(name)]
    features = extract_benchmark(encoder, shards, inputs.tokenizer, size, split=stage.evaluation.split)
    task = t2i_task(features)
    assert task is not None
    reranked = summarise(rank_queries(neighbour_jaccard(task.retrieval, 3, 0.5)))
    assert scores[RERANKED] == {name: {**reranked, **parameters}}
    without = evaluate(encoder, plain.stages[-1], inputs, device, size)
    assert without == {task: scores[task] for task in ("t2i", "i2i")}
    assert scores[RERANKED][name]["mAP"] != scores["t2i"][name]["mAP"]

    record_scores(config, stage.name, stage.evaluation.split, without, 1.0)
    assert is_scored(tmp_path, stage.name, plain.stages[-1]) and not is_scored(tmp_path, stage.name, stage)
    record_scores(config, stage.name, stage.evaluation.split, scores, 1.0)
    assert f"t2i_reranked (3 neighbours, weight 0.5) on {name}: R1" in capsys.readouterr().out
    assert json.loads((tmp_path / stage.name / "metrics.json").read_text())[RERANKED][name]["neighbours"] == 3
    other = tiny_recipe(tmp_path, "evaluation.rerank.neighbours=4", "evaluation.rerank.weight=0.5")
    scored = [is_scored(tmp_path, stage.name, recipe.stages[-1]) for recipe in (config, plain, other)]
    assert scored == [True, True, False]
