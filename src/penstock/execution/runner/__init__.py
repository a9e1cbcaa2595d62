"""Executing steps: from SchedulerOutput to tensors, through the model and the sampler, to RunnerOutput."""
