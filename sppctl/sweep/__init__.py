"""A grid of configurations, run in this process or as Slurm jobs."""
