"""Toy tasks, registered on import: in a test by `import toys`, in a subprocess by the task id `toys:Toy...-v0`."""

from typing import ClassVar

import gymnasium as gym
import harness
import numpy as np
from gymnasium.envs.classic_control import PendulumEnv
from gymnasium.spaces import Box, Dict, Discrete

ENVIRONMENT = {"PYTHONPATH": str(harness.ROOT / "tests")}  # lets a subprocess find this module


class Toy(gym.Env):
    """Noise as observation, the first action as reward, episodes of `length` steps; a class says what is different."""

    observation_space = Box(-np.inf, np.inf, (2,), np.float32)
    action_space = Box(np.float32([-1]), np.float32([1]))
    length = 50

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self.observe(), {}

    def observe(self):
        self.observation_space.seed(int(self.np_random.integers(2**31)))
        return self.observation_space.sample()

    def step(self, action):
        assert np.isnan(action).any() or self.action_space.contains(action), f"{action} is out of bounds"
        self.steps += 1
        return self.observe(), self.reward(action), False, self.steps == self.length, {}

    def reward(self, action):
        return float(np.ravel(action)[0])


class Large(Toy):
    """The larger of two tasks of a cycle; its observations are never 0, nor are the middles of its bounds."""

    observation_space = Box(10, 11, (5,), np.float32)
    action_space = Box(np.float32([-2, 1, 0]), np.float32([4, 5, 0.5]))


class Small(Toy):
    """The smaller one; an episode that runs into the end of a visit is cut off there."""

    observation_space = Box(-2, -1, (2,), np.float32)
    length = 70


class DictObservation(Toy):
    observation_space = Dict({"a": Box(-1, 1, (2,)), "b": Box(-1, 1, (2, 3))})


class NestedObservation(Toy):
    observation_space = Dict({"a": Box(-1, 1, (2,)), "b": Discrete(3)})


class MatrixObservation(Toy):
    observation_space = Box(-1, 1, (2, 3))


class MatrixAction(Toy):
    action_space = Box(np.float32([[-1, 0], [2, -5]]), np.float32([[1, 3], [4, 10]]))


class DiscreteAction(Toy):
    action_space = Discrete(2)


class DiscreteObservation(Toy):
    observation_space = Discrete(4)


class UnboundedAction(Toy):
    action_space = Box(-np.inf, np.inf, (1,))


class HalfBoundedAction(Toy):
    action_space = Box(np.float32([-1, -1]), np.float32([1, np.inf]))


class ImageObservation(Toy):
    observation_space = Box(0, 255, (8, 8, 3), np.uint8)


class Endless(Toy):
    length = -1


class WithoutRenderMode(Toy):
    """Its constructor takes no argument, as that of many a task that nobody draws."""

    def __init__(self):
        pass


class NanReward(Toy):
    """Its reward stops being a number at the 600th step of a run."""

    taken = 0

    def reward(self, action):
        self.taken += 1
        return float("nan") if self.taken >= 600 else super().reward(action)


class InPlace(Toy):
    """Counts episodes and their steps in one array, which it gives out each time, and changes in place."""

    length = 7

    def __init__(self, render_mode=None):
        super().__init__(render_mode)
        self.state = np.array([-1, 0], np.float32)

    def reset(self, *, seed=None, options=None):
        self.state[:] = self.state[0] + 1, 0
        return super().reset(seed=seed, options=options)

    def observe(self):
        self.state[1] = self.steps
        return self.state


class RecordedPendulum(PendulumEnv):
    """Pendulum that keeps what every instance was reset with and which returns it gave."""

    instances: ClassVar[list] = []

    def __init__(self, render_mode=None):
        super().__init__(render_mode)
        self.seeds, self.returns, self.steps = [], [], 0
        self.instances.append(self)

    def reset(self, *, seed=None, options=None):
        self.seeds.append(seed)
        self.returns.append(0.0)
        self.steps = 0
        return super().reset(seed=seed, options=options)

    def step(self, action):
        obs, reward, terminated, _, info = super().step(action)
        self.steps += 1
        self.returns[-1] += float(reward)
        return obs, reward, terminated, self.steps == 100, info


def counter(truncate, render_mode=None):
    return harness.Counter(truncate=truncate)


for task in [*Toy.__subclasses__(), RecordedPendulum]:
    gym.register(f"Toy{task.__name__}-v0", entry_point=task)
for ending in ("Terminated", "Truncated"):
    gym.register(f"ToyCounter{ending}-v0", counter, kwargs={"truncate": ending == "Truncated"})
