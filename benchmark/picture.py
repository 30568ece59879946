"""Draws the README's picture of NE, growth, return and dormancy over a run, from the curves of a published result.

python benchmark/picture.py                                       # writes docs/ne_halfcheetah.png
python benchmark/picture.py --curves runs/report/curves.csv --out mine.png --task Hopper-v4
"""

import argparse
from pathlib import Path

import matplotlib
import pandas as pd

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parent.parent
METHODS = {"ne_td3_continuous": ("NE", "C0"), "td3_continuous": ("TD3, dense", "0.45")}
PANELS = {
    "density": "growth: share of connections that are active",
    "return": "return, without exploration noise",
    "dormant_actor": "share of dormant neurons, actor",
    "dormant_qf": "share of dormant neurons, critics",
}


def draw(curves, file, task):
    """curves: a table of task, method, seed, tag, step, value -> a picture with a panel for each tag of PANELS."""
    figure, panels = plt.subplots(1, len(PANELS), figsize=(14, 3.2), layout="constrained")
    for panel, (tag, title) in zip(panels, PANELS.items(), strict=True):
        for method, (name, color) in METHODS.items():
            of_method = curves[(curves["task"] == task) & (curves["method"] == method) & (curves["tag"] == tag)]
            for _, seed in of_method.groupby("seed"):
                panel.plot(seed["step"], seed["value"], color=color, alpha=0.3, linewidth=0.8)
            mean, seeds = of_method.groupby("step")["value"].mean(), of_method["seed"].nunique()
            panel.plot(mean.index, mean, color=color, linewidth=2, label=f"{name}, mean of {seeds} seeds")
        panel.set_title(title, fontsize="medium")
        panel.set_xlabel("environment steps")
        panel.xaxis.set_major_formatter(lambda step, _: f"{step / 1000:.0f}k")
        panel.set_ylim(bottom=0 if tag != "return" else None)
    panels[0].axhline(1, color="0.45", linewidth=2)  # a dense network
    panels[1].legend(fontsize="small")
    figure.suptitle(f"{task}; thin lines: single seeds; dormant: dormant score of at most 0.1", fontsize="medium")
    figure.savefig(file, dpi=80)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--curves", type=Path, default=ROOT / "benchmark/results/td3_100k/curves.csv")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/ne_halfcheetah.png")
    parser.add_argument("--task", default="HalfCheetah-v4")
    args = parser.parse_args()
    draw(pd.read_csv(args.curves), args.out, args.task)


if __name__ == "__main__":
    main()
