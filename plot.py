"""Draw the study's figures and test its claims, from the tables in the run folders alone.

    python plot.py runs/digits                      # a sweep: figures, tables in its figures/
    python plot.py runs/                            # every sweep below
    python plot.py runs/digits/N64_w32_B32_lr1e-3_s0        # one run: what it shows, in a few lines
    python plot.py results/digits                   # a sweep again, from its runs.csv alone
    python plot.py runs/digits results/digits       # the union of both, drawn into the first
    python plot.py --paper                          # the study's own curves, judged the same way

Of several roots, a run that two of them have (same name, same set of samples) is taken from the
earlier one, and nothing is written or removed but in the first's figures/.

Four parts: reading (a Run is one training run with one set of samples, from a run folder, from a
table runs.csv or from the study's own curves; runs that differ in one option make a sweep), the
claims (each a statistic with a 95 % interval and a region where it holds), tables (summary.csv, a
row per run; runs.csv, a row per run and step, with the smaller tables beside it, enough to draw
everything but pictures again; claims.md), figures. Nothing here needs torch.

tau_mem, the step at which memorization starts, has several definitions (TAUS), each interpolated
between evaluations in log step. Copies are counted above the null.
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
from PIL import Image

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
TAUS = {"heldout_min": "held-out loss lowest", "heldout_25": "held-out loss 25 % up",
        "copy_01": "copy ratio .01", "copy_10": "copy ratio .1", "copy_50": "copy ratio .5",
        "denoisers": "nearer to the memorizer than to any other denoiser",
        **{f"level{k}": f"held-out loss lowest, t {k / 10:.1f} to {(k + 1) / 10:.1f}"
           for k in range(10)}}
COPY_LEVELS = {"copy_01": 0.01, "copy_10": 0.1, "copy_50": 0.5}     # above the null

# --- Reading --------------------------------------------------------------------------------------


class PlotError(Exception):
    """Something the user gave is wrong; the message is one line."""


def read_rows(path):
    """A CSV file as a list of {column: text}; [] if absent. PlotError where it is not readable."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except FileNotFoundError:
        return []
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
    """An option, or its cell in a table, as a number, True, False, None or a word.

    A list is one word, or the number that it holds alone: what is read from a table of it.
    """
    try:
        cell = json.loads(cell) if isinstance(cell, str) else cell
    except ValueError:
        return cell
    return value_of(" ".join(map(str, cell))) if isinstance(cell, (list, dict)) else cell


def columns_of(rows, path):
    """Rows as {column: float array}, by rising step, nan where a cell is no number.

    Of several rows of one step the last counts. PlotError where no row has a step.
    """
    by_step = {s: row for row in rows if 0 <= (s := number(row.get("step"))) < math.inf}
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

    def __init__(self, name, options, log, metrics, path=None, set="", **rest):
        self.name, self.options, self.path, self.set = name, options, path, set
        self.log, self.metrics, self.seed = log, metrics, options.get("seed", 0)
        self.controls, self.tables = rest.get("controls", {}), rest.get("tables", {})
        self.free, self.defaults = FREE | rest.get("free", FREE), rest.get("defaults", {})
        self.parameters = number(rest.get("parameters"))
        spaces = [c[3:-6] for c in metrics if c.startswith("sw_") and c.endswith("_train")
                  and not c.startswith("sw_error_")]
        self.space = min(spaces, key=lambda s: (s != "inception", s == "pixels", s), default=None)
        plain = "".join(c if c.isalnum() or c in "._-" else "_" for c in name)
        digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()[:8]
        self.stem = name if name == plain[:120] else f"{plain[:110]}-{digest}"

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


def read_beside(folder):
    """The smaller tables of a folder: {stem: rows}."""
    return {p.stem: read_rows(p) for p in sorted(folder.glob("*.csv"))
            if p.stem in ("denoisers", "spectrum", "planted") or p.stem.startswith("twin_")}


def control_columns(rows):
    """Rows of controls.csv as {name: {column: float}}."""
    return {row.get("name", ""): {k: number(v) for k, v in row.items() if k not in ("run", "name")}
            for row in rows}


def read_folder(path):
    """A run folder as a list of Runs, one per set of samples. PlotError where damaged."""
    try:
        record = json.loads((path / "args.json").read_text(encoding="utf-8"))
        options, rest = ({k: value_of(v) for k, v in record[name].items()} if name in record
                         else {} for name in ("options", "defaults"))
        rest = {"defaults": rest, "free": {*record.get("free", ())},
                "parameters": record.get("parameters")}
        options["seed"] = options.get("seed", 0)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise PlotError(f"{path}/args.json: missing or damaged") from None
    log, sets = columns_of(read_rows(path / "log.csv"), path / "log.csv"), {}
    for row in read_rows(path / "metrics.csv"):
        sets.setdefault(row.get("set", ""), []).append(row)
    tables, runs = read_beside(path), []
    rest["controls"] = control_columns(read_rows(path / "controls.csv"))
    for name, rows in sets.items() if sets or not log else [("", [])]:
        settings = {k: value_of(v) for k, v in (rows or [{}])[0].items()
                    if k.startswith("setting_") and v}
        rest["tables"] = {stem: [r for r in table if stem == "denoisers" or r.get("name")
                                 or r.get("set", name) == name]
                          for stem, table in tables.items()}
        runs.append(Run("_".join(filter(None, (path.name, name))), options | settings, log,
                        columns_of(rows, path / "metrics.csv"), path, name, **rest))
    return runs


def read_table(path, rename=None):
    """A table with a row per run and step as Runs, one per value of all columns before `step`.

    rename {column: name here}. The smaller tables beside it have a column `run`. PlotError where
    there is no column `step`.
    """
    rows, groups = read_rows(path), {}
    if not rows or "step" not in rows[0]:
        raise PlotError(f"{path}: no column 'step'")
    heads = list(itertools.takewhile(lambda k: k != "step", rows[0]))
    for row in rows:
        groups.setdefault(tuple(row[k] for k in heads), []).append(
            {(rename or {}).get(k, k): v for k, v in row.items() if k not in heads})
    beside, runs = read_beside(path.parent), []
    controls = read_rows(path.parent / "controls.csv")
    for head, lines in groups.items():
        texts = dict(zip(heads, head, strict=True))
        name, set_ = texts.pop("run", "_".join(head)), texts.pop("set", "")
        options = {k: value_of(v) for k, v in texts.items()}
        curves = {k: v for k, v in columns_of(lines, path).items()
                  if k == "step" or np.isfinite(v).any()}
        tables = {stem: mine for stem, table in beside.items()
                  if (mine := [row for row in table if row.get("run") == name])}
        runs.append(Run(name, options, curves, curves, set=set_, tables=tables,
                        parameters=options.pop("parameters", None), controls=control_columns(
                            row for row in controls if row.get("run") == name)))
    return runs


