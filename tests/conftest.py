import os

import torch

# One thread a worker under pytest-xdist: the tensors are small, and threads that wait for each
# other on busy cores cost more than they compute.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)
