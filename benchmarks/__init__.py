"""What the project measures: see `pytest benchmarks --benchmark-only`, and each module.

The modules with a command are run from the root of the repository: `python -m benchmarks.NAME`.
"""
