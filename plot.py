"""Draw the study's figures and test its claims, from the tables in the run folders alone.

    python plot.py runs/toy                         # a sweep: figures, tables in runs/toy/figures
    python plot.py runs/                            # every sweep below
    python plot.py runs/toy/N16_w32_B16_lr2e-3_s0   # one run: what it shows, in a few lines
    python plot.py results/mini                     # a sweep again, from its runs.csv alone
    python plot.py --paper                          # the study's own curves, judged the same way
"""

import argparse
import collections
import csv
import functools
import hashlib
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

STUDY = Path(__file__).parent / "assets/paper_curves.csv"   # digitised from the study's figures
STUDY_COLUMNS = {"copy_score": "copy_ratio", **{f"{d}_{s}": f"{d}_inception_{s}" for d in (
    "sw", "fid") for s in ("train", "heldout")}}
# Options that do not make another run; args.json says so itself since it has an entry "free".
FREE = {"out", "steps", "images", "device", "compile", "save_minutes"}

Factor = collections.namedtuple("Factor", "label short formula normalised")
# What is known of a factor: T = step * normalised(value, lowest value) is the study's normalised
# time. Any other option can be swept as well; see factor_of.
FACTORS = {"n": Factor("training images N", "N", "step x N_min / N", lambda v, low: low / v),
           "width": Factor("base width", "width", None, None),
           "batch": Factor("batch size B", "B", "step x B / B_min", lambda v, low: v / low),
           "lr": Factor("learning rate", "lr", "step x lr / lr_min", lambda v, low: v / low)}

# --------------------------------------------------------------------------------------------------
# Reading
# --------------------------------------------------------------------------------------------------


class PlotError(Exception):
    """Something the user gave is wrong; the message is one line."""


def read_rows(path):
    """A CSV file as a list of {column: text}; [] if absent. Raises PlotError where it is none."""
    if not path.exists():
        return []
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeError, csv.Error) as error:
        raise PlotError(f"{path}: not readable ({error})") from None
    return [{k: v or "" for k, v in row.items() if k is not None} for row in rows]


def number(text):
    """float(text), or nan."""
    try:
        return float(text)
    except (TypeError, ValueError):
        return math.nan


def value_of(cell):
    """An option as a number, True, False, None or a word; a list as one word."""
    if isinstance(cell, str):
        try:
            cell = json.loads(cell)
        except ValueError:
            return cell
    return " ".join(map(str, cell)) if isinstance(cell, list) else cell


def columns_of(rows, path):
    """Rows as {column: float array}, by rising step, nan where a cell is no number.

    Of several rows of one step the last counts. Raises PlotError where no row has a step.
    """
    by_step = {step: row for row in rows if (step := number(row.get("step"))) >= 0}
    if rows and not by_step:
        raise PlotError(f"{path}: no column 'step' with numbers")
    return {key: np.array([number(by_step[s].get(key)) for s in sorted(by_step)])
            for key in (rows[0] if rows else {})}


class Run:
    """One run with one set of samples: its options, its curves, and what follows from them.

    name, and stem, its form in file names; path of its folder, None where it comes from a table;
    set, the name of the sample set; options {name: value}, sampling settings among them as
    "setting_eta"; log, metrics {column: float array}; controls {name: {column: float}}; tables
    {stem of a CSV file: its rows}; space, the features that distances are taken in.
    """

    def __init__(self, name, options, log, metrics, controls=None, tables=None, path=None, set=""):
        self.name, self.options, self.path, self.set = name, options, path, set
        self.log, self.metrics = log, metrics
        self.controls, self.tables = controls or {}, tables or {}
        self.seed, self.free, self.parameters = options.get("seed", 0), FREE, math.nan
        found = [c[3:-6] for c in metrics if c.startswith("sw_") and c.endswith("_train")
                 and not c.startswith("sw_error_")]
        self.space = min(found, key=lambda s: (s != "inception", s == "pixels", s), default=None)
        ascii_name = "".join(c if c.isalnum() or c in "._-" else "_" for c in name)
        digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()[:8]
        self.stem = name if name == ascii_name[:120] else f"{ascii_name[:110]}-{digest}"

    def column(self, name):
        """(steps, values) of a column of log.csv or metrics.csv, finite values at steps > 0.

        "SPACE" in the name stands for run.space. Empty where there is no such column.
        """
        name = name.replace("SPACE", self.space or "SPACE")
        table = self.log if name in self.log else self.metrics
        if name not in table:
            return np.array([]), np.array([])
        keep = np.isfinite(table[name]) & (table["step"] > 0)
        return table["step"][keep], table[name][keep]

    @functools.cached_property
    def onsets(self):
        """{name of TAUS: step}; inf not reached, nan not measured. See onsets_of."""
        return onsets_of(self)

    @property
    def last_step(self):
        """The last step in either table; nan without any."""
        return max((t["step"][-1] for t in (self.log, self.metrics) if t), default=math.nan)

    def key(self, *without):
        """What makes this run another run, as a tuple of pairs; seed and free options do not."""
        return tuple((k, v) for k, v in sorted(self.options.items())
                     if k not in self.free and k not in ("seed", *without))


