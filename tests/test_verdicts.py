"""plot.py: runs read from folders and tables; verdicts on the study's own curves and
on made-up runs whose answers are known.
"""

import collections
import csv
import itertools
import json
import math
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

import plot

STEPS = np.round(16 * 2 ** (np.arange(33) / 2))
DEFAULT = {"n": 16384, "width": 32, "batch": 16, "lr": 1e-3}
VALUES = {"n": (4096, 8192, 32768), "width": (8, 16, 64), "batch": (4, 8, 32),
          "lr": (2.5e-4, 5e-4, 2e-3)}
# exponents of (onset, best fidelity, rate) in each factor: the study's, and none at all
EFFECT = {"n": (1, -0.9, -0.5), "width": (-0.7, -0.3, 0), "batch": (-1, 0.35, 0),
          "lr": (-0.8, -0.3, 0)}
# no effect, or one at the very edge of what a claim's region includes
NOTHING = {"n": (0.75, 0, 0), "width": (0, 0, 0), "lr": (-1, 0, 0),
           "batch": (-0.75, 0, math.log(1.5) / math.log(8))}


def made_up(rng, options, tau=300.0, best=1.0, speed=2.0, change=1.0, twice=True, better=False):
    """A run with the study's scatter. Its held-out loss is 25 % up at 4.86 tau.

    speed: of the copy ratio's rise, a logistic in log step; change: of SW train / held-out where
    copies appear; twice: whether fidelity descends twice; better: whether it is best at the end.
    """
    tau, copied, best, speed, change = (
        value * math.exp(scatter * rng.standard_normal()) for value, scatter in (
            (tau, 0.05), (40 * tau, 0.2), (best, 0.07), (speed, 0.06), (change, 0.04)))
    x, y = np.log(STEPS / tau), np.log(STEPS / (2 * tau))
    copies = 1 / (1 + (STEPS / copied) ** -speed)
    after = np.clip(y / np.log(copied / (2 * tau)), 0, 1.6)
    sw = best * np.where(y < 0, np.exp(y**2 / 2),
                         1 + (1.6 if twice else 0.3) * np.sin(after * np.pi / 2) ** 2)
    if better:
        sw = np.where(copies > 0.01, 0.8 * best, sw)
    metrics = {"step": STEPS, "copy_ratio": copies, "null_copy_ratio": 0 * STEPS,
               "samples": 0 * STEPS + 1024, "sw_pixels_heldout": sw, "fid_pixels_heldout": sw}
    metrics |= dict.fromkeys(("sw_pixels_train", "fid_pixels_train"), sw * change**(copies > 0.01))
    return plot.Run("run", options, {"step": STEPS, "heldout_loss": 0.1 + 0.01 * x**2}, metrics)


def made_up_study(seed, effect, repeats=3, coin=False, **more):
    """Sweeps of all four factors; `repeats` seeds at three of the settings, one elsewhere.

    coin: whether a run descends twice, and whether it is best at its end, are left to chance.
    """
    rng, runs = np.random.default_rng(seed), []
    settings = [(DEFAULT, repeats), *(
        (DEFAULT | {factor: value}, repeats if k == 1 and factor in ("n", "lr") else 1)
        for factor, values in VALUES.items() for k, value in enumerate(values))]
    for options, seeds in settings:
        tau, best, speed = (math.prod((options[f] / DEFAULT[f]) ** effect[f][k] for f in DEFAULT)
                            for k in range(3))
        for k in range(seeds):
            shape = {name: rng.random() < 0.5 for name in ("better", "twice") if coin}
            runs.append(made_up(rng, options | {"seed": k}, 300 * tau, best, 2 * speed,
                                **shape, **more))
    return runs


def verdicts(runs):
    return {claim.number: word for claim, _, word in plot.judge(runs)}


# the study's own curves ---------------------------------------------------------------------------


def at_spacing(run, per_doubling):
    """A run's curves interpolated to so many evaluations per doubling."""
    steps = run.metrics["step"]
    at = 2 ** np.arange(math.log2(steps[0]), math.log2(steps[-1]) + 1e-9, 1 / per_doubling)
    columns = {"step": at}
    for name, values in run.metrics.items():
        finite = np.isfinite(values)
        if name != "step":
            columns[name] = np.interp(np.log(at), np.log(steps[finite]), values[finite],
                                      math.nan, math.nan)
    return plot.Run(run.name, run.options, columns, columns)


@pytest.mark.parametrize("per_doubling", [2, 4, 8])
def test_the_studys_own_curves(per_doubling):
    runs = [at_spacing(run, per_doubling) for run in plot.study_runs()]
    words = verdicts(runs)
    assert words.pop("3a") == "undecided"           # steeper than proportional
    assert words == dict.fromkeys(("1a", "1b", "2", "3b", "3c", "4a", "4b", "5a", "5b", "5c", "6a",
                                   "6b", "7"), "supported")
    known = {"3a": (1.22, 0.09), "3b": (-0.59, 0.20), "3c": (-0.91, 0.10), "4a": (-0.71, 0.11),
             "4b": (-0.31, 0.08), "5a": (-0.97, 0.09), "5c": (0.35, 0.10), "6a": (1.23, 0.05),
             "6b": (-0.30, 0.06)}
    for claim, result, _ in plot.judge(runs):
        if claim.number in known:
            value, half = known[claim.number]
            assert abs(result.value - value) <= half, claim.number
    variance, dof, borrowed = plot.scatter(runs, plot.onset("heldout_25"))
    assert 0.03 < math.sqrt(variance) < 0.06 and dof == 3 and not borrowed


