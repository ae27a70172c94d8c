"""Intervals, comparisons and tables of results.py. Run: pytest tests/test_results.py"""
import csv
import json
import math

import numpy as np
import pytest
import torch

import results
from counting import Levels, Samples
from evaluate import Result
from metrics import PixelMetric, parse_metrics


def made_result(metrics, count=12, seed=0, skill=1.0, repeats=None):
    """The Result of made 8-bit maps of 6 x 6 pixels, a third of them of authentic images; `repeats` lists which of the
    images, each possibly several times."""
    rng = np.random.default_rng(seed)
    label = (np.arange(count) % 3 > 0).astype(float)
    score = np.rint(255 / (1 + np.exp(-rng.normal(size=count) - skill * (2 * label - 1)))) / 255
    masks = [(rng.random((1, 6, 6)) < 0.3 * each).astype(np.float32) for each in label]
    maps = [np.rint(255 / (1 + np.exp(-rng.normal(size=(1, 6, 6)) - skill * (2 * mask - 1)))) / 255 for mask in masks]
    chosen = range(count) if repeats is None else repeats
    samples = Samples(*([torch.from_numpy(np.float32(each[i])) for i in chosen] for each in (maps, masks)))
    columns = {metric.name: torch.stack(metric.columns(samples)).numpy() for metric in metrics
               if isinstance(metric, PixelMetric) and metric.count_columns()}
    chosen = list(chosen)
    result = Result({}, {}, {}, score[chosen], label[chosen], {}, None, columns, Levels(samples.keys))
    result.values.update({metric.name: float(metric.value(result.draw())[0]) for metric in metrics})
    return result


def test_a_resample_is_worth_what_its_images_are():
    """Of every metric: weights give the value of a set in which images are left out or come several times."""
    metrics = parse_metrics(["all"])
    result = made_result(metrics)
    weights = np.concatenate(list(results.draws(12, resamples=5, seed=3)))
    assert weights.shape == (5, 12) and (weights.sum(axis=1) == 12).all() and (weights == 0).any()
    values = {metric.name: metric.value(result.draw(weights)) for metric in metrics}
    for k, row in enumerate(weights.astype(int)):
        drawn = made_result(metrics, repeats=np.repeat(np.arange(12), row))
        for metric in metrics:
            expected = pytest.approx(drawn.values[metric.name], abs=1e-9, nan_ok=True)
            assert values[metric.name][k] == expected, metric.name


def test_intervals():
    metrics = parse_metrics(["PixelF1", "PixelAUC:pooled", "ImageAUC", "PixelF1:pooled"])
    result = made_result(metrics, count=60)
    ends = results.intervals(result, metrics)
    assert ends == results.intervals(result, metrics)  # seeded
    for metric in metrics:
        low, high = ends[metric.name]
        assert low < result.values[metric.name] < high
    f1 = result.columns["pixel-level F1"][0]
    error = np.nanstd(f1) / math.sqrt(np.count_nonzero(~np.isnan(f1)))  # what the central limit theorem says
    assert ends["pixel-level F1"] == pytest.approx((np.nanmean(f1) - 1.96 * error, np.nanmean(f1) + 1.96 * error),
                                                   abs=0.15 * error)
    one_class = made_result(metrics, repeats=[1, 2, 4])  # all tampered
    assert np.isnan(results.intervals(one_class, metrics, 100)["image-level AUC"]).all()


