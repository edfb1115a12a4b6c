"""How good the student is: on held-out prompts, without a judge."""
