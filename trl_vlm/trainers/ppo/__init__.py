"""PPO with a critic, on TRL's GRPOTrainer."""
