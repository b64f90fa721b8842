import os

# One thread a worker under pytest-xdist, in its child processes too: threads that wait for each
# other on busy cores cost more than they compute. Set before torch is imported.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
