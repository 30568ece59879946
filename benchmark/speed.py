"""Measures training speed: NE-TD3, our dense TD3, Stable-Baselines3's TD3, and the matrix products that they share.

    python benchmark/speed.py
    python benchmark/speed.py --env-ids HalfCheetah-v4 Humanoid-v4 --threads 1 2
    python benchmark/speed.py --cycle --env-ids HalfCheetah-v4 Humanoid-v4 Ant-v4 Hopper-v4 --threads 1
    python benchmark/speed.py --pixels
    python benchmark/speed.py --pixels --image-size 48 --batch-size 128 --hidden-dim 256 --augmentations 1 --threads 1

Each contestant is a process of its own; they take turns, a chunk of training steps each, so that whatever else the
machine is doing meets all of them alike. A ratio is taken within a round and given as its median and quartiles over
the rounds. The share of the matrix-product limit is the time that the products of one training step take alone,
in a bare loop, over the time of the whole training step (task, acting and storing included).
With --cycle the contestants are NE-TD3 on each task alone and in a cycle with the other ones, so padded to the largest
of them; then a short cycle of them all is run, for the time that a switch from task to task takes.
With --pixels they are NE-DrQ, DrQ, and the convolutions of one update alone, in a bare loop: random shifts, forward and
backward passes. They run on the GPU if there is one, which is waited for before a time is taken. The last command above
is a setting for a CPU. NE's events (with --pixels every 2500 gradient steps, --growth-interval) come later than the
timed steps, so what they cost is not in the numbers unless that interval is made short.
"""

import argparse
import contextlib
import importlib.metadata
import importlib.util
import multiprocessing
import os
import platform
import re
import resource
import shlex
import sys
import tempfile
import time
import warnings
from csv import writer
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {"NE-TD3": ROOT / "ne_td3_continuous.py", "TD3": ROOT / "baselines" / "td3_continuous.py"}
CYCLING = ROOT / "ne_td3_cycling.py"
PIXELS = {"NE-DrQ": ROOT / "ne_drq_pixels.py", "DrQ": ROOT / "baselines" / "drq_pixels.py"}
LEARNING_STARTS, HIDDEN, BATCH = 1000, 256, 256
PIXELS_LEARNING_STARTS = 200
TOTAL = 1_000_000  # of the run that is timed; only its beginning is run


class Turns:
    """Stands in for a run's progress bar: hands out its steps in chunks, each when the main process says so."""

    def __init__(self, steps, pipe, chunk, warm_up):
        self.steps, self.pipe, self.chunk, self.warm_up = steps, pipe, chunk, warm_up
        self.parts, self.marked, self.synchronize = {}, 0.0, lambda: None

    def mark(self, part):
        """Adds the time since the last mark to what a part of the steps takes."""
        self.synchronize()
        now = time.perf_counter()
        self.parts[part] = self.parts.get(part, 0.0) + now - self.marked
        self.marked = now

    def turn_over(self, step):
        """Called before each step: after a chunk, reports its time and waits for the next turn."""
        if step < self.warm_up or (step - self.warm_up) % self.chunk:
            return
        if step > self.warm_up:
            self.pipe.send(time.perf_counter() - self.start)
        else:
            self.pipe.send("warm")
        if self.pipe.recv() == "stop":
            on_gpu = sys.modules["torch"].cuda.max_memory_allocated()
            self.pipe.send((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, on_gpu, self.parts))
            os._exit(0)
        if step == self.warm_up:
            self.parts.clear()
        self.start = self.marked = time.perf_counter()

    def __iter__(self):
        for step in self.steps:
            self.turn_over(step)
            yield step
            self.mark("update")

    def set_postfix(self, *args, **kwargs):
        pass


