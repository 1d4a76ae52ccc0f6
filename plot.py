"""Draw the study's figures and test its claims, from the files in the run folders alone.

    python plot.py runs/toy         # a sweep: figures and tables into runs/toy/figures
    python plot.py runs/            # every sweep below
    python plot.py runs/toy/N16_w32_B16_lr2e-3_s0       # one run

Writes for each run run_NAME.png (four panels), samples_NAME.png, levels_NAME.png (loss by noise
level) and ratios_NAME.png (the whole curve of d1/d2); for each factor swept sweep_, tau_ and
novelty_{n,width,batch,lr}.png; and summary.csv (a row a run) and claims.md (the study's claims).

Definitions. tau_mem, the step at which memorization starts, is given by five: the lowest held-out
loss; held-out loss 25 % above its lowest; copy ratio .01, .1 and .5. Each is interpolated between
evaluations in log step, with a 95 % interval (see tau_intervals); ">X": not reached by step X.
The memorization rate is the slope of the copy ratio, from .02 to .9, a doubling of the step. Best
fidelity is the lowest sliced Wasserstein distance to held-out images up to copy ratio .01.
"""

import argparse
import csv
import io
import json
import math
import os
import sys
import zipfile
import zlib
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np

mpl.use("Agg")
mpl.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
                     "axes.grid": True, "grid.alpha": 0.25, "lines.linewidth": 1.4,
                     "legend.frameon": False, "figure.constrained_layout.use": True,
                     "savefig.dpi": 160})

FACTORS = {"n": "training images N", "width": "base width", "batch": "batch size B",
           "lr": "learning rate"}
# Normalised time T = step * factor, for each sweep; the study gives none for model size.
NORMALISED = {"n": lambda v, low: low / v, "batch": lambda v, low: v / low,
              "lr": lambda v, low: v / low}
TAUS = {"heldout_min": "held-out loss lowest", "heldout_25": "held-out loss 25 % up",
        "copy_01": "copy ratio .01", "copy_10": "copy ratio .1", "copy_50": "copy ratio .5"}
COPY_LEVELS = {"copy_01": 0.01, "copy_10": 0.1, "copy_50": 0.5}
LOWEST_LOSS = 1e-4          # where the axes of the loss by noise level end
NOT_CONFIG = {*FACTORS, "seed", "steps", "images", "out", "device", "compile", "amp",
              "save_minutes"}

# --------------------------------------------------------------------------------------------------
# Reading
# --------------------------------------------------------------------------------------------------


class PlotError(Exception):
    """Something the user gave is wrong; the message is one line."""


def read_columns(path):
    """A CSV file as {column: float array}, nan where a cell is empty or no number; {} if absent."""
    if not path.exists():
        return {}
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    return {key: np.array([number(row[key]) for row in rows]) for key in (rows[0] if rows else {})}


def number(text):
    """float(text), or nan."""
    try:
        return float(text)
    except (TypeError, ValueError):
        return math.nan


class Run:
    """A run folder: its options, log and metrics (columns), and what follows from them."""

    def __init__(self, path):
        self.path, self.name = path, path.name
        try:
            record = json.loads((path / "args.json").read_text())
            self.options, self.parameters = record["options"], record["parameters"]
        except (OSError, ValueError, KeyError, TypeError):
            raise PlotError(f"{path}/args.json: missing or damaged") from None
        self.log = read_columns(path / "log.csv")
        self.metrics = read_columns(path / "metrics.csv")
        self.controls = read_columns(path / "controls.csv")
        self.space = next((s for s in ("inception", "pixels")
                           if f"sw_{s}_train" in self.metrics), None)

    def column(self, name):
        """(steps, values) of a column of log.csv or metrics.csv, finite values only."""
        name = name.format(space=self.space)
        table = self.log if name in self.log else self.metrics
        if name not in table:
            return np.array([]), np.array([])
        keep = np.isfinite(table[name])
        return table["step"][keep], table[name][keep]

    @property
    def family(self):
        """What two runs must share to be compared: every option that is no factor or seed."""
        return json.dumps({k: v for k, v in sorted(self.options.items()) if k not in NOT_CONFIG})

    def factors(self, without=()):
        """The values of the four factors, as a tuple of pairs."""
        return tuple((f, self.options[f]) for f in FACTORS if f not in without)