def test_the_study_is_read_as_repeats_and_sweeps():
    runs = plot.study_runs()
    assert len(runs) == 17 and {run.space for run in runs} == {"inception"}
    found = plot.sweeps(runs)
    assert {f: [*map(len, groups.values())] for f, groups in found.items()} == {
        "n": [2, 1, 1, 1], "width": [1, 1, 1, 3, 1], "batch": [3, 1, 1, 2], "lr": [1, 1, 3, 1]}
    assert found["n"].fixed == {"width": 128, "batch": 128, "lr": 1e-4}


def test_paper_draws_and_judges_the_study(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plot, "draw_all", lambda *_: None)
    plot.main(["--paper"])
    assert "| 3a | Onset is proportional to N |" in capsys.readouterr().out
    assert (tmp_path / "paper_figures/claims.md").exists()


# made-up runs -------------------------------------------------------------------------------------


def test_a_known_effect_is_found():
    words = [verdicts(made_up_study(seed, EFFECT)) for seed in range(20)]
    for number in words[0]:
        counts = collections.Counter(w[number] for w in words)
        assert counts["supported"] >= (12 if number == "5b" else 18), (number, counts)
        assert not counts["contradicted"], (number, counts)


def test_the_opposite_effect_is_contradicted():
    effect = {f: tuple(-e for e in exponents) for f, exponents in EFFECT.items()}
    effect |= {"batch": (1, -0.35, 1), "lr": (-1.2, 0.3, 0)}
    # where the rate changes, too, some have copies before they are at their best: no line
    steady = effect | {"n": (-1, 0.9, 0), "batch": (1, -0.35, 0)}
    words = [verdicts(made_up_study(seed, effect, change=1.5)) | {
        number: word for number, word in verdicts(made_up_study(seed, steady)).items()
        if number in ("3c", "5c")} for seed in range(8)]
    for number in ("1a", "1b", "3a", "3b", "3c", "4a", "4b", "5a", "5b", "5c", "6a", "6b"):
        assert sum(w[number] == "contradicted" for w in words) >= 5, number


@pytest.mark.parametrize("repeats", [1, 3])
def test_no_effect_is_seldom_supported(repeats):
    """In at most 5 % of draws, and the three standard errors of so many; 1: scatter borrowed."""
    draws, counts = 60, collections.Counter()
    for seed in range(draws):
        words = verdicts(made_up_study(seed, NOTHING, repeats, coin=True, change=1.25))
        counts.update(number for number, word in words.items() if word.startswith("supported"))
        assert repeats != 1 or words["3c"].endswith("borrowed")
    assert max(counts.values(), default=0) <= 0.05 * draws + 3 * math.sqrt(0.05 * draws), counts


def test_a_share_is_more_than_half_by_chance_in_one_of_twenty():
    for n in range(3, 60):
        found = [plot.share_of_runs([True] * k + [False] * (n - k), "") for k in range(n + 1)]
        chance = sum(math.comb(n, k) / 2**n for k, r in enumerate(found) if r.low > 0.5)
        assert chance <= 0.05, n


# single statistics --------------------------------------------------------------------------------


def run_of(tau=300.0, options=None, **more):
    """One made-up run without scatter."""
    class Exact:
        def standard_normal(self):
            return 0.0
    return made_up(Exact(), DEFAULT | {"seed": 0} | (options or {}), tau, **more)


def test_onsets_best_fidelity_and_rate_of_a_known_run():
    run = run_of()
    onsets = plot.onsets(run)
    assert onsets["heldout_min"] == pytest.approx(300, rel=1e-6)    # a parabola in log step
    assert onsets["heldout_25"] == pytest.approx(300 * math.exp(math.sqrt(2.5)), rel=0.01)
    assert onsets["copy_50"] == pytest.approx(12000, rel=0.01)
    assert onsets["copy_10"] == pytest.approx(4000, rel=0.02)
    assert math.isnan(onsets["denoisers"]) and math.isnan(onsets["level0"])
    value, step, improving = plot.best_fidelity(run)
    assert value == pytest.approx(1, abs=0.05) and 512 <= step <= 724 and not improving
    # logit .5 - logit .02 = 3.89 = 2 ln(ratio of steps)
    speed = math.exp(plot.rate(0.5)(run).value)
    assert speed == pytest.approx(0.48 / (3.89 / 2 / math.log(2)), rel=0.02)


def test_best_fidelity_of_a_falling_curve_is_that_at_the_first_copies():
    steps = np.array([100.0, 200.0, 400.0, 800.0, 1600.0])
    copies = np.array([0.0, 0.0, 0.0, 0.02, 0.3])               # .01 at step 566, halfway in log
    run = plot.Run("run", dict(DEFAULT), {}, {
        "step": steps, "copy_ratio": copies, "null_copy_ratio": 0 * steps,
        "sw_pixels_heldout": np.array([5.0, 4, 3, 2, 1]), "sw_error_pixels_heldout": steps / 1e4})
    run.space = "pixels"
    value, step, improving = plot.best_fidelity(run)
    assert (value, round(step)) == (pytest.approx(2.5), 566) and not improving
    assert plot.best(run).variance == pytest.approx((0.04 / 3) ** 2)    # of the nearest, at 400
    assert plot.lowest_sw(run, step, math.inf) == (1, 1600)
    assert plot.lowest_sw(run, 0, 50) == (pytest.approx(math.nan, nan_ok=True),) * 2


def test_what_a_perfect_memorizer_would_show_stands_beside_claim_1():
    runs = [run_of(change=0.9) for _ in range(3)]
    for run in runs:
        run.controls["training"] = {"sw_pixels_train": 0.4, "sw_pixels_heldout": 1.0}
    result = plot.equal_distances("sw", runs)
    assert result.value == pytest.approx(0.9)
    assert "; a perfect memorizer 0.40 to 0.40" in result.text