@functools.lru_cache
def study_runs():
    """The study's own curves as Runs; what several of its figures show counts as repeats."""
    runs, seeds = read_table(STUDY, STUDY_COLUMNS), collections.Counter()
    for run in runs:
        run.options.pop("factor")
        run.name = run.stem = f"study_{run.name}"
        run.seed = run.options["seed"] = seeds[run.key()]
        seeds[run.key()] += 1
    return runs


def settle(runs):
    """Give every run the same options: what one lacks, at its default; settings if they matter.

    A sampling setting counts only where differently named sets of samples differ in it: the
    clipping that a process brings along does not.
    """
    free = set().union(*(run.free for run in runs))
    defaults = {k: v for run in reversed(runs) for k, v in run.defaults.items()}
    names = {k for run in runs for k in run.options} - free
    for name in sorted(k for k in names if k.startswith("setting_")):
        by_set = {}                             # the values in sets of one name
        for run in runs:
            by_set.setdefault(run.set, set()).update(
                [run.options[name]] if name in run.options else [])
        if len({frozenset(values) for values in by_set.values() if values}) < 2:
            names.remove(name)
        for run in runs:
            run.options.setdefault(name, min(by_set[run.set], key=str, default=None))
    for run in runs:
        run.free = free
        run.options = {k: run.options.get(k, defaults.get(k)) for k in sorted(names)}


def run_folders(root):
    """The run folders at or below a folder, sorted: those with an args.json."""
    if (root / "args.json").exists():
        return [root]
    return sorted(path.parent for path in root.rglob("args.json"))


def read_root(root, damaged):
    """The runs at or below a folder: {folder for their figures: [Run]}.

    From run folders or, where there are none, from tables runs.csv, whose figures go beside them.
    The message of each run that is not readable is added to the list damaged.
    """
    if not root.is_dir():
        raise PlotError(f"{root}: no such folder")
    groups, folders, before = {}, run_folders(root), len(damaged)
    for path in folders or sorted(root.rglob("runs.csv")):
        place = path.parent
        if folders:
            place = (root if path == root else place) / "figures"
        try:
            runs = (read_folder if folders else read_table)(path)
        except PlotError as error:
            damaged.append(str(error))
        else:
            groups.setdefault(place, []).extend(runs)
    groups = {place: runs for place, runs in groups.items() if runs}
    if not groups and len(damaged) == before:
        raise PlotError(f"{root}: no run with a log.csv below it; train one first")
    return groups


def find_runs(*roots, damaged=None):
    """The runs at or below some folders, grouped: {folder for figures: [Run]}.

    Of several roots: the union of their runs, in one place, the figures/ of the first root (a root
    of tables: the root itself). A run that an earlier root has, too, with its name and its set of
    samples, is left out. Runs that no chain of changes of one option connects are put into folders
    of their own, named by what differs. damaged: a list that takes the message of each run that is
    not readable; PlotError where no run is.
    """
    roots, damaged = [Path(root) for root in roots], [] if damaged is None else damaged
    found = [read_root(root, damaged) for root in roots]
    if not any(found):
        raise PlotError("; ".join(damaged))
    groups = found[0]
    if len(roots) > 1:
        union = []
        for runs in found:
            earlier = {(run.name, run.set) for run in union}
            union += [run for run in itertools.chain(*runs.values())
                      if (run.name, run.set) not in earlier]
        groups = {roots[0] / ("figures" if run_folders(roots[0]) else ""): union}
    for runs in groups.values():
        settle(runs)
    return {place / name: family for place, runs in groups.items()
            for name, family in families(runs).items()}


def families(runs):
    """Runs grouped so that each differs from another of its group in one option at most.

    {name: [Run]}: "" for a single group, else what differs between the groups.
    """
    groups = []
    for run in runs:
        linked = [g for g in groups if any(
            sum(a != b for a, b in zip(run.key(), other.key(), strict=True)) <= 1 for other in g)]
        groups = [g for g in groups if g not in linked] + [[r for g in linked for r in g] + [run]]
    if len(groups) == 1:
        return {"": runs}
    sets = [{k: sorted({str(r.options[k]) for r in g}) for k, _ in runs[0].key()} for g in groups]
    names = ["_".join(k + "-".join(s[k]) for k in s if any(o[k] != s[k] for o in sets))
             for s in sets]
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
            seeds = slices.setdefault(run.key(factor), {}).setdefault(run.options[factor], {})
            if run.seed not in seeds or seeds[run.seed].last_step < run.last_step:
                seeds[run.seed] = run               # the longest of two equal runs
        several = [{v: [*seeds.values()] for v, seeds in values.items()}
                   for values in slices.values() if len(values) > 1]
        if several:
            widest = max(several, key=lambda v: (len(v), sum(map(len, v.values()))))
            found[factor] = Slice(sorted(widest.items(), key=lambda item: (
                isinstance(item[0], str), item[0] or 0)))
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


# --- Onset, best fidelity -------------------------------------------------------------------------


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
        step, distance = number(row.get("step")), number(row.get("median"))
        if row.get("inputs") == "path" and distance >= 0 and step > 0:
            at = found.setdefault(step, {}).setdefault(row.get("level"), {})
            at[row.get("reference")] = math.log(max(distance, 1e-12))
    ratios = {step: [min(at.values()) - own for at in levels.values()
                     if (own := at.pop("memorizer", None)) is not None and at]
              for step, levels in sorted(found.items())}
    steps = [step for step, values in ratios.items() if values]
    return np.array(steps), np.array([np.mean(ratios[step]) for step in steps])


def onsets_of(run):
    """The onset of memorization by each definition of TAUS: {name: step}.

    inf not reached, nan not measured.
    """
    curves = {name: (crossing, *excess(run), level) for name, level in COPY_LEVELS.items()}
    curves |= {f"level{k}": (lowest, *run.column(f"heldout_loss_level{k}")) for k in range(10)}
    steps, loss = run.column("heldout_loss")
    k = int(np.argmin(loss)) if len(loss) else 0
    curves["heldout_min"] = lowest, steps, loss
    curves["heldout_25"] = crossing, steps[k:], loss[k:], 1.25 * min(loss, default=0)
    curves["denoisers"] = crossing, *nearest_denoiser(run), 0.0
    return {name: curves[name][0](*curves[name][1:]) if len(curves[name][1]) else math.nan
            for name in TAUS}


