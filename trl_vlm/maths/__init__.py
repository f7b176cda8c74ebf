"""The mathematics: pure functions of tensors that know torch and nothing else."""