def test_crossing_interpolates_in_log_step():
    steps, values = np.array([100.0, 400.0, 1600.0]), np.array([0.0, 0.2, 0.1])
    assert plot.crossing(steps, values, 0.1) == pytest.approx(200)
    assert plot.crossing(steps, values, 0.3) == math.inf
    assert plot.crossing(steps, values, 0.0) == 100


def test_copies_are_counted_above_the_null():
    run = run_of()
    run.metrics["copy_ratio"] = run.metrics["copy_ratio"] + 0.05
    run.metrics["null_copy_ratio"] = run.metrics["null_copy_ratio"] + 0.05
    assert plot.onsets(run)["copy_01"] == pytest.approx(plot.onsets(run_of())["copy_01"])


def test_what_is_not_reached_is_a_bound():
    row = plot.summarize(run_of(1e8))
    assert row["tau_heldout_25"] == row["tau_copy_10"] == f">{STEPS[-1]:.0f}"
    assert row["best_sw_heldout"].startswith("<") and row["best_sw_step"] == str(int(STEPS[-1]))
    assert row["rate_to_copy_10"] == "" and plot.onset("copy_10")(run_of(1e8)).bound == 1
    # what is lowest at an end may turn half a gap before it, or after it
    ends = STEPS[[0, -1]] * 2 ** np.array([0.25, -0.25])
    assert plot.summarize(run_of(1.0))["tau_heldout_min"] == f"<{ends[0]:.0f}"
    assert plot.summarize(run_of(1e8))["tau_heldout_min"] == f">{ends[1]:.0f}"


def test_an_onset_is_known_better_with_more_samples_and_evaluations():
    few, many = run_of(), run_of()
    few.metrics["samples"] = few.metrics["samples"] / 16
    variances = [plot.onset("copy_10")(run).variance for run in (few, many)]
    # .1 of 64 and of 1,024 samples; the logistic's slope is .18 there, and less just before
    expected = (15 / 16) * 0.09 / 64 / 0.18**2
    assert expected < variances[0] - variances[1] < 2 * expected
    assert plot.onset("heldout_25")(few).variance == pytest.approx(
        (0.07 * math.log(2) / 2) ** 2, rel=0.01)
    # above a null of .05 it is .15 of the samples that are counted
    gap = variances[0] - 16 * (variances[0] - variances[1]) / 15
    few.metrics["copy_ratio"] = few.metrics["copy_ratio"] + 0.05
    few.metrics["null_copy_ratio"] = few.metrics["null_copy_ratio"] + 0.05
    plot.onsets.cache_clear()
    assert plot.onset("copy_10")(few).variance - gap == pytest.approx(
        (variances[0] - gap) * 0.15 * 0.85 / 0.09)


def test_a_line_with_bounds():
    x, y = np.arange(4.0), np.array([0.0, 1, 2, 3])
    variance, none = np.full(4, 0.01), np.zeros(4)
    slope, intercept, error, _ = plot.fit_line(x, y, variance, none)
    assert (slope, intercept) == pytest.approx((1, 0)) and error == pytest.approx(0.1 / 5**0.5)
    # a bound that the others' line passes with ease: as if it were not there
    easy = plot.fit_line(x, np.array([0, 1, 2, 0.0]), variance, np.array([0, 0, 0, 1]))
    assert easy == pytest.approx((1, 0, 0.1 / 2**0.5, 1), rel=1e-3, abs=1e-3)
    # one that it breaks pulls the line up; the same from above pulls it down
    assert plot.fit_line(x, np.array([0, 1, 2, 6.0]), variance, np.array([0, 0, 0, 1]))[0] > 1.5
    assert plot.fit_line(x, np.array([0, 1, 2, 0.0]), variance, np.array([0, 0, 0, -1]))[0] < 0.5


def test_a_bound_opens_the_interval_and_leaves_the_value():
    runs = [run_of(300 * v, {"n": v}) for v in (1, 2, 4)]
    late = run_of(1e7, {"n": 8})
    with_bound = plot.exponent({r.options["n"]: [r] for r in [*runs, late]}, runs,
                                 plot.onset("heldout_25"))
    without = plot.exponent({r.options["n"]: [r] for r in runs}, runs,
                              plot.onset("heldout_25"))
    assert with_bound.value == pytest.approx(without.value) == pytest.approx(1, abs=0.03)
    assert with_bound.high > 2 and "1 not reached" in with_bound.text and with_bound.borrowed


def test_too_few_values_are_not_tested():
    runs = [run_of(300 * v, {"n": v}) for v in (1, 2)]
    assert set(verdicts(runs).values()) == {"not tested"}


def test_points_off_their_line_widen_its_interval():
    x = np.arange(5.0)
    for bend in (0, 0.5):
        y = x + bend * np.array([1, -1, 0, -1, 1])
        slope, _, error, misfit = plot.fit_line(x, y, np.full(5, 0.01), np.zeros(5))
        chi2 = 4 * bend**2 / 0.01 / 3           # three degrees of freedom
        assert slope == pytest.approx(1) and error == pytest.approx(0.1 / 10**0.5)
        assert misfit == pytest.approx(max(1, chi2**0.5))


