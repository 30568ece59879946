"""Reads runs' event files: a table of their last evaluations, and a picture of one run.

python benchmark/summary.py runs
python benchmark/summary.py runs --picture runs/HalfCheetah-v4__ne_td3_continuous__1__1700000000 run.png
"""

import argparse
import json
from pathlib import Path

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def scalars(folder):
    """A run's logs -> {tag: (steps, values)}."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    logged = {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}
    return {tag: (np.array([e.step for e in es]), np.array([e.value for e in es])) for tag, es in logged.items()}


def table(runs):
    """Prints the last evaluation of every finished run, grouped by task, script, and what else differs."""
    groups = {}
    for path in sorted(Path(runs).glob("*/model.pt")):
        args = json.loads((path.parent / "args.json").read_text())
        steps, returns = scalars(path.parent)["eval/episodic_return"]
        script = path.parent.name.split("__")[1]
        task = args["env_id"] if "env_id" in args else "+".join(args["env_ids"])  # of a cycle: its last task's return
        groups.setdefault((task, script, int(steps[-1])), []).append((args["seed"], float(returns[-1])))
    print("| task | script | step | seeds | mean | each seed |")
    print("|---|---|---|---|---|---|")
    for (env_id, script, step), seeds in sorted(groups.items()):
        each = ", ".join(f"{value:.0f}" for _, value in sorted(seeds))
        mean = np.mean([value for _, value in seeds])
        print(f"| {env_id} | {script} | {step} | {len(seeds)} | {mean:.0f} | {each} |")


def picture(folder, file):
    """Draws a run's return, density and dormant ratio over environment steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    logged, args = scalars(folder), json.loads((Path(folder) / "args.json").read_text())
    nets = {"actor": "tab:blue", "qf1": "tab:orange", "qf2": "tab:green"}
    figure, panels = plt.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
    panels[0].plot(*logged["charts/episodic_return"], color="0.75", label="training episodes")
    panels[0].plot(*logged["eval/episodic_return"], color="tab:blue", marker=".", label="evaluation, 10 episodes")
    panels[0].set_ylabel("return")
    panels[0].legend()
    for net, color in nets.items():
        if f"neurons/{net}/density" in logged:
            panels[1].plot(*logged[f"neurons/{net}/density"], color=color, label=net)
        panels[2].plot(*logged[f"neurons/{net}/dormant_ratio_0.1"], color=color, label=f"{net}, tau = 0.1")
        panels[2].plot(*logged[f"neurons/{net}/dormant_ratio_0"], color=color, linestyle=":", label=f"{net}, tau = 0")
    panels[1].set_ylabel("density (active / all connections)")
    panels[1].set_ylim(0, 1.05)
    panels[1].legend()
    panels[2].set_ylabel("dormant ratio (share of hidden neurons)")
    panels[2].set_ylim(bottom=0)
    panels[2].legend(fontsize="small")
    for panel in panels:
        panel.set_xlabel("environment steps")
        panel.grid(alpha=0.3)
    figure.suptitle(f"{Path(folder).name.split('__')[1]}, {args['env_id']}, seed {args['seed']}")
    figure.savefig(file, dpi=90)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", help="folder of run folders")
    parser.add_argument("--picture", nargs=2, metavar=("RUN_FOLDER", "FILE"), help="draw one run into a PNG file")
    args = parser.parse_args()
    if args.picture:
        picture(*args.picture)
    else:
        table(args.runs)


if __name__ == "__main__":
    main()
