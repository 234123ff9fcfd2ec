"""The names of the forms of a training step; see `bench/step_forms.py`."""

EAGER, COMPILED = "eager", "eager, channels-last, compiled"
OURS, OURS_COMPILED = "ours", "ours, compiled"
OUR_FORMS = (OURS, OURS_COMPILED)
