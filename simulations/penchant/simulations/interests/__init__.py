"""How well profiles follow interests: one module for each question, run by `penchant evaluate interests`."""
