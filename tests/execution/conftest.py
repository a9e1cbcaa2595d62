"""The machines that run these tests have few cores, and small tensors gain nothing from more threads."""

import torch

torch.set_num_threads(1)
