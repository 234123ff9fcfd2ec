"""Attention by one of several libraries: the call, the limits of each library, the table of measured speeds."""