def test_what_widens_an_interval_is_known_from_few_points():
    def half(bend):                             # in units of the error of a line that fits
        runs = [run_of(300 * v * math.exp(bend * (-1)**k), {"n": v})
                for k, v in enumerate((1, 2, 4))]
        repeats = [run_of(100 * v * factor, {"n": 8 * v, "seed": seed}) for v in range(1, 10)
                   for seed, factor in enumerate((0.95, 1.05))]
        points = {run.options["n"]: [run] for run in runs}
        between = plot.scatter(runs + repeats, plot.onset("heldout_25"))
        assert between[1] == 9 and between[0] == pytest.approx(0.1**2 / 2, rel=0.2)
        found = plot.exponent(points, runs + repeats, plot.onset("heldout_25"))
        error = (between[0] + plot.onset("heldout_25")(runs[0]).variance)**0.5 / (
            2**0.5 * math.log(2))
        return (found.high - found.value) / error
    assert half(0) == pytest.approx(plot.t95(9), rel=0.05)      # the scatter's nine
    assert half(0.1) > 2 * plot.t95(1)                          # three points less two


def test_the_largest_of_many_gaps():
    # of two means it is Student's t; of many it is Tukey's range over sqrt(2), here 3.31 and 4.47
    assert plot.largest_gap([1.0, 1.0], 10) == pytest.approx(plot.t95(10), rel=0.06)
    for count, wide in ((3, 3.31), (10, 4.47)):
        assert plot.largest_gap([0.01] * count, 10**6) == pytest.approx(wide / 2**0.5, rel=0.04)


def test_equal_rates_seldom_differ():
    rng, hits = np.random.default_rng(0), 0
    for _ in range(40):
        values = rng.standard_normal(6) * 0.1
        points = dict(zip("abcdef", values, strict=True))
        def statistic(run, points=points):
            return plot.Point(points[run], 0.0, 0)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(plot, "common_rate", lambda groups, s=statistic: (s, ""))
            patch.setattr(plot, "scatter", lambda *_: (0.01 * rng.chisquare(10) / 10, 10, False))
            hits += plot.rate_spread({name: [name] for name in points}, None).low > 1
    assert hits <= 5                            # of a pair at a time it would be twelve


def test_a_gain_within_its_error_is_no_gain():
    def runs(rise):
        found = []
        for n in (8, 16, 32, 64):
            run = run_of(100, {"n": n})
            steps, values = run.metrics["step"], np.ones(len(run.metrics["step"]))
            values[steps > plot.onsets(run)["copy_01"]] = rise
            run.metrics |= {"sw_pixels_heldout": values, "sw_error_pixels_heldout": 0.05 * values}
            found.append(run)
        return {claim.number: result for claim, result, _ in plot.judge(found)}["7"]
    assert math.isnan(runs(0.9).value) and "4 more within two errors" in runs(0.9).text
    assert runs(1.5).value == 1 and runs(0.5).value == 0


def test_definitions_of_the_onset_may_come_and_go(monkeypatch):
    runs = made_up_study(0, EFFECT)
    before = [result for _, result, _ in plot.judge(runs)]
    more = {"heldout_10": plot.Definition("held-out loss 10 % up", plot.loss_up(0.1))}
    fewer = {name: v for name, v in plot.TAUS.items() if "copy" not in name}
    with monkeypatch.context() as changed:
        changed.setattr(plot, "TAUS", fewer | more)
        plot.onsets.cache_clear()
        found = plot.onsets(run_of(300, {}))
        assert found["heldout_min"] < found["heldout_10"] < found["heldout_25"]
        assert [result for _, result, _ in plot.judge(runs)] == before
    plot.onsets.cache_clear()


def test_a_pair_of_close_evaluations_counts_once():
    steps = np.array([64.0, 91, 128, 181, 256, 362, 363])
    run = plot.Run("r", {}, {"step": steps, "heldout_loss": np.arange(7.0)}, {})
    assert run.column("heldout_loss")[0].tolist() == [64, 91, 128, 181, 256, 363]
    assert run.column("heldout_loss")[1].tolist() == [0, 1, 2, 3, 4, 6]
    uneven = ([64, 16384, 23168], [64, 1024, 1448], [16, 64, 10000, 11585])
    for steps in (np.arange(1.0, 400), 1000 + np.arange(3.0), np.array([5.0]),
                  *map(np.array, uneven)):
        run = plot.Run("r", {}, {"step": steps, "heldout_loss": steps}, {})
        assert run.column("heldout_loss")[0].tolist() == steps.tolist()
    # a loss that is lowest at 5,200: with 5792 beside 5793 its turn is no less known
    grid = np.array([2896.0, 4096, 5792, 5793, 8192])
    turns = []
    for seed in range(50):
        noise = 2e-4 * np.random.default_rng(seed).standard_normal(5)
        loss = 0.25 + 0.02 * np.log(grid / 5200)**2 + noise
        turns.append(plot.onsets(plot.Run(f"r{seed}", {}, {"step": grid, "heldout_loss": loss},
                                          {}))["heldout_min"])
    assert np.std(np.log(turns)) < 0.07


def test_unequal_counts_do_not_test_claim_1():
    runs = [run_of(300, {"n": n}) for n in (64, 128, 256, 512)]     # of 1,024 samples
    assert {verdicts(runs)[number] for number in ("1a", "1b")} == {"not tested"}


def test_two_sets_of_samples_of_one_run_count_once():
    runs = made_up_study(0, EFFECT)
    more = [plot.Run(r.name, r.options | {"setting_eta": 1.0}, r.log, r.metrics, set="eta1")
            for r in runs[:5]]
    for run in runs:
        run.options["setting_eta"] = 0.0
    assert [r for _, r, _ in plot.judge(runs + more)] == [r for _, r, _ in plot.judge(runs)]


def test_the_same_run_twice_is_no_repeat():
    once = made_up_study(0, EFFECT, repeats=1)
    result = plot.exponent(plot.sweeps(once)["n"], once, plot.best)
    twice = plot.exponent(plot.sweeps(once * 2)["n"], plot.usual(once * 2), plot.best)
    assert result == twice and result.borrowed


