"""Many runs: a grid of configurations, here or as Slurm jobs."""
