"""What a training run needs before it is begun: memory, time, money, disk, from its config alone."""
