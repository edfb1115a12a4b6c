"""Engines that sample rollouts from the student; nothing outside knows which one runs."""
