"""Scripts for users, and under `experiments` the programs behind the project's measurements.

Nothing installed imports this package. It is one so that `python -m examples.experiments...` works from a clone.
"""
