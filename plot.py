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
import itertools
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
from matplotlib.animation import PillowWriter

mpl.use("Agg")
mpl.rcParams.update({"font.size": 10, "axes.titlesize": 10, "lines.linewidth": 1.6,
                     "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
                     "grid.alpha": 0.25, "legend.frameon": False, "savefig.dpi": 130,
                     "figure.constrained_layout.use": True})

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


def read_neighbours(file, key):
    """An array of a neighbours file. Raises PlotError where it is damaged."""
    try:
        with np.load(file) as data:
            return data[key]
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error):
        raise PlotError(f"{file}: damaged; delete it and run measure.py again") from None


def snapshot_files(run):
    """The neighbours files of a run's snapshots, by step; [] where it has no folder."""
    return sorted((run.path / "neighbours" / run.set).glob("[0-9]*.npz")) if run.path else []


def write(path, data):
    """Write bytes through a temporary file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)


# --------------------------------------------------------------------------------------------------
# Figures
# --------------------------------------------------------------------------------------------------

# A colour per role in every figure, told apart by colour-blind readers (Okabe and Ito, 2008).
BLUE, RED, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "0.5"
REFERENCES = {"gaussian": "#E69F00", "local": "#AA4499", "population": GREEN, "memorizer": RED}
# Panels: title, scale of y, columns of log.csv and metrics.csv. A new metric is one line here.
PANELS = {
    "loss": ("loss", "log", "train_loss heldout_loss"),
    "copy": ("copy ratio (d1/d2 < 1/3)", "share", "copy_ratio null_copy_ratio"),
    "sw": ("sliced Wasserstein", "log", "sw_SPACE_train sw_SPACE_heldout"),
    "fid": ("FID", "log", "fid_SPACE_train fid_SPACE_heldout"),
    "kid": ("KID", "linear", "kid_SPACE_train kid_SPACE_heldout"),
    "precision": ("precision", "share", "precision_SPACE_train precision_SPACE_heldout"),
    "recall": ("recall", "share", "recall_SPACE_train recall_SPACE_heldout"),
    "sw_replaced": ("sliced Wasserstein", "log", "sw_SPACE_heldout sw_SPACE_replaced"),
    "fid_replaced": ("FID", "log", "fid_SPACE_heldout fid_SPACE_replaced"),
    "quarter": ("copies, d1/d2 < 1/4", "share", "copy_ratio_quarter null_copy_ratio_quarter"),
    "half": ("copies, d1/d2 < 1/2", "share", "copy_ratio_half null_copy_ratio_half"),
    "sscd": ("copies, SSCD > .6", "share", "sscd_ratio null_sscd_ratio"),
    "auth": ("authentic share (AuthPct)", "share", "auth_share null_auth_share"),
    "nearest": ("rms to nearest training image", "linear", "nearest_rms"),
    "mixture": ("residual as a mixture of ten", "linear", "mixture_residual"),
    "near": ("near another sample alone", "linear", "near_samples"),
    "sharpness": ("sharpness (gradient energy)", "linear", "sharpness"),
    "contrast": ("contrast", "linear", "contrast"),
    "range": ("values out of range", "linear", "out_of_range"),
    "agreement": ("agreement of twins", "share", "agreement null_agreement"),
    "twins": ("distance, median rms", "log", "twin_rms nearest_train_rms twin_nearest_train_rms")}
LEVELS = {f"level{k}": (f"t = {k / 10:.1f} to {k / 10 + 0.1:.1f}", "linear",
                        f"train_loss_level{k} heldout_loss_level{k} floor_level{k}")
          for k in range(10)}
PANELS |= LEVELS
FOUR = ["loss", "copy", "sw", "fid"]            # the study's own
# How a column is drawn, by a word in its name: line, colour (None: the run's), label.
STYLES = {"null": (":", GREY, "null"), "floor": ("-", RED, "perfect memorizer"),
          "replaced": ("-.", None, "samples replaced by nearest training images"),
          "twin_nearest": ("--", RED, "twin to its nearest training image"),
          "nearest_train": ("-", RED, "sample to its nearest training image"),
          "twin_rms": ("-", None, "sample to the twin's, from the same noise"),
          "heldout": ("--", None, "held-out"), "train": ("-", None, "train"), "": ("-", None, None)}
CONTROLS = {"heldout": (GREEN, "held-out images: a perfect generalizer"),
            "training": (RED, "training images: a perfect memorizer")}
MARKS = {"heldout_25": (0, (1, 1.5)), "copy_01": (0, (4, 2))}       # onsets drawn in panels


def words(text):
    """A name as a figure shows it: shortened in its middle, no mathematics."""
    return (text if len(text) <= 60 else f"{text[:29]}…{text[-29:]}").replace("$", r"\$")


def palette(count):
    """`count` colours from dark to light, told apart by colour-blind readers and in grey."""
    return mpl.colormaps["viridis"](np.linspace(0, 0.88, count))


def style_of(column):
    """The line, colour and label of a column, see STYLES."""
    return next(style for word, style in STYLES.items() if word in column)


def control(run, name, column):
    """The value of a column for a control, nan where there is none."""
    return run.controls.get(name, {}).get(column.replace("SPACE", run.space or ""), math.nan)


def dress(axis, title="", scale="linear", xlabel=""):
    """Title, scales and few, readable ticks of a panel against training steps."""
    axis.set(title=title, xlabel=xlabel, xscale="log", yscale="log" if scale == "log" else "linear")
    if scale == "share":
        axis.set_ylim(-0.04, 1.04)
    if not axis.has_data():
        axis.text(0.5, 0.5, "not measured", transform=axis.transAxes, ha="center", color=GREY)
    for side in [axis.xaxis] + [axis.yaxis] * (scale == "log"):
        low, high = side.get_view_interval()
        side.set_major_locator(mpl.ticker.MaxNLocator(4) if high < 5 * low else
                               mpl.ticker.LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
        side.set_major_formatter(lambda v, _: f"{v / 1000:g}k" if v >= 1000 else f"{v:g}")
        side.set_minor_locator(mpl.ticker.NullLocator())


def curve(axis, runs, column, color, scale=1, label=None, errors=False):
    """A column against step * scale: mean over seeds, in a band of their range or of one's error.

    The error comes from columns beside it: copy_low, copy_high or, twice, sw_error_...
    """
    def at(run, name):
        x, y = run.column(name)
        return np.interp(np.log(steps), np.log(x), y, math.nan, math.nan) if len(x) else math.nan
    steps = np.unique(np.concatenate([run.column(column)[0] for run in runs]))
    if not len(steps):
        return
    values = np.array([at(run, column) * np.ones(len(steps)) for run in runs])
    low, high = np.nanmin(values, 0), np.nanmax(values, 0)
    if errors and "SPACE" in column:
        low, high = (low + k * at(runs[0], column.replace("_", "_error_", 1)) for k in (-2, 2))
    elif errors:
        low, high = (at(runs[0], column.replace("ratio", end) if "ratio" in column else
                        f"{column}_{end}") for end in ("low", "high"))
    line, own, name = style_of(column)
    axis.plot(steps * scale, values.mean(0), color=color if own is None else own, linestyle=line,
              marker="." if len(steps) == 1 else None, label=name if label is None else label)
    axis.fill_between(steps * scale, low, high, color=color, alpha=0.2, linewidth=0)


def panels(run, rows, size):
    """A figure with a panel of one run for each name of PANELS in rows, and its axes by name.

    Panels show the columns, their controls as thin lines, and the onsets of MARKS.
    """
    figure, axes = plt.subplot_mosaic(rows, figsize=size, empty_sentinel="")
    figure.supxlabel("training step", fontsize="medium")
    for name in [name for name in axes if name in PANELS]:
        title, scale, columns = PANELS[name]
        for column in columns.split():
            curve(axes[name], [run], column, BLUE, errors=True)
            for key, (color, label) in CONTROLS.items():
                value = control(run, key, column)
                if value > 0 or (math.isfinite(value) and scale != "log"):
                    axes[name].axhline(value, color=color, linestyle=style_of(column)[0],
                                       linewidth=1.1, label=label)
        for mark, line in MARKS.items():
            if math.isfinite(run.onsets[mark]):
                axes[name].axvline(run.onsets[mark], color="0.25", linestyle=line, linewidth=1,
                                   label=TAUS[mark])
        dress(axes[name], title, scale)
    return figure, axes


def heat(axis, cells, columns, rows, colors, **more):
    """Cells (rows, columns) as colours, with their names, of columns at most 12."""
    image = axis.imshow(cells, aspect="auto", interpolation="nearest", **more,
                        cmap=mpl.colors.LinearSegmentedColormap.from_list("", colors, bad="0.65"))
    shown = range(0, len(columns), -(-len(columns) // 12))
    axis.set_xticks(shown, [columns[k] for k in shown])
    axis.set_yticks(range(len(rows)), rows)
    axis.grid(False)
    return image


def save(figure, path, title):
    """Write a figure, whole or not at all, with its title and one legend above; close it."""
    handles = {}
    for axis in figure.axes:
        for handle, text in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(text, handle)
    widths = [len(text) + 9 for text in handles]            # in characters, 12.5 an inch
    fits = [n for n in range(2, len(widths) + 1) if 12.5 * figure.get_figwidth() > sum(
        max(part) for part in np.array_split(widths, n))]
    figure.legend(handles.values(), handles, loc="outside upper center", title=title,
                  title_fontsize="large", ncols=max(fits, default=1))
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    plt.close(figure)
    write(path, buffer.getvalue())


def plot_run(run, path, rows=(FOUR,)):
    """Panels of one run, the study's four: train solid, held-out dashed, controls, onsets."""
    save(panels(run, list(rows), (2.75 * len(rows[0]) + 2, 2.6 * len(rows) + 1.4))[0], path,
         words(run.name) + f"; features: {run.space}" * bool(run.space))