def best_fidelity(run):
    """The lowest sliced Wasserstein distance to held-out images before copy ratio .01.

    (value, step, whether a better one may have gone unseen, at the run's last evaluation or where
    only one comes before the copies); nan where no distance was measured.
    """
    steps, distance = run.column("sw_SPACE_heldout")
    before = ~(steps > run.onsets["copy_01"])   # all of them where copies were not measured
    if not before.any():
        return math.nan, math.nan, False
    k = int(np.argmin(distance[before]))
    return float(distance[k]), float(steps[k]), bool(k == len(steps) - 1 or before.sum() == 1)


def second_peak(values, before):
    """Where a curve of positive values turns: (index of the lowest of those where `before`, index
    of the highest after it, the rise between them and the fall after, as factors).
    """
    k = int(np.argmin(np.where(before, values, np.inf)))
    j = k + int(np.argmax(values[k:]))
    return k, j, values[j] / values[k], values[j] / values[j:].min()


def to_keep(run):
    """The snapshot a user would keep: (step, SW to held-out, copy ratio), nans where none is.

    The best fidelity among those whose copy ratio is not above its null: at most .01 above, or
    with overlapping 95 % intervals.
    """
    distance, copies, null, low, null_high = (dict(zip(*run.column(c), strict=True)) for c in (
        "sw_SPACE_heldout", "copy_ratio", "null_copy_ratio", "copy_low", "null_copy_high"))
    honest = [s for s in distance if s in copies and (
        copies[s] <= null.get(s, 0) + 0.01 or low.get(s, 1) <= null_high.get(s, 0))]
    step = min(honest, key=distance.get, default=None)
    return (step, distance[step], copies[step]) if honest else (math.nan,) * 3


# --- Statistics -----------------------------------------------------------------------------------

# A statistic is a function run -> Point: the logarithm of a positive number, None where it was not
# measured. Its error has two parts: the scatter from run to run, pooled over all settings with two
# seeds or more (the study's own where there are none), and what is known of this run alone, its
# variance: how many samples it has and how far apart its evaluations are.
Point = collections.namedtuple("Point", "value variance bound")   # bound: 1 truth above, -1 below
# A tested value with its 95 % interval and what it rests on; nan: not tested, and the text says why
Result = collections.namedtuple("Result", "text value low high borrowed intercept",
                                defaults=(*[math.nan] * 3, False, math.nan))
# Standard error of an interpolated step, as a share of the gap between evaluations: how far the
# study's curves move when every second evaluation is left out.
CROSSING_ERROR, LOWEST_ERROR = 0.07, 0.2
RATE_FROM = 0.02                                # copy ratio at which a memorization rate starts


def t95(dof):
    """The 97.5 % quantile of Student's t, to one per cent."""
    table = (math.inf, 12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)
    return table[dof] if dof < len(table) else 1.96 + 2.6 / dof


def wilson(k, n):
    """The 95 % interval of a share k / n, by Wilson's formula."""
    centre, spread = (k + 1.92) / (n + 3.84), 1.96 * math.sqrt(k * (n - k) / n + 0.96) / (n + 3.84)
    return max(0.0, centre - spread), min(1.0, centre + spread)


def step_variance(run, steps, values, step, error):
    """The variance of the logarithm of a step at which a curve turns or crosses a level.

    From the gap between evaluations and, where run is given and the values are shares of its
    samples, from their number.
    """
    if len(steps) < 2:
        return 0.0
    k = int(np.clip(np.searchsorted(steps, step), 1, len(steps) - 1))
    gap, rise = math.log(steps[k] / steps[k - 1]), values[k] - values[k - 1]
    share, samples = float(np.interp(step, steps, values)), sample_count(run) if run else 0
    sampling = share * (1 - share) / samples * (gap / rise)**2 if samples and rise > 0 else 0.0
    return (error * gap)**2 + max(sampling, 0.0)


def sample_count(run):
    """The number of samples per snapshot, the median over snapshots; 0 where it is not known."""
    return float(np.median([*run.column("samples")[1]] or [0]))


def has_log(value):
    """Whether an option's value is a positive, finite number."""
    return type(value) in (int, float) and 0 < value < math.inf


def onset(name, times=None):
    """The statistic log(tau_mem), by a definition of TAUS, or log(tau_mem x option `times`).

    A run that ends before is a lower bound; one at its first evaluation is an upper bound.
    """
    def point(run):
        step, copies, factor = run.onsets[name], name in COPY_LEVELS, 0.0
        steps, values = excess(run) if copies or name == "denoisers" else run.column("heldout_loss")
        if math.isnan(step) or not len(steps) or times and not has_log(run.options.get(times)):
            return None
        if times:
            factor = math.log(run.options[times])
        if math.isinf(step) or step <= steps[0]:
            return Point(math.log(min(step, steps[-1])) + factor, 0.0, 1 if step > steps[0] else -1)
        error = LOWEST_ERROR if name.startswith(("heldout_min", "level")) else CROSSING_ERROR
        variance = step_variance(run if copies else None, steps, values, step, error)
        return Point(math.log(step) + factor, variance, 0)
    point.borrowed = onset("heldout_min") if name.startswith("level") else point
    return point


def best(run):
    """The statistic log(best fidelity); an upper bound where a better one may be unseen."""
    value, step, improving = best_fidelity(run)
    if not value > 0:
        return None
    errors = dict(zip(*run.column("sw_error_SPACE_heldout"), strict=True))
    return Point(math.log(value), (errors.get(step, 0) / value)**2, -1 if improving else 0)


def rate(high, low=RATE_FROM):
    """The statistic log(memorization rate): (high - low) over the doublings that it takes.

    low, high: copy ratios above the null. None where a run does not reach `high`.
    """
    def point(run):
        steps, copies = excess(run)
        ends = [crossing(steps, copies, level) if len(steps) else math.inf for level in (low, high)]
        if math.isinf(ends[1]) or ends[1] <= ends[0]:
            return None
        took = math.log(ends[1] / ends[0])
        variance = sum(step_variance(run, steps, copies, s, CROSSING_ERROR) for s in ends)
        early = ends[0] <= steps[0]             # it began before the first evaluation
        return Point(math.log((high - low) * math.log(2) / took), variance / took**2, -int(early))
    point.borrowed = point if high <= COPY_LEVELS["copy_10"] else rate(COPY_LEVELS["copy_10"])
    return point