def find_runs(root):
    """The runs at or below a folder, grouped: {folder for figures: [Run]}, one family each."""
    root = Path(root)
    if not root.is_dir():
        raise PlotError(f"{root}: no such folder")
    paths = [root] if (root / "args.json").exists() else sorted(
        p.parent for p in root.rglob("args.json"))
    groups = {}
    for path in paths:
        run = Run(path)
        if run.log:
            groups.setdefault((path if path == root else path.parent, run.family), []).append(run)
    if not groups:
        raise PlotError(f"{root}: no run with a log.csv below it; train one first")
    several = {parent for parent, family in groups
               if sum(p == parent for p, _ in groups) > 1}
    return {parent / "figures" / (f"family{k}" if parent in several else ""): runs
            for k, ((parent, _), runs) in enumerate(sorted(groups.items()))}


# --------------------------------------------------------------------------------------------------
# Onset, rate, fidelity
# --------------------------------------------------------------------------------------------------


def crossing(steps, values, level):
    """The first step at which `values` reach `level`, linear in log step; inf where they do not."""
    above = np.flatnonzero(values >= level)
    if not len(above):
        return math.inf
    k = above[0]
    if k == 0:
        return float(steps[0])
    share = (level - values[k - 1]) / (values[k] - values[k - 1])
    return float(np.exp(np.log(steps[k - 1]) + share * np.log(steps[k] / steps[k - 1])))


def lowest(steps, values):
    """The step of the lowest value, by a parabola in log step; inf where it is the last one."""
    k = int(np.argmin(values))
    if k == len(values) - 1:
        return math.inf
    if k == 0:
        return float(steps[0])
    x, y = np.log(steps[k - 1:k + 2]), values[k - 1:k + 2]
    a, b, _ = np.polyfit(x - x[1], y, 2)
    return float(np.exp(x[1] - b / (2 * a))) if a > 0 else float(steps[k])


def taus(run):
    """tau_mem by each definition of TAUS: {name: step}; inf not reached, nan not measured."""
    steps, loss = run.column("heldout_loss")
    k = int(np.argmin(loss))
    found = {"heldout_min": lowest(steps, loss),
             "heldout_25": crossing(steps[k:], loss[k:], 1.25 * loss[k])}
    steps, copies = run.column("copy_ratio")
    for name, level in COPY_LEVELS.items():
        found[name] = crossing(steps, copies, level) if len(steps) else math.nan
    return found


def tau_intervals(run, draws=200):
    """95 % intervals of the onsets: {name: (low, high)}; inf not reached, absent where unknown.

    Of the copy ratios by bootstrap over samples, the same ones at every step, as their noise is the
    same (so none where the counts differ); of the held-out loss, which has no such error, from the
    evaluation before to the one after.
    """
    steps, loss = run.column("heldout_loss")
    k = int(np.argmin(loss))
    found = {"heldout_min": (float(steps[max(k - 1, 0)]),
                             float(steps[k + 1]) if k + 1 < len(steps) else math.inf)}
    after = np.flatnonzero(loss[k:] >= 1.25 * loss[k])
    found["heldout_25"] = ((float(steps[k + after[0] - 1]), float(steps[k + after[0]]))
                           if len(after) else (math.inf, math.inf))
    copied = [read_neighbours(file, "ratios") < 1 / 3 for file in snapshot_files(run)]
    if not copied or len({len(c) for c in copied}) > 1:
        return found
    steps, copied = np.array([float(p.stem) for p in snapshot_files(run)]), np.array(copied)
    generator, n = np.random.default_rng(0), copied.shape[1]
    curves = [copied[:, generator.integers(0, n, n)].mean(1) for _ in range(draws)]
    for name, level in COPY_LEVELS.items():
        onsets = sorted(crossing(steps, curve, level) for curve in curves)
        found[name] = onsets[round(0.025 * draws)], onsets[round(0.975 * draws) - 1]
    return found


def read_neighbours(file, key):
    """An array of a neighbours file. Raises PlotError where it is damaged."""
    try:
        with np.load(file) as data:
            return data[key]
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error):
        raise PlotError(f"{file}: damaged; delete it and run measure.py again") from None


def snapshot_files(run):
    """The neighbours files of a run's snapshots, by step."""
    return sorted((run.path / "neighbours").glob("[0-9]*.npz"))


