"""Search on Ray Tune."""
