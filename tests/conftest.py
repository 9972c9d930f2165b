"""Tests train tiny models: one thread is fastest for them, and the same sums come out in every process."""

import os

os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"
