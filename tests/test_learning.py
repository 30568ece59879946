"""The scripts learn: they solve a small task as a user runs them."""

from pathlib import Path

import harness
import numpy as np
import pytest


@pytest.mark.parametrize("script", ["td3_continuous", "ne_td3_continuous"])  # the others: test_methods.py
def test_the_script_solves_pendulum(script):
    args = harness.SCRIPTS[script].Args
    words = ["--env-id", "Pendulum-v1", "--seed", "1", "--total-timesteps", "10000", "--learning-starts", "1000"]
    words += ["--growth-interval", "500"] if hasattr(args, "growth_interval") else []
    result = harness.run(script, *words)
    assert result.returncode == 0, result.stderr
    (folder,) = Path("runs").iterdir()
    returns = [value for _, value in harness.events(folder)["charts/episodic_return"]]
    assert len(returns) == 50
    assert np.mean(returns[-10:]) > -250