def test_compare_decides_what_differs_and_nothing_else():
    metrics = parse_metrics(["PixelF1", "PixelF1:pooled", "PixelBestF1:dataset", "ImageAUC"])
    good, bad = made_result(metrics, 60, skill=1.5), made_result(metrics, 60, skill=0.3)
    for name, row in results.compare(good, bad, metrics, 2000).items():
        assert row["decided"] and row["difference"] == row["first"] - row["second"] > 0 and row["p"] < 0.01, name
        assert row["low"] < row["difference"] < row["high"]
    for row in results.compare(good, good, metrics, 500).values():
        assert not row["decided"] and row["difference"] == row["low"] == row["high"] == 0 and row["p"] == 1
    noise = made_result(metrics, 60, seed=9, skill=1.5)
    noise.label, noise.columns = good.label, noise.columns
    assert not results.compare(good, noise, metrics[:1], 2000)["pixel-level F1"]["decided"]
    # By hand: two images whose F1 differ by .2 and .4. Signs flip to differences of .3 .1 -.1 -.3 in the mean.
    pair = [Result({"pixel-level F1": np.mean(f1)}, {}, {}, np.zeros(2), np.ones(2), {}, None,
                   {"pixel-level F1": np.array([f1])}, None) for f1 in ([.5, .9], [.3, .5])]
    row = results.compare(*pair, metrics[:1], 4000)["pixel-level F1"]
    assert row["difference"] == pytest.approx(.3) and (row["low"], row["high"]) == pytest.approx((.2, .4))
    assert row["p"] == pytest.approx(1 / 2, abs=.03)


def test_tables(tmp_path):
    rows = [{"checkpoint": name, "set": owner, "metric": metric, "value": value, "low": value - .1, "high": value + .1,
             "images": 5, "left_out": 0}
            for owner, metric, values in (("CASIA_1", "pixel-level F1", (.5, .7, .6)),
                                          ("CASIA_1", "image-level FPR", (.5, .7, .6)),
                                          ("B|b", "pixel-level F1", (.2, math.nan, .1)))
            for name, value in zip(("a.pth", "b.pth", "c.pth"), values)]
    results.write_results(tmp_path, rows, {"command": ["test.py"]})
    markdown, latex = ((tmp_path / f"results.{suffix}").read_text() for suffix in ("md", "tex"))
    assert markdown.splitlines()[0] == "| set | run | pixel-level F1 | image-level FPR |"
    assert "| CASIA_1 | a.pth | 0.5000 [0.4000, 0.6000] | **0.5000** [0.4000, 0.6000] |" in markdown  # FPR: the lowest
    assert "| CASIA_1 | b.pth | **0.7000** [0.6000, 0.8000] | 0.7000 [0.6000, 0.8000] |" in markdown
    assert "<u>0.6000</u>" in markdown and "| B\\|b | b.pth | - | - |" in markdown
    assert r"CASIA\_1 & b.pth & \textbf{0.7000} {\scriptsize [0.6000, 0.8000]}" in latex and "B|b" in latex
    assert r"\underline{0.6000}" in latex and latex.startswith(r"\begin{tabular}{llrr}")
    stored = json.loads((tmp_path / "results.json").read_text())
    assert stored["command"] == ["test.py"] and len(stored["results"]) == 9 and stored["results"][7]["value"] is None
    with open(tmp_path / "results.csv", newline="") as lines:
        assert [row["value"] for row in csv.DictReader(lines)][:2] == ["0.5", "0.7"]
    many = [{**rows[0], "metric": f"metric {i}"} for i in range(9)]
    header, lines = results.paper_table(many)
    assert header == ["metric", "CASIA_1"] and len(lines) == 9 and lines[0][1][3] == 0  # one run: nothing is best


def test_a_long_table_is_cut_to_eight_lines_with_the_best_checkpoint(capsys, tmp_path):
    for sets, checkpoints, metrics in ((3, 2, 2), (9, 3, 2), (9, 1, 2), (1, 2, 12), (1, 1, 12)):
        results.print_table([{"set": f"set{i}", "checkpoint": f"checkpoint-{k}.pth", "metric": f"metric{m}",
                              "value": k / 10} for k in range(checkpoints) for i in range(sets)
                             for m in range(metrics)], tmp_path, tmp_path / "results.md")
        lines = capsys.readouterr().out.strip().split("\n")
        whole = sets == 3
        assert len(lines) == 8 and any(f"more, all of them in {tmp_path}" in line for line in lines) != whole
        assert lines[-1].startswith("* best checkpoint") == (checkpoints > 1)
