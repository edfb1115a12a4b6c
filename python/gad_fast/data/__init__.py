"""Prompts and the teacher's responses: read in any usual shape, split, encoded, served."""
