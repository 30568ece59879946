"""Shows whether this tree and another checkout of the repository compute the same numbers, bit for bit on the CPU.

    python tests/same_numbers.py BEFORE [--scripts NAME ...] [--keep FOLDER]

Each script is run in both trees with the same arguments. All scalars in the logs, but the speed, and the final weights
must be the same. The names of weights inside a network may differ, and so may its buffers other than masks; masks and
targets are compared if both trees save them.
"""

import argparse
import hashlib
import itertools
import math
import os
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

ROOT = Path(__file__).resolve().parent.parent

SMALL = "--hidden-dim 64 --batch-size 64 --buffer-size 1500 --neuron-interval 100"
LOOKS = "--eval-interval 1000 --eval-episodes 2"
HALF_CHEETAH = f"--env-id HalfCheetah-v4 --total-timesteps 4000 --learning-starts 1000 --neuron-interval 200 {LOOKS}"
PENDULUM = f"--env-id Pendulum-v1 --total-timesteps 2500 --learning-starts 500 {SMALL} {LOOKS}"
HOPPER = f"--env-id Hopper-v4 --total-timesteps 2500 --learning-starts 500 --learning-rate 3e-3 {SMALL} {LOOKS}"
CYCLE = f"--env-ids Hopper-v4 Pendulum-v1 --cycles 2 --task-steps 1000 --learning-starts 300 {SMALL}"
CYCLE += " --eval-interval 400 --eval-episodes 2"
PIXELS = (
    "--env-id dm_control/cartpole-balance-v0 --image-size 24 --action-repeat 8 --total-timesteps 450"
    " --learning-starts 100 --hidden-dim 32 --batch-size 16 --buffer-size 300 --neuron-interval 20"
    " --eval-interval 400 --eval-episodes 1"
)

# The command lines of each script
CASES = {
    "td3_continuous": [HALF_CHEETAH],
    "ne_td3_continuous": [f"{HALF_CHEETAH} --growth-interval 300", f"{HOPPER} --growth-interval 100"],
    "reset_td3_continuous": [f"{PENDULUM} --reset-interval 800"],
    "redo_td3_continuous": [f"{PENDULUM} --redo-interval 300"],
    "injection_td3_continuous": [f"{PENDULUM} --injection-step 1000 1800"],
    "layer_norm_td3_continuous": [PENDULUM],
    "static_sparse_td3_continuous": [PENDULUM],
    "rigl_td3_continuous": [f"{PENDULUM} --rigl-interval 300"],
    "td3_cycling": [CYCLE],
    "ne_td3_cycling": [f"{CYCLE} --growth-interval 100 --learning-rate 3e-3"],
    "reset_td3_cycling": [f"{CYCLE} --reset-interval 900"],
    "redo_td3_cycling": [f"{CYCLE} --redo-interval 300"],
    "injection_td3_cycling": [f"{CYCLE} --injection-step 1500"],
    "layer_norm_td3_cycling": [CYCLE],
    "drq_pixels": [PIXELS],
    "ne_drq_pixels": [f"{PIXELS} --growth-interval 20"],
    "reset_drq_pixels": [f"{PIXELS} --reset-interval 150"],
    "redo_drq_pixels": [f"{PIXELS} --redo-interval 50"],
    "injection_drq_pixels": [f"{PIXELS} --injection-step 200"],
    "layer_norm_drq_pixels": [PIXELS],
    "hare_tortoise_td3_continuous": [f"{PENDULUM} --tortoise-interval 500"],
    "shrink_perturb_td3_continuous": [f"{PENDULUM} --shrink-perturb-interval 500"],
    "regrama_td3_continuous": [f"{PENDULUM} --regrama-interval 200"],
    "ne_layer_norm_td3_continuous": [f"{HOPPER} --growth-interval 100"],
}
ALWAYS_ON = "weight_decay", "leaky_relu", "spectral_norm", "l2_init", "crelu", "nap", "two_hot"
CASES |= {f"{name}_td3_continuous": [PENDULUM] for name in ALWAYS_ON}


def path_of(tree, script):
    """Where a script lies in a checkout -> Path."""
    path = tree / f"{script}.py"
    return path if path.exists() else tree / "baselines" / path.name


