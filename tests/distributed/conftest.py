"""Programs next to the tests that aren't tests."""

collect_ignore = ["ray_runs.py"]  # it needs Ray, and test_ray.py runs it
