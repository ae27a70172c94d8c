"""What a test reports: intervals, comparison of two models, and the tables results.csv, .json, .md and .tex.

The intervals are those of the percentile bootstrap: images are drawn with replacement 10,000 times, and 95 % of the
values lie inside.
"""
import json
import re
import subprocess
import sys

import numpy as np

import ddp
from counting import Draw, Levels
from log import csv_lines, first_lines, format_table, say, write_file
from registry import ROOT, UserError

RESAMPLES, SEED = 10_000, 0


def draws(count, resamples=RESAMPLES, seed=SEED):
    """Yield weights (R, N) of resamples of N images, how often each is drawn, in pieces that fit into memory."""
    rng, piece = np.random.default_rng(seed), max(1, 4_000_000 // count)
    for start in range(0, resamples, piece):
        rows = min(piece, resamples - start)
        drawn = rng.integers(count, size=(rows, count)) + np.arange(rows)[:, None] * count
        yield np.bincount(drawn.ravel(), minlength=rows * count).reshape(rows, count).astype(np.float64)


def distribution(result, metrics, resamples=RESAMPLES, seed=SEED):
    """Return {metric's name: its values (resamples,)} over resamples of a `Result`'s images."""
    parts = [[metric.value(draw) for metric in metrics]
             for draw in map(result.draw, draws(len(result.label), resamples, seed))]
    return {metric.name: np.concatenate(column) for metric, column in zip(metrics, zip(*parts))}


def intervals(result, metrics, resamples=RESAMPLES, seed=SEED):
    """Return {metric's name: (low, high)}, 95 % intervals; NaN where the metric is undefined.

    What rests on a set's `Levels` is drawn from the images' 8-bit values, and moved by the difference that these make
    to the value itself.
    """
    found, whole = {}, result.draw(np.ones((1, len(result.label))))
    for metric in metrics:
        shift = result.values[metric.name] - metric.value(whole)[0] if metric.way and metric.way.needs_levels else 0.0
        found[metric.name] = shift
    for name, values in distribution(result, metrics, resamples, seed).items():
        defined = values[~np.isnan(values)]
        low, high = np.percentile(defined, [2.5, 97.5]) + found[name] if len(defined) else (np.nan, np.nan)
        found[name] = float(low), float(high)
    return found


def compare(first, second, metrics, resamples=RESAMPLES, seed=SEED):
    """Compare two models' `Result`s on the same images, in the same order.

    The interval is that of the paired bootstrap, which draws the same images for both; p is that of the sign-flip test,
    which exchanges the two models' predictions of each image at random. What rests on `Levels` is treated as in
    `intervals`.

    Returns:
        {metric's name: {"first", "second", "difference", "low", "high", "p", "decided"}}; decided means that 0 lies
        outside of the interval and p is below 0.05, and all is NaN where the metric is undefined
    """
    count, rows = len(first.label), {}
    levels = Levels()
    for each in (first, second) if first.levels else ():
        levels.images.add(each.levels.images.all())
    columns = {name: np.concatenate([column, second.columns[name]], axis=1) for name, column in first.columns.items()}

    def exchanged(swap):  # (R, N): 1 where the second model's prediction stands for the first's
        a, b = (Draw(np.concatenate([first.score, second.score]), np.concatenate([first.label, second.label]), columns,
                     levels, np.concatenate(halves, axis=1)) for halves in ((1 - swap, swap), (swap, 1 - swap)))
        return [metric.value(a) - metric.value(b) for metric in metrics]

    drawn = [distribution(result, metrics, resamples, seed) for result in (first, second)]
    rng, piece, parts = np.random.default_rng(seed), max(1, 2_000_000 // count), []
    for start in range(0, resamples, piece):
        parts.append(exchanged(rng.integers(2, size=(min(piece, resamples - start), count)).astype(np.float64)))
    whole = [result.draw(np.ones((1, count))) for result in (first, second)]
    for metric, chance in zip(metrics, map(np.concatenate, zip(*parts))):
        a, b = (result.values[metric.name] for result in (first, second))
        seen = metric.value(whole[0])[0] - metric.value(whole[1])[0]  # the difference as the draws see it
        differences = drawn[0][metric.name] - drawn[1][metric.name]
        differences, chance = (each[~np.isnan(each)] for each in (differences, chance))
        row = dict.fromkeys(("difference", "low", "high", "p"), float("nan"))
        if len(differences) and len(chance) and not np.isnan(a - b):
            low, high = np.percentile(differences, [2.5, 97.5]) + (a - b - seen)
            as_large = np.count_nonzero(np.abs(chance) >= abs(seen) - 1e-12)
            row = {"difference": a - b, "low": float(low), "high": float(high), "p": (1 + as_large) / (1 + len(chance))}
        decided = bool(row["low"] > 0 or row["high"] < 0) and row["p"] < 0.05
        rows[metric.name] = {"first": a, "second": b, **row, "decided": decided}
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def result_rows(result, metrics, about, after=None):
    """Return the rows of results.csv, one per metric, of a `Result`: what `about` tells, the value with its interval,
    over how many images it is, and what `after` tells."""
    ends = intervals(result, metrics)
    return [{**about, "metric": metric.name, "value": result.values[metric.name], "low": ends[metric.name][0],
             "high": ends[metric.name][1], "images": result.counted[metric.name],
             "left_out": result.left_out[metric.name], **(after or {})} for metric in metrics]


def write_results(folder, rows, run):
    """Write results.csv, results.json (the rows, and what `run` tells), results.md and results.tex."""
    write_file(folder / "results.csv", csv_lines(rows))
    write_json(folder / "results.json", rows, run)
    write_tables(folder, rows)


def write_json(path, rows, run):
    """Write what `run` tells, and rows, whose NaN become null, as "results"."""
    plain = [{key: None if value != value else value for key, value in row.items()} for row in rows]
    write_file(path, json.dumps({**run, "results": plain}, indent=1) + "\n")


def write_tables(folder, rows):
    """Write results.md and results.tex from rows of results.csv or results.json."""
    for suffix, make in (("md", markdown), ("tex", latex)):
        write_file(folder / f"results.{suffix}", make(*paper_table(rows)))


def lower_is_better(metric):
    """Tell whether a metric, by its name, counts errors."""
    return bool(re.search(r"(?<!at \d% )FPR|EER", metric))


def lay_out(rows):
    """Return ({(set and attack, run and checkpoint, metric): row}, [(set and attack, run and checkpoint)] set by set,
    metrics) of rows of results.csv or results.json."""
    def words(row, *keys):
        return " ".join(str(row[key]) for key in keys if row.get(key) not in (None, ""))

    def place_of(row):
        return words(row, "set", "attack", "strength") + " (original size)" * (row.get("eval_size") == "original")

    cells = {(place_of(row), words(row, "run", "checkpoint"), row["metric"]): row for row in rows}
    places, runs, metrics = (list(dict.fromkeys(key[i] for key in cells)) for i in range(3))
    filled = {key[:2] for key in cells}
    return cells, [(place, run) for place in places for run in runs if (place, run) in filled], metrics


def paper_table(rows):
    """Lay out rows of results.csv or results.json for a paper: sets x metrics, or the other way round where there are
    more than eight metrics.

    Returns:
        (header, lines): lists of cells. A cell is a text, or (value, low, high, place) where place is 1 for the best
        and 2 for the second of several runs or checkpoints on the same set under the same attack
    """
    cells, lines, metrics = lay_out(rows)

    def cell(place, run, metric):
        row = cells.get((place, run, metric))
        if row is None or row["value"] is None or row["value"] != row["value"]:
            return "-"
        rivals = [other["value"] for where, name in lines
                  if where == place and (other := cells.get((place, name, metric)))]
        rivals = sorted({round(value, 4) for value in rivals if value is not None and value == value},
                        reverse=not lower_is_better(metric))
        rank = rivals.index(round(row["value"], 4)) + 1 if len(rivals) > 1 else 0
        return row["value"], row.get("low"), row.get("high"), rank

    several = len({run for _, run in lines}) > 1
    if len(metrics) <= 8:
        return ["set", *["run"] * several, *metrics], [
            [place, *[run] * several, *(cell(place, run, metric) for metric in metrics)] for place, run in lines]
    return ["metric", *(" ".join([place] + [run] * several) for place, run in lines)], [
        [metric, *(cell(place, run, metric) for place, run in lines)] for metric in metrics]


def best_checkpoint(rows):
    """Return (name, mean) of the checkpoint whose mean of the first metric over the sets is the best; (None, None)
    where there is but one checkpoint, or no value."""
    cells, lines, metrics = lay_out(rows)
    means = {}
    for checkpoint in dict.fromkeys(run for _, run in lines):
        values = [cells.get(line + (metrics[0],), {}).get("value") for line in lines if line[1] == checkpoint]
        values = [value for value in values if value is not None and value == value]
        if values:
            means[checkpoint] = sum(values) / len(values)
    choose = min if lower_is_better(metrics[0]) else max
    best = choose(means, key=means.get, default=None) if len({run for _, run in lines}) > 1 else None
    return best, means.get(best)


def print_table(rows, folder=None, where=None):
    """Print rows of results.csv or results.json: sets x metrics for every run or checkpoint, the other way round where
    there are more than eight metrics.

    Of several checkpoints of a `folder` the one with the best mean of the first metric over the sets is marked. If a
    file `where` holds all, at most eight lines are printed, with that of the best checkpoint.
    """
    cells, lines, metrics = lay_out(rows)
    values = {key: row["value"] for key, row in cells.items()}
    best, mean = best_checkpoint(rows) if folder else (None, None)
    marks = {run: run + " *" * (run == best) for _, run in lines}
    if where and best and max(len(lines), len(metrics) * (len(metrics) > 8)) > 6:
        lines = [line for line in lines if line[1] == best]
    if len(metrics) <= 8:
        table = [[place, marks[run], *(values.get((place, run, metric)) for metric in metrics)] for place, run in lines]
        table = format_table(["set", "checkpoint" if folder else "run", *metrics], table)
    else:
        table = format_table(["metric", *(f"{place} {marks[run]}" for place, run in lines)],
                             [[metric, *(values.get((place, run, metric)) for place, run in lines)]
                              for metric in metrics])
    say("\n" + (first_lines(table, 8 - bool(best), where) if where else table))
    if best:
        say(f"* best checkpoint by the mean {metrics[0]} over the sets: {folder / best} ({mean:.4f})")


def markdown(header, lines):
    """Return a table of `paper_table` as Markdown."""
    def text(cell):
        if isinstance(cell, str):
            return cell.replace("|", "\\|").replace("\n", " ")
        value, low, high, rank = cell
        number = f"{value:.4f}"
        number = {1: f"**{number}**", 2: f"<u>{number}</u>"}.get(rank, number)
        return number + ("" if low is None or low != low else f" [{low:.4f}, {high:.4f}]")
    table = [header, ["---"] + ["---:" if lines and not isinstance(lines[0][i], str) else "---"
                                for i in range(1, len(header))], *lines]
    return "".join("| " + " | ".join(map(text, line)) + " |\n" for line in table)


def latex(header, lines):
    """Return a table of `paper_table` as LaTeX (booktabs)."""
    def text(cell):
        if isinstance(cell, str):
            named = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
            return re.sub(r"[\\&%$#_{}~^]", lambda found: named.get(found[0], "\\" + found[0]), cell.replace("\n", " "))
        value, low, high, rank = cell
        number = f"{value:.4f}"
        number = {1: rf"\textbf{{{number}}}", 2: rf"\underline{{{number}}}"}.get(rank, number)
        return number + ("" if low is None or low != low else rf" {{\scriptsize [{low:.4f}, {high:.4f}]}}")
    kinds = "".join("l" if not lines or isinstance(lines[0][i], str) else "r" for i in range(len(header)))
    body = [" & ".join(map(text, line)) + r" \\" for line in [header, *lines]]
    return "\n".join([rf"\begin{{tabular}}{{{kinds}}}", r"\toprule", body[0], r"\midrule", *body[1:], r"\bottomrule",
                      r"\end{tabular}", ""])


def make_report(folder, args):
    """Make report.html in a test's output folder, on rank 0, as --report asks for; UserError, on all ranks, where that
    fails."""
    flags = [flag for flag in ("no_fingerprint", "no_progress") if getattr(args, flag)]
    command = [sys.executable, ROOT / "tools" / "report.py", folder, "--output", folder / "report.html",
               *(f"--{flag}" for flag in flags)]
    with ddp.fail_together(patiently=True):
        if ddp.is_main() and subprocess.run(command).returncode:
            raise UserError(f"--report: no page could be made, for the reason above; the results in {folder} are "
                            f"complete, and python tools/report.py {folder} makes the page later.")