def scatter(runs, statistic):
    """(variance between runs of one setting, degrees of freedom, whether borrowed).

    Pooled over all settings; the study's own where these runs have no repeats.
    """
    groups, squares, dof = {}, 0.0, 0
    for run in runs:
        groups.setdefault(run.key(), {})[run.seed] = statistic(run)
    # a set of tuples, since two sets of samples of one run share its losses
    for values in {tuple(p.value for p in points.values() if p and not p.bound)
                   for points in groups.values()}:
        squares += float(np.var(values)) * len(values) if values else 0.0
        dof += max(len(values) - 1, 0)
    if dof or runs is study_runs():
        return squares / dof if dof else 0.0, dof, False
    # what few of the study's runs reach borrows from the nearest that they do
    return *scatter(study_runs(), getattr(statistic, "borrowed", statistic))[:2], True


def fit_line(x, y, variance, bound):
    """(slope, intercept, standard error of the slope) of a line with known errors. Arrays (n,).

    By maximum likelihood; a bound is replaced by its expectation beyond it (Tobit), so that one
    which the line satisfies with ease hardly counts.
    """
    sigma = np.sqrt(np.maximum(variance, 1e-12))
    filled, weight = y, sigma**-2
    for _ in range(1000):
        dx = x - np.average(x, weights=weight)
        slope = float((weight * dx * filled).sum() / (weight * dx**2).sum())
        line = np.average(filled, weights=weight) + slope * dx
        z = np.clip(bound * (y - line) / sigma, -30, 30)
        hazard = np.array([math.sqrt(2 / math.pi) * math.exp(-v * v / 2) / math.erfc(
            v / math.sqrt(2)) for v in z])
        filled, last = np.where(bound, line + bound * sigma * hazard, y), filled
        if np.abs(filled - last).max() < 1e-6:
            break
    weight = weight * np.where(bound, hazard * (hazard - z), 1)
    spread = (weight * (x - np.average(x, weights=weight))**2).sum()
    return slope, float(line[0] - slope * x[0]), 1 / math.sqrt(spread)


def exponent(groups, runs, statistic):
    """The slope of a statistic against log(factor) over a Slice, as a Result.

    runs: all runs, for the scatter. Bounds are left out of the value; its interval covers both the
    fit without them and the one with them, since a power law need not hold as far as they reach.
    """
    if not all(map(has_log, groups)):
        return Result("its values have no logarithm")
    points = [(math.log(v), *p) for v, group in groups.items() for run in group
              if (p := statistic(run))]
    x, y, variance, bound = np.array(points).reshape(-1, 4).T
    between, dof, borrowed = scatter(runs, statistic)
    if len({*x}) < 3 or len({*x[bound == 0]}) < 2 or not dof:
        return Result("fewer than three values reached it" if dof else "no repeats known")
    fits = [fit_line(x[use], y[use], variance[use] + between, bound[use])
            for use in ((bound == 0), (bound > -2))]
    half, total = t95(dof), sum(map(len, groups.values()))
    text = f"{len({*x})} values, {total} runs" + "".join(
        f", {count} {what}" for count, what in (
            ((bound > 0).sum(), "not reached"), ((bound < 0).sum(), "upper bounds"),
            (total - len(x), "not measured")) if count) + f"; scatter {math.sqrt(between):.2g}"
    return Result(text, fits[0][0], min(s - half * e for s, _, e in fits),
                  max(s + half * e for s, _, e in fits), borrowed, fits[0][1])


# --- The study's claims ---------------------------------------------------------------------------


def common_rate(groups):
    """(rate statistic, words) over the copy ratios that all compared runs share.

    Runs that do not reach copy ratio .1 above the null are not compared.
    """
    high = min([excess(run)[1].max() for group in groups.values() for run in group
                if math.isfinite(run.onsets["copy_10"])], default=COPY_LEVELS["copy_10"])
    high = min(high, 0.9)
    return rate(high), f"copy ratio {RATE_FROM:g} to {high:.2g}"


def rate_exponent(groups, runs):
    """Claim 3b: the slope of the memorization rate."""
    statistic, words = common_rate(groups)
    result = exponent(groups, runs, statistic)
    return result._replace(text=f"{words}; {result.text}")


def rate_spread(groups, runs):
    """Claim 5b: the largest factor between the rates at two values; every pair's error counts."""
    statistic, words = common_rate(groups)
    points = [[p for r in group if (p := statistic(r)) and not p.bound]
              for group in groups.values()]
    points = [group for group in points if group]
    between, dof, borrowed = scatter(runs, statistic)
    if len(points) < 3 or not dof:
        return Result("fewer than three values reached copy ratio .1")
    means = [np.mean([p.value for p in group]) for group in points]
    errors = [(between + np.mean([p.variance for p in group])) / len(group) for group in points]
    pairs = [(abs(means[i] - means[j]), t95(dof) * math.sqrt(errors[i] + errors[j]))
             for i, j in itertools.combinations(range(len(points)), 2)]
    listed = ", ".join(f"{math.exp(m):.3f}" for m in means)
    return Result(f"{listed} per doubling, {words}; scatter {math.sqrt(between):.2g}",
                  *(math.exp(max(0.0, max(d + k * e for d, e in pairs))) for k in (0, -1, 1)),
                  borrowed)


def paired(run, *columns):
    """(steps, values (columns, steps)) at the steps where all columns are finite and positive."""
    tables = [dict(zip(*run.column(c), strict=True)) for c in columns]
    steps = sorted(s for s in set.intersection(*map(set, tables)) if all(t[s] > 0 for t in tables))
    return np.array(steps), np.array([[t[s] for s in steps] for t in tables])


def equal_distances(runs):
    """Claim 1: by which factor SW train / SW held-out changes as copies appear.

    Only where both splits are as many images: the training images as many as the samples, or more.
    """
    changes = []
    for run in runs:
        steps, (train, held) = paired(run, "sw_SPACE_train", "sw_SPACE_heldout")
        after, n = steps > run.onsets["copy_01"], run.options.get("n", math.inf)
        if after.any() and not after.all() and n >= sample_count(run):
            ratio = np.log(train / held)
            changes.append(np.median(ratio[after]) - np.median(ratio[~after]))
    if len(changes) < 3:
        return Result("fewer than three runs with copies and with as many training images as "
                      "samples")
    error = np.std(changes, ddof=1) / math.sqrt(len(changes))
    return Result(f"{len(changes)} runs, {math.exp(min(changes)):.2f} to "
                  f"{math.exp(max(changes)):.2f}", *(math.exp(
                      np.mean(changes) + k * t95(len(changes) - 1) * error) for k in (0, -1, 1)))


def share(good, text):
    """A Result from booleans, one per run; four of four, 6 % by chance, cannot decide."""
    if len(good) < 3:
        return Result(f"fewer than three runs {text}")
    low, high = wilson(sum(good), len(good)) if len(good) > 4 else (0.0, 1.0)
    return Result(f"{sum(good)} of {len(good)} runs {text}", sum(good) / len(good), low, high)


