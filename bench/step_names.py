"""What the forms of a training step are called; see `bench/step_forms.py`."""

EAGER, COMPILED = "eager", "eager, channels-last, compiled"
OURS, OURS_COMPILED = "ours", "ours, compiled"
OUR_FORMS = (OURS, OURS_COMPILED)
