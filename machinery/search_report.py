"""What a search has found: the best trials as a table, and all of them as a picture."""

import numpy as np
from optuna.distributions import CategoricalDistribution
from optuna.trial import TrialState

from machinery.drawing import Figure
from machinery.search import GOALS, ends
from plot import save_figure


def table(search, rows=10):
    """The best trials as Markdown."""
    keys = list(search.ranges)
    lines = [f"| trial | {GOALS[search.goal][0]} | {' | '.join(keys)} |", "| --- " * (2 + len(keys)) + "|"]
    for trial in search.best_first()[:rows]:
        values = [trial.params[key] for key in keys]
        shown = [f"{value:.4g}" if isinstance(value, float) else str(value) for value in values]
        lines.append(f"| {trial.user_attrs['name']} | {trial.value:.3g} | {' | '.join(shown)} |")
    return "\n".join(lines)


def draw_search(search, importances, output):
    """The value of every trial in order, and over each setting, with the share that the setting mattered; a PNG."""
    completed = search.trials(TrialState.COMPLETE)
    numbers, values = np.array([[trial.number, trial.value] for trial in completed]).T
    better = np.maximum if GOALS[search.goal][1] == "maximize" else np.minimum
    keys = sorted(search.ranges, key=lambda key: -importances.get(key, 0))
    columns = min(4, 1 + len(keys))
    rows = -(-(1 + len(keys)) // columns)
    figure = Figure(figsize=(3.6 * columns, 3.2 * rows), layout="constrained")
    first, *others = figure.subplots(rows, columns, squeeze=False).flat
    first.plot(numbers, values, "o", markersize=4)
    first.step(numbers, better.accumulate(values), where="post", label="best so far")
    for trial in search.trials(TrialState.PRUNED):
        first.axvline(trial.number, color="black", alpha=0.1, linewidth=3)
    first.set(title="trials; gray: stopped early", xlabel="trial", ylabel=GOALS[search.goal][0])
    first.legend(fontsize=8)
    for axis, key in zip(others, keys, strict=False):
        choice = search.ranges[key]
        names = ends(choice) if isinstance(choice, CategoricalDistribution) else None
        places = [names.index(trial.params[key]) if names else trial.params[key] for trial in completed]
        axis.scatter(places, values, c=numbers, cmap="viridis", s=16)
        if names:
            axis.set_xticks(range(len(names)), names)
        elif choice.log:
            axis.set_xscale("log")
            axis.tick_params(axis="x", which="minor", labelbottom=False)
        mattered = f", mattered {importances[key]:.0%}" if key in importances else ""
        axis.set(title=key.partition(".")[2] + mattered, xlabel=key)
    for axis in (first, *others[: len(keys)]):
        axis.grid(alpha=0.3)
    for axis in others[len(keys):]:
        axis.set_axis_off()
    save_figure(figure, output)
