"""What a run leaves behind and shows: folder, checkpoints, metrics, screen, interruption."""