def double_descent(runs):
    """Claim 2: the share of runs with copies whose SW and FID, to both splits, descend twice."""
    good = []
    for run in runs:
        steps, values = paired(run, *(f"{d}_SPACE_{split}" for d in ("sw", "fid")
                                      for split in ("train", "heldout")))
        before = steps <= run.onsets["copy_01"]
        if before.any() and math.isfinite(run.onsets["copy_10"]):
            turns = [second_peak(v, before) for v in values]
            together = all(abs(turns[k][0] - turns[k + 2][0]) <= 1 for k in (0, 1))
            good.append(together and all(rise >= 1.5 and fall >= 1.1 for _, _, rise, fall in turns))
    return share(good, "that reach copy ratio .1")


def gains_before(runs):
    """Claim 7: the share of runs whose best fidelity lies before their first copies."""
    ratios = []
    for run in runs:
        steps, distance = run.column("sw_SPACE_heldout")
        before = steps <= run.onsets["copy_01"]
        after = ~before & (steps <= run.onsets["copy_50"])
        if after.any() and before.any():
            ratios.append(distance[after].min() / distance[before].min())
    return share([r > 1 for r in ratios], "with copies" + (
        f", {min(ratios):.2f} to {max(ratios):.2f}" if ratios else ""))


Claim = collections.namedtuple("Claim", "number text statistic where region factor test")
TAU, BEST = "slope of log tau_mem (held-out loss 25 % up) against ", "slope of log best SW against "
UP, DOWN = ("above 0", (0.0, math.inf)), ("below 0", (-math.inf, 0.0))
OFTEN = "in more than half of the runs", (0.5, math.inf)
ONSET, BY_BEST = (functools.partial(exponent, statistic=s) for s in (onset("heldout_25"), best))
# A claim, the statistic that decides it, the region where it holds, in words and in numbers, the
# factor whose sweep it needs, and the function that gives the Result.
CLAIMS = [Claim(*row) for row in (
    ("1", "Distances to train and held-out stay nearly equal: they do not see copying",
     "SW train / SW held-out, median after copy ratio .01 over median before",
     "within a factor of 1.25", (1 / 1.25, 1.25), None, equal_distances),
    ("2", "FID and SW show a double descent, against both splits, in step",
     "both rise by 1.5 after their best, then fall by 1.1; bests within one evaluation",
     *OFTEN, None, double_descent),
    ("3a", "Onset is proportional to N", TAU + "log N", "1 ± .25", (0.75, 1.25), "n", ONSET),
    ("3b", "Larger N memorizes more slowly", "slope of log rate against log N", *DOWN, "n",
     rate_exponent),
    ("3c", "Larger N has better best fidelity", BEST + "log N", *DOWN, "n", BY_BEST),
    ("4a", "Larger models start earlier", TAU + "log width", *DOWN, "width", ONSET),
    ("4b", "Larger models have better best fidelity", BEST + "log width", *DOWN, "width", BY_BEST),
    ("5a", "Onset, in steps, is proportional to 1/B", TAU + "log B", "-1 ± .25", (-1.25, -0.75),
     "batch", ONSET),
    ("5b", "The rate does not depend on B", "largest factor between two rates", "below 1.5",
     (0.0, 1.5), "batch", rate_spread),
    ("5c", "Smaller B has better best fidelity", BEST + "log B", *UP, "batch", BY_BEST),
    ("6a", "Onset, in steps x lr, comes later at larger lr",
     TAU.replace("tau_mem", "(tau_mem x lr)") + "log lr", *UP, "lr",
     functools.partial(exponent, statistic=onset("heldout_25", "lr"))),
    ("6b", "Larger lr has better best fidelity", BEST + "log lr", *DOWN, "lr", BY_BEST),
    ("7", "All gains in fidelity are made before the onset",
     "lowest SW from copy ratio .01 to .5 over lowest before, above 1", *OFTEN, None,
     gains_before))]


def usual(runs):
    """The runs with the set of samples that most of them have: each run counts once."""
    sets = collections.Counter(run.set for run in runs)
    return [run for run in runs if run.set == max(sets, key=sets.get)]


def judge(runs):
    """[(Claim, Result, verdict)]: the study's claims, tested on these runs.

    supported: the interval lies inside the region; contradicted: outside; undecided: neither; not
    tested: too few values.
    """
    runs = usual(runs)
    found, rows = sweeps(runs), []
    for claim in CLAIMS:
        result = claim.test(runs) if not claim.factor else Result("no sweep of it") if (
            claim.factor not in found) else claim.test(found[claim.factor], runs)
        low, high = claim.region
        word = "not tested" if math.isnan(result.value) else (
            "supported" if low < result.low and result.high < high else
            "contradicted" if result.high < low or result.low > high else "undecided")
        rows.append((claim, result, word + ", scatter borrowed" * result.borrowed))
    return rows


# --- Tables ---------------------------------------------------------------------------------------


def digits(value, count=4):
    """A number as text, with so many digits; nothing for nan and inf."""
    return f"{value:.{count}g}" if math.isfinite(value) else ""


def summarize(run):
    """One row of summary.csv, as texts; empty cells for what was not measured."""
    row = {"run": run.name, **dict(run.key()), "seed": run.seed,
           "parameters": digits(run.parameters, 12), "last_step": digits(run.last_step, 12)}
    for name in TAUS:
        point = onset(name)(run)
        row[f"tau_{name}"] = f"{['', '>', '<'][point.bound]}{math.exp(point.value):.0f}" if (
            point) else ""
        for end, k in (("low", -1.96), ("high", 1.96)):
            row[f"tau_{name}_{end}"] = "" if not point or point.bound else (
                f"{math.exp(point.value + k * math.sqrt(point.variance)):.0f}")
    value, step, improving = best_fidelity(run)
    speed, (keep, distance, copied) = rate(COPY_LEVELS["copy_10"])(run), to_keep(run)
    (steps, (curve,)), hump = paired(run, "sw_SPACE_heldout"), ""
    if (steps <= step).any():
        _, peak, rise, fall = second_peak(curve, steps <= step)
        hump = digits(steps[peak], 12) if min(rise, fall) >= 1.1 else ""
    last, null = (digits([math.nan, *run.column(c)[1]][-1])
                  for c in ("copy_ratio", "null_copy_ratio"))
    return row | {"rate_to_copy_10": digits(math.exp(speed.value)) if speed else "",
                  "best_sw_heldout": "<" * improving + digits(value),
                  "best_sw_step": digits(step, 12), "hump_step": hump,
                  "keep_step": digits(keep, 12), "keep_sw_heldout": digits(distance),
                  "keep_copy_ratio": digits(copied), "space": run.space or "",
                  "last_copy_ratio": last, "null_copy_ratio": null}


