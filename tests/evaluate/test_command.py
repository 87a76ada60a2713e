"""A whole evaluation of tiny runs: what is scored, what is read, what is refused, on any number of ranks."""

import gc
import json
import shutil
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import reid_dist
from launch.evaluate import INTERRUPTED, main
from reid_dist import distributed
from reid_dist.checkpoint.portable import file_sha256
from reid_dist.data.reader import ShardSet
from reid_dist.data.transforms import decode_image
from reid_dist.errors import UserError
from reid_dist.evaluate import scoring
from reid_dist.evaluate.command import Request, evaluate
from reid_dist.evaluation.ranking import Retrieval, rank_metrics, rank_queries, summarise
from reid_dist.evaluation.reranking.neighbour_jaccard import neighbour_jaccard
from reid_dist.evaluation.similarity import QUERY_BLOCK
from reid_dist.report.page import require_page

NewRun = Callable[..., Path]
BOTH = ("cuhk_pedes", "market1501")


@pytest.fixture(autouse=True)
def _leave_no_process_group() -> Iterator[None]:
    yield
    distributed.shutdown()


def test_scores_are_those_of_the_loaded_model(new_run: NewRun, world: Path, capsys: pytest.CaptureFixture) -> None:
    run = new_run("run")
    scores = evaluate(Request([run], ["cuhk_pedes"], rerank=["jaccard:neighbours=3,weight=0.5"]))
    shards, model = ShardSet(world / "cuhk_pedes"), reid_dist.load(run, "cpu")
    rows = shards.rows("test").tolist()
    image_ND = torch.cat([model.encode_image(_picture(shards, row)) for row in rows])
    captions = [(text, row) for row in rows for text in shards.sample(row).captions]
    text_MD = model.encode_text([text for text, _ in captions])
    pid_N = torch.tensor(shards.index["pid"][rows].astype(int))
    pid_M = torch.tensor([int(shards.index["pid"][row]) for _, row in captions])
    expected = [rank_metrics(text_MD, image_ND, pid_M, pid_N), None, rank_metrics(image_ND, text_MD, pid_N, pid_M)]
    expected[1] = summarise(rank_queries(neighbour_jaccard(Retrieval(text_MD, image_ND, pid_M, pid_N), 3, 0.5)))
    found = [(row.task, row.reranking is None) for row in scores.rows]
    assert found == [("t2i", True), ("t2i", False), ("i2t", True), ("i2t", False)]
    for row, metrics in zip(scores.rows, expected, strict=False):
        assert row.metrics == pytest.approx(metrics, abs=1e-6)
    assert "jaccard(neighbours=3, weight=0.5)" in capsys.readouterr().out


def _picture(shards: ShardSet, row: int) -> Any:
    return decode_image(shards.image_bytes(row), (64, 32), "test")