def load_script(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_script(path, task, threads, pipe, chunk, warm_up):
    module = load_script(path)
    module.tqdm = lambda steps, **kwargs: Turns(steps, pipe, chunk, warm_up)
    args = {"learning_starts": LEARNING_STARTS, "eval_interval": 0, "checkpoint_interval": 0, "cuda": False}
    module.main(module.Args(**task, torch_threads=threads, **args))


def marked(call, turns, after, before=None):
    """A function that marks the time before and after it."""

    def calling(*arguments):
        if before:
            turns.mark(before)
        result = call(*arguments)
        turns.mark(after)
        return result

    return calling


def run_pixels(path, task, threads, pipe, chunk, warm_up):
    """A step's parts, in their order: acting, rendering (with the task's own steps and resets), storing, the update."""
    module = load_script(path)
    turns = Turns(None, pipe, chunk, warm_up)
    if module.torch.cuda.is_available():
        turns.synchronize = module.torch.cuda.synchronize

    def take_turns(steps, **kwargs):
        turns.steps = steps
        return turns

    module.tqdm = take_turns
    module.repeat_action = marked(module.repeat_action, turns, "render", before="acting")
    module.picture = marked(module.picture, turns, "render")
    module.ReplayBuffer.add = marked(module.ReplayBuffer.add, turns, "storing")
    args = {"learning_starts": PIXELS_LEARNING_STARTS, "eval_interval": 0, "checkpoint_interval": 0}
    known = {name: value for name, value in task.items() if name in module.Args.__dataclass_fields__}
    module.main(module.Args(**known, torch_threads=threads, **args))


def run_convolutions(task, threads, pipe, chunk, warm_up):
    """What DrQ's encoder does in each update: the shifts and both its passes, and the target encoder's."""
    module = load_script(PIXELS["DrQ"])
    torch = module.torch
    known = {name: value for name, value in task.items() if name in module.Args.__dataclass_fields__}
    args = module.Args(**known, torch_threads=threads)
    module.set_process(args)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    encoder, target = (module.Encoder(args.frame_stack, args.image_size).to(device) for _ in range(2))
    shape = args.batch_size, 3 * args.frame_stack, args.image_size, args.image_size
    obs, next_obs = (torch.randint(0, 256, shape, dtype=torch.uint8, device=device) for _ in range(2))
    turns = Turns(range(warm_up - 5, TOTAL), pipe, chunk, warm_up)
    if device.type == "cuda":
        turns.synchronize = torch.cuda.synchronize
    for step in turns:
        shifted = module.random_shift(obs.repeat(args.loss_augmentations, 1, 1, 1), args.shift)
        next_shifted = module.random_shift(next_obs.repeat(args.target_augmentations, 1, 1, 1), args.shift)
        encoder.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16, cache_enabled=False):
            with torch.no_grad():
                encoder(next_shifted)
                target(next_shifted)
                if step % args.policy_frequency == 0:
                    encoder(shifted[: args.batch_size])
            seen = encoder(shifted)
        seen.backward(torch.ones_like(seen))


def run_sb3(env_id, threads, pipe, chunk, warm_up):
    warnings.filterwarnings("ignore")
    import gymnasium as gym
    import torch
    from stable_baselines3 import TD3
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.noise import NormalActionNoise

    torch.set_num_threads(threads)
    turns = Turns(None, pipe, chunk, warm_up)

    class Callback(BaseCallback):
        def _on_step(self):
            turns.turn_over(self.num_timesteps)
            return True

    env = gym.make(env_id)
    actions = env.action_space.shape[0]
    model = TD3(
        "MlpPolicy",
        env,
        learning_rate=3e-4,
        buffer_size=TOTAL,
        learning_starts=LEARNING_STARTS,
        batch_size=BATCH,
        train_freq=1,
        gradient_steps=1,
        action_noise=NormalActionNoise(np.zeros(actions), 0.1 * np.ones(actions)),
        policy_kwargs={"net_arch": [HIDDEN, HIDDEN]},
        seed=1,
        device="cpu",
    )
    model.learn(TOTAL, callback=Callback())


def matrix_products(obs_dim, action_dim):
    """The products of one training step, as (rows, inner, columns, share of the steps that do it) -> list."""
    products = []

    def forward(n_in, n_out, share=1.0):
        products.extend((BATCH, i, o, share) for i, o in ((n_in, HIDDEN), (HIDDEN, HIDDEN), (HIDDEN, n_out)))

    def weight_gradients(n_in, n_out, share=1.0):
        products.extend((i, BATCH, o, share) for i, o in ((n_in, HIDDEN), (HIDDEN, HIDDEN), (HIDDEN, n_out)))

    def hidden_gradients(n_out, share=1.0):
        products.extend((BATCH, o, i, share) for i, o in ((HIDDEN, n_out), (HIDDEN, HIDDEN)))

    q_in = obs_dim + action_dim
    forward(obs_dim, action_dim)  # target actor
    for _ in range(2):
        forward(q_in, 1)  # target critic
        forward(q_in, 1)  # critic
        hidden_gradients(1)
        weight_gradients(q_in, 1)
    forward(obs_dim, action_dim, 0.5)  # the actor's update, every other step
    forward(q_in, 1, 0.5)
    hidden_gradients(1, 0.5)
    products.append((BATCH, HIDDEN, action_dim, 0.5))  # the critic's gradient with respect to the actions
    hidden_gradients(action_dim, 0.5)
    weight_gradients(obs_dim, action_dim, 0.5)
    return products


def run_products(env_id, threads, pipe, chunk, warm_up):
    warnings.filterwarnings("ignore")
    import gymnasium as gym
    import torch

    torch.set_num_threads(threads)
    env = gym.make(env_id)
    products = []
    for rows, inner, columns, share in matrix_products(env.observation_space.shape[0], env.action_space.shape[0]):
        tensors = torch.randn(rows, inner), torch.randn(inner, columns), torch.empty(rows, columns)
        products.append((*tensors, share))
    with torch.no_grad():
        for step in Turns(range(TOTAL), pipe, chunk, warm_up):
            for left, right, out, share in products:
                if share == 1 or step % 2 == 0:
                    torch.mm(left, right, out=out)