def plot_metrics(run, path, columns=5):
    """Every metric of PANELS that the run has, through training, with its controls."""
    names = [name for name, panel in PANELS.items() if name not in LEVELS and any(
        len(run.column(column)[0]) for column in panel[2].split())]
    names += [""] * (-len(names) % columns)
    plot_run(run, path, [names[k:k + columns] for k in range(0, len(names), columns)])


def plot_levels(run, path):
    """Loss by noise level, the perfect memorizer's too, and where held-out loss turns."""
    names = list(LEVELS)
    figure, axes = panels(run, [names[:5], names[5:]], (13, 5.4))
    for name, axis in axes.items():
        loss = run.column(f"heldout_loss_{name}")[1]
        if math.isfinite(run.onsets[name]):
            axis.plot(run.onsets[name], loss.min(), "v", color="0.25", label="held-out loss turns")
        if len(loss):                           # the first values, of no skill yet, may lie above
            top = min(axis.get_ylim()[1], 1.1 * max(3 * np.median(loss), loss[-1]))
            axis.set_ylim(-0.06 * top, top)
    save(figure, path, f"{words(run.name)}: loss by noise level t (0: no noise, 1: noise alone)")


def plot_hump(run, path):
    """The study's panels; below, what the samples are: sharp or averages; and their spectrum."""
    figure, axes = panels(run, [[*FOUR, "power"], ["sharpness", "contrast", "sw_replaced",
                                                   "mixture", "power"]], (16, 6.4))
    steps, values = run.column("sw_SPACE_heldout")
    best = int(np.argmin(np.where(steps <= run.onsets["copy_01"], values, math.inf)))
    later = np.minimum.accumulate(values[::-1])[::-1]
    hump = best + int(np.argmax((values - np.maximum(values[best], later))[best:]))
    power = {row["name"] or number(row["step"]): np.array(
        [number(v) for k, v in row.items() if k.startswith("power_")])
        for row in run.tables["spectrum"]}
    shown = [(steps[k], f"{name}: step {steps[k]:,.0f}", color, "o-") for k, name, color in zip(
        (best, hump, -1), ("best", "hump", "end"), palette(3), strict=True) if steps[k] in power]
    for key, label, color, line in [*shown, ("heldout", "held-out images", GREEN, "--")]:
        ratio = power[key] / power["training"]
        axes["power"].plot(np.arange(1, len(ratio)), ratio[1:], line, color=color, label=label)
        for name in set(axes) - {"power"} if line == "o-" else ():
            axes[name].plot(key, 0, "^", color=color, clip_on=False, zorder=9,
                            transform=axes[name].get_xaxis_transform())
    axes["power"].axhline(1, color=RED, linewidth=1.1)
    axes["power"].set(title="power over training images'", xlabel="cycles per image")
    save(figure, path, f"{words(run.name)}; features: {run.space}")