def memorization_rate(run):
    """Slope of the copy ratio a doubling of the step, where it is .02 to .9; nan for < 2 points."""
    steps, copies = run.column("copy_ratio")
    rising = (copies >= 0.02) & (copies <= 0.9)
    if rising.sum() < 2:
        return math.nan
    return float(np.polyfit(np.log2(steps[rising]), copies[rising], 1)[0])


def best_fidelity(run, split="heldout"):
    """The lowest sliced Wasserstein distance before copy ratio .01: (value, step), or nans."""
    steps, distance = run.column("sw_{space}_" + split)
    before = steps <= taus(run)["copy_01"]
    if not before.any():
        return math.nan, math.nan
    k = int(np.argmin(distance[before]))
    return float(distance[before][k]), float(steps[before][k])


def summarize(run):
    """One row of summary.csv."""
    def step_text(value, last):
        return "" if math.isnan(value) else f">{last:.0f}" if math.isinf(value) else f"{value:.0f}"
    last, metrics = run.log["step"][-1], run.metrics
    row = {"run": run.name, **dict(run.factors()), "seed": run.options["seed"],
           "parameters": run.parameters, "last_step": f"{last:.0f}"}
    intervals = tau_intervals(run)
    for name, value in taus(run).items():
        row[f"tau_{name}"] = step_text(value, last)
        for end, bound in zip(("low", "high"), intervals.get(name, (math.nan,) * 2), strict=True):
            row[f"tau_{name}_{end}"] = step_text(bound, last)
    value, step = best_fidelity(run)
    _, copies = run.column("copy_ratio")
    null = metrics.get("null_copy_ratio", np.array([math.nan]))[-1]
    return row | {"memorization_rate": f"{memorization_rate(run):.4g}",
                  "best_sw_heldout": f"{value:.4g}", "best_sw_step": f"{step:.0f}",
                  "space": run.space or "", "final_copy_ratio": f"{copies[-1]:.4f}"
                  if len(copies) else "", "null_copy_ratio": f"{null:.4f}"}


# --------------------------------------------------------------------------------------------------
# Figures
# --------------------------------------------------------------------------------------------------


def palette(count):
    """`count` colours from dark to light, told apart by colour-blind readers and in grey."""
    return [mpl.colormaps["viridis"](x) for x in np.linspace(0.05, 0.85, max(count, 1))]


def label_of(factor, value):
    """N = 2048, B = 16, ..."""
    return {"n": "N", "width": "width", "batch": "B", "lr": "lr"}[factor] + f" = {value:g}"


def draw(axis, runs, column, scale=1.0, **style):
    """The mean over seeds of a column against step * scale, and the seeds' range as a band."""
    tables = [dict(zip(*run.column(column), strict=True)) for run in runs]
    steps = sorted(set.intersection(*(set(t) for t in tables)))
    if not steps:
        return
    values = np.array([[t[s] for s in steps] for t in tables])
    x = np.array(steps) * scale
    axis.plot(x, values.mean(0), marker="." if len(steps) == 1 else None, **style)
    if len(runs) > 1:
        axis.fill_between(x, values.min(0), values.max(0), color=style.get("color"), alpha=0.15,
                          linewidth=0)


def four_panels(axes, runs, color, scale=1.0, label=None):
    """Loss, copy ratio with its null, sliced Wasserstein, FID: train solid, held-out dashed."""
    for axis, column in ((axes[0], "{}_loss"), (axes[2], "sw_{{space}}_{}"),
                         (axes[3], "fid_{{space}}_{}")):
        draw(axis, runs, column.format("train"), scale, color=color, label=label)
        draw(axis, runs, column.format("heldout"), scale, color=color, linestyle="--")
    draw(axes[1], runs, "copy_ratio", scale, color=color, label=label)
    draw(axes[1], runs, "null_copy_ratio", scale, color=color, linestyle=":", linewidth=1)


def short(value, _=None):
    """A tick's label: 0.05, 20, 1k, 2.5k, 100k."""
    return f"{value / 1000:g}k" if value >= 1000 else f"{value:g}"


