"""The game: warm-up, then the student against the discriminator."""