def plot_twins(run, path):
    """Agreement of two models trained on other images, its null, copies and distances."""
    for name in [name for name in run.tables if name.startswith("twin_")]:
        twins = Run(f"{run.name} and {name[5:]}", {}, {}, columns_of(run.tables[name], name))
        plot_run(twins, path.with_name(f"{path.stem}_{name[5:]}.png"),
                 [["agreement", "copy", "twins"]])


def plot_planted(run, path):
    """What each measure of copying catches of planted copies, and of held-out images."""
    rows = run.tables["planted"]
    names = {"copy_ratio_quarter": "d1/d2 < 1/4", "copy_ratio": "d1/d2 < 1/3", "copy_ratio_half":
             "d1/d2 < 1/2", "not_authentic": "not authentic", "sscd_ratio": "SSCD > .6"}
    names = {column: label for column, label in names.items() if column in rows[0]}
    cells = np.array([[number(row[column]) for column in names] for row in rows])
    figure, axis = plt.subplots(figsize=(1.5 * len(names) + 2, 0.4 * len(rows) + 1.2))
    heat(axis, cells, [*names.values()], [row["planted"] for row in rows], ["white", RED],
         vmin=0, vmax=1)
    for place, value in np.ndenumerate(cells):
        axis.text(*place[::-1], f"{value:.0%}", ha="center", va="center")
    save(figure, path, f"{words(run.name)}: share called copies")