def test_the_peak_after_the_best_fidelity():
    row = plot.summarize(run_of())
    assert float(row["hump_step"]) > 4 * float(row["best_sw_step"])
    assert plot.summarize(run_of(twice=False, better=True))["hump_step"] == ""


def test_the_denoiser_that_a_net_is_nearest_to():
    run = run_of()
    run.tables["denoisers"] = [
        {"step": step, "level": level, "inputs": inputs, "reference": reference, "median": median}
        for step, own in ((100, 4.0), (400, 1.0), (1600, 0.25)) for level in "01"
        for inputs in ("path", "heldout")
        for reference, median in (("memorizer", own if inputs == "path" else 0.1),
                                  ("population", 1.0), ("gaussian", 2.0))]
    assert plot.onsets(run)["denoisers"] == pytest.approx(400)


def test_the_snapshot_to_keep():
    run = run_of()
    step, distance, copies = plot.to_keep(run)
    assert step in (512, 724) and copies < 0.01
    run.metrics["sw_pixels_heldout"][-1] = 0.1          # good, but all copies
    assert plot.to_keep(run) == (step, distance, copies)
    run.metrics["null_copy_ratio"] += 1                 # as honest as held-out images
    assert plot.to_keep(run)[0] == STEPS[-1]
    assert np.isnan(plot.to_keep(plot.Run("x", {}, run.log, {}))).all()


# run folders and tables ---------------------------------------------------------------------------


def write_csv(path, rows):
    with open(path, "w", newline="", encoding="utf-8") as file:
        out = csv.DictWriter(file, list(dict.fromkeys(k for row in rows for k in row)))
        out.writeheader()
        out.writerows(rows)


def rows_of(columns, **more):
    return [more | dict(zip(columns, row, strict=True))
            for row in zip(*columns.values(), strict=True)]


def folder_of(root, name, options=None, sets=None, tau=300.0, record=None):
    """A run folder; sets {name of a set of samples: its settings}."""
    run, made = root / name, run_of(tau, options)
    run.mkdir(parents=True)
    (run / "args.json").write_text(json.dumps(
        {"options": made.options, "parameters": 1000} | (record or {})))
    write_csv(run / "log.csv", rows_of(made.log))
    write_csv(run / "metrics.csv", [row for set_, settings in (sets or {"": {}}).items()
                                    for row in rows_of(made.metrics, set=set_, **settings)])
    write_csv(run / "controls.csv", [{"name": "heldout", "copy_ratio": 0, "sharpness": 0.5}])
    return run


@pytest.fixture
def drawn(monkeypatch):
    """plot.py with its figures left out: a list of what it would have drawn."""
    calls = []
    monkeypatch.setattr(plot, "draw_all", lambda *call: calls.append(call))
    return calls


def only(root):
    (runs,) = plot.find_runs(root).values()
    return runs


def test_a_run_made_before_an_option_existed_has_its_default(tmp_path):
    folder_of(tmp_path, "old", {"n": 16})
    folder_of(tmp_path, "new", {"n": 32, "dropout": 0.0, "steps": 5, "log_every": 7},
              record={"defaults": {"dropout": 0.0}, "free": ["steps", "log_every"]})
    folder_of(tmp_path, "other", {"n": 32, "dropout": 0.1}, record={"defaults": {"dropout": 0.0}})
    runs = only(tmp_path)
    assert [run.options["dropout"] for run in runs] == [0.0, 0.0, 0.1]
    assert {f: [*groups] for f, groups in plot.sweeps(runs).items()} == {
        "n": [16, 32], "dropout": [0.0, 0.1]}


def test_any_option_is_a_factor(tmp_path):
    for k, more in enumerate(({"process": "ddpm"}, {"process": "flow"}, {"ema": 0.0}, {"ema": 0.99},
                              {"ema": math.inf}, {"conditional": True}, {"mults": [1, 2]})):
        folder_of(tmp_path, f"r{k}", {"process": "flow", "ema": 0.9, "conditional": False,
                                      "mults": [1, 2, 4]} | more)
    folder_of(tmp_path, "again", {"process": "flow", "ema": 0.9, "conditional": False,
                                  "mults": [1, 2, 4], "seed": 1})
    found = plot.sweeps(only(tmp_path))
    assert {f: [*groups] for f, groups in found.items()} == {
        "conditional": [False, True], "ema": [0.0, 0.9, 0.99, math.inf],
        "mults": ["1 2", "1 2 4"], "process": ["ddpm", "flow"]}
    assert len(found["ema"][0.9]) == 2                      # two seeds, all else equal
    assert found["ema"].fixed == {"conditional": False, "mults": "1 2 4", "process": "flow"}
    assert plot.label_of("ema", 0.99) == "ema = 0.99"
    assert plot.factor_of("setting_eta").label == "eta"


def test_the_widest_of_several_slices_is_named(tmp_path, drawn, capsys):
    for lr, ns in ((1e-3, (16, 32, 64)), (1e-4, (16, 32))):
        for n in ns:
            folder_of(tmp_path, f"N{n}_lr{lr}", {"n": n, "lr": lr})
    plot.main([str(tmp_path)])
    text = capsys.readouterr().out
    assert "training images N: 16, 32, 64; fixed: lr = 0.001; the widest of 2 such sweeps." in text