def describe(run):
    """What one run shows, in a few lines."""
    row = summarize(run)
    lines = [f"{run.name}, {row['last_step']} steps"]
    lines += [f"  {text}: step {row[f'tau_{name}']}" + (
        f" [{row[f'tau_{name}_low']}, {row[f'tau_{name}_high']}]" if row[f"tau_{name}_low"] else "")
        for name, text in TAUS.items() if row[f"tau_{name}"] and not name.startswith("level")]
    if run.metrics:
        lines += [f"  lowest SW to held-out before copies: {row['best_sw_heldout'] or '-'}, at "
                  + f"step {row['best_sw_step'] or '-'} ({run.space})",
                  f"  copies at the end: {row['last_copy_ratio'] or '-'}; null "
                  + f"{row['null_copy_ratio'] or '-'}"]
    exact = run.controls.get("exact", {}).get("copy_ratio", math.nan)
    if not math.isnan(exact):
        lines.append(f"  copies among the samples of the exact denoiser: {exact:.4g}")
    for name, rows in run.tables.items():
        if name.startswith("twin_") and rows:
            lines.append(f"  agreement with {name[5:]} at the end: {rows[-1].get('agreement')}; of "
                         f"pairs from different noise: {rows[-1].get('null_agreement')}")
    if planted := run.tables.get("planted"):
        lines.append("  planted copies that are found: " + ", ".join(
            f"{r.get('planted')} {number(r.get('copy_ratio')):.3g}" for r in planted))
    return lines


def keep_line(run):
    """One line: which snapshot a user would keep."""
    step, distance, copies = to_keep(run)
    return f"{run.name}: " + ("no snapshot to keep" if math.isnan(step) else (
        f"keep step {step:.0f}: SW to held-out {distance:.3g}, copy ratio {copies:.3g}"))


def markdown(head, rows):
    """A table as text."""
    return "\n".join("| " + " | ".join(str(cell).replace("|", "/") for cell in row) + " |"
                     for row in (head, ["---"] * len(head), *rows))


def interval_text(result):
    """A cell of claims.md: the value and its interval."""
    return "-" if math.isnan(result.value) else (
        f"{result.value:.2f} [{result.low:.2f}, {result.high:.2f}]")


def claims_text(runs, found, study):
    """claims.md: the claims and their verdicts; exponents by each definition; onsets of each run.

    study: whether the study's own curves stand beside these runs.
    """
    repeats = collections.Counter(run.key() for run in runs).values()
    lines = [f"{len(runs)} runs of {len(repeats)} settings, {sum(c > 1 for c in repeats)} with "
             "repeats; distances in " + ", ".join(sorted({run.space or "-" for run in runs}))
             + ". In brackets: 95 % intervals. Definitions: at the top of plot.py."]
    lines += [f"{factor_of(name).label}: {', '.join(map(str, groups))}" + "".join(
        f"; {label_of(*pair)}" for pair in groups.fixed.items()) + (
        f" (the widest of {groups.others + 1} such slices)" if groups.others else "") + "."
        for name, groups in found.items()]
    head = ["", "claim", "supported where", "these runs", "verdict"]
    rows = [[c.number, c.text, f"{c.statistic}: {c.where}", f"{interval_text(r)} ({r.text})", word]
            for c, r, word in judge(runs)]
    for row, (_, r, word) in zip(rows, judge(study_runs()) if study else (), strict=study):
        row.append(f"{interval_text(r)} {word}")
    taus = {name: text for name, text in TAUS.items()
            if any(not math.isnan(run.onsets[name]) for run in runs)}
    exponents = [[text, *(interval_text(r) + " (borrowed)" * r.borrowed for groups in found.values()
                          for r in [exponent(groups, usual(runs), onset(name))])]
                 for name, text in taus.items()]
    exponents = [row for row in exponents if any(cell != "-" for cell in row[1:])]
    columns = ["run", "last_step", *(f"tau_{name}" for name in taus), "best_sw_heldout",
               "best_sw_step", "hump_step", "keep_step", "last_copy_ratio", "null_copy_ratio"]
    summary = [[row[c] or "-" for c in columns] for row in map(summarize, runs)]
    text = [*lines, markdown(head + ["the study's curves"] * study, rows)]
    if exponents:
        text += ["Slopes of the onset of memorization, log-log, by its definition:",
                 markdown(["onset", *(factor_of(name).label for name in found)], exponents)]
    text += ["Onsets in steps (>: not reached), best fidelity (<: still improving), the peak of SW"
             + " after it, what to keep:", markdown(columns, summary)]
    return "\n\n".join(text) + "\n"


def csv_bytes(rows):
    """Rows (dicts) as the bytes of a CSV file with the columns of all of them."""
    text = io.StringIO()
    out = csv.DictWriter(text, list(dict.fromkeys(k for row in rows for k in row)),
                         lineterminator="\n")
    out.writeheader()
    out.writerows(rows)
    return text.getvalue().encode(errors="backslashreplace")


def curve_rows(run):
    """The rows of runs.csv of one run: what it is, then `step`, then log and metrics."""
    head = {"run": run.name, "set": run.set, "parameters": digits(run.parameters, 12),
            "seed": run.seed, **{k: v if isinstance(v, str) else json.dumps(v)
                                 for k, v in run.key()}}
    columns = {c: dict(zip(t["step"], t[c], strict=True)) for t in (run.metrics, run.log)
               for c in t if c != "step" and np.isfinite(t[c]).any() and "setting_" not in c}
    return [head | {"step": digits(step, 12)} | {
        c: digits(values.get(step, math.nan), 8) for c, values in columns.items()}
        for step in sorted(set().union(*columns.values()))]