def plot_copier(run, path):
    """Which metric tells a copier: each through training, between its two controls as 0 and 1."""
    rows, steps = {}, [f"{step:,.0f}" for step in run.metrics["step"]]
    for title, _, columns in PANELS.values():
        for column in columns.split():
            zero, one = (control(run, key, column) for key in CONTROLS)
            values = run.metrics.get(column.replace("SPACE", run.space))
            label = style_of(column)[2]
            if values is not None and abs(one - zero) > 0 and label in (None, "train", "held-out"):
                far = abs(one - zero) > 0.1 * (np.nanmax(values) - np.nanmin(values))
                name = (f"{title} to {label}" if label else title) + ("" if far else " (*)")
                rows.setdefault(name, (values - zero) / (one - zero) if far else values * math.nan)
    rows = dict(sorted(rows.items(), key=lambda r: max([-1, *np.flatnonzero(~(r[1] >= 0.5))])))
    figure, axis = plt.subplots(figsize=(9.5, 0.33 * len(rows) + 2))
    image = heat(axis, np.ma.masked_outside([*rows.values()], -0.3, 1.3), steps, [*rows],
                 [GREEN, "#f4f4f4", RED], vmin=0, vmax=1)
    axis.set(xlabel="training step; grey: like neither; *: the two controls are too close to tell")
    figure.colorbar(image, aspect=30, ticks=[0, 0.5, 1]).set_ticklabels(
        ["as held-out\nimages", "halfway", "as training\nimages"])
    save(figure, path, f"{words(run.name)}; features: {run.space}")


