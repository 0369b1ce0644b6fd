"""What every test needs: one thread (two runnable test processes with two OpenMP threads each are slower than one)."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

torch.set_num_threads(1)
