"""Measures training speed: NE-TD3, our dense TD3, Stable-Baselines3's TD3, and the matrix products that they share.

    python benchmark/speed.py
    python benchmark/speed.py --env-ids HalfCheetah-v4 Humanoid-v4 --threads 1 2
    python benchmark/speed.py --beside ../before --threads 1
    python benchmark/speed.py --cycle --env-ids HalfCheetah-v4 Humanoid-v4 Ant-v4 Hopper-v4 --threads 1
    python benchmark/speed.py --pixels
    python benchmark/speed.py --pixels --image-size 48 --batch-size 128 --hidden-dim 256 --augmentations 1 --threads 1

Each contestant is a process of its own; they take turns, a chunk of training steps each, so that whatever else the
machine is doing meets all of them alike. A ratio is taken within a round and given as its median and quartiles over
the rounds. The share of the matrix-product limit is the time that the products of one training step take alone,
in a bare loop, over the time of the whole training step (task, acting and storing included).
With --beside, NE-TD3 and TD3 of another checkout of the repository, for instance of the commit before, take turns with
those of this one.
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
    """Stands in for a run's progress bar: lets it do its steps in chunks, each when the main process says so."""

    def __init__(self, pipe, chunk, warm_up):
        self.pipe, self.chunk, self.warm_up = pipe, chunk, warm_up
        self.parts, self.marked, self.synchronize, self.step = {}, 0.0, lambda: None, 1

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
        try:
            self.pipe.send(time.perf_counter() - self.start if step > self.warm_up else "warm")
            if self.pipe.recv() == "stop":
                on_gpu = sys.modules["torch"].cuda.max_memory_allocated()
                self.pipe.send((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, on_gpu, self.parts))
                os._exit(0)
        except (OSError, EOFError):  # the main process is gone
            os._exit(1)
        if step == self.warm_up:
            self.parts.clear()
        self.start = self.marked = time.perf_counter()

    def __call__(self, steps=(), **kwargs):
        """In place of tqdm."""
        self.steps = steps
        return self

    def update(self):
        """Ends a step of a script that tells its bar so."""
        self.mark("update")
        self.step += 1
        self.turn_over(self.step)

    def __iter__(self):
        """The steps, for a script that takes them from its bar, as those of older commits do."""
        for step in self.steps:
            self.turn_over(step)
            yield step
            self.mark("update")

    def __getattr__(self, name):  # what else a bar does
        return lambda *args, **kwargs: None