def plot_denoisers(run, path, levels=(1, 3, 5, 8)):
    """How far the network's x0 is from each reference, and which is nearest: where and when."""
    rows, names = run.tables["denoisers"], list(REFERENCES)
    inputs = {"path": "its own sampling path", "heldout": "noised held-out images"}
    steps = sorted({number(row["step"]) for row in rows})
    cells = np.full((len(inputs), len(names), 10, len(steps), 3), math.inf)
    for row in [row for row in rows if row["inputs"] in inputs]:
        place = [*inputs].index(row["inputs"]), names.index(row["reference"]), int(row["level"])
        cells[*place, steps.index(number(row["step"]))] = [number(row[c]) for c in
                                                           ("median", "low", "high")]
    figure, axes = plt.subplot_mosaic([[*levels], ["path", "path", "heldout", "heldout"]],
                                      figsize=(13, 7.2))
    for level in levels:
        for k, (name, color) in enumerate(REFERENCES.items()):
            median, low, high = cells[0, k, level].T
            axes[level].plot(steps, median, color=color, label=name)
            axes[level].fill_between(steps, low, high, color=color, alpha=0.15, linewidth=0)
        dress(axes[level], f"{LEVELS[f'level{level}'][0]}, its own path", "log")
    axes[levels[0]].set_ylabel("rms distance to the network's x0")
    for k, (name, text) in enumerate(inputs.items()):
        heat(axes[name], cells[k, ..., 0].argmin(0), [f"{step:,.0f}" for step in steps],
             [title for title, _, _ in LEVELS.values()], [*REFERENCES.values()], origin="lower",
             vmin=0, vmax=len(names) - 1)
        axes[name].set_title(f"nearest reference on {text}")
    figure.supxlabel("training step", fontsize="medium")
    save(figure, path, f"{words(run.name)}: which denoiser is the network?")


def plot_ratios(run, path, steps=6):
    """The whole curve of d1/d2: the share of samples below each value, and of the controls."""
    figure, axis = plt.subplots(figsize=(7, 4.8))
    files = pick(run, steps)
    curves = [(file, f"step {int(file.stem):,}", color, "-")
              for file, color in zip(files, palette(len(files)), strict=True)]
    curves += [(run.path / f"neighbours/{name}.npz", label, color, "--") for name, label, color in (
        ("heldout", "held-out images", GREEN), ("exact", "perfect memorizer", RED),
        ("leave_one_out", "training images, left out", GREY))]
    for file, label, color, line in [curve for curve in curves if curve[0].exists()]:
        ratios = np.sort(read_neighbours(file, "ratios"))
        axis.step(np.maximum([0, *ratios, 1], 0.02), [*np.arange(len(ratios) + 1) / len(ratios), 1],
                  where="post", label=label, color=color, linestyle=line)
    for value in (1 / 4, 1 / 3, 1 / 2):
        axis.axvline(value, color="0.75", linewidth=0.8, zorder=0)
    dress(axis, "", "share", "d1/d2 (lines: 1/4, 1/3, 1/2; values below .02 are drawn at .02)")
    axis.set(ylabel="share of images below", xlim=(0.0185, 1))
    save(figure, path, words(run.name))


def pick(run, count):
    """At most `count` neighbours files, evenly along log step and copy ratio: both phases seen."""
    files = snapshot_files(run)
    steps = np.log([float(file.stem) for file in files])
    copies = [np.mean(read_neighbours(file, "ratios") < 1 / 3) for file in files]
    way = (steps - steps[0]) / max(np.ptp(steps), 1e-9) + np.maximum.accumulate(copies)
    return [files[k] for k in sorted({int(np.abs(way - place).argmin())
                                      for place in np.linspace(way[0], way[-1], count)})]