def read_folder(path):
    """A run folder as a list of Runs, one per set of samples. Raises PlotError where damaged."""
    try:
        record = json.loads((path / "args.json").read_text(encoding="utf-8"))
        options = {k: value_of(v) for k, v in record["options"].items()}
        defaults = {k: value_of(v) for k, v in record.get("defaults", {}).items()}
        free, parameters = {*record.get("free", ())}, float(record.get("parameters", "nan"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise PlotError(f"{path}/args.json: missing or damaged") from None
    log = columns_of(read_rows(path / "log.csv"), path / "log.csv")
    sets = {}
    for row in read_rows(path / "metrics.csv"):
        sets.setdefault(row.get("set", ""), []).append(row)
    controls = {row.get("name", ""): {k: number(v) for k, v in row.items()}
                for row in read_rows(path / "controls.csv")}
    tables = {p.stem: read_rows(p) for p in sorted(path.glob("*.csv"))
              if p.stem not in ("log", "metrics", "controls")}
    runs = []
    for name, rows in sets.items() if sets else [("", [])]:
        settings = {k: value_of(v) for k, v in rows[0].items()
                    if k.startswith("setting_") and v} if rows else {}
        mine = {stem: [r for r in table if r.get("name") or r.get("set", name) == name]
                for stem, table in tables.items()}
        run = Run("_".join(filter(None, (path.name, name))), options | settings, log,
                  columns_of(rows, path / "metrics.csv"), controls, mine, path, name)
        run.defaults, run.free, run.parameters = defaults, FREE | free, parameters
        runs.append(run)
    return runs if log or sets else []


def read_table(path, rename=None):
    """A table with a row per run and step as Runs, one per value of all columns before `step`.

    rename {column: name here}. Beside it, controls.csv, denoisers.csv and so on have a column
    `run`. Raises PlotError where there is no column `step`.
    """
    rows, groups = read_rows(path), {}
    if not rows or "step" not in rows[0]:
        raise PlotError(f"{path}: no column 'step'")
    heads = list(rows[0])[:list(rows[0]).index("step")]
    for row in rows:
        groups.setdefault(tuple(row[k] for k in heads), []).append(
            {(rename or {}).get(k, k): v for k, v in row.items() if k not in heads})
    beside = {p.stem: read_rows(p) for p in sorted(path.parent.glob("*.csv"))} if not rename else {}
    runs = []
    for head, lines in groups.items():
        options = {k: value_of(v) for k, v in zip(heads, head, strict=True)}
        name, curves = str(options.pop("run", " ".join(head))), columns_of(lines, path)
        curves = {k: v for k, v in curves.items() if k == "step" or np.isfinite(v).any()}
        tables = {stem: mine for stem, table in beside.items() if stem not in ("runs", "summary")
                  and (mine := [r for r in table if r.get("run") == name])}
        controls = {r["name"]: {k: number(v) for k, v in r.items()}
                    for r in tables.pop("controls", []) if "name" in r}
        run = Run(name, options, curves, curves, controls, tables, set=options.pop("set", "") or "")
        run.parameters = number(options.pop("parameters", math.nan))
        runs.append(run)
    return runs


def study_runs():
    """The study's own curves as Runs; what several of its figures show counts as repeats."""
    runs, seeds = read_table(STUDY, STUDY_COLUMNS), collections.Counter()
    for run in runs:
        run.options["figure"] = run.options.pop("factor")
        run.free, run.name = FREE | {"figure"}, f"study {run.name}"
        run.seed = run.options["seed"] = seeds[run.key()]
        seeds[run.key()] += 1
    return runs


def settle(runs):
    """Give every run the same options: what one lacks, at its default; settings if they matter.

    A sampling setting counts only if runs of differently named sets differ in it: the clipping
    that a process brings along does not.
    """
    defaults, free = {}, set().union(*(run.free for run in runs))
    for run in runs:
        defaults = getattr(run, "defaults", {}) | defaults
    every = sorted({k for run in runs for k in run.options} - free)
    for name in [k for k in every if k.startswith("setting_")]:
        by_set = {}
        for run in runs:
            by_set.setdefault(run.set, set()).update({run.options[name]} if name in run.options
                                                     else ())
        seen = [values for values in by_set.values() if values]
        if all(values == seen[0] for values in seen):
            every.remove(name)
        for run in runs:
            if name in every and by_set[run.set]:
                run.options.setdefault(name, min(by_set[run.set], key=str))
    for run in runs:
        run.options = {k: run.options.get(k, defaults.get(k)) for k in every}
        run.free = free


def find_runs(root, damaged=None):
    """The runs at or below a folder, grouped: {folder for figures: [Run]}.

    Run folders, or else tables runs.csv. Runs that no chain of changes of one option connects are
    put into folders of their own, named by what differs. damaged: a list to which the message of
    each unreadable run is added; without it such a run raises PlotError.
    """
    root, groups = Path(root), {}
    if not root.is_dir():
        raise PlotError(f"{root}: no such folder")
    single = (root / "args.json").exists()
    paths = [root] if single else sorted(p.parent for p in root.rglob("args.json"))
    for path in paths or sorted(root.rglob("runs.csv")):
        folder = (path if single else path.parent) / ("figures" if paths else "")
        try:
            found = read_folder(path) if paths else read_table(path)
            groups.setdefault(folder, []).extend(found)
        except PlotError as error:
            if damaged is None:
                raise
            damaged.append(str(error))
    result = {}
    for folder, runs in groups.items():
        if runs:
            settle(runs)
            result |= {folder / name: family for name, family in families(runs).items()}
    if not result and not damaged:
        raise PlotError(f"{root}: no run with a log.csv below it; train one first")
    return result


def families(runs):
    """Runs grouped so that each differs from another of its group in one option at most.

    {name: [Run]}: "" for a single group, else what differs between the groups.
    """
    groups = []                                    # [(runs, their keys)]
    for run in runs:
        linked = [g for g in groups if any(
            sum(a != b for a, b in zip(run.key(), other.key(), strict=True)) <= 1 for other in g)]
        groups = [g for g in groups if g not in linked] + [[r for g in linked for r in g] + [run]]
    if len(groups) == 1:
        return {"": runs}
    sets = [{k: sorted({str(r.options[k]) for r in g}) for k, _ in runs[0].key()} for g in groups]
    differ = [k for k in sets[0] if any(s[k] != sets[0][k] for s in sets)]
    names = ["_".join(k + "-".join(s[k]) for k in differ) for s in sets]
    names = ["".join(c if c.isalnum() or c in "._-" else "-" for c in n)[:100] for n in names]
    return {n if names.count(n) == 1 else f"{n}_{k}": g
            for k, (n, g) in enumerate(zip(names, groups, strict=True))}


class Slice(dict):
    """{value of a factor: [Run, one per seed]}, all else equal.

    fixed {option: its value here}, of the options that vary elsewhere; others: how many slices
    there are beside this, the widest.
    """

    fixed, others = {}, 0


def sweeps(runs):
    """{factor: Slice}: for every option that varies, the widest set of runs where it alone does."""
    varying = [k for k, v in runs[0].key() if any(r.options[k] != v for r in runs)]
    found = {}
    for factor in sorted(varying, key=lambda k: [*FACTORS, k].index(k)):
        slices = {}
        for run in runs:
            values = slices.setdefault(run.key(factor), {})
            values.setdefault(run.options[factor], []).append(run)
        several = [v for v in slices.values() if len(v) > 1]
        if several:
            widest = max(several, key=lambda v: (len(v), sum(map(len, v.values()))))
            found[factor] = Slice((v, widest[v]) for v in sorted(
                widest, key=lambda v: (isinstance(v, str), v is None, str(v) if isinstance(
                    v, str) else v or 0)))
            options = next(iter(widest.values()))[0].options
            found[factor].fixed = {k: options[k] for k in varying if k != factor}
            found[factor].others = len(several) - 1
    return found


def factor_of(name):
    """The Factor of an option: from FACTORS, or plain words and no normalised time."""
    plain = name.removeprefix("setting_").replace("_", " ")
    return FACTORS.get(name, Factor(plain, plain, None, None))


def label_of(factor, value):
    """N = 2048, B = 16, process = flow, ..."""
    text = f"{value:g}" if type(value) in (int, float) else value
    return f"{factor_of(factor).short} = {text}"


# --------------------------------------------------------------------------------------------------
# Onset, best fidelity, rate
# --------------------------------------------------------------------------------------------------

TAUS = {"heldout_min": "held-out loss lowest", "heldout_25": "held-out loss 25 % up",
        "copy_01": "copy ratio .01", "copy_10": "copy ratio .1", "copy_50": "copy ratio .5",
        "denoisers": "nearer to the memorizer than to any other denoiser",
        **{f"level{k}": f"held-out loss lowest, t {k / 10:.1f} to {(k + 1) / 10:.1f}"
           for k in range(10)}}
COPY_LEVELS = {"copy_01": 0.01, "copy_10": 0.1, "copy_50": 0.5}     # above the null


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


def excess(run):
    """(steps, copy ratio above its null) of a run: shares of its samples."""
    steps, copies = run.column("copy_ratio")
    _, null = run.column("null_copy_ratio")
    return steps, copies - (float(np.median(null)) if len(null) else 0)


def nearest_denoiser(run):
    """(steps, mean over noise levels of log(distance to the nearest other / to the memorizer)).

    From denoisers.csv, on the inputs that the sampler meets; above 0 the net is nearer to the exact
    denoiser of its training images than to any of the others (population, Gaussian, local).
    """
    found = {}
    for row in run.tables.get("denoisers", []):
        distance, at = number(row.get("median")), (number(row.get("step")), row.get("level"))
        if row.get("inputs") == "path" and distance >= 0 and at[0] > 0:
            found.setdefault(at, {})[row.get("reference")] = math.log(max(distance, 1e-12))
    by_step = {}
    for (step, _), at in found.items():
        memorizer = at.pop("memorizer", None)
        if memorizer is not None and at:
            by_step.setdefault(step, []).append(min(at.values()) - memorizer)
    steps = sorted(by_step)
    return np.array(steps), np.array([np.mean(by_step[s]) for s in steps])


def onsets_of(run):
    """The onset of memorization by each definition of TAUS: {name: step}.

    inf not reached, nan not measured.
    """
    found = dict.fromkeys(TAUS, math.nan)
    for name in ("heldout_min", *(f"level{k}" for k in range(10))):
        steps, loss = run.column("heldout_loss" + name.replace("heldout_min", "").replace(
            "level", "_level"))
        if len(loss):
            found[name] = lowest(steps, loss)
    steps, loss = run.column("heldout_loss")
    if len(loss):
        k = int(np.argmin(loss))
        found["heldout_25"] = crossing(steps[k:], loss[k:], 1.25 * loss[k])
    steps, copies = excess(run)
    for name, level in COPY_LEVELS.items():
        found[name] = crossing(steps, copies, level) if len(steps) else math.nan
    steps, nearer = nearest_denoiser(run)
    found["denoisers"] = crossing(steps, nearer, 0.0) if len(steps) else math.nan
    return found


# --------------------------------------------------------------------------------------------------
# Figures
# --------------------------------------------------------------------------------------------------

LOWEST_LOSS = 1e-4          # where the axes of the loss by noise level end


def read_neighbours(file, key):
    """An array of a neighbours file. Raises PlotError where it is damaged."""
    try:
        with np.load(file) as data:
            return data[key]
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error):
        raise PlotError(f"{file}: damaged; delete it and run measure.py again") from None


def snapshot_files(run):
    """The neighbours files of a run's snapshots, by step."""
    return sorted((run.path / "neighbours" / run.set).glob("[0-9]*.npz"))


def palette(count):
    """`count` colours from dark to light, told apart by colour-blind readers and in grey."""
    return [mpl.colormaps["viridis"](x) for x in np.linspace(0.05, 0.85, max(count, 1))]


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
    for axis, column in ((axes[0], "{}_loss"), (axes[2], "sw_SPACE_{}"),
                         (axes[3], "fid_SPACE_{}")):
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
    unit = {"inception": "Inception features", None: "not measured"}.get(space, space)
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
    onset = run.onsets
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
    rows = 2 if factor in FACTORS and FACTORS[factor].normalised else 1
    figure, axes = plt.subplots(rows, 4, figsize=(13, 3.1 * rows), squeeze=False, sharey="col")
    colors = palette(len(groups))
    space = next((run.space for runs in groups.values() for run in runs if run.space), None)
    for color, (value, runs) in zip(colors, groups.items(), strict=True):
        four_panels(axes[0], runs, color)
        if rows == 2:
            scale = FACTORS[factor].normalised(value, min(groups))
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
    onsets = [tau for runs in groups.values() for run in runs for tau in run.onsets.values()]
    if not np.isfinite(onsets).any():
        return
    figure, axis = plt.subplots(figsize=(7, 3.8))
    for color, marker, (name, text) in zip(palette(5), "os^Dv", TAUS.items(), strict=False):
        points = [(value, run.onsets[name]) for value, runs in groups.items() for run in runs]
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
    axis.set(xlabel=factor_of(factor).label, ylabel="onset of memorization, step")
    figure.legend(fontsize=8, loc="outside right center")
    save(figure, path)


def plot_novelty(factor, groups, path):
    """Fidelity against novelty through training, a curve a value of the factor."""
    figure, axis = plt.subplots(figsize=(5.2, 3.8))
    space = next((run.space for runs in groups.values() for run in runs if run.space), None)
    for color, (value, runs) in zip(palette(len(groups)), groups.items(), strict=True):
        for k, run in enumerate(runs):
            (_, copies), (_, distance) = run.column("copy_ratio"), run.column("sw_SPACE_heldout")
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


def draw_all(runs, found, folder):
    """All figures of comparable runs and of their sweeps (found, see sweeps) into a folder."""
    for run in runs:
        plot_run(run, folder / f"run_{run.stem}.png")
        plot_levels(run, folder / f"levels_{run.stem}.png")
        if snapshot_files(run):
            plot_samples(run, folder / f"samples_{run.stem}.png")
            plot_ratios(run, folder / f"ratios_{run.stem}.png")
    for factor, groups in found.items():
        plot_sweep(factor, groups, folder / f"sweep_{factor}.png")
        plot_tau(factor, groups, folder / f"tau_{factor}.png")
        plot_novelty(factor, groups, folder / f"novelty_{factor}.png")


# --------------------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------------------


def main(argv=None):
    """Draw everything below a folder. Raises SystemExit(2) on bad input, (1) on a damaged run."""
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("root", help="a run folder, or a folder with runs below it")
    args = p.parse_args(argv)
    damaged = []
    try:
        for folder, runs in find_runs(args.root, damaged).items():
            draw_all(runs, sweeps(runs), folder)
            print(f"{folder}: {len(runs)} runs drawn")
    except (PlotError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    for message in damaged:
        print(f"warning: {message}; left out", file=sys.stderr)
    if damaged:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