def test_sets_of_samples_are_runs_side_by_side(tmp_path):
    settings = {"setting_eta": 0.0, "setting_clip": False}
    for n in (16, 32):
        folder_of(tmp_path, f"N{n}", {"n": n},
                  {"": settings, "eta1": settings | {"setting_eta": 1.0}})
    runs = only(tmp_path)
    assert [(run.name, run.set) for run in runs] == [
        ("N16", ""), ("N16_eta1", "eta1"), ("N32", ""), ("N32_eta1", "eta1")]
    found = plot.sweeps(runs)
    assert {f: [*groups] for f, groups in found.items()} == {
        "n": [16, 32], "setting_eta": [0.0, 1.0]}
    assert "setting_clip" not in runs[0].options
    assert all(len(seeds) == 1 for groups in found.values() for seeds in groups.values())


def test_all_runs_are_compared_in_one_space(tmp_path):
    for n in (16, 32, 64):
        run = folder_of(tmp_path, f"N{n}", {"n": n})
        if n == 64:                                     # measured in another space, too
            rows = plot.read_rows(run / "metrics.csv")
            for row, end in itertools.product(rows, ("train", "heldout")):
                row[f"sw_net-1_{end}"] = 30 * float(row[f"sw_pixels_{end}"])
            write_csv(run / "metrics.csv", rows)
    runs = only(tmp_path)
    assert [run.space for run in runs] == ["pixels"] * 3 and runs[2].spaces == ["pixels", "net-1"]
    assert "distances in pixels." in plot.claims_text(runs, plot.sweeps(runs), False)


