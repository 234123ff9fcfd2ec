"""Attention as a choice among libraries: the call, what each library can do, the table of measured speeds."""