def run(tree, script, words):
    """Runs a script of a checkout in a folder of its own -> its numbers; RuntimeError if it fails."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(path_of(tree, script)), *words.split()]
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        if done.returncode:
            last = "\n    ".join(done.stderr.splitlines()[-8:])
            raise RuntimeError(f"exit code {done.returncode} of {' '.join(command[1:])}\n    {last}")
        return numbers(next(Path(folder, "runs").iterdir()))


def kept(folder, tree, script, words):
    """As `run`, but from `folder`, if not None, once the same code has run with the same words -> its numbers."""
    if folder is None:
        return run(tree, script, words)
    key = hashlib.sha256(path_of(tree, script).read_bytes() + words.encode()).hexdigest()[:16]
    path = folder / f"{script}-{key}.pickle"
    if not path.exists():
        content = pickle.dumps(run(tree, script, words))
        folder.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return pickle.loads(path.read_bytes())


def numbers(folder):
    """What a run logged, and its last models/<step>.pt or its model.pt -> {name: list of entries}.

    {tag: [(step, value), ...]} and {"final weights of <network>" or "final masks of ...": [shape, value, value, ...]}
    """
    found = {}
    for path in sorted(folder.glob("events.out.tfevents.*")):
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                if value.metadata.plugin_data.plugin_name == "scalars" and value.tag != "charts/SPS":
                    number = value.tensor.float_val[0] if value.tensor.float_val else value.simple_value
                    found.setdefault(value.tag, []).append((event.step, number))
    path = max(folder.glob("models/*.pt"), key=lambda path: int(path.stem), default=folder / "model.pt")
    kinds = {"weight": "weights", "bias": "weights", "mask": "masks"}
    for network, state in torch.load(path, map_location="cpu", weights_only=True).items():
        for name, tensor in state.items():
            if kind := kinds.get(name.split(".")[-1]):
                entries = found.setdefault(f"final {kind} of {network}", [])
                entries += [tuple(tensor.shape), *tensor.flatten().tolist()]
    return found


def differences(before, after):
    """The first entry that differs of each name -> list of str, the earliest step first, weights last."""
    found = []
    for name in before.keys() | after.keys():
        entries, final = (before.get(name, []), after.get(name, [])), name.startswith("final ")
        if final and ("masks" in name or "target" in name) and not all(entries):
            continue
        for place, (a, b) in enumerate(itertools.zip_longest(*entries)):
            if repr(a) != repr(b):  # NaN is the same as NaN, and 0.0 is not -0.0
                step = math.inf if final else min(entry[0] for entry in (a, b) if entry)
                what = f"entry {place}" if final else "(step, value)"
                found.append((step, f"{name}: {what} is {a} before, {b} after"))
                break
    return [text for _, text in sorted(found)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="folder of the other checkout")
    parser.add_argument("--scripts", nargs="+", choices=CASES, default=list(CASES), metavar="NAME", help="default: all")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="where BEFORE's numbers are kept, of this machine")
    parser.add_argument("--before-only", action="store_true", help="run only BEFORE, to fill the folder of --keep")
    args = parser.parse_args()
    bad = False
    for script in args.scripts:
        found, compared = [], []
        try:
            for words in CASES[script]:
                before = kept(args.keep, args.before.resolve(), script, words)
                after = before if args.before_only else run(ROOT, script, words)
                found += differences(before, after)
                compared += [(name, entries) for name, entries in before.items() if name in after]
            lengths = [len(entries) for name, entries in compared if not name.startswith("final ")]
            learned = sum(isinstance(entry, float) for _, entries in compared for entry in entries)  # of masks: bool
            line = f"{'kept' if args.before_only else 'same'}: {script}"
            line += f" ({sum(lengths)} numbers in {len(lengths)} tags, {learned} weights)"
            if found:
                line = f"DIFFERENT: {script}: {found[0]}; {len(found) - 1} more"
        except RuntimeError as error:
            found, line = [error], f"FAILED: {script}: {error}"
        print(line, flush=True)
        bad |= bool(found)
    sys.exit(bad)


if __name__ == "__main__":
    main()
