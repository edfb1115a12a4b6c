"""Responses of the teacher, bought once: where they are kept, and how they travel."""