def strip(axis, file, top, label, count=10):
    """A row of a neighbours file's pictures, d1/d2 of each, and their nearest training images."""
    samples, nearest, ratios = (read_neighbours(file, k)[:count]
                                for k in ("samples", "nearest", "ratios"))
    axis.text(0, top - 0.12, f"{label}, d1/d2 (red: a copy), nearest training images")
    for k, ratio in enumerate(ratios):
        for picture, y in ((samples[k], top), (nearest[k], top + 1.4)):
            axis.imshow(np.broadcast_to(picture, (*picture.shape[:2], 3)), interpolation="nearest",
                        extent=(1.1 * k, 1.1 * k + 1, y + 1, y))
        color, weight, width = (RED, "bold", 2.5) if ratio < 1 / 3 else ("0.3", None, 0)
        axis.text(1.1 * k + 0.5, top + 1.05, f"{ratio:.2f}", ha="center", va="top",
                  fontsize="small", color=color, weight=weight)
        axis.add_patch(plt.Rectangle((1.1 * k, top), 1, 1, fill=False, edgecolor=color,
                                     linewidth=width))
    axis.set(xlim=(-0.05, 1.1 * len(ratios)), ylim=(top + 2.5, -0.6))
    axis.set_axis_off()


def plot_samples(run, path, steps=5):
    """Samples at several steps, a column from the same noise, above nearest training images."""
    files = pick(run, steps)
    figure, axis = plt.subplots(figsize=(9, 2.6 * len(files) + 0.5))
    for row, file in enumerate(files):
        strip(axis, file, 3.2 * row, f"step {int(file.stem):,}: samples")
    save(figure, path, words(run.name))


def plot_film(run, path, frames=13):
    """A film through training: samples and held-out images as in `strip`, loss and copy ratio."""
    files, film, hidden = pick(run, frames), PillowWriter(2), path.with_name(f".{path.name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context({"font.size": 8, "axes.titlesize": 8, "savefig.dpi": 100,
                         "figure.constrained_layout.use": False}):
        figure = plt.figure(figsize=(6.72, 3.36))
        with film.saving(figure, hidden, 100):
            for file in [*files, *files[-1:] * 4]:      # equal frames become one, shown longer
                figure.clear()
                draw_frame(figure, run, file)
                film.grab_frame()
        plt.close(figure)
    os.replace(hidden, path)


def draw_frame(figure, run, file):
    """A frame of the film: the pictures of a neighbours file, and where on the curves it is."""
    axis = figure.add_axes((0.01, 0, 0.73, 0.9), anchor="N")
    strip(axis, file, 0, "samples")
    held = run.path / "neighbours/heldout.npz"
    if held.exists() and "samples" in np.load(held).files:
        strip(axis, held, 3.1, "held-out images")
    figure.text(0.012, 0.92, f"training step {int(file.stem):,}", fontsize=12, weight="bold")
    for place, name in ((0.57, "loss"), (0.1, "copy")):
        small = figure.add_axes((0.79, place, 0.2, 0.34))
        for column in PANELS[name][2].split():
            curve(small, [run], column, BLUE)
        small.axvline(int(file.stem), color=RED, linewidth=2, alpha=0.7)
        dress(small, *PANELS[name][:2])


def plot_sweep(factor, groups, path, study=None):
    """The study's panels of a sweep, a colour per value: by raw step and by normalised time.

    study: the study's own sweep; thin, grey, on a scale of its own: for its shape alone.
    """
    label, _, formula, normalised = factor_of(factor)
    times = {"training step": lambda value: 1}
    if normalised:
        times[f"T = {formula}"] = lambda value: normalised(value, min(groups))
    figure, axes = plt.subplots(len(times), 4, figsize=(13, 3 * len(times) + 0.9), squeeze=False)
    for row, (time, scale) in zip(axes, times.items(), strict=True):
        for axis, (title, kind, columns) in zip(row, (PANELS[name] for name in FOUR), strict=True):
            for column in columns.split():
                line, _, name = style_of(column)
                for color, (value, runs) in zip(palette(len(groups)), groups.items(), strict=True):
                    curve(axis, runs, column, color, scale(value),
                          label_of(factor, value) if line == "-" else "")
                axis.plot([], [], color="0.25", linestyle=line, label=name)
            behind = axis.twinx() if study else None
            for column, value in itertools.product(columns.split(), study or ()):
                curve(behind, study[value], column, "0.75", scale(value), "")
            dress(axis, title, kind, time)
            if study:
                behind.set(yscale=axis.get_yscale(), yticks=[], zorder=-1)
                axis.plot([], [], color="0.75", label="the study's curves, on a scale of their own")
                axis.patch.set_visible(False)
    fixed = ", ".join(label_of(k, v) for k, v in groups.fixed.items())
    others = f"; the widest of {groups.others + 1} such sweeps" * bool(groups.others)
    save(figure, path, words(label + f"; fixed: {fixed}" * bool(fixed) + others))