def contestant(name, env_id, threads, pipe, chunk, warm_up, folder, settings):
    os.chdir(folder)
    sys.stdout = sys.stderr = open(os.devnull, "w")
    os.dup2(sys.stderr.fileno(), 2)
    if name in SCRIPTS:
        run_script(SCRIPTS[name], {"env_id": env_id, "total_timesteps": TOTAL}, threads, pipe, chunk, warm_up)
    elif name in PIXELS:
        run_pixels(PIXELS[name], {"env_id": env_id} | settings, threads, pipe, chunk, warm_up)
    elif name == "convolutions":
        run_convolutions(settings, threads, pipe, chunk, warm_up)
    elif name.startswith("cycle "):  # its first visit, to `env_id`, is all that is run
        task = {"env_ids": (env_id, *name.split()[1:]), "task_steps": TOTAL, "eval_episodes": 1}
        run_script(CYCLING, task, threads, pipe, chunk, warm_up)
    else:
        {"SB3 TD3": run_sb3, "products": run_products}[name](env_id, threads, pipe, chunk, warm_up)


def measure(names, env_id, threads, rounds, chunk, warm_up, settings=None):
    """-> ({contestant: seconds per step, [rounds]}, {contestant: (peak memory, on the GPU, seconds of each part)})."""
    context = multiprocessing.get_context("spawn")
    pipes = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in names:  # one after the other, so that warming up does not disturb either
            pipes[name], theirs = context.Pipe()
            arguments = (name, env_id, threads, theirs, chunk, warm_up, folder, settings)
            context.Process(target=contestant, args=arguments, daemon=True).start()
            theirs.close()
            assert pipes[name].recv() == "warm"
        seconds = {name: [] for name in names}
        for _ in range(rounds):
            for name in names:
                pipes[name].send("go")
                seconds[name].append(pipes[name].recv() / chunk)
        ends = {}
        for name in names:
            pipes[name].send("stop")
            ends[name] = pipes[name].recv()
    return {name: np.array(times) for name, times in seconds.items()}, ends


def show(*cells, csv=None):
    """Prints a row of a table, the first one as its head, and writes it to the CSV file."""
    cells = [str(cell) for cell in cells]
    print("|", " | ".join(cells), "|" + ("\n" + "|---" * len(cells) + "|") * (not show.rows), flush=True)
    show.rows.append(cells)
    if csv:
        packages = {name: importlib.metadata.version(name) for name in ("torch", "gymnasium", "mujoco")}
        versions = ", ".join(f"{name} {version}" for name, version in packages.items())
        with open(csv, "w", newline="") as file:
            command = shlex.join(["python", os.path.relpath(__file__, ROOT), *sys.argv[1:]])
            file.write(f"# {command}\n# {machine()}, {versions}\n")
            writer(file, lineterminator="\n").writerows(show.rows)


show.rows = []


def machine():
    """Processor, cores and Python -> str."""
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, AttributeError):
        model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()).group(1)
    return f"{model}, {os.cpu_count()} cores, Python {platform.python_version()}"


def spread(ratios):
    low, middle, high = np.percentile(ratios, [25, 50, 75])
    return f"{middle:.2f} ({low:.2f}-{high:.2f})"