def test_families_have_spaces_of_their_own(tmp_path, monkeypatch):
    for k, (data, space) in enumerate((("toy", "pixels"),) * 3 + (("cifar10", "inception"),) * 2):
        run = folder_of(tmp_path, f"r{k}", {"data": data, "n": 16 * 2**k, "size": k // 3})
        text = (run / "metrics.csv").read_text().replace("_pixels_", f"_{space}_")
        (run / "metrics.csv").write_text(text)
    families = plot.find_runs(tmp_path).values()
    assert [[run.space for run in runs] for runs in families] == [
        ["pixels"] * 3, ["inception"] * 2]
    # a run without any distance, beside one with: its other figures are drawn
    run = folder_of(tmp_path, "r0b", {"data": "toy", "n": 8, "size": 0})
    rows = [{k: cell for k, cell in row.items() if "pixels" not in k} | {"sharpness": 1}
            for row in plot.read_rows(run / "metrics.csv")]
    write_csv(run / "metrics.csv", rows)
    write_csv(run / "spectrum.csv", [{"name": name, "set": "", "step": step, "power_0": 1,
                                      "power_1": 1} for name, step in (
                                          ("", 64), ("training", ""), ("heldout", ""))])
    drawn = []
    monkeypatch.setattr(plot, "save_figure", lambda figure, path, *_: drawn.append(path.name))
    plot.main([str(tmp_path)])
    assert "run_r0b.png" in drawn and "hump_r0b.png" not in drawn


def test_runs_that_are_not_measured_yet_count_and_so_does_no_run_twice(tmp_path):
    settings = {"setting_eta": 0.0}
    for n in (16, 32, 64):
        folder_of(tmp_path, f"N{n}", {"n": n}, {"a": settings, "b": {"setting_eta": 1.0}})
    for n in (128, 256, 512, 1024):
        (folder_of(tmp_path, f"N{n}", {"n": n}) / "metrics.csv").unlink()
    shutil.copytree(tmp_path / "N32", tmp_path / "copy of N32")
    runs = only(tmp_path)
    found = plot.sweeps(runs)
    assert list(found["n"]) == [16, 32, 64, 128, 256, 512, 1024]
    assert list(found["setting_eta"]) == [0.0, 1.0]
    assert all(len(group) == 1 for group in found["n"].values())
    text = plot.claims_text(runs, found, False)
    assert text.startswith("7 runs of 7 settings, 0 with repeats; distances in pixels "
                           "(4 of the runs: none); 4 other sets of samples are not judged.")
    assert "3 of 3 runs that reach copy ratio .1" in text
    assert all(len(group) == 1 for group in found["setting_eta"].values())
    (row,) = [row for row in text.splitlines() if row.startswith("| 3a")]
    (slope,) = [row for row in text.splitlines() if row.startswith("| held-out loss 25 % up")]
    assert slope.split(" | ")[1].split(" ")[0] in row           # both of one sweep


def test_roots_that_hold_different_runs_of_one_name_are_refused(tmp_path):
    folder_of(tmp_path / "a", "N16", {"n": 16, "ema": 0.9})
    folder_of(tmp_path / "b", "N16", {"n": 16, "ema": 0.99})
    with pytest.raises(plot.PlotError, match="N16: two of these folders .* another ema"):
        plot.find_runs(tmp_path / "a", tmp_path / "b")
    assert plot.find_runs(tmp_path / "a", tmp_path / "b", ignore=["ema"])
    # one name twice below one root, say in two sweeps, is two runs
    folder_of(tmp_path / "a/more", "N16", {"n": 16, "ema": 0.5})
    folder_of(tmp_path / "c", "N32", {"n": 32, "ema": 0.9})
    (runs,) = plot.find_runs(tmp_path / "a", tmp_path / "c").values()
    assert sorted(run.options["ema"] for run in runs) == [0.5, 0.9, 0.9]


def test_a_fluke_is_no_onset():
    steps = np.array([1., 2, 4, 8, 16, 32])
    assert plot.crossing(steps, np.array([0, .02, 0, 0, .02, .9]), .02) == 16
    assert plot.crossing(steps, np.array([0, .0, 0, 0, 0, .02]), .02) == 32     # the last will do
    assert plot.crossing(steps, np.array([0, .02, 0, 0, 0, 0]), .02) == math.inf


def test_a_plateau_with_a_fluke_still_has_a_rate():
    runs = made_up_study(0, EFFECT)
    for run in runs:
        copies = run.metrics["copy_ratio"]
        copies[:] = np.minimum(copies, 0.75)
        if run.options["n"] == 4096:
            copies[np.argmax(copies >= 0.75) + 1] = 0.8         # of one evaluation
    (row,) = [result for claim, result, _ in plot.judge(runs) if claim.number == "3b"]
    assert "4 values" in row.text and "not measured" not in row.text


def test_a_bound_far_beyond_the_line_pulls_it_there():
    x, y = np.log([1., 2, 4, 8]), np.log([1., 2, 4, 8])
    slopes = [plot.fit_line(x, y + [0, 0, 0, far], np.full(4, 0.01), np.array([0, 0, 0, 1]))[0]
              for far in (0, 4, 6, 8)]
    assert np.all(np.diff(slopes) > 0.3)


def test_a_setting_that_comes_with_the_process_does_not_split(tmp_path):
    for name, clip in (("ddpm", "True"), ("flow", "False")):
        folder_of(tmp_path, name, {"process": name}, {"": {"setting_clip": clip}})
    assert list(plot.sweeps(only(tmp_path))) == ["process"]


def test_families_are_named_by_what_differs(tmp_path):
    for n in (16, 32):
        folder_of(tmp_path, f"toy{n}", {"n": n, "data": "toy", "size": 8})
        folder_of(tmp_path, f"c{n}", {"n": n, "data": "a/cifar", "size": 16})
    found = plot.find_runs(tmp_path)
    assert {folder.relative_to(tmp_path).as_posix(): len(runs) for folder, runs in found.items()} \
        == {"figures/datatoy_size8": 2, "figures/datacifar_size16": 2}


def test_tables_alone_give_the_same_tables_again(tmp_path, drawn):
    for n in (16, 32, 64):
        run = folder_of(tmp_path / "runs", f"N{n}", {"n": n, "mults": [1, 2], "attention": None,
                                                     "process": "a, b"}, tau=20.0 * n)
        write_csv(run / "denoisers.csv", [{"set": "", "step": 64, "level": 0, "inputs": "path",
                                           "reference": "gaussian", "median": 1.5}])
        write_csv(run / "twin_x.csv", [{"step": 64, "agreement": 0.5}])
    plot.main([str(tmp_path / "runs")])
    first = tmp_path / "runs/figures"
    second = tmp_path / "results/mini"
    second.mkdir(parents=True)
    picture = second / "samples_N16.png"
    picture.write_bytes(b"")
    names = ("runs.csv", "summary.csv", "claims.md", "controls.csv", "denoisers.csv", "twin_x.csv")
    for name in names[:1] + names[3:]:
        (second / name).write_bytes((first / name).read_bytes())
    for more in ([], ["--ignore", "mults"], []):        # what is read is never written
        plot.main([str(tmp_path / "results"), *more])
        assert {path.name for path in second.iterdir()} == {
            "figures", picture.name, *names[:1], *names[3:]}
    for name in names:
        assert (second / "figures" / name).read_bytes() == (first / name).read_bytes(), name
    (runs, found, *_), *_, (again, refound, *_) = drawn
    for one, two in zip(runs, again, strict=True):
        assert two.path is None and one.options == two.options and one.controls == two.controls
        assert plot.onsets(two) == pytest.approx(plot.onsets(one), rel=1e-4, nan_ok=True)
    assert {f: [*g] for f, g in found.items()} == {f: [*g] for f, g in refound.items()}


def test_summary_quotes(tmp_path, drawn):
    folder_of(tmp_path, 'a, "b"', {"n": 16})
    folder_of(tmp_path, "c", {"n": 32})
    plot.main([str(tmp_path)])
    with open(tmp_path / "figures/summary.csv", newline="") as file:
        assert [row["run"] for row in csv.DictReader(file)] == ['a, "b"', "c"]


def test_the_studys_curves_stand_beside(tmp_path, drawn, capsys):
    for n in (16, 32, 64):
        folder_of(tmp_path, f"N{n}", {"n": n}, tau=20.0 * n)
    plot.main([str(tmp_path), "--paper"])
    (row,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| 3a ")]
    assert "1.23 [1.14, 1.31] undecided" in row and "scatter borrowed" in row
    assert len(drawn[0][3]) == 17


def test_one_run_prints_one_run(tmp_path, drawn, capsys):
    run = folder_of(tmp_path, "N16", {"n": 16})
    plot.main([str(run)])
    text = capsys.readouterr().out
    assert "to keep: step" in text and "copy ratio .1: step 39" in text and "claim" not in text
    assert text.count("\n") < 15 and not (run / "figures/claims.md").exists()


def test_stale_figures_go_and_other_files_stay(tmp_path, drawn):
    for n in (16, 32, 64):
        folder_of(tmp_path, f"N{n}", {"n": n})
    kept = [tmp_path / "figures" / name for name in (
        "mine.png", "sweep_notes.txt", "samples_for_my_talk.png", "run_of_mine.png")]
    plot.main([str(tmp_path)])
    plot.write(tmp_path / "figures/run_N64.png", b"")       # what is drawn is replaced in this test
    drawn_before = (tmp_path / "figures/.drawn").read_text()
    (tmp_path / "figures/.drawn").write_text(f"{drawn_before}\nrun_N64.png\n../N16/log.csv\n")
    for file in kept:
        file.write_bytes(b"")
    shutil.rmtree(tmp_path / "N64")
    plot.main([str(tmp_path)])
    assert not (tmp_path / "figures/run_N64.png").exists()
    assert all(file.exists() for file in (*kept, tmp_path / "N16/log.csv"))
    assert (tmp_path / "figures/claims.md").exists()


# what is damaged ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("file", "content"), [
    ("args.json", b"{"), ("args.json", b'{"options": []}'),
    ("args.json", b'{"options": {}, "free": 5}'), ("log.csv", b"\xff\x00\xfe"),
    ("log.csv", b"a,b\n1,2\n"), ("metrics.csv", b"step,copy_ratio\nx,y\n"),
    ("metrics.csv", b""), ("controls.csv", b"\xff")])
def test_a_damaged_run_is_left_out_with_one_line(tmp_path, drawn, capsys, file, content):
    for n in (16, 32, 64):
        folder_of(tmp_path, f"N{n}", {"n": n})
    (tmp_path / "N32" / file).write_bytes(content)
    with pytest.raises(SystemExit) as stop:
        plot.main([str(tmp_path)])
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 1 and len(lines) == 1 and f"N32/{file}" in lines[0]
    assert len(drawn[0][0]) == 2


@pytest.mark.parametrize("metrics", [
    "step,copy_ratio\n64,0.5,7,8\n128,0.9\n", "step,copy_ratio,sw_x_train\n64,nan,\n128,,\n",
    "other,step\n1,64\n", "step\n64\n", "step,copy_ratio\n64,0\n",
    "step,sw_x_train,sw_x_heldout\n0,1,1\n64,-1,-1\n",
    "step,copy_ratio,sw_x_heldout,sw_x_train\n1e999,1,1,1\n64,-1,0,0\n64,2,0,0\n"])
def test_odd_tables_are_taken_as_they_are(tmp_path, drawn, metrics):
    for n in (16, 32, 64):
        (folder_of(tmp_path, f"N{n}", {"n": n}) / "metrics.csv").write_text(metrics)
    plot.main([str(tmp_path), "--paper"])
    assert len(drawn[0][0]) == 3


@pytest.mark.parametrize("name", ["$x_{$", "N" * 245, "Ünï ⭐", "a|b"])
def test_odd_names(tmp_path, drawn, capsys, name):
    folder_of(tmp_path, name, {"n": 16})
    folder_of(tmp_path, "plain", {"n": 32})
    plot.main([str(tmp_path)])
    run, plain = sorted(drawn[0][0], key=lambda run: run.name == "plain")
    assert run.name == name and len(run.stem) < 130 and plain.stem == "plain"
    assert run.stem.replace("-", "").replace("_", "").isalnum()


def test_a_locale_that_cannot_print_a_name(tmp_path):
    folder_of(tmp_path, "Ünï ⭐", {"n": 16})
    code = "import plot, sys; plot.draw_all = lambda *_: None; plot.main(sys.argv[1:])"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, cwd=ROOT,
                          capture_output=True,
                          env=os.environ | {"PYTHONIOENCODING": "ascii", "LC_ALL": "C"})
    assert not done.stderr and b"to keep: step" in done.stdout