def load_script(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_script(path, task, threads, turns):
    module = load_script(path)
    module.tqdm = turns
    args = {"learning_starts": LEARNING_STARTS, "eval_interval": 0, "checkpoint_interval": 0, "cuda": False}
    module.main(module.Args(**task, torch_threads=threads, **args))


def marked(call, turns, after, before=None):
    """A function that marks the time before and after it."""

    def calling(*arguments, **named):
        if before:
            turns.mark(before)
        result = call(*arguments, **named)
        turns.mark(after)
        return result

    return calling


def run_pixels(path, task, threads, turns):
    """A step's parts, in their order: acting, rendering (with the task's own steps and resets), storing, the update."""
    module = load_script(path)
    if module.torch.cuda.is_available():
        turns.synchronize = module.torch.cuda.synchronize
    module.tqdm = turns
    for name in ("step", "reset"):
        setattr(module.Pixels, name, marked(getattr(module.Pixels, name), turns, "render", before="acting"))
    for name in ("add", "add_frame"):
        setattr(module.ReplayBuffer, name, marked(getattr(module.ReplayBuffer, name), turns, "storing"))
    args = {"learning_starts": PIXELS_LEARNING_STARTS, "eval_interval": 0, "checkpoint_interval": 0}
    known = {name: value for name, value in task.items() if name in module.Args.__dataclass_fields__}
    module.main(module.Args(**known, torch_threads=threads, **args))


def run_convolutions(task, threads, turns):
    """What DrQ's encoder does in each update: the shifts and both its passes, and the target encoder's."""
    module = load_script(PIXELS["DrQ"])
    torch = module.torch
    known = {name: value for name, value in task.items() if name in module.Args.__dataclass_fields__}
    args = module.Args(**known)
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    encoder, target = (module.Encoder(args.frame_stack, args.image_size).to(device) for _ in range(2))
    shape = args.batch_size, 3 * args.frame_stack, args.image_size, args.image_size
    obs, next_obs = (torch.randint(0, 256, shape, dtype=torch.uint8, device=device) for _ in range(2))
    if device.type == "cuda":
        turns.synchronize = torch.cuda.synchronize
    for step in turns(range(turns.warm_up - 5, TOTAL)):
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


def run_sb3(env_id, threads, turns):
    warnings.filterwarnings("ignore")
    import gymnasium as gym
    import torch
    from stable_baselines3 import TD3
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.noise import NormalActionNoise

    torch.set_num_threads(threads)

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


def run_products(env_id, threads, turns):
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
        for step in turns(range(TOTAL)):
            for left, right, out, share in products:
                if share == 1 or step % 2 == 0:
                    torch.mm(left, right, out=out)


def contestant(run, threads, pipe, chunk, warm_up, folder):
    """A process that runs `run`, a function and its first arguments, in turns with the others."""
    os.chdir(folder)
    sys.stdout = sys.stderr = open(f"{os.getpid()}.txt", "w")
    os.dup2(sys.stderr.fileno(), 2)
    function, *arguments = run
    function(*arguments, threads, Turns(pipe, chunk, warm_up))


def measure(contestants, threads, args):
    """contestants: {name: what each runs}.

    -> ({name: seconds per step, [rounds]}, {name: (peak memory, on the GPU, seconds of each part)}).
    """
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:

        def receive(name):
            try:
                return pipes[name].recv()
            except EOFError:
                lines = Path(folder, f"{processes[name].pid}.txt").read_text().splitlines()
                sys.exit(f"error: {name} does not run: {lines[-1] if lines else 'it was killed'}")

        pipes, processes = {}, {}
        for name, run in contestants.items():  # one after the other, so that warming up does not disturb either
            pipes[name], theirs = context.Pipe()
            arguments = (run, threads, theirs, args.chunk, args.warm_up, folder)
            processes[name] = context.Process(target=contestant, args=arguments, daemon=True)
            processes[name].start()
            theirs.close()
            assert receive(name) == "warm"
        seconds = {name: [] for name in contestants}
        for _ in range(args.rounds):
            for name in contestants:
                pipes[name].send("go")
                seconds[name].append(receive(name) / args.chunk)
        ends = {}
        for name in contestants:
            pipes[name].send("stop")
            ends[name] = receive(name)
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

    class Clock(Turns):
        def turn_over(self, step):
            now = time.perf_counter()
            if step > 2 and (step - 2) % visit == 0:  # the step before this one
                times.append(now - self.start)
            self.start = now

    module = load_script(CYCLING)
    module.tqdm = Clock(None, None, None)
    sizes = {"task_steps": visit, "learning_starts": visit // 2, "growth_interval": 100, "eval_episodes": 1}
    with contextlib.chdir(folder), open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        module.main(module.Args(env_ids=tuple(env_ids), torch_threads=threads, eval_interval=0, cuda=False, **sizes))
    return times


def print_table(args):
    """The table without --cycle and --pixels; with --beside a row more for each script, and how ours compares to it."""
    scripts = dict(SCRIPTS)
    if args.beside:
        scripts |= {f"{name} beside": args.beside / path.relative_to(ROOT) for name, path in SCRIPTS.items()}
    columns = ["task", "threads", "method", "steps/s", "over SB3's TD3", "over our TD3", "share of the limit"]
    show(*columns, "memory, MB", *["over that beside"] * bool(args.beside))
    for env_id in args.env_ids:
        for threads in args.threads:
            task = {"env_id": env_id, "total_timesteps": TOTAL}
            runs = {name: (run_script, path, task) for name, path in scripts.items()}
            runs |= {"SB3 TD3": (run_sb3, env_id), "products": (run_products, env_id)}
            seconds, ends = measure(runs, threads, args)
            for name, own in seconds.items():
                cells = [env_id, threads, name, f"{np.median(1 / own):.0f}"]
                if name == "products":
                    cells[2:] = ["matrix products alone", cells[3], "", "", "1", ""]
                else:
                    cells += [spread(seconds[other] / own) for other in ("SB3 TD3", "TD3", "products")]
                    cells.append(f"{ends[name][0] / 1e6:.0f}")
                if args.beside:
                    other = seconds.get(f"{name} beside")
                    cells.append("" if other is None else spread(other / own))
                show(*cells, csv=args.csv)


def print_cycle(args):
    """The table of --cycle."""
    show("task", "threads", "alone, steps/s", "in the cycle, steps/s", "in the cycle over alone")
    for env_id in args.env_ids:
        for threads in args.threads:
            # the cycle's first visit, to `env_id`, is all that is run of it
            cycle = {"env_ids": (env_id, *args.env_ids), "task_steps": TOTAL, "eval_episodes": 1}
            alone = {"env_id": env_id, "total_timesteps": TOTAL}
            runs = {"alone": (run_script, SCRIPTS["NE-TD3"], alone), "cycle": (run_script, CYCLING, cycle)}
            seconds, _ = measure(runs, threads, args)
            rates = (f"{np.median(1 / seconds[name]):.0f}" for name in runs)
            show(env_id, threads, *rates, spread(seconds["alone"] / seconds["cycle"]), csv=args.csv)
    with tempfile.TemporaryDirectory() as folder:
        times = time_switches(args.env_ids, args.threads[0], folder)
    worst, middle = max(times) * 1e3, np.median(times) * 1e3
    print(f"\nA step that starts a visit, with the checkpoint before it: {middle:.1f} ms, at most {worst:.1f} ms")


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
            runs = {name: (run_pixels, path, {"env_id": env_id} | settings) for name, path in PIXELS.items()}
            seconds, ends = measure(runs | {"convolutions": (run_convolutions, settings)}, threads, args)
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
    beside = "another checkout of the repository, whose NE-TD3 and TD3 are measured too"
    parser.add_argument("--beside", type=Path, metavar="FOLDER", help=beside)
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
    if args.beside and (args.cycle or args.pixels or not (args.beside / SCRIPTS["NE-TD3"].name).exists()):
        parser.error(f"--beside {args.beside}: takes the folder of a checkout, and neither --cycle nor --pixels")
    args.beside = args.beside and args.beside.resolve()
    print(machine())
    print("Medians over rounds, quartiles in parentheses.\n")
    if args.cycle:
        return print_cycle(args)
    if args.pixels:
        return print_pixels(args)
    print_table(args)


if __name__ == "__main__":
    main()
