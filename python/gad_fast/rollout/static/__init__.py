"""The lean engine: a preallocated cache, one row a rollout, refilled as rollouts finish."""
