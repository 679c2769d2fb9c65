"""What a visual token costs: the paper's cost model, measured time and memory, and the shape that every bench reports in."""
