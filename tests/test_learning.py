"""The scripts learn: they solve a small task as a user runs them."""

from pathlib import Path

import harness
import numpy as np
import pytest


@pytest.mark.parametrize("script", ["td3_continuous", "ne_td3_continuous"])  # the others: test_methods.py
def test_the_script_solves_pendulum(script):
    words = ["--env-id", "Pendulum-v1", "--seed", "3", "--total-timesteps", "8000", "--learning-starts", "1000"]
    words += ["--hidden-dim", "64", "--batch-size", "128", "--learning-rate", "1e-3"]  # fewer steps than by default
    words += ["--growth-interval", "500"] if "growth_interval" in vars(harness.SCRIPTS[script].Args) else []
    result = harness.run(script, *words)
    assert result.returncode == 0, result.stderr
    (folder,) = Path("runs").iterdir()
    returns = [value for _, value in harness.events(folder)["charts/episodic_return"]]
    assert len(returns) == 40 and np.mean(returns[:10]) < -1000
    assert np.mean(returns[-10:]) > -250
