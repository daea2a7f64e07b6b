"""Checks that fail in every way, to test how checks are run; without imports that take time."""

import os
import time

from gpu_runner import Outcome, Skipped


def passes(setup):
    """Passes."""
    print("printed by a check")
    return Outcome({"twice": 2 * setup})


def is_unmet(setup):
    """Finds that a requirement isn't met."""
    outcome = Outcome({"share": 0.25})
    outcome.require(True, "is met")
    outcome.require(False, "25% of what is needed")
    return outcome


def raises(setup):
    """Raises an exception."""
    raise ValueError("a typo\nand more")


def crashes(setup):
    """Ends its process."""
    os._exit(7)


def hangs(setup):
    """Takes longer than any budget."""
    time.sleep(600)


def is_skipped(setup):
    """Can't run here."""
    raise Skipped("nothing is installed")