def test_a_recorded_score_is_read_and_said_to_be(
    new_run: NewRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    run = new_run("run")
    first = evaluate(Request([run], BOTH))
    assert not any(row.is_read for row in first.rows) and len(first.rows) == 3
    capsys.readouterr()
    more = evaluate(Request([run], BOTH, rerank=["jaccard"], tasks=["i2t", "t2i", "i2i"]))
    assert [row.is_read for row in more.rows] == [True, False] * 3
    assert capsys.readouterr().out.count("not scored again; --again does") == 3
    (path,) = (run / "t2i" / "evaluation").glob("*.i2i.cosine.*")
    changed = json.loads(path.read_text())
    path.write_text(json.dumps(changed | {"metrics": changed["metrics"] | {"mAP": 99.0}}))
    assert evaluate(Request([run], ["market1501"])).rows[0].metrics["mAP"] == 99
    again = evaluate(Request([run], BOTH, again=True))
    assert [row.metrics for row in again.rows] == [row.metrics for row in first.rows]
    (told,) = [note for note in again.notes if "other numbers than those recorded" in note]
    assert told.startswith("run/t2i on market1501") and "another batch size, kind of device or library" in told
    assert any("other numbers than those recorded" in note for note in again.notes)

    def fail(*_: object) -> None:
        raise AssertionError("the model is not needed")

    monkeypatch.setattr("reid_dist.evaluate.scoring.TrainedModel", fail)
    assert all(row.is_read for row in evaluate(Request([run], BOTH)).rows)


def test_two_class_tokens_have_image_features_for_each_task(new_run: NewRun, world: Path) -> None:
    run = new_run("dual", "model.dual_token=true", f"model.architecture={_vit(world)}")
    scores = evaluate(Request([run], ["market1501"]))
    shards, model = ShardSet(world / "market1501"), reid_dist.load(run, "cpu")

    def side(task: Any, *roles: str) -> tuple:
        rows = shards.rows("test", roles).tolist()
        feature = torch.cat([model.encode_image(_picture(shards, row), task) for row in rows])
        index = shards.index[rows]
        return feature, torch.tensor(index["pid"].astype(int)), torch.tensor(index["camid"].astype(int))

    expected = {}
    for task in ("i2i", "t2i"):
        (q, pid_q, cam_q), (g, pid_g, cam_g) = side(task, "query"), side(task, "gallery", "distractor")
        expected[task] = rank_metrics(q, g, pid_q, pid_g, cam_q, cam_g)
    assert scores.rows[0].metrics == pytest.approx(expected["i2i"], abs=1e-6) != pytest.approx(expected["t2i"])


def _vit(world: Path) -> Path:
    path = world / "vit.json"
    vision = {"image_size": 64, "layers": 1, "width": 16, "head_width": 8, "patch_size": 16}
    text = {"context_length": 16, "vocab_size": 200, "width": 16, "heads": 2, "layers": 1}
    path.write_text(json.dumps({"embed_dim": 12, "vision_cfg": vision, "text_cfg": text}))
    return path


def test_selection_asks_the_test_split_of_the_chosen_model_alone(new_run: NewRun, capsys: Any, tmp_path: Path) -> None:
    runs = [new_run("a"), new_run("b", "seed=1")]
    out = tmp_path / "new" / "out.json"
    scores = evaluate(Request(runs, ["cuhk_pedes"], select="t2i.mAP", json=out))
    known = json.loads(out.read_text())["selection"]
    assert known["values"][known["chosen"]] == max(known["values"].values()) and known["split"] == "val"
    assert {row.model for row in scores.rows} == {known["chosen"]} and {row.split for row in scores.rows} == {"test"}
    files = {run.name: [p.name.split(".")[1:3] for p in (run / "t2i" / "evaluation").iterdir()] for run in runs}
    not_chosen = ({"a", "b"} - {known["chosen"].split("/")[0]}).pop()
    assert files[not_chosen] == [["val", "t2i"]]
    assert "chosen" in capsys.readouterr().out


def test_results_for_machines(new_run: NewRun, tmp_path: Path) -> None:
    runs, out = [new_run("a"), new_run("b", "seed=1")], tmp_path / "out.json"
    evaluate(Request(runs, BOTH, rerank=["k_reciprocal:k1=4,k2=2"], json=out))
    found = json.loads(out.read_text())
    assert [model["name"] for model in found["models"]] == ["a/t2i", "b/t2i"]
    assert [model["seed"] for model in found["models"]] == [0, 1] and len(found["models"][0]["sha256"]) == 64
    assert found["models"][0]["trained_on"] == ["generic", "market1501", "cuhk_pedes"]
    assert [each["tasks"] for each in found["benchmarks"]] == [["t2i", "i2t"], ["i2i"]]
    assert len(found["results"]) == 12 and len(found["seeds"]) == 6 and found["selection"] is None
    assert found["results"][1]["reranking"] == {"name": "k_reciprocal", "k1": 4, "k2": 2, "weight": 0.3}
    assert found["results"][0]["queries"] == 48 and found["results"][0]["gallery"] == 24
    assert found["ranks"] == 1 and "commit" in found and "rectangular" in found["protocol"]["rules"]
    mean = found["seeds"][0]["mean"]["mAP"]
    values = [each["metrics"]["mAP"] for each in found["results"] if each["task"] == "t2i" and not each["reranking"]]
    assert mean == pytest.approx(sum(values) / 2)


def test_of_equal_seeds_there_is_a_note_and_no_mean(new_run: NewRun, tmp_path: Path) -> None:
    run, out = new_run("a"), tmp_path / "out.json"
    shutil.copytree(run, tmp_path / "b")
    evaluate(Request([run, tmp_path / "b"], ["market1501"], json=out))
    found = json.loads(out.read_text())
    assert found["seeds"] == [] and any("a/t2i, b/t2i: " in note and "no mean" in note for note in found["notes"])


def numbers(run: Path, benchmark: Path, out: Path) -> int:
    rerankings = ["--rerank", "jaccard", "k_reciprocal:k1=4,k2=2"]
    return main([str(run), "--benchmarks", str(benchmark), *rerankings, "--json", str(out)])


@pytest.fixture
def many_captions(write_set: Callable[..., Path], tmp_path: Path) -> Path:
    """All three tasks; more captions than a block of queries, and than a block of the encoder."""
    words = "red", "blue", "coat", "black", "white", "shirt", "bag", "shoes"
    images = [(pid, camera) for pid in "abcdef" for camera in (0, 1, 2)]
    sentences = [f"{x} {y} {z}" for x in words for y in words for z in words][::17]
    entries = [
        (pid, camera, "query" if camera == 0 else "gallery", [f"{words[place % 8]} {each}" for each in sentences])
        for place, (pid, camera) in enumerate(images)
    ]
    return write_set(tmp_path / "many", entries)


def test_one_two_and_four_ranks_give_the_same_bits(
    new_run: NewRun, many_captions: Path, run_ranks: Any, tmp_path: Path
) -> None:
    found = []
    for ranks in (1, 2, 4):
        run, out = new_run(f"run{ranks}"), tmp_path / f"{ranks}.json"
        assert set(run_ranks(ranks, numbers, run, many_captions, out)) == {0}
        results = json.loads(out.read_text())
        assert results["ranks"] == ranks and not any(each["was_recorded"] for each in results["results"])
        assert results["results"][0]["queries"] > QUERY_BLOCK  # no single rank has all blocks
        found.append([(each["metrics"], each["tied"], each["reranking"]) for each in results["results"]])
    assert found[0] == found[1] == found[2] and len(found[0]) == 9


def test_overlap_is_refused_allowed_or_not_known(
    new_run: NewRun, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run = new_run("run")
    other = tmp_path / "market_of_pedes"  # tars and index of the training set under another name: its splits moved
    shutil.copytree(world / "cuhk_pedes", other)
    _move_to_test(other)
    with pytest.raises(UserError, match=r"run/t2i: .*images to train on are also in .*; --allow-overlap scores it"):
        evaluate(Request([run], [str(other)]))
    assert not (run / "t2i" / "evaluation").exists()
    scores = evaluate(Request([run], [str(other)], allow_overlap=True))
    allowed = [note for note in scores.notes if note.startswith("run/t2i: OVERLAP allowed")]
    assert allowed
    assert any("overlap with the benchmarks was not compared for training set generic" in note for note in scores.notes)
    assert capsys.readouterr().out.count("OVERLAP allowed") == len(allowed)


def _move_to_test(folder: Path) -> None:
    index = np.load(folder / "index.npy")
    index["split"], index["role"] = 2, 2
    np.save(folder / "index.npy", index)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"index_sha256": ""}))


