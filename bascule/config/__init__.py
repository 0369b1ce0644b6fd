"""The recipe: every setting of a run, typed, checked once, frozen. A room receives its own section, never the whole recipe."""
