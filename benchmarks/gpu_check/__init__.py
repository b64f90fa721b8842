"""Everything that only a GPU can tell, in one run: `python -m benchmarks.gpu_check --help`.

__main__      what a run does in which order, and in how much time
processes     a step in processes of its own, which may crash or hang
lines         what they leave, line by line
device        the GPU, or the CPU in its place
pytest_plugin, peaks, ops, network    the steps; steps runs the last three
report        the table and the JSON file
"""