def test_an_interrupted_evaluation_goes_on_where_it_was(
    new_run: NewRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    run, out = new_run("run"), tmp_path / "out.json"
    arguments = [str(run), "--benchmarks", *BOTH, "--json", str(out)]
    whole = scoring.score_task

    def stop_at_images(task: Any, way: Any) -> Any:
        if task.kind == "i2i":
            raise KeyboardInterrupt
        return whole(task, way)

    monkeypatch.setattr(scoring, "score_task", stop_at_images)
    assert main(arguments) == INTERRUPTED and not out.exists()
    assert "interrupted; scores so far are recorded" in capsys.readouterr().err
    monkeypatch.setattr(scoring, "score_task", whole)
    assert main(arguments) == 0
    assert [each["was_recorded"] for each in json.loads(out.read_text())["results"]] == [True, True, False]


def test_bad_images_and_features_are_one_line_and_leave_nothing(
    new_run: NewRun, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run, out = new_run("run"), tmp_path / "out.json"
    broken = tmp_path / "broken"
    shutil.copytree(world / "market1501", broken)
    shards = ShardSet(broken)
    (tar,) = broken.glob("*.tar")
    data = bytearray(tar.read_bytes())
    data[int(shards.index[shards.rows("test")[3]]["image_offset"]) + 20] ^= 1
    tar.write_bytes(data)
    assert main([str(run), "--benchmarks", str(broken), "--allow-overlap", "--json", str(out)]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and "the image is damaged" in said[0] and not out.exists()

    model = reid_dist.load(run, "cpu")
    next(model.encoder.visual.parameters()).data.fill_(float("nan"))
    _rewrite(run / "t2i" / "export", model)
    assert main([str(run), "--benchmarks", "market1501", "--json", str(out)]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and "hold nan or inf" in said[0] and not out.exists()
    assert not (run / "t2i" / "evaluation").exists()


def _rewrite(export: Path, model: Any) -> None:
    save_file(model.encoder.state_dict(), export / "model.safetensors")
    manifest = json.loads((export / "manifest.json").read_text())
    sha256 = file_sha256(export / "model.safetensors")
    (export / "manifest.json").write_text(json.dumps(manifest | {"sha256": sha256}))


def test_a_caption_of_a_thousand_words_is_a_caption(
    new_run: NewRun, write_set: Callable[..., Path], tmp_path: Path
) -> None:
    long = [("a", -1, "gallery", [" ".join(["red"] * 1000)]), ("b", -1, "gallery", ["blue"])]
    scores = evaluate(Request([new_run("run")], [str(write_set(tmp_path / "long", long))], tasks=["t2i"]))
    assert scores.rows[0].metrics["queries"] == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--benchmarks", "pedes"], "--benchmarks pedes: no such shard set; sets in"),
        (["--benchmarks", "cuhk_pedes", "--data", "/nowhere"], "/nowhere holds no shard sets"),
        (["--benchmarks", "market1501", "--split", "val"], "no query or gallery images in split val"),
        (["--benchmarks", "market1501", "--tasks", "t2i"], "t2i needs captions"),
        (["--benchmarks", "market1501", "--rerank", "k_recip"], "no re-ranking 'k_recip'; known: jaccard, k_rec"),
        (["--benchmarks", "market1501", "--select", "i2i.mAP"], "name several runs or stages"),
        (["--benchmarks", "market1501", "--batch-size", "0"], "--batch-size 0: at least 1"),
        (["--benchmarks", "market1501", "--json", "/"], "--json /"),
        (["--benchmarks", "market1501", "--json", "/dev/null/out.json"], "nothing can be written in /dev/null"),
        (["--benchmarks", "market1501", "--json", f"{300 * 'x'}.json"], "the name is too long; name another place"),
        (["--benchmarks", "market1501", "--json", f"/tmp/{240 * 'x'}.json"], "the name is too long"),
        (["--benchmarks", "market1501", "--report", f"{300 * 'x'}/report"], "the name is too long"),
        (["--benchmarks", "market1501", "--report", "new", "--json", "new/out.json"], "which has its own results.json"),
        (["--benchmarks", "market1501", "--report", "/dev/null"], "--report /dev/null: is no folder"),
        (["--benchmarks", "market1501", "--report", "/"], "--report /: holds something else"),
        (["--benchmarks", ""], "--benchmarks '': no such shard set; sets in"),
        (["--benchmarks", 5000 * "x"], ": no such shard set; sets in"),
        ([5000 * "x", "--benchmarks", "market1501"], ": no such folder"),
        (["more", "--benchmarks", "market1501"], "more: no such folder"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(
    run: Path, arguments: list[str], words: str, capsys: pytest.CaptureFixture
) -> None:
    assert main([str(run), *arguments]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("evaluate.py: ") and words in said.err and len(said.err.splitlines()) == 1
    assert said.out == "" and not (run / "t2i" / "evaluation").exists()


def test_a_report_is_written_from_fresh_scores(new_run: NewRun, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the extra [plot] is not installed")
    run, folder = new_run("run"), tmp_path / "page"
    evaluate(Request([run], ["market1501"]))
    arguments = [str(run), "--benchmarks", "market1501", "--report", str(folder)]
    assert main([*arguments, "--json", str(folder / "results.json")]) == 0
    require_page(folder)  # the results are of the report: no reason to refuse it
    (found,) = json.loads((folder / "results.json").read_text())["results"]
    assert not found["was_recorded"]
    shown = (folder / "report.md").read_text()
    assert "# Evaluation on market1501" in shown and f"| {found['metrics']['mAP']:.1f} |" in shown
    assert shown.count("ties pessimistic") == 1  # one table of scores, one note


class FakePage:
    """Keeps nothing of a section, so that the test sees whether anybody else does."""

    def __init__(self, folder: Path) -> None:
        self.kinds: list[list[str]] = []

    def __enter__(self) -> "FakePage":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def add(self, section: Any) -> None:
        self.kinds.append([result.kind for result in section.results])

    def finish(self, title: str, tables: Any, about: Any, results: Any) -> None:
        assert self.kinds == [["t2i", "i2t"], ["i2i"]] * 2 and "weights of a/t2i" in about
        assert len(results["results"]) == 6 and "ties pessimistic" in tables[0].note


def test_a_report_has_the_features_of_one_section_at_a_time(new_run: NewRun, tmp_path: Path, monkeypatch: Any) -> None:
    encoded: list[weakref.ref] = []
    extract = scoring.extract_benchmark

    def extract_alone(*arguments: Any) -> Any:
        gc.collect()
        assert not [each for each in encoded if each() is not None]
        features = extract(*arguments)
        encoded.append(weakref.ref(features))
        return features

    monkeypatch.setattr(scoring, "extract_benchmark", extract_alone)
    monkeypatch.setattr("reid_dist.evaluate.command.Page", FakePage)
    monkeypatch.setattr("reid_dist.evaluate.command.require_page", lambda folder: None)
    evaluate(Request([new_run("a"), new_run("b", "seed=1")], BOTH, report=tmp_path / "page"))
    assert len(encoded) == 4
