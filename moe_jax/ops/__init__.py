"""Heavy maths as pure functions."""