def plot_onset(factor, groups, path, _=None):
    """The onset by each definition against the factor; an arrow where a run has not reached it."""
    numbers = all(type(v) in (int, float) and v > 0 for v in groups)
    names = [name for name in TAUS if "level" not in name and any(
        math.isfinite(run.onsets[name]) for runs in groups.values() for run in runs)]
    figure, axis = plt.subplots(figsize=(8, 5.4))
    for k, (name, color) in enumerate(zip(names, palette(len(names)), strict=True)):
        marker, means = "os^DvP"[k % 6], []
        for at, (value, runs) in enumerate(groups.items()):
            x = value * 1.02**k if numbers else at + 0.04 * k
            onsets = np.array([run.onsets[name] for run in runs])
            axis.plot([x] * len(runs), onsets, marker, color=color)
            for run in [run for run in runs if math.isinf(run.onsets[name])]:
                axis.errorbar(x, run.last_step, 0.2 * run.last_step, lolims=True, color=color,
                              marker=marker, markerfacecolor="white")
            means.append((x, np.exp(np.log(onsets).mean())))
        axis.plot(*zip(*means, strict=True), color=color, linewidth=1)
        axis.plot([], [], f"{marker}-", color=color, label=TAUS[name])
    dress(axis, "arrow: not reached by then", "log", factor_of(factor).label)
    axis.set(ylabel="onset of memorization, training step", xscale="log" if numbers else "linear")
    axis.set_xticks([*groups] if numbers else range(len(groups)),
                    [label_of(factor, v).split(" = ")[1] for v in groups])
    axis.xaxis.set_minor_locator(mpl.ticker.NullLocator())
    save(figure, path, factor_of(factor).label)


# A figure of a run: its file, what draws it, the columns and tables it needs (their beginnings).
RUN_FIGURES = (("run_{}.png", plot_run, "step"), ("metrics_{}.png", plot_metrics, "copy_ratio"),
               ("levels_{}.png", plot_levels, "heldout_loss_level"),
               ("samples_{}.png", plot_samples, "neighbours"),
               ("ratios_{}.png", plot_ratios, "neighbours"),
               ("film_{}.gif", plot_film, "neighbours"),
               ("denoisers_{}.png", plot_denoisers, "denoisers"),
               ("hump_{}.png", plot_hump, "spectrum sw_"),
               ("copier_{}.png", plot_copier, "controls sw_"),
               ("twins_{}.png", plot_twins, "twin_"), ("planted_{}.png", plot_planted, "planted"))
SWEEP_FIGURES = (("sweep_{}.png", plot_sweep), ("onset_{}.png", plot_onset))


def draw_all(runs, found, folder, study=None):
    """Every figure that runs and their sweeps (see sweeps) have the data for, in place of old ones.

    Of several seeds the first gets all figures, the others their curves. study: {factor: the
    study's own sweep}.
    """
    for name, *_ in RUN_FIGURES + SWEEP_FIGURES:
        for path in folder.glob(name.format("*")):
            path.unlink()
    first = {}
    for run in runs:
        data = [*run.log, *run.metrics, *run.tables, "controls" * bool(run.controls),
                "neighbours" * bool(snapshot_files(run))]
        for name, draw, needs in RUN_FIGURES:
            if (name.startswith("run") or first.setdefault(run.key(), run) is run) and all(
                    any(key.startswith(need) for key in data) for need in needs.split()):
                draw(run, folder / name.format(run.stem))
    for factor, groups in found.items():
        for name, draw in SWEEP_FIGURES:
            draw(factor, groups, folder / name.format(factor), (study or {}).get(factor))


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
