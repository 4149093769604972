"""Shared by all tests: one thread, so that timings and bits do not depend on the machine or on what else runs on it."""
import torch

torch.set_num_threads(1)
