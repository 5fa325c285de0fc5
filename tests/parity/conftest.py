"""One thread for torch: pytest-xdist runs a process per core, and threads that wait cost more."""

import torch

torch.set_num_threads(1)