def write(path, data):
    """Write bytes through a temporary file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def write_tables(runs, found, folder, study=False):
    """summary.csv, runs.csv and the tables beside it; claims.md where there are several runs."""
    tables = {"summary": [summarize(run) for run in runs],
              "runs": [row for run in runs for row in curve_rows(run)],
              "controls": [{"run": run.name, "name": name} | {
                  k: digits(v, 8) for k, v in row.items()}
                  for run in runs for name, row in run.controls.items()]}
    for run in runs:
        for stem, rows in run.tables.items():
            tables.setdefault(stem, []).extend({"run": run.name, **row} for row in rows)
    for stem, rows in tables.items():
        if rows:
            write(folder / f"{stem}.csv", csv_bytes(rows))
    if len(runs) > 1:
        text = claims_text(runs, found, study)
        write(folder / "claims.md", text.encode(errors="backslashreplace"))


mpl.use("Agg")
mpl.rcParams.update({"font.size": 10, "axes.titlesize": 10, "lines.linewidth": 1.6,
                     "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
                     "grid.alpha": 0.25, "legend.frameon": False, "savefig.dpi": 130,
                     "figure.constrained_layout.use": True})

# --- Figures --------------------------------------------------------------------------------------

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
    "sw_replaced": ("sliced Wasserstein, replaced", "log", "sw_SPACE_heldout sw_SPACE_replaced"),
    "fid_replaced": ("FID, replaced", "log", "fid_SPACE_heldout fid_SPACE_replaced"),
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


def words(text, half=29):
    """A name as a figure shows it: shortened in its middle, no mathematics."""
    short = text if len(text) <= 2 * half + 2 else f"{text[:half]}…{text[-half:]}"
    return short.replace("$", r"\$")


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
    for side in [axis.xaxis] + [axis.yaxis] * (scale == "log"):
        low, high = side.get_view_interval()
        side.set_major_locator(mpl.ticker.MaxNLocator(4) if high < 5 * low else
                               mpl.ticker.LogLocator(subs=(1, 2, 5) if high < 200 * low else (1,)))
        side.set_major_formatter(lambda v, _: f"{v / 1e6:g}M" if v >= 1e6 else
                                 f"{v / 1000:g}k" if v >= 1000 else f"{v:g}")
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
    axis.plot(steps * scale, np.nanmean(values, 0), color=own or color, linestyle=line,
              marker="." if len(steps) == 1 else None, label=name if label is None else label)
    axis.fill_between(steps * scale, low, high, color=own or color, alpha=0.2, linewidth=0)


def panels(run, rows, size):
    """A figure with a panel of one run for each name of PANELS in rows, and its axes by name.

    Panels show the columns, their controls as thin lines, and the onsets of MARKS.
    """
    figure, axes = plt.subplot_mosaic(rows, figsize=size, empty_sentinel="")
    figure.supxlabel("training step", fontsize="medium")
    for axis, (title, scale, columns) in [(axes[name], PANELS[name]) for name in axes if
                                          name in PANELS]:
        for column in columns.split():
            curve(axis, [run], column, BLUE, errors=True)
        if not axis.lines:
            axis.text(0.5, 0.5, "not measured", transform=axis.transAxes, ha="center", color=GREY)
        for column, (key, (color, label)) in itertools.product(columns.split(), CONTROLS.items()):
            value = control(run, key, column)
            if value > 0 or (math.isfinite(value) and scale != "log"):
                axis.axhline(value, color=color, linestyle=style_of(column)[0], linewidth=1.1,
                             label=label)
        for mark, line in MARKS.items():
            if math.isfinite(run.onsets[mark]):
                axis.axvline(run.onsets[mark], color="0.25", linestyle=line, linewidth=1,
                             label=TAUS[mark])
        dress(axis, title, scale)
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
    places = {int(np.argmax(steps == best_fidelity(run)[1])): "best", len(steps) - 1: "end"}
    rise = values - np.maximum(values[min(places)], np.minimum.accumulate(values[::-1])[::-1])
    if rise[min(places):].max() > 0.1 * values[min(places)]:
        places[min(places) + int(rise[min(places):].argmax())] = "hump"
    power = {row.get("name") or number(row["step"]): np.array(
        [number(v) for k, v in row.items() if k.startswith("power_")])
        for row in run.tables["spectrum"]}
    shown = [(steps[k], f"{places[k]}: step {steps[k]:,.0f}", color, "o-") for k, color in zip(
        sorted(places), palette(len(places)), strict=True) if steps[k] in power]
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
                far = abs(one - zero) > 0.1 * max(abs(zero), abs(one))
                title = title.removesuffix(", replaced")        # the panel's other column
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
    for row in rows:
        if row["inputs"] in inputs and row["reference"] in names:
            place = ([*inputs].index(row["inputs"]), names.index(row["reference"]),
                     int(number(row["level"])), steps.index(number(row["step"])))
            cells[place] = [number(row[column]) for column in ("median", "low", "high")]
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
    """A film through training: samples and held-out images as in `strip`, loss and copy ratio.

    Of as many colours as 500 kB allow; its last frame stays for 2.5 seconds.
    """
    pictures, files = [], pick(run, frames)
    with mpl.rc_context({"font.size": 8, "axes.titlesize": 8,
                         "figure.constrained_layout.use": False}):
        for file in files:
            figure = plt.figure(figsize=(6.72, 3.36), dpi=100)
            draw_frame(figure, run, file)
            figure.canvas.draw()
            pictures.append(Image.fromarray(np.array(figure.canvas.buffer_rgba())).convert("RGB"))
            plt.close(figure)
    for colors in (256, 128, 64, 32, 16):
        first, *others = [picture.quantize(colors) for picture in pictures]
        buffer = io.BytesIO()
        first.save(buffer, "GIF", save_all=True, append_images=others, loop=0,
                   duration=[500] * len(others) + [2500])
        if buffer.tell() < 500_000:
            break
    write(path, buffer.getvalue())


def draw_frame(figure, run, file):
    """A frame of the film: the pictures of a neighbours file, and where on the curves it is."""
    axis = figure.add_axes((0.01, 0, 0.73, 0.9), anchor="N")
    strip(axis, file, 0, "samples")
    held = run.path / "neighbours/heldout.npz"
    if held.exists():
        with np.load(held) as arrays:               # older files hold distances alone
            shown = "samples" in arrays
        if shown:
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
        for axis, name in zip(row, FOUR, strict=True):
            title, kind, columns = PANELS[name]
            for column in columns.split():
                line, _, text = style_of(column)
                for color, (value, runs) in zip(palette(len(groups)), groups.items(), strict=True):
                    curve(axis, runs, column, color, scale(value),
                          label_of(factor, value) if line == "-" else "")
                axis.plot([], [], color="0.25", linestyle=line, label=text)
            if study:
                draw_behind(axis, study, PANELS[name], scale)
            dress(axis, title, kind, time)
    fixed = ", ".join(label_of(k, v) for k, v in groups.fixed.items())
    others = f"; the widest of {groups.others + 1} such sweeps" * bool(groups.others)
    save(figure, path, words(label + f"; fixed: {fixed}" * bool(fixed) + others, 60))


def draw_behind(axis, study, panel, scale):
    """The study's curves behind a panel's, thin and grey, with an axis of their own."""
    behind = axis.twinx()
    for column, (value, runs) in itertools.product(panel[2].split(), study.items()):
        curve(behind, runs, column, "0.75", scale(value), "")
    plt.setp(behind.lines, linewidth=0.9)
    behind.set(yscale="log" if panel[1] == "log" else "linear", zorder=-1)
    behind.yaxis.set_visible(False)
    axis.patch.set_visible(False)
    axis.plot([], [], color="0.75", label="the study, not to this scale: compare shapes")


def plot_onset(factor, groups, path, runs):
    """The onset by each definition against the factor, with its 95 % interval and power laws.

    An arrow: the onset lies beyond. runs: all runs, for the scatter of the slope's interval.
    """
    numbers = all(type(v) in (int, float) and 0 < v < math.inf for v in groups)
    names = [name for name in TAUS if "level" not in name and any(
        math.isfinite(run.onsets[name]) for group in groups.values() for run in group)]
    figure, axis = plt.subplots(figsize=(9, 5.4))
    for k, (name, color) in enumerate(zip(names, palette(len(names)), strict=True)):
        style = {"color": color, "marker": "osDPX*"[k % 6], "linewidth": 1}
        for at, (value, group) in enumerate(groups.items()):
            x = value * 1.02**k if numbers else at + 0.04 * k
            for point in filter(None, map(onset(name), group)):
                step, spread = math.exp(point.value), math.exp(1.96 * math.sqrt(point.variance))
                error = [[step - step / spread], [step * spread - step]]
                axis.errorbar(x, step, error if point.bound == 0 else 0.2 * step, **style,
                              lolims=point.bound > 0, uplims=point.bound < 0)
        slope = exponent(groups, runs, onset(name))
        law = f": slope {slope.value:.2f} [{slope.low:.2f}, {slope.high:.2f}]"
        axis.plot([], [], label=TAUS[name] + law * math.isfinite(slope.value), **style)
        if math.isfinite(slope.value):
            ends = np.array([min(groups), max(groups)])
            axis.plot(ends * 1.02**k, math.exp(slope.intercept) * ends**slope.value, color=color,
                      linewidth=1)
    dress(axis, "arrow: earlier or later than that", "log", factor_of(factor).label)
    axis.set(ylabel="onset of memorization, training step", xscale="log" if numbers else "linear")
    axis.set_xticks([*groups] if numbers else range(len(groups)),
                    [label_of(factor, v).split(" = ")[1] for v in groups])
    axis.xaxis.set_minor_locator(mpl.ticker.NullLocator())
    save(figure, path, f"{factor_of(factor).label}: onset")


# A figure of a run: its file, what draws it, the columns and tables it needs (their beginnings).
RUN_FIGURES = (("run_{}.png", plot_run, "step"), ("metrics_{}.png", plot_metrics, "auth_share"),
               ("levels_{}.png", plot_levels, "heldout_loss_level"),
               ("samples_{}.png", plot_samples, "neighbours"),
               ("ratios_{}.png", plot_ratios, "neighbours"),
               ("film_{}.gif", plot_film, "neighbours"),
               ("denoisers_{}.png", plot_denoisers, "denoisers"),
               ("hump_{}.png", plot_hump, "spectrum sw_"),
               ("copier_{}.png", plot_copier, "training sw_"),
               ("twins_{}.png", plot_twins, "twin_"), ("planted_{}.png", plot_planted, "planted"))


def draw_all(runs, found, folder, study=None):
    """Every figure that runs and their sweeps (found, see sweeps) have the data for.

    Of several seeds the first gets all figures, the others their curves. study: the study's own
    sweeps, to be drawn beside these.
    """
    first = {}
    for run in runs:
        data = [*run.log, *run.metrics, *(name for name, rows in run.tables.items() if rows),
                *(f"{name} control" for name in run.controls),
                "neighbours" * bool(snapshot_files(run))]
        for name, draw, needs in RUN_FIGURES:
            if (name.startswith("run") or first.setdefault(run.key(), run) is run) and all(
                    any(key.startswith(need) for key in data) for need in needs.split()):
                draw(run, folder / name.format(run.stem))
    for factor, groups in found.items():
        plot_sweep(factor, groups, folder / f"sweep_{factor}.png", (study or {}).get(factor))
        plot_onset(factor, groups, folder / f"onset_{factor}.png", runs)


# --- Command line ---------------------------------------------------------------------------------

# The first words of the files that this script, or an earlier version of it, writes.
FIGURES = {"run", "metrics", "levels", "samples", "ratios", "film", "denoisers", "hump", "copier",
           "twins", "planted", "sweep", "onset", "tau", "novelty"}


def drawn_files(folder):
    """{what an earlier call may have written for a folder, its families included: its inode}."""
    files = (folder.parent if folder.parent.name == "figures" else folder).rglob("*.*")
    return {p: p.stat().st_ino for p in files if p.name in ("claims.md", "summary.csv", "runs.csv")
            or p.suffix in (".png", ".gif") and p.stem.split("_")[0] in FIGURES}


def report(roots, study):
    """Draw, judge and print everything below the roots; the messages of unreadable runs.

    A file written anew has a new inode; what an earlier call left and this one did not is removed,
    but not beside tables, from which pictures cannot be drawn again.
    """
    damaged, old = [], {}
    groups = (find_runs(*roots, damaged=damaged) if roots
              else {Path("paper_figures"): study_runs()})
    if roots and run_folders(Path(roots[0])):
        for folder in groups:
            old |= drawn_files(folder)
    study = study and bool(roots)
    for folder, runs in groups.items():
        found = sweeps(runs)
        write_tables(runs, found, folder, study)
        draw_all(runs, found, folder, sweeps(study_runs()) if study else {})
        print(f"{folder}: {len(runs)} run{'s' * (len(runs) > 1)} drawn")
        print("\n".join(describe(runs[0])) if len(runs) == 1 else (
            folder / "claims.md").read_text(encoding="utf-8"))
        print("\n".join(keep_line(run) for run in runs if run.metrics))
    for file, inode in old.items():
        if file.exists() and file.stat().st_ino == inode:
            file.unlink()
    return damaged


def main(argv=None):
    """Draw and judge everything below the roots.

    Raises SystemExit: 2 on bad input, 1 where a run was left out, 130 when interrupted.
    """
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("roots", nargs="*", metavar="root", help="a run folder, a folder of runs, or a "
                   "folder with runs.csv; of several, the union of their runs is drawn into the "
                   "figures/ of the first, and a run that two of them have is taken from the first")
    p.add_argument("--paper", action="store_true", help="set the study's own curves beside these "
                   "runs; without a folder, draw and judge them alone, into paper_figures/")
    args = p.parse_args(argv)
    if not (args.roots or args.paper):
        p.error("a folder, or --paper")
    for stream in (sys.stdout, sys.stderr):         # names of runs that the locale cannot print
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        damaged = report(args.roots, args.paper)
    except (PlotError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    for message in damaged:
        print(f"warning: {message}; left out", file=sys.stderr)
    if damaged:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