def time_switches(env_ids, threads, folder, visit=1500):
    """Runs a cycle of short visits -> seconds of the steps that start a visit, but the first."""
    times = []

    def steps(steps, **kwargs):
        for step in steps:
            start = time.perf_counter()
            yield step
            if step > 1 and (step - 1) % visit == 0:
                times.append(time.perf_counter() - start)

    class Bar:
        def __init__(self, *args, **kwargs):
            self.steps = steps(*args, **kwargs)

        def __iter__(self):
            return self.steps

        def set_postfix(self, *args, **kwargs):
            pass

    module = load_script(CYCLING)
    module.tqdm = Bar
    sizes = {"task_steps": visit, "learning_starts": visit // 2, "growth_interval": 100, "eval_episodes": 1}
    with contextlib.chdir(folder), open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        module.main(module.Args(env_ids=tuple(env_ids), torch_threads=threads, eval_interval=0, cuda=False, **sizes))
    return times


def print_cycle(args):
    """The table of --cycle."""
    show("task", "threads", "alone, steps/s", "in the cycle, steps/s", "in the cycle over alone")
    cycle = "cycle " + " ".join(args.env_ids)
    for env_id in args.env_ids:
        for threads in args.threads:
            seconds, _ = measure(["NE-TD3", cycle], env_id, threads, args.rounds, args.chunk, args.warm_up)
            alone, padded = seconds["NE-TD3"], seconds[cycle]
            rates = f"{np.median(1 / alone):.0f}", f"{np.median(1 / padded):.0f}"
            show(env_id, threads, *rates, spread(alone / padded), csv=args.csv)
    with tempfile.TemporaryDirectory() as folder:
        times = time_switches(args.env_ids, args.threads[0], folder)
    print(f"\nA step that starts a visit: {np.median(times) * 1e3:.1f} ms, at most {max(times) * 1e3:.1f} ms")


def print_pixels(args):
    """The table of --pixels."""
    import torch

    settings = {"image_size": args.image_size, "batch_size": args.batch_size, "hidden_dim": args.hidden_dim}
    settings |= {"action_repeat": args.action_repeat, "growth_interval": args.growth_interval, "bf16": args.bf16}
    settings |= {"target_augmentations": args.augmentations, "loss_augmentations": args.augmentations}
    print(", ".join(f"{name} {value}" for name, value in settings.items()))
    print("on", torch.cuda.get_device_name() if torch.cuda.is_available() else "the CPU", "\n")
    shares = ["render", "update", "acting", "storing"]
    columns = ["task", "threads", "method", "frames/s", "over DrQ", *shares, "encode (part of update)"]
    show(*columns, "memory, MB", "on the GPU, MB")
    for env_id in args.env_ids:
        for threads in args.threads:
            names = [*PIXELS, "convolutions"]
            seconds, ends = measure(names, env_id, threads, args.rounds, args.chunk, args.warm_up, settings)
            for name in PIXELS:
                own, (memory, on_gpu, parts) = seconds[name], ends[name]
                cells = [env_id, threads, name, f"{args.action_repeat * np.median(1 / own):.1f}"]
                cells += [spread(seconds["DrQ"] / own)]
                cells += [f"{parts[part] / sum(parts.values()):.2f}" for part in shares]
                cells += [spread(seconds["convolutions"] / own), f"{memory / 1e6:.0f}", f"{on_gpu / 1e6:.0f}"]
                show(*cells, csv=args.csv)
    print("\nFrames are the task's: agent steps times action repeat. For orientation, DrQ-v2's published figure is")
    print("64 to 120 frames/s, training on one GPU.")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env-ids", nargs="+", help="default: HalfCheetah-v4; with --pixels dm_control/walker-walk-v0")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--chunk", type=int, help="training steps of a turn; default: 250, with --pixels 20")
    parser.add_argument("--warm-up", type=int, help="steps before the first turn; default: 1500, with --pixels 205")
    parser.add_argument("--cycle", action="store_true", help="measure what being one task of a cycle costs")
    parser.add_argument(
        "--pixels", action="store_true", help="measure the scripts that learn from pixels, as set below"
    )
    parser.add_argument("--csv", metavar="FILE", help="write the table to a CSV file, with command, machine, versions")
    parser.add_argument("--image-size", type=int, default=84)
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--hidden-dim", type=int, default=1024)
    parser.add_argument("--action-repeat", type=int, default=2)
    parser.add_argument("--augmentations", type=int, default=2, help="random shifts, K and M")
    parser.add_argument("--growth-interval", type=int, default=2500)
    parser.add_argument("--bf16", action="store_true")
    args = parser.parse_args()
    args.env_ids = args.env_ids or ["dm_control/walker-walk-v0" if args.pixels else "HalfCheetah-v4"]
    args.chunk = args.chunk or (20 if args.pixels else 250)
    args.warm_up = args.warm_up or (PIXELS_LEARNING_STARTS + 5 if args.pixels else LEARNING_STARTS + 500)
    print(machine())
    print("Medians over rounds, quartiles in parentheses.\n")
    if args.cycle:
        return print_cycle(args)
    if args.pixels:
        return print_pixels(args)
    show("task", "threads", "method", "steps/s", "over SB3's TD3", "over our TD3", "share of the limit", "memory, MB")
    for env_id in args.env_ids:
        for threads in args.threads:
            names = [*SCRIPTS, "SB3 TD3", "products"]
            seconds, ends = measure(names, env_id, threads, args.rounds, args.chunk, args.warm_up)
            for name in [*SCRIPTS, "SB3 TD3"]:
                own = seconds[name]
                columns = [spread(seconds[other] / own) for other in ("SB3 TD3", "TD3", "products")]
                rate = f"{np.median(1 / own):.0f}"
                show(env_id, threads, name, rate, *columns, f"{ends[name][0] / 1e6:.0f}", csv=args.csv)
            rate = f"{np.median(1 / seconds['products']):.0f}"
            show(env_id, threads, "matrix products alone", rate, "", "", "1", "", csv=args.csv)


if __name__ == "__main__":
    main()
