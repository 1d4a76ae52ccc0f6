"""The study's claims, tested: each a statistic with a 95 % interval and a region where it holds.

CLAIMS is the table of them; judge(runs) gives the verdicts, write_tables(runs, ...) the files
summary.csv (a row per run), runs.csv (a row per run and step, with the smaller tables beside it:
enough to draw everything but pictures again) and claims.md.
"""

import collections
import csv
import functools
import io
import itertools
import json
import math
import os

import numpy as np

from curves import (
    COPY_LEVELS,
    TAUS,
    best_fidelity,
    crossing,
    excess,
    factor_of,
    label_of,
    second_peak,
    study_runs,
    sweeps,
    to_keep,
)

# --------------------------------------------------------------------------------------------------
# Statistics
# --------------------------------------------------------------------------------------------------

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
    return centre - spread, centre + spread


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
    """The statistic log(best fidelity); an upper bound where the run still improves at its end."""
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
        return Point(math.log((high - low) * math.log(2) / took), variance / took**2, 0)
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


# --------------------------------------------------------------------------------------------------
# The study's claims
# --------------------------------------------------------------------------------------------------


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
    points = [g for group in groups.values() if (g := [p for r in group if (p := statistic(r))])]
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


# --------------------------------------------------------------------------------------------------
# Tables
# --------------------------------------------------------------------------------------------------


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
             + ". In brackets: 95 % intervals. Definitions are in claims.py."]
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