def log_ticks(axis):
    """Readable ticks on a log axis: 1, 2, 5 where it spans less than two decades, else 1 only."""
    low, high = axis.get_view_interval()
    axis.set_major_locator(mpl.ticker.LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
    axis.set_major_formatter(mpl.ticker.FuncFormatter(short))
    axis.set_minor_formatter(mpl.ticker.NullFormatter())


def dress(axes, space, xlabel):
    """Titles, scales and labels of a row of four panels."""
    unit = {"inception": "Inception features", "pixels": "pixels", None: "not measured"}[space]
    for axis, title, scale in zip(axes, (
            "loss", "copy ratio (d1/d2 < 1/3)", f"sliced Wasserstein, {unit}", f"FID, {unit}"),
            ("log", "linear", "log", "log"), strict=True):
        axis.set(title=title, xlabel=xlabel, xscale="log", yscale=scale)
        log_ticks(axis.xaxis)
        if scale == "log":
            log_ticks(axis.yaxis)
    axes[1].set_ylim(-0.03, 1.03)


def line_key(figure, handles=()):
    """One legend above the panels: the runs' colours, then what the line styles mean."""
    styles = [mpl.lines.Line2D([], [], color="0.3", linestyle=s, label=text) for s, text in
              (("-", "train"), ("--", "held-out"), (":", "null: held-out images"))]
    figure.legend(handles=[*handles, *styles], loc="outside upper center",
                  ncols=len(handles) + 3)


def plot_run(run, path):
    """Four panels of one run, with tau_mem by its lowest held-out loss and by copy ratio .01."""
    figure, axes = plt.subplots(1, 4, figsize=(13, 3.1), sharex=True)
    four_panels(axes, [run], "C0")
    dress(axes, run.space, "step")
    onset = taus(run)
    for axis in axes:
        for name, style in (("heldout_min", (0, (1, 1))), ("copy_01", (0, (5, 2)))):
            if math.isfinite(onset[name]):
                axis.axvline(onset[name], color="C3", linewidth=1, linestyle=style)
    marks = [mpl.lines.Line2D([], [], color="C3", linewidth=1, linestyle=style, label=TAUS[name])
             for name, style in (("heldout_min", (0, (1, 1))), ("copy_01", (0, (5, 2))))]
    line_key(figure, marks)
    save(figure, path)


def plot_sweep(factor, groups, path):
    """Four panels of a sweep, a colour a value: against raw steps and, below, normalised time."""
    rows = 2 if factor in NORMALISED else 1
    figure, axes = plt.subplots(rows, 4, figsize=(13, 3.1 * rows), squeeze=False, sharey="col")
    colors = palette(len(groups))
    space = next((run.space for runs in groups.values() for run in runs if run.space), None)
    for color, (value, runs) in zip(colors, groups.items(), strict=True):
        four_panels(axes[0], runs, color)
        if rows == 2:
            scale = NORMALISED[factor](value, min(groups))
            four_panels(axes[1], runs, color, scale)
    dress(axes[0], space, "step")
    if rows == 2:
        formula = {"n": "step x N_min / N", "batch": "step x B / B_min",
                   "lr": "step x lr / lr_min"}[factor]
        dress(axes[1], space, f"normalised time T = {formula}")
    line_key(figure, [mpl.lines.Line2D([], [], color=c, label=label_of(factor, v))
                      for c, v in zip(colors, groups, strict=True)])
    save(figure, path)


def plot_samples(run, path, images=8, columns=6):
    """Samples from the same noise at several steps, each beside its nearest training image."""
    files = snapshot_files(run)
    chosen = {*np.linspace(0, len(files) - 1, columns).round().astype(int)}
    files = [files[k] for k in sorted(chosen)]
    zoom = max(1, 64 // read_neighbours(files[0], "samples").shape[1])
    size = zoom * read_neighbours(files[0], "samples").shape[1]
    cell, pair = round(1.06 * size), round(2.3 * size)      # from a picture, a pair to the next
    canvas = np.full((images * cell, len(files) * pair, 3), 255, np.uint8)
    figure = plt.figure(figsize=(max(6.0, 1.5 * len(files)), 0.7 * images + 0.7), layout="none")
    axis = figure.add_axes((0.01, 0.01, 0.98, 0.98), anchor="NW")
    for column, file in enumerate(files):
        ratios = read_neighbours(file, "ratios")
        axis.text(column * pair, -0.12 * size, f"step {int(file.stem)}", fontsize=8)
        for k, name in enumerate(("samples", "nearest")):
            left = column * pair + k * cell
            for row, picture in enumerate(read_neighbours(file, name)[:images]):
                top = row * cell
                canvas[top:top + size, left:left + size] = picture.repeat(zoom, 0).repeat(zoom, 1)
                if name == "samples" and ratios[row] < 1 / 3:
                    axis.add_patch(plt.Rectangle((left, top), size, size, fill=False,
                                                 edgecolor="C3", linewidth=2.5))
    axis.text(0, -0.75 * size, f"{run.name}: sample | nearest training image", fontsize=8)
    axis.text(0, -0.45 * size, "Red: a copy (d1/d2 < 1/3). A row has the same noise.", fontsize=8)
    axis.imshow(canvas, interpolation="nearest")
    axis.set(xlim=(-4, canvas.shape[1]), ylim=(canvas.shape[0], -size))
    axis.set_axis_off()
    save(figure, path)


def plot_levels(run, path):
    """Train and held-out loss in ten slices of t: where in the noise memorization shows."""
    figure, axes = plt.subplots(2, 5, figsize=(13, 4.6), sharex=True)
    for k, axis in enumerate(axes.flat):
        draw(axis, [run], f"train_loss_level{k}", color="C0", label="train")
        draw(axis, [run], f"heldout_loss_level{k}", color="C0", linestyle="--", label="held-out")
        _, floor = run.column(f"floor_level{k}")
        if len(floor):
            axis.axhline(max(floor[-1], LOWEST_LOSS), color="C1", linestyle="--", linewidth=2.5,
                         clip_on=False, label=f"perfect memorizer ({LOWEST_LOSS:g} or less: below)")
        side = {0: ", least noise", 9: ", most noise"}.get(k, "")
        axis.set(xscale="log", yscale="log", title=f"t in [{k / 10:.1f}, {(k + 1) / 10:.1f}]{side}")
        axis.set_ylim(bottom=LOWEST_LOSS)
        log_ticks(axis.xaxis)
        log_ticks(axis.yaxis)
    for axis in axes[-1]:
        axis.set_xlabel("step")
    for axis in axes[:, 0]:
        axis.set_ylabel("loss")
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    save(figure, path)


def plot_ratios(run, path, columns=6):
    """The whole curve of d1/d2: the share of samples below each value, and of the controls."""
    figure, axis = plt.subplots(figsize=(5.2, 3.8))
    names = [p.stem for p in snapshot_files(run)]
    chosen = {*np.linspace(0, len(names) - 1, columns).round().astype(int)}
    curves = [(names[k], f"step {int(names[k])}", {"color": color})
              for k, color in zip(sorted(chosen), palette(len(chosen)), strict=True)]
    curves += [("heldout", "held-out images", {"color": "0.2", "linestyle": ":"}),
               ("leave_one_out", "training images, left out", {"color": "0.6", "linestyle": ":"}),
               ("exact", "perfect memorizer", {"color": "C3", "linestyle": "--"})]
    for name, label, style in curves:
        file = run.path / f"neighbours/{name}.npz"
        if file.exists():
            ratios = np.sort(read_neighbours(file, "ratios"))
            axis.step(ratios, (np.arange(len(ratios)) + 1) / len(ratios), where="post",
                      label=f"{label} ({len(ratios)})", **style)
    for threshold in (1 / 4, 1 / 3, 1 / 2):
        axis.axvline(threshold, color="0.8", linewidth=0.8, zorder=0)
    axis.set(xlabel="d1/d2 (lines: 1/4, 1/3, 1/2)", ylabel="share of images below", xlim=(0, 1))
    axis.legend(fontsize=7)
    save(figure, path)


def plot_tau(factor, groups, path):
    """tau_mem by each definition against the factor, with log-log fits; not drawn if none known."""
    onsets = [tau for runs in groups.values() for run in runs for tau in taus(run).values()]
    if not np.isfinite(onsets).any():
        return
    figure, axis = plt.subplots(figsize=(7, 3.8))
    for color, marker, (name, text) in zip(palette(len(TAUS)), "os^Dv", TAUS.items(), strict=True):
        points = [(value, taus(run)[name]) for value, runs in groups.items() for run in runs]
        points = np.array([p for p in points if math.isfinite(p[1])])
        if not len(points):
            continue
        fit = power_law(points)
        axis.loglog(*points.T, marker, color=color, markersize=5, label=text if not fit else
                    f"{text}: slope {fit[0]:.2f}" + (f" ± {fit[2]:.2f}" if fit[2] else ""))
        if fit:
            x = np.array([points[:, 0].min(), points[:, 0].max()])
            axis.loglog(x, np.exp(fit[1]) * x**fit[0], color=color, linewidth=1)
    ticks = sorted(groups)
    axis.set_xticks(ticks, [f"{v:g}" for v in ticks])
    axis.xaxis.set_minor_locator(mpl.ticker.NullLocator())
    log_ticks(axis.yaxis)
    axis.set(xlabel=FACTORS[factor], ylabel="onset of memorization, step")
    figure.legend(fontsize=8, loc="outside right center")
    save(figure, path)


def plot_novelty(factor, groups, path):
    """Fidelity against novelty through training, a curve a value of the factor."""
    figure, axis = plt.subplots(figsize=(5.2, 3.8))
    space = next((run.space for runs in groups.values() for run in runs if run.space), None)
    for color, (value, runs) in zip(palette(len(groups)), groups.items(), strict=True):
        for k, run in enumerate(runs):
            (_, copies), (_, distance) = run.column("copy_ratio"), run.column("sw_{space}_heldout")
            if len(copies) == len(distance) and len(copies):
                axis.plot(1 - copies, distance, ".-", color=color, markersize=4,
                          label=None if k else label_of(factor, value))
                axis.plot(1 - copies[-1], distance[-1], "o", color=color, markersize=7)
    axis.set(xlabel="novelty: 1 - copy ratio", yscale="log",
             ylabel=f"sliced Wasserstein to held-out, {space}  (lower is better)")
    log_ticks(axis.yaxis)
    axis.set_title("through training; the large dot is the end", fontsize=9)
    axis.legend(fontsize=8)
    save(figure, path)


def save(figure, path):
    """Write a figure, whole or not at all, and close it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    plt.close(figure)
    write(path, buffer.getvalue())


def write(path, data):
    """Write bytes through a temporary file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)


# --------------------------------------------------------------------------------------------------
# The study's claims
# --------------------------------------------------------------------------------------------------


def power_law(points):
    """Least-squares line through log-log points (n, 2): (slope, intercept, slope's standard error).

    The error is None for two values of x. None where there are fewer than two.
    """
    x, y = np.log(points).T
    if len(np.unique(x)) < 2:
        return None
    slope, intercept = np.polyfit(x, y, 1)
    if len(x) < 3:
        return slope, intercept, None
    residual = y - slope * x - intercept
    error = math.sqrt((residual**2).sum() / (len(x) - 2) / ((x - x.mean())**2).sum())
    return slope, intercept, error


def sweeps(runs):
    """{factor: {value: [Run, one a seed]}}: the widest set of runs in which one factor varies."""
    found = {}
    for factor in FACTORS:
        sets = {}
        for run in runs:
            values = sets.setdefault(run.factors(without=(factor,)), {})
            values.setdefault(run.options[factor], []).append(run)
        widest = max(sets.values(), key=lambda v: (len(v), sum(map(len, v.values()))))
        if len(widest) > 1:
            found[factor] = dict(sorted(widest.items()))
    return found


def scaling(groups, predicted):
    """How tau_mem goes with a factor: (text, verdict). Supported: all slopes within .25."""
    parts, slopes = [], []
    for name, text in TAUS.items():
        taken = [(v, taus(run)[name]) for v, runs in groups.items() for run in runs]
        points = np.array([p for p in taken if math.isfinite(p[1])]).reshape(-1, 2)
        fit = power_law(points) if len(np.unique(points[:, 0])) >= 3 else None
        if fit:
            error = f" ± {fit[2]:.2f}" if fit[2] is not None else ""
            reached = "" if len(points) == len(taken) else f" ({len(points)} of {len(taken)} runs)"
            parts.append(f"{text}: {fit[0]:.2f}{error}{reached}")
            slopes.append(fit[0])
    if not slopes:
        return "fewer than three values reached an onset", "not tested"
    good = [abs(slope - predicted) <= 0.25 for slope in slopes]
    verdict = "supported" if all(good) else "partly" if any(good) else "not supported"
    return f"exponents, predicted {predicted:g}: " + "; ".join(parts), verdict


def trend(groups, measure, sign, text):
    """Whether the mean over seeds of measure(run) goes one way (sign) with the factor."""
    means = [np.nanmean(v) if np.isfinite(v := [measure(run) for run in runs]).any() else math.nan
             for runs in groups.values()]
    listed = f"{text} at {', '.join(f'{v:g}' for v in groups)}: " + ", ".join(
        "-" if math.isnan(m) else f"{m:.3g}" for m in means)
    finite = np.array([m for m in means if math.isfinite(m)])
    if len(finite) < 3:
        return listed, "not tested"
    steps = np.sign(np.diff(finite))
    verdict = ("supported" if (steps == sign).all() else
               "partly" if np.sign(finite[-1] - finite[0]) == sign else "not supported")
    return listed, verdict


def is_double_descent(values, share=0.1):
    """Whether a curve falls, rises and falls again, each time by at least `share`."""
    low = np.minimum.accumulate(values)
    return any(low[j] <= (1 - share) * values[0] and values[j] >= (1 + share) * low[j]
               and values[j:].min() <= (1 - share) * values[j] for j in range(len(values)))


def claim_equal_distances(runs):
    """Claim 1: the ratio of FID to train and to held-out, before and after the first copies."""
    before, after = [], []
    for run in runs:
        steps, train = run.column("fid_{space}_train")
        _, held = run.column("fid_{space}_heldout")
        onset = taus(run)["copy_01"]
        before += list((train / held)[steps <= onset])
        after += list((train / held)[steps > onset])
    if not after:
        return "no run has copies", "not tested"
    text = "; ".join(f"{name} copy ratio .01: median {np.median(v):.2f}, "
                     f"{min(v):.2f} to {max(v):.2f}"
                     for name, v in (("before", before), ("after", after)) if v)
    return "FID train / FID held-out, " + text, (
        "supported" if 0.8 <= np.median(after) <= 1.25 else "not supported")


def claim_double_descent(runs):
    """Claim 2: FID and sliced Wasserstein fall, rise, fall, against both splits, in step."""
    copying = [run for run in runs if math.isfinite(taus(run)["copy_10"])]
    if not copying:
        return "no run reaches copy ratio .1", "not tested"
    counts = {f"{name} {split}": sum(is_double_descent(run.column(f"{key}_{{space}}_{split}")[1])
                                     for run in copying)
              for key, name in (("fid", "FID"), ("sw", "SW")) for split in ("train", "heldout")}
    together = [np.corrcoef(*(np.log(run.column(f"{key}_{{space}}_heldout")[1])
                              for key in ("fid", "sw")))[0, 1] for run in copying]
    text = (f"of {len(copying)} runs that reach copy ratio .1: "
            + ", ".join(f"{k} {v}" for k, v in counts.items())
            + f"; correlation of log FID and log SW: median {np.median(together):.2f}")
    share = min(counts.values()) / len(copying)
    return text, ("supported" if share > 0.5 else
                  "partly" if any(counts.values()) else "not supported")


def claim_gains_before(runs):
    """Claim 7: is the best held-out fidelity of a run reached before its first copies?"""
    good, total, seen = 0, 0, []
    for run in runs:
        steps, distance = run.column("sw_{space}_heldout")
        onset = taus(run)["copy_01"]
        if (steps > onset).any() and (steps <= onset).any():
            total += 1
            seen.append(distance[steps > onset].min() / distance[steps <= onset].min())
            good += seen[-1] >= 1
    if not total:
        return "no run has samples before and after its first copies", "not tested"
    text = (f"lowest SW to held-out after / before copy ratio .01: median {np.median(seen):.2f}, "
            f"{min(seen):.2f} to {max(seen):.2f}; before is best in {good} of {total} runs")
    return text, "supported" if good == total else "partly" if good else "not supported"


def claims(runs, found):
    """The study's seven claims: [(number, claim, what these runs show, verdict)]."""
    def tau(run):
        return taus(run)["heldout_min"] if math.isfinite(taus(run)["heldout_min"]) else math.nan

    def best(run):
        return best_fidelity(run)[0]
    rows = [("1", "Distances to train and held-out stay nearly equal: they do not see copying",
             *claim_equal_distances(runs)),
            ("2", "FID and SW show a double descent, against both splits, in step",
             *claim_double_descent(runs))]
    plan = [("3a", "n", "Onset is proportional to N", lambda g: scaling(g, 1)),
            ("3b", "n", "Larger N memorizes more slowly",
             lambda g: trend(g, memorization_rate, -1, "rate")),
            ("3c", "n", "Larger N has better best fidelity",
             lambda g: trend(g, best, -1, "best SW")),
            ("4a", "width", "Larger models start earlier",
             lambda g: trend(g, tau, -1, "step of lowest held-out loss")),
            ("4b", "width", "Larger models have better best fidelity",
             lambda g: trend(g, best, -1, "best SW")),
            ("5a", "batch", "Onset, in steps, is proportional to 1/B", lambda g: scaling(g, -1)),
            ("5b", "batch", "The rate does not depend on B", claim_same_rate),
            ("5c", "batch", "Smaller B has better best fidelity",
             lambda g: trend(g, best, 1, "best SW")),
            ("6a", "lr", "Onset, in steps x lr, comes later at larger lr",
             lambda g: trend(g, lambda run: tau(run) * run.options["lr"], 1, "tau x lr")),
            ("6b", "lr", "Larger lr has better best fidelity",
             lambda g: trend(g, best, -1, "best SW"))]
    for number_, factor, text, test in plan:
        shown = test(found[factor]) if factor in found else ("no sweep of it", "not tested")
        rows.append((number_, text, *shown))
    rows.append(("7", "All gains in fidelity are made before the onset",
                 *claim_gains_before(runs)))
    return rows


def claim_same_rate(groups):
    """Claim 5: the memorization rate at each batch size; supported within a factor of 1.25."""
    rates = [np.nanmean(r) for runs in groups.values()
             if np.isfinite(r := [memorization_rate(run) for run in runs]).any()]
    text = "rate a doubling of the step: " + ", ".join(f"{r:.3f}" for r in rates)
    if len(rates) < 3:
        return text, "not tested"
    return text, "supported" if max(rates) <= 1.25 * min(rates) else "not supported"


def with_interval(row, column):
    """A cell of claims.md: the value, and its interval where the row has one."""
    low, high = (row.get(f"{column}_{end}", "") for end in ("low", "high"))
    if low == row[column]:                          # not reached, in no draw
        return low or "-"
    return (f"{row[column]} [{low}, {high}]" if low else str(row[column])) or "-"


def write_tables(runs, found, folder):
    """summary.csv and claims.md."""
    rows = [summarize(run) for run in runs]
    lines = [",".join(rows[0])] + [",".join(str(v) for v in row.values()) for row in rows]
    write(folder / "summary.csv", ("\n".join(lines) + "\n").encode())
    seeds = len({run.options["seed"] for run in runs})
    spaces = ", ".join(sorted({run.space or "none" for run in runs}))
    text = [f"{len(runs)} runs, {seeds} seed{'s' if seeds > 1 else ''}, features: {spaces}. ± is "
            + "the fit's standard error; definitions at the top of plot.py.", "",
            "| | claim | these runs | verdict |", "|---|---|---|---|"]
    text += [f"| {' | '.join(row)} |" for row in claims(runs, found)]
    columns = ("run", "last_step", *(f"tau_{name}" for name in TAUS), "memorization_rate",
               "best_sw_heldout", "final_copy_ratio", "null_copy_ratio")
    text += ["", f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    text += [f"| {' | '.join(with_interval(row, c) for c in columns)} |" for row in rows]
    write(folder / "claims.md", ("\n".join(text) + "\n").encode())


# --------------------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------------------


def plot_group(runs, folder):
    """All figures and tables of the runs of one family."""
    for run in runs:
        plot_run(run, folder / f"run_{run.name}.png")
        plot_levels(run, folder / f"levels_{run.name}.png")
        if snapshot_files(run):
            plot_samples(run, folder / f"samples_{run.name}.png")
            plot_ratios(run, folder / f"ratios_{run.name}.png")
    found = sweeps(runs)
    for factor, groups in found.items():
        plot_sweep(factor, groups, folder / f"sweep_{factor}.png")
        plot_tau(factor, groups, folder / f"tau_{factor}.png")
        plot_novelty(factor, groups, folder / f"novelty_{factor}.png")
    write_tables(runs, found, folder)


def main(argv=None):
    """Draw everything below a folder. Raises SystemExit(2) on bad input."""
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("root", help="a run folder, or a folder with runs below it")
    args = p.parse_args(argv)
    try:
        for folder, runs in find_runs(args.root).items():
            plot_group(runs, folder)
            print(f"{folder}: {len(runs)} runs drawn; claims.md, summary.csv")
            print((folder / "claims.md").read_text(), end="")
    except (PlotError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
