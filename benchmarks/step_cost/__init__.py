"""What a step of the game costs, here and as a user would build it on TRL's GRPOTrainer."""
