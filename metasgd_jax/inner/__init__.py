"""The inner loop: how parameters are adapted to one task."""
