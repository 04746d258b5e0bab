"""What looks at a run without taking part in it: live view, metrics on disk and in W&B, sample episodes."""