def test_interrupted(tmp_path, monkeypatch, capsys):
    folder_of(tmp_path, "N16", {"n": 16})

    def stop(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(plot, "draw_all", stop)
    with pytest.raises(SystemExit) as end:
        plot.main([str(tmp_path)])
    assert end.value.code == 130 and capsys.readouterr().err == "interrupted\n"


def test_bad_input(tmp_path, refused):
    refused(plot.main, [tmp_path / "none"], "none", "no such folder")
    refused(plot.main, [tmp_path], "no run")
    (tmp_path / "r").mkdir()
    (tmp_path / "r/args.json").write_text("{")
    refused(plot.main, [tmp_path / "r"], "args.json", "damaged")
    (tmp_path / "t").mkdir()
    (tmp_path / "t/runs.csv").write_text("run,n\n1,2\n")
    refused(plot.main, [tmp_path / "t"], "runs.csv", "no column 'step'")


def test_nothing_here_needs_torch():
    code = "import sys; sys.modules['torch'] = None; import plot"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize("name", ["digits", "digits_ddpm", "class", "toy", "mini", "mini_ddpm",
                                  "mini32", "w128", "features", "hump", "hump2048"])
def test_the_committed_tables_give_the_committed_verdicts(tmp_path, name):
    (runs,) = plot.find_runs(ROOT / "results" / name).values()
    plot.write_tables(runs, plot.sweeps(runs), tmp_path)
    one_run = name.startswith(("hump", "toy", "mini32", "w128", "features"))  # no verdicts
    for file in ("claims.md", "summary.csv", "runs.csv")[one_run:]:
        assert (tmp_path / file).read_text() == (ROOT / "results" / name / file).read_text(), file


def test_an_ignored_option_makes_no_other_run(tmp_path, drawn, capsys):
    for seed, count in ((0, 2048), (1, 5120), (2, 5120)):
        folder_of(tmp_path, f"s{seed}", {"n": 16, "seed": seed, "eval_images": count})
    plot.main([str(tmp_path)])
    assert "eval images" in capsys.readouterr().out
    plot.main([str(tmp_path), "--ignore", "eval-images"])
    text = capsys.readouterr().out
    assert "3 runs of 1 settings, 1 with repeats" in text and "eval images" not in text
    folder_of(tmp_path, "twice", {"n": 16, "seed": 0, "eval_images": 5120})
    with pytest.raises(SystemExit):
        plot.main(["--paper", "--ignore", "eval_images"])
    assert "--ignore: names options of a folder's runs" in capsys.readouterr().err
    for ignored, word in ((["none"], "--ignore none"), ([], "--ignore: s0 and twice")):
        with pytest.raises(SystemExit) as stop:
            plot.main([str(tmp_path), "--ignore", "eval_images", *ignored])
        lines = capsys.readouterr().err.strip().splitlines()
        assert stop.value.code == 2 and len(lines) == 1 and word in lines[0]
