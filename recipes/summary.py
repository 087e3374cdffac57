"""What the results of a sweep say: accuracy by d, and the intrinsic dimension d_int90 of Li et al. 2018."""

import pandas as pd


TASK = ["dataset", "model"]
ABSOLUTE = 90.0  # %, the threshold of Gargiulo 2023 for MNIST


def by_d(runs: pd.DataFrame) -> pd.DataFrame:
    """Mean and standard deviation over seeds of the accuracy (%) after the last epoch and at the best one."""
    percent = runs.assign(final=100 * runs.final_accuracy, best=100 * runs.best_accuracy)
    groups = percent.groupby([*TASK, "projection", "d"])
    return groups.agg(
        seeds=("seed", "nunique"),
        final=("final", "mean"),
        final_sd=("final", "std"),
        best=("best", "mean"),
        best_sd=("best", "std"),
        seconds=("seconds", "mean"),
    ).reset_index()


def thresholds(table: pd.DataFrame) -> pd.DataFrame:
    """d_int90 of each projection: by 90 % of full training's final accuracy (relative) and by 90 % itself (absolute).

    The first d of the grid whose mean final accuracy reaches it, by first crossing and without interpolation, so the
    true value lies above the grid's next smaller d; missing where no d does.
    """
    rows = []
    for task, runs in table.groupby(TASK):
        full = runs[runs.projection == "full"].final
        relative = 0.9 * full.iloc[0] if len(full) else float("nan")
        for projection, line in runs[runs.projection != "full"].groupby("projection"):
            rows.append(
                dict(zip(TASK, task, strict=True))
                | {"projection": projection, "threshold": relative}
                | {"relative": first_crossing(line, relative), "absolute": first_crossing(line, ABSOLUTE)}
            )
    return pd.DataFrame(rows)


def first_crossing(line: pd.DataFrame, threshold: float, column: str = "final") -> int | None:
    reached = line[line[column] >= threshold].d
    return int(reached.min()) if len(reached) else None


def text(runs: pd.DataFrame) -> str:
    """Both tables as Markdown."""
    table = by_d(runs)
    accuracies = [
        [*task, projection, d or "all", seeds, spread(final, final_sd), spread(best, best_sd), f"{seconds:.0f}"]
        for *task, projection, d, seeds, final, final_sd, best, best_sd, seconds in table.itertuples(index=False)
    ]
    dimensions = [
        [*task, projection, f"{threshold:.2f}", _or_none(relative), _or_none(absolute)]
        for *task, projection, threshold, relative, absolute in thresholds(table).itertuples(index=False)
    ]
    return "\n".join(
        [
            *markdown([*TASK, "projection", "d", "seeds", "final %", "best %", "s a run"], accuracies),
            "",
            "d_int90: the first d of the grid whose mean final accuracy reaches the threshold, 90 % of full",
            f"training's (relative) or {ABSOLUTE:.0f} % itself (absolute).",
            "",
            *markdown([*TASK, "projection", "threshold %", "relative", "absolute"], dimensions),
        ]
    )


def markdown(header: list[str], rows: list[list]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(map(str, line)) + " |" for line in lines]


def spread(mean: float, sd: float) -> str:
    return f"{mean:.2f}" if pd.isna(sd) else f"{mean:.2f} ± {sd:.2f}"


def _or_none(d: float | None) -> str:
    return "none" if pd.isna(d) else f"{d:.0f}"
